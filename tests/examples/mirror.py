"""A mirror of the WMT and IWSLT archives, with their names and inner layout, filled with text of our own."""

import gzip
import hashlib
import io
import tarfile
from html import escape
from pathlib import Path

from sentences import Pages, write_pages

STATMT, DATA_STATMT = "www.statmt.org", "data.statmt.org"


def plain(pages: Pages, language: str) -> str:
    return "".join(f"{segment[language]}\n" for _, segments in pages for segment in segments)


def talks(pages: Pages, language: str, doc: bool) -> str:
    """WIT3's train.tags; the campaign of 2017 wraps each talk in <doc> and names its translators after the text."""
    lines = []
    for number, (page, segments) in enumerate(pages):
        lines += [f'<doc docid="{number}" genre="lectures">'] if doc else []
        lines += [f"<url>http://example.org/{page}</url>", "<keywords>help</keywords>", f"<talkid>{number}</talkid>"]
        lines += [f"<title>{segments[0][language]}</title>", f"<description>{segments[1][language]}</description>"]
        lines += [segment[language] for segment in segments[2:]]
        lines += ["<translator href='x'>someone</translator>", "</doc>"] if doc else []
    return "\n".join(lines) + "\n"


def marked_up(pages: Pages, language: str) -> str:
    """The SGML of WMT's and the XML of IWSLT's test sets."""
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', f'<mteval><srcset setid="test" srclang="{language}">']
    for page, segments in pages:
        lines.append(f'<doc docid="{page}" genre="lectures" origlang="en">')
        lines += [f'<seg id="{k}"> {escape(part[language], False)} </seg>' for k, part in enumerate(segments, 1)]
        lines.append("</doc>")
    return "\n".join([*lines, "</srcset></mteval>"]) + "\n"


def write_archive(file: Path, members: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz" if file.suffix == ".tgz" else "w") as tar:
        for name, text in members.items():
            data = text.encode()
            entry = tarfile.TarInfo(name)
            data = gzip.compress(data, mtime=0) if name.endswith(".gz") else data
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def parallel(stem: str, pages: Pages, languages=("en", "de"), pair="de-en", end="") -> dict[str, str]:
    return {f"{stem}.{pair}.{language}{end}": plain(pages, language) for language in languages}


def build_mirror(folder: Path) -> Path:
    """Writes all archives as ``folder/HOST/PATH`` and their checksums as ``folder/SHA256SUMS``, which it returns."""
    pages = write_pages()
    held_out, train = pages[:4], pages[4:]
    parts = [train[k::3] for k in range(3)]
    statmt = folder / STATMT

    def both(stem: str, part: Pages) -> dict[str, str]:
        return parallel(stem, part) | parallel(stem, part, ("en", "fr"), "fr-en")

    write_archive(statmt / "wmt13/training-parallel-europarl-v7.tgz", both("training/europarl-v7", parts[0]))
    write_archive(statmt / "wmt13/training-parallel-commoncrawl.tgz", both("commoncrawl", parts[1]))
    write_archive(statmt / "wmt14/training-parallel-nc-v9.tgz", both("training/news-commentary-v9", parts[2]))
    write_archive(
        folder / DATA_STATMT / "wmt17/translation-task/training-parallel-nc-v12.tgz",
        both("training/news-commentary-v12", parts[2] + train[:1]),
    )
    write_archive(statmt / "wmt13/training-parallel-un.tgz", parallel("un/undoc.2000", parts[2], ("en", "fr"), "fr-en"))
    giga = {f"giga-fren.release2.fixed.{language}.gz": plain(parts[1], language) for language in ("en", "fr")}
    write_archive(statmt / "wmt10/training-giga-fren.tar", giga)
    tests = {
        f"test-full/newstest2014-{pair}-{side}.{language}.sgm": marked_up(held_out, language)
        for pair, languages in (("deen", ("en", "de")), ("fren", ("en", "fr")))
        for side, language in zip(("src", "ref"), languages, strict=True)
    }
    write_archive(folder / "statmt.org/wmt14/test-full.tgz", tests)

    iwslt14 = {f"de-en/train.tags.de-en.{language}": talks(train, language, False) for language in ("de", "en")}
    for k, name in enumerate(("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")):
        part = held_out[k % 4 : k % 4 + 1]
        iwslt14 |= {f"de-en/IWSLT14.{name}.de-en.{side}.xml": marked_up(part, side) for side in ("de", "en")}
    write_archive(folder / "dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz", iwslt14)

    wit3 = folder / "raw.githubusercontent.com/hlt-mt/WIT3/master/archive"
    for source, target in (("en", "de"), ("de", "en")):
        pair = f"{source}-{target}"
        years = [("dev2010", 0), *((f"tst{year}", year % 2) for year in range(2010, 2016))]
        earlier = {f"{pair}/train.tags.{pair}.{side}": talks(train, side, True) for side in (source, target)}
        for name, k in years:
            earlier[f"{pair}/IWSLT17.TED.{name}.{pair}.{source}.xml"] = marked_up(held_out[k : k + 1], source)
        write_archive(wit3 / f"2017-01-trnted/texts/{source}/{target}/{pair}.tgz", earlier)
        later = {
            f"{pair}/IWSLT17.TED.{name}.{pair}.{source}.xml": marked_up(held_out[k : k + 1], source)
            for name, k in (("tst2016", 2), ("tst2017", 3))
        }
        write_archive(wit3 / f"2017-01-ted-test/texts/{source}/{target}/{pair}.tgz", later)

    sums = folder / "SHA256SUMS"
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".tgz", ".tar"))
    digests = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder)}\n" for file in files]
    sums.write_text("".join(digests))
    return sums
