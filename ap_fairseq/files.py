"""Files that are whole or absent: atomic output, hashes, lines and JSON; and the errors a user can mend."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A fault that the user can mend, such as a bad option; commands print the message alone, without a traceback."""


class ArtifactError(UserError):
    """A file is missing or damaged, cannot be written, or does not belong to what it is used with."""


def read_lines(path) -> list[str]:
    """Return the lines of a text file; only a line feed ends one, as for fairseq, not every Unicode separator.

    Raises:
        ArtifactError: if the file does not exist or is not UTF-8.
    """
    if not Path(path).is_file():
        raise ArtifactError(f"{path} does not exist; expected a text file with one sentence or log entry a line")
    try:
        with open(path, encoding="utf-8", newline="\n") as lines:
            return [line.rstrip("\n") for line in lines]
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8: {error}") from error


def write_json(path, document: Any, overwrite: bool = False) -> None:
    """Write *document* as indented JSON to a temporary name and rename it."""
    with atomic_output(path, overwrite) as temporary:
        Path(temporary).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def refuse_existing(path: str | os.PathLike, overwrite: bool, inputs: Iterable[str | os.PathLike] = ()) -> None:
    """Raise :class:`ArtifactError` if *path* exists and *overwrite* is not set, or if it can never be written.

    Called before hours of work as well as by the writers, so that a bad output path costs nothing.

    Args:
        inputs: files that are read, none of which may be *path* even with *overwrite*.
    """
    path = Path(path)
    for file in inputs:
        if path.exists() and os.path.exists(file) and os.path.samefile(path, file):
            raise ArtifactError(f"output {path} is the input {file}; choose another name")
    if path.is_dir():
        raise ArtifactError(f"output {path} is a directory; name a file")
    if path.exists() and not overwrite:
        raise ArtifactError(f"output {path} exists; pass --overwrite to replace it or choose another name")
    parent = path.parent
    if not parent.is_dir():
        raise ArtifactError(f"cannot write {path}: folder {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK):
        raise ArtifactError(f"cannot write {path}: no permission to write in folder {parent}")


@contextmanager
def atomic_output(path: str | os.PathLike, overwrite: bool = False):
    """Yield a temporary path beside *path* that becomes *path* when the block ends without an exception.

    Raises:
        ArtifactError: also if the disk is full.
    """
    refuse_existing(path, overwrite)
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files; users expect their umask
        os.replace(temporary, path)
    except BaseException as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reported = not_written(path, error) if full else None  # before the file makes room
        Path(temporary).unlink(missing_ok=True)
        if reported:
            raise reported from error
        raise


def not_written(path: str | os.PathLike, reason: object) -> ArtifactError:
    """Return the error for a file whose writing failed, with the space on its disk."""
    free = shutil.disk_usage(Path(path).parent).free
    return ArtifactError(f"{path} could not be written: {reason}; {free:,} bytes are free on its disk")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def file_sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file as a hexadecimal string."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
