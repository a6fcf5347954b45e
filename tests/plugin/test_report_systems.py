"""Scores and kernel benchmarks are read as they were written, and grouped into curves."""

import json
import math

import pytest
from plugin.commands import ROOT

from ap_fairseq.files import ArtifactError
from ap_fairseq.report import benchmarks, plots, statements, tables
from ap_fairseq.report.systems import curves, read_systems
from ap_fairseq.sites import AttentionKind

ENCODER, DECODER, CROSS = AttentionKind


PAIRS = {"encoder_self": 100, "decoder_self": 60, "cross": 100}


def test_results_of_the_committed_run():
    systems = {s.name: s for s in read_systems(ROOT / "tests/plugin/scored_run.json", PAIRS)}
    assert systems["dense"].series is None and systems["dense"].total == 0
    assert (
        systems["per-kind.tuned"].series == "mean, fine-tuned"
        and systems["random.untuned"].series == "random, no fine-tuning"
    )
    assert systems["cross.tuned"].series == "mean, cross only, fine-tuned"
    assert systems["cross.tuned"].total == pytest.approx(0.5, abs=1e-3)
    assert systems["all-ones.tuned"].series == "no pruning, fine-tuned" and systems["all-ones.tuned"].total == 0
    assert systems["percentile.tuned"].total < 0.01
    differences = statements._scores(list(systems.values()))
    assert "cross at 50% +1.67 (cross.tuned against all-ones.tuned)" in differences
    assert "per-kind" not in differences and "percentile" not in differences


def test_lines_of_a_sweep_and_their_intervals(tmp_path):
    scores = {"BLEU": {"score": 30, "ci": 0.5}, "chrF2": {"score": 50}}
    lines = [{"system": "dense", "criterion": "dense", "scores": scores}]
    for seed, bleu in enumerate((20.0, 22.0, 24.0)):
        scores = {"BLEU": {"score": bleu, "signature": "s"}, "chrF2": {"score": 40.0}}
        sparsity = {"encoder_self": 0.8, "decoder_self": 0.8, "cross": 0.801, "total": 0.8}
        line = {"system": "ours", "criterion": "mean", "schedule": "gradual", "seed": seed, "scores": scores}
        lines.append({**line, "effective_sparsity": sparsity})
    lines.append({"system": "window", "criterion": "window", "effective_sparsity": 0.9, "bleu": 3, "chrf": 9})
    sweep = {"criterion": "mean", "schedule": "one-shot", "granularity": 16, "options": "--scope head", "seed": 1}
    shares = {"encoder_self": {"effective": 0.0}, "decoder_self": {"effective": 0.0}, "cross": {"effective": 0.9}}
    lines.append({"system": "a", **sweep, "sparsity": shares, "total": {"effective": 0.4}, "bleu": 5, "chrf": 9})
    lines.append({"system": "b", "criterion": "dense", "schedule": "one-shot", "sparsity": {}, "bleu": 31, "chrf": 9})
    one_budget = {"criterion": "mean", "kinds": "global", "effective_sparsity": 0.8}
    lines.append({"system": "c", **one_budget, "bleu": 6, "chrf": 9})
    path = tmp_path / "sweep.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    drawn = curves(read_systems(path, PAIRS), "BLEU")
    (point,) = drawn["mean, gradual"]
    # Student's t with 2 degrees of freedom: 4.303 standard errors of 2 / sqrt(3).
    assert (point.score, point.runs) == (22, 3)
    assert point.interval.high - 22 == pytest.approx(4.303 * 2 / math.sqrt(3), rel=1e-3)
    (dense,) = drawn[None]
    assert (dense.interval.low, dense.interval.high) == (29.5, 30.5) and "bootstrap" in dense.interval.source
    (window,) = drawn["window"]
    assert window.sparsity == 0.9 and window.interval is None
    (single,) = drawn["mean, cross only, granularity 16, --scope head, one-shot"]
    assert single.sparsity == 0.9
    assert [point.score for point in drawn["mean, global budget"]] == [6]
    (tuned,) = drawn["no pruning, one-shot"]
    assert (tuned.sparsity, tuned.score) == (0, 31)


