"""The recipes: every stage of every data set, on a mirror of archives with the real names and layout, on the CPU."""

import argparse
import hashlib
import http.server
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import building
import corpora
import downloads
import environment
import forked
import mirror
import pytest
import recipe as recipe_program
import sacrebleu.dataset.base
from building import PrepareError
from downloads import Archive, fetch
from fairseq import options
from fairseq.models import ARCH_MODEL_REGISTRY
from sentences import write_pages

from ap_fairseq.experiments.stages import Stages
from ap_fairseq.files import ArtifactError
from ap_fairseq.pruning.flags import budget_flags, parse_mask_flags
from ap_fairseq.search.generator import FALLBACK

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "examples"

DATA_SETS = ("wmt14_en_de", "wmt14_en_fr", "iwslt14_de_en", "iwslt17_documents")
STAGES = ("prepare", "train_dense", "record", "prune", "train_pruned", "evaluate", "report")


@pytest.fixture(scope="session")
def data_mirror(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mirror")
    mirror.build_mirror(folder)
    return folder


@pytest.fixture
def recipe(data_mirror, tmp_path):
    """recipe(data set, stage, *options) runs a stage of a data set as its run.sh does; returns what it printed."""

    def run(data_set, stage, *options, expect=0):
        folders = [
            "--data",
            tmp_path / "the data, ü",
            "--archives",
            tmp_path / "archives",
            "--out",
            tmp_path / "run's folder",
        ]
        words = [EXAMPLES / data_set, stage, "--size", "tiny", "--gpus", 0, "--jobs", 2, *folders, *options]
        mirrored = {"AP_DATA_MIRROR": data_mirror.as_uri(), "AP_DATA_CHECKSUMS": str(data_mirror / "SHA256SUMS")}
        status = forked.call(forked.recipe, words, tmp_path / "printed", {**mirrored, "OMP_NUM_THREADS": "1"})
        printed = (tmp_path / "printed").read_text()
        logs = "".join(f"\n{log}:\n{log.read_text()[-1500:]}" for log in tmp_path.glob("run's folder/logs/*.log"))
        assert status == expect, printed + logs
        return printed

    return run


@pytest.mark.parametrize("data_set", ["wmt14_en_de", "iwslt17_documents"])  # the others differ in their text
def test_all_stages(recipe, tmp_path, data_set):
    """What is done is not done again; the results have all systems and signatures. One recipe stage by stage.

    Folders have spaces, a quote, a comma and an umlaut in their names: fairseq-preprocess splits prefixes at commas.
    """
    sentences = data_set == "wmt14_en_de"
    options = ["--bpe-size", 600, "--metrics", "bleu", "chrf", "ter"]
    if sentences:
        options += ["--valid-every", 20, "--tokenized-bleu", "--sample", 100, "--scratch"]
    for stage in STAGES if sentences else ["all"]:
        assert (": running, log in" in recipe(data_set, stage, *options)) == (stage != "report")
    run, data = tmp_path / "run's folder", tmp_path / "the data, ü"
    again = "".join(recipe(data_set, stage, *options) for stage in STAGES[:-2])
    assert "running" not in again and again.count("done before") >= 10
    document = json.loads((run / "results.json").read_text())
    ways = ["untuned", "tuned", "scratch"] if sentences else ["untuned", "tuned"]
    names = ["dense.tuned", "dense", *(f"per-kind.{way}" for way in ways)]
    assert [system["system"] for system in document["systems"]] == names
    counts = json.loads((data / "counts.json").read_text())
    for system in document["systems"]:
        assert {"bleu_signature", "chrf_signature", "ter_signature", "checkpoint_sha256"} <= system.keys()
        lines = counts["documents"]["test"]["documents"] if "documents" in counts else counts["text_pairs"]["test"]
        assert system["sentences"] == lines
    stages = {"prepare", "dense.train", "dense.tune", "per-kind.masks", "per-kind.tuned.generate.0"}
    assert stages <= document["seconds"].keys()
    for system in names:  # fairseq's own search took the pruned models, too, several times as long on a GPU
        log = (run / "logs" / f"{system}.generate.0.log").read_text()
        assert (FALLBACK in log) == system.startswith("dense")
    shares = {kind: share["effective"] for kind, share in document["systems"][3]["sparsity"].items()}
    assert len(shares) == 3 and shares == pytest.approx(dict.fromkeys(shares, 0.5), abs=0.02)
    assert document["significance"]["baseline"] == "dense.tuned"
    assert ("tokenized_bleu" in document["systems"][0]) == sentences
    assert ("d_bleu" in document["systems"][0]) != sentences
    for table in ("results.md", "results.tex"):
        assert f"{document['systems'][3]['chrf']:.2f}" in (run / table).read_text()
    assert (run / "report" / "report.html").exists()
    assert all(part["verified"] == "sha256" for part in counts["options"]["archives"].values())
    averaged = sorted((run / "dense").glob("checkpoint_*_*.pt"))
    assert len(averaged) == 2 and (run / "dense/average.pt").exists()


@pytest.mark.parametrize("name", recipe_program.SYSTEMS)
def test_every_system_has_a_budget(name):
    """That of all-ones is 0: ap-masks refuses to write masks that nobody gave a budget."""
    flags = parse_mask_flags(recipe_program.SYSTEMS[name].replace("SHARE", "0.5").split())
    assert len(budget_flags(flags)) == 1
    assert (flags.total == 0) == (name == "all-ones")


def test_stages_out_of_order_and_unknown_options_are_refused(recipe):
    def refused(*words, status=1):
        return recipe(*words, expect=status)

    assert "run.sh prepare with the same options first" in refused("iwslt14_de_en", "train_dense")
    assert "run.sh train_dense with the same options first" in refused("iwslt14_de_en", "record")
    assert "--size huge is unknown; wmt14_en_de has big base tiny" in refused("wmt14_en_de", "record", "--size", "huge")
    assert "--systems x is unknown; known are importance" in refused("wmt14_en_de", "prune", "--systems", "x")
    assert "unrecognized arguments: --frobnicate" in refused("wmt14_en_de", "all", "--frobnicate", status=2)
    assert "invalid choice: 'training'" in refused("wmt14_en_de", "training", status=2)
    big = ["--size", "big", "--gpus", 3]
    assert "--gpus 3 does not divide the 128 batches" in refused("wmt14_en_de", "record", *big)
    assert "--variant wmt99 is unknown; wmt14_en_de has wmt14 wmt17" in refused(
        "wmt14_en_de", "prepare", "--variant", "wmt99"
    )
    assert "--pair: wmt14_en_de has one pair of languages, en de" in refused(
        "wmt14_en_de", "prepare", "--pair", "en", "fr"
    )


def test_impossible_folders_are_named(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    for folders, message in (
        (["--out", tmp_path / "file"], "file"),
        (["--out", tmp_path / "file" / "run"], "Not a directory"),
        (["--data", tmp_path / "a:b"], "a:b: fairseq takes ':' in a path for the end of it"),
    ):
        printed = recipe("wmt14_en_fr", "prepare", *folders, expect=1)
        assert message in printed and "run.sh: error: " in printed and "Traceback" not in printed


@pytest.fixture
def prepare_en_fr(data_mirror, tmp_path, use_mirror, monkeypatch):
    """prepare_en_fr(lines) runs that stage of wmt14_en_fr in this process, without fairseq-preprocess, into "data"."""
    use_mirror(data_mirror)
    monkeypatch.setattr(building, "preprocess", lambda pair, folders, dictionary, out, *rest: out.mkdir())
    monkeypatch.setattr(Stages, "run_always", lambda stages, name, program, *args: program(*args) or 0.0)

    def run(valid_every: int):
        words = [EXAMPLES / "wmt14_en_fr", "prepare", "--size", "tiny", "--gpus", 0, "--valid-every", valid_every]
        words += ["--bpe-size", 600, "--archives", tmp_path / "archives", "--data", tmp_path / "data"]
        parser = recipe_program.get_parser()
        args, options = parser.parse_known_args([*map(str, words), "--out", str(tmp_path / "run")])
        recipe_program.Experiment(args.folder, args, options).prepare()

    return run


def test_a_stage_with_other_settings_is_refused_with_both(prepare_en_fr):
    prepare_en_fr(20)
    with pytest.raises(ArtifactError, match='(?s)was done with other settings.*"20".*"30"'):
        prepare_en_fr(30)


def test_data_that_were_removed_are_made_again(prepare_en_fr, tmp_path):
    """A mark said that they were made, and the next stage failed."""
    prepare_en_fr(20)
    shutil.rmtree(tmp_path / "data")
    prepare_en_fr(20)
    assert (tmp_path / "data/counts.json").exists()


def test_sacrebleu_keeps_no_test_set_of_a_mirror(prepare_en_fr, tmp_path, monkeypatch):
    """It was imported before its folder was named, so it kept them in the user's own, for all programs."""
    monkeypatch.setattr(sacrebleu.dataset.base, "SACREBLEU_DIR", str(tmp_path / "kept"))
    prepare_en_fr(20)
    assert (tmp_path / "data/text/test.fr").read_text("utf-8") and not (tmp_path / "kept").exists()


@pytest.mark.parametrize("data_set", [*DATA_SETS, "libreoffice_help", "debian_text", "libreoffice_one_to_many"])
def test_recipes_name_flags_that_the_commands_know(data_set, tmp_path):
    """What no test runs to its end: the real sizes."""
    toml = tomllib.loads((EXAMPLES / data_set / "recipe.toml").read_text("utf-8"))
    for size in toml["sizes"].values():
        size = recipe_program.Size(**size)
        for flags in (size.dense, size.tune, *filter(None, [size.warm])):
            words = ["data", "--task", "translation", "--optimizer", "adam", "--lr-scheduler", "inverse_sqrt"]
            words += [*shlex.split(f"{size.model} {size.training} {flags}")]
            args = options.parse_args_and_arch(options.get_training_parser(), words)
            assert args.lr and args.encoder_layers
            assert f"pruned_{args.arch}" in ARCH_MODEL_REGISTRY
        options.parse_args_and_arch(options.get_generation_parser(), ["data", *shlex.split(size.search)])
        options.parse_args_and_arch(options.get_validation_parser("translation"), ["data", *shlex.split(size.record)])


@pytest.mark.parametrize(("visible", "used", "size"), [(0, 0, "base"), (6, 2, "base"), (8, 8, "base"), (8, 8, "big")])
def test_all_gpus_are_used_that_divide_the_batch(monkeypatch, visible, used, size):
    """Without a GPU, the greatest common divisor of 0 and 8 batches gave eight of them."""
    monkeypatch.setattr(recipe_program.torch.cuda, "device_count", lambda: visible)
    folder = EXAMPLES / "wmt14_en_de"
    args = recipe_program.get_parser().parse_args([str(folder), "--size", size])
    assert recipe_program.Experiment(folder, args, []).gpus == used


@pytest.mark.parametrize("data_set", [*DATA_SETS, "libreoffice_help", "debian_text", "libreoffice_one_to_many"])
def test_run_sh_shows_the_stages_and_options(data_set, tmp_path):
    """With those of the preparation."""
    assert forked.call(forked.recipe, [EXAMPLES / data_set, "--help"], tmp_path / "printed") == 0
    printed = (tmp_path / "printed").read_text()
    assert "train_pruned   fine-tuning" in printed and "--bpe-size" in printed and "--systems" in printed
    assert (EXAMPLES / data_set / "run.sh").read_text() == (EXAMPLES / "libreoffice_help" / "run.sh").read_text()


def test_run_sh_runs_from_any_folder(tmp_path):
    """Through a link with a space in its path, too."""
    (tmp_path / "my examples").symlink_to(EXAMPLES)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = [str(tmp_path / "my examples" / "libreoffice_help" / "run.sh"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and "--systems" in done.stdout, done.stderr


def prepare(data_set, out, *options):
    """run.sh prepare without fairseq-preprocess, which takes seconds to start."""
    program = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES / 'common')!r}); import prepare_corpus\n"
        "prepare_corpus.preprocess = lambda pair, folders, dictionary, destination, *rest: destination.mkdir()\n"
        "prepare_corpus.main()"
    )
    command = [sys.executable, "-c", program, EXAMPLES / data_set, "--out", out, *options]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)


