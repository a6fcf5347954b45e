"""ap-masks: flags, budgets of other masks, what is printed and stored."""

import math
import re

import numpy as np
import pytest
from plugin.builders import random_stats
from plugin.mask_building import ALL, SELF, ap_masks, build, effective, peaked_stats, total_mass

from ap_fairseq.artifacts import PruningMasks
from ap_fairseq.cli import masks as cli_masks
from ap_fairseq.files import UserError
from ap_fairseq.provenance import describe_sparsity, mask_spec
from ap_fairseq.pruning.spec import MaskSpec
from ap_fairseq.sites import AttentionKind


def test_kinds_may_have_granularities_of_their_own(tmp_path):
    stats = random_stats(longest=(40, 40), sentences=200)
    stats.save(tmp_path / "stats.st")
    flags = ["--total", 0.5, "--granularity", "encoder_self=16x4,decoder_self=diagonal"]
    ap_masks(tmp_path / "stats.st", *flags, "-o", tmp_path / "m.st")
    masks = PruningMasks.load(tmp_path / "m.st")
    assert masks.metadata["spec"]["granularity"] == {"encoder_self": "16x4", "decoder_self": "diagonal"}
    assert "granularity decoder_self diagonal, encoder_self 16x4" in describe_sparsity(masks.metadata)
    own = {AttentionKind.ENCODER_SELF: "16x4", AttentionKind.DECODER_SELF: "diagonal"}
    together = build(stats, 0.5, scope="global", granularity=own).masks
    for kind in ALL:
        np.testing.assert_array_equal(masks.keep[kind], together.keep[kind])
    encoder, decoder = (masks.keep[kind][0, 0] for kind in SELF)
    blocks = encoder[16:32, 32:40].reshape(16, 2, 4)
    assert (blocks.all((0, 2)) | ~blocks.any((0, 2))).all() and len({tuple(np.diagonal(decoder, -3))[0]}) == 1


def test_the_table_has_a_row_for_each_kind_and_nominal_sparsity_only_where_it_is_meant():
    """It took forty lines, and said `nominal 11.0%` of all-ones masks."""
    stats = random_stats(longest=(20, 20), layers=3)
    lines = cli_masks.format_summary(build(stats, 0.5)).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [*AttentionKind, "all kinds"]
    assert "nominal" not in lines[0] and lines[2].split()[1] == "50.0%"
    built = build(stats, 0.5, kinds=SELF, criterion="percentile")
    header, _, encoder, _, cross, _ = cli_masks.format_summary(built).splitlines()
    assert "nominal" in header and len(encoder.split()) == 5 and len(cross.split()) == 4  # no budget
    lines = cli_masks.format_summary(build(stats, 0.5), per_layer=True).splitlines()
    assert len(lines) == 2 + 3 * (1 + 3) + 1 and lines[4].split()[1] == "1"
    assert lines[0].endswith("rows of one cell or none")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(budgets={AttentionKind.CROSS: 1.0}), r"--cross 1.0 is not a share of pairs in \[0, 1\)"),
        (dict(budgets={AttentionKind.ENCODER_SELF: -0.1}), "--encoder-self -0.1 is not a share"),
        (dict(budgets={AttentionKind.CROSS: math.nan}), "--cross nan is not a share"),
        (dict(budgets={}, scope="site"), "--scope site is not one of kind, layer, head, global"),
        (dict(budgets={}, criterion="best"), "--criterion best is not one of mean, normalised"),
        (dict(budgets={}, granularity="8x"), "--granularity 8x is not N .*, QxK .* or one of diagonal, .*, head"),
        (dict(budgets={}, min_kept=1.2), "--min-kept 1.2 is not a share"),
        (dict(budgets={}, min_kept=math.nan), "--min-kept nan is not a share"),
        (dict(budgets={}, min_heads={AttentionKind.CROSS: math.inf}), "--min-heads cross=inf is not a number of heads"),
        (dict(budgets={}, min_heads={AttentionKind.CROSS: math.nan}), "--min-heads cross=nan is not a number of heads"),
        (
            dict(budgets={}, max_heads={AttentionKind.CROSS: 1.5}),
            "--max-heads cross=1.5 is not a number of heads, nor a",
        ),
        (dict(budgets={}, max_heads={AttentionKind.CROSS: 0}), "--max-heads cross=0 is not a number of heads, nor a"),
        (dict(budgets={}, max_heads={AttentionKind.CROSS: math.nan}), "--max-heads cross=nan is not a number of heads"),
        (
            dict(budgets={}, max_heads={AttentionKind.CROSS: 1}, min_heads={AttentionKind.CROSS: 2}),
            "--min-heads cross=2 .* --max-heads cross=1 spreads them; choose one for cross",
        ),
        (dict(budgets={}, max_heads_of="head"), "--max-heads-of head is not one of layer, kind"),
        (dict(budgets={}, criterion="percentile", max_heads={AttentionKind.CROSS: 1}), "leave out --max-heads$"),
        (dict(budgets={}, keep_first=-1), "--keep-first -1 is not a number of positions"),
        (dict(budgets={}, keep_diagonal=-1), "--keep-diagonal -1 is not a number of positions"),
        (dict(budgets={}, criterion="percentile", min_kept=0.1), "--criterion percentile .*; leave out --min-kept$"),
        (
            dict(budgets={}, criterion="percentile", granularity=16, scope="head"),
            "--criterion percentile .*; leave out --scope, --granularity$",
        ),
        (dict(budgets={}, criterion="percentile", smooth=2), "--smooth 2 does not go with --criterion percentile"),
        (dict(budgets={}, criterion="window", smooth=2), "criterion window, only with mean, normalised, importance;"),
        (dict(budgets={}, smooth=-1), "--smooth -1 is not a number of positions"),
        (dict(budgets={}, seed=-1), "--seed -1 is negative"),
    ],
)
def test_bad_specs_name_the_flag(spec, message):
    """They named fields of a Python class, such as scope, to people who had typed --total."""
    with pytest.raises(UserError, match=message):
        MaskSpec(**spec)


