"""Language models, dense and under masks: data -> dense model -> statistics -> masks -> pruned models -> perplexity.

All models are trained from scratch with as many updates; "gradual" ones start dense and are pruned while they train.
What is done is skipped, so the same command resumes. `results.json` and `results.md` hold test perplexities per token.
"""

import argparse
import logging
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # beside this file

try:
    import documentation
    import torch

    import ap_fairseq.plugin  # noqa: F401  (loaded once for all stages)
    from ap_fairseq.cli.common import exit_on_sigterm
    from ap_fairseq.evaluation.tables import Table, markdown
    from ap_fairseq.experiments.stages import PLUGIN, Stages, run_together
    from ap_fairseq.files import UserError, write_json
    from ap_fairseq.model.checkpoints import load_checkpoint
    from ap_fairseq.provenance import decode_provenance, versions
except ModuleNotFoundError as missing:
    sys.exit(
        f"run.sh: error: {sys.executable} has no module {missing.name}: run scripts/setup.sh in the repository and "
        "activate its environment (source .venv/bin/activate)"
    )

HERE = Path(__file__).resolve().parent
CRITERIA = {  # flags of ap-masks; SHARE is one of --shares
    "importance": "--decoder-self SHARE --criterion importance --smooth 32",
    "mean": "--decoder-self SHARE",
    "percentile": "--decoder-self SHARE --criterion percentile",  # nominal
    "window": "--decoder-self SHARE --criterion window",
}


@dataclass(frozen=True)
class Size:
    """A size of recipe.toml. The strings hold flags of fairseq's commands.

    Attributes:
        model, training: architecture and sizes; optimiser, batches, precision.
        block: tokens of a training sample.
        updates: of every training.
        record: further flags of ap-record.
        evaluate: further flags of fairseq-eval-lm.
        prepare: flags of prepare.sh, whose data go to data/`data`.
        cpu: trains without a GPU.
    """

    model: str
    training: str
    block: int
    updates: int
    record: str = ""
    evaluate: str = ""
    prepare: str = ""
    data: str = "full"
    cpu: bool = False


@dataclass(frozen=True)
class System:
    """Masks and how a model comes to them."""

    criterion: str
    share: float
    granularity: str
    way: str  # scratch, or gradual: while training

    @property
    def masks(self) -> str:
        return f"{self.criterion}.{self.share:.0%}.g{self.granularity}".replace("%", "")

    @property
    def name(self) -> str:
        return f"{self.masks}.{self.way}"

    @property
    def flags(self) -> list[str]:
        flags = CRITERIA[self.criterion].replace("SHARE", str(self.share))
        return [*shlex.split(flags), "--granularity", self.granularity]


