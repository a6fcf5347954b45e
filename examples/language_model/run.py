"""Language models, dense and under masks: data -> dense model -> statistics -> masks -> pruned models -> perplexity.

A pruned system is named CRITERION.PERCENT.gGRANULARITY.WAY, for example importance.90.g64.gradual:

    criterion    importance, mean, window, or percentile, whose PERCENT is nominal
    granularity  as ap-masks takes it: 1 for cells, 64 for blocks, diagonal, head
    way          scratch: trained under masks that come from the dense model;
                 gradual: starts dense and is pruned while it trains

All models are trained from scratch with as many updates, in the order in which they are named. What is done is skipped,
so the same command resumes. `results.json` and `results.md` hold test perplexities per token of all systems that ended.
"""

import argparse
import json
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))  # see examples/common
sys.path.insert(0, str(Path(__file__).resolve().parent))  # beside this file

from environment import required_modules, run_example

with required_modules():
    import documentation
    import torch

    import ap_fairseq.plugin  # noqa: F401  (loaded once for all stages)
    from ap_fairseq.devices import device_name
    from ap_fairseq.evaluation.tables import Table, markdown
    from ap_fairseq.experiments.stages import PLUGIN, Stages, run_together
    from ap_fairseq.files import UserError, read_json, write_json
    from ap_fairseq.model.checkpoints import load_checkpoint
    from ap_fairseq.provenance import decode_provenance, total_sparsity, versions
    from ap_fairseq.pruning.flags import parse_mask_flags, require_fitting

HERE = Path(__file__).resolve().parent
CRITERIA = {  # flags of ap-masks
    "importance": "--decoder-self SHARE --criterion importance --smooth 32",
    "mean": "--decoder-self SHARE",
    "percentile": "--decoder-self SHARE --criterion percentile",  # nominal
    "window": "--decoder-self SHARE --criterion window",
}


