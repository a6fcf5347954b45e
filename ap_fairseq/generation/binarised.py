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

from ap_fairseq.data_bin import require_whole
from ap_fairseq.devices import uses_gpu
from ap_fairseq.files import UserError, read_json, write_json
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
    """Run ``fairseq-generate`` on the shard of one process; write what it prints and what it counted."""
    cfg.distributed_training.distributed_rank = rank
    cfg.common_eval.results_path = str(folder / f"rank{rank}")
    write_json(folder / f"rank{rank}.json", _Share(rank, cfg).translate(), overwrite=True)


class _Share:
    """``fairseq-generate`` on the shard of this process, which does nothing else; its lines are made by writers.

    A writer is a copy of this process from its first batch on, with the lines and the scorer that are there then. Where
    :meth:`BatchLines.covers` says no, fairseq's own loop makes the lines, and there is no writer.
    """

    def __init__(self, rank: int, cfg):
        self.rank, self.cfg, self.plain = rank, cfg, _plain(cfg)
        self.folder = Path(cfg.common_eval.results_path)
        self.task_class = TASK_REGISTRY[cfg.task._name]  # some tasks make their batches themselves
        self.stock_iterator, self.stock_step = self.task_class.get_batch_iterator, self.task_class.inference_step
        self.stock_load, self.stock_build_scorer = self.task_class.load_dataset, scoring.build_scorer
        self.nbest, self.by_batch = self.plain.generation.nbest, BatchLines.covers(self.plain.generation)
        self.scorer: TokenSums | SacrebleuSums | None = None  # of this process, or a copy in each of its writers
        self.lines: list[BatchLines] = []  # of each writer
        n_writers = count_writers(cfg) if self.by_batch else 0
        self.writers = [Workers(1, write=functools.partial(self.write, k), sums=self.sums) for k in range(n_writers)]
        self.turns = itertools.cycle(self.writers)
        self.counted: dict[str, Any] = {"seconds": 0.0, "tokens": 0, "references": False}

    def translate(self) -> dict[str, Any]:
        """Translate the shard.

        Returns:
            The seconds of its searches, their tokens, the sentences of the whole subset, whether these have references,
            and the ``sums`` of its scorer, None without one.
        """
        self.task_class.load_dataset = lambda task, *args, **options: self.load(task, *args, **options)
        self.task_class.get_batch_iterator = lambda task, *args, **options: self.get_batches(task, *args, **options)
        self.task_class.inference_step = lambda task, *args, **options: self.search(task, *args, **options)
        scoring.build_scorer = self.build_scorer
        with ExitStack() as stack:
            for writer in self.writers:
                stack.enter_context(writer)
            with suppress(_NoBatch):
                generate.main(self.plain)
            sums = [writer.call("sums") for writer in self.writers] or [self.sums()]
        self.counted["sums"] = None if self.scorer is None else [sum(numbers) for numbers in zip(*sums, strict=True)]
        if not self.by_batch:
            found = sentences_of(self.folder / f"generate-{self.cfg.dataset.gen_subset}.txt")
            append_sentences(self.folder / LINES.format(0), [*found], [*found.values()])
        return self.counted

    # -- in the places of fairseq's own -------------------------------------------------------------------------------

    def load(self, task, split, *args, **options):
        for data in utils.split_paths(self.cfg.task.data):
            require_whole(data, split, task)
        return self.stock_load(task, split, *args, **options)

    def get_batches(self, task, dataset, *args, **options):
        try:
            iterator = self.stock_iterator(task, dataset, *args, **options)
        except Exception as error:  # fairseq raises no more special one for a sentence that is too long
            for limit, remedy in (("max_positions", ""), ("max_tokens", "; raise --max-tokens")):
                if limit in str(error):
                    raise UserError(f"--gen-subset {self.cfg.dataset.gen_subset}: {error}{remedy}") from error
            raise
        self.counted["sentences"] = len(dataset)
        if self.rank >= len(iterator.frozen_batches):
            raise _NoBatch  # fairseq divides by the time and the length of what it has translated
        if self.rank:  # each process samples with random numbers of its own, the first with those of fairseq-generate
            utils.set_torch_seed(torch.initial_seed() + self.rank)
        if uses_gpu(self.cfg.common.cpu):  # else nothing searches while the host reads
            iterator.next_epoch_itr = functools.partial(_look_ahead, iterator.next_epoch_itr)
        return iterator

    def build_scorer(self, *args) -> scoring.BaseScorer:
        self.scorer = summing(self.stock_build_scorer(*args))
        return ScoredLater() if self.scorer is None or self.by_batch else self.scorer

    def search(self, task, generator, models, sample, *args, **options) -> list[list[dict[str, Any]]]:
        begin = time.perf_counter()
        return_what_is_printed(self.stock_step, generator, self.nbest, in_arrays=self.by_batch)
        found = self.stock_step(task, generator, models, sample, *args, **options)
        self.counted["seconds"] += time.perf_counter() - begin
        self.counted["references"] = sample["target"] is not None
        if self.by_batch:
            found = Hypotheses.of(found, self.nbest, unit=math.log(2))  # fairseq prints bits
            self.hand_over(task, generator, TranslatedBatch.collect(sample, found))
            # Nothing is left for fairseq's loop but tokens to count.
            sample["nsentences"], sample["id"] = len(found.counts), sample["id"][:0]
            found = [[{"tokens": range(found.best_lengths().sum())}]]
        self.counted["tokens"] += sum(len(best["tokens"]) for best, *_ in found)
        return found

    # -- writers ------------------------------------------------------------------------------------------------------

    def hand_over(self, task, generator, batch: TranslatedBatch) -> None:
        """Let the writer whose turn it is make the lines of a batch."""
        if not self.lines:
            paths = [self.folder / LINES.format(k) for k in range(len(self.writers))]
            self.lines = [BatchLines(self.plain, task, generator, self.scorer, path) for path in paths]
        next(self.turns).submit("write", batch)

    def write(self, k: int, batch: TranslatedBatch) -> None:
        """In writer *k*: write the lines of a batch."""
        self.lines[k].write(batch)

    def sums(self) -> list[int] | None:
        """In a writer, or here without one: return what was counted for the score."""
        return None if self.scorer is None else self.scorer.sums


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
