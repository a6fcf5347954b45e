"""Scores and significance tests, from logs and plain text; gaps and mismatches are refused."""

import json
import os
import re
import subprocess
import sys
import types
import unicodedata

import pytest
import sacrebleu
from plugin.commands import ROOT, sentence_pairs

from ap_fairseq.cli import evaluate
from ap_fairseq.evaluation import results, scores
from ap_fairseq.evaluation.hypotheses import read_hypotheses
from ap_fairseq.evaluation.scores import compare_systems, score, score_by_length, score_documents
from ap_fairseq.files import ArtifactError, UserError, read_lines

REFERENCES = [target for _, target in sentence_pairs(120, seed=5)]


def damaged(every: int) -> list[str]:
    """The references with the first two words swapped in every n-th sentence."""
    swapped = [re.sub(r"^(\S+) (\S+)", r"\2 \1", line) for line in REFERENCES]
    return [swapped[k] if k % every == 0 else line for k, line in enumerate(REFERENCES)]


def test_only_line_feeds_end_a_line(tmp_path):
    """str.splitlines breaks at U+2028 and others, which shifted references against hypotheses.

    A byte order mark belonged to the first word.
    """
    path = tmp_path / "text"
    path.write_text("\ufeffone\u2028still one\ntwo\x85\n", encoding="utf-8")
    assert read_lines(path) == ["one\u2028still one", "two\x85"]


def write(path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def log(*numbers, text="text", finished=True) -> str:
    """A log of fairseq-generate with one hypothesis for each sentence."""
    entries = [f"S-{n}\tsource\nT-{n}\ttarget\nH-{n}\t-0.1\tx\nD-{n}\t-0.1\t{text} {n}\nP-{n}\t-0.1\n" for n in numbers]
    return "".join(entries) + "Generate test with beam=5: BLEU4 = 1.00\n" * finished


def test_the_best_hypothesis_of_each_sentence_in_order(tmp_path):
    path = write(tmp_path / "log", "D-1\t-0.1\tb\nH-1\t-0.1\tx\nD-1\t-0.9\tworse\nD-0\t-0.2\ta\n")
    assert read_hypotheses([path]) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "D-0\t-0.1\ta\nD-2\t-0.1\tc\n",
            r"lacks 1 of 3 sentences \(1\): fairseq-generate was cut off, so run it again",
        ),
        ("S-0\ta\nT-0\tb\n", "holds no hypotheses"),
        (log(0, 2, finished=False), "was cut off, so run it again; or fairseq-generate skipped"),
    ],
)
def test_a_log_with_gaps_is_refused(tmp_path, text, found):
    with pytest.raises(ArtifactError, match=found):
        read_hypotheses([write(tmp_path / "log", text)])


@pytest.mark.parametrize("numbers", [(0, 2, 3), (0, 1, 2)])
def test_skipped_sentences_are_not_blamed_on_a_cut_log(tmp_path, numbers):
    """Sentences beyond --max-source-positions are left out of a whole log, which was called cut off.

    If the last sentence was skipped, only the number of sentences shows it.
    """
    whole = write(tmp_path / "log", log(*numbers))
    gap = ({*range(4)} - {*numbers}).pop()
    with pytest.raises(
        ArtifactError, match=rf"lacks 1 of 4 sentences \({gap}\): fairseq-generate skipped .* so raise"
    ) as error:
        read_hypotheses([whole], ["target"] * 4)
    assert "cut off" not in str(error.value)
    ranks = [write(tmp_path / "rank0", log(0, 2)), write(tmp_path / "rank1", log(3, finished=False))]
    with pytest.raises(ArtifactError, match="rank0:.*rank1 lacks 1 of 4 .* was cut off"):
        read_hypotheses(ranks, ["target"] * 4)


@pytest.mark.parametrize(
    ("first", "second", "places"),
    [
        (log(0, 1), log(0, 1, text="other"), "run:1 and .*run:12"),
        (log(0), log(0, text="other"), "run:1 and .*run:7"),  # one sentence: neighbours, as those of --nbest
        ("D-0\t-1\ta\nD-1\t-1\tb\n", "D-0\t-1\tc\nD-1\t-1\td\n", "run:1 and .*run:3"),
    ],
)
def test_a_log_with_two_runs_is_refused(tmp_path, first, second, places):
    """``tee -a`` appended a second run, of which the first was scored."""
    run = write(tmp_path / "run", first + second)
    with pytest.raises(ArtifactError, match=f"sentence 0 was translated twice: .*{places}; give the log of one run"):
        read_hypotheses([run])


