"""What the examples share to build data: resumable steps, text files, SentencePiece, fairseq-preprocess.

Every step builds in a temporary folder, which is renamed when it is complete; ``counts.json`` is written last, so a
folder that has it is finished. A second run repeats only the steps whose options, inputs or code changed, and those
after them.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from segments import SEPARATOR_PIECE

SPLITS = ("train", "valid", "test")
SENTENCEPIECE_SPECIALS = 3  # <unk> <s> </s>
FAIRSEQ_SPECIALS = 4  # <s> <pad> </s> <unk>


class PrepareError(Exception):
    """Something that the user can put right; the message says how."""


# ---------------------------------------------------------------- files


def file_hash(*files: Path) -> str:
    """The first 16 digits of the SHA-256 of the files together."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def write_lines(file: Path, lines: Iterable[str]) -> None:
    with file.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(f"{line}\n" for line in lines)


def lines_of(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8", newline="\n") as stream:
        for line in stream:
            yield line.rstrip("\n")


def read_lines(file: Path) -> list[str]:
    return list(lines_of(file))


def write_json(file: Path, value: Any) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.rename(file)


# ---------------------------------------------------------------- SentencePiece and fairseq


def load_sentencepiece(model: Path):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def encode(processor, texts: Sequence[str]) -> list[list[str]]:
    return processor.encode(list(texts), out_type=str, num_threads=2)


def train_sentencepiece(
    model: Path, texts: Iterable[str], bpe_size: int, coverage: float, symbols: Sequence[str] = (SEPARATOR_PIECE,)
) -> None:
    """A joint BPE model whose fairseq dictionary has exactly ``bpe_size`` entries, fairseq's specials included.

    The text is not normalised, so that decoding gives back what was encoded; ``symbols`` are one piece each.
    """
    import sentencepiece

    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=written,
            model_type="bpe",
            vocab_size=bpe_size - FAIRSEQ_SPECIALS + SENTENCEPIECE_SPECIALS,
            character_coverage=coverage,
            normalization_rule_name="identity",
            user_defined_symbols=list(symbols),
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise PrepareError(f"SentencePiece cannot train with --bpe-size {bpe_size} on this text: {error}") from error
    model.write_bytes(written.getvalue())


def write_dictionary(file: Path, processor, frequency: Counter[str]) -> int:
    """fairseq's dict.txt: every piece and its frequency in training. Return its size, fairseq's specials included."""
    pieces = [processor.id_to_piece(index) for index in range(SENTENCEPIECE_SPECIALS, processor.get_piece_size())]
    write_lines(file, (f"{piece} {frequency[piece]}" for piece in pieces))
    return len(pieces) + FAIRSEQ_SPECIALS


def length_quantiles(lengths: Sequence[int]) -> dict[str, float]:
    """Of lengths in tokens, without the end-of-sentence token."""
    ordered = sorted(lengths)
    at = {f"p{percent}": ordered[round(percent / 100 * (len(ordered) - 1))] for percent in (10, 50, 90, 99)}
    return {
        "lines": len(ordered),
        "tokens": sum(ordered),
        "mean": round(statistics.fmean(ordered), 1),
        **at,
        "max": ordered[-1],
    }


def known_pieces(processor) -> frozenset[str]:
    return frozenset(map(processor.id_to_piece, range(SENTENCEPIECE_SPECIALS, processor.get_piece_size())))


def preprocess(
    pair: Sequence[str], folders: Mapping[str, Path], dictionary: Path, destination: Path, logs: Path, workers: int = 1
) -> None:
    """``fairseq-preprocess`` with one dictionary for all sides.

    folders: name -> folder with ``{train,valid,test}.<language>`` of pieces; each becomes ``destination/<name>``.
    workers: processes for each folder.
    """
    logs.mkdir(exist_ok=True)
    running = {}
    for name, folder in folders.items():
        # fmt: off
        command = [
            sys.executable, "-m", "fairseq_cli.preprocess",
            "--source-lang", pair[0], "--target-lang", pair[1],
            *(word for split in SPLITS for word in (f"--{split}pref", split)),
            "--srcdict", str(dictionary.absolute()), "--joined-dictionary",
            "--destdir", str((destination / name).absolute()), "--workers", str(workers),
        ]
        # fmt: on
        log = logs / f"preprocess-{name}.log"
        log.write_text(f"{shlex.join(command)}\n")
        with log.open("a") as stream:
            # All at once: most of their time is the import of fairseq.
            # In the folder of the text, as a comma in a prefix would separate two.
            running[log] = subprocess.Popen(command, cwd=folder, stdout=stream, stderr=subprocess.STDOUT)
    failed = {log: process.returncode for log, process in running.items() if process.wait()}
    for log, status in failed.items():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise PrepareError(f"fairseq-preprocess failed with exit status {status}; the end of {log}:\n{tail}")


def encode_text(
    work: Path, text: Mapping[str, Sequence[str]], bpe_size: int, suffix: str = ""
) -> tuple[int, dict[str, list[list[str]]]]:
    """``spm.model``, ``dict.txt`` and ``bpe/SPLIT`` + suffix of text by split.

    Return the size of the dictionary, and the pieces of each line by split.
    """
    train_sentencepiece(work / "spm.model", filter(None, text["train"]), bpe_size, 0.9995)
    processor = load_sentencepiece(work / "spm.model")
    pieces = {split: encode(processor, lines) for split, lines in text.items()}
    (work / "bpe").mkdir()
    for split, lines in pieces.items():
        write_lines(work / "bpe" / f"{split}{suffix}", map(" ".join, lines))
    frequency = Counter(piece for line in pieces["train"] for piece in line)
    return write_dictionary(work / "dict.txt", processor, frequency), pieces


def preprocess_text(folder: Path, destination: Path, suffix: str = "", dictionary: Path | None = None) -> None:
    """``fairseq-preprocess --only-source`` of ``{train,valid,test}SUFFIX``; without a dictionary it makes one."""
    # fmt: off
    command = [
        sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", "--destdir", str(destination.absolute()),
        *(word for split in SPLITS for word in (f"--{split}pref", f"{split}{suffix}")), "--workers", "1",
        *(["--srcdict", str(dictionary.absolute())] if dictionary else []),
    ]
    # fmt: on
    done = subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-5:])
        raise PrepareError(f"{shlex.join(command)} failed with exit status {done.returncode}:\n{tail}")


