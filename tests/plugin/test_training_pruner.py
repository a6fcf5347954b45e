"""Pruning while training: one command from data to a pruned checkpoint."""

import argparse
import re

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationConfig
from plugin.builders import pruned_model
from plugin.commands import generate, train

from ap_fairseq.files import UserError
from ap_fairseq.model.checkpoints import load_checkpoint
from ap_fairseq.provenance import decode_provenance
from ap_fairseq.pruning.flags import parse_mask_flags
from ap_fairseq.tasks import PrunedTranslationTask
from ap_fairseq.training.pruner import TrainingPruner
from ap_fairseq.training.schedule import PruningSchedule, share_of_round
from ap_fairseq.training.task import build_pruner

SCHEDULE = ["--attention-sparsity", 0.6, "--prune-start", 18, "--prune-end", 34, "--prune-every", 8]
ONE_COMMAND = ["--task", "pruned_translation", "--attention-masks", "none", *SCHEDULE]


def sparsity(checkpoint) -> float:
    return decode_provenance(load_checkpoint(checkpoint)["model"]["mask_metadata"])["total"]["effective"]


def prunings(log: str) -> list[tuple[int, float]]:
    """Update and percentage of pruned pairs of each pruning that a log names."""
    return [(int(u), float(p)) for u, p in re.findall(r"update (\d+): ([\d.]+)% of the pairs pruned", log)]


@pytest.fixture(scope="module")
def trained(data_bin, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one-command")
    log = train(data_bin, folder, *ONE_COMMAND, "--save-interval-updates", 26, arch="pruned_transformer", updates=40)
    return folder, log


def test_budgets_grow_to_the_last_update_of_the_schedule():
    schedule = PruningSchedule(start=2000, end=4500, every=1000)
    assert schedule.updates == [2000, 3000, 4000, 4500]
    assert [round(schedule.share(update), 3) for update in schedule.updates] == [0.578, 0.875, 0.984, 1.0]
    linear = PruningSchedule(start=10, end=30, every=10, shape="linear")
    assert [linear.share(update) for update in linear.updates] == pytest.approx([1 / 3, 2 / 3, 1])
    assert PruningSchedule(start=5, end=5, every=3).updates == [5]
    assert share_of_round(1, 3) == pytest.approx(19 / 27)
    assert [schedule.cut_by(updates, "--x") for updates in (0, 4501)] == [None, None]
    assert schedule.cut_by(4500, "--x 3").startswith(
        "--x 3 ends the training before the last pruning, after --prune-end 4500 updates: 98.4% of the budget"
    )
    assert "nothing of the budget is pruned" in schedule.cut_by(2000, "--x")


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ((0, 10, 5), "--prune-start 0 and --prune-end 10"),
        ((20, 10, 5), "--prune-start 20 and --prune-end 10"),
        ((5, 10, 0), "--prune-every 0"),
    ],
)
def test_schedules_that_cannot_be_are_refused(updates, message):
    with pytest.raises(UserError, match=message):
        PruningSchedule(*updates)


def test_one_command_prunes_in_steps_and_leaves_an_ordinary_checkpoint(trained, data_bin):
    folder, log = trained
    assert prunings(log) == [(18, pytest.approx(42.2, abs=0.5)), (26, pytest.approx(57.8, abs=0.5)), (34, 60.0)]
    assert "ends the training before" not in log
    assert sparsity(folder / "checkpoint_last.pt") == pytest.approx(0.6, abs=0.01)
    shares = [float(x) for x in re.findall(r'train_inner \| .*?"pruned_cross": "([0-9.]+)"', log)]
    assert shares[0] == 0 < shares[20] < shares[-1]  # what training logs and TensorBoard show
    assert "Generate test with beam" in generate(data_bin, folder / "checkpoint_last.pt")


