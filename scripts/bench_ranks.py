#!/usr/bin/env python
"""Recording and training on one rank and on several: same statistics, and how much faster.

    python scripts/bench_ranks.py DATA-BIN --path dense.pt --masks masks.safetensors --ranks 1 2 --out ranks.json
    python scripts/bench_ranks.py --table scripts/bench_ranks.h100.json       # Markdown, no GPU needed

Each rank is a process with a GPU of its own (NCCL), or shares the CPU (--cpu, gloo). Recording takes the whole subset;
training is fine-tuning under the masks for --updates updates of --train-tokens tokens a rank, so that more ranks make
a larger batch; its rate is the median over the second half of the updates. Statistics of several ranks must equal
those of one to float64 rounding, or the program ends with an error.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from result_files import add_result_options, git_commit, print_table, require_writable, write_report

from ap_fairseq.artifacts import AttentionStats
from ap_fairseq.evaluation.tables import Table, markdown
from ap_fairseq.model.checkpoints import load_checkpoint
from ap_fairseq.provenance import versions

ROOT = Path(__file__).resolve().parents[1]
RECORDED = re.compile(r"recorded in ([\d.]+) s: ([\d,]+) sentences and ([\d,]+) target tokens a second")


def run_ranks(ranks: int, cpu: bool, command: list[str]) -> str:
    """Run a fairseq command as *ranks* processes and return the output of the first; ends the program if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*command, *(["--cpu"] if cpu else ["--fp16"]), "--num-workers", "0" if cpu else "2"]
    flags = ["--distributed-world-size", str(ranks), "--distributed-backend", "gloo" if cpu else "nccl"]
    flags += ["--distributed-init-method", f"tcp://127.0.0.1:{port}", "--distributed-no-spawn"]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(ranks)]
        processes = []
        for rank, log in enumerate(logs):
            own = [*flags, "--distributed-rank", str(rank), *([] if cpu else ["--device-id", str(rank)])]
            with log.open("w") as stream:
                whole = [*command, *(own if ranks > 1 else ["--distributed-world-size", "1"])]
                processes.append(subprocess.Popen(whole, stdout=stream, stderr=subprocess.STDOUT))
        failed = [log for process, log in zip(processes, logs, strict=True) if process.wait()]
        if failed:
            sys.exit(f"bench_ranks.py: {' '.join(command)} failed:\n{failed[0].read_text()[-3000:]}")
        return logs[0].read_text()


def record(args: argparse.Namespace, ranks: int, output: Path) -> dict[str, float]:
    command = [shutil.which("ap-record"), args.data, "--path", args.path, "--subset", args.subset, "-o", str(output)]
    log = run_ranks(ranks, args.cpu, [*command, "--max-tokens", str(args.record_tokens), "--log-format", "simple"])
    seconds, sentences, tokens = (float(value.replace(",", "")) for value in RECORDED.search(log).groups())
    return {"seconds": seconds, "sentences_per_s": sentences, "target_tokens_per_s": tokens}


