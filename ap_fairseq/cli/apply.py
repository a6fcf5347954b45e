"""``ap-apply``: put pruning masks into a checkpoint without training, or turn it into one of fairseq's own."""

from __future__ import annotations

import argparse
import logging

import ap_fairseq.plugin  # noqa: F401  (registers with fairseq)
from ap_fairseq.cli.common import add_output, command, without_usage
from ap_fairseq.cli.user_dir import add_user_dir, import_user_dir
from ap_fairseq.files import UserError
from ap_fairseq.model.conversion import apply_masks
from ap_fairseq.model.stock import convert_to_stock

logger = logging.getLogger(__name__)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write a pruned_transformer checkpoint with the weights of a dense (or pruned) checkpoint and the "
        "given masks, to translate without fine-tuning or to start fine-tuning from; with --to-stock, a checkpoint of "
        "fairseq's own model, which fairseq reads without this plugin, and CTranslate2's converter does."
    )
    parser.add_argument("checkpoint", help="checkpoint of a transformer* or pruned_transformer* architecture")
    parser.add_argument("--attention-masks", metavar="FILE", help="file of ap-masks, or none: keep all")
    parser.add_argument(
        "--to-stock",
        action="store_true",
        help="write fairseq's own model: transformer, transformer_lm or roberta. The masks of the checkpoint must keep "
        "all, or are dropped with --attention-masks none",
    )
    parser.add_argument("--data", metavar="DIR", help="data-bin with the dictionaries (default: as in the checkpoint)")
    add_user_dir(parser)
    add_output(parser, "the pruned checkpoint")
    return parser


@command
def main(argv: list[str]) -> None:
    args = without_usage(get_parser()).parse_args(argv)
    if args.attention_masks is None and not args.to_stock:
        raise UserError("--attention-masks is missing; name a file of ap-masks, or none to keep every pair")
    if args.to_stock and args.attention_masks not in (None, "none"):
        raise UserError(
            f"--to-stock with --attention-masks {args.attention_masks}: fairseq's own models have no masks; leave one "
            "of them out"
        )
    import_user_dir(args.user_dir)
    if args.to_stock:
        convert_to_stock(args.checkpoint, args.output, args.attention_masks == "none", args.data, args.overwrite)
        logger.info(f"fairseq's own model -> {args.output}")
        return
    apply_masks(args.checkpoint, args.attention_masks, args.output, args.data, args.overwrite)
    logger.info(f"pruned model -> {args.output}")


if __name__ == "__main__":
    main()