def test_a_resumed_training_ends_as_it_would_have_ended(trained, data_bin, tmp_path):
    """Resumed with the same command, the masks of the checkpoint hold, not those of --attention-masks.

    In a later epoch than the first, fairseq goes on with other batches, so the next pruning met another model.
    """
    folder, _ = trained
    (before,) = folder.glob("checkpoint_*_26.pt")
    (tmp_path / "checkpoint_last.pt").write_bytes(before.read_bytes())
    log = train(data_bin, tmp_path, *ONE_COMMAND, "--max-epoch", 4, arch="pruned_transformer", updates=27)
    assert prunings(log) == [(26, pytest.approx(57.8, abs=0.5))]
    for flag in ("--max-update 27", "--max-epoch 4 (32 updates)"):  # of 8 batches each
        assert f"{flag} ends the training before the last pruning" in log
    log = train(data_bin, tmp_path, *ONE_COMMAND, arch="pruned_transformer", updates=40)
    assert prunings(log) == [(34, 60.0)]
    resumed, straight = (load_checkpoint(path / "checkpoint_last.pt")["model"] for path in (tmp_path, folder))
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_a_training_that_goes_on_after_the_last_pruning_has_its_masks(trained, data_bin, tmp_path):
    """Resumed later than --prune-end, a dense or half-pruned model trained on as it was, silently."""
    folder, _ = trained
    (half,) = folder.glob("checkpoint_*_26.pt")
    flags = [*ONE_COMMAND, "--prune-end", 24, "--restore-file", half]
    log = train(data_bin, tmp_path / "half", *flags, arch="pruned_transformer", updates=40, expect=1)
    error = "goes on after update 26, the last pruning was due after --prune-end 24"
    assert re.search(rf"fairseq-train: error: .*{error}.*\(cross 42.2%.*ask for \(cross 60.0%", log), log[-2000:]
    flags = [*ONE_COMMAND, "--restore-file", folder / "checkpoint_last.pt"]
    log = train(data_bin, tmp_path / "whole", *flags, arch="pruned_transformer", updates=42)
    assert prunings(log) == [] and sparsity(tmp_path / "whole" / "checkpoint_last.pt") == pytest.approx(0.6, abs=0.01)


def test_a_pruning_that_a_resumed_training_does_not_go_on_with_is_announced(trained, data_bin, tmp_path):
    """Resumed without --attention-sparsity, a training kept the masks of the middle of its schedule silently."""
    folder, log = trained
    middle = next(folder.glob("checkpoint_*_26.pt"))
    assert "is not pruned further" not in log
    flags = ["--task", "pruned_translation", "--restore-file", middle]
    log = train(data_bin, tmp_path, *flags, arch="pruned_transformer", updates=28)
    share = share_of_round(1, 3)  # as of update 18
    assert log.count(f"pruned while training up to {share:.1%} of the budget, and is not pruned further") == 1
    flags[-1] = folder / "checkpoint_last.pt"
    assert "is not pruned further" not in train(data_bin, tmp_path, *flags, arch="pruned_transformer", updates=42)


def test_masks_that_prune_less_than_those_before_are_announced(trained, data_bin, tmp_path):
    """A model that was pruned already got back most of its attention at the first pruning, silently."""
    folder, _ = trained
    flags = ["--task", "pruned_translation", "--attention-masks", "none", "--attention-sparsity", 0.7]
    flags += ["--prune-start", 1, "--prune-end", 3, "--prune-every", 1, "--prune-shape", "linear"]
    flags += ["--finetune-from-model", folder / "checkpoint_last.pt"]
    log = train(data_bin, tmp_path, *flags, arch="pruned_transformer", updates=4)
    assert len(prunings(log)) == 3
    assert re.findall(r"update (\d+): masks of ([\d.]+)% replace masks of ([\d.]+)%", log) == [("1", "23.3", "60.0")]


