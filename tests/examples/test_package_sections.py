"""examples/package_sections: the set from apt's lists, and a run of every stage."""

import json
import random
import re
from pathlib import Path

import pytest
from result_tables import script

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "package_sections"

PACKAGES = """Package: nethack
Source: nethack (3.6)
Description: a game
 Section: no field of this stanza
Section: games

Package: sendmail
Section: contrib/mail

Package: unknown
Priority: optional
"""


def module(name: str):
    return script(EXAMPLE / f"{name}.py")


@pytest.fixture
def lists(tmp_path):
    """Packages of two sections, whose descriptions differ in their words; three packages of a source."""
    draw, folder = random.Random(1), tmp_path / "lists"
    folder.mkdir()
    packages, descriptions = [], []
    for k in range(300):
        section, words = (("games", "castle dragon level"), ("mail", "letter folder inbox"))[k % 2]
        text = " ".join(draw.choices([*words.split(), "a", "the", "of"], k=12))
        packages.append(f"Package: p{k}\nSource: s{k // 6}\nSection: {section}\n")
        descriptions.append(f"Package: p{k}\nDescription-md5: {k}\nDescription-en: {section} {k}\n {text}\n")
    (folder / "Packages").write_text("\n".join(packages), "utf-8")
    (folder / "Translation-en").write_text("\n".join(descriptions), "utf-8")
    return folder


def test_sections_and_sources_of_packages():
    found = list(module("sections").sections_of(PACKAGES.splitlines()))
    assert found == [("nethack", "nethack", "games"), ("sendmail", "sendmail", "mail")]


def test_a_source_is_in_one_split_and_a_description_comes_once(monkeypatch):
    sections = module("sections")
    monkeypatch.setattr(sections, "LEAST", 30)
    packages = [(f"p{k}", f"s{k // 5}", "games" if k < 600 else "rare") for k in range(620)]
    described = [(f"p{k}", "", [f"title {k}", "x " * 40]) for k in range(620)]
    described += [("p1", "", ["title 0", "x " * 40]), ("unknown", "", ["title"])]
    examples = sections.examples_of(described, packages, seed=1)
    everything = [pair for pairs in examples.values() for pair in pairs]
    assert sorted(text for text, _ in everything) == sorted(f"title {k}" + 30 * " x" for k in range(600))
    assert {section for _, section in everything} == {"games"}  # rare ones are left out
    splits = {int(text.split()[1]): split for split, pairs in examples.items() for text, _ in pairs}
    assert all(splits[k] == splits[k - k % 5] for k in splits)
    assert len(examples["train"]) > 400 and len(examples["valid"]) >= 5 and len(examples["test"]) >= 20


def test_every_stage_runs(lists, tmp_path, monkeypatch):
    program = module("run")
    sections = program.sections
    monkeypatch.setattr(sections, "LEAST", 50)
    monkeypatch.setattr(program, "MODEL", program.MODEL.replace("128", "64").replace("512", "64"))
    data, out = tmp_path / "data", tmp_path / "run"
    sections.main(["--out", str(data), "--deb-dir", str(lists), "--bpe-size", "100"])
    program.main(["--data", str(data), "--out", str(out), "--updates", "30", "--seeds", "4", "--shares", "0.5"])
    results = json.loads((out / "results.json").read_text("utf-8"))
    assert re.fullmatch(r"CPU \(.+\), \d+ threads?", results["device"])
    rows = results["rows"]
    assert [(row["system"], row["seed"], row["pruned"] > 0.4) for row in rows] == [("dense", 4, False), ("50", 4, True)]
    assert rows[1]["pruned"] == pytest.approx(0.5, abs=0.02)
    assert all(row["test"] > 80 for row in rows)  # half of them by chance
    assert f"| 50% | {rows[1]['test']:.1f}% |" in " ".join((out / "results.md").read_text("utf-8").split())


def test_changed_lists_are_read_again(lists):
    """Only the name of their folder counted."""
    sections = module("sections")
    args = sections.parse_args(["--deb-dir", str(lists)])
    before = sections.steps_of(args)[0].options
    assert sections.steps_of(args)[0].options == before
    (lists / "Packages").write_text(PACKAGES, "utf-8")
    assert sections.steps_of(args)[0].options != before


def test_faults_are_named_before_training(tmp_path):
    """Shares in per cent ended the run after the dense training; 0.955 and 0.96 had one name."""
    program, out = module("run"), ["--out", str(tmp_path / "run"), "--data", str(tmp_path)]
    with pytest.raises(SystemExit, match="--shares 90 is no share of the pairs between 0 and 1"):
        program.main([*out, "--shares", "0.5", "90"])
    with pytest.raises(SystemExit, match="--updates 0: not a number of updates from 1"):
        program.main([*out, "--updates", "0"])
    with pytest.raises(SystemExit, match=r"label/dict.txt does not exist; expected a dictionary of labels"):
        program.main(out)
    args = program.get_parser().parse_args([*out, "--shares", "0.955", "0.96", "0.29"])
    assert program.Experiment(args).shares == {"95.5": 0.955, "96": 0.96, "29": 0.29}


def test_a_folder_without_lists_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="has no file Translation-en; it comes from main/i18n"):
        module("sections").main(["--out", str(tmp_path / "data"), "--deb-dir", str(tmp_path)])