@pytest.mark.parametrize("second", [log(1, 2), "D-2\t-1\tc\nD-1\t-1\tb\n"])
def test_logs_of_the_same_sentences_are_refused(tmp_path, second):
    """Two translations joined by a colon instead of the shards of one: the first was scored."""
    files = [write(tmp_path / "a", log(0, 1)), write(tmp_path / "b", second)]
    with pytest.raises(ArtifactError, match="sentence 1 was translated twice: .*a:6 and .*b:"):
        read_hypotheses(files)


def test_hypotheses_of_a_second_run_without_sources_are_refused(tmp_path):
    """With the sources of the first run in the log, only repeated sources were looked for."""
    path = write(tmp_path / "log", log(0, 1) + "D-0\t-1\tc\nD-1\t-1\tb\n")
    with pytest.raises(ArtifactError, match="sentence 0 was translated twice: .*log:1 and .*log:12"):
        read_hypotheses([path])


def test_references_that_the_log_does_not_have_are_refused(tmp_path):
    """A log was scored against any reference of as many lines: of another data set, or in another order.

    Tokenized, lower-cased and unknown words in the log are no other reference.
    """
    logged = [line.lower().replace("t", " t") for line in REFERENCES[:100]]
    logged[3] = f"{logged[3].split()[0]} <<unk>> <<unk>> <<unk>>"
    path = write(tmp_path / "log", "".join(f"T-{n}\t{line}\nD-{n}\t-0.1\tx\n" for n, line in enumerate(logged)))
    assert read_hypotheses([path], REFERENCES[:100]) == ["x"] * 100
    shifted = [*REFERENCES[:80], *REFERENCES[81:101]]
    with pytest.raises(ArtifactError, match=r"of 99 references are not those of the log, the first at .*log:161: '"):
        read_hypotheses([path], shifted)


@pytest.mark.parametrize(
    ("logged", "reference"),
    [
        ("창이 열립니다", unicodedata.normalize("NFD", "창이 열립니다")),
        ("không thể mở tệp", unicodedata.normalize("NFD", "không thể mở tệp")),
        ("ファイル", "ﾌｧｲﾙ"),
        ("ABC123", "ＡＢＣ１２３"),
        ("1⁄2 ...", "½ …"),
        ("كتب الولد", "كَتَبَ الوَلَدُ"),
        ("打开 文件 。", "打开文件。"),
        ("l &apos; a", "l’a"),
        ("Nei@@ n", "Nein"),
        ("", ""),
    ],
)
def test_a_reference_in_other_characters_is_the_same(tmp_path, logged, reference):
    """Sentencepiece's NFKC, Moses' escapes and the like made other references of short ones."""
    path = write(tmp_path / "log", f"T-0\t{logged}\nH-0\t-1\tx\nD-0\t-1\tx\n")
    assert read_hypotheses([path], [reference]) == ["x"]
    with pytest.raises(ArtifactError, match="1 of 1 references are not those of the log"):
        read_hypotheses([path], ["quite another one"])


def test_a_reference_without_a_hypothesis_is_a_gap(tmp_path):
    """A log cut off after its last T- line failed with an IndexError for references that ended before."""
    path = write(tmp_path / "log", "T-0\tt\nD-0\t-1\tx\nT-1\tt\n")
    with pytest.raises(ArtifactError, match=r"lacks 1 of 2 sentences \(1\): fairseq-generate was cut off"):
        read_hypotheses([path], ["t"])


def test_hypotheses_of_nbest_are_one_translation(tmp_path):
    hypotheses = ["S-1\ts\nT-1\tt\n", *(f"H-1\t-{k}\tx\nD-1\t-{k}\t{k}\nP-1\t-1\n" for k in (1, 2)), "D-0\t-1\tother\n"]
    path = write(tmp_path / "log", "".join([*hypotheses[:3], "S-0\ts\n", hypotheses[3]]))
    assert read_hypotheses([path]) == ["other", "1"]


@pytest.mark.parametrize("end", ["D-1", "D-1\t-0.4", "D-1\t-0.4\tonly ha", "P-1\t-0.1 -0."])
def test_a_log_cut_in_a_line_is_refused(tmp_path, end):
    path = write(tmp_path / "log", f"D-0\t-0.1\twhole\n{end}")
    with pytest.raises(ArtifactError, match="was cut off in its last line, '[DP]-1"):
        read_hypotheses([path])