def test_masks_are_described_in_todays_words():
    """Checkpoints of version 0.1 hold the specification of their masks under other names."""
    masks = build(random_stats(longest=(20, 20)), 0.5, kinds=[AttentionKind.CROSS], scope="head").masks
    expected = "effective sparsity encoder_self 0.0%, decoder_self 0.0%, cross 49.9% (mean, granularity 1)"
    assert describe_sparsity(masks.metadata) == expected
    old = {"procedure": "effective", "scope": "head", "granularity": 1, "beyond": "diagonal", "pool": 0, "seed": 1}
    provenance = {"procedure": old, "sparsity": masks.metadata["sparsity"]}
    assert describe_sparsity(provenance) == expected
    spec = mask_spec(provenance)
    assert {key: masks.metadata["spec"][key] for key in spec} == spec


def test_controls_take_the_budgets_of_other_masks(tmp_path, capsys):
    """--total distributes over kinds; --like gives a control the same share of each kind."""
    stats = peaked_stats()
    stats.save(tmp_path / "stats.st")
    ap_masks(tmp_path / "stats.st", "--total", 0.7, "-o", tmp_path / "ours.st")
    assert re.search(r"^all kinds +70\.0%", capsys.readouterr().out, re.M)
    ap_masks(tmp_path / "stats.st", "--like", tmp_path / "ours.st", "--criterion", "random", "-o", tmp_path / "r.st")
    ours, control = (PruningMasks.load(tmp_path / name) for name in ("ours.st", "r.st"))
    for kind in ALL:
        assert effective(control, stats, kind) == pytest.approx(effective(ours, stats, kind), abs=0.005)
    assert total_mass(control, stats)[1] < total_mass(ours, stats)[1]


@pytest.mark.parametrize("granularity", [1, "scaled-diagonal"])
def test_controls_of_masks_that_leave_nothing_of_a_kind(granularity, tmp_path, capsys):
    """Their budget of 100% was refused."""
    stats = random_stats()
    stats.mass[AttentionKind.CROSS] *= 1e-9
    stats.save(tmp_path / "stats.st")
    ap_masks(tmp_path / "stats.st", "--total", 0.8, "--empty-rows", "-o", tmp_path / "ours.st")
    control = ["--like", tmp_path / "ours.st", "--criterion", "random", "--granularity", f"cross={granularity}"]
    ap_masks(tmp_path / "stats.st", *control, "--empty-rows", "-o", tmp_path / "control.st")
    ours, drawn = (PruningMasks.load(tmp_path / name).metadata["sparsity"] for name in ("ours.st", "control.st"))
    assert ours["cross"]["effective"] == 1 and (drawn["cross"]["effective"] == 1) == (granularity == 1)
    for kind in SELF:
        assert drawn[kind.value]["effective"] == pytest.approx(ours[kind.value]["effective"], abs=0.01)
    with pytest.raises(SystemExit):
        ap_masks(tmp_path / "stats.st", *control, "-o", tmp_path / "full.st")
    assert "--cross 1.0 is not a share of pairs in [0, 1), or 1 with --empty-rows" in capsys.readouterr().err


