#!/usr/bin/env python
"""Translate a test set by whole commands: stock fairseq-generate, fairseq-generate with our task, and ap-generate.

    python scripts/bench_commands.py DATA_BIN --path dense.pt --places 1:1 1:2 2:2 --out commands.json
    python scripts/bench_commands.py DATA_BIN --path dense.pt --subset train --only-ap-generate --places 1:1 2:2 ...
    python scripts/bench_commands.py DATA_BIN --path dense.pt --cpu --out cpu.json
    python scripts/bench_commands.py --table scripts/bench_commands.h200.json       # Markdown, no GPU needed

Where bench_fairseq.py times searches, a run here is all that a user waits for, once: imports, the model, the first
batch of a process, the search, and printing. Commands have the same options, so they print the same lines but for
rounding; the score that each prints stands beside it. *dense.pt* is a dense model of fairseq's own class, or of this
plugin under masks that prune nothing, which stock fairseq gets by `ap-apply --to-stock`; it gets our `--user-dir`, too,
without which fairseq reads no checkpoint under this torch. A place of ap-generate is GPUS:PROCESSES. Seconds are those
of the clock, on a CPU those that all processes computed. `--rivals ctranslate2` adds CTranslate2 on one GPU, which gets
the subwords in a file, by its own converter; its score is computed afterwards, and not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import sacrebleu
import torch
from dense_checkpoint import stock_checkpoint
from fairseq.data import data_utils
from provenance import git_commit

from ap_fairseq.evaluation.tables import Table, markdown
from ap_fairseq.experiments.stages import PLUGIN
from ap_fairseq.files import UserError, refuse_existing, write_json
from ap_fairseq.provenance import device_name, versions
from ap_fairseq.tasks import PrunedTranslationConfig, PrunedTranslationTask

BATCH_TOKENS = 4096, 16384  # of CTranslate2
SCORE = re.compile(r"^Generate .*?: (.*)$", re.MULTILINE)


def place(text: str) -> tuple[int, int]:
    if match := re.fullmatch(r"(\d+):([1-9]\d*)", text):
        return int(match[1]), int(match[2])
    raise argparse.ArgumentTypeError(f"{text!r} is not GPUS:PROCESSES, such as 2:4")


def measure(command: list[str], gpus: int) -> tuple[dict, str]:
    """Run a command; return its seconds and what it printed.

    Raises:
        UserError: if it fails.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as lines, tempfile.TemporaryFile("w+") as log:
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        status = subprocess.run(command, stdout=lines, stderr=log, env=environment, check=False).returncode
        seconds, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        for stream in (lines, log):
            stream.seek(0)
        if status:
            raise UserError(f"{shlex.join(command)} failed with status {status}:\n{log.read()[-3000:]}")
        printed = lines.read()
    computed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return dict(seconds=seconds, cpu_seconds=computed), printed


def fairseq_rows(args: argparse.Namespace, stock: str) -> Iterator[dict]:
    """Measure the commands that print as fairseq-generate does; *stock* is the checkpoint for stock fairseq."""
    for name, gpus, processes, command in runs(args, stock):
        seconds, printed = measure(command, gpus)
        sentences, score = len(re.findall(r"^H-\d+\t", printed, re.MULTILINE)), SCORE.findall(printed)[-1]
        yield dict(command=name, gpus=gpus, processes=processes, sentences=sentences, score=score, **seconds)


def ctranslate2_rows(args: argparse.Namespace, stock: str) -> Iterator[dict]:
    """Measure CTranslate2 with each number of workers and size of batches."""
    from ctranslate2.converters import FairseqConverter

    with tempfile.TemporaryDirectory() as folder:
        model, source, output = (f"{folder}/{name}" for name in ("model", "source", "output"))
        FairseqConverter(stock, args.data, unsafe_deserialization=True).convert(model)
        sources, references = subset_lines(args)
        Path(source).write_text("".join(f"{line}\n" for line in sources), encoding="utf-8")
        program = [sys.executable, str(Path(__file__).with_name("translate_ctranslate2.py")), model, source, output]
        for workers, tokens in itertools.product(args.workers, BATCH_TOKENS):
            flags = ["--workers", str(workers), "--max-tokens", str(tokens), *(["--cpu"] if args.cpu else [])]
            seconds, _ = measure(program + flags, int(not args.cpu))
            lines = Path(output).read_text(encoding="utf-8").splitlines()
            hypotheses = [data_utils.post_process(line, args.remove_bpe) for line in lines]
            score = sacrebleu.corpus_bleu(hypotheses, [references]).format()
            name = f"CTranslate2, {workers} workers, batches of {tokens:,} tokens"
            yield dict(command=name, gpus=int(not args.cpu), processes=1, sentences=len(lines), score=score, **seconds)


