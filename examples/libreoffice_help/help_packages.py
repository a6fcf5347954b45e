"""The Debian packages of LibreOffice's help and interface, by language: which they are, and their unpacked folders.

A language is written as the packages spell it: ``pt-br``; plain English is ``en``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpus
import debs
from building import PrepareError
from corpus import Block
from parallel_text import Filter, english_texts, filter_pages
from segments import Page, Pair


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


# ---------------------------------------------------------------- text


def read_help(packages: Path, language: str) -> dict[str, list[Block]]:
    """page name -> blocks."""
    return corpus.read_help(help_folder(packages, language))


def read_pair(
    packages: Path, source: str, target: str, english_help: dict[str, list[Block]] | None = None
) -> tuple[list[Page], list[Page], dict[str, Any]]:
    """The filtered text of a language pair in a folder of unpacked packages: help pages, interface strings, counts.

    Interface strings are a page for each catalogue, named ``interface/CATALOGUE``.

    english_help: what ``read_help`` gives for ``en``, where it was read before.

    Raises:
        PrepareError: if the two languages share no page.
    """
    pair = (source, target)
    blocks = {"en": english_help or read_help(packages, "en")}
    blocks |= {language: read_help(packages, language) for language in {*pair} - {"en"}}
    messages = {
        language: None if language == "en" else corpus.read_messages(packages / message_package(language))
        for language in pair
    }
    pages, page_counts = corpus.align_pages(blocks[source], blocks[target])
    strings, string_counts = corpus.align_messages(messages[source], messages[target])
    if not pages:
        raise PrepareError(
            f"the help packages of {source} and {target} share no page with text: versions too different?"
        )
    english = english_texts(
        [block.text for page in blocks["en"].values() for block in page]
        + [
            corpus.interface_text(corpus.english_message(key))
            for catalogue in messages.values()
            if catalogue
            for _, key in catalogue
        ]
    )
    aligned = [segment for page in pages for segment in page.pairs]
    rules = Filter(aligned, english, is_english(source), is_english(target))
    kept, dropped = filter_pages(pages, rules)
    by_catalogue: dict[str, list[Pair]] = {}
    for catalogue, segment in strings:
        by_catalogue.setdefault(f"interface/{catalogue}", []).append(segment)
    interface, interface_dropped = filter_pages([Page(*item) for item in by_catalogue.items()], rules)
    unique = {segment for page in kept for segment in page.pairs}
    return (
        kept,
        interface,
        {
            "pages": {"in_both_languages": len(pages), **page_counts},
            "aligned_segments": len(aligned),
            "unique_aligned_pairs": len(set(aligned)),
            "dropped_segments": dropped,
            "kept_segments": sum(len(page.pairs) for page in kept),
            "unique_pairs": len(unique),
            "words": {language: sum(len(s[side].split()) for s in unique) for side, language in enumerate(pair)},
            "interface": {
                **string_counts,
                "dropped": interface_dropped,
                "kept": sum(len(page.pairs) for page in interface),
                "unique_pairs": len({segment for page in interface for segment in page.pairs}),
            },
            "usual_log_length_ratio": round(rules.usual_log_ratio, 4),
        },
    )
