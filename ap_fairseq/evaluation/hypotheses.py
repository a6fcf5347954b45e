"""Hypotheses from logs of fairseq-generate or from plain text; a log that was cut off or has gaps is refused."""

from __future__ import annotations

import html
import itertools
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from sacrebleu.metrics import CHRF

from ap_fairseq.files import ArtifactError, read_lines

_LOG_LINE = re.compile(r"^([STHDP])-(\d+)\t(.*)$")
_SUBWORD = re.compile(r"▁|@@( |$)")  # of SentencePiece, of subword-nmt
_FINISHED = re.compile(r"^Generate \S+ with beam=|samples have invalid sizes and will be skipped")


def read_hypotheses(files: Sequence[str | os.PathLike], references: Sequence[str] | None = None) -> list[str]:
    """Return the detokenised best hypotheses of a translation in the order of the data set.

    Files with lines as fairseq-generate writes them (``S-0``, ``T-0``, ``H-0``, ``D-0``, ``P-0``) are logs; any others
    are plain text with one hypothesis a line.

    Args:
        files: one file, or the logs of all ranks.
        references: of the data set, if known.

    Raises:
        ArtifactError: if a file is missing, a log was cut off or has other references, or a sentence is missing or was
            translated twice.
    """
    lines: list[str] = []
    found: dict[int, str] = {}
    targets: dict[int, tuple[str, str]] = {}  # sentence -> where its reference was logged, and that
    first: dict[str, str] = {}  # sentence -> where it was translated
    seen: set[tuple[str, str]] = set()
    logged, finished = False, True
    for file in map(str, files):
        own = read_lines(file)
        entries = [(n, *match.groups()) for n, line in enumerate(own, 1) if (match := _LOG_LINE.match(line))]
        if entries and not _ends(file):
            raise ArtifactError(f"{file} was cut off in its last line, {own[-1][:60]!r}; run fairseq-generate again")
        lines += own
        logged |= bool(entries)
        for line, letter, sentence in _translations(entries):
            if (letter, sentence) in seen:
                raise ArtifactError(
                    f"sentence {sentence} was translated twice: {first[sentence]} and {file}:{line}; give the "
                    "log of one run"
                )
            seen.add((letter, sentence))
            first.setdefault(sentence, f"{file}:{line}")
        for line, letter, sentence, text in entries:
            if letter == "D":
                found.setdefault(int(sentence), text.partition("\t")[2])  # with --nbest, the best comes first
            elif letter == "T":
                targets[int(sentence)] = f"{file}:{line}", text
        finished &= any(map(_FINISHED.search, own))
    if not logged:
        return lines
    expected = range(max([len(references or ()), *(number + 1 for number in {**found, **targets})]))
    if len(found) < max(len(expected), 1):
        raise ArtifactError(f"{os.pathsep.join(map(str, files))} {_gap(found, expected, finished)}")
    if references is not None and len(references) == len(expected):
        _require_references(targets, references)
    return [found[number] for number in expected]


def hold_subwords(lines: Sequence[str], share: float = 0.5) -> bool:
    """Whether more than a *share* of lines, or of words, have marks of SentencePiece or of subword-nmt."""
    return sum(map(bool, map(_SUBWORD.search, lines))) > share * len(lines)


def _ends(file: str) -> bool:
    """Whether the last line of a text file is complete."""
    with open(file, "rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read() == b"\n"


def _translations(entries: Sequence[tuple[int, str, str, str]]) -> Iterator[tuple[int, str, str]]:
    """Yield line number, letter and sentence of what a run logs once for each sentence.

    That is its source, and its hypotheses, which follow each other, as those of ``--nbest`` do. Either may be missing:
    hypotheses of one sentence, logged in two runs without sources, cannot be told from those of ``--nbest``.
    """
    yield from ((line, letter, sentence) for line, letter, sentence, _ in entries if letter == "S")
    hypotheses = [(line, letter, sentence) for line, letter, sentence, _ in entries if letter == "D"]
    for _, same in itertools.groupby(hypotheses, key=lambda entry: entry[-1]):
        yield next(same)


def _require_references(logged: Mapping[int, tuple[str, str]], references: Sequence[str]) -> None:
    """Raise :class:`ArtifactError` if more than a tenth of the *references* are not those that were *logged*.

    Those with unknown words do not count.
    """
    known = {number: entry for number, entry in logged.items() if "<unk>" not in entry[1]}
    others = [number for number, (_, text) in known.items() if not _alike(text, references[number])]
    if len(others) > len(known) / 10:
        number, (place, text) = others[0], known[others[0]]
        raise ArtifactError(
            f"{len(others)} of {len(known)} references are not those of the log, the first at {place}: {text[:60]!r} "
            f"there, {references[number][:60]!r} in line {number + 1} of the reference; give that of the data set that "
            "was translated, in its order, and a log of plain text (--remove-bpe or --bpe). If the data set has no "
            "references, remove these lines from the log: grep -v ^T-"
        )


def _alike(one: str, other: str) -> bool:
    """Whether two texts have most letters in common, whatever tokenizers and Unicode normalisation did to them."""
    letters = [
        "".join(filter(str.isalnum, unicodedata.normalize("NFKD", html.unescape(text)).casefold()))
        for text in (one, other)
    ]
    return letters[0] == letters[1] or CHRF().sentence_score(letters[0], [letters[1]]).score >= 50


def _gap(found: Mapping[int, str], expected: range, finished: bool) -> str:
    """Say which sentences a log lacks, why, and what to do."""
    if not found:
        return "holds no hypotheses (D- lines): fairseq-generate was cut off, or ran with --quiet; run it again"
    missing = list(itertools.islice((number for number in expected if number not in found), 6))
    listed = ", ".join([*map(str, missing[:5]), *["..."] * (len(missing) > 5)])
    text = f"lacks {len(expected) - len(found)} of {len(expected)} sentences ({listed}): "
    reasons = (
        "fairseq-generate skipped what is longer than --max-source-positions or --max-target-positions "
        "(--skip-invalid-size-inputs-valid-test), so raise them and leave the flag out; or it dropped a last batch, so "
        "pass --required-batch-size-multiple 1; or the logs of other ranks are missing, so join all by colons"
    )
    return text + (reasons if finished else f"fairseq-generate was cut off, so run it again; or {reasons}")
