"""``ap-average``: average the parameters of checkpoints of one run."""

from __future__ import annotations

import argparse
import logging
import re
from pathlib import Path

import ap_fairseq.plugin  # noqa: F401  (registers with fairseq)
from ap_fairseq.cli.common import add_output, command, without_usage
from ap_fairseq.files import ArtifactError, UserError
from ap_fairseq.model.checkpoints import average_checkpoints

logger = logging.getLogger(__name__)

_BY_UPDATES, _BY_EPOCHS = re.compile(r"checkpoint_\d+_(\d+)\.pt"), re.compile(r"checkpoint(\d+)\.pt")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Average the parameters of checkpoints, as fairseq's average_checkpoints.py does (which the "
        "fairseq package does not install); masks must be the same in all of them."
    )
    parser.add_argument("checkpoints", nargs="+", help="checkpoints of one run, or with --last its folder")
    parser.add_argument(
        "--last",
        type=int,
        metavar="N",
        help="average the last N checkpoints of the folder: those saved by number of updates "
        "(--save-interval-updates) if there are any, or else those of epochs",
    )
    add_output(parser, "the averaged checkpoint")
    return parser


def last_checkpoints(folder: str, count: int) -> list[Path]:
    """Return the last *count* numbered checkpoints of a training, oldest first.

    Raises:
        ArtifactError: if it is no folder, or does not have as many.
    """
    if not Path(folder).is_dir():
        raise ArtifactError(f"--last {count}: {folder} is not a folder")
    for pattern in (_BY_UPDATES, _BY_EPOCHS):
        matches = ((pattern.fullmatch(path.name), path) for path in Path(folder).glob("checkpoint*.pt"))
        numbered = sorted((int(match[1]), path) for match, path in matches if match)
        if numbered:
            break
    if count < 1 or len(numbered) < count:
        raise ArtifactError(
            f"--last {count}: {folder} has {len(numbered)} numbered checkpoints; lower --last, or train with "
            "--save-interval-updates (checkpoint_EPOCH_UPDATES.pt) or without --no-epoch-checkpoints "
            "(checkpointEPOCH.pt), and keep as many with --keep-interval-updates or --keep-last-epochs"
        )
    return [path for _, path in numbered[-count:]]


@command
def main(argv: list[str]) -> None:
    args = without_usage(get_parser()).parse_args(argv)
    paths = args.checkpoints
    if args.last is not None:
        if len(paths) > 1:
            raise UserError(f"--last takes one folder, got {len(paths)} paths")
        paths = last_checkpoints(paths[0], args.last)
        logger.info(f"averaging {', '.join(path.name for path in paths)}")
    elif folder := next((path for path in paths if Path(path).is_dir()), None):
        raise UserError(f"{folder} is a folder; name its checkpoints, or average its last N with --last N")
    average_checkpoints(paths, args.output, args.overwrite)


if __name__ == "__main__":
    main()