def test_empty_references_can_be_scored():
    assert score(["", ""], ["", ""])["length_ratio"] == 0
    assert score(["a word", ""], ["", ""])["length_ratio"] == 2


def test_plain_text_is_read_line_by_line(tmp_path):
    path = write(tmp_path / "text", "a D-0\n\nD-1 no log\n")
    assert read_hypotheses([path]) == ["a D-0", "", "D-1 no log"]


def test_scores_are_sacrebleus():
    hypotheses = damaged(3)
    found = score(hypotheses, REFERENCES, ("bleu", "chrf", "ter"))
    assert found["bleu"] == sacrebleu.corpus_bleu(hypotheses, [REFERENCES]).score
    assert found["chrf"] == sacrebleu.corpus_chrf(hypotheses, [REFERENCES]).score
    assert found["ter"] == sacrebleu.corpus_ter(hypotheses, [REFERENCES]).score
    assert "tok:tercom" in found["ter_signature"] and found["length_ratio"] == 1
    assert score(["a b c x"], ["a b c d"], ["ter"])["ter"] == 25  # one edit in four words


@pytest.mark.parametrize(("test", "samples"), [("bootstrap", 300), ("randomization", 300)])
def test_significance_tells_a_real_difference_from_none(test, samples):
    """Against the baseline: a copy of it differs by chance alone, a system with half of the errors does not."""
    systems = {"base": damaged(2), "copy": damaged(2), "better": damaged(4)}
    found = compare_systems(systems, REFERENCES, test, ("bleu", "chrf"), samples)
    assert (found["baseline"], found["samples"]) == ("base", samples)
    for metric in ("bleu", "chrf"):
        assert found["systems"]["better"][metric]["p"] < 0.01
        assert found["systems"]["copy"][metric]["p"] == 1  # sacreBLEU says 1/(n+1): as if highly significant
        assert "p" not in found["systems"]["base"][metric]
        assert "seed:12345" in found["signatures"][metric]
    assert found["systems"]["base"]["bleu"]["score"] == pytest.approx(score(damaged(2), REFERENCES)["bleu"])
    if test == "bootstrap":
        base = found["systems"]["base"]["bleu"]
        assert abs(base["mean"] - base["score"]) < base["ci95"]


def test_length_buckets_hold_every_sentence_once():
    hypotheses = damaged(3)
    buckets = score_by_length(hypotheses, REFERENCES, (7, 15))
    lengths = [len(line.split()) for line in REFERENCES]
    assert [bucket["sentences"] for bucket in buckets] == [
        sum(n <= 7 for n in lengths),
        sum(8 <= n <= 15 for n in lengths),
        sum(n > 15 for n in lengths),
    ]
    assert [(bucket["least"], bucket["most"]) for bucket in buckets] == [(0, 7), (8, 15), (16, None)]
    short = [k for k, n in enumerate(lengths) if n <= 7]
    alone = score([hypotheses[k] for k in short], [REFERENCES[k] for k in short])
    assert buckets[0]["bleu"] == alone["bleu"] < 100
    with pytest.raises(UserError, match=r"\[15, 7\] are not ascending"):
        score_by_length(hypotheses, REFERENCES, (15, 7))


def test_document_scores_join_lines_and_pair_segments():
    hypotheses = damaged(3)[:6]
    references = REFERENCES[:6]
    joined = score_documents(hypotheses, references, ["a", "a", "a", "b", "b", "a"])
    documents = [
        [" ".join(side[k] for k in part) for part in ((0, 1, 2), (3, 4), (5,))] for side in (hypotheses, references)
    ]
    assert joined["documents"] == 3 and joined["d_bleu"] == score(*documents)["bleu"]
    assert joined["d_bleu"] != score(hypotheses, references)["bleu"]  # n-grams cross the segments

    lines = [[" <sep> ".join(side[:4]), " <sep> ".join(side[4:])] for side in (hypotheses, references)]
    cut = score_documents(*lines, separator="<sep>")
    assert cut["s_bleu"] == score(hypotheses, references)["bleu"] and cut["segments"] == 6
    assert cut["lines_with_equal_segments"] == 1
    lost = score_documents([lines[0][0].replace(" <sep> ", " ", 1), lines[0][1]], lines[1], separator="<sep>")
    assert lost["lines_with_equal_segments"] == 0.5 and lost["s_bleu"] < cut["s_bleu"]
    assert lost["d_bleu"] == cut["d_bleu"] and lost["segments"] == 6
    surplus = score_documents(["a <sep> b <sep> c d e f"], ["a <sep> b c d e f"], separator="<sep>")
    assert surplus["s_bleu"] == pytest.approx(100)  # the last segment takes what follows


