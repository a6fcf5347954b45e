"""bench_commands.py runs whole commands, which print one score."""

import json
import re
import sys

import bench_commands
import pytest
from plugin.commands import ROOT, run, run_process

SCRIPT = [sys.executable, ROOT / "scripts/bench_commands.py"]


def test_commands_are_timed_and_print_one_score(data_bin, dense, tmp_path):
    out = tmp_path / "rows.json"
    flags = ["--path", dense, "--cpu", "--subset", "valid", "--places", "0:2", "--remove-bpe", "subword_nmt"]
    printed = run_process(*SCRIPT, data_bin, *flags, "--max-tokens", 300, "--out", out)
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["command"], row["processes"], row["max_tokens"]) for row in report["rows"]] == [
        ("fairseq-generate", 1, 300),
        ("fairseq-generate --task pruned_translation", 1, 300),
        ("ap-generate", 2, 300),
        ("ap-generate --input", 2, 300),
    ]
    assert len({row["score"] for row in report["rows"]}) == len({row["sentences"] for row in report["rows"]}) == 1
    assert all(0 < row["cpu_seconds"] and row["sentences"] > 5 for row in report["rows"])
    assert all((row.get("search_seconds", 0) > 0) == (row["command"] == "ap-generate") for row in report["rows"])
    assert "| ap-generate" in printed and bench_commands.table(report) in printed


def test_ap_generate_is_timed_alone_where_asked(data_bin, dense, toy_text, tmp_path):
    """The score of ap-generate --input was another where references have unknown words: <unk>, printed as <<unk>>.

    And where --remove-bpe joined its lines a second time, without any space.
    """
    for language in ("en", "de"):
        text = (toy_text / f"valid.{language}").read_text(encoding="utf-8").replace("und ", "sowie ")
        (tmp_path / f"valid.{language}").write_text(re.sub(r"(\w+)", r"▁\1", text), encoding="utf-8")
        words = (data_bin / f"dict.{language}.txt").read_text(encoding="utf-8")
        words = re.sub(r"^(?=.)", "▁", words, flags=re.MULTILINE)
        (tmp_path / f"dict.{language}.txt").write_text(words, encoding="utf-8")
    dictionaries = ["--srcdict", tmp_path / "dict.en.txt", "--tgtdict", tmp_path / "dict.de.txt"]
    data = ["--validpref", tmp_path / "valid", "--destdir", tmp_path / "data-bin"]
    run("fairseq-preprocess", "-s", "en", "-t", "de", *dictionaries, *data)
    out = tmp_path / "rows.json"
    flags = ["--path", dense, "--cpu", "--subset", "valid", "--only-ap-generate", "--max-tokens", 300, 900]
    run_process(*SCRIPT, tmp_path / "data-bin", *flags, "--out", out)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(row["command"], row["max_tokens"]) for row in rows] == [
        ("ap-generate", 300),
        ("ap-generate", 900),
        ("ap-generate --input", 300),
        ("ap-generate --input", 900),
    ]
    assert len({row["score"] for row in rows}) == 1


def test_ctranslate2_is_timed_with_its_score(data_bin, dense, tmp_path):
    pytest.importorskip("ctranslate2")
    out = tmp_path / "rows.json"
    flags = ["--path", dense, "--cpu", "--only-ap-generate", "--remove-bpe", "subword_nmt", "--rivals", "ctranslate2"]
    run_process(*SCRIPT, data_bin, *flags, "--workers", 1, "--out", out)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(row["command"], row["max_tokens"]) for row in rows] == [
        ("ap-generate", 12000),
        ("ap-generate --input", 12000),
        ("CTranslate2, 1 workers", 16384),
        ("CTranslate2, 1 workers", 65536),
    ]
    assert len({row["score"] for row in rows}) == 1


def refused(flags, monkeypatch, capsys) -> str:
    """What the program says when it ends with an error."""
    monkeypatch.setattr(sys, "argv", ["bench_commands.py", *map(str, flags)])
    with pytest.raises(SystemExit, match="2"):
        bench_commands.main()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--places", "2"], "'2' is not GPUS:PROCESSES, such as 2:4"),
        (["--places", "0:0"], "'0:0' is not GPUS:PROCESSES"),
        (["--cpu", "--places", "0:1", "3:1"], "--places: 3 GPUs, 0 are here"),
    ],
)
def test_places_that_are_not_there_are_refused(flags, message, tmp_path, monkeypatch, capsys):
    flags = ["data", "--path", "dense.pt", "--out", tmp_path / "rows.json", *flags]
    assert message in refused(flags, monkeypatch, capsys)


def test_a_command_that_fails_ends_the_run_and_is_shown(data_bin, dense, tmp_path, monkeypatch, capsys):
    flags = [data_bin, "--path", dense, "--cpu", "--subset", "none", "--out", tmp_path / "rows.json"]
    assert "failed with status" in refused(flags, monkeypatch, capsys)


def test_commands_keep_the_byte_code_of_what_they_import(monkeypatch):
    """Where the environment said not to, half of a command's start went into compiling torch's sources."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    _, printed = bench_commands.measure([sys.executable, "-c", "import sys; print(sys.dont_write_bytecode)"], gpus=0)
    assert printed == "False\n"
