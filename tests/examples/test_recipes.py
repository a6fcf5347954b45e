"""The WMT and IWSLT examples: every script, on a mirror of archives with the real names and layout, on the CPU."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "examples"
sys.path[:0] = [str(HERE), str(EXAMPLES / "common")]

import corpora  # noqa: E402
import downloads  # noqa: E402
import forked  # noqa: E402
import mirror  # noqa: E402
from building import PrepareError  # noqa: E402
from downloads import Archive, fetch  # noqa: E402

DATA_SETS = ("wmt14_en_de", "wmt14_en_fr", "iwslt14_de_en", "iwslt17_documents")
STAGES = ("prepare", "train_dense", "record", "prune", "train_pruned", "evaluate")


@pytest.fixture(scope="session")
def data_mirror(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mirror")
    mirror.build_mirror(folder)
    return folder


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    """A folder of commands that start at once; see forked.py."""
    folder = tmp_path_factory.mktemp("commands")
    forked.make_commands(folder / "bin", folder / "socket")
    server = forked.start_server(folder / "socket")
    yield folder / "bin"
    server.terminate()
    server.wait()


@pytest.fixture
def script(data_mirror, commands, tmp_path):
    """script(data set, stage, *options) runs one script of an example; returns its output."""

    def run(data_set, stage, *options, expect=0, **environment):
        folders = ["--data", tmp_path / "data", "--archives", tmp_path / "archives", "--out", tmp_path / "run"]
        command = [EXAMPLES / data_set / f"{stage}.sh", "--size", "tiny", "--gpus", 0, *folders, *options]
        done = subprocess.run(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            env={
                **os.environ,
                "PATH": os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]),
                "PYTHONPATH": str(EXAMPLES.parent),
                "AP_DATA_MIRROR": data_mirror.as_uri(),
                "AP_DATA_CHECKSUMS": str(data_mirror / "SHA256SUMS"),
                "OMP_NUM_THREADS": "1",
                **environment,
            },
        )
        logs = "".join(f"\n{log}:\n{log.read_text()[-1500:]}" for log in (tmp_path / "run").glob("logs/*.log"))
        assert done.returncode == expect, done.stdout + logs
        return done.stdout

    return run


@pytest.mark.parametrize("data_set", DATA_SETS)
def test_all_stages(script, tmp_path, data_set):
    """Stage by stage, then run.sh, which finds everything done; the results have all systems and signatures."""
    name = "importance" if data_set == "iwslt14_de_en" else "joint"
    options = ["--systems", name, "--bpe-size", 600]
    options += [] if data_set == "iwslt17_documents" else ["--valid-every", 20]
    if data_set == "wmt14_en_de":
        options += ["--tokenized-bleu", "--sample", 100]
    for stage in STAGES:
        assert ": running, log in" in script(data_set, stage, *options)
    again = script(data_set, "run", *options)
    assert "running" not in again and again.count("done before") >= 11
    document = json.loads((tmp_path / "run/results.json").read_text())
    assert [system["system"] for system in document["systems"]] == ["dense", f"{name}.untuned", f"{name}.tuned"]
    counts = json.loads((tmp_path / "data/counts.json").read_text())
    for system in document["systems"]:
        assert {"bleu_signature", "chrf_signature", "ter_signature", "checkpoint_sha256"} <= system.keys()
        lines = counts["documents"]["test"]["documents"] if "documents" in counts else counts["text_pairs"]["test"]
        assert system["sentences"] == lines
    shares = {kind: share["effective"] for kind, share in document["systems"][2]["sparsity"].items()}
    assert len(shares) == 3
    if name == "joint":  # each kind at the default share; importance has one budget for all
        assert shares == pytest.approx(dict.fromkeys(shares, 0.5), abs=0.02)
    else:
        assert min(shares.values()) < 0.5 < max(shares.values())
    assert document["significance"]["baseline"] == "dense"
    assert ("tokenized_bleu" in document["systems"][0]) == (data_set == "wmt14_en_de")
    assert ("d_bleu" in document["systems"][0]) == (data_set == "iwslt17_documents")
    for table in ("results.md", "results.tex"):
        assert f"{document['systems'][2]['chrf']:.2f}" in (tmp_path / "run" / table).read_text()
    assert all(part["verified"] == "sha256" for part in counts["options"]["archives"].values())
    averaged = sorted((tmp_path / "run/dense").glob("checkpoint_*_*.pt"))
    assert len(averaged) == 2 and (tmp_path / "run/dense/average.pt").exists()


def test_stages_out_of_order_and_unknown_options_are_refused(script, tmp_path):
    assert "prepare.sh with the same options first" in script("iwslt14_de_en", "train_dense", expect=1)
    assert "train_dense.sh with the same options first" in script("iwslt14_de_en", "record", expect=1)
    assert "--size huge is unknown; wmt14_en_de has big base tiny" in script(
        "wmt14_en_de", "record", "--size", "huge", expect=2
    )
    assert "unknown system x" in script("wmt14_en_de", "prune", "--systems", "x", expect=2)
    assert "unknown option --frobnicate" in script("wmt14_en_de", "run", "--frobnicate", expect=2)
    assert "--gpus 3 does not divide the 128 batches" in script(
        "wmt14_en_de", "record", "--size", "big", "--gpus", 3, expect=2
    )
    assert "--variant wmt99 is unknown; wmt14_en_de has wmt14 wmt17" in script(
        "wmt14_en_de", "prepare", "--variant", "wmt99", expect=1
    )
    assert "train_pruned   fine-tuning" in script("wmt14_en_fr", "run", "--help")


def prepare(data_set, out, *options):
    """prepare.sh without fairseq-preprocess, which takes seconds to start."""
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
    pages = mirror.read_pages()
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
