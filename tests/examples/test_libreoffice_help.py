"""The corpus builder of examples/libreoffice_help, on small hand-made pages, catalogues and packages; no network."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import building
import forked
import page_mix
import parallel_text
import prepare
import pytest
import segments
from packages import DPKG, catalogue, contents, write_command, write_deb

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "libreoffice_help"


# ---------------------------------------------------------------- the whole builder

NOUNS = {"file": "Datei", "table": "Tabelle", "slide": "Folie", "sheet": "Blatt", "cell": "Zelle", "frame": "Rahmen"}
VERBS = {"Open": "Öffnen", "Close": "Schließen", "Print": "Drucken", "Move": "Verschieben", "Delete": "Löschen"}


def help_page(number: int, german: bool) -> str:
    """Page ``number``: a heading that all pages share, five paragraphs of its own, one that ten pages share, and on the
    held-out pages an interface string and a paragraph that training never sees."""
    lines = [f"<h1 id='h'>{'Beispiel' if german else 'Example'}</h1>"]
    for index, (english_verb, german_verb) in enumerate(VERBS.items()):
        english_noun, german_noun = list(NOUNS.items())[(number + index) % len(NOUNS)]
        english = f"{english_verb} {english_noun} {number} on page {index}…"
        lines.append(
            f"<p id='p{index}'>{f'{german_noun} {number} {german_verb}, Seite {index}…' if german else english}</p>"
        )
    lines.append(
        f"<p id='group'>{f'Gruppe {number // 10} von Seiten' if german else f'Group {number // 10} of pages'}</p>"
    )
    if is_held_out(number):
        lines.append(f"<p id='save'>{'Speichern unter' if german else 'Save as'}</p>")
        lines.append(f"<p id='held_out'>{'Nur hier und dort' if german else 'Only here and there'}</p>")
    return f'<html><body><div id="DisplayArea">{"".join(lines)}</div></body></html>'


def is_held_out(number: int) -> bool:
    return building.split_of(f"swriter/{number:03}", 1, prepare.SHARES) != "train"


@pytest.fixture(scope="module")
def deb_dir(tmp_path_factory):
    """The three packages that en-de needs: 150 help pages, two interface strings."""
    folder = tmp_path_factory.mktemp("debs")
    for package, language, german in (("en-us", "en-US", False), ("de", "de", True)):
        root = f"usr/share/libreoffice/help/{language}/text/swriter"
        pages = {f"{root}/{number:03}.html": help_page(number, german).encode() for number in range(150)}
        write_deb(folder, f"libreoffice-help-{package}", pages)
    messages = {"M\x04_Save as": "Speichern _unter", "N\x04%1 rows": "Zeilen"}
    write_deb(folder, "libreoffice-l10n-de", {"usr/lib/libreoffice/program/resource/de/sw.mo": catalogue(messages)})
    return folder


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A folder in front of PATH with a stand-in for dpkg."""
    folder = tmp_path / "bin"
    write_command(folder, "dpkg", DPKG)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def fake_data_bin(work, out, pair):
    """fairseq-preprocess takes seconds to start; the end-to-end test of the pipeline runs it."""
    (work / "data-bin").mkdir()
    (work / "data-bin" / "made").write_text((out / "dict.txt").read_text())
    return {}


@pytest.fixture
def run(tmp_path, deb_dir, commands, monkeypatch):
    """run(*options) -> counts.json, into ``tmp_path/out``; everything but fairseq-preprocess and the real dpkg."""
    monkeypatch.setattr(parallel_text, "build_data_bin", fake_data_bin)

    def run(*options, deb_dir=deb_dir):
        arguments = ["--out", str(tmp_path / "out"), "--deb-dir", str(deb_dir), "--bpe-size", "150", *options]
        return building.prepare(prepare.parse_args(arguments), prepare.steps_of)

    return run