def test_masks_are_told_of_systems_with_a_checkpoint_alone():
    """One without, of which nothing is known, was called dense."""
    share = {"effective": 0.5, "kept_mass": 0.9}
    systems = [
        {"system": "text"},
        {"system": "dense", "checkpoint_sha256": "a"},
        {"system": "pruned", "checkpoint_sha256": "b", "sparsity": {"cross": share}},
    ]
    table = results.score_table({"systems": systems})
    assert table.header[1:] == [f"{kind} pruned / kept" for kind in ("encoder_self", "decoder_self", "cross")]
    assert [row[1:] for row in table.rows] == [["-"] * 3, ["dense"] * 3, ["dense", "dense", "50.0% / 90.0%"]]
    assert results.score_table({"systems": systems[:1]}).header == ["system"]


def test_tokenized_bleu_of_old_tables():
    hypothesis, reference = ["Ein Rot-Wein-Glas, bitte gleich jetzt!"], ["Ein rot-Wein-Glas, bitte gleich jetzt!"]
    cased, lowercased, split = (
        scores.tokenized_bleu(hypothesis, reference, style, "de") for style in scores.TOKENIZED_BLEU
    )
    assert cased["tokenized_bleu"] < split["tokenized_bleu"] < lowercased["tokenized_bleu"] == pytest.approx(100)
    assert "moses:compound-split-de" in split["tokenized_bleu_signature"]


def test_comet_uses_a_local_model_and_nothing_else(tmp_path, monkeypatch):
    """Without the file or the package: an error; with both, the model gets all three texts, offline."""
    model = tmp_path / "wmt22-comet-da" / "checkpoints" / "model.ckpt"
    with pytest.raises(ArtifactError, match="does not download one"):
        scores.comet_scores(model, ["s"], {"x": ["h"]}, ["r"])
    model.parent.mkdir(parents=True)
    model.touch()
    monkeypatch.setitem(sys.modules, "comet", None)
    with pytest.raises(UserError, match="pip install unbabel-comet"):
        scores.comet_scores(model, ["s"], {"x": ["h"]}, ["r"])

    class Model:
        def predict(self, data, batch_size, gpus):
            assert scores.os.environ["HF_HUB_OFFLINE"] == "1"
            return types.SimpleNamespace(system_score=sum(d["mt"] == d["ref"] for d in data) / len(data))

    loader = types.SimpleNamespace(load_from_checkpoint=lambda path: Model() if path == str(model) else None)
    monkeypatch.setitem(sys.modules, "comet", loader)
    assert scores.comet_scores(model, ["s", "t"], {"x": ["a", "b"]}, ["a", "c"]) == {"x": 0.5}
    monkeypatch.setattr(Model, "predict", lambda *_, **__: types.SimpleNamespace(system_score=float("nan")))
    with pytest.raises(ArtifactError, match="COMET of x is nan"):
        scores.comet_scores(model, ["s"], {"x": ["a"]}, ["a"])


def test_scores_of_subwords_are_warned_of(tmp_path, capsys):
    """A forgotten --remove-bpe scored a twentieth of the BLEU; sacreBLEU named a flag that ap-evaluate has not."""
    texts = {"ref": "the page\n" * 9, "pieces": "▁the ▁pa ge\n" * 9, "halves": "the pa@@ ge\n" * 9}
    for name, text in texts.items():
        write(tmp_path / name, text)
    for named, reference, warned in (("pieces", "ref", 1), ("halves", "pieces", 2), ("ref", "ref", 0)):
        evaluate.main([f"{named}={tmp_path / named}", "--reference", str(tmp_path / reference)])
        log = capsys.readouterr().err
        assert log.count("most lines hold subwords") == warned and (f"{named}: most lines" in log) == (warned > 0)


