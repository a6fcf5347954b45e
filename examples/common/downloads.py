"""Archives from the web or from a mirror: resumed after a break, verified, and whole when they have their final name.

``AP_DATA_MIRROR`` (http://, https://, file:// or a folder) is used instead of the addresses: it has the file of
https://HOST/PATH as HOST/PATH, as ``wget -x`` lays it out. ``AP_DATA_CHECKSUMS`` names a file in the format of
``sha256sum``, whose entries (``DIGEST  HOST/PATH``) replace the known checksums: for a mirror of excerpts.
"""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from building import PrepareError

MIRROR, CHECKSUMS = "AP_DATA_MIRROR", "AP_DATA_CHECKSUMS"
ATTEMPTS_WITHOUT_PROGRESS = 3
TIMEOUT_SECONDS = 60
CHUNK = 1 << 20
SECONDS_BETWEEN_REPORTS = 2


class Archive(NamedTuple):
    """A file to download. ``checksum`` is ``<algorithm>:<hexadecimal digest>``, or None where none is known."""

    address: str
    checksum: str | None = None

    @property
    def path(self) -> str:
        """``HOST/PATH``: where mirrors and the folder of archives have it."""
        return self.address.partition("://")[2]


def fetch(archive: Archive, folder: Path) -> dict[str, Any]:
    """Make ``folder/HOST/PATH`` unless it is there; return address, size, SHA-256 and how it was verified.

    An interrupted download stays beside it with the ending ``.part`` and is continued by the next call.

    Raises:
        PrepareError: if the archive cannot be had, is cut off, or is not what its checksum says.
    """
    address, checksum = _address(archive), _expected(archive)
    file = folder / archive.path
    part = file.with_name(f"{file.name}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        print(f"{file.name}: {'continuing' if part.exists() else 'fetching'} {address}")
        try:
            _download(address, part)
        except (OSError, http.client.HTTPException) as error:
            raise PrepareError(
                f"download of {address} failed: {error}. What arrived is kept in {part}: run the same command again to "
                f"continue. If the address is gone, get the file elsewhere and save it as {file}, or set {MIRROR} to a "
                f"mirror (http://, https://, file:// or a folder) that has {archive.path}"
            ) from error
    found = file if file.exists() else part
    sha256 = _digest(found, "sha256")
    if checksum is not None:
        algorithm, _, expected = checksum.partition(":")
        actual = sha256 if algorithm == "sha256" else _digest(found, algorithm)
        if actual != expected:
            part.unlink(missing_ok=True)
            raise PrepareError(
                f"{found} from {address} has the {algorithm} {actual}, expected {expected}: damaged on the way, or "
                f"changed at the source. {f'Delete {file}' if found == file else 'It was deleted'}; run again, or set "
                f"{CHECKSUMS} to a file with the checksums that you trust"
            )
    if found == part:
        part.replace(file)
    verified = checksum.partition(":")[0] if checksum else "no known checksum"
    print(f"{file.name}: {file.stat().st_size:,} bytes, sha256 {sha256} ({verified})")
    return {"address": address, "bytes": file.stat().st_size, "sha256": sha256, "verified": verified}


def _address(archive: Archive) -> str:
    mirror = os.environ.get(MIRROR, "").rstrip("/")
    if not mirror:
        return archive.address
    if "://" not in mirror:
        mirror = Path(mirror).resolve().as_uri()
    return f"{mirror}/{archive.path}"


def _expected(archive: Archive) -> str | None:
    path = os.environ.get(CHECKSUMS)
    if not path:
        return archive.checksum
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except OSError as error:
        raise PrepareError(f"{CHECKSUMS}={path} cannot be read: {error}") from error
    for line in lines:
        digest, _, name = line.partition(" ")
        if name.strip(" *").removeprefix("./") == archive.path:
            return f"sha256:{digest}"
    return archive.checksum


def _download(address: str, part: Path) -> None:
    """Append to ``part`` until it is complete; a broken connection is retried as long as something arrives."""
    fruitless = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _continue(address, part, before):
                return
            error: Exception = OSError(f"the connection ended after {part.stat().st_size:,} bytes, before the end")
        except urllib.error.HTTPError:
            raise  # the server's answer, not an accident
        except (OSError, http.client.HTTPException) as accident:
            error = accident
        progress = part.exists() and part.stat().st_size > before
        fruitless = 0 if progress else fruitless + 1
        if fruitless == ATTEMPTS_WITHOUT_PROGRESS:
            raise error


def _continue(address: str, part: Path, start: int) -> bool:
    """One request for what follows the first ``start`` bytes; returns whether the file is complete now."""
    local = address.startswith("file:")
    request = urllib.request.Request(address, headers={} if local else {"Range": f"bytes={start}-"})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start and error.headers.get("Content-Range") == f"bytes */{start}":
            return True  # nothing follows: the break came after the last byte
        if error.code == 416 and start:
            part.unlink()  # longer than the file: not the same file
            return False
        raise
    with response:
        continued = response.status == 206 if not local else False
        length = response.headers.get("Content-Length")
        expected = None if length is None else int(length) + (start if continued else 0)
        with part.open("ab" if continued else "wb") as stream:
            shown = time.monotonic()
            while block := response.read(CHUNK):
                stream.write(block)
                if expected and time.monotonic() - shown > SECONDS_BETWEEN_REPORTS:
                    shown = time.monotonic()
                    name = part.name.removesuffix(".part")
                    print(f"progress: {stream.tell() >> 20} / {expected >> 20} MiB, {name}", flush=True)
            stream.flush()
            os.fsync(stream.fileno())
    return expected is None or part.stat().st_size == expected


def _digest(file: Path, algorithm: str) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()
