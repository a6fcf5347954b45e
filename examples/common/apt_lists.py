"""What apt knows, in a folder of its own: packages, their descriptions in any language, and those with man pages.

apt's own lists stay as they are: ``apt-get update`` runs with other folders, as any user, for the machine's sources.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import debs
from building import PrepareError

APT_HELPER = "/usr/lib/apt/apt-helper"  # reads lists whatever their compression
MAN_PAGE = re.compile(r"usr/share/man/(?:([a-zA-Z_]+)/)?(man\d/[^/\s]+?)\.gz")
CONTENTS = {
    "MetaKey": "$(COMPONENT)/Contents-$(ARCHITECTURE)",
    "ShortDescription": "Contents-$(ARCHITECTURE)",
    "Description": "$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Contents",
}
"""The lists of files in packages, as the package apt-file configures them."""


def apt_language(language: str) -> str:
    """A language as apt's lists and the folders of man pages spell it: ``pt_BR`` for ``pt-br``."""
    base, _, region = language.partition("-")
    return f"{base}_{region.upper()}" if region else base


def man_page(path: str) -> tuple[str, str] | None:
    """(language, "man1/ls.1") of a path; the language is en for pages in no folder of a language."""
    match = MAN_PAGE.fullmatch(path)
    return (match[1] or "en", match[2]) if match else None


class Lists:
    """apt's lists in a folder, updated.

    Args:
        languages: of the descriptions.
        contents: also fetch the lists of the files in packages, for ``man_packages``.

    Raises:
        PrepareError: if ``apt-get update`` fails.
    """

    def __init__(self, folder: Path, languages: Sequence[str], contents: bool = True):
        self.lists = folder / "lists"
        (self.lists / "partial").mkdir(parents=True, exist_ok=True)  # there after an interrupted run
        settings = {
            "Dir::State::lists": str(self.lists),
            "Dir::Cache": str(folder / "cache"),
            "Acquire::Languages": ",".join(languages),
        }
        if contents:
            settings |= {f"Acquire::IndexTargets::deb::Contents-deb::{name}": text for name, text in CONTENTS.items()}
        self.options = [word for name, text in settings.items() for word in ("-o", f"{name}={text}")]
        done = debs.run(["apt-get", *self.options, "update"], folder)
        if done.returncode:
            raise PrepareError(
                f"`apt-get update` failed with exit status {done.returncode}: {done.stderr.strip()}. Check the "
                f"network, or give a folder with the lists as --deb-dir DIR (`prepare.sh --help`)"
            )

    def _lines(self, pattern: str) -> Iterator[str]:
        for file in sorted(self.lists.glob(pattern)):
            yield from debs.run([APT_HELPER, "cat-file", str(file)], self.lists).stdout.splitlines()

    def translations(self, language: str) -> str:
        """All ``Translation-LANGUAGE`` files, one after the other."""
        written = language.replace("_", "%5f")  # in file names, apt writes an underscore for each slash of an address
        return "\n".join(self._lines(f"*_Translation-{written}*")) + "\n"

    def packages(self) -> str:
        """All ``Packages`` files, one after the other."""
        return "\n".join(self._lines("*_Packages*")) + "\n"

    def man_packages(self, language: str) -> set[str]:
        """The packages that hold man pages of the language, and those that hold their English originals."""
        holders: dict[str, dict[str, str]] = {"en": {}, language: {}}
        for line in self._lines("*_Contents-*"):
            path, _, names = line.rpartition(" ")
            page = man_page(path.rstrip())
            if page and page[0] in holders:
                # Of several packages, the first: they are alternatives to each other.
                holders[page[0]].setdefault(page[1], names.split(",")[0].rsplit("/", 1)[-1])
        both = holders["en"].keys() & holders[language].keys()
        return {holders[side][page] for side in holders for page in both}

    def sizes(self, packages: Iterable[str], folder: Path) -> dict[str, int]:
        """Bytes of each package that apt can download; the newest version counts."""
        names = sorted(packages)
        shown = debs.run(["apt-cache", *self.options, "show", "--no-all-versions", *names], folder).stdout
        found = {}
        for stanza in shown.split("\n\n"):
            fields = dict(re.findall(r"^(Package|Size): (\S+)$", stanza, re.MULTILINE))
            if len(fields) == 2:
                found[fields["Package"]] = int(fields["Size"])
        return {name: found[name] for name in names if name in found}
