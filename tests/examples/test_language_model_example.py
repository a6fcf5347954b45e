"""examples/language_model: text of HTML pages, man pages and descriptions, its split, and a run of every stage."""

import gzip
import json
import random
import re
import shlex
from pathlib import Path

import building
import pytest
from packages import DPKG, write_command, write_deb
from result_tables import script

from ap_fairseq.model.checkpoints import load_checkpoint

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "language_model"

PAGE = """<html><head><title>No text</title></head><body><nav><p>Home page</p></nav>
<h1>Files &amp; folders</h1><p>A file<br>has a <em>name</em>.</p><pre>rm file</pre>
<ul><li>first item</li><li><p>second item</p></li></ul><p>12 &ndash; 13</p>
<table><tr><td>cell one<td>cell two</table>outside of any block</body></html>"""


def module(name: str):
    return script(EXAMPLE / f"{name}.py")


def test_lines_of_a_page_are_its_innermost_blocks():
    expected = ["Files & folders", "A file has a name.", "first item", "second item", "cell one", "cell two"]
    assert module("documentation").page_lines(PAGE) == expected


MAN = r"""
.de Vb
..
.TH LS 1
.SH NAME
ls \- list files
.PP
\fBls\fP lists
files.
.Vb 1
\&    ls code
.Ve
.PP
1, 2
.TP
.B \-a
all of them
"""


def test_lines_of_a_man_page_are_its_blocks(tmp_path):
    """Without code, also that of pod2man. Translations, links and pages in mdoc(7) are left out; HTML pages, too."""
    documentation, package = module("documentation"), tmp_path / "ls-doc"
    pages = {"man1/ls.1": MAN, "de/man1/ls.1": MAN, "man1/dir.1": ".so man1/ls.1\n", "man1/mdoc.1": ".Dd June\n.Sh A\n"}
    for name, text in pages.items():
        file = package / "usr/share/man" / f"{name}.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(text.encode()))
    (package / "usr/share/man/man1/link.1.gz").symlink_to("ls.1.gz")
    (package / "ls.html").write_text("<p>ls lists files.</p>", "utf-8")
    read = {name: lines for name, lines in documentation.read_package(package) if lines}
    lines = ["NAME", "ls - list files", "ls lists files.", "-a", "all of them"]
    assert read == {"ls-doc/usr/share/man/man1/ls.1.gz": lines}


def test_pages_of_a_package_without_man_pages_are_in_english(tmp_path):
    """Linux's documentation has translations, which were read as English."""
    documentation, package = module("documentation"), tmp_path / "linux-doc"
    for folder in ("admin", "translations/it_IT/admin"):
        (package / folder).mkdir(parents=True)
        (package / folder / "page.html").write_text(PAGE, "utf-8")
    assert [name for name, _ in documentation.read_package(package)] == ["linux-doc/admin/page.html"]


def test_a_description_is_a_document(tmp_path):
    """Of two releases, one description of a package counts."""
    stanza = "Package: abc\nDescription-md5: {0}\nDescription-en: editor {0}\n It reads\n files.\n .\n  * undo\n\n"
    (tmp_path / "Translation-en").write_text(stanza.format(1) + stanza.format(2), "utf-8")
    described = module("documentation").read_descriptions(tmp_path / "Translation-en")
    assert described == [("descriptions/abc", ["editor 2", "It reads files.", "undo"])]


def test_navigation_short_pages_and_repetitions_are_left_out(tmp_path):
    documentation, package = module("documentation"), tmp_path / "some-doc"
    package.mkdir()
    body = " ".join(f"word{k}" for k in range(60))
    for k in range(12):
        (package / f"{k:02}.html").write_text(f"<p>Next chapter</p><p>Page {k} says {body}</p>", "utf-8")
    (package / "copy.html").write_text(f"<p>Next chapter</p><p>Page 3 says {body}</p>", "utf-8")
    (package / "short.html").write_text("<p>Nothing here</p>", "utf-8")
    documents = documentation.filtered(documentation.read_package(package))
    assert [name for name, _ in documents] == [f"some-doc/{k:02}.html" for k in range(12)]
    assert documents[5].lines == [f"Page 5 says {body}"]
    splits = [building.split_of(f"some-doc/{k}", 1, documentation.SHARES) for k in range(2000)]
    assert splits == [building.split_of(f"some-doc/{k}", 1, documentation.SHARES) for k in range(2000)]
    assert 20 < splits.count("valid") < 60 and 20 < splits.count("test") < 60


def test_held_out_sentences_are_not_in_training():
    """Also where the paragraph, its case or punctuation is another; held-out documents stay whole."""
    documentation = module("documentation")
    own = {split: " ".join(f"{split}{k}" for k in range(60)) for split in ("train", "valid", "test")}
    shared = "This package holds the documentation of a small editor."
    of_valid = "Here are the headers that programs with the library need."
    splits = {
        "train": [
            documentation.Document("a/1", [own["train"], "Options", f"Read me. {shared.upper()}", of_valid]),
            documentation.Document("a/2", ["short", f"{shared} Then {own['train']}"]),
        ],
        "valid": [documentation.Document("b/1", [shared, of_valid, own["valid"]])],
        "test": [documentation.Document("c/1", ["Options", f"“{shared}”", own["test"]])],
    }
    test = list(splits["test"])
    kept, left_out = documentation.without_held_out(splits)
    assert kept["test"] == test
    assert kept["valid"] == [("b/1", [of_valid, own["valid"]])]
    assert kept["train"] == [("a/1", [own["train"], "Options"])]
    assert left_out == {"train": 3, "valid": 1, "test": 0}


