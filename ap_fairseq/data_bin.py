"""Folders that ``fairseq-preprocess`` made: whether their files are whole, before fairseq reads them unchecked."""

from __future__ import annotations

import glob
import struct
from pathlib import Path

import numpy as np
from fairseq import tasks, utils
from fairseq.data import Dictionary, indexed_dataset
from fairseq.tasks import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.tasks.masked_lm import MaskedLMTask
from fairseq.tasks.sentence_prediction import SentencePredictionTask
from fairseq.tasks.translation import TranslationTask

from ap_fairseq.files import ArtifactError
from ap_fairseq.provenance import dictionary_files

_HEADER = struct.Struct("<9sQBQ")  # of an index: its format, version, the type of a token, and how many sentences
_CHECKED = TranslationTask, LanguageModelingTask, MaskedLMTask, SentencePredictionTask


def load_dictionary(kind: type[Dictionary], file) -> Dictionary:
    """Return the dictionary of a file, as *kind*.

    Raises:
        ArtifactError: if it is damaged.
    """
    try:
        return kind.load(str(file))
    except OSError:
        raise
    except Exception as error:  # fairseq raises no more special one for what is not UTF-8, and may not name the file
        raise ArtifactError(f"{file} is damaged: {error}; copy the data-bin again") from error


def setup_task(cfg, **options) -> FairseqTask:
    """Return fairseq's task of a configuration, whose dictionaries it loads.

    Raises:
        ArtifactError: if one of them is damaged.
    """
    try:
        return tasks.setup_task(cfg, **options)
    except Exception:
        for file in dictionary_files(utils.split_paths(cfg.data)[0]):
            load_dictionary(Dictionary, file)
        raise


def require_whole(folder, subset: str, task: FairseqTask) -> None:
    """Raise ArtifactError if a file of a subset is damaged, or has tokens that the dictionaries of *task* have not."""
    for index in sorted(Path(folder).glob(f"{glob.escape(subset)}.*idx")):
        if not index.with_suffix(".bin").exists():
            raise ArtifactError(f"{index.with_suffix('.bin')} is missing beside its index; copy the data-bin again")
        kind = indexed_dataset.infer_dataset_impl(str(index.with_suffix("")))
        if kind is None:
            raise ArtifactError(f"{index} is damaged: it does not begin as an index; copy the data-bin again")
        if kind != "mmap":  # which fairseq-preprocess makes; others are left to fairseq
            continue
        with open(index, "rb") as stream:
            try:
                *_, code, n = _HEADER.unpack(stream.read(_HEADER.size))
                token = np.dtype(indexed_dataset._code_to_dtype[code])
                lengths, begins = (np.fromfile(stream, dtype, n) for dtype in (np.int32, np.int64))
            except (KeyError, MemoryError, OverflowError, ValueError, struct.error) as error:
                raise ArtifactError(f"{index} is damaged: {error}; copy the data-bin again") from error
        if len(begins) < n:
            raise ArtifactError(f"{index} is cut off, it has less than its {n:,} sentences; copy the data-bin again")
        end = int((begins + lengths.astype(np.int64) * token.itemsize).max(initial=0))
        _require_tokens(index.with_suffix(".bin"), token, end, _dictionary(index, subset, task))


def _dictionary(index: Path, subset: str, task: FairseqTask) -> Dictionary | None:
    """Return the dictionary of the tokens of a file, if the task has one for its language."""
    if not isinstance(task, _CHECKED):
        return None
    if index.stem == subset:  # text of one language
        return task.source_dictionary
    source, target = (getattr(task.cfg, name, None) for name in ("source_lang", "target_lang"))
    return {source: task.source_dictionary, target: task.target_dictionary}.get(index.stem.rpartition(".")[2])


def _require_tokens(file: Path, token: np.dtype, end: int, dictionary: Dictionary | None) -> None:
    if not end:
        raise ArtifactError(f"{file} has no sentences; name another subset, or binarise its text again")
    size = file.stat().st_size
    if size != end:
        raise ArtifactError(
            f"{file} has {size:,} bytes, its index says {end:,}: it is damaged, or of other text; copy the data-bin "
            "again"
        )
    if dictionary is not None:
        largest = int(np.memmap(file, token, mode="r", shape=end // token.itemsize).max())
        if largest >= len(dictionary):
            raise ArtifactError(
                f"{file} has the token {largest}, its dictionary {len(dictionary):,} symbols: they were not made "
                "together; make both anew with fairseq-preprocess"
            )
