"""The benchmark of translation and training runs on a CPU, and sums up what a GPU's profiler reports."""

import json
import sys

import bench_fairseq as bench
import pytest
import torch
from plugin.builders import batch, dense_model, dictionary
from plugin.commands import ROOT, run

VOCAB = dictionary()


def test_systems_translate_and_train_on_a_cpu(data_bin, tmp_path):
    out = tmp_path / "rows.json"
    cases = ["sentences", *bench.SEARCHES, "train sentences"]
    printed = run(
        *[sys.executable, ROOT / "scripts/bench_fairseq.py", data_bin, "--device", "cpu", "--limit", 6],
        *["--arch", "transformer_tiny", "--rounds", 2, "--max-tokens", 200, "--commit", "abc1234", "--out", out],
        *["--systems", "stock", "80", "--cases", *cases],
    )
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["system"], row["case"]) for row in report["rows"]] == [
        (system, case) for system in ("stock", "80") for case in cases
    ]
    assert all(row["commit"] == "abc1234" and row["tokens_per_s"] > 0 for row in report["rows"])
    assert all(len(row["rounds"]) == 2 and row["seconds"] == min(row["rounds"]) for row in report["rows"])
    translated = [row for row in report["rows"] if row["kind"] == "translate"]
    assert {row["sentences"] for row in translated} == {6}
    assert len({row["tokens"] for row in translated if row["case"] == "sentences"}) == 1
    assert bench.table(report) in printed


def test_sdpa_everywhere_computes_what_stock_computes(monkeypatch):
    """Two layers on each side: stock training calls SDPA for four self-attention modules, then for six of six."""
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **options: calls.append(1) or real(*args, **options),
    )
    source, target = batch([5, 2, 7], VOCAB, left=True), batch([4, 6, 3], VOCAB, left=False, seed=1)
    model = dense_model(VOCAB).train()
    stock = model(source, None, target)[0]
    assert len(calls) == 4
    bench.use_sdpa(model)
    torch.testing.assert_close(model(source, None, target)[0], stock, atol=1e-5, rtol=1e-5)
    assert len(calls) == 4 + 6


def test_pages_are_consecutive_sentences_of_the_length_asked_for():
    sentences = [torch.full((length,), k) for k, length in enumerate([3, 4, 2, 5, 1])]
    pages = [page.tolist() for page in bench.joined(sentences, 6)]
    assert pages == [[0, 0, 0, 1, 1, 1], [2, 2, 3, 3, 3, 3]]


EVENTS = [
    ("cudaLaunchKernel", 0.0, 30),
    ("cudaGraphLaunch", 0.0, 2),
    ("cudaDeviceSynchronize", 0.0, 1),
    ("sm90_xmma_gemm_f16f16_f16", 0.4, 12),
    ("_decode_kernel", 0.2, 6),
    ("void at::native::elementwise_kernel<128, 4, add>", 0.1, 8),
    ("Memcpy DtoD (Device -> Device)", 0.1, 4),
]


def test_a_profile_is_grouped_and_shared_out():
    profile = bench.summary(EVENTS, wall=1.0, n=2)
    assert profile["gpu_busy"] == pytest.approx(0.8) and profile["wall_seconds"] == 0.5
    assert (profile["kernels"], profile["launches"]) == (15, 16)
    assert profile["groups"] == pytest.approx(
        {"attention": 0.1, "matrix products": 0.2, "copies": 0.05, "elementwise, normalisation": 0.05}
    )
    assert [entry["name"] for entry in profile["top"]][:2] == ["sm90_xmma_gemm_f16f16_f16", "_decode_kernel"]


def test_the_tables_hold_ratios_and_profiles():
    def row(system, speed, memory, **more):
        sizes = dict(peak_bytes=memory, reserved_bytes=2 * memory)
        return dict(case="sentences", system=system, tokens_per_s=speed, seconds=1.0) | sizes | more

    profile = bench.summary(EVENTS, wall=1.0, n=2) | dict(unit="step")
    rows = [row("stock", 100.0, 2**30), row("all-ones", 450.0, 2**29, cold_seconds=3.0, profile=profile)]
    report = dict(
        device="a GPU", torch="2", triton="3", arch="tiny", precision="fp16", commit="c", command="x", rows=rows
    )
    lines = [" ".join(line.split()) for line in bench.table(report).splitlines()]
    assert "| sentences | all-ones | 450 | 4.50 | | 0.50 GiB | 0.50 | 1.00 GiB | 0.50 | 3.0 s, warm 1.0 s |" in lines
    assert "| sentences | all-ones | step | 500.00 | 80% | 15 | 16 | 100.00 | 200.00 | 50.00 | 50.00 |" in lines


def test_the_median_round_counts_and_errors_stay():
    rows = [dict(case="a", system="stock", seconds=seconds, peak_bytes=seconds) for seconds in (3.0, 1.0, 2.0)]
    rows.insert(1, dict(case="-", system="all-ones", error="died"))
    assert bench.median_rows(rows) == [rows[3] | dict(rounds=[3.0, 1.0, 2.0]), rows[1]]


def test_what_a_cpu_cannot_do_is_refused():
    command = [sys.executable, ROOT / "scripts/bench_fairseq.py", "data-bin", "--device", "cpu"]
    assert "--profile" in run(*command, "--profile", expect=2)