def test_a_seed_that_counts_epochs_counts_them_from_the_first_one_in_a_resumed_training(data_bin, tmp_path):
    """With --update-ordered-indices-seed a training that resumed had other batches, and so other parameters."""
    flags = [*ONE_COMMAND, "--update-ordered-indices-seed", "--max-tokens", 4000]  # 4 batches an epoch
    train(data_bin, tmp_path, *flags, "--save-interval-updates", 7, arch="pruned_transformer", updates=14)
    last = tmp_path / "checkpoint_last.pt"
    straight = load_checkpoint(last)["model"]
    (before,) = tmp_path.glob("checkpoint_*_7.pt")
    before.rename(last)
    train(data_bin, tmp_path, *flags, arch="pruned_transformer", updates=14)
    resumed = load_checkpoint(last)["model"]
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_patience_counts_from_the_last_pruning_on(data_bin, tmp_path):
    """It compared with the loss of a model that was pruned less, and ended trainings before their last pruning."""
    flags = [*ONE_COMMAND, "--lr", 1e-9, "--validate-interval-updates", 2, "--patience", 2]
    flags += ["--stop-time-hours", 0.5, "--stop-min-lr", -0.5]  # fairseq starts with a rate of 0
    log = train(data_bin, tmp_path, *flags, arch="pruned_transformer", updates=50)
    assert len(prunings(log)) == 3
    assert load_checkpoint(tmp_path / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 40
    for flag in ("--stop-time-hours 0.5", "--stop-min-lr -0.5"):
        assert f"{flag} may end the training before the last pruning, after --prune-end 34 updates" in log


def test_the_best_checkpoint_is_one_under_the_last_masks(data_bin, tmp_path):
    """A model is best while nothing is pruned: fairseq kept that one as checkpoint_best.pt."""
    flags = [*ONE_COMMAND, "--attention-sparsity", 0.95, "--lr", 1e-4, "--validate-interval-updates", 8]
    train(data_bin, tmp_path, *flags, arch="pruned_transformer", updates=40)
    assert sparsity(tmp_path / "checkpoint_best.pt") > 0.9


def test_budgets_by_kind_other_criteria_and_subsets_and_averages(data_bin, tmp_path):
    """With --train-subset or --store-ema a training ended at its first pruning."""
    flags = ["--task", "pruned_translation", "--attention-masks", "none", "--prune-start", 4, "--prune-end", 4]
    flags += ["--prune-flags", "--criterion mean --cross 0.5", "--prune-sample", 50, "--train-subset", "valid"]
    flags += ["--store-ema", "--ema-decay", 0.5, "--ema-fp32"]
    log = train(data_bin, tmp_path, *flags, arch="pruned_transformer", updates=6)
    assert "50 sentences recorded" in log
    state = load_checkpoint(tmp_path / "checkpoint_last.pt")
    provenance, average = decode_provenance(state["model"]["mask_metadata"]), state["extra_state"]["ema"]
    assert provenance["data"] == [{"name": "data-bin", "subset": "valid"}]
    shares = provenance["sparsity"]
    assert shares["encoder_self"]["effective"] == 0 and shares["cross"]["effective"] == pytest.approx(0.5, abs=0.02)
    assert average.keys() == state["model"].keys()
    integers = [name for name, value in average.items() if not value.is_floating_point()]
    assert len(integers) > 6 and all(torch.equal(average[name], state["model"][name]) for name in integers)
    assert not torch.equal(average["decoder.layers.1.fc1.weight"], state["model"]["decoder.layers.1.fc1.weight"])


@pytest.mark.parametrize(
    ("flags", "arch", "message"),
    [
        (["--attention-sparsity", 1.5], "pruned_transformer", "--attention-sparsity 1.5"),
        (
            ["--attention-sparsity", 0.5, "--prune-start", 50, "--prune-end", 40],
            "pruned_transformer",
            "--prune-start 50",
        ),
        (["--attention-sparsity", 0.5, "--prune-flags", "--cross=0.5"], "pruned_transformer", "both name budgets"),
        (["--attention-sparsity", 0.5], "transformer", "pruned_transformer"),
        (["--prune-flags", "--empty-rows"], "pruned_transformer", "--prune-flags --empty-rows: no flag says how much"),
        (["--prune-start", 1, "--prune-end", 1], "pruned_transformer", "--prune-start 1: no flag says how much"),
        (
            ["--prune-flags", "--total 0.5 --max-heads 99"],
            "pruned_transformer",
            "--max-heads encoder_self=99, but it has",
        ),
    ],
)
def test_flags_that_cannot_be_are_refused_at_the_start(data_bin, tmp_path, flags, arch, message):
    """fairseq-train ended in a traceback for what the user can mend."""
    masks = ["--attention-masks", "none"] if arch != "transformer" else []
    log = train(data_bin, tmp_path, "--task", "pruned_translation", *masks, *flags, arch=arch, updates=2, expect=1)
    assert re.search(f"fairseq-train: error: .*{message}", log) and "Traceback" not in log, log[-2000:]
    assert not (tmp_path / "checkpoint_last.pt").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--total 0.8 --cross 0.4", "budgets are given by --total and --cross"),
        ("--like missing.safetensors", "missing.safetensors does not exist"),
        ("--total 0.8 --criterion percentile", "--total gives effective sparsity"),
        ("--cross 0.8 --min-heads 5", "--min-heads cross=5, but it has 2 layers of 2 heads"),
        ("--cross 0.8 --granularity scaled-diagonal --keep-first 1", "--keep-first 1 keeps columns"),
        ("--total 0.8 --calibrate", "--calibrate needs the lengths of the validation sentences"),
    ],
)
def test_mask_flags_that_do_not_fit_are_refused_before_the_first_update(flags, message):
    """They ended a training at its first pruning, after thousands of updates."""
    pruner = TrainingPruner(object(), PruningSchedule(10, 10, 1), parse_mask_flags(flags.split()), 50, {})
    with pytest.raises(UserError, match=message):
        pruner.require_fitting(pruned_model())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--criterion nothing", "argument --criterion: invalid choice: 'nothing'"),
        ("--smoth 3", "unrecognized arguments: --smoth 3"),
        ("--total 80", "argument --total: '80' is not a share"),
    ],
)
def test_mask_flags_that_do_not_parse_name_the_flag_that_holds_them(flags, message):
    """They named ap-masks, which nobody had called, below a usage, and no remedy."""
    cfg = argparse.Namespace(prune_flags=flags, attention_sparsity=None)
    with pytest.raises(UserError, match=f"^--prune-flags '{flags}': {message}.*; flags .*: ap-masks --help$"):
        build_pruner(None, cfg)