def train(args: argparse.Namespace, ranks: int, folder: Path) -> dict[str, float]:
    settings = load_checkpoint(args.path)["cfg"]["model"]
    settings = settings if isinstance(settings, dict) else vars(settings)
    share = ["--share-all-embeddings"] if settings.get("share_all_embeddings") else []
    sizes = ("layers", "embed_dim", "ffn_embed_dim", "attention_heads")
    sizes = [(f"{side}_{size}") for side in ("encoder", "decoder") for size in sizes]
    flags = [word for size in sizes for word in (f"--{size.replace('_', '-')}", str(settings[size]))]
    flags += [f"--{side}-normalize-before" for side in ("encoder", "decoder") if settings[f"{side}_normalize_before"]]
    command = [shutil.which("fairseq-train"), args.data, "--user-dir", str(ROOT / "ap_fairseq"), *flags, *share]
    command += ["--arch", "pruned_transformer", "--attention-masks", args.masks, "--finetune-from-model", args.path]
    command += "--optimizer adam --lr 1e-4 --lr-scheduler fixed --criterion label_smoothed_cross_entropy".split()
    command += "--label-smoothing 0.1 --dropout 0.1 --no-save --disable-validation --log-format json".split()
    command += ["--log-interval", "1", "--max-update", str(args.updates), "--max-tokens", str(args.train_tokens)]
    log = run_ranks(ranks, args.cpu, [*command, "--ddp-backend", "legacy_ddp", "--save-dir", str(folder)])
    rates = [float(rate) for rate in re.findall(r'train_inner .*?"wps": "([\d.]+)"', log)]
    return {"target_tokens_per_s": statistics.median(rates[len(rates) // 2 :])}


def require_equal(one: Path, several: Path, ranks: int) -> float:
    """Return the largest relative difference of the statistics; ends the program if it is more than rounding."""
    a, b = AttentionStats.load(one), AttentionStats.load(several)
    worst = 0.0
    for kind in a.kinds:
        if not np.array_equal(a.support[kind], b.support[kind]):
            sys.exit(f"bench_ranks.py: {ranks} ranks counted other sentences of {kind.value} than one rank")
        difference = np.abs(a.mass[kind] - b.mass[kind]) / np.maximum(a.mass[kind], 1e-300)
        worst = max(worst, float(difference[a.mass[kind] > 0].max()))
    if worst > 1e-12:
        sys.exit(f"bench_ranks.py: statistics of {ranks} ranks differ from those of one by {worst:.1e}")
    return worst


def table(report: dict) -> str:
    """One Markdown row per number of ranks, with ratios to the first."""
    header = ["ranks", "recording, target tokens/s", "ratio", "training, target tokens/s", "ratio"]
    rows = []
    for row in report["rows"]:
        cells = [str(row["ranks"])]
        for stage in ("record", "train"):
            rate, base = (r[stage]["target_tokens_per_s"] for r in (row, report["rows"][0]))
            cells += [f"{rate:,.0f}", f"{rate / base:.2f}"]
        rows.append([*cells, format(row["difference_of_statistics"], ".1g")])
    made = f"{report['device']}, torch {report['versions']['torch']}"
    return f"{made}\n\n{markdown(Table([*header, 'statistics differ by'], rows, align='rrrrrr'))}"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="data-bin of the checkpoint")
    parser.add_argument("--path", help="dense checkpoint")
    parser.add_argument("--masks", help="masks for it (ap-masks)")
    parser.add_argument("--subset", default="train")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--train-tokens", type=int, default=16384, help="of a batch of one rank (default: %(default)s)")
    parser.add_argument("--record-tokens", type=int, default=16384, help="likewise (default: %(default)s)")
    parser.add_argument("--cpu", action="store_true")
    add_result_options(parser)
    return parser


def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    if args.table:
        print_table(parser, args.table, table)
        return
    if not (args.data and args.path and args.masks and args.out):
        parser.error("name DATA-BIN, --path, --masks and --out, or a result file with --table")
    require_writable(parser, args.out)
    if not args.cpu and torch.cuda.device_count() < max(args.ranks):
        sys.exit(f"bench_ranks.py: {max(args.ranks)} ranks need as many GPUs, {torch.cuda.device_count()} are here")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in args.ranks:
            statistics_file = Path(folder) / f"{ranks}.safetensors"
            row = {"ranks": ranks, "record": record(args, ranks, statistics_file)}
            row["train"] = train(args, ranks, Path(folder) / f"train{ranks}")
            first = Path(folder) / f"{args.ranks[0]}.safetensors"
            row["difference_of_statistics"] = require_equal(first, statistics_file, ranks)
            rows.append(row)
            print(json.dumps(row), flush=True)
    device = f"CPU ({torch.get_num_threads()} threads a rank)" if args.cpu else torch.cuda.get_device_name()
    document = {
        "rows": rows,
        "device": device,
        "versions": versions(),
        "commit": git_commit(),
        "arguments": {k: str(v) if k == "out" else v for k, v in vars(args).items() if k != "table"},
    }
    write_report(args.out, document)
    print(table(document))


if __name__ == "__main__":
    main()