def test_sentence_level(run, tmp_path):
    """Files are parallel; no held-out text is in training, nor a valid text in test; training pairs are unique;
    interface strings are in training only, those with unequal placeholders nowhere; counts agree with the files."""
    counts = run()
    lines = {}
    for split in prepare.SPLITS:
        source, target, pages = (
            prepare.read_lines(tmp_path / "out/sentences" / f"{split}.{suffix}") for suffix in ("en", "de", "pages")
        )
        assert len(source) == len(target) == len(pages) == counts["split_pairs"][split] > 0
        lines[split] = list(zip(source, target, pages, strict=True))
        assert len({line[:2] for line in lines[split]}) == len(lines[split])
    keys = {
        split: [{parallel_text.match_key(line[side]) for line in lines[split]} for side in (0, 1)] for split in lines
    }
    for held_out, seen in (("test", "train"), ("valid", "train"), ("valid", "test")):
        for side in (0, 1):
            assert not keys[held_out][side] & keys[seen][side]
    assert [line[:2] for line in lines["train"] if line[2].startswith("interface/")] == [("Save as", "Speichern unter")]
    assert ("Example", "Beispiel") in [line[:2] for line in lines["train"]]
    page_names = {split: {line[2].split("\t")[0] for line in lines[split]} for split in lines}
    assert not page_names["test"] & page_names["train"]
    assert counts["pages"]["in_both_languages"] == 150
    assert counts["aligned_segments"] == 150 * 7 + 2 * sum(map(is_held_out, range(150)))
    assert counts["unique_pairs"] == 150 * 5 + 15 + 1 + 2  # own, of groups, of all pages, of held-out pages
    assert counts["interface"]["placeholders"] == 1
    assert counts["packages"]["libreoffice-help-de"] == "1:2-3"
    assert counts["options"]["bpe_size"] == 150


def test_page_level(run, tmp_path):
    """Documents keep to the limit, in tokens of what SentencePiece makes of their raw text; splitting the raw text at
    the separator gives the segments that the map points to; decoding gives back the raw text; a page of training is
    whole."""
    run("--page-tokens", "60")
    out = tmp_path / "out"
    processor = building.load_sentencepiece(out / "spm.model")
    records = [json.loads(line) for line in prepare.read_lines(out / "segments.jsonl")]
    pages = {record["page"]: record["pairs"] for record in records}
    documents = 0
    for split in prepare.SPLITS:
        spans = [line.split("\t") for line in prepare.read_lines(out / "pages" / f"{split}.pages")]
        for side, language in enumerate(("en", "de")):
            raw = prepare.read_lines(out / "pages" / f"{split}.{language}")
            encoded = [line.split(" ") for line in prepare.read_lines(out / "bpe-pages" / f"{split}.{language}")]
            assert building.encode(processor, raw) == encoded
            assert [processor.decode(pieces) for pieces in encoded] == raw
            assert max(map(len, encoded)) <= 60
            for text, (page, first, count) in zip(raw, spans, strict=True):
                of_page = [pair[side] for pair in pages[page][int(first) : int(first) + int(count)]]
                assert text.split(f" {segments.SEPARATOR} ") == of_page
                documents += 1
        per_page = Counter()
        for page, _, count in spans:
            per_page[page] += int(count)
        assert per_page == {record["page"]: len(record["pairs"]) for record in records if record["split"] == split}
    assert documents > 2 * 150, "no page was cut: the test would not see a wrong limit"
    assert all(len(record["pairs"]) == 7 for record in records if record["split"] == "train")


def test_dictionary(run, tmp_path):
    """dict.txt and fairseq's four special symbols make --bpe-size entries, the separator is one, specials and
    duplicates are none, and every piece of the training text is in it."""
    assert run()["dictionary"] == 150
    entries = [line.split(" ") for line in prepare.read_lines(tmp_path / "out/dict.txt")]
    pieces = [piece for piece, _ in entries]
    assert len(pieces) == len(set(pieces)) == 150 - 4
    assert segments.SEPARATOR_PIECE in pieces
    assert not set(pieces) & {"<s>", "</s>", "<pad>", "<unk>"}
    used = Counter()
    for language in ("en", "de"):
        used.update((tmp_path / f"out/bpe-sentences/train.{language}").read_text("utf-8").split())
    assert used == {piece: int(frequency) for piece, frequency in entries if int(frequency)}


