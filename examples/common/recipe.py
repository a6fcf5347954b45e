"""Runs the recipe of a data set: data -> dense model -> statistics -> masks -> pruned models -> scores -> report.

Each data set is a folder with a recipe.toml and a run.sh, which calls this program. What is done is skipped, so the
same command resumes. Stages, in order; each needs those before it, and without a name all of them run:

  prepare        text, SentencePiece model, data-bin
  train_dense    the dense model
  record         attention statistics of the dense model on its training data
  prune          masks, and the dense model under them without training
  train_pruned   fine-tuning under the masks; the dense model is fine-tuned as long, to be compared with
  evaluate       translation and scores: results.json, results.md, results.tex
  report         an HTML page with tables and plots
"""

import argparse
import importlib.util
import math
import os
import shlex
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from environment import required_modules, run_example
from segments import SEPARATOR

with required_modules():
    import torch

    import ap_fairseq.plugin  # noqa: F401  (loaded once for all stages)
    from ap_fairseq.devices import count_gpus
    from ap_fairseq.evaluation.results import format_latex, format_markdown, read_results
    from ap_fairseq.experiments.stages import PLUGIN, Stages, call, run_together
    from ap_fairseq.files import UserError

COMMON = Path(__file__).resolve().parent
STAGES = ("prepare", "train_dense", "record", "prune", "train_pruned", "evaluate", "report")

SYSTEMS = {  # flags of ap-masks; SHARE is --share
    "importance": "--total SHARE --criterion importance --smooth 32",
    "per-kind": "--encoder-self SHARE --decoder-self SHARE --cross SHARE",
    "encoder_self": "--encoder-self SHARE",
    "decoder_self": "--decoder-self SHARE",
    "cross": "--cross SHARE",
    "random": "--encoder-self SHARE --decoder-self SHARE --cross SHARE --criterion random",
    "window": "--encoder-self SHARE --decoder-self SHARE --cross SHARE --criterion window",
    "percentile": "--encoder-self SHARE --decoder-self SHARE --cross SHARE --criterion percentile",
    "all-ones": "--total 0",
}


@dataclass(frozen=True)
class Size:
    """A size of a recipe: model and training. The strings hold flags of fairseq's commands.

    Attributes:
        model: architecture and sizes, for fairseq-train.
        training: further flags of every training.
        dense, tune, warm: learning rates and the like of the dense model, of fine-tuning, and of the training on
            sentences with which a dense model of documents starts; each trains for the updates of that name.
        batch_tokens, batches: tokens of a batch on either side, and batches of an update, which the GPUs share.
        average: how many of the last checkpoints are averaged; 0: the best one is taken.
        record, search: further flags of ap-record and fairseq-generate.
        prepare: flags of the preparation, whose data go to a folder that ends in `data`.
        cpu: trains without a GPU.
    """

    model: str
    dense: str
    dense_updates: int
    tune: str
    tune_updates: int
    batch_tokens: int
    batches: int = 1
    training: str = ""
    warm: str = ""
    warm_updates: int = 0
    average: int = 0
    record: str = ""
    search: str = "--beam 5"
    prepare: str = ""
    data: str = ""
    precision: str = "--fp16"
    cpu: bool = False


# Short intervals, as fairseq saves no checkpoint_EPOCH_UPDATE.pt where an epoch ends.
TINY = Size(
    model="--arch transformer --encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 "
    "--encoder-attention-heads 2 --decoder-attention-heads 2 --share-all-embeddings",
    dense="--lr 3e-3 --warmup-updates 10 --save-interval-updates 4",
    dense_updates=14,
    tune="--lr 1e-3 --warmup-updates 4 --save-interval-updates 2",
    tune_updates=8,
    warm="--lr 3e-3 --warmup-updates 10 --save-interval-updates 2",
    warm_updates=8,
    batch_tokens=1500,
    average=2,
    search="--beam 2 --max-len-b 20",
    precision="",
)


