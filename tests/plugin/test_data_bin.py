"""Files of a data-bin folder are checked before fairseq reads them."""

import re
import shutil

import numpy as np
import pytest
from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import OmegaConf

from ap_fairseq.data_bin import require_whole, setup_task
from ap_fairseq.files import ArtifactError


def _index(code: int, n: int, *numbers: np.ndarray) -> bytes:
    content = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + code.to_bytes(1, "little") + n.to_bytes(8, "little")
    return content + b"".join(array.tobytes() for array in numbers)


ONE = np.array([2], np.int32), np.array([0], np.int64)  # sentence of two tokens

CASES = {
    "no index": (b"x" * 50, b"", "is damaged: it does not begin as an index"),
    "an empty index": (b"", b"", "is damaged: it does not begin as an index"),
    "half of a header": (_index(8, 1)[:12], b"", "is damaged: unpack requires a buffer of 26 bytes"),
    "an unknown type": (_index(77, 1, *ONE), b"", "is damaged: 77"),
    "half of an index": (_index(8, 2, *ONE), b"", "is cut off, it has less than its 2 sentences"),
    "more than any disk": (_index(8, 1 << 62, *ONE), b"", "is "),
    "half of a text": (_index(8, 1, *ONE), b"12", "has 2 bytes, its index says 4: it is damaged, or of other text"),
    "another text": (_index(8, 1, *ONE), b"123456", "has 6 bytes, its index says 4"),
    "no sentence": (_index(8, 0), b"", "has no sentences; name another subset"),
    "another dictionary": (_index(8, 1, *ONE), b"\2\0\4\0", "has the token 4, its dictionary 4 symbols"),
}


@pytest.mark.parametrize(("index", "text", "message"), CASES.values(), ids=CASES)
def test_damaged_files_are_named(tmp_path, index, text, message):
    task = TranslationTask(TranslationConfig(source_lang="en", target_lang="de"), Dictionary(), Dictionary())
    (tmp_path / "test.en-de.en.idx").write_bytes(index)
    (tmp_path / "test.en-de.en.bin").write_bytes(text)
    with pytest.raises(ArtifactError, match=rf"test\.en-de\.en\.(idx|bin) .*{re.escape(message)}"):
        require_whole(tmp_path, "test", task)
    require_whole(tmp_path, "valid", task)


def test_whole_files_pass(data_bin, tmp_path):
    """Also in formats of fairseq's that are not checked."""
    dictionaries = (Dictionary.load(str(data_bin / f"dict.{language}.txt")) for language in ("en", "de"))
    task = TranslationTask(TranslationConfig(source_lang="en", target_lang="de"), *dictionaries)
    for name in ("train", "valid", "test"):
        require_whole(data_bin, name, task)
    (tmp_path / "test.en-de.en.idx").write_bytes(b"TNTIDX\0\0")
    (tmp_path / "test.en-de.en.bin").write_bytes(b"")
    require_whole(tmp_path, "test", task)


def test_a_damaged_dictionary_is_named_by_each_task(data_bin, tmp_path):
    """Those of fairseq's own tasks, too, which did not say which file is damaged."""
    for file in data_bin.glob("dict.*.txt"):
        shutil.copy(file, tmp_path)
    settings = {"_name": "translation", "data": str(tmp_path), "source_lang": "en", "target_lang": "de"}
    config = OmegaConf.create({**vars(TranslationConfig()), **settings})
    assert len(setup_task(config).source_dictionary) > 4
    (tmp_path / "dict.de.txt").write_text("a b\n", "utf-8")
    with pytest.raises(ArtifactError, match=r"dict\.de\.txt is damaged: Incorrect dictionary format.*; copy the data-"):
        setup_task(config)
    config.data = str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        setup_task(config)