def test_command_writes_json_markdown_and_latex(tmp_path, capsys):
    """A log and plain text of the same system score alike; every number of the JSON is in both tables."""
    (tmp_path / "ref").write_text("\n".join(REFERENCES) + "\n")
    (tmp_path / "plain").write_text("\n".join(damaged(2)) + "\n")
    log = [f"D-{k}\t-0.5\t{line}\n" for k, line in enumerate(damaged(2))]
    (tmp_path / "log").write_text("".join(reversed(log)))
    (tmp_path / "better_%").write_text("\n".join(damaged(4)) + "\n")
    output = tmp_path / "results.json"
    systems = [f"{name}={tmp_path / name}" for name in ("plain", "log", "better_%")]
    options = ["--significance", "bootstrap", "--samples", "100", "--by-length", "7", "15", "--tokenized-bleu", "cased"]
    options += ["--metrics", "bleu", "chrf", "ter", "--language", "de", "--documents", str(tmp_path / "ref")]
    evaluate.main([*systems, "--reference", str(tmp_path / "ref"), *options, "-o", str(output)])
    printed = capsys.readouterr().out
    document = json.loads(output.read_text())
    plain, from_log, better = document["systems"]
    assert {**plain, "system": "log"} == from_log and better["bleu"] > plain["bleu"]
    evaluate.main(["--markdown", str(output)])
    markdown = capsys.readouterr().out
    evaluate.main(["--latex", str(output)])
    latex = capsys.readouterr().out
    p = document["significance"]["systems"]["better_%"]["bleu"]["p"]
    for table in (printed, markdown, latex):
        for value in (better["bleu"], better["chrf"], better["ter"], better["d_bleu"], better["tokenized_bleu"]):
            assert f"{value:.2f}" in table
        assert f"{p:.3f}" in table and f"{better['by_length'][2]['bleu']:.2f}" in table
        assert better["ter_signature"] in table
    assert r"better\_\%" in latex and latex.count(r"\begin{tabular}") == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=log", ("x", ["log"], None)),
        ("x=log,model.pt", ("x", ["log"], "model.pt")),
        ("x=rank0:rank1,model.pt", ("x", ["rank0", "rank1"], "model.pt")),
        ("lr=0.1=log", ("lr=0.1", ["log"], None)),
        ("x=a=b", ("x", ["a=b"], None)),
        ("x=a,b", ("x", ["a,b"], None)),
        ("x=a,b,b,c.pt", ("x", ["a,b"], "b,c.pt")),
        ("x=a:b:rank0:a,b,b,c.pt", ("x", ["a:b", "rank0", "a,b"], "b,c.pt")),
        ("a,b:c=rank0,model.pt", ("a,b:c", ["rank0"], "model.pt")),
        ("x=log,./b", ("x", ["log"], "./b")),  # "log,b" exists, "log,./b" does not
        ("x=log,b", ("x", ["log,b"], None)),
        ("x==", ("x", ["="], None)),
        ("x=,", ("x", [","], None)),
    ],
)
def test_any_existing_file_can_be_named(tmp_path, monkeypatch, text, expected):
    """Names and paths were cut at the first ``=``, ``,`` and ``:`` they hold."""
    monkeypatch.chdir(tmp_path)
    for name in ("log", "log,b", "rank0", "rank1", "model.pt", "a=b", "a,b", "b,c.pt", "a:b", "b", "=", ","):
        (tmp_path / name).touch()
    assert evaluate.parse_system(text) == expected


def test_a_reader_that_leaves_does_not_cost_the_results(tmp_path):
    """``ap-evaluate -o results.json | head -1`` printed first and then ended without the file."""
    reference, output = write(tmp_path / "ref", "\n".join(REFERENCES) + "\n"), tmp_path / "results.json"
    code = "import sys; from ap_fairseq.cli.evaluate import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, f"x={reference}", "--reference", reference, "-o", str(output)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, **pipes, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as program:
        program.stdout.close()
        assert b"Traceback" not in program.stderr.read()
    assert results.read_results(output)["systems"][0]["bleu"] == pytest.approx(100)


