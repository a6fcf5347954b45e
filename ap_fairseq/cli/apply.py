"""``ap-apply``: put pruning masks into a checkpoint without training."""

from __future__ import annotations

import argparse
import logging

import ap_fairseq.plugin  # noqa: F401  (registers with fairseq)
from ap_fairseq.cli.common import add_output, command
from ap_fairseq.model.checkpoints import add_user_dir, apply_masks, import_user_dir
from ap_fairseq.provenance import describe_sparsity

logger = logging.getLogger(__name__)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write a pruned_transformer checkpoint with the weights of a dense (or pruned) checkpoint and the "
        "given masks, to translate without fine-tuning or to start fine-tuning from."
    )
    parser.add_argument("checkpoint", help="checkpoint of a transformer* or pruned_transformer* architecture")
    parser.add_argument("--attention-masks", required=True, metavar="FILE", help="file of ap-masks, or none: keep all")
    parser.add_argument("--data", metavar="DIR", help="data-bin with the dictionaries (default: as in the checkpoint)")
    add_user_dir(parser)
    add_output(parser, "the pruned checkpoint")
    return parser


@command
def main(argv: list[str]) -> None:
    args = get_parser().parse_args(argv)
    import_user_dir(args.user_dir)
    provenance = apply_masks(args.checkpoint, args.attention_masks, args.output, args.data, args.overwrite)
    logger.info(f"{describe_sparsity(provenance)} -> {args.output}")


if __name__ == "__main__":
    main()
