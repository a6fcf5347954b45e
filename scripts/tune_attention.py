#!/usr/bin/env python
"""Look for faster launch configurations of the kernels than those of triton_ops/config.py.

    python scripts/tune_attention.py --out scripts/tune_attention.h100.json                    # every kernel
    python scripts/tune_attention.py --only "forward 16" "small forward 128" --out some.json
    python scripts/tune_attention.py --dim 128 --only "dkdv 64" "dkdv 128" --out some.json      # another head size
    python scripts/tune_attention.py --table scripts/tune_attention.h100.json                  # Markdown, no GPU needed

One kernel and tile size at a time, the others as chosen; bfloat16, as CUDA-graph replays. Candidates are compiled
side by side first (300 in a minute on 16 cores), then all timed, then the best ones again in turns with the
chosen one. `ratio` is the time to that of the chosen one, over several cases their geometric mean. Nothing is changed:
edit triton_ops/config.py where a ratio is below what two runs of one configuration differ by, some 2%.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_attention import BFLOAT16, DEVICE, measure, provenance, sentence_problem, training_step
from result_files import add_result_options, print_table, require_writable, with_heading, write_report

from triton_ops import AttentionLayout, block_sparse_attention, launch
from triton_ops.config import Config
from triton_ops.layout import TILES
from triton_ops.testing import block_mask

RETIMED = 4
REGISTERS = 65536  # of a multiprocessor of NVIDIA GPUs; a program cannot have more


@dataclass(frozen=True)
class Search:
    """Candidates in place of a function of triton_ops/config.py, and the cases to time them on.

    Attributes:
        name: the module of triton_ops that calls the function, and the function.
        cases: each builds its tensors and returns what to time.
    """

    name: tuple[str, str]
    cases: tuple[Callable[[], Callable[[], object]], ...]
    candidates: tuple[Config, ...]

    @contextlib.contextmanager
    def using(self, config: Config | None) -> Iterator[None]:
        """A context in which the launcher uses *config*; None: what it would choose."""
        module, function = self.name
        launch.forget()
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch("triton_ops.config.HOPPER", False))  # kernels that take no configuration
            if config is not None:
                stack.enter_context(mock.patch(f"triton_ops.{module}.{function}", lambda *_: config))
            yield
        launch.forget()

    def times(self, runs: Sequence[Callable[[], object]], config: Config | None, repeats: int) -> list[float] | None:
        """Milliseconds of each case, or None where one cannot run."""
        with self.using(config):
            rows = [measure(run, repeats) for run in runs]
        return None if any("error" in row for row in rows) else [row["median_ms"] for row in rows]


def square(
    batch: int, heads: int, size: int, block: int | tuple[int, int], both: bool = False, dim: int = 64
) -> Callable[[], object]:
    """Self-attention under random block masks of 90%, forward or forward + backward."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(batch, heads, size, dim, device=DEVICE, dtype=BFLOAT16) for _ in range(4))
    layout = AttentionLayout.from_keep_mask(block_mask(heads, size, size, block, 0.9, seed=1, device=DEVICE)).prepare()
    attend = functools.partial(block_sparse_attention, layout=layout, backend="triton")
    return training_step(attend, q, k, v, grad) if both else functools.partial(attend, q, k, v)


def sentences(batch: int, size: int) -> Callable[[], object]:
    """Forward + backward of sentences of random lengths under element masks, with dropout."""
    (q, k, v, grad), lengths, keep = sentence_problem(batch, 8, size)
    layout = AttentionLayout.from_keep_mask(keep)
    seed = torch.ones(1, dtype=torch.int64, device=DEVICE)
    options = dict(layout=layout, backend="triton", q_lengths=lengths, k_lengths=lengths, dropout_p=0.1, seed=seed)
    return training_step(functools.partial(block_sparse_attention, **options), q, k, v, grad)


def candidates(outer: Iterable[int], inner: Iterable[int], warps: Iterable[int], stages: Iterable[int]):
    """All combinations with several limits on registers, but those that no program can have."""
    limits = (None, 112, 128, 168, 200, 255)
    found = (Config(*values) for values in itertools.product(outer, inner, warps, stages, limits))
    return tuple(c for c in found if c.warps * 32 * (c.registers or 1) <= REGISTERS)


