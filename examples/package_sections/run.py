"""RoBERTa on a classification set, dense and under masks: data -> dense model -> statistics -> masks -> accuracy.

For each seed a dense model is trained; then it is trained on, for as many updates again, as it is ("dense") and under
masks of each share of its pairs. So all systems have the same updates behind them. What is done is skipped, so the same
command resumes. `results.json` and `results.md` hold the accuracy on the test set after the last update.
"""

import argparse
import re
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))  # see examples/common
sys.path.insert(0, str(Path(__file__).resolve().parent))  # beside this file

from environment import required_modules, run_example

with required_modules():
    import sections

    import ap_fairseq.plugin  # noqa: F401  (loaded once for all stages)
    from ap_fairseq.devices import device_name
    from ap_fairseq.evaluation.tables import Table, markdown
    from ap_fairseq.experiments.stages import PLUGIN, Stages, run_together
    from ap_fairseq.files import UserError, require_file, write_json
    from ap_fairseq.model.checkpoints import load_checkpoint
    from ap_fairseq.provenance import decode_provenance, total_sparsity, versions

HERE = Path(__file__).resolve().parent
MODEL = """--arch pruned_roberta --encoder-layers 2 --encoder-embed-dim 128 --encoder-ffn-embed-dim 512
  --encoder-attention-heads 4 --dropout 0.1 --attention-dropout 0.1 --max-positions 130"""
TASK = """--task sentence_prediction --criterion sentence_prediction --init-token 0 --separator-token 2
  --shorten-method truncate --required-batch-size-multiple 1"""
TRAINING = """--optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --lr 1e-3 --lr-scheduler polynomial_decay
  --warmup-updates 50 --batch-size 32 --valid-subset valid,test --best-checkpoint-metric accuracy
  --maximize-best-checkpoint-metric --no-epoch-checkpoints"""
MASKS = "--criterion importance --smooth 32"


class Experiment:
    """The stages of all seeds."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.run_folder: Path = args.out or HERE / "runs"
        self.stages = Stages(self.run_folder)
        self.data: Path = args.data or HERE / "data"
        self.labels = self.data / "data-bin" / "label" / "dict.txt"
        if args.updates < 1:  # which fairseq takes for no limit
            raise UserError(f"--updates {args.updates}: not a number of updates from 1")
        if others := [share for share in args.shares if not 0 < share < 1]:
            raise UserError(f"--shares {others[0]:g} is no share of the pairs between 0 and 1, such as 0.9")
        self.shares = {f"{100 * share:g}": share for share in args.shares}  # of each pruned system
        self.device = ["--num-workers", 0, *([] if args.gpu else ["--cpu"])]

    def train(self, name: str, seed: int, *flags: Any) -> None:
        labels = self.labels.read_text("utf-8").splitlines()
        classes = sum(not label.startswith("madeupword") for label in labels)  # fairseq pads its dictionaries
        updates = self.args.updates
        # fmt: off
        self.stages.run(
            f"{name}.train", "fairseq-train", self.data / "data-bin", *PLUGIN, *shlex.split(TASK), *shlex.split(MODEL),
            *shlex.split(TRAINING), "--num-classes", classes, "--total-num-update", updates, "--max-update", updates,
            "--seed", seed, "--save-dir", self.run_folder / name, "--log-format", "json", "--log-interval", 50,
            *self.device, *flags,
        )
        # fmt: on

    def checkpoint(self, name: str) -> Path:
        return self.run_folder / name / "checkpoint_last.pt"

    def train_seed(self, seed: int) -> None:
        start, stats = f"start.{seed}", self.run_folder / f"stats.{seed}.safetensors"
        self.train(start, seed, "--attention-masks", "none")
        # fmt: off
        self.stages.run(
            f"record.{seed}", "ap-record", self.data / "data-bin", "--path", self.checkpoint(start), "--importance",
            "--sample", 2000, "--batch-size", 64, *self.device, "-o", stats, "--overwrite",
        )
        # fmt: on
        for system in ["dense", *self.shares]:
            masks: str | Path = "none"
            if share := self.shares.get(system):
                masks = self.run_folder / f"{system}.{seed}.safetensors"
                flags = ["--encoder-self", share, *shlex.split(MASKS), "-o", masks, "--overwrite"]
                self.stages.run(f"{system}.{seed}.masks", "ap-masks", stats, *flags)
            tuned = ["--attention-masks", masks, "--finetune-from-model", self.checkpoint(start)]
            self.train(f"{system}.{seed}", seed, *tuned)

    def result(self, system: str, seed: int) -> dict[str, Any]:
        log = self.stages.log(f"{system}.{seed}.train").read_text("utf-8")
        accuracy = [float(re.findall(rf'"{subset}_accuracy": "([\d.]+)"', log)[-1]) for subset in ("valid", "test")]
        provenance = decode_provenance(load_checkpoint(self.checkpoint(f"{system}.{seed}"))["model"]["mask_metadata"])
        scores = {"valid": accuracy[0], "test": accuracy[1]}
        return {"system": system, "seed": seed, "pruned": total_sparsity(provenance), **scores}

    def run(self) -> None:
        if self.args.data is None:
            self.stages.run("prepare", sections.main, ["--out", str(self.data)])
        require_file(self.labels, "a dictionary of labels, which prepare.sh makes in the folder of --data")
        seeds = list(dict.fromkeys(self.args.seeds))
        run_together(self.args.jobs, [(self.train_seed, [seed]) for seed in seeds])
        rows = [self.result(system, seed) for system in ["dense", *self.shares] for seed in seeds]
        made = {"device": device_name(cpu=not self.args.gpu), "versions": versions()}
        record = {"updates": 2 * self.args.updates, **made, "rows": rows}
        write_json(self.run_folder / "results.json", record, overwrite=True)
        table = summary(rows)
        (self.run_folder / "results.md").write_text(f"{table}\n", "utf-8")
        print(table)


def summary(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, and the difference to the dense model of the same seed."""
    dense = {row["seed"]: row["test"] for row in rows if row["system"] == "dense"}
    body = []
    for system in dict.fromkeys(row["system"] for row in rows):
        found = [row for row in rows if row["system"] == system]
        differences = [row["test"] - dense[row["seed"]] for row in found]
        difference = f"{statistics.fmean(differences):+.1f} ({min(differences):+.1f} to {max(differences):+.1f})"
        pruned, accuracy = (statistics.fmean(row[key] for row in found) for key in ("pruned", "test"))
        body.append([f"{pruned:.0%}", f"{accuracy:.1f}%", difference if system != "dense" else ""])
    return markdown(Table(["pairs pruned", "accuracy", "against dense (range over seeds)"], body))


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--shares", nargs="+", type=float, default=[0.5, 0.8, 0.95], metavar="X", help="default: 0.5 0.8 0.95")
    add("--updates", type=int, default=300, metavar="N", help="of each half of the training; default: 300")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N", help="default: 1 2 3")
    add("--jobs", type=int, default=1, metavar="N", help="seeds at the same time; default: 1")
    add("--gpu", action="store_true", help="train on a GPU")
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder that prepare.sh made; default: data/ of the example, made first",
    )
    add("--out", type=Path, metavar="DIR", help="folder of the run; default: runs/ of the example")
    return parser


def main(arguments: list[str] | None = None) -> None:
    run_example(lambda args: Experiment(args).run(), get_parser().parse_args(arguments))


if __name__ == "__main__":
    main()