def test_same_input_same_output(run, tmp_path):
    """Two runs write the same bytes, the SentencePiece model included."""
    run()
    first = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    run()
    assert contents(tmp_path / "out") == first


def test_relative_folders(run, tmp_path, deb_dir, monkeypatch):
    """Folders relative to the working directory: dpkg runs in another folder and was once given such a path as is."""
    monkeypatch.chdir(tmp_path)
    run("--out", "here/out", deb_dir=os.path.relpath(deb_dir))
    assert (tmp_path / "here/out/counts.json").exists()


def test_second_run_repeats_nothing(run, tmp_path, capsys):
    """A finished folder is left as it is."""
    run()
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*") if file.name != ".lock"}
    capsys.readouterr()
    run()
    assert capsys.readouterr().out.count("done before") == 5
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps


def test_changed_option_repeats_what_depends_on_it(run, tmp_path, capsys):
    """A changed option is named with both values, its step and the later ones run again, the earlier ones do not, and
    the result is that of a fresh run."""
    run("--page-tokens", "60")
    capsys.readouterr()
    counts = run("--page-tokens", "90")
    report = capsys.readouterr().out
    assert report.count("done before") == 3
    assert "pages: again (page_tokens: 60 -> 90)" in report
    assert "data_bin done before" not in report
    assert counts["options"]["page_tokens"] == 90
    changed = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    run("--page-tokens", "90")
    assert contents(tmp_path / "out") == changed


