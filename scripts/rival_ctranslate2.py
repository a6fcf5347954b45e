"""CTranslate2 in bench_fairseq.py: the same model and sentences, in the settings that its users would choose from."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from fairseq.data import Dictionary, data_utils
from fairseq_workloads import BEAM, Workload

ALLOCATORS = ("cuda_malloc_async", "cub_caching")  # of CTranslate2 on a GPU; the first is its default
FAIRSEQ_MAX_LENGTH = 200  # --max-len-b
COMPUTE_TYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def variants(
    device: str, precision: str, trained: bool, alone: bool, workers: Sequence[int], batch_tokens: Sequence[int]
) -> list[tuple[str, dict]]:
    """Return the systems with their settings: workers, and on a GPU the allocator, on a CPU threads and precision.

    *batch_tokens* are sizes of the batches that CTranslate2 makes itself, beside those that fairseq gets. They need a
    trained model: others are held to a length that each of fairseq's batches has for itself. Sentences *alone*, each of
    which waits for the one before, have no use for workers or batches.
    """
    workers = (1,) if alone else workers
    if device == "cuda":
        compute_types = {"ctranslate2": COMPUTE_TYPES[precision]}
        places = [dict(workers=w, allocator=a) for w, a in itertools.product(workers, ALLOCATORS)]
    else:
        compute_types, n = (
            {"ctranslate2": COMPUTE_TYPES[precision], "ctranslate2 int8": "int8"},
            torch.get_num_threads(),
        )
        places = [dict(workers=w, threads=n // w) for w in sorted({min(w, n) for w in workers})]
    sizes = [{}, *({"batch_tokens": n} for n in batch_tokens if trained and not alone)]
    return [
        (system, {**place, **size, "compute_type": compute_type})
        for (system, compute_type), place, size in itertools.product(compute_types.items(), places, sizes)
    ]


class CTranslate2Workload(Workload):
    """The stock model of the benchmark, converted by CTranslate2's own converter."""

    def search(self, cfg, task, model, **options) -> Callable[[list[dict]], dict]:
        import ctranslate2
        from ctranslate2.converters import FairseqConverter

        settings = self.options.settings
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, converted = Path(folder) / "model.pt", Path(folder) / "converted"
            torch.save({"args": self.args, "model": model.state_dict()}, checkpoint)
            data = self.options.data
            FairseqConverter(str(checkpoint), data, unsafe_deserialization=True).convert(str(converted))
            translator = ctranslate2.Translator(
                str(converted),
                device=self.device.type,
                compute_type=settings["compute_type"],
                inter_threads=settings["workers"],
                intra_threads=settings.get("threads", 0),
            )
        calls: list[tuple[list[int], list[list[str]], dict]] = []

        def run(batches) -> dict:
            if not calls:  # in the pass that is a cold start
                calls.extend(self.calls(batches, task.source_dictionary, task.target_dictionary, **options))
            # All workers have something to do, but a sentence that comes alone waits for the one before.
            return dict(
                pair
                for ids, results in [(ids, translator.translate_batch(words, **more)) for ids, words, more in calls]
                for pair in zip(ids, (hypothesis(result) for result in results), strict=True)
            )

        return run

    def calls(
        self,
        batches: list[dict],
        source: Dictionary,
        target: Dictionary,
        prefix_size: int = 0,
        print_alignment: str | None = None,
        sampling: bool = False,
        sampling_topk: int = 0,
    ) -> Iterator[tuple[list[int], list[list[str]], dict]]:
        """Yield sentences, their words and the options of each call of ``translate_batch``, for fairseq's options."""
        common = dict(beam_size=BEAM, return_end_token=True, max_input_length=0)
        common |= dict(return_attention=True) if print_alignment else {}
        common |= dict(beam_size=1, num_hypotheses=BEAM, sampling_topk=sampling_topk) if sampling else {}
        ids = [batch["id"].tolist() for batch in batches]
        sources = [[words(row, source) for row in batch["net_input"]["src_tokens"]] for batch in batches]
        prefixes = [[words(row, target)[:prefix_size] for row in batch["target"]] for batch in batches]
        size, alone = self.options.settings.get("batch_tokens"), max(map(len, ids)) == 1
        if size and not alone:
            one_call = dict(max_batch_size=size, batch_type="tokens", max_decoding_length=FAIRSEQ_MAX_LENGTH)
            one_call |= dict(target_prefix=sum(prefixes, [])) if prefix_size else {}
            yield sum(ids, []), sum(sources, []), common | one_call
            return
        for batch, numbers, texts, starts in zip(batches, ids, sources, prefixes, strict=True):
            # Without a trained model, to the length that fairseq is held to: that of the longest source, and EOS.
            n = batch["net_input"]["src_tokens"].size(1) + 1
            forced = dict(min_decoding_length=n, max_decoding_length=n)
            more = dict(max_decoding_length=FAIRSEQ_MAX_LENGTH) if self.options.path else forced
            more |= dict(target_prefix=starts) if prefix_size else {}
            yield numbers, texts, common | more | dict(asynchronous=not alone)

    def text(self, dataset, tokens) -> str:
        if isinstance(tokens, list):  # CTranslate2's words; else the tokens of a reference
            return data_utils.post_process(" ".join(tokens).removesuffix(" </s>"), self.options.remove_bpe)
        return super().text(dataset, tokens)


def words(row: torch.Tensor, vocabulary) -> list[str]:
    """Return the words of a sentence, int64 (T,) with padding and EOS, which CTranslate2 appends itself."""
    return [vocabulary[token] for token in row[row.ne(vocabulary.pad())][:-1].tolist()]


def hypothesis(result) -> list[str]:
    """Return the words of the best translation, with EOS if it ended."""
    return (result.result() if hasattr(result, "result") else result).hypotheses[0]
