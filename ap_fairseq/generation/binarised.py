"""Translate a subset of a data-bin folder with fairseq-generate, shared among processes, and join what they print."""

from __future__ import annotations

import copy
import json
import logging
import re
import time
from argparse import Namespace
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from fairseq import scoring, utils
from fairseq.data import Dictionary
from fairseq.scoring.bleu import BleuStat
from fairseq.tasks import TASK_REGISTRY
from fairseq_cli import generate
from sacrebleu.metrics import BLEU

from ap_fairseq.files import write_json
from ap_fairseq.generation.beside import Beside
from ap_fairseq.generation.lines import Batch, BatchLines, statistics
from ap_fairseq.generation.ranks import run_ranks
from ap_fairseq.search.generator import PrunedSequenceGenerator

logger = logging.getLogger(__name__)

_LINE = re.compile(r"[A-Z]-(\d+)(?:_\d+)?\t")  # S-7, H-7, ..., and E-7_3 of --retain-iter-history
LINES = "lines.txt"  # of what a process prints, beside what fairseq's loop does


class Joined(NamedTuple):
    """What all processes printed: the lines of each sentence, in order, and the lines with its score (may be none)."""

    sentences: dict[int, list[str]]
    score: list[str]

    def lines(self, quiet: bool) -> Iterable[str]:
        """Return the lines as ``fairseq-generate`` prints them, with ``--quiet`` the score alone."""
        return [*(() if quiet else (line for lines in self.sentences.values() for line in lines)), *self.score]


class _NoBatch(Exception):
    """This process has no batch to translate."""


class _ScoredLater(scoring.BaseScorer):
    """Of a process whose strings are scored with those of the others: sacreBLEU takes half as long as the search."""

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
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    run_ranks(f"generate {cfg.dataset.gen_subset}", logs, cfg.common.cpu, translate_share, cfg, folder)
    shares = [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    names = f"generate-{cfg.dataset.gen_subset}.txt", LINES
    outputs = [folder / f"rank{rank}" / name for rank in range(ranks) for name in names]
    sentences = join(output for output in outputs if output.exists())
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
        return iterator

    build_scorer, stock_step = scoring.build_scorer, task_class.inference_step
    scorer: Any = None
    writer: Beside | None = None

    def scorer_of_share(*args):
        nonlocal scorer
        scorer = build_scorer(*args)
        return _ScoredLater() if hasattr(scorer, "add_string") or BatchLines.covers(plain, scorer) else scorer

    def inference_step(self, generator, models, sample, *args, **options):
        nonlocal writer
        nbest, begin = plain.generation.nbest, time.perf_counter()
        if isinstance(generator, PrunedSequenceGenerator):
            generator.nbest = nbest
        found = stock_step(self, generator, models, sample, *args, **options)
        share["seconds"] += time.perf_counter() - begin
        share["tokens"] += sum(len(best["tokens"]) for best, *_ in found)
        if BatchLines.covers(plain, scorer):
            if writer is None:
                counted = scorer if hasattr(scorer, "stat") else None
                lines = BatchLines(plain, self, generator, counted, folder / f"rank{rank}" / LINES)
                writer = stack.enter_context(Beside(1, write=lines.write, statistics=lines.statistics))
            writer.behind("write", Batch.collect(sample, found, nbest))
            sample["nsentences"], sample["id"] = len(found), sample["id"][:0]  # nothing is left for fairseq's loop
        return found

    # This process does nothing else.
    task_class.get_batch_iterator, task_class.inference_step = get_batch_iterator, inference_step
    scoring.build_scorer, plain = scorer_of_share, _plain(cfg)
    with ExitStack() as stack:
        try:
            generate.main(plain)
        except _NoBatch:
            pass
        share["statistics"] = statistics(scorer) if writer is None else writer.call("statistics")
    write_json(folder / f"rank{rank}.json", share, overwrite=True)


def _plain(cfg) -> SimpleNamespace:
    """Return *cfg* with plain values where ``fairseq-generate`` looks at each sentence, which takes OmegaConf long."""
    groups = {name: cfg[name] for name in cfg}
    return SimpleNamespace(
        **groups | {name: Namespace(**cfg[name]) for name in ("common_eval", "dataset", "generation")}
    )


def join(files: Iterable[Path]) -> dict[int, list[str]]:
    """Return the lines that ``fairseq-generate`` printed about each sentence, sorted by sentence."""
    sentences: dict[int, list[str]] = {}
    for file in files:
        with open(file, encoding="utf-8", newline="\n") as lines:
            for line in lines:
                if match := _LINE.match(line):
                    sentences.setdefault(int(match[1]), []).append(line.rstrip("\n"))
    return dict(sorted(sentences.items()))


def score_lines(cfg, sentences: dict[int, list[str]], statistics: list[list[int] | None]) -> list[str]:
    """Return fairseq's line with the score of all sentences and, with ``--scoring sacrebleu``, its signature.

    Without references there is none.

    Args:
        statistics: of each process, the fields of ``BleuStat``; None from one without a batch, or another scorer.
    """
    if not any(line.startswith("T-") for lines in sentences.values() for line in lines):
        return []
    scorer = scoring.build_scorer(cfg.scoring, Dictionary())
    if hasattr(scorer, "add_string"):
        for lines in sentences.values():  # the best hypothesis comes first
            reference = next(line for line in lines if line.startswith("T-"))
            hypothesis = next(line for line in lines if line.startswith("D-"))
            scorer.add_string(reference.split("\t", 1)[1], hypothesis.split("\t", 2)[2])
    else:  # fairseq's BLEU of tokens
        for numbers in filter(None, statistics):
            for (name, _), number in zip(BleuStat._fields_, numbers, strict=True):
                setattr(scorer.stat, name, getattr(scorer.stat, name) + number)
    score = f"Generate {cfg.dataset.gen_subset} with beam={cfg.generation.beam}: {scorer.result_string()}"
    return [score, *_signature(cfg.scoring)]


def _signature(scoring_cfg) -> list[str]:
    """Return sacreBLEU's signature of the score, if it has one: fairseq's tokenisation by characters is its own."""
    if getattr(scoring_cfg, "_name", scoring_cfg) != "sacrebleu" or scoring_cfg.sacrebleu_char_level:
        return []
    metric = BLEU(tokenize=scoring_cfg.sacrebleu_tokenizer, lowercase=scoring_cfg.sacrebleu_lowercase)
    metric.corpus_score([""], [[""]])  # from which it knows the number of references
    return [f"sacreBLEU signature: {metric.get_signature()}"]
