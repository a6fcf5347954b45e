"""The corpus builder of examples/libreoffice_one_to_many, on small hand-made packages; no network."""

import building
import one_to_many
import parallel_text
import pytest
from packages import DPKG, write_command, write_help_packages
from sentences import write_pages


@pytest.fixture(scope="module")
def deb_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("debs")
    write_help_packages(folder, write_pages(60, seed=4), ["en", "de", "fr"])
    return folder


@pytest.fixture
def run(tmp_path, deb_dir, monkeypatch):
    write_command(tmp_path / "bin", "dpkg", DPKG)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(parallel_text, "preprocess", lambda pair, folders, dictionary, out, *rest: out.mkdir())
    monkeypatch.setattr(one_to_many, "SHARES", {"test": 0.15, "valid": 0.1})

    def run(*options):
        words = ["--languages", "fr", "de", "--out", str(tmp_path / "out"), "--deb-dir", str(deb_dir)]
        args = one_to_many.parse_args([*words, "--bpe-size", "500", *options])
        return building.build(args.out, one_to_many.steps_of(args), vars(args))

    return run


def test_sources_name_their_language_and_no_held_out_text_is_in_training(run, tmp_path):
    """A page was in training in one language and in the test set of another, with the same English text."""
    counts = run()
    english, others, pages = {}, {}, {}
    for split in building.SPLITS:
        sides = [building.read_lines(tmp_path / f"out/sentences/{split}.{name}") for name in ("en", "many", "pages")]
        assert len(sides[0]) == len(sides[1]) == len(sides[2]) == counts["split_pairs"][split] > 0
        languages = [line.split(":")[0] for line in sides[2]]
        assert [line.split(" ")[0] for line in sides[0]] == [f"<2{language}>" for language in languages]
        assert counts["split_pairs_of_language"][split] == {name: languages.count(name) for name in ("de", "fr")}
        english[split] = {parallel_text.match_key(line.split(" ", 1)[1]) for line in sides[0]}
        others[split] = set(map(parallel_text.match_key, sides[1]))
        pages[split] = {line.split("\t")[0].partition(":")[2] for line in sides[2]}
    for part in (english, others, pages):
        assert not part["test"] & part["train"] and not part["valid"] & part["train"]
    assert not english["test"] & english["valid"]
    assert f"{counts['split_pairs']['test']:,}" in one_to_many.summary(counts)


def test_a_tag_is_one_piece(run, tmp_path):
    assert run()["dictionary"] == 500
    for line in building.read_lines(tmp_path / "out/bpe-sentences/test.en"):
        assert line.split(" ")[0] in ("▁<2de>", "▁<2fr>")
    processor = building.load_sentencepiece(tmp_path / "out/spm.model")
    raw = building.read_lines(tmp_path / "out/sentences/test.en")
    assert [processor.decode(pieces) for pieces in building.encode(processor, raw)] == raw


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--languages", "de", "pt_BR", "pt-br"], "--languages names pt-br; give each target language once"),
        (["--languages", "de", "en-US"], "--languages names en; give each"),
        (["en", "de"], "invalid choice: 'de' (choose from"),
        (["--character-coverage", "0.5"], "--character-coverage is 0.5, expected between 0.9 and 1"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        one_to_many.parse_args(arguments)
    assert message in capsys.readouterr().err
