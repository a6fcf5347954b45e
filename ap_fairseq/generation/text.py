"""Translate a text, one sentence a line, in parts that are files: a run that was cut goes on where it stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fairseq import utils
from torch.utils.data import default_convert

from ap_fairseq.data_bin import setup_task
from ap_fairseq.evaluation.hypotheses import hold_subwords
from ap_fairseq.files import (
    ArtifactError,
    UserError,
    atomic_output,
    file_sha256,
    read_json,
    require_file,
    write_json,
    write_text,
)
from ap_fairseq.generation.loading import checkpoint_files
from ap_fairseq.generation.ranks import Ranks
from ap_fairseq.generation.translator import Encoded, Found, LineBatch, Translator
from ap_fairseq.generation.workers import MAX_PENDING, Workers, spare_processes
from ap_fairseq.logs import lines_of
from ap_fairseq.provenance import dictionary_hashes, versions

logger = logging.getLogger(__name__)

PART_LINES = 2_000, 20_000  # the fewest, which a CPU takes minutes for, and the most: they fill large batches
PARTS = 16  # of a text, if parts have neither fewest nor most lines: several for each of many GPUs
MAX_HELPERS = 5  # on a GPU, beside the first worker: to read and write takes two to three times as long as to search
FIRST_SHARES = MAX_PENDING + 1  # of the first part of a process: calls that are made at once
SETTINGS = "translation.json"

# Options that do not change a translation, and the paths of what counts by its contents.
_IMMATERIAL = {"num_processes", "input", "output", "overwrite", "path", "data", "num_workers", "user_dir"}
_CUT = re.compile(r"line \d+ was cut")


@dataclass(frozen=True)
class Text:
    """A text file in parts.

    Attributes:
        path: the file, UTF-8; only a line feed ends a line.
        name: what messages call it.
        lines: how many it has.
        offsets: where each part begins, in bytes.
        digests: SHA-256 of the bytes of each part.
        part_lines: lines of a part; the last may have fewer.
    """

    path: Path
    name: str
    lines: int
    offsets: tuple[int, ...]
    digests: tuple[str, ...]
    part_lines: int

    @classmethod
    def scan(cls, path: Path, name: str, part_lines: int) -> Text:
        """Read a text once.

        Raises:
            ArtifactError: for a missing file, or a line that is not UTF-8.
        """
        require_file(path, "a text file with one sentence a line")
        offsets, parts, position, number = [], [], 0, 0
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ArtifactError(f"{name} line {number} is not UTF-8: {error}; convert the text") from error
                if (number - 1) % part_lines == 0:
                    offsets.append(position)
                    parts.append(hashlib.sha256())
                position += len(line)
                parts[-1].update(line)
        digests = tuple(part.hexdigest() for part in parts)
        return cls(path, name, number, tuple(offsets), digests, part_lines)

    def part(self, number: int) -> list[str]:
        """Return the lines of a part, without the white space around them.

        Raises:
            UserError: if the file is no longer as it was when it was scanned.
        """
        end = self.offsets[number + 1] if number + 1 < len(self.offsets) else None
        with open(self.path, "rb") as stream:
            stream.seek(self.offsets[number])
            content = stream.read() if end is None else stream.read(end - self.offsets[number])
        if hashlib.sha256(content).hexdigest() != self.digests[number]:
            raise UserError(f"{self.name} changed while it was translated; translate it anew, or restore it and go on")
        encoding = "utf-8" if number else "utf-8-sig"  # a byte order mark belongs to no line
        return [line.strip() for line in content.decode(encoding).removesuffix("\n").split("\n")]


def default_part_lines(path: Path, cpu: bool) -> int:
    """Return how many lines a part of a text has unless told; the number of processes may change, so not by that."""
    fewest, most = PART_LINES
    if cpu or not path.is_file():  # `Text.scan` says what is missing
        return fewest
    with open(path, "rb") as stream:
        lines = sum(1 for _ in itertools.islice(stream, PARTS * most))  # more change nothing
    return min(max(fewest, -(-lines // PARTS)), most)


class Share(NamedTuple):
    """What a worker reads of a part: one of equal shares.

    Attributes:
        part: its number.
        number, of: of the share, counted from 0, and how many there are.
        encoded: the lines of the whole part; None: nobody has encoded them.
    """

    part: int
    number: int = 0
    of: int = 1
    encoded: Encoded | None = None


def translate_text(args, cfg, text: Text, ranks: Ranks, folder: Path) -> list[Path]:
    """Translate a text with *ranks*, which load a Translator; parts that are in *folder* already are kept.

    Args:
        args: the options, as parsed by ``ap-generate``, which become the fingerprint of the parts.
        cfg: the same as fairseq's configuration.
        folder: of the parts, and the settings that they were made with.

    Returns:
        The files of the parts, in order.

    Raises:
        UserError: if the parts in *folder* were made with other settings, or a process fails.
    """
    task = setup_task(cfg.task)
    _require_same(settings(args, cfg, text, task), folder)
    parts = [folder / f"part{number:06}.txt" for number in range(len(text.offsets))]
    todo = [number for number, part in enumerate(parts) if not part.exists()]
    if len(todo) < len(parts):
        logger.info(f"{len(parts) - len(todo)} of {len(parts)} parts were translated before")
    if todo:
        _warn_of_subwords(text, task, cfg.bpe is not None)
        n = min(len(ranks), len(todo))
        ranks.run("translate", n, translate_parts, text, folder, todo, n)
        cut = sum(bool(_CUT.match(line)) for line in lines_of(*ranks.logs[:n]))
        if cut:
            logger.warning(f"{cut} lines were cut to the length that the model reads (--truncate-source)")
    return parts


def _warn_of_subwords(text: Text, task, has_bpe: bool) -> None:
    """Warn of words that nothing splits for a dictionary of subwords, and of subwords that are split again."""
    lines = text.part(0)
    if has_bpe and hold_subwords(lines):
        logger.warning(f"{text.name} has subwords (▁ or @@), of which --bpe makes subwords again; leave --bpe out")
    # One subword in ten of a dictionary is marked at least.
    if not has_bpe and hold_subwords(task.source_dictionary.symbols, 0.1) and not hold_subwords(lines, 0.1):
        logger.warning(
            f"the model reads subwords (▁ or @@), and {text.name} has none, so most of its words are unknown; say "
            "how to make them, with --bpe sentencepiece --sentencepiece-model FILE or --bpe subword_nmt "
            "--bpe-codes FILE"
        )


def translate_parts(rank: int, translator: Translator, text: Text, folder: Path, todo: list[int], ranks: int) -> None:
    """Translate the parts *todo*[rank::ranks] in one process, each into a file of *folder*."""
    parts = _Parts(translator, text, folder)
    processes = 1 + spare_processes(ranks, MAX_HELPERS, translator.cfg.common.cpu)
    with Workers(processes, encode=parts.encode, read=parts.read, write=parts.write) as workers:
        parts.translate(todo[rank::ranks], workers)


class _Parts:
    """Parts of a text, which workers read and write, and this process searches."""

    def __init__(self, translator: Translator, text: Text, folder: Path):
        self.translator, self.text, self.folder = translator, text, folder
        self.seed = translator.cfg.common.seed

    # -- in workers ---------------------------------------------------------------------------------------------------

    def encode(self, share: Share) -> Encoded:
        """Return the tokens of the lines of a share."""
        lines = self.text.part(share.part)
        begin, end = (len(lines) * k // share.of for k in (share.number, share.number + 1))
        first = 1 + share.part * self.text.part_lines + begin
        return self.translator.encode(lines[begin:end], self.text.name, first)

    def read(self, share: Share) -> list[LineBatch]:
        """Return the batches of a share; a part of empty lines has none, and is written at once."""
        encoded = self.encode(share) if share.encoded is None else share.encoded
        if share.number == 0 and not len(encoded.tokens):
            self.write(share.part, len(encoded.lengths), [])
        return self.translator.batches(share.part, encoded, share.number, share.of)

    def write(self, number: int, n_lines: int, found: list[Found]) -> None:
        """Write the file of a part."""
        lines = self.translator.decode(n_lines, found)
        write_text(self.folder / f"part{number:06}.txt", "".join(f"{line}\n" for line in lines))

    # -- here ---------------------------------------------------------------------------------------------------------

    def translate(self, numbers: list[int], workers: Workers) -> None:
        """Search the batches of the parts with these numbers, and let workers write each part that is done."""
        waiting: deque[LineBatch] = deque()  # whose samples the search has taken, and not yet searched

        def samples() -> Iterator[dict[str, Any]]:
            for batch in _batches(numbers, workers):
                waiting.append(batch)
                yield default_convert(batch.sample)

        found: list[Found] = []  # of a part
        done = 0
        for sample in self.translator.look_ahead(samples()):
            batch = waiting.popleft()
            if not found:  # sampling does not depend on what this process did before
                utils.set_torch_seed(self.seed + batch.part)
                torch.empty((), dtype=torch.int64).random_()  # as fairseq's loader: a seed samples what it always did
            hypotheses = self.translator.search(sample)
            found.append(Found(batch.lines, hypotheses.tokens, hypotheses.lengths))
            if batch.last:
                workers.submit("write", batch.part, batch.n_lines, found)
                found = []
                done = numbers.index(batch.part) + 1
                print(f"progress: {done} / {len(numbers)} parts", flush=True)
        if done < len(numbers):  # the last parts are empty
            print(f"progress: {len(numbers)} / {len(numbers)} parts", flush=True)


def _batches(numbers: list[int], workers: Workers) -> Iterator[LineBatch]:
    """Yield the batches of parts in order; nothing is searched while the first is read, so all workers share it."""
    shares = [Share(numbers[0], number, FIRST_SHARES) for number in range(FIRST_SHARES)]
    encoded = Encoded.join(piece for _, piece in workers.prefetch("encode", shares))
    shares = [share._replace(encoded=encoded) for share in shares]
    for _, batches in workers.prefetch("read", [*shares, *map(Share, numbers[1:])]):
        yield from batches


# -- what the parts were made with ------------------------------------------------------------------------------------


def settings(args, cfg, text: Text, task) -> dict[str, Any]:
    """Return everything that a translation depends on: files count by their contents, wherever they are."""
    options = {name: value for name, value in vars(args).items() if name not in _IMMATERIAL}
    for name, value in options.items():
        if isinstance(value, str) and os.path.isfile(value):  # such as --sentencepiece-model
            options[name] = file_sha256(value)
    saved = cfg.checkpoint
    files = checkpoint_files(cfg.common_eval.path, saved.checkpoint_suffix, saved.checkpoint_shard_count)
    document = {
        **options,
        "path": [file_sha256(file) for file in files],
        "dictionaries": dictionary_hashes(task),
        "input": hashlib.sha256("".join(text.digests).encode()).hexdigest(),
        "buffer_size": text.part_lines,
        "versions": versions(),
    }
    return json.loads(json.dumps(document, default=str))


def _require_same(now: dict[str, Any], folder: Path) -> None:
    """Store the settings of a new translation in *folder*; compare them with those of one that goes on."""
    path = folder / SETTINGS
    if not any(folder.glob("part*.txt")):  # there is nothing to keep
        write_json(path, now, overwrite=True)
        return
    if not path.exists():
        raise ArtifactError(
            f"{folder} holds parts of a translation and no {SETTINGS}, which says how they were made; remove {folder} "
            "to begin anew"
        )
    try:
        then = dict(read_json(path))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); remove {folder} to begin anew") from error
    if now.get("truncate_source") and then.get("truncate_source") is False:
        then["truncate_source"] = True  # parts made without it have no line to cut
        write_json(path, then, overwrite=True)
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{folder} holds parts of a translation with other settings: {flag} was {_short(then.get(name))} and "
                f"is {_short(now.get(name))} now; give it as before, or remove the folder to begin anew"
            )


def _short(value: Any) -> str:
    return f"SHA-256 {value[:12]}" if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)


# -- in and out -------------------------------------------------------------------------------------------------------


def spool_stdin(folder: Path) -> Path:
    """Write standard input to a file, which can be read in parts, and return that."""
    path = folder / "input"
    with atomic_output(path, overwrite=True) as temporary, open(temporary, "wb") as stream:
        shutil.copyfileobj(sys.stdin.buffer, stream)
    return path