def split_of(name: str, seed: int, shares: Mapping[str, float]) -> str:
    """A split, from a hash of the name alone: those of *shares* have these shares, the rest is train."""
    draw = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") / 2**64
    for split, share in shares.items():
        if draw < share:
            return split
        draw -= share
    return "train"


# ---------------------------------------------------------------- steps


class Step(NamedTuple):
    """One resumable step. ``build(folder)`` makes the products in an empty folder and returns its counts."""

    name: str
    products: tuple[str, ...]
    options: dict[str, Any]
    build: Callable[[Path], dict[str, Any]]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _forget(out: Path, steps: Sequence[Step]) -> None:
    """Remove the markers and products of steps, ``counts.json`` first."""
    (out / "counts.json").unlink(missing_ok=True)
    for step in steps:
        (out / ".steps" / f"{step.name}.json").unlink(missing_ok=True)
        for product in step.products:
            _remove(out / product)


def run_steps(out: Path, steps: Sequence[Step]) -> dict[str, Any]:
    """Run the steps that are not done yet, in order, and return the counts of all.

    A step is done when its marker in ``out/.steps`` holds its options and its products exist. Before a step runs, the
    markers and products of it and of all later steps go, ``counts.json`` first: whatever interrupts the run, no product
    of old options is left beside new ones.
    """
    markers = out / ".steps"
    work = out / ".work"
    counts: dict[str, Any] = {}
    for number, step in enumerate(steps, 1):
        marker = markers / f"{step.name}.json"
        done = json.loads(marker.read_text("utf-8")) if marker.exists() else None
        if done and done["options"] == step.options and all((out / product).exists() for product in step.products):
            print(f"progress: {number} / {len(steps)} steps, {step.name} done before")
            counts.update(done["counts"])
            continue
        if done:
            before, now = done["options"], step.options
            changed = (name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name))
            values = [f"{name}: {before.get(name)} -> {now.get(name)}" for name in changed]
            print(f"{step.name}: again ({'; '.join(values) or 'its products are gone'})")
        _forget(out, steps[number - 1 :])
        _remove(work)
        work.mkdir()
        start = time.monotonic()
        step_counts = step.build(work)
        for product in step.products:
            (work / product).rename(out / product)
        shutil.rmtree(work)
        seconds = round(time.monotonic() - start, 1)
        step_counts = {**step_counts, f"seconds_{step.name}": seconds}
        write_json(marker, {"options": step.options, "counts": step_counts})
        print(f"progress: {number} / {len(steps)} steps, {step.name} {seconds} s")
        counts.update(step_counts)
    return counts


