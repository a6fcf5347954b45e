"""Reads the training and test text of the WMT and IWSLT archives into aligned, cleaned lines.

line   the aligned text of one sentence with the talk it belongs to ("" where the corpus has no documents)
"""

import gzip
import itertools
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from building import PrepareError
from segments import SEPARATOR, clean

TALK_ID = re.compile(r"<talkid>\s*(.*?)\s*</talkid>")
TALK_TEXT = re.compile(r"<(title|description)>(.*)</\1>")


class Line(NamedTuple):
    source: str
    target: str
    talk: str = ""


# ---------------------------------------------------------------- archives


def extract(archive: Path, members: Sequence[str], folder: Path) -> list[Path]:
    """Write members of a tar archive to ``folder``; a member ``name`` may be stored as ``name.gz``.

    Raises:
        PrepareError: if the archive cannot be read to its end, or has no such member.
    """
    wanted = {name: member for member in members for name in (member, f"{member}.gz")}
    found: dict[str, Path] = {}
    names = []
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive) as tar:
            for entry in tar:
                names.append(entry.name)
                member = wanted.get(entry.name.removeprefix("./"))
                if member is None or not entry.isfile():
                    continue
                output = folder / Path(member).name
                with tar.extractfile(entry) as packed, output.open("wb") as stream:
                    shutil.copyfileobj(gzip.open(packed) if entry.name.endswith(".gz") else packed, stream)
                found[member] = output
    except (tarfile.TarError, EOFError, OSError) as error:
        raise _damaged(archive, error) from error
    missing = [member for member in members if member not in found]
    if missing:
        raise PrepareError(
            f"{archive} has no file {missing[0]}; it has {len(names)} files, e.g. {', '.join(names[:5])}: another "
            "archive of the same name?"
        )
    return [found[member] for member in members]


def _damaged(archive: Path, error: Exception) -> PrepareError:
    return PrepareError(f"{archive} cannot be unpacked ({error}): delete it and run again to download it")


# ---------------------------------------------------------------- training text


def _read(file: Path) -> Iterator[str]:
    """The lines of a file; only a line feed ends one, and bytes that are not UTF-8 become U+FFFD (dropped later).

    A byte order mark at the beginning belongs to no line.
    """
    with file.open(encoding="utf-8-sig", errors="replace", newline="\n") as stream:
        for line in stream:
            yield line.rstrip("\r\n")


def read_plain(source: Path, target: Path) -> Iterator[Line]:
    """Two files of the same number of lines.

    Raises:
        PrepareError: if one is longer.
    """
    for pair in itertools.zip_longest(_read(source), _read(target)):
        if None in pair:
            raise PrepareError(f"{source.name} and {target.name} differ in their number of lines: a damaged archive")
        yield Line(*pair)


def read_talks(source: Path, target: Path) -> Iterator[Line]:
    """Two files of WIT3's ``train.tags`` format: talks with metadata lines that begin with ``<``.

    Title and description count as text, as in fairseq's recipes. A talk begins at the first metadata line after text.

    Raises:
        PrepareError: if the two do not have the same talks with the same numbers of lines.
    """
    for talk in itertools.zip_longest(_talks(source), _talks(target)):
        if None in talk or talk[0][0] != talk[1][0] or len(talk[0][1]) != len(talk[1][1]):
            names = [f"talk {part[0]} of {len(part[1])} lines" if part else "the end" for part in talk]
            raise PrepareError(f"{source.name} has {names[0]} where {target.name} has {names[1]}: a damaged archive")
        (name, sources), (_, targets) = talk
        yield from (Line(s, t, name) for s, t in zip(sources, targets, strict=True))


def _talks(file: Path) -> Iterator[tuple[str, list[str]]]:
    """(talk id, text lines) of each talk; a talk without id is named by its number."""
    name, text, in_body = "", [], False
    numbers = itertools.count(1)
    for line in itertools.chain(map(str.strip, _read(file)), ["<end>"]):
        if not line.startswith("<"):
            text.append(line)
            in_body = True
            continue
        if in_body and not line.startswith("</"):
            yield name or f"number {next(numbers)}", text
            name, text, in_body = "", [], False
        if match := TALK_ID.match(line):
            name = match[1]
        elif match := TALK_TEXT.match(line):
            text.append(match[2])


FORMATS: dict[str, Callable[[Path, Path], Iterator[Line]]] = {"plain": read_plain, "talks": read_talks}


def cleaned(lines: Iterable[Line]) -> Iterator[Line]:
    """Lines of clean text, without those that have an empty or undecodable side or the separator of documents."""
    for line in lines:
        line = Line(clean(line.source), clean(line.target), line.talk)
        if all(line[:2]) and not any("\ufffd" in side or SEPARATOR in side for side in line[:2]):
            yield line


# ---------------------------------------------------------------- test sets


class TestSet(NamedTuple):
    """Raw text as sacreBLEU reads it, for scoring; ``talks`` names the document of each line."""

    sources: list[str]
    references: list[str]
    talks: list[str]

    __test__ = False  # not a test class of pytest


def read_test_set(name: str, archives: Sequence[Path], pair: str, members: Sequence[str]) -> TestSet:
    """Read the source and reference of a test set from its archives, with sacreBLEU's own reader.

    members: paths of source and reference inside the archives.
    """
    from sacrebleu.dataset import base
    from sacrebleu.dataset.iwslt_xml import IWSLTXMLDataset

    for archive in archives:  # sacreBLEU ends the process over a broken archive; this names the remedy
        with_members = [member for member in members if member in _member_names(archive)]
        if not with_members:
            raise PrepareError(f"{archive} has none of {', '.join(members)}: another archive of the same name?")
    # A fresh cache: sacreBLEU takes what it finds there for the test set, and keeps there what it reads.
    with tempfile.TemporaryDirectory() as cache, mock.patch.object(base, "SACREBLEU_DIR", cache):
        data_set = IWSLTXMLDataset(
            name=name, data=[archive.resolve().as_uri() for archive in archives], langpairs={pair: list(members)}
        )
        fields = dict(zip(data_set.fieldnames(pair), data_set.get_files(pair), strict=True))
        columns = [list(_read(Path(fields[field]))) for field in ("src", "ref", "docid")]
    if len(columns[0]) != len(columns[1]) or not columns[0]:
        raise PrepareError(f"{name} has {len(columns[0])} sources and {len(columns[1])} references")
    return TestSet(*columns)


def _member_names(archive: Path) -> set[str]:
    try:
        with tarfile.open(archive) as tar:
            return {name.removeprefix("./") for name in tar.getnames()}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise _damaged(archive, error) from error
