"""The benchmark's cases run and its table prints; times need a GPU and are replaced here."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_attention", ROOT / "scripts" / "bench_attention.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run_once(run, repeats):
        run()
        return dict(median_ms=2.0, p20_ms=1.0, p80_ms=3.0)

    monkeypatch.setattr(module, "DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(module, "DENSE", {})  # these back ends exist on a GPU only
    monkeypatch.setattr(module, "measure", run_once)
    return module


def test_every_section_runs_and_is_tabulated(bench):
    rows = bench.square_case(1, 1, 40, 0.5, 16, bench.BOTH, 1, rivals=True)
    rows += bench.sentence_case(2, 1, 16, 1)
    rows += bench.decode_case(1, 2, 1, 30, 0.9, 1)
    rows += [dict(case="ceiling", method="product", median_ms=1.0, tflops=700.0)]
    report = dict(device="CPU", torch="2", triton="3", commit="0", command="none", rows=rows)
    report = json.loads(json.dumps(report))
    printed = bench.table(report) + bench.details(report)
    for text in (
        "| square | 1, 1, 40 |",
        "| sentence | 2, 1, 16 |",
        "| decode self | 1x2, 1, 30 |",
        "| forward | 2 | 0 |  |  |  |  | 1.00 |  | 1.00 |",  # ours in ms; a dense mask and eager take as long here
        "bytes per cell",
        "Ceiling, product: 700",
    ):
        assert text in printed


def test_committed_results_can_be_printed(bench):
    for path in (ROOT / "scripts").glob("bench_attention.*.json"):
        assert "| square |" in bench.table(json.loads(path.read_text(encoding="utf-8")))


def test_block_masks_have_the_sparsity_they_are_asked_for(bench):
    for block in (16, 64, 128):
        keep = bench.block_mask(16, 2048, 2048, block, 0.9, seed=1)
        assert abs(1 - keep.float().mean().item() - 0.9) < 0.01
        assert keep.diagonal(dim1=1, dim2=2).all()
