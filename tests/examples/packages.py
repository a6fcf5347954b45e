"""Stand-ins for what the corpora of Debian packages need: catalogues, commands, and the data that came out."""

import io
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path

from sentences import Pages

HEADER = "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=(n != 1);\n"


def catalogue(messages: dict[str, str]) -> bytes:
    """A gettext catalogue, a file .mo; ids sorted, plural forms separated by a zero byte, as the format demands."""
    entries = sorted((key.encode(), text.encode()) for key, text in {"": HEADER, **messages}.items())
    start = 28 + 16 * len(entries)
    tables, data = [b"", b""], b""
    for column in (0, 1):
        for entry in entries:
            tables[column] += struct.pack("<II", len(entry[column]), start + len(data))
            data += entry[column] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, 0)
    return head + tables[0] + tables[1] + data


def write_mo(file: Path, messages: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(catalogue(messages))


def write_command(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a finished output folder that is data, by path."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    paths = {file.relative_to(folder).as_posix(): file for file in files}
    skipped = ("counts.json", ".lock", ".steps/", "packages/")
    return {path: file.read_bytes() for path, file in paths.items() if not path.startswith(skipped)}


DPKG = 'case "$1" in -x) mkdir -p "$3" && tar -xf "$2" -C "$3";; --fsys-tarfile) cat "$2";; esac'


def write_deb(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """A tar archive under the name of a package, which the stand-in for dpkg below can read."""
    with tarfile.open(folder / f"{name}_1%3a2-3_all.deb", "w") as archive:
        for path, data in files.items():
            entry = tarfile.TarInfo(f"./{path}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def help_page(texts: list[str]) -> bytes:
    blocks = "".join(f"<p id='p{number}'>{text}</p>" for number, text in enumerate(texts))
    return f'<html><body><div id="DisplayArea">{blocks}</div></body></html>'.encode()


def write_help_packages(folder: Path, pages: Pages, languages: Sequence[str]) -> None:
    """LibreOffice's packages of English (``en``) and other languages: pages of the help, one interface string."""
    for language in languages:
        spelled, name = ("en-US", "en-us") if language == "en" else (language, language)
        root = f"usr/share/libreoffice/help/{spelled}/text/swriter"
        texts = {
            f"{root}/{number}.html": help_page([part[language] for part in parts])
            for number, (_, parts) in enumerate(pages)
        }
        write_deb(folder, f"libreoffice-help-{name}", texts)
        if language != "en":
            path = f"usr/lib/libreoffice/program/resource/{language}/LC_MESSAGES/sw.mo"
            strings = catalogue({"M\x04_Save as": f"_Save in {language}"})
            write_deb(folder, f"libreoffice-l10n-{language}", {path: strings})
