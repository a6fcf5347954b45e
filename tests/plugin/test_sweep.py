"""Many systems in one process translate as single commands do; schedules and sweeps resume and say what differs."""

import dataclasses
import json
import re
from pathlib import Path

import forked
import pytest
import sweep
import sweep_table
import yaml
from fairseq import options
from plugin.commands import PLUGIN, ROOT, TINY, generate, run
from sacrebleu import BLEU
from systems import System, expand

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.cli import prune_schedule
from ap_fairseq.evaluation.scores import score
from ap_fairseq.experiments import translation
from ap_fairseq.experiments.translation import Search, Translation, translate
from ap_fairseq.files import ArtifactError
from ap_fairseq.progress import last_value
from ap_fairseq.pruning.flags import budget_flags, parse_mask_flags
from ap_fairseq.training.schedule import share_of_round

ARCH = "pruned_transformer"

TRAINING = (
    f"{' '.join(TINY)} --optimizer adam --lr 1e-3 --lr-scheduler fixed --criterion cross_entropy --max-tokens 2000 "
    "--cpu --num-workers 0 --no-epoch-checkpoints --log-format json --disable-validation"
)


def run_sweep(folder, corpus, dense=None) -> str:
    """Run the sweep of a folder in a fork; return what it prints."""
    words = command(folder, corpus, dense)
    status = forked.call(forked.sweep, words, folder / "printed", {"OMP_NUM_THREADS": "1"})
    printed = (folder / "printed").read_text()
    assert status == 0, printed[-6000:]
    return printed


@pytest.fixture(scope="module")
def corpus(toy_text, data_bin, tmp_path_factory) -> Path:
    """The toy corpus laid out as prepare.py lays out its own."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "data-bin").mkdir()
    (folder / "data-bin" / "sentences").symlink_to(data_bin)
    (folder / "sentences").symlink_to(toy_text)
    return folder


def description(**changes):
    return {
        "pair": ["en", "de"],
        "training": f"--task translation --arch transformer {TRAINING}",
        "dense": "--dropout 0",
        "dense_updates": 3,
        "dense_seeds": [1],
        "tune": "--dropout 0.1",
        "tune_updates": 4,
        "record": "--cpu --max-tokens 3000 --num-workers 0 --importance",
        "search": {"beam": 2, "max_tokens": 1500, "cpu": True, "on_device": True},
        "systems": [
            {"criterion": "dense"},
            {"criterion": "mean", "sparsity": 0.5, "schedule": ["untuned", "one-shot"], "seed": [1, 2]},
            {"criterion": "mean", "sparsity": 0.6, "schedule": "gradual", "rounds": 2},
            {"criterion": "importance", "kinds": "own", "options": "--encoder-self 0.7 --cross 0.4"},
            {"criterion": "top-k", "sparsity": 0.5},
        ],
        **changes,
    }


@pytest.fixture(scope="module")
def swept(corpus, dense, tmp_path_factory):
    """A finished sweep: (description file, output folder, what it printed)."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep.yaml").write_text(yaml.safe_dump(description()))
    return folder, run_sweep(folder, corpus, dense)


def command(folder, corpus, dense=None, name="sweep.yaml") -> list[str]:
    words = [folder / name, "--data", corpus, "--out", folder / "out", "--jobs", 2]
    return [*map(str, words), *(["--dense", f"1={dense}"] if dense else [])]


def results(folder) -> dict[str, dict]:
    lines = (folder / "out" / "results.jsonl").read_text().splitlines()
    return {result["system"]: result for result in map(json.loads, lines)}


