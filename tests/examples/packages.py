"""Stand-ins for what the corpora of Debian packages need: catalogues, commands, and the data that came out."""

import struct
from pathlib import Path

HEADER = "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=(n != 1);\n"


def write_mo(file: Path, messages: dict[str, str]) -> None:
    """A gettext catalogue; ids sorted, plural forms separated by a zero byte, as the format demands."""
    entries = sorted((key.encode(), text.encode()) for key, text in {"": HEADER, **messages}.items())
    start = 28 + 16 * len(entries)
    tables, data = [b"", b""], b""
    for column in (0, 1):
        for entry in entries:
            tables[column] += struct.pack("<II", len(entry[column]), start + len(data))
            data += entry[column] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(head + tables[0] + tables[1] + data)


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
