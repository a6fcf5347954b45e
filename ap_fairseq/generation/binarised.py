"""Translate a subset of a data-bin folder with fairseq-generate, shared among processes, and join what they print."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
import re
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from fairseq import scoring, utils
from fairseq.data.iterators import CountingIterator
from fairseq.tasks import TASK_REGISTRY
from fairseq_cli import generate

from ap_fairseq.devices import uses_gpu
from ap_fairseq.files import read_json, write_json
from ap_fairseq.generation.joining import append_sentences, join
from ap_fairseq.generation.lines import BatchLines, TranslatedBatch
from ap_fairseq.generation.ranks import Ranks
from ap_fairseq.generation.scoring import SacrebleuSums, ScoredLater, TokenSums, score_lines, summing
from ap_fairseq.generation.workers import Workers, spare_processes
from ap_fairseq.search.hypotheses import Hypotheses
from ap_fairseq.search.running import look_ahead
from ap_fairseq.tasks import return_what_is_printed

logger = logging.getLogger(__name__)

# Lines about one sentence: S-7, H-7, ..., and E-7_3 of --retain-iter-history.
_SENTENCE = re.compile(rb"^[A-Z]-(\d+)(?:_\d+)?\t.*\n(?:[A-Z]-\1(?:_\d+)?\t.*\n)*", re.MULTILINE)
LINES = "lines{}.txt"  # of each writer of a process


class Joined(NamedTuple):
    """What all processes printed: the lines of each sentence, in order, and the lines with its score (may be none)."""

    sentences: list[bytes]
    score: list[str]

    def pieces(self, quiet: bool) -> Iterator[bytes]:
        """Yield the lines as ``fairseq-generate`` prints them, with ``--quiet`` the score alone."""
        yield from () if quiet else self.sentences
        yield from (f"{line}\n".encode() for line in self.score)


class _NoBatch(Exception):
    """This process has no batch to translate."""


def translate_subset(cfg, ranks: Ranks, folder: Path) -> Joined:
    """Translate ``cfg.dataset.gen_subset`` with *ranks*; each takes the batches that fairseq gives its shard.

    Args:
        cfg: fairseq's configuration of ``fairseq-generate``.
        folder: for the output of each process (``rank0/``).

    Raises:
        UserError: if a process fails.
    """
    cfg = copy.deepcopy(cfg)
    cfg.common_eval.quiet = False  # they are joined, and scored, by what they print
    cfg.common.log_format, cfg.common.log_interval = "simple", 1
    cfg.distributed_training.distributed_world_size = len(ranks)
    for left in folder.glob("rank*/"):  # by a run that was killed
        shutil.rmtree(left)
    ranks.run(f"generate {cfg.dataset.gen_subset}", len(ranks), translate_share, cfg, folder)
    shares = [read_json(folder / f"rank{rank}.json") for rank in range(len(ranks))]
    sentences = join(folder.glob(f"rank*/{LINES.format('*')}"))
    if missing := shares[0]["sentences"] - len(sentences):
        logger.warning(
            f"{missing} of {shares[0]['sentences']} sentences were left out: they are longer than "
            "--max-source-positions or --max-target-positions (--skip-invalid-size-inputs-valid-test), or in a last "
            "batch that is no multiple of --required-batch-size-multiple"
        )
    tokens, slowest = sum(share["tokens"] for share in shares), max(share["seconds"] for share in shares)
    if sentences:
        logger.info(
            f"translated {len(sentences):,} sentences ({tokens:,} tokens); processes: {len(ranks)}, the slowest "
            f"searched for {slowest:.1f} s ({tokens / max(slowest, 0.1):,.0f} tokens/s in all)"
        )
    has_references = any(share["references"] for share in shares)
    sums = [share["sums"] for share in shares if share["sums"] is not None]
    return Joined(sentences, score_lines(cfg, sentences, sums) if has_references else [])


def translate_share(rank: int, cfg, folder: Path) -> None:
    """Run ``fairseq-generate`` on the shard of one process; write what it prints and how many sentences there are."""
    cfg.distributed_training.distributed_rank = rank
    cfg.common_eval.results_path = str(folder / f"rank{rank}")
    share: dict[str, Any] = {"seconds": 0.0, "tokens": 0, "references": False}
    task_class = TASK_REGISTRY[cfg.task._name]  # some tasks make their batches themselves
    stock = task_class.get_batch_iterator

    def get_batch_iterator(self, dataset, *args, **options):
        iterator = stock(self, dataset, *args, **options)
        share["sentences"] = len(dataset)
        if rank >= len(iterator.frozen_batches):
            raise _NoBatch  # fairseq divides by the time and the length of what it has translated
        if rank:  # each process samples with random numbers of its own, the first with those of fairseq-generate
            utils.set_torch_seed(torch.initial_seed() + rank)
        if uses_gpu(cfg.common.cpu):  # else nothing searches while the host reads
            iterator.next_epoch_itr = functools.partial(_look_ahead, iterator.next_epoch_itr)
        return iterator

    stock_build, stock_step = scoring.build_scorer, task_class.inference_step
    plain = _plain(cfg)
    nbest, by_batch = plain.generation.nbest, BatchLines.covers(plain.generation)
    scorer: TokenSums | SacrebleuSums | None = None  # of this process, or a copy in each of its writers
    writers: list[Workers] = []
    lines: list[BatchLines] = []  # of each writer

    def build_scorer(*args):
        nonlocal scorer
        scorer = summing(stock_build(*args))
        return ScoredLater() if scorer is None or by_batch else scorer

    def inference_step(self, generator, models, sample, *args, **options):
        begin = time.perf_counter()
        return_what_is_printed(stock_step, generator, nbest, in_arrays=by_batch)
        found = stock_step(self, generator, models, sample, *args, **options)
        share["seconds"] += time.perf_counter() - begin
        share["references"] = sample["target"] is not None
        if by_batch:
            found = Hypotheses.of(found, nbest, unit=math.log(2))  # fairseq prints bits
            n_tokens = found.best_lengths().sum()
            if not lines:
                paths = [folder / f"rank{rank}" / LINES.format(k) for k in range(len(writers))]
                lines.extend(BatchLines(plain, self, generator, scorer, path) for path in paths)
            next(turns).submit("write", TranslatedBatch.collect(sample, found))
            # Nothing is left for fairseq's loop but tokens to count.
            sample["nsentences"], sample["id"] = len(found.counts), sample["id"][:0]
            found = [[{"tokens": range(n_tokens)}]]
        share["tokens"] += sum(len(best["tokens"]) for best, *_ in found)
        return found

    def sums() -> list[int] | None:
        return None if scorer is None else scorer.sums

    # This process does nothing else.
    task_class.get_batch_iterator, task_class.inference_step = get_batch_iterator, inference_step
    scoring.build_scorer = build_scorer
    # A writer is a copy of this process from its first call on: it has the lines and the scorer that are there then.
    with ExitStack() as stack:
        for k in range(count_writers(cfg) if by_batch else 0):
            worker = Workers(1, write=lambda batch, k=k: lines[k].write(batch), sums=sums)
            writers.append(stack.enter_context(worker))
        turns = itertools.cycle(writers)
        with suppress(_NoBatch):
            generate.main(plain)
        counted = [worker.call("sums") for worker in writers] or [sums()]
    share["sums"] = None if scorer is None else [sum(numbers) for numbers in zip(*counted, strict=True)]
    if not by_batch:
        found = sentences_of(folder / f"rank{rank}" / f"generate-{cfg.dataset.gen_subset}.txt")
        append_sentences(folder / f"rank{rank}" / LINES.format(0), [*found], [*found.values()])
    write_json(folder / f"rank{rank}.json", share, overwrite=True)


def count_writers(cfg) -> int:
    """Return how many processes write the lines of each search."""
    return spare_processes(cfg.distributed_training.distributed_world_size, 4, cfg.common.cpu)


def _look_ahead(next_epoch_itr: Callable, *args, **options) -> CountingIterator:
    batches = next_epoch_itr(*args, **options)
    return CountingIterator(look_ahead(batches, on_gpu=True), batches.n, len(batches))


def _plain(cfg) -> SimpleNamespace:
    """Return *cfg* with plain values where ``fairseq-generate`` looks at each sentence, which takes OmegaConf long."""
    groups = {name: cfg[name] for name in cfg}
    return SimpleNamespace(
        **groups | {name: Namespace(**cfg[name]) for name in ("common_eval", "dataset", "generation")}
    )


def sentences_of(file: Path) -> dict[int, bytes]:
    """Return the lines that fairseq's loop printed about each sentence."""
    sentences: dict[int, bytes] = {}
    for lines in _SENTENCE.finditer(file.read_bytes()):
        sentences[int(lines[1])] = sentences.get(int(lines[1]), b"") + lines[0]
    return sentences
