"""examples/language_model: text of HTML pages, its split, and a run of every stage."""

import importlib.util
import json
import random
import re
import shlex
import sys
from pathlib import Path

import building
import pytest

from ap_fairseq.model.checkpoints import load_checkpoint

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "language_model"

PAGE = """<html><head><title>No text</title></head><body><nav><p>Home page</p></nav>
<h1>Files &amp; folders</h1><p>A file<br>has a <em>name</em>.</p><pre>rm file</pre>
<ul><li>first item</li><li><p>second item</p></li></ul><p>12 &ndash; 13</p>
<table><tr><td>cell one<td>cell two</table>outside of any block</body></html>"""


def module(name: str):
    sys.path.insert(0, str(EXAMPLE))
    try:
        spec = importlib.util.spec_from_file_location(f"language_model_{name}", EXAMPLE / f"{name}.py")
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded
        spec.loader.exec_module(loaded)
        return loaded
    finally:
        sys.path.remove(str(EXAMPLE))


def test_lines_of_a_page_are_its_innermost_blocks():
    expected = ["Files & folders", "A file has a name.", "first item", "second item", "cell one", "cell two"]
    assert module("documentation").page_lines(PAGE) == expected


def test_navigation_short_pages_and_repetitions_are_left_out(tmp_path):
    documentation, package = module("documentation"), tmp_path / "some-doc"
    package.mkdir()
    body = " ".join(f"word{k}" for k in range(60))
    for k in range(12):
        (package / f"{k:02}.html").write_text(f"<p>Next chapter</p><p>Page {k} says {body}</p>", "utf-8")
    (package / "copy.html").write_text(f"<p>Next chapter</p><p>Page 3 says {body}</p>", "utf-8")
    (package / "short.html").write_text("<p>Nothing here</p>", "utf-8")
    documents = documentation.documents_of(package)
    assert [name for name, _ in documents] == [f"some-doc/{k:02}.html" for k in range(12)]
    assert documents[5][1] == [f"Page 5 says {body}"]
    splits = [building.split_of(f"some-doc/{k}", 1, documentation.SHARES) for k in range(2000)]
    assert splits == [building.split_of(f"some-doc/{k}", 1, documentation.SHARES) for k in range(2000)]
    assert 20 < splits.count("valid") < 60 and 20 < splits.count("test") < 60


def test_every_stage_runs(tmp_path, monkeypatch):
    """On sentences of a small grammar, given as --data-bin."""
    from plugin.commands import run, sentence_pairs

    text = [pair[0] for pair in sentence_pairs(400, seed=1)]
    random.Random(1).shuffle(text)
    for split, part in (("train", text[:300]), ("valid", text[300:350]), ("test", text[350:])):
        (tmp_path / split).write_text("".join(f"{line}\n" for line in part), "utf-8")
    prefixes = [word for split in ("train", "valid", "test") for word in (f"--{split}pref", tmp_path / split)]
    run("fairseq-preprocess", "--only-source", *prefixes, "--destdir", tmp_path / "bin")

    program = module("run")
    size = program.Size(
        model="--arch transformer_lm --decoder-layers 1 --decoder-embed-dim 16 --decoder-input-dim 16 "
        "--decoder-output-dim 16 --decoder-ffn-embed-dim 16 --decoder-attention-heads 2",
        training="--optimizer adam --lr 1e-2 --max-tokens 512",
        block=16,
        updates=20,
        cpu=True,
    )
    monkeypatch.setattr(program, "Size", lambda **_: size)
    out = tmp_path / "run"
    systems = ["importance.50.g1.scratch", "mean.50.gdiagonal.gradual"]
    flags = ["--size", "small", "--updates", "16", "--data-bin", str(tmp_path / "bin"), "--out", str(out)]
    flags += ["--dropout", "0.9", "0", "--systems", *systems]
    program.main(flags)
    report = json.loads((out / "results.json").read_text("utf-8"))
    rows = {row["system"]: row for row in report["rows"]}
    assert re.fullmatch(r"CPU \(.+\), \d+ threads?", report["device"])
    assert list(rows) == ["dense.dropout-0", "dense.dropout-0.9", *systems]  # the better one is the baseline
    assert (
        rows["dense.dropout-0"]["pruned"]
        == rows["dense.dropout-0"]["change"]
        == 0
        < rows["dense.dropout-0.9"]["change"]
    )
    for name in systems:
        args = load_checkpoint(out / name / "checkpoint_best.pt")["cfg"]
        assert args["model"]["dropout"] == 0 and args["optimization"]["max_update"] == 16
        assert rows[name]["pruned"] == pytest.approx(0.5, abs=0.02)
        assert rows[name]["perplexity"] == pytest.approx(2 ** rows[name]["loss"], rel=1e-2)
    checkpoint = out / "dense.dropout-0" / "checkpoint_last.pt"
    before = checkpoint.stat().st_mtime
    program.main(flags)  # everything is done
    assert checkpoint.stat().st_mtime == before


def test_recipes_are_read_and_faults_named(capsys):
    program = module("run")
    import tomllib

    for name, table in tomllib.loads((EXAMPLE / "recipe.toml").read_text("utf-8")).items():
        size = program.Size(**table)
        assert "transformer_lm" in size.model and shlex.split(size.training), name
    with pytest.raises(SystemExit, match="--size large is unknown; there are full short small wikitext103"):
        program.main(["--size", "large"])
    with pytest.raises(SystemExit, match="--systems importance.100.g1.scratch: not CRITERION.PERCENT"):
        program.main(["--size", "small", "--systems", "importance.100.g1.scratch"])
    with pytest.raises(SystemExit, match="--updates 0: not a number of updates from 1"):
        program.main(["--size", "small", "--updates", "0"])
    with pytest.raises(SystemExit, match=r"--systems percentile.50.g64.scratch: .*leave out --granularity"):
        program.main(["--size", "small", "--systems", "percentile.50.g64.scratch"])