def with_buckets(document, *ends):
    """Give the system of a results file a bucket of lengths, and add another system with a bucket of its own."""
    (system,) = document["systems"]
    buckets = [{"least": 0, "most": most, "sentences": 4, "bleu": 1.0} for most in ends]
    document["systems"] = [
        {**system, "system": name, "by_length": [bucket]} for name, bucket in zip("xy", buckets, strict=True)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("systems"), "has no entry 'systems'"),
        (lambda d: d.update(systems={"x": 1}), "'systems' is not a list"),
        (lambda d: d["systems"].append("x"), "system 2 has no name"),
        (lambda d: d["systems"].append(d["systems"][0]), "has two systems of one name"),
        (lambda d: d["systems"][0].update(bleu="12"), r"system 1 \(x\): bleu is '12', not a number"),
        (lambda d: d["systems"][0].update(bleu=float("nan")), "holds NaN, which is not a number"),
        (lambda d: d["systems"][0].update(comet=float("-inf")), "holds -Infinity, which is not a number"),
        (lambda d: d["systems"][0].update(sparsity={"cross": {"effective": 1}}), "sparsity of cross lacks"),
        (lambda d: d["systems"][0].update(by_length=[{}]), "'by_length' is damaged"),
        (lambda d: d["systems"][0].update(by_length=5), "'by_length' is not a list"),
        (lambda d: with_buckets(d, 10, 12), r"system 2 \(y\): 'by_length' has the buckets \[\(0, 12, 4\)\]"),
        (lambda d: d.pop("versions"), "lacks 'versions'"),
        (lambda d: d.update(significance={"systems": {}}), "'significance' does not cover every system"),
        (
            lambda d: d.update(significance={"systems": 5, "signatures": 5}),
            "'significance' does not cover every system",
        ),
        (
            lambda d: d.update(significance={"systems": {"x": 5}, "signatures": {}}),
            "the 'significance' of x is damaged",
        ),
    ],
)
def test_damage_inside_a_results_file_is_named(tmp_path, capsys, change, message):
    """What json reads, but ap-evaluate did not write, ended in a KeyError that did not name the file."""
    (tmp_path / "ref").write_text("\n".join(REFERENCES) + "\n")
    path = tmp_path / "results.json"
    evaluate.main([f"x={tmp_path / 'ref'}", "--reference", str(tmp_path / "ref"), "-o", str(path)])
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    capsys.readouterr()
    for flag in ("--markdown", "--latex"):
        with pytest.raises(SystemExit) as stop:
            evaluate.main([flag, str(path)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and re.search(f"error: .*results.json.*{message}", error), error


def test_two_entries_of_one_name_in_a_results_file_are_refused(tmp_path):
    """json takes the last one silently."""
    path = write(tmp_path / "results.json", '{"systems": [{"system": "x", "bleu": 1, "bleu": 2}]}')
    with pytest.raises(ArtifactError, match="results.json has two entries 'bleu' in one object"):
        results.read_results(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x=ref", "x=ref"], "system x is given twice"),
        (["x=ref", "-o", "ref", "--overwrite"], "output ref is the input ref"),
        (["x=ref", "--metrics", "bleu", "bleu"], "--metrics bleu is given twice"),
        (["x=ref", "--separator", ""], "--separator is empty"),
        (["ref"], "system 'ref' is not of the form NAME=FILE"),
        (["x=."], "system 'x=.': . is not a file"),
        (["x=ref:gone"], "system 'x=ref:gone': gone is not a file"),
        (["x=ref", "--significance", "bootstrap"], "compares two systems or more, got 1"),
        (["x=short"], "x: 1 hypotheses for 120 references"),
        (["x=ref", "--comet", "m"], "--comet needs --source"),
        (["x=ref", "--tokenized-bleu", "cased"], "--tokenized-bleu needs --language"),
        (["x=ref", "--samples", "5"], "--samples 5 takes at least 1 and goes with --significance"),
        (["x=ref", "--documents", "short"], "1 document names for 120 references"),
        (["x=ref,gone.pt"], "checkpoint gone.pt does not exist"),
        (["x=ref", "--stages", "gone"], "--stages gone holds no stage marks"),
        (["x=ref", "--stages", "."], "is not the mark of a finished stage"),
        (["--markdown", "ref"], "ref is not JSON"),
        (["x=latin"], "latin is not UTF-8"),
        (["x=ref,latin"], "error: latin cannot be read as a checkpoint"),
    ],
)
def test_command_refuses_what_it_cannot_score(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ref").write_text("\n".join(REFERENCES) + "\n")
    (tmp_path / "short").write_text("one\n")
    (tmp_path / "latin").write_bytes("Öffnen\n".encode("latin-1") * len(REFERENCES))
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*arguments, "--reference", "ref"])
    assert stop.value.code == 2 and message in capsys.readouterr().err