def searches(dim: int = 64) -> dict[str, Search]:
    """One for each kernel and tile size; those for sentences at head size 64 only."""
    result = {}
    for tile in (16, 32, 64, 128):
        long = functools.partial(square, 4, 16, 4096, tile, dim=dim)
        medium = functools.partial(square, 8, 8, 1024, tile, dim=dim)
        warps = {16: (1,), 32: (1,) if dim <= 64 else (1, 2), 64: (4,) if dim <= 64 else (4, 8), 128: (4, 8)}[tile]
        inner = sorted({max(16, tile // 2), tile, min(2 * tile, 128)})
        rows = sorted({tile, min(tile, 64)})
        for name, cases, shape in (
            ("forward", (long, medium), (rows, inner)),
            ("dq", (functools.partial(long, both=True),), (rows, inner)),
            ("dkdv", (functools.partial(long, both=True),), (inner, rows)),
        ):
            module = "forward" if name == "forward" else "backward"
            found = candidates(*shape, warps, (2, 3, 4))
            result[f"{name} {tile}"] = Search((module, f"{name}_config"), cases, found)
    for flat in (tile for tile in TILES if tile[0] > tile[1]):
        long = functools.partial(square, 4, 16, 4096, flat, dim=dim)
        for name, case, shape, warps in (
            ("forward", long, (sorted({64, flat[0]}), (32, 64, 128)), (4, 8)),
            ("dq", functools.partial(long, both=True), ((64,), (32, 64)), (4, 8)),
            ("dkdv", functools.partial(long, both=True), ((32, 64), (16,)), (1, 2, 4)),
        ):
            module = "forward" if name == "forward" else "backward"
            search = Search((module, f"{name}_config"), (case,), candidates(*shape, warps, (2, 3, 4)))
            result[f"{name} {flat[0]}x{flat[1]}"] = search
    for batch, tile in ((256, 32), (128, 64), (64, 128)) if dim == 64 else ():
        case = (functools.partial(sentences, batch, tile),)
        rows = [tile >> k for k in range(3) if tile >> k >= 16]
        result[f"small forward {tile}"] = Search(
            ("small", "small_forward_config"), case, candidates(rows, [tile], (1, 2, 4, 8), [1])
        )
        result[f"small backward {tile}"] = Search(
            ("small", "small_backward_config"), case, candidates([tile], [tile], (1, 2, 4, 8, 16), [1])
        )
    return result


def compile_one(job: tuple[str, Config, int]) -> None:
    """Run the cases of a search once, which leaves the compiled kernel in Triton's cache on disk."""
    name, config, dim = job
    search = searches(dim)[name]
    search.times([case() for case in search.cases], config, repeats=2)


def tune(names: Sequence[str], repeats: int, dim: int) -> Iterator[dict]:
    """Time all candidates of the named searches."""
    jobs = [(name, config, dim) for name in names for config in searches(dim)[name].candidates]
    with multiprocessing.get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:
        pool.map(compile_one, jobs, chunksize=4)
    for name in names:
        search = searches(dim)[name]
        runs = [case() for case in search.cases]
        base = search.times(runs, None, repeats)
        first = {config: search.times(runs, config, repeats) for config in search.candidates}
        best = sorted((c for c, times in first.items() if times), key=lambda c: ratio(first[c], base))[:RETIMED]
        again: dict[Config | None, list[list[float]]] = {}
        for _ in range(3):  # in turns
            for config in (None, *best):
                again.setdefault(config, []).append(search.times(runs, config, 2 * repeats))
        medians = {c: [statistics.median(case) for case in zip(*times, strict=True)] for c, times in again.items()}
        chosen = medians.pop(None)
        found = [dict(config=config, ms=ms, ratio=ratio(ms, chosen)) for config, ms in medians.items()]
        failed = sum(times is None for times in first.values())
        yield dict(search=name, candidates=len(first), failed=failed, chosen_ms=chosen, best=found)


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Geometric mean over the cases."""
    return statistics.geometric_mean([a / b for a, b in zip(times, base, strict=True)])


def table(report: dict) -> str:
    """One Markdown row per search: the chosen configuration's times and the best candidate's."""
    from ap_fairseq.evaluation.tables import Table, markdown  # timing needs torch and triton only

    header = ["kernel and tile", "candidates", "chosen, ms", "best rows, keys, warps, stages, registers", "best, ms"]
    rows = []
    for row in report["rows"]:
        best = min(row["best"], key=lambda found: found["ratio"], default=None)
        if best is None:  # none could run
            best = dict(ms=row["chosen_ms"], config=["none"], ratio=1.0)
        times = [" / ".join(f"{x:.4f}" for x in ms) for ms in (row["chosen_ms"], best["ms"])]
        config = ", ".join("none" if value is None else str(value) for value in best["config"])
        rows.append([row["search"], str(row["candidates"]), times[0], config, times[1], f"{best['ratio']:.3f}"])
    made = f"{report['device']}, torch {report['torch']}, triton {report['triton']}, commit {report['commit']}"
    return with_heading(made, report, markdown(Table([*header, "ratio"], rows, align="lrrlrr")))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(searches()), metavar="SEARCH", help=", ".join(searches()))
    parser.add_argument("--dim", type=int, default=64, help="head size (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="timed graph replays (default: %(default)s)")
    add_result_options(parser)
    options = parser.parse_args(arguments)
    if options.table:
        print_table(parser, options.table, table)
        return
    require_writable(parser, options.out)
    if not torch.cuda.is_available():
        sys.exit("tune_attention.py: no CUDA device; only --table works without one")
    found = searches(options.dim)
    if unknown := set(options.only or ()) - set(found):
        parser.error(f"--only {' '.join(sorted(unknown))}: at --dim {options.dim} there are {', '.join(found)}")
    report = provenance() | dict(rows=[])
    for row in tune(options.only or list(found), options.repeats, options.dim):
        report["rows"].append(row)
        print(f"{row['search']}: {row['candidates']} candidates", file=sys.stderr, flush=True)
        if options.out:  # after every search: a run that is cut short keeps what it found
            write_report(options.out, report)
    print(table(report))


if __name__ == "__main__":
    main()