@pytest.fixture
def use_mirror(monkeypatch):
    def use(folder: Path, checksums: bool = True):
        monkeypatch.setenv("AP_DATA_MIRROR", str(folder))
        if checksums:
            monkeypatch.setenv("AP_DATA_CHECKSUMS", str(folder / "SHA256SUMS"))

    return use


# ---------------------------------------------------------------- text


def test_prepared_text_is_the_text_of_the_archives(data_mirror, tmp_path, use_mirror):
    """wmt17 has the newer news commentary; every 20th line is validation; the test set is sacreBLEU's, unchanged."""
    use_mirror(data_mirror)
    pages = write_pages()
    for variant, extra in (("wmt14", []), ("wmt17", pages[4:5])):
        options = ["--archives", tmp_path / "archives", "--variant", variant, "--bpe-size", 600, "--valid-every", 20]
        done = prepare("wmt14_en_de", tmp_path / variant, *options)
        assert done.returncode == 0, done.stderr
        expected = [segment for k in range(3) for _, part in pages[4:][k::3] for segment in part]
        expected += [segment for _, part in extra for segment in part]
        for language in ("en", "de"):
            texts = [corpora.clean(segment[language]) for segment in expected]
            train = (tmp_path / variant / f"text/train.{language}").read_text("utf-8").splitlines()
            valid = (tmp_path / variant / f"text/valid.{language}").read_text("utf-8").splitlines()
            assert valid == texts[19::20]
            assert train == [text for k, text in enumerate(texts, 1) if k % 20]
            test = (tmp_path / variant / f"text/test.{language}").read_text("utf-8").splitlines()
            assert len(test) == sum(len(part) for _, part in pages[:4])
            assert [corpora.clean(line) for line in test] == [
                corpora.clean(mirror.escape(segment[language], False)) for _, part in pages[:4] for segment in part
            ]


