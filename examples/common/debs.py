"""Debian packages: downloaded by ``apt-get`` as any user, or found in a folder, and unpacked."""

import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from building import PrepareError


def require_commands(commands: Sequence[str], packages: str, download: str) -> None:
    """Raise PrepareError if a program is missing.

    packages: what the corpus comes from, for the message; download: the command that downloads it where apt is.
    """
    missing = [command for command in commands if shutil.which(command) is None]
    if not missing:
        return
    if "dpkg" in missing:
        raise PrepareError(
            f"this machine has no {' and no '.join(missing)}: unpacking Debian packages needs the program dpkg. "
            f"Install the package `dpkg` of your system (most have one). Without apt-get, also download {packages} on "
            f"a Debian or Ubuntu machine (`{download}`) and give their folder as --deb-dir DIR"
        )
    raise PrepareError(
        f"this machine has no {missing[0]}: the corpus comes from {packages}. Download them on a Debian or Ubuntu "
        f"machine (`{download}`), copy the files here and give their folder as --deb-dir DIR"
    )


def run(command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess:
    """Run a program that speaks English; the caller looks at its exit status."""
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, errors="replace")


def unknown_packages(packages: Sequence[str], folder: Path) -> list[str]:
    """Those that apt does not know.

    Raises:
        PrepareError: if it knows none at all.
    """
    unknown = [name for name in packages if run(["apt-cache", "show", name], folder).returncode]
    if len(unknown) == len(packages):
        raise PrepareError(
            f"apt knows none of the packages {' '.join(packages)}: its package lists are empty or too old. Run "
            f"`apt-get update` as root, or download the packages elsewhere and give their folder as --deb-dir DIR"
        )
    return unknown


def download_packages(packages: Sequence[str], folder: Path, options: Sequence[str] = ()) -> None:
    """``apt-get download`` into ``folder``; any user may."""
    done = run(["apt-get", *options, "download", *packages], folder)
    if done.returncode:
        names = " ".join(packages) if len(packages) < 10 else f"{len(packages)} packages"
        raise PrepareError(
            f"`apt-get download` of {names} failed with exit status {done.returncode}: {done.stderr.strip()}. Check "
            f"the network and run `apt-get update`, or give a folder with the packages as --deb-dir DIR"
        )


def find_packages(packages: Sequence[str], folder: Path) -> dict[str, Path]:
    """package name -> its one .deb file in ``folder``."""
    if not folder.is_dir():
        raise PrepareError(f"{folder} is not a folder: --deb-dir takes the folder that holds the .deb files")
    found = {name: sorted(folder.glob(f"{name}_*.deb")) for name in packages}
    missing = [name for name, files in found.items() if not files]
    if missing:
        raise PrepareError(
            f"{folder} has no .deb file of {' '.join(missing)}. Download with `apt-get download {' '.join(missing)}` "
            f"into that folder; a language for which that fails is not offered"
        )
    for name, files in found.items():
        if len(files) > 1:
            raise PrepareError(
                f"{folder} has {len(files)} versions of {name}: {', '.join(f.name for f in files)}. Keep one"
            )
    return {name: files[0] for name, files in found.items()}


def unpack_packages(files: dict[str, Path], folder: Path) -> None:
    """``dpkg -x`` of every package into ``folder/<package name>``."""
    for name, file in files.items():
        done = run(["dpkg", "-x", str(file.absolute()), str(folder / name)], folder)
        if done.returncode:
            raise PrepareError(
                f"{file} cannot be unpacked (dpkg -x, exit status {done.returncode}): {done.stderr.strip()}. "
                f"Download the package again"
            )


def read_members(file: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Path in the package, without the leading ``./`` -> contents, of the regular files whose path is wanted.

    Raises:
        PrepareError: if dpkg cannot read the package.
    """
    found = {}
    with subprocess.Popen(["dpkg", "--fsys-tarfile", file], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    path = member.name.removeprefix("./")
                    if member.isfile() and wanted(path):
                        found[path] = archive.extractfile(member).read()
        except tarfile.TarError as error:
            process.kill()
            raise PrepareError(f"{file} cannot be read ({error}): download the package again") from error
        said = process.stderr.read().decode(errors="replace").strip()
    if process.returncode:
        raise PrepareError(f"{file} cannot be read (dpkg --fsys-tarfile: {said}): download the package again")
    return found


def version_of(file: Path) -> str:
    """From the name of a .deb file, where the colon of a version is written %3a."""
    return file.name.split("_")[1].replace("%3a", ":")
