#!/usr/bin/env python
"""Translate a test set by whole commands: stock fairseq-generate, with our task, ap-generate, and CTranslate2.

    python scripts/bench_commands.py DATA_BIN --path dense.pt --places 1:1 1:2 2:2 --out commands.json
    python scripts/bench_commands.py DATA_BIN --path dense.pt --subset train --only-ap-generate --places 1:1 2:2 ...
    python scripts/bench_commands.py DATA_BIN --path dense.pt --cpu --out cpu.json
    python scripts/bench_commands.py --table scripts/bench_commands.h200.json       # Markdown, no GPU needed

Where bench_fairseq.py times searches, a run here is all that a user waits for, once: imports, the model, the first
batch of a process, the search, and printing. A subset is translated by fairseq-generate, stock and with our task, and
by ap-generate, which print the same lines but for rounding; the same subwords in a file by ap-generate --input, and
with `--rivals ctranslate2` by CTranslate2 (translate_ctranslate2.py) in batches of several sizes. Scores (sacreBLEU)
are computed afterwards, and not timed. *dense.pt* is a dense model of fairseq's own class, or of this plugin under
masks that prune nothing, which the others get by `ap-apply --to-stock`; stock fairseq gets our `--user-dir`, too,
without which it reads no checkpoint under this torch. A place of ap-generate is GPUS:PROCESSES. Seconds are those of
the clock, on a CPU those that all processes computed. The first run of a machine compiles kernels, and the sources of
Python where they are not byte-compiled: run twice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
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
from dense_checkpoint import stock_checkpoint
from fairseq.data import data_utils
from result_files import add_result_options, git_commit, print_table, require_writable, with_heading, write_report

from ap_fairseq.devices import count_gpus, device_name
from ap_fairseq.evaluation.tables import Table, markdown
from ap_fairseq.experiments.stages import PLUGIN
from ap_fairseq.files import UserError
from ap_fairseq.provenance import versions
from ap_fairseq.tasks import PrunedTranslationConfig, PrunedTranslationTask

MAX_SCORED = 40_000  # pairs, evenly spread: sacreBLEU takes as long as a command
SEARCHED = re.compile(r"the slowest searched for ([\d.]+) s")  # ap-generate
REFERENCE = re.compile(r"^T-(\d+)\t(.*)$", re.MULTILINE)
HYPOTHESIS = re.compile(r"^D-(\d+)\t.*?\t(.*)$", re.MULTILINE)


def place(text: str) -> tuple[int, int]:
    if match := re.fullmatch(r"(\d+):([1-9]\d*)", text):
        return int(match[1]), int(match[2])
    raise argparse.ArgumentTypeError(f"{text!r} is not GPUS:PROCESSES, such as 2:4")


def measure(command: list[str], gpus: int) -> tuple[dict, str]:
    """Run a command; return its seconds, those of its search if it logs them, and what it printed.

    Raises:
        UserError: if it fails.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is byte-compiled, and torch's a large one
    with tempfile.TemporaryFile("w+", encoding="utf-8") as lines, tempfile.TemporaryFile("w+") as log:
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        status = subprocess.run(command, stdout=lines, stderr=log, env=environment, check=False).returncode
        seconds, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        for stream in (lines, log):
            stream.seek(0)
        printed, logged = lines.read(), log.read()
    if status:
        raise UserError(f"{shlex.join(command)} failed with status {status}:\n{logged[-3000:]}")
    times = dict(seconds=seconds)
    if not gpus:  # ap-generate ends before its processes have given their GPUs back, and theirs are not counted then
        times["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if searched := SEARCHED.search(logged):
        times["search_seconds"] = float(searched[1])
    return times, printed


def subset_rows(args: argparse.Namespace, stock: str) -> Iterator[dict]:
    """Measure the commands that translate a subset and print as fairseq-generate does."""
    options = ["--gen-subset", args.subset, *search_flags(args), "--required-batch-size-multiple", "1"]
    options += ["--num-workers", "0"] if args.cpu else []
    ours = [args.data, *PLUGIN, "--task", "pruned_translation", "--path", args.path, *options]
    generate, gpus, commands = shutil.which("fairseq-generate"), int(not args.cpu), []
    if not args.only_ap_generate:
        commands = [
            ("fairseq-generate", gpus, 1, [generate, args.data, *PLUGIN, "--path", stock, *options]),
            ("fairseq-generate --task pruned_translation", gpus, 1, [generate, *ours]),
        ]
    for gpus, processes in args.places:
        command = [shutil.which("ap-generate"), *ours, "--num-processes", str(processes)]
        commands.append(("ap-generate", gpus, processes, command))
    for max_tokens, (name, gpus, processes, command) in itertools.product(args.max_tokens, commands):
        seconds, printed = measure([*command, "--max-tokens", str(max_tokens)], gpus)
        references, hypotheses = (dict(found.findall(printed)) for found in (REFERENCE, HYPOTHESIS))
        pairs = [(hypotheses[number], reference) for number, reference in references.items()]
        yield dict(command=name, gpus=gpus, processes=processes, max_tokens=max_tokens, **seconds, **scored(pairs))


def text_rows(args: argparse.Namespace, stock: str) -> Iterator[dict]:
    """Measure the commands that translate a file of subwords: ap-generate --input, and CTranslate2 if asked for."""
    task = PrunedTranslationTask.setup_task(PrunedTranslationConfig(data=args.data, dataset_impl=None))
    task.load_dataset(args.subset)
    data = task.dataset(args.subset)
    # Unknown words as fairseq-generate prints those of references.
    references = [task.target_dictionary.string(row, args.remove_bpe, escape_unk=True) for row in data.tgt]
    with tempfile.TemporaryDirectory() as folder:
        model, source, output = (f"{folder}/{name}" for name in ("model", "source", "output"))
        lines = [task.source_dictionary.string(row) for row in data.src]
        Path(source).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        ours = [args.data, *PLUGIN, "--task", "pruned_translation", "--path", args.path, *search_flags(args)]
        ours = [shutil.which("ap-generate"), *ours, "--input", source, "--output", output, "--overwrite"]
        ours += ["--buffer-size", str(args.buffer_size)] if args.buffer_size is not None else []
        commands = []
        for max_tokens, (gpus, processes) in itertools.product(args.max_tokens, args.places):
            flags = ["--num-processes", str(processes), "--max-tokens", str(max_tokens)]
            commands.append(("ap-generate --input", gpus, processes, max_tokens, ours + flags))
        if args.rivals:
            from ctranslate2.converters import FairseqConverter

            FairseqConverter(stock, args.data, unsafe_deserialization=True).convert(model)
            theirs = [sys.executable, str(Path(__file__).with_name("translate_ctranslate2.py")), model, source, output]
            theirs += ["--cpu"] if args.cpu else []
            for workers, max_tokens in itertools.product(args.workers, args.rival_tokens):
                flags = ["--workers", str(workers), "--max-tokens", str(max_tokens)]
                commands.append((f"CTranslate2, {workers} workers", int(not args.cpu), 1, max_tokens, theirs + flags))
        for name, gpus, processes, max_tokens, command in commands:
            seconds, _ = measure(command, gpus)
            hypotheses = Path(output).read_text(encoding="utf-8").splitlines()
            if name.startswith("CTranslate2"):  # writes subwords; ap-generate joins them
                hypotheses = [data_utils.post_process(line, args.remove_bpe) for line in hypotheses]
            pairs = list(zip(hypotheses, references, strict=True))
            yield dict(command=name, gpus=gpus, processes=processes, max_tokens=max_tokens, **seconds, **scored(pairs))


def search_flags(args: argparse.Namespace) -> list[str]:
    return ["--beam", "5", "--remove-bpe", args.remove_bpe, "--cpu" if args.cpu else "--fp16"]


def scored(pairs: list[tuple[str, str]]) -> dict:
    """The number of *pairs*, hypotheses and references, and the score of at most `MAX_SCORED`, not timed."""
    hypotheses, references = zip(*pairs[:: math.ceil(len(pairs) / MAX_SCORED)], strict=True)
    return dict(sentences=len(pairs), score=sacrebleu.corpus_bleu(hypotheses, [references]).format())


def table(report: dict) -> str:
    """One Markdown row for each run, with how many times as fast as the first it is."""
    kind = "cpu_seconds" if report["cpu"] else "seconds"
    body, first = [], report["rows"][0]["sentences"] / report["rows"][0][kind]
    for row in report["rows"]:
        seconds, score = row[kind], row["score"].split(" (")[0]
        rates = [f"{row['sentences'] / seconds:,.0f}", f"{row['sentences'] / seconds / first:.2f}"]
        places = [str(row["gpus"]), str(row["processes"]), f"{row['max_tokens']:,}"]
        search = f" ({row['search_seconds']:.1f})" if "search_seconds" in row else ""
        body.append([row["command"], *places, f"{seconds:.1f}{search}", *rates, score])
    header = ["command", "GPUs", "processes", "tokens of a batch", "seconds (search)", "sentences/s", "ratio", "score"]
    used = report["versions"]
    made = f"{report['device']}, torch {used['torch']}, commit {report['commit']}: `{report['made_by']}`"
    return with_heading(made, report, markdown(Table(header, body, align="lrrrrrrl")))


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
        "--kinds",
        nargs="+",
        choices=["subset", "text"],
        default=["subset", "text"],
        help="commands to time: on a subset of DATA, on a text; default: both",
    )
    parser.add_argument(
        "--rivals", nargs="+", choices=["ctranslate2"], default=[], help="also measure these, if installed"
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 4], help="of CTranslate2; default: 1 4")
    parser.add_argument("--rival-tokens", nargs="+", type=int, default=[16384, 65536], help="in batches of CTranslate2")
    parser.add_argument("--max-tokens", nargs="+", type=int, default=[12000], help="in batches of all others")
    parser.add_argument("--buffer-size", type=int, help="lines of a part of ap-generate --input; default: its own")
    parser.add_argument("--remove-bpe", default="sentencepiece")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--commit", default=git_commit(), help="to name in the results; default: that of git")
    add_result_options(parser)
    return parser


def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    if args.table:
        print_table(parser, args.table, table)
        return
    if not (args.data and args.path and args.out):
        parser.error("name DATA_BIN, --path and --out, or a result file with --table")
    require_writable(parser, args.out)
    args.places = args.places or [(int(not args.cpu), 1)]
    most = count_gpus(args.cpu)
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
        with stock_checkpoint(args.path, args.data) as stock:
            kinds = {"subset": subset_rows, "text": text_rows}
            for row in itertools.chain.from_iterable(kinds[kind](args, stock) for kind in args.kinds):
                report["rows"].append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
                write_report(args.out, report)  # a run that is cut short keeps what it measured
    except UserError as error:
        parser.error(str(error))
    print(table(report))


if __name__ == "__main__":
    main()
