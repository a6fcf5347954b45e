"""The flag ``--user-dir`` of commands that read a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fairseq import utils

from ap_fairseq.files import UserError


def add_user_dir(parser: argparse.ArgumentParser) -> None:
    """Add fairseq's ``--user-dir``."""
    parser.add_argument(
        "--user-dir", metavar="DIR", help="your own fairseq plugin, if it registers the architecture; ours is loaded"
    )


def user_dir_of(words: Sequence[str]) -> str | None:
    """Return what ``--user-dir`` is given in a command line, whose other flags the plugin may be the first to know."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_user_dir(parser)
    return parser.parse_known_args(words)[0].user_dir


def import_user_dir(folder: str | None) -> None:
    """Import a plugin as fairseq does, before checkpoints are looked at: they may be of what it registers."""
    try:
        utils.import_user_module(argparse.Namespace(user_dir=folder))
    except FileNotFoundError as error:
        raise UserError(f"--user-dir {folder}: there is no such folder") from error
