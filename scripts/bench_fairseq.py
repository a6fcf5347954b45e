#!/usr/bin/env python
"""Benchmark training and translation: stock fairseq against the plugin, one process per system, in turns (--rounds).

    python scripts/bench_fairseq.py DATA_BIN --out scripts/bench_fairseq.h100.json    # every system, default cases
    python scripts/bench_fairseq.py DATA_BIN --systems stock all-ones --cases sentences --profile
    python scripts/bench_fairseq.py DATA_BIN --device cpu --limit 20 --systems stock all-ones --cases sentences
    python scripts/bench_fairseq.py DATA_BIN --systems stock all-ones --cases sentences --rivals ctranslate2
    python scripts/bench_fairseq.py TEXT_BIN --arch transformer_lm --systems stock all-ones 90    # language models
    python scripts/bench_fairseq.py --table scripts/bench_fairseq.h100.json           # Markdown, no GPU needed

Nothing else should run on the host: stock fairseq waits for it, and its rate doubles where the host is idle.

DATA_BIN is a folder of fairseq-preprocess with real text; its test sentences (--subset) are translated, and pages are
consecutive training sentences, joined up to the length of the case. On a GPU the plugin's searches overlap with the
next batch, as in ap-generate. Systems:

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
import gc
import importlib.util
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from result_files import add_result_options, git_commit, print_table, require_writable, with_heading, write_report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SYSTEMS = ("stock", "stock-sdpa", "sdpa", "all-ones", "int8", "50", "80", "90")
TRAIN_ONLY = ("stock-sdpa", "sdpa")
CPU_ONLY = ("int8",)  # and translation only
RIVALS = {"ctranslate2": ("ctranslate2", "ctranslate2 int8")}  # package: systems
PRECISIONS = ("fp16", "bf16", "fp32")
TRAIN_TOKENS = 16384

# kind, tokens per page (0: sentences as they are), max-tokens (0: one sentence at a time), at most this many examples.
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

# --- one system, in a process of its own ------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Run the cases of one system and print one JSON line for each."""
    from fairseq_workloads import LanguageModelWorkload, Workload  # imports fairseq

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
    passed = ("arch", "precision", "repeats", "device", "subset", "limit", "max_tokens", "path", "remove_bpe", "commit")
    given = [(name, getattr(options, name)) for name in passed if getattr(options, name)]
    flags = [text for name, value in given for text in (f"--{name.replace('_', '-')}", str(value))]
    flags += ["--profile"] if options.profile else []
    runs: list[tuple[str, dict]] = [(system, {}) for system in options.systems]
    if "ctranslate2" in options.rivals:
        from rival_ctranslate2 import variants

        alone = all(CASES[case][2] == 0 for case in options.cases)
        of_rival = options.workers, options.rival_tokens
        runs += variants(options.device, options.precision, bool(options.path), alone, *of_rival)
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
    body = []
    for row in rows:
        base = stock.get(row["case"], {})
        speed, memory, reserved = (
            f"{row[key] / base[key]:.2f}" if row.get(key) and base.get(key) else ""
            for key in ("tokens_per_s", "peak_bytes", "reserved_bytes")
        )
        cold = f"{row['cold_seconds']:.1f} s, warm {row['seconds']:.1f} s" if row.get("cold_seconds") else ""
        sizes = [f"{row[key] / 2**30:.2f} GiB" if row.get(key) else "" for key in ("peak_bytes", "reserved_bytes")]
        sentences = f"{row['sentences_per_s']:,.1f}" if "sentences_per_s" in row else ""
        bleu = f"{row['bleu']:.2f}" if "bleu" in row else ""
        columns = [row["case"], row["system"], f"{row['tokens_per_s']:,.0f}", speed, sentences, bleu]
        body.append([*columns, sizes[0], memory, sizes[1], reserved, cold])
    header = ["case", "system", "target tokens/s", "ratio", "sentences/s", "BLEU"]
    header += ["peak memory", "ratio", "reserved", "ratio", "cold start"]
    made = (
        f"{report['device']}, torch {report['torch']}, triton {report['triton']}, {report['arch']}, "
        f"{report['precision']}, commit {report['commit']}: `{report['command']}`"
    )
    lines = [with_heading(made, report, markdown(header, body, "ll"))]
    lines += [f"\n{row['case']}, {row['system']}: {described(row['settings'])}" for row in rows if "settings" in row]
    if profiled := [row for row in rows if "profile" in row]:
        lines += ["", profile_table(profiled)]
    lines += [f"\n{row['system']}: {row['error']}" for row in report["rows"] if "error" in row]
    return "\n".join(lines)


