"""Reading and writing whole files, and the errors that a user can mend."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class UserError(Exception):
    """A fault that the user can mend, such as a bad option; commands print the message alone, without a traceback."""


class ArtifactError(UserError):
    """A file is missing or damaged, cannot be written, or does not belong to what it is used with."""


def read_lines(path) -> list[str]:
    """Return the lines of a text file; only a line feed ends one, as for fairseq, not every Unicode separator.

    A byte order mark at the beginning belongs to no line.

    Raises:
        ArtifactError: for a missing file, or one that is not UTF-8.
    """
    require_file(path, "a text file with one sentence or log entry a line")
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as lines:
            return [line.rstrip("\n") for line in lines]
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8: {error}") from error


def write_text(path: str | os.PathLike, text: str, overwrite: bool = False) -> None:
    """Write *text* to a temporary name and rename it."""
    with atomic_output(path, overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_pieces(path: str | os.PathLike, pieces: Iterable[bytes], overwrite: bool = False) -> None:
    """Write *pieces*, one after the other, as :func:`write_text` does."""
    with atomic_output(path, overwrite) as temporary, open(temporary, "wb") as stream:
        stream.writelines(pieces)


def write_json(path: str | os.PathLike, document: Any, overwrite: bool = False) -> None:
    """Write *document* as indented JSON, as :func:`write_text` does."""
    write_text(path, json.dumps(document, indent=2, sort_keys=True) + "\n", overwrite)


def read_json(path: str | os.PathLike) -> Any:
    """Return the document of a JSON file that :func:`write_json` wrote.

    Raises:
        OSError, ValueError: if it is missing or damaged.
    """
    return json.loads(Path(path).read_text(encoding="utf-8"))


def require_file(path: str | os.PathLike, expected: str) -> None:
    """Raise :class:`ArtifactError` unless *path* is a readable file and not a Git LFS pointer.

    Args:
        expected: what the file should be, for the message.
    """
    if not os.fspath(path):
        raise ArtifactError(f"a name of a file is empty; expected {expected}")
    path = Path(path)
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; expected {expected}")
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder; expected {expected}")
    if not path.is_file():
        raise ArtifactError(f"{path} is not a regular file; expected {expected}")
    with open(path, "rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ArtifactError(
                f"{path} is a Git LFS pointer, which stands for {expected}; fetch the file itself with: git lfs pull"
            )


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Put the file's name before what an :class:`ArtifactError` of the block says is wrong with its contents."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def refuse_existing(path: str | os.PathLike, overwrite: bool, inputs: Iterable[str | os.PathLike] = ()) -> None:
    """Raise :class:`ArtifactError` if *path* exists and *overwrite* is not set, or if it cannot be written.

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
    if path.exists() and not path.is_file():
        raise ArtifactError(f"output {path} is not a regular file; name a file")
    if path.is_symlink() and not path.exists():
        raise ArtifactError(
            f"output {path} is a broken symbolic link (to {os.readlink(path)}); remove it or choose another name"
        )
    if path.exists() and not overwrite:
        raise ArtifactError(f"output {path} exists; pass --overwrite to replace it or choose another name")
    parent = path.resolve().parent if path.exists() else path.parent
    if not parent.is_dir():
        raise ArtifactError(f"cannot write {path}: folder {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK):
        raise ArtifactError(f"cannot write {path}: no permission to write in folder {parent}")


@contextmanager
def atomic_output(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path that becomes *path* when the block ends without an exception.

    As with ``cp``, a symbolic link stays one and the file that it points to is replaced, and a replaced file's
    permissions stay; a new file has those of the user's umask.

    Raises:
        ArtifactError: also if the disk is full.
    """
    refuse_existing(path, overwrite)
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.tmp")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    permissions = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(target.stat().st_mode if target.exists() else permissions)  # safetensors 0.8 makes another file
        os.replace(temporary, target)
    except BaseException as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reported = not_written(path, error) if full else None  # before the file makes room
        temporary.unlink(missing_ok=True)
        if reported:
            raise reported from error
        raise


def not_written(path: str | os.PathLike, reason: object) -> ArtifactError:
    """Return the error for a file whose writing failed, with the space on its disk."""
    free = shutil.disk_usage(Path(path).resolve().parent).free
    return ArtifactError(f"{path} could not be written: {reason}; {free:,} bytes are free on its disk")


def file_sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file as a hexadecimal string."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