class Experiment:
    """The stages of one size."""

    def __init__(self, args: argparse.Namespace):
        sizes = tomllib.loads((HERE / "recipe.toml").read_text("utf-8"))
        name = args.size or ("full" if torch.cuda.is_available() else "small")
        if name not in sizes:
            raise UserError(f"--size {name} is unknown; there are {' '.join(sizes)}")
        self.args, self.name, self.size = args, name, Size(**sizes[name])
        self.run_folder: Path = args.out or HERE / "runs" / f"{name}-seed{args.seed}"
        self.stages = Stages(self.run_folder)
        data = HERE / "data" / self.size.data
        self.data_bin: Path = args.data_bin or data / "data-bin"
        self.prepare = [*shlex.split(self.size.prepare), "--out", str(data)]
        self.device = ["--cpu", "--num-workers", 0] if self.size.cpu else ["--num-workers", 2]
        self.blocks = ["--sample-break-mode", "none", "--tokens-per-sample", self.size.block]
        self.systems = [
            System(criterion, share, granularity, "scratch")
            for criterion in args.criteria
            for granularity in args.granularity
            for share in args.shares
        ]
        if args.gradual:
            self.systems += [
                System("importance", share, g, "gradual") for g in args.granularity for share in args.shares
            ]

    def train(self, name: str, *flags: Any, pruned: bool = True, task: str = "language_modeling") -> None:
        model = self.size.model.replace("--arch ", "--arch pruned_") if pruned else self.size.model
        # fmt: off
        self.stages.run(
            f"{name}.train", "fairseq-train", self.data_bin, *PLUGIN, "--task", task, *shlex.split(model), *self.blocks,
            *shlex.split(self.size.training), "--max-update", self.size.updates, "--seed", self.args.seed,
            "--save-dir", self.run_folder / name, "--no-epoch-checkpoints", "--log-format", "json",
            "--log-interval", 50, *self.device, *flags,
        )
        # fmt: on

    def checkpoint(self, name: str) -> Path:
        return self.run_folder / name / "checkpoint_best.pt"

    def masks(self, system: System) -> Path:
        return self.run_folder / f"{system.masks}.safetensors"

    def train_system(self, system: System) -> None:
        if system.way == "scratch":
            self.train(system.name, "--attention-masks", self.masks(system))
            return
        updates = self.size.updates
        # fmt: off
        self.train(
            system.name, "--attention-masks", "none", "--prune-flags", shlex.join(system.flags),
            "--prune-start", updates // 10, "--prune-end", updates * 6 // 10, "--prune-every", max(1, updates // 10),
            task="pruned_language_modeling",
        )
        # fmt: on

    def evaluate(self, name: str) -> None:
        # fmt: off
        self.stages.run(
            f"{name}.evaluate", "fairseq-eval-lm", self.data_bin, *PLUGIN, "--path", self.checkpoint(name),
            "--gen-subset", "test", *self.blocks, *self.device, *shlex.split(self.size.evaluate),
        )
        # fmt: on

    def result(self, name: str) -> dict[str, Any]:
        log = self.stages.log(f"{name}.evaluate").read_text("utf-8")
        loss, perplexity = map(float, re.findall(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", log)[-1])
        provenance = decode_provenance(load_checkpoint(self.checkpoint(name))["model"].get("mask_metadata"))
        pruned = provenance["total"]["effective"] if provenance else 0.0
        return {"system": name, "pruned": pruned, "loss": loss, "perplexity": perplexity}

    def run(self) -> None:
        if self.args.data_bin is None:
            self.stages.run("prepare", documentation.main, self.prepare)
        self.train("dense", pruned=False)
        stats = self.run_folder / "stats.safetensors"
        # fmt: off
        self.stages.run(
            "record", "ap-record", self.data_bin, "--path", self.checkpoint("dense"), "--importance", *self.blocks,
            *self.device, "-o", stats, "--overwrite", *shlex.split(self.size.record),
        )
        # fmt: on
        scratch = {system.masks: system for system in self.systems if system.way == "scratch"}
        for name, system in scratch.items():
            output = ["-o", self.masks(system), "--overwrite"]
            self.stages.run(f"{name}.masks", "ap-masks", stats, *system.flags, *output)
        run_together(self.args.jobs, [(self.train_system, [system]) for system in self.systems])
        names = ["dense", *(system.name for system in self.systems)]
        run_together(self.args.jobs, [(self.evaluate, [name]) for name in names])
        results = [self.result(name) for name in names]
        for result in results:
            result["change"] = result["perplexity"] / results[0]["perplexity"] - 1
        record = {"size": self.name, "seed": self.args.seed, "versions": versions(), "rows": results}
        write_json(self.run_folder / "results.json", record, overwrite=True)
        rows = [[r["system"], f"{r['pruned']:.1%}", f"{r['perplexity']:.2f}", f"{r['change']:+.1%}"] for r in results]
        table = markdown(Table(["system", "pairs pruned", "perplexity", "change"], rows))
        (self.run_folder / "results.md").write_text(f"{table}\n", "utf-8")
        print(table)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--size", metavar="NAME", help="of recipe.toml; default: full with a GPU, else small")
    add(
        "--shares",
        nargs="+",
        type=float,
        default=[0.5, 0.8, 0.9],
        metavar="X",
        help="shares of the pairs to prune; default: 0.5 0.8 0.9",
    )
    add("--criteria", nargs="+", choices=CRITERIA, default=["importance"], metavar="NAME", help=" ".join(CRITERIA))
    add("--granularity", nargs="+", default=["1"], metavar="G", help="as for ap-masks; default: 1")
    add("--gradual", action="store_true", help="also prune while training")
    add("--seed", type=int, default=1, metavar="N", help="of training; default: 1")
    add("--jobs", type=int, default=1, metavar="N", help="trainings at the same time; default: 1")
    add("--data-bin", type=Path, metavar="DIR", help="your own text, binarised with fairseq-preprocess --only-source")
    add("--out", type=Path, metavar="DIR", help="folder of the run; default: runs/ of the example")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = get_parser().parse_args(arguments)
    for name in ("data_bin", "out"):
        if getattr(args, name) is not None:
            setattr(args, name, getattr(args, name).absolute())
    exit_on_sigterm()
    logging.getLogger().setLevel(logging.WARNING)  # hydra, which fairseq loads, lets through what others debug
    try:
        Experiment(args).run()
    except UserError as error:
        sys.exit(f"run.sh: error: {error}")


if __name__ == "__main__":
    main()