def subset_lines(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the sources of the subset as subwords, and its references as words."""
    task = PrunedTranslationTask.setup_task(PrunedTranslationConfig(data=args.data, dataset_impl=None))
    task.load_dataset(args.subset)
    data = task.dataset(args.subset)
    sources = [task.source_dictionary.string(row) for row in data.src]
    return sources, [task.target_dictionary.string(row, args.remove_bpe) for row in data.tgt]


def runs(args: argparse.Namespace, stock: str) -> list[tuple[str, int, int, list[str]]]:
    """Return name, GPUS, PROCESSES and command of each run; *stock* is the checkpoint for stock fairseq."""
    options = ["--gen-subset", args.subset, "--beam", "5", "--max-tokens", str(args.max_tokens)]
    options += ["--remove-bpe", args.remove_bpe, "--required-batch-size-multiple", "1", "--scoring", "sacrebleu"]
    options += ["--cpu", "--num-workers", "0"] if args.cpu else ["--fp16"]
    ours = [args.data, *PLUGIN, "--task", "pruned_translation", "--path", args.path, *options]
    generate, gpus = shutil.which("fairseq-generate"), int(not args.cpu)
    found = []
    if not args.only_ap_generate:
        found = [
            ("fairseq-generate", gpus, 1, [generate, args.data, *PLUGIN, "--path", stock, *options]),
            ("fairseq-generate --task pruned_translation", gpus, 1, [generate, *ours]),
        ]
    for gpus, processes in args.places:
        command = [shutil.which("ap-generate"), *ours, "--num-processes", str(processes)]
        found.append(("ap-generate", gpus, processes, command))
    return found


def table(report: dict) -> str:
    """One Markdown row for each run, with how many times as fast as the first it is."""
    kind = "cpu_seconds" if report["cpu"] else "seconds"
    body, first = [], report["rows"][0][kind]
    for row in report["rows"]:
        seconds, score = row[kind], row["score"].split(" (")[0]
        rates = [f"{row['sentences'] / seconds:,.0f}", f"{first / seconds:.2f}"]
        body.append([row["command"], str(row["gpus"]), str(row["processes"]), f"{seconds:.1f}", *rates, score])
    header = ["command", "GPUs", "processes", "seconds", "sentences/s", "ratio", "score"]
    used = report["versions"]
    made = f"{report['device']}, torch {used['torch']}, commit {report['commit']}: `{report['made_by']}`"
    notes = [report["note"]] if "note" in report else []
    return "\n".join([made, *notes, "", markdown(Table(header, body, align="lrrrrrl"))])


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="data-bin of the checkpoint")
    parser.add_argument("--path", help="dense checkpoint")
    parser.add_argument("--subset", default="test")
    parser.add_argument(
        "--places", nargs="+", type=place, metavar="GPUS:PROCESSES", help="default: 1:1; 0:1 with --cpu"
    )
    parser.add_argument(
        "--only-ap-generate", action="store_true", help="without fairseq-generate: text that stock takes hours for"
    )
    parser.add_argument(
        "--rivals", nargs="+", choices=["ctranslate2"], default=[], help="also measure these, if installed"
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 4], help="of CTranslate2; default: 1 4")
    parser.add_argument("--max-tokens", type=int, default=12000)
    parser.add_argument("--remove-bpe", default="sentencepiece")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--commit", default=git_commit(), help="to name in the results; default: that of git")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print a Markdown table of a result file and stop")
    return parser


def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))))
        return
    if not (args.data and args.path and args.out):
        parser.error("name DATA_BIN, --path and --out, or a result file with --table")
    args.places = args.places or [(int(not args.cpu), 1)]
    most = 0 if args.cpu else torch.cuda.device_count()
    if wrong := [gpus for gpus, _ in args.places if gpus > most or (not gpus and not args.cpu)]:
        parser.error(f"--places: {wrong[0]} GPUs, {most} are here{'' if args.cpu else '; for none, add --cpu'}")
    report = dict(
        device=device_name(args.cpu),
        versions=versions(),
        commit=args.commit,
        cpu=args.cpu,
        made_by=shlex.join(["python", "scripts/bench_commands.py", *sys.argv[1:]]),
        rows=[],
    )
    try:
        refuse_existing(args.out, overwrite=True)
        with stock_checkpoint(args.path, args.data) as stock:
            measured = [fairseq_rows(args, stock), *([ctranslate2_rows(args, stock)] if args.rivals else [])]
            for row in itertools.chain(*measured):
                report["rows"].append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
                write_json(args.out, report, overwrite=True)  # a run that is cut short keeps what it measured
    except UserError as error:
        parser.error(str(error))
    print(table(report))


if __name__ == "__main__":
    main()
