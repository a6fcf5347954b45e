"""examples/common/resample_pages.py: intervals of differences in BLEU over sentences and over pages."""

import json

import pytest
import resample_pages

from ap_fairseq.evaluation.scores import score
from ap_fairseq.files import UserError

REFERENCES = [f"der Satz {k} steht auf einer Seite der Hilfe" for k in range(60)]
WORSE = "ein Satz steht da und ist doch recht falsch"


def test_a_gain_on_one_long_page_is_sure_by_sentences_and_unsure_by_pages():
    """Half of the sentences are of one page, on which alone the system is better; on others it is a little worse."""
    pages = ["long" if k < 30 else f"page {k}" for k in range(60)]
    system = [line if k < 30 or k % 3 else WORSE for k, line in enumerate(REFERENCES)]
    baseline = [WORSE if k < 30 else line for k, line in enumerate(REFERENCES)]
    made = resample_pages.resample({"system": ("dense", system, baseline)}, REFERENCES, pages, samples=200)
    (row,) = made["systems"]
    expected = [score(text, REFERENCES, metrics=("bleu",))["bleu"] for text in (system, baseline)]
    assert row["difference"] == pytest.approx(expected[0] - expected[1]) and row["baseline"] == "dense"
    assert 0 < row["sentences"][0] < row["difference"] < row["sentences"][1]
    assert row["pages"][0] < 0 < row["pages"][1]
    assert (made["test_sentences"], made["test_pages"]) == (60, 31)
    assert made["largest_pages"][0] == {"page": "long", "sentences": 30}


def test_pages_of_one_sentence_are_sentences():
    made = resample_pages.resample({"s": ("d", REFERENCES[::-1], [WORSE] * 60)}, REFERENCES, REFERENCES, samples=50)
    assert made["systems"][0]["pages"] == made["systems"][0]["sentences"]


def test_a_page_is_one_in_all_languages(tmp_path, capsys):
    run, sentences = tmp_path / "run", tmp_path / "data" / "sentences"
    (run / "translations").mkdir(parents=True)
    sentences.mkdir(parents=True)
    compared = [{"system": "dense"}, {"system": "pruned", "against_dense_equal": {"baseline": "dense"}}]
    (run / "results.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in compared))
    (sentences / "test.many").write_text("ein Satz in dem Text\nune phrase dans le texte\n")
    (sentences / "test.pages").write_text("de:help/a\t0\t1\nfr:help/a\t0\t1\n")
    for name in ("dense", "pruned"):
        (run / "translations" / f"{name}.txt").write_text("ein Satz in dem Text\nune page dans le texte\n")
    command = [run, "--data", tmp_path / "data", "--target", "many", "--samples", 20, "--out"]
    for flags, pages in (["--parts", ":"], 1), ([], 2):
        resample_pages.main([str(word) for word in [*command, tmp_path / f"{pages}.json", *flags]])
        made = json.loads((tmp_path / f"{pages}.json").read_text())
        assert made["test_pages"] == pages and made["systems"][0]["pages"] == [0, 0]
    (sentences / "test.pages").write_text("de:help/a\t0\t1\n")
    with pytest.raises(SystemExit):
        resample_pages.main([str(word) for word in [*command, tmp_path / "none.json"]])
    assert "the pages of 1 sentences are given for 2 references" in capsys.readouterr().err
    with pytest.raises(UserError, match="1 hypotheses for 2 references"):
        resample_pages.resample({"s": ("d", ["a"], ["a", "b"])}, ["a", "b"], ["p", "p"])