@pytest.mark.parametrize(
    "step", ["build_packages", "build_text", "build_sentencepiece", "build_pages", "build_data_bin"]
)
def test_interrupted_run(run, tmp_path, monkeypatch, step):
    """A run that is interrupted in the middle of a step, after files were written, leaves no product of this or a later
    step and no counts.json, also where an older run had finished; the next run completes it."""
    run("--seed", "7")
    expected_steps = ["build_packages", "build_text", "build_sentencepiece", "build_pages", "build_data_bin"]
    products = [("packages",), ("sentences",), ("spm.model", "dict.txt"), ("pages",), ("data-bin",)]
    module = prepare if hasattr(prepare, step) else parallel_text
    done = getattr(module, step)

    def interrupted(*args):
        done(*args)
        raise KeyboardInterrupt

    if step == "build_packages":
        shutil.rmtree(tmp_path / "out/packages")  # its options cannot change without other packages
    monkeypatch.setattr(module, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--seed", "8")
    assert not (tmp_path / "out/counts.json").exists()
    for names in products[expected_steps.index(step) :]:
        for name in names:
            assert not (tmp_path / "out" / name).exists()
    monkeypatch.setattr(module, step, done)
    assert run("--seed", "8")["options"]["seed"] == 8
    resumed = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    run("--seed", "8")
    assert contents(tmp_path / "out") == resumed


def test_interrupted_between_products(run, tmp_path, monkeypatch):
    """Interrupted after one product of a step was put in place and before the next, the step counts as not done."""
    rename = Path.rename

    def interrupted(self, target):
        if Path(target).name == "dict.txt":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert (tmp_path / "out/spm.model").exists()
    assert not (tmp_path / "out/.steps/sentencepiece.json").exists()
    monkeypatch.setattr(Path, "rename", rename)
    run()
    assert (tmp_path / "out/dict.txt").exists()


# ---------------------------------------------------------------- errors


def prepare_sh(path: Path, *options: str) -> subprocess.CompletedProcess:
    """prepare.sh on a machine whose PATH holds only ``path``, in the Python environment of the tests."""
    write_command(path, "python3", f'exec "{sys.executable}" "$@"')
    dirname = path / "dirname"
    if not dirname.exists():
        dirname.symlink_to(shutil.which("dirname"))
    command = [shutil.which("bash"), str(EXAMPLE / "prepare.sh"), *options]
    return subprocess.run(command, env={"PATH": str(path)}, text=True, capture_output=True)


def test_without_apt(tmp_path):
    """Without apt-get, the message says so and names the packages, the command to get them and --deb-dir; nothing that
    looks finished is left."""
    write_command(tmp_path / "bin", "dpkg", "exit 0")
    done = prepare_sh(tmp_path / "bin", "de", "fr", "--out", str(tmp_path / "out"))
    packages = "libreoffice-help-de libreoffice-help-en-us libreoffice-help-fr libreoffice-l10n-de libreoffice-l10n-fr"
    assert done.returncode == 1
    assert done.stderr.startswith("prepare.sh: error: this machine has no apt-get")
    assert f"apt-get download {packages}" in done.stderr
    assert "--deb-dir" in done.stderr
    assert not (tmp_path / "out/counts.json").exists()
    assert not (tmp_path / "out/packages").exists()


def test_without_dpkg(tmp_path, deb_dir):
    """With the packages at hand but no dpkg, the message names dpkg as what to install."""
    done = prepare_sh(tmp_path / "bin", "--deb-dir", str(deb_dir), "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "this machine has no dpkg" in done.stderr
    assert "Install the package `dpkg`" in done.stderr


def test_without_python(tmp_path):
    """Without python3, the message says to activate the environment."""
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    command = [shutil.which("bash"), str(EXAMPLE / "prepare.sh")]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, text=True, capture_output=True)
    assert done.returncode == 1
    assert "no python3 on PATH; activate" in done.stderr


APT_CACHE = """
case "$1 $2" in
    "show libreoffice-help-xx"|"show libreoffice-l10n-xx") exit 100;;
    "show "*) exit 0;;
    "pkgnames libreoffice-help-") printf 'libreoffice-help-%s\\n' fr de common;;
esac
"""


def test_language_that_apt_does_not_offer(tmp_path):
    """A language without packages is named, with the missing packages and the languages on offer."""
    for name, script in (("apt-cache", APT_CACHE), ("apt-get", "exit 0"), ("dpkg", "exit 0")):
        write_command(tmp_path / "bin", name, script)
    done = prepare_sh(tmp_path / "bin", "en", "xx", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "no Debian package libreoffice-help-xx and no libreoffice-l10n-xx: language 'xx'" in done.stderr
    assert "apt offers help in: de fr\n" in done.stderr


def test_apt_with_empty_lists(tmp_path):
    """Where apt knows no package at all, the message asks for apt-get update instead of blaming the language."""
    for name, script in (("apt-cache", "exit 100"), ("apt-get", "exit 100"), ("dpkg", "exit 0")):
        write_command(tmp_path / "bin", name, script)
    done = prepare_sh(tmp_path / "bin", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "apt-get update" in done.stderr
    assert "is not offered" not in done.stderr


def test_failed_download(tmp_path):
    """A failing apt-get download is reported with its own words and exit status."""
    for name, script in (("apt-cache", "exit 0"), ("apt-get", "echo 'E: no route' >&2; exit 100"), ("dpkg", "exit 0")):
        write_command(tmp_path / "bin", name, script)
    done = prepare_sh(tmp_path / "bin", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "exit status 100: E: no route. Check the network" in done.stderr


def test_language_that_the_folder_lacks(run):
    """With --deb-dir, a missing package is named with its language and the command that gets it."""
    message = "no .deb file of libreoffice-help-fr libreoffice-l10n-fr.*`apt-get download libreoffice"
    with pytest.raises(building.PrepareError, match=message):
        run("en", "fr")


def test_two_versions_of_a_package(run, deb_dir, tmp_path):
    """Two versions of one package in --deb-dir: an error that names both, not a guess."""
    folder = tmp_path / "debs"
    shutil.copytree(deb_dir, folder)
    shutil.copy(next(folder.glob("libreoffice-help-de_*")), folder / "libreoffice-help-de_4%3a7.5.0-1_all.deb")
    with pytest.raises(building.PrepareError, match="2 versions of libreoffice-help-de: .*1%3a2-3.*7.5.0.*Keep one"):
        run(deb_dir=folder)


def test_damaged_package(run, deb_dir, tmp_path, capsys):
    """A package that dpkg cannot unpack is named and nothing of it stays; other packages are noticed as a change."""
    run()
    capsys.readouterr()
    folder = tmp_path / "debs"
    shutil.copytree(deb_dir, folder)
    next(folder.glob("libreoffice-l10n-de_*")).write_bytes(b"half a download")
    with pytest.raises(
        building.PrepareError, match="(?s)libreoffice-l10n-de_.* cannot be unpacked .*Download the package"
    ):
        run(deb_dir=folder)
    report = capsys.readouterr().out
    assert "packages: again (libreoffice-l10n-de: " in report
    assert "libreoffice-help-de" not in report
    assert not (tmp_path / "out/packages").exists()
    assert not (tmp_path / "out/counts.json").exists()


def test_foreign_output_folder(run, tmp_path):
    """A folder with other contents is refused, and its files stay."""
    (tmp_path / "out/pages").mkdir(parents=True)
    (tmp_path / "out/pages/mine.txt").write_text("keep")
    with pytest.raises(
        building.PrepareError, match="out is not empty and holds no data of this program: choose another"
    ):
        run()
    assert (tmp_path / "out/pages/mine.txt").read_text() == "keep"


def test_output_that_cannot_be_made(run, tmp_path):
    """An output path below a file is an error that names it."""
    (tmp_path / "out").write_text("a file")
    with pytest.raises(building.PrepareError, match="cannot write to .*out"):
        run()


def test_two_runs_at_once(run, tmp_path):
    """A second run in the same folder stops while the first one works."""
    run()
    with (tmp_path / "out/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(building.PrepareError, match="another run is working in"):
            run()


def test_dictionary_too_large(run):
    """A --bpe-size that the text cannot fill is an error that names it, with SentencePiece's own reason."""
    with pytest.raises(building.PrepareError, match="cannot train with --bpe-size 30000 on this text: .+"):
        run("--bpe-size", "30000")


def test_page_limit_below_every_segment(run):
    """A --page-tokens that no segment fits is an error that names it."""
    with pytest.raises(building.PrepareError, match="no train segment fits --page-tokens 1: all"):
        run("--page-tokens", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["de", "DE"], "source and target language are both 'de'"),
        (["en", "en-US"], "source and target language are both 'en'"),
        (["--page-tokens", "0"], "--page-tokens is 0, expected at least 1"),
        (["--bpe-size", "10"], "--bpe-size is 10, expected at least 100"),
        (["--character-coverage", "0.5"], "--character-coverage is 0.5, expected between 0.9 and 1"),
        (["--sub-set", "3"], "unrecognized arguments: --sub-set"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    """Arguments that make no sense are refused with their value."""
    with pytest.raises(SystemExit):
        prepare.parse_args(arguments)
    assert message in capsys.readouterr().err


def test_language_names():
    """pt_BR, pt-BR and pt-br are one language; in file names it has no hyphen, where fairseq splits the pair; English
    needs no interface package; the character coverage follows the scripts."""
    args = prepare.parse_args(["en", "pt_BR"])
    assert (args.source, args.target, args.out.name) == ("en", "pt-br", "en-pt_br")
    assert prepare.packages_of(("en", "pt-br")) == [
        "libreoffice-help-en-us",
        "libreoffice-help-pt-br",
        "libreoffice-l10n-pt-br",
    ]
    assert args.character_coverage == 1.0
    assert prepare.parse_args(["en", "ja"]).character_coverage == 0.9995


# ---------------------------------------------------------------- page level


def test_the_mix_holds_every_length_and_translates_the_same_text(run, tmp_path):
    """Chunks are runs of segments within the limit, in order and complete, and read back as raw text."""
    run("--page-tokens", "60")
    data, pair = tmp_path / "out", ("en", "de")
    pages = page_mix.read_pages(data, pair, "train")
    for limit in (0, 12, 25, 60):
        chunks = page_mix.cut(pages, limit)
        assert [(name, s) for name, segments in chunks for s in segments] == [
            (name, s) for name, segments in pages for s in segments
        ]
        for side in (0, 1):
            for (_, of_chunk), line in zip(chunks, page_mix.encoded(chunks, side), strict=True):
                assert len(line.split(" ")) <= limit or len(of_chunk) == 1
    assert len(page_mix.cut(pages, 12)) > len(page_mix.cut(pages, 25)) > len(pages)
    assert page_mix.cut(pages, 60) == pages
    for side, language in enumerate(pair):
        text = (data / "pages" / f"train.{language}").read_text("utf-8").splitlines()
        assert list(map(page_mix.raw, page_mix.encoded(pages, side))) == text


def test_the_mix_is_built_from_a_finished_corpus(run, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        page_mix.main([str(tmp_path / "nothing")])
    assert "holds no finished corpus" in capsys.readouterr().err
    run("--page-tokens", "60")
    commands = []
    monkeypatch.setattr(page_mix.subprocess, "run", lambda command, **_: commands.append(list(map(str, command))))
    page_mix.main([str(tmp_path / "out"), "--lengths", "12", "25"])
    mix, sizes = tmp_path / "out" / "mix", {}
    for name in ("valid", "test", "test1", "test2", "test3", "train"):
        stem = f"{name}.bpe" if name == "train" else name
        sizes[name] = {len((mix / f"{stem}.{side}").read_text("utf-8").splitlines()) for side in ("en", "de")}
        assert len(sizes[name]) == 1
        if name != "train":
            assert {len((mix / f"{name}.pages").read_text("utf-8").splitlines())} == sizes[name]
    assert max(sizes["test"]) < max(sizes["test3"])
    texts = [(mix / f"{name}.de").read_text("utf-8") for name in ("test", "test1", "test3")]
    whole = [text.replace(" <sep> ", "\n").splitlines() for text in texts]
    assert whole[0] == whole[1] == whole[2]
    assert "test.bpe,test1.bpe,test2.bpe,test3.bpe" in commands[0]


# ---------------------------------------------------------------- the recipe


def test_the_recipe_runs_from_the_packages_to_the_report(deb_dir, commands, tmp_path):
    """All stages of run.sh, for another direction than the default, with the options of prepare.sh."""
    run, data = tmp_path / "run", tmp_path / "data"
    options = ["--pair", "de", "en", "--size", "tiny", "--gpus", 0, "--systems", "importance", "window", "--jobs", 2]
    options += ["--data", data, "--out", run, "--deb-dir", deb_dir, "--bpe-size", 150, "--page-tokens", 60]
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    status = forked.call(forked.recipe, [EXAMPLE, "all", *options], tmp_path / "printed", environment)
    printed = (tmp_path / "printed").read_text()
    assert status == 0, printed
    document = json.loads((run / "results.json").read_text())
    names = ["dense.tuned", "dense", "importance.untuned", "importance.tuned", "window.untuned", "window.tuned"]
    assert [system["system"] for system in document["systems"]] == names
    budgets = [[share["effective"] for share in system["sparsity"].values()] for system in document["systems"][3::2]]
    assert min(budgets[0]) < 0.5 < max(budgets[0])  # one for all kinds
    assert budgets[1] == pytest.approx([0.5] * 3, abs=0.05)
    counts = json.loads((data / "counts.json").read_text())
    assert {system["sentences"] for system in document["systems"]} == {counts["split_pairs"]["test"]}
    assert (counts["options"]["source"], counts["options"]["page_tokens"]) == ("de", 60)
    assert (run / "report" / "report.html").stat().st_size > 10_000
    for stage in ("prepare", "dense.train", "dense.record", "window.tuned.generate.0"):
        assert f"{stage}: running" in printed