def test_masks_say_how_far_their_statistics_were_smoothed(tmp_path):
    random_stats(longest=(20, 20)).save(tmp_path / "stats.st")
    for distance in (0, 8):
        ap_masks(tmp_path / "stats.st", "--total", 0.5, "--smooth", distance, "-o", tmp_path / f"{distance}.st")
    masks = [PruningMasks.load(tmp_path / f"{distance}.st") for distance in (0, 8)]
    assert [m.metadata["spec"]["smooth"] for m in masks] == [0, 8]
    assert not np.array_equal(*(m.keep[AttentionKind.CROSS] for m in masks))


def test_budgets_are_not_taken_from_masks_that_do_not_tell_them(tmp_path, capsys):
    """Such a file counted as an all-ones mask."""
    random_stats().save(tmp_path / "stats.st")
    masks = build(random_stats(), 0.5).masks
    del masks.metadata["sparsity"]
    masks.save(tmp_path / "m.st")
    with pytest.raises(SystemExit):
        ap_masks(tmp_path / "stats.st", "--like", tmp_path / "m.st", "-o", tmp_path / "out.st")
    assert "m.st does not tell its sparsity" in capsys.readouterr().err and not (tmp_path / "out.st").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--total", 0.5, "--cross", 0.5], "budgets are given by --total and --cross; choose one"),
        (["--total", 0.5, "--scope", "layer"], "--scope layer splits it"),
        (["--total", "half"], "argument --total: 'half' is not a share in"),
        (["--total", "nan"], "argument --total: 'nan' is not a share in"),
        (["--keep-first=-1"], "argument --keep-first: '-1' is not a number of positions"),
        (["--keep-first", "²"], "argument --keep-first: '²' is not a number of positions"),
        (["--granularity", "²"], "argument --granularity: ² is not N "),
        (["--granularity", "16x"], "argument --granularity: 16x is not N "),
        (["--granularity", "cross=16,cross=1"], "'cross=16,cross=1' gives a kind twice"),
        (["--granularity", "source=16"], "'source=16': expected KIND=GRANULARITY"),
        (["--total", 0.5, "--max-heads", "two"], "--max-heads is 'two', expected a number"),
        (["--cross", 0.5, "--max-heads", "decoder_self=1"], "--max-heads names decoder_self, which has no budget"),
        (
            ["--cross", 0.5, "--granularity", "cross=16,encoder_self=16"],
            "--granularity names encoder_self, which has no",
        ),
        (
            ["--total", 0.5, "--criterion", "percentile"],
            "error: --total gives effective sparsity, --criterion percentile",
        ),
        (["--like", "ours.st", "--criterion", "percentile"], "error: --like gives effective sparsity, --criterion"),
        (["--total", 0.5, "--criterion", "window", "--smooth", 8], "--smooth 8 does not go with --criterion window"),
        (
            ["--total", 0.5, "--min-heads", "cross=1,cross=2"],
            "'cross=1,cross=2', which gives cross twice",
        ),
        (
            ["--total", 0.5, "--min-heads", "cross=1=2"],
            "--min-heads is 'cross=1=2', expected a number, or",
        ),
        (["--total", 0.5, "--seed", "-3"], "--seed -3 is negative"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, message, tmp_path, capsys):
    random_stats().save(tmp_path / "stats.st")
    with pytest.raises(SystemExit) as stop:
        ap_masks(tmp_path / "stats.st", *flags, "-o", tmp_path / "out.st")
    assert stop.value.code == 2 and re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out.st").exists()


def test_masks_without_a_budget_are_warned_of(capsys, tmp_path):
    """They keep everything, which is hardly ever meant."""
    stats, output = tmp_path / "stats.safetensors", tmp_path / "masks.safetensors"
    random_stats().save(stats)
    for flags, is_warned in (
        ([], True),
        (["--criterion", "importance", "--smooth", "2", "--calibrate"], True),
        (["--total", "0"], False),
        (["--cross", "0"], False),
    ):
        cli_masks.main([str(stats), "-o", str(output), "--overwrite", *flags])
        message = "no budget is given, so the masks keep every pair; to prune, give --total SHARE"
        assert (message in capsys.readouterr().err) is is_warned
        assert PruningMasks.load(output).metadata["total"]["effective"] == 0
