"""Translate a subset of a data-bin folder with fairseq-generate, shared among processes, and join what they print."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
import os
import re
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import sacrebleu
import torch
from fairseq import scoring, utils
from fairseq.data import Dictionary
from fairseq.data.iterators import CountingIterator
from fairseq.scoring.bleu import BleuStat, SacrebleuScorer, Scorer
from fairseq.tasks import TASK_REGISTRY
from fairseq_cli import generate
from sacrebleu.metrics import BLEU

from ap_fairseq.devices import uses_gpu
from ap_fairseq.files import read_json, write_json
from ap_fairseq.generation.lines import BatchLines, TranslatedBatch
from ap_fairseq.generation.ranks import run_ranks
from ap_fairseq.generation.workers import Workers, spare_processes
from ap_fairseq.search.hypotheses import Hypotheses
from ap_fairseq.search.running import look_ahead
from ap_fairseq.tasks import return_what_is_printed

logger = logging.getLogger(__name__)

# Lines about one sentence: S-7, H-7, ..., and E-7_3 of --retain-iter-history.
_SENTENCE = re.compile(r"^[A-Z]-(\d+)(?:_\d+)?\t.*\n(?:[A-Z]-\1(?:_\d+)?\t.*\n)*", re.MULTILINE)
_REFERENCE = re.compile(r"^T-\d+\t(.*)$", re.MULTILINE)
_HYPOTHESIS = re.compile(r"^D-\d+\t.*?\t(.*)$", re.MULTILINE)  # the first is the best
LINES = "lines{}.txt"  # of each writer of a process; fairseq's loop prints to a file of its own


class Joined(NamedTuple):
    """What all processes printed: the lines of each sentence, in order, and the lines with its score (may be none)."""

    sentences: dict[int, str]
    score: list[str]

    def text(self, quiet: bool) -> str:
        """Return the lines as ``fairseq-generate`` prints them, with ``--quiet`` the score alone."""
        return "".join([*(() if quiet else self.sentences.values()), *(f"{line}\n" for line in self.score)])


class _NoBatch(Exception):
    """This process has no batch to translate."""


class _ScoredLater(scoring.BaseScorer):
    """In the place of the scorer of a process whose lines are scored elsewhere: sacreBLEU takes half a search."""

    def __init__(self):
        super().__init__(None)

    def add_string(self, ref, pred) -> None:
        pass

    def score(self) -> float:
        return 0.0

    def result_string(self) -> str:
        return "scored with the other processes"


def translate_subset(cfg, ranks: int, folder: Path) -> Joined:
    """Translate ``cfg.dataset.gen_subset`` with *ranks* processes; each takes the batches that fairseq gives its shard.

    Args:
        cfg: fairseq's configuration of ``fairseq-generate``.
        folder: for the logs and the output of each process (``rank0.log``, ``rank0/``).

    Raises:
        UserError: if a process fails.
    """
    cfg = copy.deepcopy(cfg)
    cfg.common_eval.quiet = False  # they are joined, and scored, by what they print
    cfg.common.log_format, cfg.common.log_interval = "simple", 1
    cfg.distributed_training.distributed_world_size = ranks
    for left in folder.glob("rank*/"):  # by a run that was killed
        shutil.rmtree(left)
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    run_ranks(f"generate {cfg.dataset.gen_subset}", logs, cfg.common.cpu, translate_share, cfg, folder)
    shares = [read_json(folder / f"rank{rank}.json") for rank in range(ranks)]
    names = f"generate-{cfg.dataset.gen_subset}.txt", LINES.format("*")
    sentences = join(path for rank in range(ranks) for name in names for path in (folder / f"rank{rank}").glob(name))
    if missing := shares[0]["sentences"] - len(sentences):
        logger.warning(
            f"{missing} of {shares[0]['sentences']} sentences were left out: they are longer than "
            "--max-source-positions or --max-target-positions (--skip-invalid-size-inputs-valid-test), or in a last "
            "batch that is no multiple of --required-batch-size-multiple"
        )
    tokens, slowest = sum(share["tokens"] for share in shares), max(share["seconds"] for share in shares)
    if sentences:
        logger.info(
            f"translated {len(sentences):,} sentences ({tokens:,} tokens); processes: {ranks}, the slowest searched "
            f"for {slowest:.1f} s ({tokens / max(slowest, 0.1):,.0f} tokens/s in all)"
        )
    return Joined(sentences, score_lines(cfg, sentences, [share["statistics"] for share in shares]))


def translate_share(rank: int, cfg, folder: Path) -> None:
    """Run ``fairseq-generate`` on the shard of one process; write what it prints and how many sentences there are."""
    cfg.distributed_training.distributed_rank = rank
    cfg.common_eval.results_path = str(folder / f"rank{rank}")
    share: dict[str, Any] = {"seconds": 0.0, "tokens": 0}
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
    scorer: Scorer | None = None  # fairseq's BLEU of tokens, which this process counts, or its writers
    writers: list[Workers] = []
    lines: list[BatchLines] = []  # of each writer

    def build_scorer(*args):
        nonlocal scorer
        built = stock_build(*args)
        scorer = built if isinstance(built, Scorer) else None
        return _ScoredLater() if scorer is None or by_batch else scorer

    def inference_step(self, generator, models, sample, *args, **options):
        begin = time.perf_counter()
        return_what_is_printed(stock_step, generator, nbest, in_arrays=by_batch)
        found = stock_step(self, generator, models, sample, *args, **options)
        share["seconds"] += time.perf_counter() - begin
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

    def statistics() -> list[int] | None:
        return None if scorer is None else [getattr(scorer.stat, name) for name, _ in BleuStat._fields_]

    # This process does nothing else.
    task_class.get_batch_iterator, task_class.inference_step = get_batch_iterator, inference_step
    scoring.build_scorer = build_scorer
    # A writer is a copy of this process from its first call on: it has the lines and the scorer that are there then.
    with ExitStack() as stack:
        for k in range(count_writers(cfg) if by_batch else 1):
            worker = Workers(1, write=lambda batch, k=k: lines[k].write(batch), statistics=statistics)
            writers.append(stack.enter_context(worker))
        turns = itertools.cycle(writers)
        with suppress(_NoBatch):
            generate.main(plain)
        counts = [worker.call("statistics") for worker in writers]
    share["statistics"] = None if scorer is None else [sum(count) for count in zip(*counts, strict=True)]
    write_json(folder / f"rank{rank}.json", share, overwrite=True)


def count_writers(cfg) -> int:
    """Return how many processes write the lines of each search."""
    return spare_processes(cfg.distributed_training.distributed_world_size, 2, cfg.common.cpu)


def _look_ahead(next_epoch_itr: Callable, *args, **options) -> CountingIterator:
    batches = next_epoch_itr(*args, **options)
    return CountingIterator(look_ahead(batches, on_gpu=True), batches.n, len(batches))


def _plain(cfg) -> SimpleNamespace:
    """Return *cfg* with plain values where ``fairseq-generate`` looks at each sentence, which takes OmegaConf long."""
    groups = {name: cfg[name] for name in cfg}
    return SimpleNamespace(
        **groups | {name: Namespace(**cfg[name]) for name in ("common_eval", "dataset", "generation")}
    )


def join(files: Iterable[Path]) -> dict[int, str]:
    """Return the lines that ``fairseq-generate`` printed about each sentence, sorted by sentence."""
    sentences: dict[int, str] = {}
    for file in files:
        with open(file, encoding="utf-8", newline="\n") as stream:
            for lines in _SENTENCE.finditer(stream.read()):
                sentences[int(lines[1])] = sentences.get(int(lines[1]), "") + lines[0]
    return dict(sorted(sentences.items()))


def score_lines(cfg, sentences: dict[int, str], statistics: list[list[int] | None]) -> list[str]:
    """Return fairseq's line with the score of all sentences and, with ``--scoring sacrebleu``, its signature.

    Without references there is none.

    Args:
        statistics: of each process, the fields of ``BleuStat``; None from one without a batch, or another scorer.
    """
    if not any(map(_REFERENCE.search, sentences.values())):
        return []
    scorer = scoring.build_scorer(cfg.scoring, Dictionary())
    if hasattr(scorer, "add_string"):
        pairs = [(_found(_REFERENCE, lines), _found(_HYPOTHESIS, lines)) for lines in sentences.values()]
        if isinstance(scorer, SacrebleuScorer):
            result = _sacrebleu(scorer, pairs)
        else:
            for pair in pairs:
                scorer.add_string(*pair)
            result = scorer.result_string()
    else:  # fairseq's BLEU of tokens
        for numbers in filter(None, statistics):
            for (name, _), number in zip(BleuStat._fields_, numbers, strict=True):
                setattr(scorer.stat, name, getattr(scorer.stat, name) + number)
        result = scorer.result_string()
    score = f"Generate {cfg.dataset.gen_subset} with beam={cfg.generation.beam}: {result}"
    return [score, *_signature(cfg.scoring)]


def _found(pattern: re.Pattern[str], lines: str) -> str:
    match = pattern.search(lines)
    assert match is not None, lines
    return match[1]


def _sacrebleu(scorer: SacrebleuScorer, pairs: list[tuple[str, str]]) -> str:
    """Return the result of fairseq's scorer for references and hypotheses, which several processes tokenise and count.

    One alone takes as long as the search.
    """
    processes = min(8, len(os.sched_getaffinity(0)), len(pairs))

    def count(first: int) -> tuple[list[int], list[int], int, int]:
        # sacreBLEU warns of lines that look tokenised, as fairseq's are: once.
        logging.getLogger("sacrebleu").setLevel(logging.ERROR if first else logging.NOTSET)
        parts = zip(*pairs[first::processes], strict=True)
        references, hypotheses = ([*map(scorer.tokenizer.tokenize, texts)] for texts in parts)
        score = sacrebleu.corpus_bleu(hypotheses, [references], tokenize="none")
        return score.counts, score.totals, score.sys_len, score.ref_len

    with Workers(processes, count=count) as workers:
        counts, totals, lengths, reference_lengths = zip(
            *(counted for _, counted in workers.prefetch("count", range(processes))), strict=True
        )
    sums = ([sum(of_order) for of_order in zip(*parts, strict=True)] for parts in (counts, totals))
    return BLEU.compute_bleu(*sums, sum(lengths), sum(reference_lengths), smooth_method="exp").format()


def _signature(scoring_cfg) -> list[str]:
    """Return sacreBLEU's signature of the score, if it has one: fairseq's tokenisation by characters is its own."""
    if getattr(scoring_cfg, "_name", scoring_cfg) != "sacrebleu" or scoring_cfg.sacrebleu_char_level:
        return []
    metric = BLEU(tokenize=scoring_cfg.sacrebleu_tokenizer, lowercase=scoring_cfg.sacrebleu_lowercase)
    metric.corpus_score([""], [[""]])  # from which it knows the number of references
    return [f"sacreBLEU signature: {metric.get_signature()}"]