def test_talks_are_prepared_as_by_fairseqs_script(data_mirror, tmp_path, use_mirror):
    """Titles and descriptions count; every 23rd line is validation, five test sets follow each other."""
    use_mirror(data_mirror)
    done = prepare("iwslt14_de_en", tmp_path / "out", "--archives", tmp_path / "archives", "--bpe-size", 600)
    assert done.returncode == 0, done.stderr
    pages = write_pages()
    for language in ("de", "en"):
        found = {
            split: (tmp_path / f"out/text/{split}.{language}").read_text("utf-8").splitlines()
            for split in ("train", "valid", "test")
        }
        texts = [corpora.clean(segment[language]) for _, part in pages[4:] for segment in part]
        assert found["valid"] == texts[22::23] and found["train"] == [t for k, t in enumerate(texts, 1) if k % 23]
        held_out = [segment[language] for k in (0, 1, 2, 3, 0) for segment in pages[k][1]]
        assert list(map(corpora.clean, found["test"])) == list(map(corpora.clean, held_out))


def test_documents_are_talks_cut_at_sentence_ends(data_mirror, tmp_path, use_mirror):
    """The segments of a split's documents are its sentences, in order, and no document crosses a talk."""
    use_mirror(data_mirror)
    done = prepare(
        "iwslt17_documents", tmp_path / "out", "--archives", tmp_path / "a", "--bpe-size", 600, "--document-tokens", 200
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    for split, held_out in (("train", False), ("valid", True), ("test", True)):
        documents = (out / f"documents/{split}.en").read_text("utf-8").splitlines()
        talks = (out / f"documents/{split}.talks").read_text("utf-8").splitlines()
        sentences = (out / f"text/{split}.en").read_text("utf-8").splitlines()
        of_sentence = (out / f"text/{split}.talks").read_text("utf-8").splitlines()
        segments = [(talk, text) for talk, line in zip(talks, documents, strict=True) for text in line.split(" <sep> ")]
        assert segments == list(zip(of_sentence, sentences, strict=True))
        assert len(documents) > len(set(talks)), "nothing was cut: the test would not see a wrong limit"
        for language in ("en", "de"):
            pieces = (out / f"bpe-documents/{split}.{language}").read_text("utf-8").splitlines()
            assert max(len(line.split()) for line in pieces) <= 200
        assert held_out == talks[0].startswith("iwslt17")


def test_a_byte_order_mark_belongs_to_no_word(tmp_path):
    (tmp_path / "en").write_text("\ufeffone\n", encoding="utf-8")
    (tmp_path / "de").write_text("eins\n")
    assert list(corpora.read_plain(tmp_path / "en", tmp_path / "de")) == [corpora.Line("one", "eins")]


def test_talks_that_do_not_align_are_refused(tmp_path):
    (tmp_path / "en").write_text("<talkid>1</talkid>\none\ntwo\n<url>x</url>\n<talkid>2</talkid>\nthree\n")
    (tmp_path / "de").write_text("<talkid>1</talkid>\neins\n<url>x</url>\n<talkid>2</talkid>\ndrei\n")
    with pytest.raises(PrepareError, match="en has talk 1 of 2 lines where de has talk 1 of 1 lines"):
        list(corpora.read_talks(tmp_path / "en", tmp_path / "de"))
    (tmp_path / "de").write_text("<talkid>1</talkid>\neins\nzwei\n")
    with pytest.raises(PrepareError, match="en has talk 2 of 1 lines where de has the end"):
        list(corpora.read_talks(tmp_path / "en", tmp_path / "de"))


# ---------------------------------------------------------------- downloads


class Server(http.server.BaseHTTPRequestHandler):
    """Serves ``content`` at /host/file; each connection breaks after ``budget`` bytes, of which many may follow."""

    content, budget, ranges, requests = b"", 10**9, True, []

    def do_GET(self):
        self.requests.append(self.headers.get("Range"))
        if self.path != "/host/file":
            return self.send_error(404)
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if self.ranges else 0
        if start and start >= len(self.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.content)}")
            return self.end_headers()
        self.send_response(206 if self.ranges else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start : start + self.budget])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    handler = type("Handler", (Server,), {"requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv("AP_DATA_MIRROR", f"http://127.0.0.1:{running.server_port}")
        yield handler
        running.shutdown()


CONTENT = bytes(range(256)) * 40
ARCHIVE = Archive("https://host/file", f"md5:{hashlib.md5(CONTENT).hexdigest()}")


def test_a_broken_download_continues_where_it_ended(server, tmp_path):
    server.content, server.budget = CONTENT, 3000
    record = fetch(ARCHIVE, tmp_path)
    assert (tmp_path / "host/file").read_bytes() == CONTENT and not (tmp_path / "host/file.part").exists()
    assert server.requests == [f"bytes={start}-" for start in range(0, len(CONTENT), 3000)]
    assert record["verified"] == "md5" and record["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    fetch(ARCHIVE, tmp_path)
    assert len(server.requests) == 4  # it is there


def test_an_interrupted_download_continues_in_the_next_run(server, tmp_path):
    server.content, server.budget = CONTENT, 0
    (tmp_path / "host").mkdir()
    (tmp_path / "host/file.part").write_bytes(CONTENT[:5000])
    with pytest.raises(PrepareError, match="after 5,000 bytes, before the end.*file.part: run the same command again"):
        fetch(ARCHIVE, tmp_path)
    assert not (tmp_path / "host/file").exists()
    server.budget = 10**9
    fetch(ARCHIVE, tmp_path)
    assert (tmp_path / "host/file").read_bytes() == CONTENT and server.requests[-1] == "bytes=5000-"


def test_a_complete_part_is_finished(server, tmp_path):
    server.content = CONTENT
    (tmp_path / "host").mkdir()
    (tmp_path / "host/file.part").write_bytes(CONTENT)
    fetch(ARCHIVE, tmp_path)
    assert (tmp_path / "host/file").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.content, server.ranges = CONTENT, False
    (tmp_path / "host").mkdir()
    (tmp_path / "host/file.part").write_bytes(b"old")
    fetch(ARCHIVE, tmp_path)
    assert (tmp_path / "host/file").read_bytes() == CONTENT


def test_a_wrong_checksum_is_an_error_and_leaves_nothing(server, tmp_path):
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(PrepareError, match="has the md5 [0-9a-f]{32}, expected [0-9a-f]{32}: damaged on the way"):
        fetch(ARCHIVE, tmp_path)
    assert not list((tmp_path / "host").iterdir())


def test_a_missing_address_is_an_error_with_the_remedy(server, tmp_path):
    with pytest.raises(PrepareError, match=r"host/gone failed: HTTP Error 404.*AP_DATA_MIRROR to a mirror .*host/gone"):
        fetch(Archive("https://host/gone"), tmp_path)


def test_a_truncated_archive_is_an_error_and_not_a_finished_corpus(data_mirror, tmp_path, use_mirror):
    """Without a known checksum a cut archive shows when it is unpacked; nothing passes as finished."""
    for file in data_mirror.rglob("*.tgz"):
        copy = tmp_path / "cut" / file.relative_to(data_mirror)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if "iwslt14" in str(file) else file.read_bytes())
    use_mirror(tmp_path / "cut", checksums=False)
    done = prepare("iwslt14_de_en", tmp_path / "out", "--archives", tmp_path / "archives", "--bpe-size", 600)
    assert done.returncode == 1
    assert "de-en.tgz cannot be unpacked" in done.stderr and "delete it and run again" in done.stderr
    assert not (tmp_path / "out/counts.json").exists() and not (tmp_path / "out/text").exists()


def test_known_checksums_hold_for_mirrors_too(data_mirror, tmp_path, use_mirror):
    """An excerpt does not pass as sacreBLEU's test set unless its checksum was given."""
    use_mirror(data_mirror, checksums=False)
    done = prepare("wmt14_en_de", tmp_path / "out", "--archives", tmp_path / "archives")
    assert done.returncode == 1
    assert "expected a8cd784e006feb32ac6f3d9ec7eb389a" in done.stderr and "test-full.tgz" in done.stderr
    assert downloads.CHECKSUMS in done.stderr


def test_ctrl_c_ends_an_example_in_one_line(capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        environment.run_example(interrupted, argparse.Namespace())
    assert ended.value.code == 130 and capsys.readouterr().err == "run.sh: interrupted; the same command goes on\n"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with environment.required_modules():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # of imports, too
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
