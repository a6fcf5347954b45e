#!/usr/bin/env python3
"""Run a list of pruned systems: masks, training, translation, scores; one JSON line each and a table.

    sweep.py SWEEP.yaml --data DIR --out DIR [--jobs N] [--dense SEED=CHECKPOINT ...] [--only REGEX] [--until STEP]
    sweep.py --table results.jsonl ... [--only REGEX]

SWEEP.yaml holds everything that a result depends on: flags of training and recording, the search, and `systems`. A list
in a system stands for one system per value (several lists: one per combination):

    criterion    dense (nothing pruned), any of ap-masks' --criterion, top-k, or threshold
    kinds        global (one budget for all kinds, spent by the scores of the criterion), per-kind (each kind at the
                 sparsity), kinds joined by +, or own (options name the budgets: --encoder-self 0.95 ...)
    sparsity     effective sparsity; nominal for percentile; of top-k the largest that does not exceed it
    granularity  as ap-masks takes it; default 1
    options      further flags of ap-masks; default none
    threshold, log_bits   of the criterion threshold
    schedule     untuned; one-shot and gradual (fine-tuned from the dense model); scratch (trained under the mask, or
                 without one: --attention-masks none); while-training (pruned by the flags `prune` of the sweep)
    rounds       of gradual; default 3
    start        of gradual: the sparsity of a system that is otherwise the same and trained from scratch; the first
                 round records and continues that one, instead of the dense model
    seed         of the dense model (the first one if there is none of this seed), of training and of random masks
    updates      of training; default: the sweep's tune_updates, or dense_updates from scratch
    flags        further flags of fairseq-train, which win: --dropout 0.3; fine-tuned systems are compared with a dense
                 one of the same flags

`total_updates` of a result are all updates behind a system, those of the dense model that its masks were made from
included. `against_dense_equal` compares it with the dense system of as many total updates, and of these with the one of
the lowest validation loss.
`search` with several `lenpens` tunes the length penalty of each system on the validation data.

`level` is the data-bin folder and `subset` its part to translate, by default sentences and test. At other levels a line
is a page or a part of one; scores and tests are then of whole pages (d-BLEU), and s-BLEU is that of the segments.
With `parts`, a character, the test set is also scored part by part: a part's pages have the same name up to there.

Everything runs in folders of --out and is skipped when it is there; other settings under a finished name are an error,
except that a folder with all translations is only scored.
Fine-tuning runs side by side, --jobs at a time; translations are spread over --jobs processes that load the model once,
and measure the loss on the validation data too. A search with beam: 0 measures that alone.
--until translate stops before the scores, which need no GPU: copy --out elsewhere and run the same command there.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import logging
import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from fairseq.data.data_utils import load_indexed_dataset
from segments import SEPARATOR
from sweep_table import format_table
from systems import System, expand

from ap_fairseq.artifacts import AttentionStats
from ap_fairseq.cli.common import exit_on_sigterm
from ap_fairseq.cli.prune_schedule import prune_gradually
from ap_fairseq.evaluation.scores import compare_systems, score, score_documents, score_parts
from ap_fairseq.experiments.stages import PLUGIN, Stages, run_together
from ap_fairseq.experiments.translation import Search, Translation, translate
from ap_fairseq.files import ArtifactError, UserError, file_sha256, read_json, read_lines, write_json, write_text
from ap_fairseq.model.dynamic import top_k_for

STEPS = ("dense", "masks", "train", "translate", "score")
KEYS = set("pair training dense dense_updates dense_seeds tune tune_updates record search systems".split())
OPTIONAL = {"level", "subset", "prune", "parts"}


class Sweep:
    """The sweep of one description, data folder and output folder."""

    def __init__(
        self, description: dict[str, Any], data: Path, out: Path, jobs: int, dense: dict[int, str], only: str = ""
    ):
        unknown, missing = sorted(description.keys() - KEYS - OPTIONAL), sorted(KEYS - description.keys())
        if unknown or missing:
            raise ArtifactError(
                f"the sweep has unknown keys {unknown} and lacks {missing}; keys are {', '.join(sorted(KEYS))} and "
                f"{', '.join(sorted(OPTIONAL))}"
            )
        self.description, self.data, self.out, self.jobs, self.given_dense = description, data, out, jobs, dense
        self.level, self.subset = description.get("level", "sentences"), description.get("subset", "test")
        self.parts_end: str = description.get("parts", "")
        self.source, self.target = description["pair"]
        self.bin = str(data / "data-bin" / self.level)
        systems = expand(description["systems"])
        loss_aware = any(system.criterion == "importance" for system in systems)
        if loss_aware and "--importance" not in shlex.split(description["record"]):
            raise ArtifactError("systems of criterion importance need --importance among the flags of `record`")
        self.listed = systems
        self.systems = [s for s in systems if s.criterion == "dense" or re.search(only, s.name)]
        self.search = Search(**description["search"])
        self.stages = Stages(out)
        running = {system.name for system in self.systems}
        starts = [system.started_from for system in self.systems if system.start and not self.translated(system)]
        missing_starts = [s.name for s in starts if s.name not in running and not Path(self.trained(s)).exists()]
        if missing_starts:
            raise ArtifactError(f"systems with a start need these in the list, too: {', '.join(missing_starts)}")
        if not Path(self.bin).is_dir():
            raise ArtifactError(f"{self.bin} does not exist; make the data with prepare.sh")

    def _require_best(self, system: System) -> None:
        """Raise ArtifactError if a training of *system* would not leave the best checkpoint that is needed of it."""
        flags, path = self.training("dense", system.seed, 0), self.trained(system)
        if system.schedule in ("scratch", "while-training"):
            flags += shlex.split(system.flags)
        elif system.has_dense_model and self.dense_seed(system) not in self.given_dense:
            path = self.checkpoint(self.dense_seed(system))
        else:
            return
        if not Path(path).exists() and (lost := {"--disable-validation", "--no-save"} & set(flags)):
            raise ArtifactError(
                f"{lost.pop()} among the flags of `training`, `dense` or {system.name}: {path} would not be written, "
                "which is the best checkpoint by its loss on the validation data; leave the flag out"
            )

    def dense_seed(self, system: System) -> int:
        seeds = self.description["dense_seeds"]
        return system.seed if system.seed in seeds else seeds[0]

    def checkpoint(self, seed: int) -> str:
        return self.given_dense.get(seed, str(self.out / f"dense.s{seed}" / "checkpoint_best.pt"))

    def stats(self, seed: int) -> str:
        return str(self.out / f"stats.s{seed}.safetensors")

    def masks(self, system: System) -> str | None:
        """The masks that the system translates with; None: those of its checkpoint."""
        if not system.has_dense_model:
            return None
        if system.schedule == "gradual":
            return str(self.out / "systems" / system.name / f"round-{system.rounds}" / "masks.safetensors")
        return str(self.out / "masks" / f"{system.masks_name}.d{self.dense_seed(system)}.safetensors")

    def trained(self, system: System) -> str:
        """The checkpoint that the system translates with: the best of a full training, the last of a fine-tuning."""
        folder = self.out / "systems" / system.name
        return {
            "untuned": self.checkpoint(self.dense_seed(system)),
            "one-shot": str(folder / "checkpoint_last.pt"),
            "gradual": str(folder / f"round-{system.rounds}" / "checkpoint_last.pt"),
            "scratch": str(folder / "checkpoint_best.pt"),
            "while-training": str(folder / "checkpoint_best.pt"),
        }[system.schedule]

    def translation(self, system: System) -> Path:
        return self.out / "translations" / f"{system.name}.txt"

    def translated(self, system: System) -> bool:
        return self.translation(system).with_suffix(".json").exists()

    # -- steps --------------------------------------------------------------------------------------------------------

    def run(self, until: str) -> None:
        """Do all steps up to *until*."""
        for system in self.systems:
            if not self.translated(system):
                self._require_best(system)
        for folder in ("masks", "systems", "translations", "scores"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        derived = [system for system in self.systems if system.has_dense_model]
        seeds = {self.dense_seed(system) for system in derived}
        # A folder that was copied from elsewhere needs neither its checkpoints nor a GPU.
        if not all(map(self.translated, self.systems)):
            run_together(self.jobs, [(self.train_dense, [seed]) for seed in sorted(seeds)])
            if until == "dense":
                return
            unique = {self.masks(s): s for s in derived if s.schedule != "gradual"}
            run_together(self.jobs, [(self.build_masks, [system]) for system in unique.values()])
            if until == "masks":
                return
            tuned = [system for system in self.systems if system.schedule != "untuned"]
            untuned = [system for system in self.systems if system.schedule == "untuned"]
            # Translations that need no training fill the time in which trainings wait for each other.
            tasks = [(self.tune, [system]) for system in tuned if not system.start]
            run_together(self.jobs, tasks + self.translations(untuned))
            run_together(self.jobs, [(self.tune, [system]) for system in tuned if system.start])
            if until == "train":
                return
            run_together(self.jobs, self.translations(tuned))
        if until == "score":
            run_together(self.jobs, [(self.evaluate, [system]) for system in self.systems])
            self.report()

    def train_dense(self, seed: int) -> None:
        if seed not in self.given_dense:
            updates = self.description["dense_updates"]
            settings = [*self.training("dense", seed, updates), "--max-update", updates]
            save = ["--save-dir", str(self.out / f"dense.s{seed}")]
            self.stages.run(f"dense.s{seed}.train", "fairseq-train", self.bin, *PLUGIN, *settings, *save)
        flags = ["--path", self.checkpoint(seed), "--subset", "train", "-o", self.stats(seed), "--overwrite"]
        recording = [*flags, *shlex.split(self.description["record"])]
        self.stages.run(f"dense.s{seed}.record", "ap-record", self.bin, *recording)

    def training(self, recipe: str, seed: int, updates: int) -> list[str]:
        """Flags of fairseq-train: the common ones and those of *recipe*, dense or tune; a decay takes all *updates*."""
        flags = shlex.split(self.description["training"]) + shlex.split(self.description[recipe])
        flags += ["--total-num-update", str(updates)] if "polynomial_decay" in flags else []
        return ["--source-lang", self.source, "--target-lang", self.target, *flags, "--seed", str(seed)]

    def build_masks(self, system: System) -> None:
        output = self.masks(system)
        stats, flags = self.stats(self.dense_seed(system)), system.mask_flags()
        self.stages.run(f"masks.{Path(output).stem}", "ap-masks", stats, *flags, "-o", output, "--overwrite")

    def updates(self, system: System) -> int:
        """Updates after the dense model's, or all of them from scratch."""
        if system.schedule == "untuned":
            return 0
        full = system.schedule in ("scratch", "while-training")
        return system.updates or self.description["dense_updates" if full else "tune_updates"]

    def total_updates(self, system: System) -> int:
        """All updates behind a system: its own, the dense model's, and those of the system it starts from."""
        before = self.total_updates(system.started_from) if system.start else 0
        if system.has_dense_model and not before:
            before = self.description["dense_updates"]
        return before + self.updates(system)

    def tune(self, system: System) -> None:
        recipe = "dense" if system.schedule in ("scratch", "while-training") else "tune"
        updates = self.updates(system)
        flags = self.training(recipe, system.seed, updates // (system.rounds if system.schedule == "gradual" else 1))
        flags = [f"pruned_{word}" if word.startswith("transformer") else word for word in flags]
        if system.schedule == "while-training":
            flags += ["--task", "pruned_translation", "--prune-flags", shlex.join(system.mask_flags())]
            flags += shlex.split(self.description.get("prune", ""))
        flags += shlex.split(system.flags)
        folder = self.out / "systems" / system.name
        start = self.trained(system.started_from) if system.start else self.checkpoint(self.dense_seed(system))
        if system.schedule == "gradual":
            recording = shlex.split(self.description["record"])
            # Its rounds are stages of their own folder.
            prune_gradually(self.bin, start, str(folder), system.mask_flags(), flags, recording, system.rounds, updates)
            return
        own = ["--attention-masks", self.masks(system) or "none", "--save-dir", str(folder), "--max-update", updates]
        if system.schedule == "one-shot":
            own += ["--finetune-from-model", start]
        self.stages.run(f"{system.name}.train", "fairseq-train", self.bin, *PLUGIN, *flags, *own)

    def translations(self, systems: Sequence[System]) -> list[tuple]:
        """Tasks that translate: as many as there are jobs, each loading the model once."""
        jobs = [Translation(str(self.translation(s)), self.trained(s), self.masks(s), self.dynamic(s)) for s in systems]
        parts = [jobs[k :: self.jobs] for k in range(min(self.jobs, len(jobs)))]
        names = f"translate.{'tuned' if any(s.schedule != 'untuned' for s in systems) else 'untuned'}"
        return [
            (self.stages.run_always, [f"{names}.{k}", translate, part, self.bin, self.search, self.subset])
            for k, part in enumerate(parts)
        ]

    def dynamic(self, system: System) -> dict[str, Any]:
        if system.criterion == "threshold":
            return {"threshold": str(system.threshold), "log_bits": system.log_bits}
        if system.criterion != "top-k":
            return {}
        support = AttentionStats.load(self.stats(self.dense_seed(system))).support
        ks = {kind: top_k_for(support[kind], system.sparsity)[0] for kind in system.budget_kinds()}
        return {"top_k": ",".join(f"{kind.value}={k}" for kind, k in ks.items())}

    # -- scores -------------------------------------------------------------------------------------------------------

    @property
    def reference(self) -> Path:
        return self.data / self.level / f"{self.subset}.{self.target}"

    @functools.cached_property
    def training_pairs(self) -> int:
        file = Path(self.bin) / f"train.{self.source}-{self.target}.{self.target}"
        return len(load_indexed_dataset(str(file), None))

    def read_texts(self, path: Path) -> list[str]:
        """Return the texts to score: sentences, or at other levels whole pages without separators."""
        lines = read_lines(path)
        if self.level == "sentences":
            return lines
        pages = zip(self.pages, lines, strict=True)
        joined = (" ".join(line for _, line in page) for _, page in itertools.groupby(pages, key=lambda pair: pair[0]))
        return [page.replace(f" {SEPARATOR} ", " ") for page in joined]

    @functools.cached_property
    def pages(self) -> list[str]:
        """The page of each line."""
        return [line.split("\t")[0] for line in read_lines(self.reference.with_suffix(".pages"))]

    def evaluate(self, system: System) -> None:
        """Write ``scores/NAME.json``, unless it is there: the system, what made its translations, and their scores."""
        output, baselines = self.out / "scores" / f"{system.name}.json", self.baselines(system)
        suffix = ".txt" if self.search.beam else ".json"
        inputs = {s.name: file_sha256(self.translation(s).with_suffix(suffix)) for s in (system, *baselines.values())}
        inputs["reference"] = file_sha256(self.reference)
        if self.parts_end:
            inputs["pages"] = file_sha256(self.reference.with_suffix(".pages"))
        if output.exists() and read_json(output)["inputs"] == inputs:
            return
        made = read_json(self.translation(system).with_suffix(".json"))
        provenance = made.pop("masks")
        result = {
            "system": system.name,
            "group": system.group,
            **dataclasses.asdict(system),
            "dense_seed": self.dense_seed(system),
            "level": self.level,
            "subset": self.subset,
            "training_pairs": self.training_pairs,
            "updates": self.updates(system),
            "total_updates": self.total_updates(system),
            "masks_sha256": provenance["masks_sha256"],
            "sparsity": provenance["sparsity"],
            "total": provenance["total"],
            "vanished_heads": provenance.get("vanished_heads", {}),
            **made,
            "valid_ppl": 2 ** made["valid_nll"],
            **self.scores(system),
            "inputs": inputs,
        }
        if "dynamic" in made:
            measured = made["dynamic"]["sparsity"]
            result["sparsity"] = {name: share for name, share in measured.items() if name != "total"}
            result["total"] = measured["total"]
        for name, baseline in baselines.items():
            result[name] = self.compared(baseline, system)
        write_json(output, result, overwrite=True)

    def scores(self, system: System) -> dict[str, Any]:
        """Scores of the translations, if the sweep translates."""
        if not self.search.beam:
            return {}
        texts = [self.read_texts(path) for path in (self.translation(system), self.reference)]
        result = score(*texts)
        if self.level != "sentences":
            lines = [read_lines(path) for path in (self.translation(system), self.reference)]
            documents = score_documents(*lines, documents=self.pages, separator=SEPARATOR)
            result |= {key: documents[key] for key in ("s_bleu", "segments", "lines_with_equal_segments")}
        if self.parts_end:
            pages = self.pages if self.level == "sentences" else [page for page, _ in itertools.groupby(self.pages)]
            others = [page for page in pages if self.parts_end not in page]
            if others:
                raise ArtifactError(
                    f"`parts` is {self.parts_end!r}, which is not in the page {others[0]!r} of the test set; leave "
                    "`parts` out, or give the character that ends the name of a part"
                )
            result["parts"] = score_parts(*texts, [page.partition(self.parts_end)[0] for page in pages])
        return result

    def baselines(self, system: System) -> dict[str, System]:
        """The dense system of the same seed, and the one that was fine-tuned with the same seed and updates."""
        if not self.search.beam:
            return {}

        # Systems without fine-tuning, or trained from scratch, are compared with the usual fine-tuning.
        tuned = system.schedule in ("one-shot", "gradual")
        updates = self.updates(system) if tuned else self.description["tune_updates"]

        def alike(dense: System) -> bool:
            same = dense.seed == system.seed and dense.flags == system.flags
            return same and self.updates(dense) == updates

        dense = [s for s in self.systems if s.criterion == "dense" and self.dense_seed(s) == self.dense_seed(system)]
        equal = [s for s in dense if s.seed == system.seed and self.total_updates(s) == self.total_updates(system)]
        found = {
            "against_dense_equal": min(equal, key=self.valid_nll, default=None),
            "against_dense": next((s for s in dense if s.schedule == "untuned"), None),
            "against_dense_tuned": next((s for s in dense if s.schedule == "one-shot" and alike(s)), None),
        }
        return {name: s for name, s in found.items() if s is not None and s != system}

    def valid_nll(self, system: System) -> float:
        made = self.translation(system).with_suffix(".json")
        return read_json(made)["valid_nll"] if made.exists() else math.inf

    def compared(self, baseline: System, system: System) -> dict[str, Any]:
        """sacreBLEU's paired bootstrap of BLEU and chrF."""
        texts = {s.name: self.read_texts(self.translation(s)) for s in (baseline, system)}
        test = compare_systems(texts, self.read_texts(self.reference))
        ours, theirs = (test["systems"][s.name] for s in (system, baseline))
        result: dict[str, Any] = {"baseline": baseline.name, "test": test["test"], "samples": test["samples"]}
        for metric in ours:
            result[metric] = {"difference": ours[metric]["score"] - theirs[metric]["score"], "p": ours[metric]["p"]}
        return result

    def report(self) -> None:
        """Write and print the scores of all listed systems, not only of those that ran now."""
        files = [self.out / "scores" / f"{system.name}.json" for system in self.listed]
        results = [read_json(file) for file in files if file.exists()]
        lines = "".join(json.dumps(result, sort_keys=True) + "\n" for result in results)
        write_text(self.out / "results.jsonl", lines, overwrite=True)
        print(format_table(results))
        print(f"results: {self.out / 'results.jsonl'}")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("sweep", nargs="?", type=Path, help="YAML file")
    parser.add_argument("--data", type=Path, help="folder of prepare.sh")
    parser.add_argument("--out", type=Path, help="folder of the run")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time; they share the GPU")
    parser.add_argument(
        "--dense", nargs="+", default=[], metavar="SEED=CHECKPOINT", help="dense models that need no training"
    )
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="only systems whose name it matches; in a sweep, the dense ones too"
    )
    parser.add_argument("--until", choices=STEPS, default="score", help="last step to do (default: %(default)s)")
    parser.add_argument(
        "--table", nargs="+", type=Path, metavar="JSONL", help="print the table of results files, nothing else"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(arguments)
    exit_on_sigterm()
    logging.getLogger("sacrebleu").setLevel(logging.WARNING)
    try:
        if args.table:
            results = [json.loads(line) for file in args.table for line in read_lines(file)]
            chosen = [result for result in results if re.search(args.only, result["system"])]
            if not chosen:
                files = " ".join(map(str, args.table))
                parser.error(f"none of the {len(results)} systems of {files} has a name with --only {args.only}")
            print(format_table(chosen))
            return
        if not (args.sweep and args.data and args.out):
            parser.error("name the sweep, its --data and its --out")
        dense = {}
        for text in args.dense:
            seed, _, path = text.partition("=")
            if not (seed.isdigit() and Path(path).is_file()):
                parser.error(f"--dense {text} is not SEED=CHECKPOINT, or the checkpoint does not exist")
            dense[int(seed)] = path
        description = yaml.safe_load(args.sweep.read_text(encoding="utf-8"))
        Sweep(description, args.data.resolve(), args.out.resolve(), args.jobs, dense, args.only).run(args.until)
    except (UserError, yaml.YAMLError, OSError) as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