def test_mask_flags_that_only_data_can_refuse_are_left_to_them():
    flags = "--total 0.8 --max-heads 1 --min-kept 0.4 --granularity 3x5 --smooth 9 --criterion importance"
    schedule = PruningSchedule(10, 10, 1)
    TrainingPruner(object(), schedule, parse_mask_flags(flags.split()), 50, {}).require_fitting(pruned_model())
    # One head an offset, and four heads for the three offsets of the trial.
    flags, heads = (
        "--total 0.9 --granularity cross=scaled-diagonal",
        dict(encoder_attention_heads=4, decoder_attention_heads=4),
    )
    TrainingPruner(object(), schedule, parse_mask_flags(flags.split()), 50, {}).require_fitting(pruned_model(**heads))
    with pytest.raises(UserError, match="--prune-sample 0: a pruning records at least 1 sentence"):
        TrainingPruner(object(), schedule, parse_mask_flags([]), 0, {})


def test_a_task_with_the_configuration_of_fairseq_prunes_nothing():
    """Programs built the task with a TranslationConfig, which has none of the plugin's fields, and got a KeyError."""
    words = Dictionary()
    assert PrunedTranslationTask(TranslationConfig(), words, words).pruner is None


def test_sentences_above_the_batch_size_are_left_out_as_in_training(data_bin, tmp_path):
    """Training skips sentences longer than --max-tokens; the first pruning ended in an assertion on one of them."""
    flags = ["--task", "pruned_translation", "--attention-masks", "none", "--attention-sparsity", 0.5]
    flags += [
        "--prune-start",
        2,
        "--prune-end",
        2,
        "--prune-sample",
        5000,
        "--max-tokens",
        12,
        "--max-tokens-valid",
        2000,
    ]
    log = train(data_bin, tmp_path, *flags, arch="pruned_transformer", updates=3)
    assert prunings(log) == [(2, pytest.approx(50, abs=1))]
    assert 0 < int(re.search(r"([\d,]+) sentences recorded", log)[1].replace(",", "")) < 1000
    provenance = decode_provenance(load_checkpoint(tmp_path / "checkpoint_last.pt")["model"]["mask_metadata"])
    assert provenance["data"] == [{"name": "data-bin", "subset": "train"}]  # not a path of this machine
