"""What bench_fairseq.py times, in a process for each system: translation and training by fairseq."""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import re
import statistics
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from dense_checkpoint import trained_model
from fairseq import options as fairseq_options
from fairseq import tasks, utils
from fairseq.data import LanguagePairDataset, data_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer
from sacrebleu.metrics import BLEU
from torch.profiler import ProfilerActivity, profile

import ap_fairseq.plugin  # noqa: F401  (registers the plugin)
from ap_fairseq.artifacts import PruningMasks
from ap_fairseq.model.checkpoints import load_parameters
from ap_fairseq.search.generator import PrunedSequenceGenerator
from ap_fairseq.search.running import look_ahead
from ap_fairseq.sites import AttentionKind, architecture
from triton_ops.testing import block_mask

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

BEAM = 5
PROFILED_STEPS = 64
PROFILED_UPDATES = 3
# The first pattern that is found in a kernel's name decides.
KERNEL_GROUPS = {
    "attention": r"_decode_kernel|_forward_kernel|_dq_kernel|_dkdv_kernel|_small_\w+_kernel|flash|fmha|cudnn.*sdpa",
    "matrix products": r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitK",
    "copies": r"memcpy|memset|copy|CatArray|index|gather|scatter",
    "elementwise, normalisation": "",
}


class Workload:
    """Data, task, model and generator of one system."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.stock = not (options.system in ("sdpa", "all-ones", "int8") or options.system.isdigit())
        self.dtype = TYPES[options.precision]
        self.device = torch.device(options.device)

    def task_flags(self, page: int, train: bool) -> list[str]:
        """The flags of fairseq-train that a task and its criterion have of their own."""
        positions = str(max(1024, page + 2))
        return [
            *["--task", "translation" if self.stock or train else "pruned_translation", "--share-all-embeddings"],
            *["--max-source-positions", positions, "--max-target-positions", positions],
            *"--criterion label_smoothed_cross_entropy --label-smoothing 0.1 --dropout 0.3".split(),
        ]

    def task_and_model(self, page: int, train: bool):
        arch = self.options.arch or "transformer"  # of a checkpoint, whose own options follow
        flags = [self.options.data, "--arch", arch if self.stock else f"pruned_{arch}", *self.task_flags(page, train)]
        flags += "--optimizer adam --lr 5e-4 --max-tokens 16384 --seed 1".split()
        flags += ["--cpu"] if self.device.type == "cpu" else []
        flags += [f"--{self.options.precision}"] if self.options.precision != "fp32" else []
        if not self.stock:
            flags += ["--attention-backend", "sdpa" if self.options.system == "sdpa" else "auto"]
        flags += ["--cpu-int8"] if self.options.system == "int8" else []
        args = self.args = fairseq_options.parse_args_and_arch(fairseq_options.get_training_parser(), flags)
        if self.options.path:
            parameters, own = trained_model(self.options.path)
            vars(args).update(own)
        cfg = convert_namespace_to_omegaconf(args)
        cfg.common.tpu = False  # fairseq sets it with --bf16
        task = tasks.setup_task(cfg.task)
        torch.manual_seed(1)
        model = task.build_model(cfg.model)
        if self.options.path:
            load_parameters(model, parameters, self.options.path, None)
        if not self.stock:
            model.set_masks(self.masks(model, page))
        if self.options.system == "stock-sdpa":
            use_sdpa(model)
        return cfg, task, model

    def masks(self, model, page: int):
        """Random masks of the system's sparsity, a page or 256 positions square: 64-blocks or cells."""
        size, block = (page, 64) if page else (256, 1)
        sparsity = int(self.options.system) / 100 if self.options.system.isdigit() else 0.0
        keep, extrapolation = {}, {}
        for kind, (layers, heads) in architecture(model).items():
            kind = AttentionKind(kind)
            cells = [block_mask(heads, size, size, block, sparsity, seed).numpy() for seed in range(layers)]
            keep[kind] = np.stack(cells)
            if kind.causal:
                keep[kind] = np.tril(keep[kind])
            column = range(size) if kind is not AttentionKind.CROSS else 0
            keep[kind][..., range(size), column] = True
            extrapolation[kind] = np.ones((layers, heads, 2 * size - 1), dtype=bool)
        return PruningMasks(keep, extrapolation)

    def dataset(self, task, split: str, page: int, limit: int):
        """A fairseq dataset of sentences, or of consecutive sentences joined to *page* tokens."""
        task.load_dataset(split)
        pairs = task.dataset(split)
        if not page:
            chosen = range(min(limit, len(pairs)))
            sides = [[side[i] for i in chosen] for side in (pairs.src, pairs.tgt)]
        else:
            sides = [list(itertools.islice(joined(side, page), limit)) for side in (pairs.src, pairs.tgt)]
            n = min(map(len, sides))
            sides = [side[:n] for side in sides]
        sizes = [[len(x) for x in side] for side in sides]
        words = task.source_dictionary, task.target_dictionary
        return LanguagePairDataset(
            sides[0], sizes[0], words[0], sides[1], sizes[1], words[1], shuffle=False, left_pad_target=False
        )

    def batches(self, dataset, max_tokens: int):
        order = dataset.ordered_indices()
        groups = data_utils.batch_by_size(
            order, dataset.num_tokens, max_tokens=max_tokens or None, max_sentences=None if max_tokens else 1
        )
        return [dataset.collater([dataset[i] for i in group]) for group in groups]

    def translate(self, page: int, max_tokens: int, limit: int, **options) -> dict:
        cfg, task, model = self.task_and_model(page, train=False)
        dataset = self.dataset(task, "train" if page else self.options.subset, page, limit)
        batches = self.batches(dataset, max_tokens)
        search = self.search(cfg, task, model, **options)
        cold, _ = self.timed(search, batches)
        self.reset_peak()
        passes = [self.timed(search, batches) for _ in range(self.options.repeats)]
        memory, seconds, hypotheses = self.peak(), statistics.median(time for time, _ in passes), passes[-1][1]
        n_sentences = sum(len(batch["id"]) for batch in batches)
        tokens = sum(map(len, hypotheses.values()))
        result = dict(
            seconds=seconds,
            cold_seconds=cold,
            tokens=tokens,
            sentences=n_sentences,
            tokens_per_s=tokens / seconds,
            sentences_per_s=n_sentences / seconds,
            **memory,
        )
        if self.options.path and not page:
            result["bleu"] = self.bleu(dataset, hypotheses)
        if self.options.profile:
            few = dict(max_len_a=0, max_len_b=PROFILED_STEPS)
            short = self.search(cfg, task, model, **(options | few))
            result["profile"] = self.profiled("step", PROFILED_STEPS + 1, short, batches[:1])
        return result

    def search(self, cfg, task, model, prefix_size: int = 0, **options) -> Callable[[list[dict]], dict]:
        """Return what translates batches into {sentence: tokens with EOS, int (T,)}; options are those of fairseq."""
        model.to(self.device, self.dtype)
        model.eval()  # returns nothing once a model was prepared for inference
        model.prepare_for_inference_(cfg)
        if not self.options.path:
            options = dict(max_len_a=1, max_len_b=0) | options
        generator = task.build_generator([model], argparse.Namespace(beam=BEAM, lenpen=1, **options))
        if isinstance(generator, PrunedSequenceGenerator):
            generator.nbest = 1  # as in ap-generate; CTranslate2 returns one, too

        def run(batches) -> dict:
            hypotheses = {}
            if self.device.type == "cuda":
                batches = map(utils.move_to_cuda, batches) if self.stock else look_ahead(batches, on_gpu=True)
            for batch in batches:
                prefix = batch["target"][:, :prefix_size] if prefix_size else None
                found = task.inference_step(generator, [model], batch, prefix_tokens=prefix)
                hypotheses |= {n: best["tokens"] for n, (best, *_) in zip(batch["id"].tolist(), found, strict=True)}
            return hypotheses

        return run

    def bleu(self, dataset, hypotheses: dict) -> float:
        """BLEU of sentences against the target side of their dataset, in words."""
        texts = [(self.text(dataset, hypotheses[n]), self.text(dataset, dataset.tgt[n])) for n in sorted(hypotheses)]
        return BLEU().corpus_score([hypothesis for hypothesis, _ in texts], [[target for _, target in texts]]).score

    def text(self, dataset, tokens) -> str:
        return dataset.tgt_dict.string(tokens.cpu(), self.options.remove_bpe)

    def train(self, page: int, max_tokens: int, limit: int) -> dict:
        cfg, task, model = self.task_and_model(page, train=True)
        trainer = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
        batches = self.batches(self.dataset(task, "train", page, limit), max_tokens)
        batches = batches[:: max(1, len(batches) // 10)][:10]

        def run(batches) -> None:
            for batch in batches:
                trainer.train_step([batch])

        run(batches * 2)  # compiles, fills the allocator, settles the loss scale
        self.reset_peak()
        # Trainer.train_step ends with a reset of the peak, to log the memory of one update; here all count.
        with mock.patch.object(torch.cuda, "reset_peak_memory_stats"):
            times = [self.timed(run, batches)[0] for _ in range(self.options.repeats)]
        memory = self.peak()
        seconds, tokens = statistics.median(times), sum(batch["ntokens"] for batch in batches)
        result = dict(
            seconds=seconds,
            updates=len(batches),
            tokens=tokens,
            tokens_per_s=tokens / seconds,
            updates_per_s=len(batches) / seconds,
            **memory,
        )
        if self.options.profile:
            chosen = batches[:PROFILED_UPDATES]
            result["profile"] = self.profiled("update", len(chosen), run, chosen)
        return result

    # -- what differs between devices ---------------------------------------------------------------------------------

    def timed(self, work: Callable, *arguments) -> tuple[float, object]:
        """Return the seconds that a call takes on the device, and its result."""
        now = time.process_time if self.device.type == "cpu" else time.perf_counter
        self.synchronize()
        start = now()
        result = work(*arguments)
        self.synchronize()
        return now() - start, result

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict:
        if self.device.type == "cpu":
            return dict(peak_bytes=None, reserved_bytes=None, process_bytes=None, alloc_retries=None)
        free, total = torch.cuda.mem_get_info()
        process = total - free  # with the CUDA context, and what is not torch's
        segments = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
        held = sum(segment["total_size"] - segment["allocated_size"] for segment in segments)  # by graphs
        peak = torch.cuda.max_memory_allocated() + held
        retries = torch.cuda.memory_stats()["num_alloc_retries"]  # each waits for the device and frees what is cached
        reserved = torch.cuda.max_memory_reserved()
        return dict(peak_bytes=peak, reserved_bytes=reserved, process_bytes=process, alloc_retries=retries)

    def profiled(self, unit: str, n: int, work: Callable, *arguments) -> dict:
        """Where the GPU's time goes in a call that does *n* updates or steps."""
        work(*arguments)  # builds what it needs
        wall, _ = self.timed(work, *arguments)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.timed(work, *arguments)
        events = [(e.key, e.self_device_time_total / 1e6, e.count) for e in profiler.key_averages()]
        return dict(unit=unit) | summary(events, wall, n)


class LanguageModelWorkload(Workload):
    """A language model on blocks of text."""

    def task_flags(self, page: int, train: bool) -> list[str]:
        task = "language_modeling" if self.stock or train else "pruned_language_modeling"
        positions = ["--tokens-per-sample", str(page), "--max-target-positions", str(max(1024, page + 2))]
        return ["--task", task, *positions, "--share-decoder-input-output-embed", "--dropout", "0.1"]

    def dataset(self, task, split: str, page: int, limit: int) -> torch.Tensor:
        """Blocks of consecutive text, (at most *limit*, *page* + 1) int64: a block's first token precedes its text.

        Without ends of lines, at which a search would end in the prompt.
        """
        text = data_utils.load_indexed_dataset(os.path.join(self.options.data, split), task.source_dictionary)
        lines = [text[i][:-1] for i in range(min(len(text), limit * (page + 1)))]  # an empty one has its end alone
        return torch.stack(list(itertools.islice(joined(lines, page + 1), limit)))

    def batches(self, blocks: torch.Tensor, max_tokens: int) -> list[dict]:
        chunks = blocks.split(max(1, max_tokens // (blocks.shape[1] - 1)))
        return [
            dict(
                id=torch.arange(len(chunk)) + sum(map(len, chunks[:i])),
                net_input=dict(
                    src_tokens=chunk[:, :-1].contiguous(),
                    src_lengths=torch.full((len(chunk),), chunk.shape[1] - 1),
                ),
                target=chunk[:, 1:].contiguous(),
                ntokens=chunk[:, 1:].numel(),
                nsentences=len(chunk),
            )
            for i, chunk in enumerate(chunks)
        ]


def use_sdpa(model) -> None:
    """Let the cross-attention of a stock transformer take the path that its self-attention takes."""
    for layer in model.decoder.layers:
        attention = layer.encoder_attn

        def forward(*args, stock=attention.forward, **options):
            return stock(*args, **options | dict(static_kv=False, need_weights=False, need_head_weights=False))

        attention.forward = forward


def summary(events: list[tuple[str, float, int]], wall: float, n: int) -> dict:
    """Summarise the events of a profile.

    Args:
        events: name, seconds on the GPU and number, of kernels and of the host's calls (0 seconds).
        wall: seconds that the same work takes without the profiler.
        n: updates or steps in it.
    """
    groups = dict.fromkeys(KERNEL_GROUPS, 0.0)
    kernels = [event for event in events if event[1] > 0]
    for name, seconds, _ in kernels:
        group = next(group for group, pattern in KERNEL_GROUPS.items() if re.search(pattern, name, re.IGNORECASE))
        groups[group] += seconds
    top = sorted(kernels, key=lambda event: -event[1])[:8]
    return dict(
        wall_seconds=wall / n,
        gpu_busy=sum(groups.values()) / wall,
        kernels=sum(count for *_, count in kernels) / n,
        launches=sum(count for name, seconds, count in events if not seconds and "Launch" in name) / n,
        groups={group: seconds / n for group, seconds in groups.items()},
        top=[dict(name=name[:160], seconds=seconds / n, number=count / n) for name, seconds, count in top],
    )


def joined(sentences, page: int):
    """Join consecutive sentences (int64 tensors) and cut them into pages of *page* tokens."""
    tokens, length = [], 0
    for i in range(len(sentences)):
        tokens.append(sentences[i])
        length += len(sentences[i])
        if length >= page:
            yield torch.cat(tokens)[:page]
            tokens, length = [], 0
