"""``ap-average``: average the parameters of checkpoints of one run."""

from __future__ import annotations

import argparse

from ap_fairseq.checkpoints import average_checkpoints
from ap_fairseq.cli.common import add_output, command


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Average the parameters of checkpoints, as fairseq's average_checkpoints.py does (which the "
        "fairseq package does not install); masks must be the same in all of them."
    )
    parser.add_argument("checkpoints", nargs="+", help="checkpoints of one run")
    add_output(parser, "the averaged checkpoint")
    return parser


@command
def main(argv: list[str]) -> None:
    args = get_parser().parse_args(argv)
    average_checkpoints(args.checkpoints, args.output, args.overwrite)