def versions() -> dict[str, str]:
    named = {name: importlib.metadata.version(name) for name in ("sentencepiece", "torch")}
    fairseq = importlib.metadata.packages_distributions()["fairseq"][0]
    return {"python": platform.python_version(), **named, fairseq: importlib.metadata.version(fairseq)}


def open_folder(out: Path) -> None:
    """Make the output folder; refuse one with other contents, because steps delete what they are about to make."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not (out / ".steps").is_dir():
            raise PrepareError(f"{out} is not empty and holds no data of this program: choose another folder")
        (out / ".steps").mkdir(exist_ok=True)
    except OSError as error:
        raise PrepareError(f"cannot write to {out}: {error}") from error


def build(out: Path, steps: Sequence[Step], options: Mapping[str, Any]) -> dict[str, Any]:
    """Run the steps in ``out`` unless another run is working there; return what ``counts.json`` holds.

    options: of the command line, for the record.
    """
    open_folder(out)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PrepareError(f"another run is working in {out}: wait for it, or choose another folder") from error
        counts = run_steps(out, steps)
        finished = out / "counts.json"
        if not finished.exists():
            plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
            record = {"options": plain, "versions": versions()}
            write_json(finished, {**record, **counts})
        return json.loads(finished.read_text("utf-8"))


# ---------------------------------------------------------------- prepare.sh


def prepare_parser(description: str, out: str, bpe_size: int) -> argparse.ArgumentParser:
    """The parser of a ``prepare.sh``, with the options that all of them have.

    out: the default output folder, for the help.
    """
    parser = argparse.ArgumentParser(prog="prepare.sh", description=description)
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help=f"output folder (default: {out} beside prepare.sh)")
    add("--bpe-size", type=int, default=bpe_size, metavar="N", help="entries of the dictionary (default: %(default)s)")
    add("--deb-dir", type=Path, metavar="DIR", help="folder with the Debian packages, used instead of apt")
    add("--seed", type=int, default=1, metavar="N", help="of the split into train, valid and test (default: 1)")
    return parser


def add_page_tokens(parser: argparse.ArgumentParser) -> None:
    """The option of corpora that have documents, too."""
    help = "longest document, in tokens per side (default: %(default)s)"
    parser.add_argument("--page-tokens", type=int, default=1000, metavar="N", help=help)


def make_absolute(args: argparse.Namespace) -> None:
    """Make the paths of a command line absolute, because programs run in other folders."""
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, value.absolute())


def require_least(parser: argparse.ArgumentParser, args: argparse.Namespace, **least: int) -> None:
    """Refuse numbers that are too small; None stays."""
    for name, number in least.items():
        if getattr(args, name) is not None and getattr(args, name) < number:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least {number}")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace, out: Path, **least: int) -> None:
    """Refuse numbers that are too small, and make all paths absolute, because programs run in other folders.

    out: the default output folder.
    """
    args.out = args.out or out
    require_least(parser, args, bpe_size=100, **least)
    coverage = getattr(args, "character_coverage", 1.0)
    if not 0.9 <= coverage <= 1:
        parser.error(f"--character-coverage is {coverage}, expected between 0.9 and 1")
    make_absolute(args)


def prepare(args: argparse.Namespace, steps_of: Callable[[argparse.Namespace], Sequence[Step]]) -> dict[str, Any]:
    """Build ``args.out`` and return what ``counts.json`` holds."""
    missing = [name for name in ("sentencepiece", "fairseq") if importlib.util.find_spec(name) is None]
    if missing:
        raise PrepareError(
            f"{sys.executable} has no module {' and no '.join(missing)}: activate the environment in which "
            "ap-fairseq is installed, or install it there (`python3 -m pip install -e .` in the repository root)"
        )
    return build(args.out, steps_of(args), vars(args))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a ``prepare.sh`` with one line for what the user can put right; a decorator of its ``main``."""
    try:
        yield
    except PrepareError as error:
        sys.exit(f"prepare.sh: error: {error}")
