#!/usr/bin/env python
"""Benchmark training and translation: stock fairseq against the plugin, one process per system, in turns.

    python scripts/bench_fairseq.py DATA_BIN --out scripts/bench_fairseq.h200.json   # every system and case
    python scripts/bench_fairseq.py DATA_BIN --systems stock kept --cases sentences  # some
    python scripts/bench_fairseq.py --table scripts/bench_fairseq.h200.json          # Markdown, no GPU needed

DATA_BIN is a folder of fairseq-preprocess with real text; its test sentences are translated, and pages are consecutive
training sentences, joined up to the length of the case. Systems:

    stock       fairseq's transformer and generator
    eager       the plugin with torch's fused attention under all-kept masks (--attention-backend eager)
    kept        the plugin's kernels under all-kept masks, with --task pruned_translation
    50, 80, 90  the same under random masks of that sparsity (per cent): cells at sentence length, 64-blocks on pages

Parameters are those of a checkpoint (--path, a dense transformer) or random, the same in all systems. With random
parameters nothing ends early: every batch is translated to the length of its longest source, so that all systems take
the same number of steps. Translation is timed once from a cold start (graph capture and the first compilation of
kernels included) and then warm; the median of the warm passes counts. Training steps are those of fairseq's Trainer.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SYSTEMS = ("stock", "eager", "kept", "50", "80", "90")
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}

# kind, tokens per page (0: sentences as they are), max-tokens (0: one sentence at a time), at most so many examples
CASES = {
    "sentences": ("translate", 0, 12000, 2000),
    "sentences, one by one": ("translate", 0, 0, 20),
    "pages of 1000": ("translate", 1000, 32000, 32),
    "train sentences": ("train", 0, 16384, 8000),
    "train pages of 1024": ("train", 1024, 16384, 160),
    "train pages of 4096": ("train", 4096, 16384, 40),
}


# --- one system, in a process of its own ------------------------------------------------------------------------------


class Workload:
    """Data, task, model and generator of one system."""

    def __init__(self, options: argparse.Namespace):
        import ap_fairseq  # noqa: F401  (registers the plugin)

        self.options = options
        self.stock = options.system == "stock"
        self.dtype = PRECISIONS[options.precision]

    def task_and_model(self, page: int, train: bool):
        from fairseq import options as fairseq_options
        from fairseq import tasks
        from fairseq.dataclass.utils import convert_namespace_to_omegaconf

        arch = self.options.arch if self.stock else f"pruned_{self.options.arch}"
        positions = str(max(1024, page + 2))
        flags = [
            self.options.data, "--arch", arch, "--share-all-embeddings", f"--{self.options.precision}",
            "--task", "translation" if self.stock or train else "pruned_translation",
            "--max-source-positions", positions, "--max-target-positions", positions, "--dropout", "0.3",
            "--optimizer", "adam", "--lr", "5e-4", "--criterion", "label_smoothed_cross_entropy",
            "--label-smoothing", "0.1", "--max-tokens", "16384", "--seed", "1",
        ]  # fmt: skip
        if not self.stock:
            flags += ["--attention-backend", "eager" if self.options.system == "eager" else "auto"]
        args = fairseq_options.parse_args_and_arch(fairseq_options.get_training_parser(), flags)
        cfg = convert_namespace_to_omegaconf(args)
        cfg.common.tpu = False  # fairseq sets it with --bf16
        task = tasks.setup_task(cfg.task)
        torch.manual_seed(1)
        model = task.build_model(cfg.model)
        if self.options.path:
            from ap_fairseq.artifacts import load_checkpoint

            model.load_state_dict(load_checkpoint(self.options.path)["model"])
        if not self.stock:
            model.set_masks(self.masks(model, page))
        return cfg, task, model

    def masks(self, model, page: int):
        """Random masks of the system's sparsity, a page or 256 positions square: 64-blocks or cells."""
        from ap_fairseq.artifacts import PruningMasks
        from ap_fairseq.sites import AttentionKind, architecture
        from triton_ops.testing import block_mask

        size, block = (page, 64) if page else (256, 1)
        sparsity = int(self.options.system) / 100 if self.options.system.isdigit() else 0.0
        keep, beyond = {}, {}
        for kind, (layers, heads) in architecture(model).items():
            kind = AttentionKind(kind)
            cells = [block_mask(heads, size, size, block, sparsity, seed).numpy() for seed in range(layers)]
            keep[kind] = np.stack(cells)
            if kind.causal:
                keep[kind] = np.tril(keep[kind])
            column = range(size) if kind is not AttentionKind.CROSS else 0
            keep[kind][..., range(size), column] = True
            beyond[kind] = np.ones((layers, heads, 2 * size - 1), dtype=bool)
        return PruningMasks(keep, beyond)

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

    def translate(self, page: int, max_tokens: int, limit: int) -> dict:
        from fairseq import utils

        cfg, task, model = self.task_and_model(page, train=False)
        model = model.to("cuda", self.dtype).eval()
        model.prepare_for_inference_(cfg)
        forced = dict(max_len_a=1, max_len_b=0) if not self.options.path else {}
        search = argparse.Namespace(beam=5, lenpen=1, **forced)
        generator = task.build_generator([model], search)
        batches = self.batches(self.dataset(task, "train" if page else "test", page, limit), max_tokens)
        passes, tokens, memory = [], 0, 0
        for number in range(2 if self.stock else 1 + self.options.repeats):
            chosen = batches[:1] if number == 0 and self.stock else batches  # stock has nothing to build up
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start, tokens = time.perf_counter(), 0
            for batch in chosen:
                for hypotheses in task.inference_step(generator, [model], utils.move_to_cuda(batch)):
                    tokens += len(hypotheses[0]["tokens"])
            torch.cuda.synchronize()
            passes.append(time.perf_counter() - start)
            memory = torch.cuda.max_memory_allocated()
        seconds = statistics.median(passes[1:])
        n_sentences = sum(len(batch["id"]) for batch in batches)
        return dict(
            seconds=seconds, cold_seconds=passes[0] if not self.stock else None, tokens=tokens, sentences=n_sentences,
            tokens_per_s=tokens / seconds, sentences_per_s=n_sentences / seconds, peak_bytes=memory,
        )  # fmt: skip

    def train(self, page: int, max_tokens: int, limit: int) -> dict:
        from fairseq.trainer import Trainer

        cfg, task, model = self.task_and_model(page, train=True)
        trainer = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
        batches = self.batches(self.dataset(task, "train", page, limit), max_tokens)
        batches = batches[:: max(1, len(batches) // 10)][:10]
        for batch in batches * 2:  # compiles, fills the allocator, settles the loss scale
            trainer.train_step([batch])
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(self.options.repeats):
            start = time.perf_counter()
            for batch in batches:
                trainer.train_step([batch])
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds, tokens = statistics.median(times), sum(batch["ntokens"] for batch in batches)
        return dict(
            seconds=seconds, updates=len(batches), tokens=tokens, tokens_per_s=tokens / seconds,
            updates_per_s=len(batches) / seconds, peak_bytes=torch.cuda.max_memory_allocated(),
        )  # fmt: skip


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
    workload = Workload(options)
    for case in options.cases:
        kind, page, max_tokens, limit = CASES[case]
        if options.system == "eager" and kind == "translate":
            continue
        result = getattr(workload, kind)(page, max_tokens, limit)
        row = dict(case=case, system=options.system, kind=kind, page=page, max_tokens=max_tokens) | result
        print(json.dumps(row), flush=True)
        gc.collect()  # the memory of a case is not that of the one before
        torch.cuda.empty_cache()


# --- all systems ------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """Yield the results of every system as its process prints them."""
    for system in options.systems:
        command = [sys.executable, __file__, options.data, "--worker", system, "--arch", options.arch]
        command += ["--precision", options.precision, "--repeats", str(options.repeats), "--cases", *options.cases]
        command += ["--path", options.path] if options.path else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
        if process.returncode:
            yield dict(case="-", system=system, error=f"the process ended with status {process.returncode}")


def table(report: dict) -> str:
    """One Markdown row per case and system, with ratios to the stock system."""
    lines = [
        f"{report['device']}, torch {report['torch']}, triton {report['triton']}, {report['arch']}, "
        f"{report['precision']}, commit {report['commit']}: `{report['command']}`",
        *([report["note"]] if "note" in report else []),
        "",
        "| case | system | target tokens/s | ratio | peak memory | ratio | cold start |",
        "|---|---|---|---|---|---|---|",
    ]
    stock = {row["case"]: row for row in report["rows"] if row["system"] == "stock"}
    for case in CASES:
        for row in report["rows"]:
            if row["case"] != case:
                continue
            base = stock.get(case)
            ratios = [f"{row[key] / base[key]:.2f}" if base else "" for key in ("tokens_per_s", "peak_bytes")]
            cold = f"{row['cold_seconds']:.1f} s, warm {row['seconds']:.1f} s" if row.get("cold_seconds") else ""
            lines.append(
                f"| {case} | {row['system']} | {row['tokens_per_s']:,.0f} | {ratios[0]} "
                f"| {row['peak_bytes'] / 2**30:.2f} GiB | {ratios[1]} | {cold} |"
            )
    lines += [f"\n{row['system']}: {row['error']}" for row in report["rows"] if "error" in row]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="data-bin folder")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--arch", default="transformer_iwslt_de_en", help="fairseq's architecture")
    parser.add_argument("--path", help="checkpoint of a dense transformer of this architecture; default: random")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--repeats", type=int, default=3, help="timed passes; their median counts (default: 3)")
    parser.add_argument("--worker", dest="system", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, metavar="JSON", help="print a Markdown table of a result file and stop")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    if options.data is None:
        parser.error("name a data-bin folder, or a result file with --table")
    if not torch.cuda.is_available():
        sys.exit("bench_fairseq.py: no CUDA device; only --table works without one")
    if options.system:
        work(options)
        return
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    report = dict(
        device=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__,
        python=platform.python_version(), arch=options.arch, precision=options.precision,
        parameters=options.path or "random", command=" ".join(["python", *sys.argv]),
        time=datetime.now(UTC).isoformat(timespec="seconds"), commit=commit.stdout.strip(), rows=[],
    )  # fmt: skip
    for row in measure(options):
        report["rows"].append(row)
        print(f"{row['system']}, {row['case']}", file=sys.stderr, flush=True)
        if options.out:  # after every row: a run that is cut short keeps what it measured
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
