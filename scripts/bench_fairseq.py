#!/usr/bin/env python
"""Benchmark training and translation: stock fairseq against the plugin, one process per system, in turns (--rounds).

    python scripts/bench_fairseq.py DATA_BIN --out scripts/bench_fairseq.h100.json    # every system, default cases
    python scripts/bench_fairseq.py DATA_BIN --systems stock all-ones --cases sentences --profile
    python scripts/bench_fairseq.py DATA_BIN --device cpu --limit 20 --systems stock all-ones --cases sentences
    python scripts/bench_fairseq.py DATA_BIN --systems stock all-ones --cases sentences --rivals ctranslate2
    python scripts/bench_fairseq.py TEXT_BIN --arch transformer_lm --systems stock all-ones 90    # language models
    python scripts/bench_fairseq.py --table scripts/bench_fairseq.h100.json           # Markdown, no GPU needed

Nothing else should run on the host: stock fairseq waits for it, and its rate doubles where the host is idle.

DATA_BIN is a folder of fairseq-preprocess with real text; its test sentences are translated, and pages are consecutive
training sentences, joined up to the length of the case. Systems:

    stock       fairseq's transformer and generator. Its self-attention runs on torch's scaled_dot_product_attention
                (SDPA) wherever it sees whole sentences, with a float mask; cross-attention and every step of decoding
                multiply, take the softmax in float32, and multiply
    stock-sdpa  the same with SDPA also in cross-attention; training only, since a step of decoding has one query
    sdpa        the plugin with SDPA under all-ones masks (--attention-backend sdpa); training only
    all-ones    the plugin's kernels under all-ones masks, with --task pruned_translation
    int8        all-ones with --cpu-int8; translation on a CPU only
    50, 80, 90  all-ones, but under random masks of that sparsity (%): cells at sentence length, 64-blocks on pages

    ctranslate2 (--rivals) the same model in CTranslate2, in a process for each of its settings, of which the fastest
                counts; the others are listed beside it. On a CPU also with int8 (system "ctranslate2 int8")

A language model (--arch transformer_lm...; TEXT_BIN is made by fairseq-preprocess --only-source) trains on pages, too,
and continues prompts of 32 tokens, by beam search and sampling, to the tokens of the case, which include the prompts.

Parameters are those of a checkpoint (--path, a dense transformer of any size, of fairseq's own class or of this plugin
under masks that keep everything) or random, the same in all systems. With random parameters nothing ends early: every
batch is translated to the length of its longest source, so that all systems take the same number of steps. With a
checkpoint, translations end where the model ends them, and those of sentences have BLEU (sacreBLEU, of the words that
--remove-bpe leaves). Pages are cut to exactly the tokens of the case, so that training on them sees one shape of batch.
Translation is timed once from a cold start (graph capture and the first compilation of kernels included) and then warm;
the median of the warm passes counts, and the median of the rounds of them. Training steps are those of fairseq's
Trainer.

Peak memory is what torch allocated at most in the measured passes, parameters and optimizer included, and what captured
graphs hold for their replays, which torch does not count as allocated; beside it what torch reserved, with what it did
not give back; process_bytes is all that the device holds then, CUDA's context included. --profile adds where the time
of a GPU goes: of a few more updates, or the first steps of a batch, without the profiler for the wall time and with it
for the kernels.

On a CPU (--device cpu) precision is fp32, memory is not measured, and seconds are those that the process computed, its
threads together, so that what else runs there counts little: they are those of the clock with one thread on an idle
machine (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from provenance import git_commit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SYSTEMS = ("stock", "stock-sdpa", "sdpa", "all-ones", "int8", "50", "80", "90")
TRAIN_ONLY = ("stock-sdpa", "sdpa")
CPU_ONLY = ("int8",)  # and translation only
RIVALS = {"ctranslate2": ("ctranslate2", "ctranslate2 int8")}  # package: systems
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TRAIN_TOKENS = 16384

# kind, tokens per page (0: sentences as they are), max-tokens (0: one sentence at a time), at most so many examples.
# A step of stock fairseq takes about 9 ms on an H200 whatever the batch, so long pages take long: 4096 tokens 40 s.
CASES = {
    "sentences": ("translate", 0, 12000, 2000),
    "sentences, one by one": ("translate", 0, 0, 20),
    "sentences, sampling top 10": ("translate", 0, 12000, 2000),
    "sentences, prefixes of 5": ("translate", 0, 12000, 2000),
    "sentences, alignments": ("translate", 0, 12000, 2000),
    "pages of 512": ("translate", 512, 32000, 62),
    "pages of 1000": ("translate", 1000, 32000, 32),
    "pages of 2048": ("translate", 2048, 32000, 15),
    "pages of 4096": ("translate", 4096, 32000, 7),
    "train sentences": ("train", 0, TRAIN_TOKENS, 8000),
    "train pages of 512": ("train", 512, TRAIN_TOKENS, 320),
    "train pages of 1024": ("train", 1024, TRAIN_TOKENS, 160),
    "train pages of 2048": ("train", 2048, TRAIN_TOKENS, 80),
    "train pages of 4096": ("train", 4096, TRAIN_TOKENS, 40),
    "continuations to 512": ("translate", 512, 32000, 62),
    "continuations to 1024": ("translate", 1024, 32000, 31),
    "continuations to 1024, sampling top 10": ("translate", 1024, 32000, 31),
}
NOT_BY_DEFAULT = ("pages of 2048", "pages of 4096")
PROMPT = 32
# Cases of other searches than plain beam search; prefixes are those of the references.
SEARCHES = {
    "continuations to 512": dict(prefix_size=PROMPT, max_len_a=0, max_len_b=512),
    "continuations to 1024": dict(prefix_size=PROMPT, max_len_a=0, max_len_b=1024),
    "continuations to 1024, sampling top 10": dict(
        prefix_size=PROMPT, max_len_a=0, max_len_b=1024, sampling=True, sampling_topk=10
    ),
    "sentences, sampling top 10": dict(sampling=True, sampling_topk=10),
    "sentences, prefixes of 5": dict(prefix_size=5),
    "sentences, alignments": dict(print_alignment="hard"),
}

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


# --- one system, in a process of its own ------------------------------------------------------------------------------


class Workload:
    """Data, task, model and generator of one system."""

    def __init__(self, options: argparse.Namespace):
        import ap_fairseq.plugin  # noqa: F401  (registers the plugin)

        self.options = options
        self.stock = not (options.system in ("sdpa", "all-ones", "int8") or options.system.isdigit())
        self.dtype = PRECISIONS[options.precision]
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
        from fairseq import options as fairseq_options
        from fairseq import tasks
        from fairseq.dataclass.utils import convert_namespace_to_omegaconf

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
            from ap_fairseq.model.checkpoints import load_parameters

            load_parameters(model, parameters, self.options.path, None)
        if not self.stock:
            model.set_masks(self.masks(model, page))
        if self.options.system == "stock-sdpa":
            use_sdpa(model)
        return cfg, task, model

    def masks(self, model, page: int):
        """Random masks of the system's sparsity, a page or 256 positions square: 64-blocks or cells."""
        from ap_fairseq.artifacts import PruningMasks
        from ap_fairseq.sites import AttentionKind, architecture
        from triton_ops.testing import block_mask

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
        from fairseq.data import LanguagePairDataset

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
        from fairseq.data import data_utils

        order = dataset.ordered_indices()
        groups = data_utils.batch_by_size(
            order, dataset.num_tokens, max_tokens=max_tokens or None, max_sentences=None if max_tokens else 1
        )
        return [dataset.collater([dataset[i] for i in group]) for group in groups]

    def translate(self, page: int, max_tokens: int, limit: int, **options) -> dict:
        cfg, task, model = self.task_and_model(page, train=False)
        dataset = self.dataset(task, "train" if page else "test", page, limit)
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
        from fairseq import utils

        model.to(self.device, self.dtype)
        model.eval()  # returns nothing once a model was prepared for inference
        model.prepare_for_inference_(cfg)
        if not self.options.path:
            options = dict(max_len_a=1, max_len_b=0) | options
        generator = task.build_generator([model], argparse.Namespace(beam=BEAM, lenpen=1, **options))

        def run(batches) -> dict:
            hypotheses = {}
            for batch in batches:
                batch = utils.move_to_cuda(batch) if self.device.type == "cuda" else batch
                prefix = batch["target"][:, :prefix_size] if prefix_size else None
                found = task.inference_step(generator, [model], batch, prefix_tokens=prefix)
                hypotheses |= {n: best["tokens"] for n, (best, *_) in zip(batch["id"].tolist(), found, strict=True)}
            return hypotheses

        return run

    def bleu(self, dataset, hypotheses: dict) -> float:
        """BLEU of sentences against the target side of their dataset, in words."""
        from sacrebleu.metrics import BLEU

        texts = [(self.text(dataset, hypotheses[n]), self.text(dataset, dataset.tgt[n])) for n in sorted(hypotheses)]
        return BLEU().corpus_score([hypothesis for hypothesis, _ in texts], [[target for _, target in texts]]).score

    def text(self, dataset, tokens) -> str:
        return dataset.tgt_dict.string(tokens.cpu(), self.options.remove_bpe)

    def train(self, page: int, max_tokens: int, limit: int) -> dict:
        from fairseq.trainer import Trainer

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
        from torch.profiler import ProfilerActivity, profile

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
        from fairseq.data.data_utils import load_indexed_dataset

        text = load_indexed_dataset(os.path.join(self.options.data, split), task.source_dictionary)
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