def described(settings: dict) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def markdown(header: list[str], rows: list[list[str]], left: str) -> str:
    """Render a Markdown table without empty columns; those after the ones of *left* are set flush right."""
    from ap_fairseq.evaluation import tables

    filled = [any(column) for column in zip(*rows, strict=True)]
    header, *rows = [list(itertools.compress(row, filled)) for row in (header, *rows)]
    return tables.markdown(tables.Table(header, rows, align=left.ljust(len(header), "r")))


def profile_table(rows: list[dict]) -> str:
    """Milliseconds of an update or step, and of the kernels in it, as Markdown."""
    body = []
    for row in rows:
        profile = row["profile"]
        numbers = [f"{1000 * profile['wall_seconds']:.2f}", f"{profile['gpu_busy']:.0%}"]
        numbers += [f"{profile[key]:,.0f}" for key in ("kernels", "launches")]
        numbers += [f"{1000 * seconds:.2f}" for seconds in profile["groups"].values()]
        body.append([row["case"], row["system"], profile["unit"], *numbers])
    header = ["case", "system", "ms per", "wall", "GPU busy", "kernels", "launches", *profile["groups"]]
    return markdown(header, body, "lll")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="data-bin folder")
    parser.add_argument(
        "--arch", help="fairseq's architecture, with random parameters (default: transformer_iwslt_de_en)"
    )
    parser.add_argument("--path", help="checkpoint of a dense transformer, which brings its own architecture")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: fp16, on a CPU fp32")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="default: all that the device has")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=[], help="also measure these, if installed")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 4], help="of CTranslate2; default: 1 4")
    parser.add_argument(
        "--rival-tokens",
        nargs="+",
        type=int,
        default=[4096, 16384],
        help="of the batches that CTranslate2 makes itself, with --path; default: 4096 16384",
    )
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
    parser.add_argument("--subset", default="test", help="whose sentences are translated (default: test)")
    parser.add_argument("--limit", type=int, help="at most this many sentences or pages in every case")
    parser.add_argument(
        "--max-tokens", type=int, help=f"of batches (default: 12000 or more; in training {TRAIN_TOKENS})"
    )
    parser.add_argument("--profile", action="store_true", help="add where the time of the GPU goes")
    parser.add_argument("--commit", default=git_commit(), help="to name in the results; default: that of git")
    parser.add_argument("--worker", dest="system", help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    add_result_options(parser)
    return parser


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program if options do not go together; fill in those that others decide."""
    if options.data is None:
        parser.error("name a data-bin folder, or a result file with --table")
    require_writable(parser, options.out)
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
    if not any(Path(options.data).glob("dict*.txt")):
        parser.error(f"{options.data} has no dictionary dict*.txt; name a folder made by fairseq-preprocess")
    if not any(Path(options.data).glob(f"{options.subset}.*")):
        parser.error(f"--subset {options.subset}: {options.data} has no such text; name train, valid or test")
    for flag, number in (("--rounds", options.rounds), ("--repeats", options.repeats), ("--limit", options.limit)):
        if number is not None and number < 1:
            parser.error(f"{flag} {number}: at least 1 is measured")


def main() -> None:
    parser = get_parser()
    options = parser.parse_args()
    if options.table:
        systems = [*(options.systems or SYSTEMS), *itertools.chain(*RIVALS.values())]
        print_table(parser, options.table, lambda report: table(report, systems))
        return
    check(parser, options)
    if options.system:
        work(options)
        return
    options.arch = None if options.path else options.arch or "transformer_iwslt_de_en"
    if options.path is None:
        run(options, options.arch)
        return
    from dense_checkpoint import architecture_of, stock_checkpoint

    from ap_fairseq.files import UserError

    try:
        with stock_checkpoint(options.path, options.data) as path:
            given, options.path = options.path, path
            run(options, architecture_of(path), given)
    except UserError as error:
        parser.error(str(error))


def run(options: argparse.Namespace, arch: str, parameters: str = "random") -> None:
    """Measure all systems, write the report and print it; the status is 1 if a process failed."""
    from ap_fairseq.devices import device_name

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
            write_report(options.out, report)
    print(table(report))
    if any("error" in row for row in report["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