class Experiment:
    """The stages of a recipe: what recipe.toml and the command line say.

    Attributes:
        folder: of the data set.
        size: model and training.
        source, target: languages as they stand in file names.
        level: the data-bin folder that models are trained on, sentences or documents.
        data, run: folders.
        gpus, ranks: of training; without a GPU it has one rank.
        jobs: how many systems are trained, or translated, at the same time.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, prepare_options: list[str]):
        toml = tomllib.loads((folder / "recipe.toml").read_text("utf-8"))
        self.folder, self.args = folder, args
        self.level: str = toml.get("level", "sentences")
        self.tokenized_bleu: str = toml["tokenized_bleu"]
        name = self._size_name(toml)
        self.size = TINY if name == "tiny" else Size(**toml["sizes"][name])
        if unknown := [system for system in args.systems if system not in SYSTEMS]:
            raise UserError(f"--systems {unknown[0]} is unknown; known are {' '.join(SYSTEMS)}")
        self._use_devices(name)
        program, options = self._preparation(toml, prepare_options)
        self.prepare_data, (self.source, self.target) = program.main, program.languages(program.parse_args(options))
        self._name_folders(name)
        self.prepare_options = [*options, "--out", str(self.data)]
        self.stages = Stages(self.run)
        self.pair = ["--source-lang", self.source, "--target-lang", self.target]
        self.dense_updates = args.dense_updates or self.size.dense_updates
        self.tune_updates = args.tune_updates or self.size.tune_updates
        self.checkpoint = "average.pt" if self.size.average else "checkpoint_best.pt"

    def _size_name(self, toml: dict[str, Any]) -> str:
        """Return the size to train, as asked for or as the recipe says for this machine."""
        default = toml.get("cpu_size") if not torch.cuda.is_available() else None
        name = self.args.size or default or next(iter(toml["sizes"]))
        if name not in (*toml["sizes"], "tiny"):
            raise UserError(f"--size {name} is unknown; {self.folder.name} has {' '.join(toml['sizes'])} tiny")
        return name

    def _use_devices(self, size: str) -> None:
        """Choose GPUs, ranks and jobs, and their flags."""
        visible = count_gpus(self.size.cpu)
        self.gpus = self.args.gpus if self.args.gpus is not None else visible and math.gcd(visible, self.size.batches)
        self.ranks = max(1, self.gpus)
        if self.size.batches % self.ranks:
            raise UserError(
                f"--gpus {self.gpus} does not divide the {self.size.batches} batches of an update of --size {size}"
            )
        self.jobs = self.args.jobs or (1 if self.gpus else min(2, os.cpu_count() or 1))
        if not self.gpus:  # the models are small: more threads wait for each other, and other jobs need the cores
            torch.set_num_threads(1)
        self.device = shlex.split(self.size.precision) if self.gpus else ["--cpu"]
        self.device += ["--num-workers", "2" if self.gpus else "0"]

    def _name_folders(self, size: str) -> None:
        """Name the folders of data and run, unless the command line does."""
        names = [f"{self.source}-{self.target}", self.args.variant]
        self.data = self.args.data or self.folder / "data" / "-".join(filter(None, [*names, self.size.data]))
        run = "-".join(filter(None, [*names, size, f"seed{self.args.seed}"]))
        self.run = self.args.out or self.folder / "runs" / run
        for flag, path in (("--data", self.data), ("--out", self.run)):
            if os.pathsep in str(path):
                raise UserError(
                    f"{flag} {path}: fairseq takes {os.pathsep!r} in a path for the end of it; name another"
                )
        self.bin = self.data / "data-bin" / self.level

    def _preparation(self, toml: dict[str, Any], given: list[str]) -> tuple[ModuleType, list[str]]:
        """Return the program that makes the data, and its command line, of which *given* is the end."""
        folder, args, options = self.folder, self.args, [*shlex.split(self.size.prepare), *given]
        if "prepare" in toml:  # its own, for any pair
            return load_module(folder / toml["prepare"]), [*(args.pair or (toml["source"], toml["target"])), *options]
        if args.pair:
            raise UserError(f"--pair: {folder.name} has one pair of languages, {toml['source']} {toml['target']}")
        variant = ["--variant", args.variant] if args.variant else []
        return load_module(COMMON / "prepare_corpus.py"), [str(folder), *variant, *options]

    # -- stages -------------------------------------------------------------------------------------------------------

    def needs(self, file: Path, stage: str) -> None:
        """Check what an earlier stage makes."""
        if not file.exists():
            command = shlex.join([str(self.folder / "run.sh"), stage])
            raise UserError(f"{file} does not exist; run {command} with the same options first")

    def prepare(self) -> None:
        if not (self.data / "counts.json").exists():  # written last: the data are not there, whatever the marks say
            self.stages.forget("prepare")
        self.stages.run("prepare", self.prepare_data, self.prepare_options)

    def train(
        self, name: str, folder: str, flags: str, updates: int, *own: Any, level: str = "", masks: Path | None = None
    ) -> None:
        """fairseq-train, and the average of its last checkpoints; a second call continues an interrupted training."""
        model = shlex.split(self.size.model)
        if masks is not None:
            model = [f"pruned_{word}" if word.startswith("transformer") else word for word in model]
            own = (*own, "--attention-masks", masks)
        save = ["--save-dir", self.run / folder, "--no-epoch-checkpoints"]
        if self.size.average:
            save += ["--keep-interval-updates", self.size.average]
        words = shlex.split(f"{self.size.training} {flags}")
        if "polynomial_decay" in words:
            words += ["--total-num-update", updates]
        # fmt: off
        self.stages.run(
            name, "fairseq-train", self.data / "data-bin" / (level or self.level), *PLUGIN, *model,
            "--task", "translation", *self.pair, "--optimizer", "adam", "--adam-betas", "(0.9, 0.98)",
            "--lr-scheduler", "inverse_sqrt", "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1",
            "--seed", self.args.seed, "--skip-invalid-size-inputs-valid-test", "--required-batch-size-multiple", 1,
            "--log-format", "json", "--log-interval", 50 if self.gpus else 10,
            "--max-tokens", self.size.batch_tokens, "--update-freq", self.size.batches // self.ranks,
            "--distributed-world-size", self.ranks, *self.device, *save, *words, "--max-update", updates, *own,
        )
        # fmt: on
        if self.size.average:
            average = ["--last", self.size.average, "-o", self.run / folder / "average.pt", "--overwrite"]
            self.stages.run(f"{folder}.average", "ap-average", self.run / folder, *average)

    @property
    def dense(self) -> Path:
        return self.run / "dense" / self.checkpoint

    def train_dense(self) -> None:
        self.needs(self.data / "counts.json", "prepare")
        start = []
        if self.level == "documents":
            # A plain transformer trained on documents alone does not learn to attend: start from sentences.
            self.train("warm.train", "warm", self.size.warm, self.size.warm_updates, level="sentences")
            start = ["--finetune-from-model", self.run / "warm" / self.checkpoint]
        self.train("dense.train", "dense", self.size.dense, self.dense_updates, *start)

    def record(self) -> None:
        self.needs(self.dense, "train_dense")
        options = ["--sample", self.args.sample] if self.args.sample else []
        options += ["--importance"] if "importance" in self.args.systems else []
        # fmt: off
        self.stages.run(
            "dense.record", "ap-record", self.bin, "--path", self.dense, "--subset", "train", *options,
            "-o", self.stats, "--overwrite", "--max-tokens", self.size.batch_tokens,
            "--distributed-world-size", self.ranks, *self.device, "--log-format", "simple", "--log-interval", 10,
            *shlex.split(self.size.record),
        )
        # fmt: on

    @property
    def stats(self) -> Path:
        return self.run / "stats.safetensors"

    def masks(self, system: str) -> Path:
        return self.run / f"{system}.safetensors"

    def prune(self) -> None:
        self.needs(self.stats, "record")
        run_together(self.jobs, [(self.prune_one, [system]) for system in self.args.systems])

    def prune_one(self, system: str) -> None:
        flags = shlex.split(SYSTEMS[system].replace("SHARE", str(self.args.share)))
        self.stages.run(f"{system}.masks", "ap-masks", self.stats, *flags, "-o", self.masks(system), "--overwrite")
        apply = ["--attention-masks", self.masks(system), "--data", self.bin, "-o", self.run / f"{system}.untuned.pt"]
        self.stages.run(f"{system}.apply", "ap-apply", self.dense, *apply, "--overwrite")

    def train_pruned(self) -> None:
        for system in self.args.systems:
            self.needs(self.masks(system), "prune")
        tasks = [(self.tune, [system]) for system in ("dense", *self.args.systems)]
        if self.args.scratch:  # the longest first
            tasks = [(self.train_from_scratch, [system]) for system in self.args.systems] + tasks
        run_together(self.jobs, tasks)

    def tune(self, system: str) -> None:
        start = ["--finetune-from-model", self.dense]
        masks = None if system == "dense" else self.masks(system)
        self.train(f"{system}.tune", f"{system}.tuned", self.size.tune, self.tune_updates, *start, masks=masks)

    def train_from_scratch(self, system: str) -> None:
        masks = self.masks(system)
        self.train(f"{system}.train", f"{system}.scratch", self.size.dense, self.dense_updates, masks=masks)

    def systems(self) -> dict[str, Path]:
        """The checkpoint of each scored system; the first is what the others are compared with."""
        found = {"dense.tuned": self.run / "dense.tuned" / self.checkpoint, "dense": self.dense}
        for system in self.args.systems:
            found[f"{system}.untuned"] = self.run / f"{system}.untuned.pt"
            for way in ("tuned", "scratch") if self.args.scratch else ("tuned",):
                found[f"{system}.{way}"] = self.run / f"{system}.{way}" / self.checkpoint
        return found

    def evaluate(self) -> None:
        for checkpoint in self.systems().values():
            self.needs(checkpoint, "train_pruned")
        shards = [(name, shard) for name in self.systems() for shard in range(self.ranks)]
        run_together(self.jobs * self.ranks, [(self.translate, shard) for shard in shards])
        logs = {name: [self.translation(name, shard) for shard in range(self.ranks)] for name in self.systems()}
        scored = [
            f"{name}={':'.join(map(str, logs[name]))},{checkpoint}" for name, checkpoint in self.systems().items()
        ]
        reference, options = self.data / ("text" if (self.data / "text").is_dir() else "sentences"), ["--by-length"]
        if self.level == "documents":
            reference = self.data / "documents"
            options += ["100", "200", "300", "400", "--separator", SEPARATOR, "--documents", reference / "test.talks"]
        if self.args.tokenized_bleu:
            options += ["--tokenized-bleu", self.tokenized_bleu, "--language", self.target]
        # fmt: off
        call(
            "ap-evaluate", *scored, "--reference", reference / f"test.{self.target}", "--metrics", *self.args.metrics,
            "--significance", "bootstrap", *options, "--stages", self.run / "stages", "-o", self.results, "--overwrite",
        )
        # fmt: on
        results = read_results(self.results)
        for suffix, render in ((".md", format_markdown), (".tex", format_latex)):
            self.results.with_suffix(suffix).write_text(f"{render(results)}\n", "utf-8")
        print(f"results: {self.results}, .md, .tex")

    @property
    def results(self) -> Path:
        return self.run / "results.json"

    def translation(self, name: str, shard: int) -> Path:
        return self.stages.log(f"{name}.generate.{shard}")

    def translate(self, name: str, shard: int) -> None:
        """fairseq-generate on a GPU of its own; it shares its work by shards of the data.

        Pruned models are searched on the device, and dense ones by fairseq's own search, as the task says in the log.
        """
        if self.gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.ranks)))
            os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[shard]
        # With its default batch multiple of 8, fairseq drops up to 7 sentences silently; --num-shards it ignores.
        # fmt: off
        self.stages.run(
            f"{name}.generate.{shard}", "fairseq-generate", self.bin, *PLUGIN, "--path", self.systems()[name],
            "--task", "pruned_translation", *self.pair, "--gen-subset", "test", "--remove-bpe", "sentencepiece",
            "--required-batch-size-multiple", 1,
            "--max-tokens", self.size.batch_tokens, "--distributed-world-size", self.ranks,
            "--distributed-rank", shard, *self.device, "--log-format", "simple", "--log-interval", 5,
            *shlex.split(self.size.search),
        )
        # fmt: on

    def report(self) -> None:
        self.needs(self.results, "evaluate")
        masks = [self.masks(system) for system in self.args.systems]
        sources = ["--stats", self.stats, "--masks", *masks, "--results", self.results]
        call("ap-report", *sources, "-o", self.run / "report", "--overwrite")


def load_module(file: Path) -> ModuleType:
    """A preparation: a module with parse_args(words), languages(args) and main(words)."""
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.sh",
        usage="run.sh [STAGE] [options]",
        description=__doc__,
        epilog="Other options go to the preparation of the data; run.sh prepare --help lists them, too.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    add = parser.add_argument
    add("folder", type=Path, help=argparse.SUPPRESS)  # given by run.sh
    add("stage", nargs="?", choices=("all", *STAGES), default="all", metavar="STAGE", help=argparse.SUPPRESS)
    add("-h", "--help", action="store_true", help="show this help")
    add("--size", metavar="NAME", help="model and training length; tiny tries the recipe on a CPU; default: the first")
    add(
        "--systems",
        nargs="+",
        default=["per-kind"],
        metavar="NAME",
        help=f"masks: {' '.join(SYSTEMS)}; default: per-kind",
    )
    add(
        "--share",
        type=float,
        default=0.5,
        metavar="X",
        help="share of the pairs to prune (effective sparsity); default: 0.5",
    )
    add("--scratch", action="store_true", help="also train a new model under the masks, as long as the dense one")
    add("--sample", type=int, metavar="N", help="record N training sentences instead of all")
    add("--dense-updates", type=int, metavar="N", help="of the dense model, instead of the recipe's")
    add("--tune-updates", type=int, metavar="N", help="of fine-tuning, instead of the recipe's")
    add("--seed", type=int, default=1, metavar="N", help="of training; default: 1")
    add(
        "--gpus",
        type=int,
        metavar="N",
        help="GPUs of a training, whose batch stays the same; 0: on the CPU; default: all",
    )
    add("--jobs", type=int, metavar="N", help="systems at the same time; default: 1 with a GPU, else 2")
    add("--metrics", nargs="+", default=["bleu", "chrf"], metavar="NAME", help="bleu chrf ter; default: bleu chrf")
    add("--tokenized-bleu", action="store_true", help="also score as old tables do (needs sacremoses)")
    add("--pair", nargs=2, metavar=("SRC", "TGT"), help="languages, where the data set has several pairs")
    add("--variant", metavar="NAME", help="training data, where recipe.toml has several")
    add("--data", type=Path, metavar="DIR", help="folder of the data; default: data/ of the example")
    add("--out", type=Path, metavar="DIR", help="folder of the run; default: runs/ of the example")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = get_parser()
    args, prepare_options = parser.parse_known_args(arguments)
    if args.help:
        parser.print_help()
        prepare_options.append("--help")

    def run(args: argparse.Namespace) -> None:
        experiment = Experiment(args.folder.resolve(), args, prepare_options)
        for stage in STAGES if args.stage == "all" else (args.stage,):
            getattr(experiment, stage)()

    run_example(run, args)


if __name__ == "__main__":
    main()