def test_every_system_of_a_sweep_has_a_line_with_its_signature(swept):
    found = results(swept[0])
    assert set(found) == {
        "dense.untuned.s1",
        *(f"mean.global.50.g1.{schedule}.s{seed}" for schedule in ("untuned", "one-shot") for seed in (1, 2)),
        "mean.global.60.g1.gradual.r2.s1",
        "importance.own.g1.encoder-self-0.7-cross-0.4.untuned.s1",
        "top-k.global.50.untuned.s1",
    }
    shares = found.pop("importance.own.g1.encoder-self-0.7-cross-0.4.untuned.s1")["sparsity"]
    for kind, share in {"encoder_self": 0.7, "decoder_self": 0.0, "cross": 0.4}.items():
        assert shares[kind]["effective"] == pytest.approx(share, abs=0.01)
    for name, result in found.items():
        target = 0.6 if "60" in name else 0.0 if "dense" in name else 0.5
        assert result["total"]["effective"] == pytest.approx(target, abs=0.1 if "top-k" in name else 0.01)
        assert "tok:13a" in result["bleu_signature"] and len(result["masks_sha256"]) == 64
        assert len(result["checkpoint_sha256"]) == 64 and result["search"]["beam"] == 2 and result["sentences"] == 220
        if name != "dense.untuned.s1":
            assert result["against_dense"]["baseline"] == "dense.untuned.s1"
            assert 0 < result["against_dense"]["bleu"]["p"] <= 1
    tuned = {found[f"mean.global.50.g1.one-shot.s{seed}"]["checkpoint_sha256"] for seed in (1, 2)}
    assert len(tuned) == 2  # the seed reaches training
    assert found["mean.global.50.g1.untuned.s1"]["bleu"] == found["mean.global.50.g1.untuned.s2"]["bleu"]


def test_a_decay_of_the_learning_rate_ends_with_the_training(corpus, tmp_path):
    decaying = description(training="--arch transformer --lr-scheduler polynomial_decay")
    made = sweep.Sweep(decaying, corpus, tmp_path, 1, {})
    flags = made.training("tune", 1, 7)
    assert flags[flags.index("--total-num-update") + 1] == "7"
    assert "--total-num-update" not in sweep.Sweep(description(), corpus, tmp_path, 1, {}).training("tune", 1, 7)


def test_trainings_without_the_checkpoint_that_is_needed_are_refused(corpus, tmp_path):
    """A dense model trained without validation, for hours, and its best checkpoint did not exist; nor did later."""
    made = sweep.Sweep(description(), corpus, tmp_path, 1, {})
    with pytest.raises(ArtifactError, match="--disable-validation among .*/dense.s1/checkpoint_best.pt would not be"):
        made.run("dense")
    made.given_dense[1] = "dense.pt"
    for system in made.systems:
        made._require_best(system)
    own = {"criterion": "dense", "schedule": "scratch", "flags": "--no-save"}
    made = sweep.Sweep(description(training="--arch transformer", systems=[own]), corpus, tmp_path, 1, {})
    with pytest.raises(ArtifactError, match="--no-save among .* dense.scratch.*/checkpoint_best.pt would not be"):
        made.run("train")
    best = Path(made.trained(made.systems[0]))
    best.parent.mkdir(parents=True)
    best.touch()  # trained before
    made._require_best(made.systems[0])
    assert not (tmp_path / "dense.s1").exists()


def test_flags_of_a_system_reach_its_training_its_name_and_its_baseline(corpus, tmp_path, monkeypatch):
    dropout = {"schedule": "one-shot", "flags": "--dropout 0.3 --weight-decay 0.1"}
    listed = [{"criterion": "dense", **dropout}, {"criterion": "mean", "sparsity": 0.5, **dropout}]
    listed.append({"criterion": "mean", "sparsity": 0.5, "schedule": "one-shot"})
    made = sweep.Sweep(description(systems=listed), corpus, tmp_path, 1, {})
    dense, pruned, plain = made.systems
    assert pruned.name == "mean.global.50.g1.one-shot.dropout-0.3-weight-decay-0.1.s1" and made.masks(
        pruned
    ) == made.masks(plain)
    assert made.baselines(pruned) == {"against_dense_tuned": dense, "against_dense_equal": dense}
    assert made.baselines(plain) == {"against_dense_equal": dense}
    result = dataclasses.asdict(pruned) | {"group": pruned.group}
    assert sweep_table.title(result) == "mean 50%, fine-tuned, dropout 0.3 weight-decay 0.1"
    commands = []
    monkeypatch.setattr(made.stages, "run", lambda name, *command: commands.append([str(word) for word in command]))
    for system in made.systems:
        made.tune(system)
    assert [last_value("--dropout", words) for words in commands] == ["0.3", "0.3", "0.1"]
    assert [last_value("--weight-decay", words) for words in commands] == ["0.1", "0.1", None]