def test_text_of_packages_and_descriptions(tmp_path, monkeypatch):
    """The whole of prepare.sh on packages in a folder, and what it says where they lack something."""
    documentation, folder = module("documentation"), tmp_path / "debs"
    folder.mkdir()
    write_command(tmp_path / "bin", "dpkg", DPKG)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    draw = random.Random(1)

    def text() -> str:
        return " ".join("".join(draw.choices("abcdefghij", k=5)) for _ in range(60))

    pages = {f"{k}.html": f"<p>{text()}</p><p>{text()}</p>".encode() for k in range(100)}
    manual = {f"usr/share/man/man1/{k}.1.gz": gzip.compress(f".TH A 1\n{text()}\n".encode()) for k in range(100)}
    write_deb(folder, "some-doc", pages)
    write_deb(folder, "tools", manual)
    write_deb(folder, "nothing", {"file": b"text"})
    flags = ["--out", str(tmp_path / "out"), "--deb-dir", str(folder), "--bpe-size", "100", "--packages", "some-doc"]
    with pytest.raises(SystemExit, match="has no file Translation-en; .* give --no-descriptions"):
        documentation.main(flags)
    stanzas = (f"Package: p{k}\nDescription-md5: {k}\nDescription-en: title\n {text()}\n\n" for k in range(100))
    (folder / "Translation-en").write_text("".join(stanzas), "utf-8")
    documentation.main([*flags, "tools"])
    counts = json.loads((tmp_path / "out" / "counts.json").read_text("utf-8"))
    documents = counts["documents"]
    for source, words in (("some-doc", 120), ("tools", 60), ("descriptions", 60)):
        assert sum(documents[split].get(source, 0) for split in documents) == 100
        assert sum(counts["words"][split].get(source, 0) for split in documents) == 100 * words
    for split, of_source in documents.items():
        lines = building.read_lines(tmp_path / "out" / "text" / f"{split}.txt")
        assert lines.count("") == sum(of_source.values()) > 0
        assert counts["split_words"][split] == sum(len(line.split()) for line in lines)
    assert (tmp_path / "out" / "data-bin" / "train.bin").exists()
    documentation.main([*flags, "--no-descriptions"])
    assert "descriptions" not in json.loads((tmp_path / "out" / "counts.json").read_text("utf-8"))["words"]["train"]
    with pytest.raises(SystemExit, match="no HTML page, man page or description of nothing has 50 words of text"):
        documentation.main([*flags, "nothing"])


APT_GET = r"""
lists=; for word; do case "$word" in Dir::State::lists=*) lists=${word#*=};; esac; done
case " $* " in
    *" update "*) printf 'Package: a\n' > "$lists/x_Translation-en";;
    *" download some-doc "*) cp "$DEBS"/some-doc_* .;;
esac
"""


def test_packages_and_descriptions_come_from_apt(tmp_path, monkeypatch):
    for folder in ("debs", "work"):
        (tmp_path / folder).mkdir()
    write_deb(tmp_path / "debs", "some-doc", {"page.html": PAGE.encode()})
    for name, text in (("apt-get", APT_GET), ("apt-cache", "exit 0"), ("helper", 'cat "$2"'), ("dpkg", DPKG)):
        write_command(tmp_path / "bin", name, text)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("DEBS", str(tmp_path / "debs"))
    documentation = module("documentation")
    monkeypatch.setattr(documentation.apt_lists, "APT_HELPER", str(tmp_path / "bin" / "helper"))
    counts = documentation.build_packages(tmp_path / "work", ["some-doc"], True, None)
    assert counts == {"packages": {"some-doc": "1:2-3"}}
    made = tmp_path / "work" / "packages"
    assert (made / "some-doc" / "page.html").exists()
    assert (made / "Translation-en").read_text("utf-8") == "Package: a\n"


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
    flags = ["--size", "small", "--updates", "16", "--block", "24", "--data-bin", str(tmp_path / "bin")]
    flags += ["--out", str(out), "--dropout", "0.9", "0", "--systems", *systems]
    program.main(flags)
    report = json.loads((out / "results.json").read_text("utf-8"))
    rows = {row["system"]: row for row in report["rows"]}
    assert re.fullmatch(r"CPU \(.+\), \d+ threads?", report["device"])
    assert report["block"] == 24
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
        assert args["task"]["tokens_per_sample"] == 24
        assert rows[name]["pruned"] == pytest.approx(0.5, abs=0.02)
        assert rows[name]["perplexity"] == pytest.approx(2 ** rows[name]["loss"], rel=1e-2)
    checkpoint = out / "dense.dropout-0" / "checkpoint_last.pt"
    before = checkpoint.stat().st_mtime
    program.main(flags)  # everything is done
    assert checkpoint.stat().st_mtime == before

    together = ["--size", "small", "--updates", "16", "--data-bin", str(tmp_path / "bin"), "--out", str(tmp_path / "2")]
    program.main([*together, "--jobs", "2", "--systems", systems[1]])  # it does not wait for the dense model
    report = json.loads((tmp_path / "2" / "results.json").read_text("utf-8"))
    assert [row["system"] for row in report["rows"]] == ["dense", systems[1]]


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
    with pytest.raises(SystemExit, match="--block 0: not a number of tokens from 1"):
        program.main(["--size", "small", "--block", "0"])
    with pytest.raises(SystemExit, match=r"--systems percentile.50.g64.scratch: .*leave out --granularity"):
        program.main(["--size", "small", "--systems", "percentile.50.g64.scratch"])
