#!/usr/bin/env python3
"""Page-level translation: train a sentence-level model on with sentences, chunks and pages, and see how well it
translates the same test pages as pages, in chunks, and segment by segment.

    pages.py --dense CHECKPOINT --data DIR --out DIR [--updates N] [--fairseq-train "FLAGS"] [--cpu]

Finished stages are skipped. Prints d-BLEU (BLEU of whole pages) for each length, for the mixed model and, segment by
segment, for the sentence-level one: take the longest length at which the mixed model is within a few points of that,
and compare masks there with sweeps/pages.yaml.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import page_mix
from segments import SEPARATOR

from ap_fairseq.cli.common import exit_on_sigterm
from ap_fairseq.experiments.stages import PLUGIN, Stages
from ap_fairseq.files import UserError, read_json

TRAINING = """--arch transformer_iwslt_de_en --share-all-embeddings --dropout 0.3 --optimizer adam
  --adam-betas '(0.9, 0.98)' --weight-decay 1e-4 --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 400
  --max-tokens 16384 --num-workers 2 --criterion label_smoothed_cross_entropy --label-smoothing 0.1"""


def run(args: argparse.Namespace) -> None:
    stages = Stages(args.out)
    device = "--cpu" if args.cpu else "--fp16"
    stages.run("mix", page_mix.main, [str(args.data)])
    options = read_json(args.data / "counts.json")["options"]
    source, target = (options[side].replace("-", "_") for side in ("source", "target"))
    pair = ["--source-lang", source, "--target-lang", target]
    data_bin, mixed = args.data / "data-bin" / "mix", args.out / "mixed"
    # fmt: off
    stages.run(
        "train", "fairseq-train", data_bin, *PLUGIN, "--task", "translation", *pair, *shlex.split(args.fairseq_train),
        device, "--finetune-from-model", args.dense, "--max-update", args.updates, "--save-dir", mixed,
        "--no-epoch-checkpoints", "--seed", 1, "--log-format", "json", "--log-interval", 50,
        "--skip-invalid-size-inputs-valid-test",
    )
    # fmt: on
    subsets = ["test", *(f"test{k}" for k in range(1, len(list((args.data / "mix").glob("test*.pages")))))]
    systems = [(f"mixed.{subset}", subset, mixed / "checkpoint_best.pt") for subset in subsets]
    systems.append((f"sentence.{subsets[-1]}", subsets[-1], args.dense))
    for name, subset, checkpoint in systems:
        # fmt: off
        stages.run(
            f"{name}.generate", "fairseq-generate", data_bin, *PLUGIN, "--path", checkpoint, *pair,
            "--gen-subset", subset, "--beam", 5, "--remove-bpe", "sentencepiece", "--required-batch-size-multiple", 1,
            "--max-tokens", 12000, "--max-len-a", 1.5, "--max-len-b", 50, "--num-workers", 0, device,
            "--log-format", "simple", "--log-interval", 5,
        )
        stages.run(
            f"{name}.evaluate", "ap-evaluate", f"{name}={stages.log(f'{name}.generate')},{checkpoint}",
            "--reference", args.data / "mix" / f"{subset}.{target}",
            "--documents", args.data / "mix" / f"{subset}.pages",
            "--separator", SEPARATOR, "--metrics", "bleu", "chrf", "-o", args.out / f"{name}.json", "--overwrite",
        )
        # fmt: on
    print(f"{'system':<20}{'lines':>7}{'d-BLEU':>8}{'d-chrF2':>9}{'s-BLEU':>8}{'equal segments':>16}")
    for name, *_ in systems:
        result = read_json(args.out / f"{name}.json")["systems"][0]
        print(
            f"{name:<20}{result['sentences']:>7}{result['d_bleu']:>8.2f}{result['d_chrf']:>9.2f}"
            f"{result['s_bleu']:>8.2f}{result['lines_with_equal_segments']:>16.1%}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--dense",
        type=Path,
        required=True,
        metavar="CHECKPOINT",
        help="the sentence-level model, trained on the same data",
    )
    add("--data", type=Path, required=True, metavar="DIR", help="folder of prepare.sh, made without --max-words")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    add("--updates", type=int, default=4000, metavar="N", help="of the training on the mix; default: %(default)s")
    add(
        "--fairseq-train", default=TRAINING, metavar="FLAGS", help="sizes and optimizer, as the dense model was trained"
    )
    add("--cpu", action="store_true", help="no GPU, no half precision")
    args = parser.parse_args(arguments)
    exit_on_sigterm()
    try:
        run(args)
    except UserError as error:
        sys.exit(f"pages.py: error: {error}")


if __name__ == "__main__":
    main()