def test_the_tuned_baseline_has_as_many_updates(corpus, tmp_path):
    systems = [
        {"criterion": "dense", "schedule": ["one-shot", "untuned"]},
        {"criterion": "dense", "schedule": "one-shot", "updates": 9},
        {"criterion": "window", "sparsity": 0.5, "schedule": "one-shot"},
        {"criterion": "window", "sparsity": 0.5, "schedule": "one-shot", "updates": 9},
        {"criterion": "window", "sparsity": 0.5, "schedule": "one-shot", "updates": 8},
    ]
    made = sweep.Sweep(description(systems=systems), corpus, tmp_path, 1, {})
    names = [{name: found.name for name, found in made.baselines(system).items()} for system in made.systems[3:]]
    dense = {"against_dense": "dense.untuned.s1"}
    assert names == [
        dense | dict.fromkeys(["against_dense_tuned", "against_dense_equal"], "dense.one-shot.s1"),
        dense | dict.fromkeys(["against_dense_tuned", "against_dense_equal"], "dense.one-shot.u9.s1"),
        dense,
    ]


def test_total_updates_include_those_behind_the_masks(corpus, tmp_path):
    """A comparison at equal updates counted neither the dense model that masks were made from nor the first stage."""
    systems = [
        {"criterion": "dense", "schedule": ["scratch", "one-shot", "untuned"]},
        {"criterion": "mean", "sparsity": 0.4, "schedule": ["scratch", "while-training", "one-shot", "untuned"]},
        {"criterion": "mean", "sparsity": 0.6, "schedule": "gradual", "rounds": 1, "start": 0.4},
    ]
    made = sweep.Sweep(description(systems=systems), corpus, tmp_path, 1, {})
    assert [made.total_updates(system) for system in made.systems] == [3, 7, 3, 6, 3, 7, 3, 10]
    with pytest.raises(ArtifactError, match="criterion percentile is not for systems of schedule while-training"):
        expand([{"criterion": "percentile", "sparsity": 0.5, "schedule": "while-training"}])


def test_flags_of_a_system_win_over_the_schedule_of_the_sweep(corpus, tmp_path, monkeypatch):
    systems = [{"criterion": "mean", "sparsity": 0.4, "schedule": "while-training", "flags": "--prune-start 7"}]
    made = sweep.Sweep(description(systems=systems, prune="--prune-start 2 --prune-end 9"), corpus, tmp_path, 1, {})
    commands = []
    monkeypatch.setattr(made.stages, "run", lambda name, *command: commands.append([str(word) for word in command]))
    made.tune(made.systems[0])
    expected = {"--prune-start": "7", "--prune-end": "9", "--task": "pruned_translation", "--attention-masks": "none"}
    expected |= {"--arch": "pruned_transformer", "--max-update": "3"}
    expected |= {"--prune-flags": "--total 0.4 --criterion mean --granularity 1 --seed 1"}
    assert {flag: last_value(flag, commands[0]) for flag in expected} == expected


def test_the_table_of_two_corpora_names_their_sizes(corpus, tmp_path, capsys):
    made = sweep.Sweep(description(), corpus, tmp_path, 1, {})
    result = {
        **dataclasses.asdict(made.systems[0]), "group": "dense.untuned", "system": "dense.untuned.s1", "updates": 0,
        "sparsity": {}, "total": {"effective": 0.0}, "device": "CPU", "versions": {"torch": "2"}, "valid_ppl": 3.0,
    }  # fmt: skip
    for name, pairs in (("a", made.training_pairs), ("b", 10**6)):
        (tmp_path / name).write_text(json.dumps({**result, "training_pairs": pairs}) + "\n")
    assert made.training_pairs > 100
    sweep.main(["--table", str(tmp_path / "a"), str(tmp_path / "b")])
    printed = capsys.readouterr().out
    assert f"| dense, {made.training_pairs:,} training pairs " in printed and "| dense, 1,000,000 training" in printed


