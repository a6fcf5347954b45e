"""The Debian packages of LibreOffice's help and interface, by language: which they are, and their unpacked folders.

A language is written as the packages spell it: ``pt-br``; plain English is ``en``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import debs
from building import PrepareError


def package_language(language: str) -> str:
    """A language as Debian's packages spell it: ``pt_BR`` -> ``pt-br``; plain English is ``en``."""
    language = language.lower().replace("_", "-")
    return "en" if language == "en-us" else language


def help_package(language: str) -> str:
    return f"libreoffice-help-{'en-us' if language == 'en' else language}"


def message_package(language: str) -> str:
    """The interface translations. American English has none: it is the message ids of the others."""
    return f"libreoffice-l10n-{language}"


def is_english(language: str) -> bool:
    return language.split("-")[0] == "en"


def packages_of(languages: Sequence[str]) -> list[str]:
    """The packages that languages need. English help is always one: it shows what others left untranslated."""
    languages = [language for language in languages if language != "en"]
    return sorted({help_package("en"), *map(help_package, languages), *map(message_package, languages)})


def language_of(package: str) -> str:
    """The language named by a package, for messages."""
    return "en" if package == help_package("en") else package.split("-", 2)[2]


def download(packages: Sequence[str], folder: Path) -> None:
    """The packages, into ``folder``.

    Raises:
        PrepareError: naming the languages on offer, if apt has no package of one.
    """
    unknown = debs.unknown_packages(packages, folder)
    if unknown:
        prefix = "libreoffice-help-"
        listed = debs.run(["apt-cache", "pkgnames", prefix], folder).stdout.split()
        offered = sorted(name.removeprefix(prefix) for name in listed if name != f"{prefix}common")
        raise PrepareError(
            f"no Debian package {' and no '.join(unknown)}: language {language_of(unknown[0])!r} is not offered. apt "
            f"offers help in: {' '.join(offered)}"
        )
    debs.download_packages(packages, folder)


def build_packages(work: Path, languages: Sequence[str], deb_dir: Path | None) -> dict[str, Any]:
    """Unpacked packages in ``packages/``. Returns the version of each, from its file name."""
    names = packages_of(languages)
    commands = ("apt-get", "apt-cache", "dpkg") if deb_dir is None else ("dpkg",)
    debs.require_commands(commands, f"the Debian packages {' '.join(names)}", f"apt-get download {' '.join(names)}")
    if deb_dir is None:
        deb_dir = work / "debs"
        deb_dir.mkdir()
        download(names, deb_dir)
    files = debs.find_packages(names, deb_dir)
    (work / "packages").mkdir()
    debs.unpack_packages(files, work / "packages")
    return {"packages": {name: debs.version_of(file) for name, file in files.items()}}


def help_folder(packages: Path, language: str) -> Path:
    """The ``text`` folder of an unpacked help package; its parent is named as LibreOffice spells the language."""
    root = packages / help_package(language) / "usr/share/libreoffice/help"
    folders = sorted(root.glob("*/text"))
    if len(folders) != 1:
        raise PrepareError(
            f"package {help_package(language)} has {len(folders)} folders usr/share/libreoffice/help/*/text, expected "
            f"1: its layout is not the one of LibreOffice 6 to 7"
        )
    return folders[0]