def test_only_systems_that_differ_in_their_seed_are_runs_of_one_point(tmp_path):
    def line(name, bleu, **settings):
        share = settings.pop("share", 0.8)
        return {"system": name, "bleu": bleu, "chrf": 50, "effective_sparsity": share, **settings}

    gradual = dict(criterion="importance", schedule="gradual")
    lines = [
        line("a1", 20, **gradual, rounds=2, seed=1, share=0.8049),
        line("a2", 22, **gradual, rounds=2, seed=2, share=0.8051),
        line("b1", 30, **gradual, rounds=4, seed=1),
        line("pool", 40, spec={"criterion": "importance", "pool": 32, "seed": 1}),
        line("none", 42, spec={"criterion": "importance", "pool": 0, "seed": 1}),
        {"system": "text", "checkpoint_sha256": "a", "bleu": 5, "chrf": 9},
        {"system": "other", "checkpoint_sha256": "b", "bleu": 7, "chrf": 9},
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    drawn = curves(read_systems(path, PAIRS), "BLEU")
    found = {name: [(point.score, point.runs) for point in points] for name, points in drawn.items()}
    assert found == {
        "importance, gradual, rounds 2": [(21, 2)],
        "importance, gradual, rounds 4": [(30, 1)],
        "importance, pool 32": [(40, 1)],
        "importance": [(42, 1)],
        None: [(5, 1), (7, 1)],
    }


def test_a_system_without_a_checkpoint_is_not_called_dense(tmp_path):
    """It was the dense line of the figure, and what others were compared with."""
    scores = {"bleu": 20, "chrf": 50}
    lines = [
        {"system": "text", **scores, "updates": 100},
        {"system": "pruned", "criterion": "mean", "sparsity": {"cross": {"effective": 0.5}}, **scores},
        {"system": "by hand", "sparsity": {"cross": {"effective": 0.5}}, **scores},
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    systems = read_systems(path, PAIRS)
    assert [system.total for system in systems] == [None, 0.5, 0.5]  # in summary.json: not 0, which says dense
    assert [row[1] for row in tables.systems_table(systems).rows] == ["–", "mean", "unnamed criterion"]
    figure = plots.quality(systems)
    assert figure.alt.startswith("text BLEU 20.0; mean at 50% BLEU 20.0; unnamed criterion at 50%")
    assert not statements._scores(systems)


def test_a_kind_alone_is_compared_with_the_dense_model_of_its_seed():
    lines = ROOT / "examples/libreoffice_help/results/h100-converged.jsonl"
    expected = {r["system"]: r for r in map(json.loads, lines.read_text().splitlines())}
    text = statements._scores(read_systems(lines, PAIRS))
    for kind in ("encoder_self", "decoder_self", "cross"):
        name = f"importance.{kind}.90.g1.smooth-32.one-shot.s1"
        change = expected[name]["against_dense_tuned"]["bleu"]["difference"]
        assert f"{kind} at 90% {change:+.2f} ({name} against dense.one-shot.s1)" in text


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "results.json is not JSON"),
        ('{\n "systems": [\n', "results.json is not JSON: .*line 3"),
        ("[]", "holds no systems"),
        ('{"system": "a"}\nx', "results.json, line 2 is not JSON"),
        ("{'system': 1}", "results.json is not JSON"),
        ('{"systems": {"a": 1}}', "holds no systems"),
        ('{"systems": ["a"]}', "system 1 has no name"),
        ('{"systems": [{"system": "a"}], "significance": [1]}', r"significance is \[1\], expected an object"),
        ('[{"system": "a", "scores": 1}]', r"system 1 \(a\): scores is 1, expected an object"),
        ('[{"system": "a", "bleu": 1, "chrf": 1, "seed": [1]}]', r"seed is \[1\], expected a number"),
        ('[{"system": "a", "bleu": 1, "bleu": 2, "chrf": 1}]', "has two entries 'bleu'"),
        ('[{"bleu": 1}]', "system 1 has no name in 'system'"),
        ('[{"system": "a", "chrf": 1}]', r"system 1 \(a\): bleu is None, expected a number from 0 to 100"),
        ('[{"system": "a", "bleu": NaN, "chrf": 1}]', "holds NaN, which is not a number"),
        ('[{"system": "a", "bleu": 1, "chrf": 1, "effective_sparsity": 80}]', "is 80, expected a number from 0 to 1"),
    ],
)
def test_broken_results_are_named(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=message) as error:
        read_systems(path, PAIRS)
    assert "results.json" in str(error.value)


def test_benchmark_of_the_committed_run():
    benchmark = benchmarks.read(ROOT / "scripts/bench_attention.h100.json")
    (ours,) = (
        row["median_ms"]
        for row in benchmark["rows"]
        if row.items() >= dict(method="ours", size=4096, block=128, nominal_sparsity=0.9, direction="forward").items()
    )
    problems = {problem.title: problem.methods for problem in benchmarks.times(benchmark)}
    methods = problems["square forward (batch 4, heads 16, size 4096)"]
    assert methods["ours, 128-blocks"][-1] == (pytest.approx(0.8988, abs=1e-4), ours)
    assert methods["sdpa cudnn"][0][0] is None
    rows = [dict(case="memory", method="ours", peak_bytes=2**20, block=64, sparsity=0.5)]
    problem = benchmarks.Measurements("memory ()", {"ours, 64-blocks": [(0.5, 1.0)]})
    assert benchmarks.memory({"rows": rows}) == [problem]


def test_rivals_that_could_not_run_and_host_times_are_left_out(tmp_path):
    path = tmp_path / "bench.json"
    ours = {"case": "square", "method": "ours", "block": 16, "sparsity": 0.5, "size": 64, "direction": "forward"}
    rows = [{**ours, "median_ms": 2.0}, {**ours, "method": "flex", "error": "no"}]
    rows.append({"case": "host", "method": "ours", "direction": "forward", "median_us": 50.0})
    path.write_text(json.dumps({"rows": rows}))
    (problem,) = benchmarks.times(benchmarks.read(path))
    assert problem.methods == {"ours, 16-blocks": [(0.5, 2.0)]}


def test_broken_benchmarks_are_named(tmp_path):
    path = tmp_path / "bench.json"
    for text, message in [
        ("x", "is not JSON"),
        ('{"rows": [1]}', "row 1 is 1, expected an object"),
        ('{"rows": [{"case": "a", "method": "b", "median_ms": "2"}]}', "row 1: median_ms is '2', expected a number"),
        ('{"rows": [{"case": "a", "method": "b", "median_ms": -Infinity}]}', "holds -Infinity"),
        ("{}", "holds no 'rows'"),
        ('{"rows": [{"case": "a", "median_ms": 1}]}', "row 1 lacks method"),
        ('{"rows": [{"case": "a", "method": "b", "error": "", "layout_bytes": 1}]}', "row 1: layout_bytes is 1"),
        ('{"rows": [{"case": "a", "method": "b"}]}', "row 1 lacks median_ms or peak_bytes"),
    ]:
        path.write_text(text)
        with pytest.raises(ArtifactError, match=f"bench.json.*{message}"):
            benchmarks.read(path)