def test_each_part_of_the_test_set_is_scored_by_itself(tmp_path):
    """Expected scores are sacreBLEU's of the lines, or pages, whose page has that name."""
    lines = [
        "of one page the text",
        "and its second line",
        "ein anderer Text auf Deutsch",
        "noch eine Seite von Texten",
    ]
    references = [f"{line} {line}" for line in lines]
    names = ["fr:a\t0\t1", "fr:a\t1\t1", "de:b\t0\t1", "de:c\t0\t1"]
    for level, texts in (("sentences", references), ("pages", [" ".join(references[:2]), *references[2:]])):
        (tmp_path / "data-bin" / level).mkdir(parents=True)
        (tmp_path / level).mkdir()
        (tmp_path / level / "test.de").write_text("\n".join(references) + "\n")
        (tmp_path / level / "test.pages").write_text("\n".join(names) + "\n")
        made = sweep.Sweep(description(level=level, parts=":"), tmp_path, tmp_path / level / "out", 1, {})
        output = made.translation(made.systems[0])
        output.parent.mkdir(parents=True)
        output.write_text("\n".join([*references[:2], *lines[2:]]) + "\n")
        parts = made.scores(made.systems[0])["parts"]
        german = BLEU().corpus_score(lines[2:], [texts[-2:]])
        assert list(parts) == ["de", "fr"] and parts["de"]["bleu"] == german.score < 50
        assert parts["fr"]["bleu"] == pytest.approx(100) and parts["fr"]["sentences"] == len(texts) - 2
        assert parts["de"]["length_ratio"] == 0.5
        made.parts_end = "/"
        with pytest.raises(ArtifactError, match="`parts` is '/', which is not in the page 'fr:a'"):
            made.scores(made.systems[0])


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*/sweeps/*.yaml")), ids=lambda file: file.stem)
def test_published_sweeps_are_well_formed(file, tmp_path, monkeypatch):
    """Every system of every sweep: its keys, names, flags of ap-masks and of fairseq-train."""
    described = yaml.safe_load(file.read_text())
    level = described.get("level", "sentences")
    (tmp_path / "data" / "data-bin" / level).mkdir(parents=True)
    made = sweep.Sweep(described, tmp_path / "data", tmp_path / "out", 1, {})
    commands = []
    monkeypatch.setattr(made.stages, "run", lambda name, *command: commands.append([str(word) for word in command]))
    for system in made.systems:
        assert len(budget_flags(parse_mask_flags(system.mask_flags()))) == 1
        if system.schedule not in ("untuned", "gradual"):
            made.tune(system)
            args = options.parse_args_and_arch(options.get_training_parser(), commands.pop()[1:])
            assert args.max_update == made.updates(system) and args.arch.startswith("pruned_transformer")


def test_dense_and_pruned_while_training_at_equal_updates(corpus, tmp_path, monkeypatch):
    """Neither needs a dense model first; each translates with its own masks and the length penalty that validation
    chose, and the pruned one is compared with the best of the dense ones of as many updates."""
    training = description()["training"].replace(" --disable-validation", "").replace("--lr 1e-3", "--lr 3e-3")
    systems = [
        {"criterion": "dense", "schedule": "scratch", "flags": ["--dropout 0.3", "--dropout 0.1"]},
        {"criterion": "importance", "sparsity": 0.5, "schedule": "while-training", "flags": "--dropout 0.1"},
    ]
    made = description(
        training=training,
        dense_updates=24,
        prune="--prune-start 10 --prune-end 20 --prune-every 5 --prune-sample 60",
        systems=systems,
        search={"beam": 2, "max_tokens": 1500, "cpu": True, "lenpens": [0.2, 3.0], "max_len_b": 20},
    )
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(made))
    printed = run_sweep(tmp_path, corpus)
    assert not (tmp_path / "out" / "dense.s1").exists() and not list((tmp_path / "out").glob("stats*"))
    found = results(tmp_path)
    dense = [found[f"dense.scratch.dropout-{rate}.s1"] for rate in ("0.3", "0.1")]
    pruned = found["importance.global.50.g1.while-training.dropout-0.1.s1"]
    assert [row["total"]["effective"] for row in dense] == [0, 0]
    assert pruned["total"]["effective"] == pytest.approx(0.5, abs=0.01)
    for row in (*dense, pruned):
        assert row["total_updates"] == 24
        assert row["valid_bleu"][str(row["lenpen"])] == max(row["valid_bleu"].values())
    best = min(dense, key=lambda row: row["valid_nll"])
    assert pruned["against_dense_equal"]["baseline"] == best["system"]
    assert "against dense, equal updates (p)" in printed and " length penalty |" in printed

    # The task of the pruned checkpoint would give every system the generator, and the captured masks, of the first.
    built = []

    class Spy(translation.PrunedSequenceGenerator):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            built.append(self)

    monkeypatch.setattr(translation, "PrunedSequenceGenerator", Spy)
    checkpoint = str(tmp_path / "out" / "systems" / pruned["system"] / "checkpoint_best.pt")
    again = [Translation(str(tmp_path / f"{name}.txt"), checkpoint, None) for name in "ab"]
    search = Search(beam=2, max_tokens=1500, cpu=True, on_device=True, lenpens=[pruned["lenpen"]], max_len_b=20)
    translate(again, str(corpus / "data-bin" / "sentences"), search)
    assert len(built) == 2
    expected = (tmp_path / "out" / "translations" / f"{pruned['system']}.txt").read_text()
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "b.txt").read_text() == expected


def test_a_length_penalty_that_validation_chose_is_that_of_fairseq(corpus, dense, tmp_path):
    """The text is that of fairseq-generate with this --lenpen, and the BLEU on the validation data is of its text."""
    search = Search(beam=2, max_tokens=1500, cpu=True, lenpens=[0.1, 3.0], max_len_b=20)
    data = corpus / "data-bin" / "sentences"
    translate([Translation(str(tmp_path / "a.txt"), str(dense), None)], str(data), search)
    made = json.loads((tmp_path / "a.json").read_text())
    options = ["--beam", 2, "--remove-bpe", "sentencepiece", "--max-len-b", 20, "--lenpen"]
    log = generate(data, dense, *options, made["lenpen"])
    expected = dict(re.findall(r"^D-(\d+)\t\S+\t(.*)$", log, re.M))
    assert (tmp_path / "a.txt").read_text().splitlines() == [expected[str(n)] for n in range(220)]
    valid = read_hypotheses_of(generate(data, dense, "--gen-subset", "valid", *options, 3.0))
    assert made["valid_bleu"]["3.0"] == pytest.approx(score(*valid, ["bleu"])["bleu"], abs=1e-6)


def test_the_sparsity_of_top_k_is_that_of_the_test_set_whatever_was_searched_before(corpus, dense, tmp_path):
    """Searches of the validation data, by which the length penalty is chosen, were counted too."""
    data, shares = str(corpus / "data-bin" / "sentences"), []
    for name, lenpens in (("one", [3.0]), ("several", [3.0, 3])):
        system = Translation(str(tmp_path / f"{name}.txt"), str(dense), None, {"top_k": "4"})
        translate([system], data, Search(beam=1, max_tokens=1500, cpu=True, lenpens=lenpens, max_len_b=20))
        shares.append(json.loads((tmp_path / f"{name}.json").read_text())["dynamic"]["sparsity"])
    assert shares[0] == shares[1]


def read_hypotheses_of(log: str) -> tuple[list[str], list[str]]:
    """Hypotheses and references of a log of fairseq-generate, in the order of the data."""
    sides = [dict(re.findall(pattern, log, re.M)) for pattern in (r"^D-(\d+)\t\S+\t(.*)$", r"^T-(\d+)\t(.*)$")]
    return tuple([side[str(n)] for n in range(len(side))] for side in sides)


def test_the_table_shows_means_over_seeds(swept):
    folder, printed = swept
    found = results(folder)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    rows = {cells[0]: cells for cells in lines}
    bleu = [found[f"mean.global.50.g1.one-shot.s{seed}"]["bleu"] for seed in (1, 2)]
    row = rows["mean 50%, fine-tuned"]
    assert row[1:4] == ["2", "4", "7"] and row[9] == sweep_table._mean(bleu, ".2f")
    assert sweep_table.format_table(list(found.values())) in printed


def test_means_have_a_deviation_where_seeds_differ():
    """Equal numbers were shown with "± 0.0%"."""
    assert [sweep_table._mean(values, "+.1f") for values in ([1, 3], [1.01, 1], [1], [])] == [
        "+2.0 ± 1.4",
        "+1.0",
        "+1.0",
        "",
    ]


def test_systems_of_one_process_translate_as_fairseq_generate_does(swept, data_bin):
    """The model is reused, so nothing of an earlier system may stay; this one came after another in its process.

    Joined words are not in the dictionary, to which fairseq's post_process_prediction adds them: the generator of the
    next system then had a vocabulary of another size than its model.
    """
    out, name = swept[0] / "out", "mean.global.60.g1.gradual.r2.s1"
    log = generate(
        data_bin,
        out / "systems" / name / "round-2" / "checkpoint_last.pt",
        "--beam",
        2,
        "--remove-bpe",
        "sentencepiece",
    )
    expected = dict(re.findall(r"^D-(\d+)\t\S+\t(.*)$", log, re.M))
    found = (out / "translations" / f"{name}.txt").read_text().splitlines()
    assert found == [expected[str(n)] for n in range(220)]


def test_a_finished_sweep_repeats_nothing_and_refuses_other_settings(swept, corpus, dense, capfd):
    folder, _ = swept
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*") if path.is_file()}
    sweep.main(command(folder, corpus, dense))
    printed = capfd.readouterr().out
    changed = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert [path.name for path in changed] == ["results.jsonl"] and "running" not in printed
    (folder / "other.yaml").write_text(
        yaml.safe_dump(
            description(
                tune="--dropout 0.3",
                systems=[
                    {"criterion": "mean", "sparsity": 0.5, "schedule": "one-shot"},
                    {"criterion": "random", "sparsity": 0.5},
                ],
            )
        )
    )
    with pytest.raises(SystemExit) as stop:
        sweep.main(command(folder, corpus, dense, "other.yaml"))
    message = capfd.readouterr().err
    assert stop.value.code == 2
    assert "one-shot.s1.train" in message and "with other settings" in message and "0.3" in message


def test_rounds_record_the_current_model_and_prune_more_each_time(swept):
    folder = swept[0] / "out" / "systems" / "mean.global.60.g1.gradual.r2.s1"
    shares = []
    for number in (1, 2):
        masks = PruningMasks.load(folder / f"round-{number}" / "masks.safetensors")
        shares.append(masks.metadata["total"]["effective"])
        stats = AttentionStats.load(folder / f"round-{number}" / "stats.safetensors")
    assert shares == pytest.approx([0.6 * 7 / 8, 0.6], abs=0.01)
    first = PruningMasks.load(folder / "round-1" / "masks.safetensors")
    for kind in stats.kinds:  # what round 1 pruned had no attention when round 2 recorded, and stays pruned
        assert stats.mass[kind][~first.keep[kind]].sum() == 0
        observed = stats.support[kind] > 0
        assert not (masks.keep[kind] & ~first.keep[kind])[..., observed].any()


def test_rounds_can_start_from_a_model_that_was_trained_under_masks(corpus, dense, tmp_path):
    scratch = {"criterion": "mean", "sparsity": 0.4, "schedule": "scratch"}
    further = {"criterion": "mean", "sparsity": 0.6, "schedule": "gradual", "rounds": 1, "start": 0.4}
    training = description()["training"].replace(" --disable-validation", "")
    with pytest.raises(ArtifactError, match=r"need these in the list, too: mean\.global\.40\.g1\.scratch\.s1"):
        sweep.Sweep(description(systems=[further]), corpus, tmp_path, 1, {})
    made = description(
        training=training, systems=[further, scratch], search={"beam": 0, "max_tokens": 900, "cpu": True}
    )
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(made))
    run_sweep(tmp_path, corpus, dense)
    folder = tmp_path / "out" / "systems" / "mean.global.60.g1.from-40.gradual.r1.s1" / "round-1"
    stats = AttentionStats.load(folder / "stats.safetensors")
    first = PruningMasks.load(tmp_path / "out" / "masks" / "mean.global.40.g1.untuned.s1.d1.safetensors")
    masks = PruningMasks.load(folder / "masks.safetensors")
    assert masks.metadata["total"]["effective"] == pytest.approx(0.6, abs=0.01)
    for kind in stats.kinds:  # the pruned model was recorded, not the dense one
        assert stats.mass[kind][~first.keep[kind]].sum() == 0
        assert not (masks.keep[kind] & ~first.keep[kind])[..., stats.support[kind] > 0].any()


def test_the_schedule_as_a_command_says_what_it_pruned(dense, data_bin, tmp_path):
    """Alone among the commands that prune, it only named its files."""
    words = ["ap-prune-schedule", data_bin, "--path", dense, "--rounds", 1, "--updates", 2, "-o", tmp_path]
    words += ["--masks", "--total 0.5", "--record", "--cpu --max-tokens 3000 --num-workers 0"]
    said = run(*words, "--", "--arch", ARCH, *TRAINING.split()).splitlines()[-1]
    shares = r"cross [\d.]+%, decoder_self [\d.]+%, encoder_self [\d.]+% \(mean, granularity 1\)"
    assert re.search(rf"effective sparsity {shares} -> {tmp_path}/round-1/checkpoint_last.pt, masks {tmp_path}", said)


def test_the_schedule_as_a_command_names_what_is_wrong(dense, data_bin, tmp_path, capsys):
    """Without a budget, all rounds trained and nothing was pruned; other faults showed after the first recording."""
    common = [data_bin, "--path", dense, "-o", tmp_path, "--updates", 4, "--masks", "--total 0.5"]
    for arguments, message in (
        ([*common, "--", "--arch", "pruned_transformer", "--save-dir", "x"], "--save-dir given"),
        (
            [*common, "--", "--arch", "pruned_transformer", "--prune-end=9", "--attention-sparsity", "0.3"],
            "--attention-sparsity, --prune-end given",
        ),
        ([*common, "--", "-a", "pruned_transformer", "--max-update=5"], "--max-update given"),
        (common, "no --arch given"),
        ([*common, "--rounds", 5, "--", "--arch", "x"], "each round needs an update"),
        ([*common[:-1], "--sparsity 0.5", "--", "--arch", "x"], "--masks '--sparsity 0.5': unrecognized arguments"),
        (
            [*common, "--record", "--user-dir 'x", "--", "--arch", "x"],
            "cannot be split into flags: No closing quotation",
        ),
        ([*common, "--path", tmp_path, "--", "--arch", "x"], "is a folder; expected a fairseq checkpoint"),
        (
            [*common, "--masks", "--criterion mean", "--", "--arch", "x"],
            "must give one kind of budget: --total, --like",
        ),
        ([*common, "--masks", "--total 0.5 --cross 0.3", "--", "--arch", "x"], "must give one kind of budget"),
        ([*common, "--masks", "--total 0.5 --criterion importance", "--", "--arch", "x"], "but --record '--max-tokens"),
        (
            [*common, "--masks", "--cross 0.5 --min-heads 99", "--", "--arch", ARCH, *TINY],
            "--min-heads cross=99, but it has",
        ),
        ([*common, "--masks", "--total 0.5 --like no", "--", "--arch", ARCH], "must give one kind of budget"),
        ([*common, "--masks", "--like gone", "--", "--arch", ARCH, *TINY], "gone does not exist"),
        ([*common, "--", "--arch", ARCH, "--droput", 1], "fairseq-train flags after --: unrecognized arguments: --dro"),
        ([*common, "--", "--arch", ARCH], f"not that of {dense}: encoder.embed_tokens.weight is ["),
        ([*common[:-1], "--total=0.5", "--record", "--cpu", "--", "--arch", "x"], "invalid choice: 'x'"),
        ([tmp_path, *common[1:], "--", "--arch", ARCH, *TINY], f"{tmp_path} holds no dictionaries (dict.*.txt)"),
        ([*common, "--", "--arch", "transformer"], "--arch pruned_transformer; give that in place of transformer"),
    ):
        with pytest.raises(SystemExit) as stop:
            prune_schedule.main([str(argument) for argument in arguments])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_shares_grow_to_one():
    assert [share_of_round(n, 4) for n in (1, 2, 3, 4)] == pytest.approx([37 / 64, 56 / 64, 63 / 64, 1])
    assert [share_of_round(n, 4, "linear") for n in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(criterion="best"), "criterion 'best' of a system is not one of dense, mean"),
        (dict(criterion="top-k", schedule="one-shot"), "top-k prunes at inference time"),
        (dict(criterion="threshold"), "needs a threshold"),
        (dict(criterion="mean", schedule="one-shot", start=0.5), "start 0.5 is for systems of schedule gradual"),
        (dict(criterion="mean", kinds="encoder"), "kinds 'encoder' is not global, per-kind, own, or some of"),
        (dict(criterion="mean", kinds="own", options="--min-heads 1"), "names its budgets in options"),
        (dict(criterion="mean", kinds="own", options="--cross 0.5", sparsity=0.5), "and no sparsity"),
        (dict(criterion="mean", flags="--dropout 0.3"), "are for fairseq-train, and a system of schedule untuned has"),
        (dict(criterion="mean", sparsitty=0.5), "only the keys"),
        (dict(criterion="mean", sparsity=[0.5, 0.5]), "named twice: mean.global.50.g1.untuned.s1"),
    ],
)
def test_bad_systems_name_the_fault(changes, message):
    with pytest.raises(ArtifactError, match=message):
        expand([changes])


def test_a_sweep_by_importance_records_it(corpus, tmp_path):
    """The fault shows before the dense model is trained."""
    with pytest.raises(ArtifactError, match="need --importance among the flags of `record`"):
        sweep.Sweep(description(record="--cpu"), corpus, tmp_path, 1, {})


def test_lists_stand_for_all_combinations():
    found = expand([{"criterion": "random", "sparsity": [0.5, 0.8], "granularity": [1, 16], "seed": [1, 2]}])
    assert len(found) == 8 and found[0].mask_flags()[:2] == ["--total", "0.5"]


def test_a_translation_of_other_files_is_not_taken_for_this_one(swept, data_bin, dense):
    out = swept[0] / "out"
    system = Translation(
        str(out / "translations" / "dense.untuned.s1.txt"), str(dense), str(out / "masks" / "all-ones.d1.safetensors")
    )
    translate([system], str(data_bin), Search(beam=2, max_tokens=1500, cpu=True, on_device=True))
    others = dataclasses.replace(system, dynamic={"top_k": "cross=2"})
    search = Search(beam=2, max_tokens=1500, cpu=True, on_device=True)
    for changed in (
        lambda: translate([system], str(data_bin), Search(beam=3, max_tokens=1500, cpu=True)),
        lambda: translate([system], str(data_bin), search, subset="valid"),
        lambda: translate([others], str(data_bin), search),
    ):
        with pytest.raises(ArtifactError, match="from other files or by another search"):
            changed()


def test_the_loss_is_that_of_fairseq_and_can_be_all(corpus, dense, tmp_path):
    """Of the dense model, of a pruned one and of one that prunes anew for every sentence, without translating."""
    systems = [
        {"criterion": "dense"},
        {"criterion": "mean", "sparsity": 0.6},
        {"criterion": "top-k", "sparsity": 0.5},
    ]
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump(description(systems=systems, search={"beam": 0, "max_tokens": 900, "cpu": True}))
    )
    sweep.main(command(tmp_path, corpus, dense))
    found = results(tmp_path)
    flags = [
        "--task",
        "translation",
        "--path",
        dense,
        "--cpu",
        "--max-tokens",
        900,
        "--required-batch-size-multiple",
        1,
    ]
    log = run("fairseq-validate", corpus / "data-bin" / "sentences", *PLUGIN, *flags)
    expected = float(re.findall(r"\bnll_loss ([0-9.]+)", log)[-1])
    assert found["dense.untuned.s1"]["valid_nll"] == pytest.approx(expected, abs=2e-3)
    pruned = found["mean.global.60.g1.untuned.s1"]
    assert pruned["valid_ppl"] == pytest.approx(2 ** pruned["valid_nll"]) and "bleu" not in pruned
    assert pruned["valid_nll"] != found["dense.untuned.s1"]["valid_nll"]
    assert 0.3 < found["top-k.global.50.untuned.s1"]["total"]["effective"] < 0.7  # of the validation data
    assert not list((tmp_path / "out" / "translations").glob("*.txt"))
    table = sweep_table.format_table(list(found.values()))
    assert "validation perplexity |" in table and "BLEU" not in table


@pytest.mark.parametrize(
    ("settings", "title"),
    [
        (dict(criterion="dense"), "dense"),
        (dict(criterion="dense", schedule="scratch", updates=12000), "dense, from scratch, 12k updates"),
        (dict(criterion="mean", sparsity=0.5), "mean 50%, no fine-tuning"),
        (
            dict(criterion="importance", sparsity=0.9, options="--smooth 32", schedule="gradual", rounds=1, start=0.8),
            "importance 80% → 90%, smooth 32, gradual in 1 round",
        ),
        (
            dict(criterion="importance", sparsity=0.925, granularity=16, schedule="one-shot", updates=7500),
            "importance 92.5%, blocks of 16, fine-tuned, 7.5k updates",
        ),
        (
            dict(criterion="percentile", kinds="per-kind", sparsity=0.8),
            "published percentile 80% per kind, no fine-tuning",
        ),
        (dict(criterion="mean", kinds="cross", sparsity=0.95), "mean 95% of cross, no fine-tuning"),
        (dict(criterion="top-k", sparsity=0.8), "top-k 80%"),
        (dict(criterion="threshold", threshold=0.01, log_bits=3), "threshold 0.01, 3 log bits"),
        (dict(criterion="mean", kinds="own", options="--encoder-self 0.7"), "mean, encoder-self 0.7, no fine-tuning"),
        (dict(criterion="mean", sparsity=0.5, granularity="64x16"), "mean 50%, blocks of 64x16, no fine-tuning"),
        (
            dict(criterion="mean", sparsity=0.5, granularity="cross=scaled-diagonal"),
            "mean 50%, cross=scaled-diagonal, no fine-tuning",
        ),
    ],
)
def test_tables_name_systems_in_words(settings, title):
    system = System(**settings)
    assert sweep_table.title({**dataclasses.asdict(system), "group": system.group}) == title