@dataclass(frozen=True)
class Size:
    """A size of recipe.toml. The strings hold flags of fairseq's commands.

    Attributes:
        model, training: architecture and sizes; optimiser, batches, precision. A decay takes all updates.
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
    way: str

    @classmethod
    def named(cls, name: str) -> "System":
        """Read CRITERION.PERCENT.gGRANULARITY.WAY.

        Raises:
            UserError: if it is none.
        """
        match = re.fullmatch(rf"({'|'.join(CRITERIA)})\.(\d\d?)\.g(\w+)\.(scratch|gradual)", name)
        if match is None:
            raise UserError(
                f"--systems {name}: not CRITERION.PERCENT.gGRANULARITY.WAY, such as importance.90.g1.scratch; criteria "
                f"are {' '.join(CRITERIA)}, ways scratch and gradual"
            )
        return cls(match[1], int(match[2]) / 100, match[3], match[4])

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
        self.updates = self.size.updates if args.updates is None else args.updates
        if self.updates < 1:  # which fairseq takes for no limit
            raise UserError(f"--updates {self.updates}: not a number of updates from 1")
        self.block = self.size.block if args.block is None else args.block
        if self.block < 1:
            raise UserError(f"--block {self.block}: not a number of tokens from 1")
        self.run_folder: Path = args.out or HERE / "runs" / f"{name}-block{self.block}-seed{args.seed}"
        self.stages = Stages(self.run_folder)
        data = HERE / "data" / self.size.data
        self.data_bin: Path = args.data_bin or data / "data-bin"
        self.prepare = [*shlex.split(self.size.prepare), "--out", str(data)]
        self.device = ["--cpu", "--num-workers", 0] if self.size.cpu else ["--num-workers", 2]
        self.blocks = ["--sample-break-mode", "none", "--tokens-per-sample", self.block]
        self.systems = [System.named(name) for name in dict.fromkeys(args.systems)]
        for system in self.systems:  # the dense model takes long
            try:
                require_fitting(parse_mask_flags(system.flags), {"decoder_self": [1, 1]}, held_out=False)
            except UserError as error:
                raise UserError(f"--systems {system.name}: {error}") from error
        # Dense models by the flags that they are tuned with; those of the best one are for the pruned systems, too.
        self.dense = {f"dense.dropout-{p}": ["--dropout", p] for p in args.dropout} or {"dense": []}

    def train(self, name: str, *flags: Any, pruned: bool = True, task: str = "language_modeling") -> None:
        model = self.size.model.replace("--arch ", "--arch pruned_") if pruned else self.size.model
        decay = ["--total-num-update", self.updates] if "polynomial_decay" in self.size.training else []
        # fmt: off
        self.stages.run(
            f"{name}.train", "fairseq-train", self.data_bin, *PLUGIN, "--task", task, *shlex.split(model), *self.blocks,
            *shlex.split(self.size.training), *decay, "--max-update", self.updates, "--seed", self.args.seed,
            "--save-dir", self.run_folder / name, "--no-epoch-checkpoints", "--log-format", "json",
            "--log-interval", 50, *self.device, *flags,
        )
        # fmt: on

    def train_dense(self, name: str) -> None:
        self.train(name, *self.dense[name], pruned=False)
        self.evaluate(name)

    def best_dense(self) -> str:
        """The dense model with the lowest loss on the validation data."""
        return min(self.dense, key=lambda name: load_checkpoint(self.checkpoint(name))["extra_state"]["val_loss"])

    def checkpoint(self, name: str) -> Path:
        return self.run_folder / name / "checkpoint_best.pt"

    def masks(self, system: System) -> Path:
        return self.run_folder / f"{system.masks}.safetensors"

    def train_system(self, system: System, baseline: str) -> None:
        tuned = self.dense[baseline]
        if system.way == "scratch":
            self.train(system.name, *tuned, "--attention-masks", self.masks(system))
        else:
            # fmt: off
            self.train(
                system.name, *tuned, "--attention-masks", "none", "--prune-flags", shlex.join(system.flags),
                "--prune-start", self.updates // 10, "--prune-end", self.updates * 6 // 10,
                "--prune-every", max(1, self.updates // 10), task="pruned_language_modeling",
            )
            # fmt: on
        self.evaluate(system.name)
        self.report(baseline)

    def evaluate(self, name: str) -> None:
        # fmt: off
        self.stages.run(
            f"{name}.evaluate", "fairseq-eval-lm", self.data_bin, *PLUGIN, "--path", self.checkpoint(name),
            "--gen-subset", "test", *self.blocks, *self.device, *shlex.split(self.size.evaluate),
        )
        # fmt: on
        log = self.stages.log(f"{name}.evaluate").read_text("utf-8")
        loss, perplexity = map(float, re.findall(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", log)[-1])
        provenance = decode_provenance(load_checkpoint(self.checkpoint(name))["model"].get("mask_metadata"))
        result = {"system": name, "pruned": total_sparsity(provenance), "loss": loss, "perplexity": perplexity}
        write_json(self.result(name), result, overwrite=True)
        print(json.dumps(result), flush=True)

    def result(self, name: str) -> Path:
        return self.run_folder / f"{name}.json"

    def run(self) -> None:
        if self.args.data_bin is None:
            self.stages.run("prepare", documentation.main, self.prepare)
        scratch = {system.masks: system for system in self.systems if system.way == "scratch"}
        dense = [(self.train_dense, [name]) for name in self.dense]
        if len(dense) == 1 and not scratch:  # no system waits for the dense model
            waiting, baseline = dense, next(iter(self.dense))
        else:
            run_together(self.args.jobs, dense)
            waiting, baseline = [], self.best_dense()
        if scratch:
            stats = self.run_folder / "stats.safetensors"
            # fmt: off
            self.stages.run(
                "record", "ap-record", self.data_bin, "--path", self.checkpoint(baseline), "--importance",
                *self.blocks, "--max-positions", self.block, *self.device, "-o", stats, "--overwrite",
                *shlex.split(self.size.record),
            )
            # fmt: on
        for name, system in scratch.items():
            output = ["-o", self.masks(system), "--overwrite"]
            self.stages.run(f"{name}.masks", "ap-masks", stats, *system.flags, *output)
        run_together(self.args.jobs, waiting + [(self.train_system, [system, baseline]) for system in self.systems])
        print(self.report(baseline))

    def report(self, baseline: str) -> str:
        """Write the results of all systems that were evaluated, the baseline first; return their table.

        Before the baseline is evaluated there are none.
        """
        if not self.result(baseline).exists():
            return ""
        names = [baseline, *(name for name in self.dense if name != baseline), *(s.name for s in self.systems)]
        results = [read_json(self.result(name)) for name in names if self.result(name).exists()]
        for result in results:
            result["change"] = result["perplexity"] / results[0]["perplexity"] - 1
        record = {"size": self.name, "block": self.block, "updates": self.updates, "seed": self.args.seed}
        record |= {"device": device_name(self.size.cpu), "versions": versions(), "rows": results}
        write_json(self.run_folder / "results.json", record, overwrite=True)
        rows = [[r["system"], f"{r['pruned']:.1%}", f"{r['perplexity']:.2f}", f"{r['change']:+z.1%}"] for r in results]
        table = markdown(Table(["system", "pairs pruned", "perplexity", "change"], rows))
        (self.run_folder / "results.md").write_text(f"{table}\n", "utf-8")
        return table


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--size", metavar="NAME", help="of recipe.toml; default: full with a GPU, else small")
    add(
        "--systems",
        nargs="+",
        metavar="NAME",
        default=[f"importance.{n}.g1.gradual" for n in (50, 80, 90)],
        help="default: 50, 80 and 90%% of the pairs, cells by importance, pruned while training",
    )
    add(
        "--dropout",
        nargs="+",
        default=[],
        metavar="P",
        help=(
            "train a dense model with each; the one of the lowest validation loss is the baseline, and pruned systems "
            "have its dropout; default: the recipe's"
        ),
    )
    add("--updates", type=int, metavar="N", help="of every training, instead of the recipe's")
    add("--block", type=int, metavar="N", help="tokens of a training sample, instead of the recipe's")
    add("--seed", type=int, default=1, metavar="N", help="of training; default: 1")
    add("--jobs", type=int, default=1, metavar="N", help="trainings at the same time; default: 1")
    add("--data-bin", type=Path, metavar="DIR", help="your own text, binarised with fairseq-preprocess --only-source")
    add("--out", type=Path, metavar="DIR", help="folder of the run; default: runs/ of the example")
    return parser


def main(arguments: list[str] | None = None) -> None:
    run_example(lambda args: Experiment(args).run(), get_parser().parse_args(arguments))


if __name__ == "__main__":
    main()
