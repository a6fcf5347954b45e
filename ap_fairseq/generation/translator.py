"""Lines to batches of fairseq's, batches to hypotheses, and these to lines, as ``fairseq-interactive`` does."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from fairseq import checkpoint_utils, utils
from fairseq.hub_utils import GeneratorHubInterface
from fairseq_cli.generate import get_symbols_to_strip_from_output

from ap_fairseq.data_bin import setup_task
from ap_fairseq.devices import uses_gpu
from ap_fairseq.files import UserError
from ap_fairseq.generation.lines import split
from ap_fairseq.search.hypotheses import Hypotheses
from ap_fairseq.search.running import look_ahead
from ap_fairseq.tasks import return_what_is_printed


class Encoded(NamedTuple):
    """Lines as tokens, in two arrays: quick to pickle for another process.

    Attributes:
        tokens: int64 (sum of lengths,), of all lines, one after the other.
        lengths: int64 (L,), tokens of each line, with EOS; of an empty line 0.
    """

    tokens: np.ndarray
    lengths: np.ndarray

    @classmethod
    def join(cls, pieces: Iterable[Encoded]) -> Encoded:
        """Return the lines of all pieces, of which there is one at least, in order."""
        return cls(*map(np.concatenate, zip(*pieces, strict=True)))


class LineBatch(NamedTuple):
    """Lines of a part that are searched together.

    Attributes:
        part, n_lines: the part, and how many lines it has.
        last: whether no batch of the part follows.
        lines: int64 (B,), their numbers in the part.
        sample: a batch of fairseq's, with arrays for tensors, which would pass to another process as open files.
    """

    part: int
    n_lines: int
    last: bool
    lines: np.ndarray
    sample: dict[str, Any]


class Found(NamedTuple):
    """The translations of a batch, without scores, which nothing writes.

    Attributes:
        lines: int64 (B,), their numbers in the part.
        tokens: int64 (sum of lengths,), of all, one after the other.
        lengths: int64 (B,), tokens of each.
    """

    lines: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray


class Translator:
    """Models that translate lines as ``fairseq-interactive`` does with the same configuration."""

    def __init__(self, cfg):
        task = setup_task(cfg.task)
        models, _ = checkpoint_utils.load_model_ensemble(
            utils.split_paths(cfg.common_eval.path),
            arg_overrides=ast.literal_eval(cfg.common_eval.model_overrides),
            task=task,
            suffix=cfg.checkpoint.checkpoint_suffix,
            strict=cfg.checkpoint.checkpoint_shard_count == 1,
            num_shards=cfg.checkpoint.checkpoint_shard_count,
        )
        device = "cuda" if uses_gpu(cfg.common.cpu) else "cpu"
        for model in models:
            model.to(device, torch.float16 if cfg.common.fp16 else None)
        # Looked up once, which takes OmegaConf as long as the rest of a line.
        self.max_tokens, self.max_sentences = cfg.dataset.max_tokens, cfg.dataset.batch_size
        self.post_process = cfg.common_eval.post_process
        self.cfg, self.on_gpu = cfg, device == "cuda"
        self.hub = GeneratorHubInterface(cfg, task, models).to(device)
        self.generator = task.build_generator(models, cfg.generation)
        return_what_is_printed(type(task).inference_step, self.generator, nbest=1)
        self.stripped = get_symbols_to_strip_from_output(self.generator)  # such as the tokens of languages
        longest = self.hub.max_positions
        self.longest = longest if isinstance(longest, int) else longest[0]  # a language model has one side

    def encode(self, lines: list[str], name: str, first: int) -> Encoded:
        """Return the tokens of each line, ending in EOS; of an empty line none.

        Args:
            name: of the text, for messages.
            first: number of the first line, likewise.

        Raises:
            UserError: for a line that is longer than the model reads, unless ``--truncate-source`` allows to cut it,
                or longer than a batch may be.
        """
        empty = torch.empty(0, dtype=torch.int64)
        tokens = [self._encode(line, name, first + number) if line else empty for number, line in enumerate(lines)]
        return Encoded(torch.cat([empty, *tokens]).numpy(), np.array([len(line) for line in tokens], dtype=np.int64))

    def batches(self, part: int, encoded: Encoded, share: int = 0, shares: int = 1) -> list[LineBatch]:
        """Return the batches of a part, whose lines have these tokens; of empty lines none.

        Args:
            share: which of equal *shares* of them, counted from 0; all shares, one after the other, are all batches.
        """
        filled = encoded.lengths.nonzero()[0]
        if not len(filled):
            return []
        lengths = torch.from_numpy(encoded.lengths[filled])
        tokens = torch.from_numpy(encoded.tokens).split(lengths.tolist())
        dataset = self.hub.task.build_dataset_for_inference([*tokens], lengths)
        iterator = self.hub.task.get_batch_iterator(
            dataset,
            max_tokens=self.max_tokens,
            max_sentences=self.max_sentences,
            max_positions=self.hub.max_positions,
            disable_iterator_cache=True,
        )
        last = len(iterator.frozen_batches) - 1
        numbers = range(*((last + 1) * k // shares for k in (share, share + 1)))
        # Not by fairseq's loader, which puts batches where a GPU reads them, and workers may use none.
        samples = [iterator.collate_fn([dataset[i] for i in iterator.frozen_batches[number]]) for number in numbers]
        samples = [utils.apply_to_sample(torch.Tensor.numpy, sample) for sample in samples]
        return [
            LineBatch(part, len(encoded.lengths), number == last, filled[sample["id"]], sample)
            for number, sample in zip(numbers, samples, strict=True)
        ]

    def look_ahead(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield batches of fairseq's where the search takes them from."""
        return look_ahead(samples, on_gpu=True) if self.on_gpu else iter(samples)  # nothing searches while a CPU reads

    def search(self, sample: dict[str, Any]) -> Hypotheses:
        """Return the best hypothesis of each sentence of a batch of fairseq's."""
        return Hypotheses.of(self.hub.task.inference_step(self.generator, self.hub.models, sample), 1)

    def decode(self, n_lines: int, found: list[Found]) -> list[str]:
        """Return the lines of a part, detokenised, from those of each batch; others are empty."""
        lines = [""] * n_lines
        for batch in found:
            for number, tokens in zip(batch.lines.tolist(), split(batch.tokens, batch.lengths), strict=True):
                lines[number] = self._decode(tokens)
        return lines

    def _decode(self, tokens: list[int]) -> str:
        # Not fairseq's post_process_prediction, which adds the words of the text to the dictionary. A list, as fairseq
        # goes through a tensor element by element: eight times as slow.
        text = self.hub.tgt_dict.string(tokens, self.post_process, extra_symbols_to_ignore=self.stripped)
        text = self.hub.detokenize(self.hub.remove_bpe(text))
        return text.replace("\n", " ")  # which a BPE of bytes may spell

    def _encode(self, line: str, name: str, number: int) -> torch.Tensor:
        """Return the tokens of a line, int64 (T,), ending in EOS."""
        tokens = self.hub.encode(line)
        if len(tokens) > self.longest:
            cut = getattr(self.cfg.task, "truncate_source", None)  # which tasks of language models have not
            if not cut:
                raise UserError(
                    f"{name} line {number} has {len(tokens)} tokens, the model reads at most {self.longest}; split the "
                    f"line{'' if cut is None else ', or cut all such lines with --truncate-source'}"
                )
            print(f"line {number} was cut from {len(tokens)} to {self.longest} tokens", flush=True)
            tokens = torch.cat([tokens[: self.longest - 1], tokens[-1:]])
        if len(tokens) > (self.max_tokens or math.inf):
            raise UserError(
                f"{name} line {number} has {len(tokens)} tokens, a batch at most --max-tokens "
                f"{self.max_tokens}; raise it"
            )
        return tokens