def trained_model(path: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the parameters of a checkpoint, and the options of its transformer by the names of the command line."""
    from ap_fairseq.model.checkpoints import load_checkpoint, stored_model
    from ap_fairseq.model.config import InheritedConfig
    from ap_fairseq.model.conversion import pruned_options

    state = load_checkpoint(path)
    stored = state["cfg"]["model"] if state.get("cfg") else state["args"]
    options = pruned_options(*stored_model(state), stored)
    return state["model"], {name: options[name] for name in InheritedConfig.__dataclass_fields__ if name != "_name"}


@contextlib.contextmanager
def stock_checkpoint(path: str, data: str) -> Iterator[str]:
    """Yield the path of a checkpoint of fairseq's own transformer: *path*, or what `convert_to_stock` makes of it.

    Raises:
        UserError: if it is no translation model, its masks prune anything, or it has other dictionaries than *data*.
    """
    from fairseq.data import Dictionary
    from fairseq.data.data_utils import infer_language_pair

    import ap_fairseq.plugin  # noqa: F401  (registers the plugin)
    from ap_fairseq.files import UserError
    from ap_fairseq.model.checkpoints import load_checkpoint, stored_model
    from ap_fairseq.model.pruned_model import PrunedModel
    from ap_fairseq.model.stock import convert_to_stock

    state = load_checkpoint(path)
    name, model = stored_model(state)
    if "encoder.embed_tokens.weight" not in state["model"] or "decoder.embed_tokens.weight" not in state["model"]:
        raise UserError(f"--path {path} is of the architecture {name!r}; give a translation model, or leave it out")
    source, _ = infer_language_pair(data)
    n, words = len(state["model"]["encoder.embed_tokens.weight"]), len(Dictionary.load(f"{data}/dict.{source}.txt"))
    if n != words:
        raise UserError(
            f"--path {path} has {n:,} source tokens, {data} {words:,}; name the data that it was trained on"
        )
    if not issubclass(model or object, PrunedModel):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        convert_to_stock(path, f"{folder}/stock.pt", data=data)
        yield f"{folder}/stock.pt"


def architecture_of(path: str) -> str:
    """Return e.g. ``transformer (4 + 4 layers of width 256)``."""
    _, own = trained_model(path)
    layers = f"{own['encoder_layers']} + {own['decoder_layers']}"
    return f"transformer ({layers} layers of width {own['decoder_embed_dim']})"


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


def work(options: argparse.Namespace) -> None:
    """Run the cases of one system and print one JSON line for each."""
    workload = LanguageModelWorkload(options) if is_language_model(options.arch) else Workload(options)
    if options.settings:
        from rival_ctranslate2 import CTranslate2Workload

        workload = CTranslate2Workload(options)
    for case in options.cases:
        kind, page, max_tokens, limit = CASES[case]
        if kind == "translate" and options.system in TRAIN_ONLY:
            continue
        if kind == "train" and (options.system in CPU_ONLY or options.settings):
            continue
        if options.max_tokens and max_tokens:
            limit = limit * options.max_tokens // max_tokens if kind == "train" else limit
            max_tokens = options.max_tokens
        gc.collect()  # the memory of a case is not that of the one before
        if options.device == "cuda":
            torch.cuda.empty_cache()
        row = dict(case=case, system=options.system, kind=kind, page=page, max_tokens=max_tokens, commit=options.commit)
        row |= dict(settings=options.settings) if options.settings else {}
        result = getattr(workload, kind)(page, max_tokens, options.limit or limit, **SEARCHES.get(case, {}))
        print(json.dumps(row | result), flush=True)


def is_language_model(arch: str | None) -> bool:
    return arch is not None and arch.startswith("transformer_lm")


def cases_of(arch: str | None) -> list[str]:
    """The cases of an architecture: translation and training, or continuations and training on pages."""
    if is_language_model(arch):
        return [case for case in CASES if case.startswith(("train pages", "continuations"))]
    return [case for case in CASES if not case.startswith("continuations")]


# --- all systems ------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """Yield the results of every system as its process prints them, round by round."""
    passed = ("arch", "precision", "repeats", "device", "limit", "max_tokens", "path", "remove_bpe", "commit")
    given = [(name, getattr(options, name)) for name in passed if getattr(options, name)]
    flags = [text for name, value in given for text in (f"--{name.replace('_', '-')}", str(value))]
    flags += ["--profile"] if options.profile else []
    runs: list[tuple[str, dict]] = [(system, {}) for system in options.systems]
    if "ctranslate2" in options.rivals:
        from rival_ctranslate2 import variants

        alone = all(CASES[case][2] == 0 for case in options.cases)
        runs += variants(options.device, options.precision, bool(options.path), alone)
    for _, (system, settings) in itertools.product(range(options.rounds), runs):
        command = [sys.executable, __file__, options.data, "--worker", system, *flags, "--cases", *options.cases]
        command += ["--settings", json.dumps(settings)] if settings else []
        environment = os.environ | {"CT2_CUDA_ALLOCATOR": settings.get("allocator", "")} if settings else None
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
        if process.returncode:
            named = f" ({json.dumps(settings)})" if settings else ""
            yield dict(case="-", system=system, error=f"the process ended with status {process.returncode}{named}")


def median_rows(rows: Sequence[dict]) -> list[dict]:
    """Of the rounds of each case and system the median one, with the seconds of all (``rounds``); and all errors.

    Of a system with settings, the fastest one counts; ``slower`` are the others: their settings and tokens a second.
    """
    groups: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for row in rows:
        variants = groups.setdefault((row["case"], row["system"]), {})
        variants.setdefault(json.dumps(row.get("settings")), []).append(row)
    chosen = []
    for variants in groups.values():
        medians = []
        for group in variants.values():
            measured = [row for row in group if "error" not in row]
            chosen += [row for row in group if "error" in row]
            if measured:
                seconds = [row["seconds"] for row in measured]
                median = next(row for row in measured if row["seconds"] == statistics.median_low(seconds))
                medians.append(median | (dict(rounds=seconds) if len(seconds) > 1 else {}))
        medians.sort(key=lambda row: row["seconds"])
        if medians:
            slower = [row["settings"] | {"tokens_per_s": row["tokens_per_s"]} for row in medians[1:]]
            chosen.append(medians[0] | (dict(slower=slower) if slower else {}))
    return chosen


def table(report: dict, systems: Sequence[str] = (*SYSTEMS, *itertools.chain(*RIVALS.values()))) -> str:
    """One Markdown row per case and system, with ratios to the stock system; and where time goes, if profiled."""
    rows = [row for case in CASES for row in report["rows"] if row["case"] == case and row["system"] in systems]
    stock = {row["case"]: row for row in rows if row["system"] == "stock"}
    body, scored = [], any("bleu" in row for row in rows)
    for row in rows:
        base = stock.get(row["case"], {})
        speed, memory, reserved = (
            f"{row[key] / base[key]:.2f}" if row.get(key) and base.get(key) else ""
            for key in ("tokens_per_s", "peak_bytes", "reserved_bytes")
        )
        cold = f"{row['cold_seconds']:.1f} s, warm {row['seconds']:.1f} s" if row.get("cold_seconds") else ""
        sizes = [f"{row[key] / 2**30:.2f} GiB" if row.get(key) else "" for key in ("peak_bytes", "reserved_bytes")]
        sentences = f"{row['sentences_per_s']:,.1f}" if "sentences_per_s" in row else ""
        columns = [row["case"], row["system"], f"{row['tokens_per_s']:,.0f}", speed, sentences]
        bleu = [f"{row['bleu']:.2f}" if "bleu" in row else ""] if scored else []
        body.append([*columns, *bleu, sizes[0], memory, sizes[1], reserved, cold])
    header = ["case", "system", "target tokens/s", "ratio", "sentences/s", *(["BLEU"] if scored else [])]
    header += ["peak memory", "ratio", "reserved", "ratio", "cold start"]
    made = (
        f"{report['device']}, torch {report['torch']}, triton {report['triton']}, {report['arch']}, "
        f"{report['precision']}, commit {report['commit']}: `{report['command']}`"
    )
    lines = [made, *([report["note"]] if "note" in report else []), ""]
    lines.append(markdown(header, body, "ll"))
    lines += [f"\n{row['case']}, {row['system']}: {described(row['settings'])}" for row in rows if "settings" in row]
    if profiled := [row for row in rows if "profile" in row]:
        lines += ["", profile_table(profiled)]
    lines += [f"\n{row['system']}: {row['error']}" for row in report["rows"] if "error" in row]
    return "\n".join(lines)


def described(settings: dict) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def markdown(header: list[str], rows: list[list[str]], left: str) -> str:
    """Render a Markdown table; columns after those of *left* are set flush right."""
    from ap_fairseq.evaluation import tables  # here, as processes that time stock fairseq must not load the plugin

    return tables.markdown(tables.Table(header, rows, align=left.ljust(len(header), "r")))


def profile_table(rows: list[dict]) -> str:
    """Milliseconds of an update or step, and of the kernels in it, as Markdown."""
    body = []
    for row in rows:
        profile = row["profile"]
        numbers = [f"{1000 * profile['wall_seconds']:.2f}", f"{profile['gpu_busy']:.0%}"]
        numbers += [f"{profile[key]:,.0f}" for key in ("kernels", "launches")]
        numbers += [f"{1000 * profile['groups'][group]:.2f}" for group in KERNEL_GROUPS]
        body.append([row["case"], row["system"], profile["unit"], *numbers])
    header = ["case", "system", "ms per", "wall", "GPU busy", "kernels", "launches", *KERNEL_GROUPS]
    return markdown(header, body, "lll")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="data-bin folder")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument(
        "--arch", help="fairseq's architecture, with random parameters (default: transformer_iwslt_de_en)"
    )
    parser.add_argument("--path", help="checkpoint of a dense transformer, which brings its own architecture")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: fp16, on a CPU fp32")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="default: all that the device has")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=[], help="also measure these, if installed")
    parser.add_argument(
        "--remove-bpe", default="sentencepiece", help="what BLEU joins to words (default: %(default)s), as in fairseq"
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        metavar="CASE",
        help=f"{', '.join(CASES)}; default: all of the architecture but {', '.join(NOT_BY_DEFAULT)}",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of all systems in turns (default: 3)")
    parser.add_argument("--repeats", type=int, default=1, help="timed passes of each round (default: 1)")
    parser.add_argument("--limit", type=int, help="at most so many sentences or pages in every case")
    parser.add_argument(
        "--max-tokens", type=int, help=f"of batches (default: 12000 or more; in training {TRAIN_TOKENS})"
    )
    parser.add_argument("--profile", action="store_true", help="add where the time of the GPU goes")
    parser.add_argument("--commit", default=git_commit(), help="to name in the results; default: that of git")
    parser.add_argument("--worker", dest="system", help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, metavar="JSON", help="print a Markdown table of a result file and stop")
    options = parser.parse_args()
    if options.table:
        systems = [*(options.systems or SYSTEMS), *itertools.chain(*RIVALS.values())]
        print(table(json.loads(options.table.read_text(encoding="utf-8")), systems))
        return
    if options.data is None:
        parser.error("name a data-bin folder, or a result file with --table")
    if options.out and not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: folder {options.out.parent} does not exist; create it first")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; use --device cpu, or --table with a result file")
    for rival in options.rivals:
        if importlib.util.find_spec(rival) is None:
            parser.error(f"--rivals {rival}: the package is not installed; pip install {rival}")
    language_model = is_language_model(options.arch)
    missing = {} if options.device == "cpu" else dict.fromkeys(CPU_ONLY, "is for --device cpu")
    missing |= {"stock-sdpa": f"changes cross-attention, which {options.arch} has not"} if language_model else {}
    options.systems = options.systems or [system for system in SYSTEMS if system not in missing]
    if wrong := next((system for system in options.systems if system in missing), None):
        parser.error(f"--systems {wrong} {missing[wrong]}; leave it out")
    if options.device == "cpu" and (options.precision == "fp16" or options.profile):
        parser.error("--device cpu takes neither --precision fp16 nor --profile")
    if options.arch and options.path:
        parser.error(f"--arch {options.arch} with --path {options.path}: the checkpoint has its own; leave --arch out")
    possible = cases_of(options.arch)
    options.cases = options.cases or [case for case in possible if case not in NOT_BY_DEFAULT]
    if impossible := [case for case in options.cases if case not in possible]:
        parser.error(f"--cases {shlex.join(impossible)}: this architecture has {', '.join(possible)}")
    if language_model and options.rivals:
        parser.error(f"--rivals {' '.join(options.rivals)}: they translate, and {options.arch} is a language model")
    options.precision = options.precision or ("fp16" if options.device == "cuda" else "fp32")
    if options.system:
        work(options)
        return
    options.arch = None if options.path else options.arch or "transformer_iwslt_de_en"
    if options.path is None:
        run(options, options.arch)
        return
    from ap_fairseq.files import UserError

    try:
        with stock_checkpoint(options.path, options.data) as path:
            given, options.path = options.path, path
            run(options, architecture_of(path), given)
    except UserError as error:
        parser.error(str(error))


def run(options: argparse.Namespace, arch: str, parameters: str = "random") -> None:
    """Measure all systems, write the report and print it; the status is 1 if a process failed."""
    from ap_fairseq.provenance import device_name

    report = dict(
        device=device_name(cpu=options.device == "cpu"),
        torch=torch.__version__,
        triton=metadata.version("triton"),
        python=platform.python_version(),
        arch=arch,
        precision=options.precision,
        parameters=parameters,
        command=shlex.join(["python", *sys.argv]),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=options.commit,
        rows=[],
    )
    rows = []
    for row in measure(options):
        rows.append(row)
        report["rows"] = median_rows(rows)
        print(f"{row['system']}, {row['case']}", file=sys.stderr, flush=True)
        if options.out:  # after every row: a run that is cut short keeps what it measured
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    if any("error" in row for row in report["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
