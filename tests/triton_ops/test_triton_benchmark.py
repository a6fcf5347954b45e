"""The benchmark's cases run and its table prints; times need a GPU and are replaced here."""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triton_ops import small
from triton_ops.config import Config

ROOT = Path(__file__).resolve().parents[2]


def script(name, monkeypatch):
    """A module of scripts/ in which things run once, anywhere, and seem to take 2 ms."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)

    def run_once(run, repeats):
        run()
        return dict(median_ms=2.0, p20_ms=1.0, p80_ms=3.0)

    monkeypatch.setattr(module, "DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(module, "measure", run_once)
    return module


@pytest.fixture
def bench(monkeypatch):
    module = script("bench_attention", monkeypatch)
    monkeypatch.setattr(module, "DENSE", {})  # these back ends exist on a GPU only
    return module


def test_the_gate_lets_right_kernels_through_and_no_others(bench, monkeypatch):
    monkeypatch.setattr(bench, "assert_within_budget", lambda case: None)  # has tests of its own
    bench.gate()
    monkeypatch.setattr(bench, "decode_attention", lambda *args, **options: torch.zeros_like(args[0]))
    with pytest.raises(AssertionError, match="decode is not within"):
        bench.gate()


def test_every_section_runs_and_is_tabulated(bench):
    rows = bench.square_case(1, 1, 40, 0.5, 16, bench.BOTH, 1, rivals=True)
    rows += bench.square_case(1, 1, 150, 0.5, (64, 16), ["forward"], 1, rivals=False, dim=16)
    rows += bench.sentence_case(2, 1, 16, 1)
    rows += bench.decode_case(1, 2, 1, 30, 0.9, 1)
    rows += bench.relative_case(2, 1, 16, 1) + bench.relative_decode_case(1, 2, 1, 30, 1)
    rows += [dict(case="ceiling", method="product", median_ms=1.0, tflops=700.0)]
    report = dict(device="CPU", torch="2", triton="3", commit="0", command="none", rows=rows)
    report = json.loads(json.dumps(report))
    printed = " ".join((bench.table(report) + bench.details(report)).split())
    for text in (
        "| square | 1, 1, 40 |",
        "| square | 1, 1, 150, D = 16 | ",
        "% | 64x16 | forward | 2 |",
        "| sentence | 2, 1, 16 |",
        "| decode self | 1x2, 1, 30 |",
        "| forward | 2 | 0 | | | | | 1.00 | | | 1.00 | | |",  # ours in ms; then dense mask and reference
        "| relative | 2, 1, 16 |",
        "| forward+backward | 2 | | | | | | | | | | 1.00 | 1.00 |",
        "| decode relative | 1x2, 1, 30 |",
        "| step | 2 | | | | | | | 1.00 | 1.00 | | | |",
        "bytes per cell",
        "Ceiling, product: 700",
    ):
        assert text in printed


def test_kernels_can_be_timed_where_only_torch_and_triton_are_installed():
    code = """
import sys
for name in ("ap_fairseq", "fairseq", "sacrebleu", "safetensors", "tabulate"):
    sys.modules[name] = None
import bench_attention, tune_attention
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "scripts")


def test_tuning_launches_the_candidate_and_puts_the_choice_back(monkeypatch):
    tuning = script("tune_attention", monkeypatch)
    monkeypatch.setattr(sys.modules["bench_attention"], "DEVICE", tuning.DEVICE)
    chosen, launched = small.small_forward_config, []

    def seen(self):
        launched.append(self)
        return dict(num_warps=self.warps, num_stages=self.stages)

    monkeypatch.setattr(Config, "launch", seen)  # noted when a launch is put together
    candidate = Config(16, 32, 2, 1)
    case = functools.partial(tuning.sentences, 2, 32)
    search = tuning.Search(("small", "small_forward_config"), (case,), (candidate,))
    assert search.times([case()], candidate, 1) == [2.0]
    assert candidate in launched
    launched.clear()
    assert search.times([case()], None, 1) == [2.0]
    assert candidate not in launched and small.small_forward_config is chosen


def test_tuning_covers_every_kernel_with_candidates_that_can_launch(monkeypatch):
    tuning = script("tune_attention", monkeypatch)
    for name, search in tuning.searches().items():
        module, function = search.name
        assert callable(getattr(importlib.import_module(f"triton_ops.{module}"), function)), name
        assert all(c.warps * 32 * (c.registers or 0) <= tuning.REGISTERS for c in search.candidates)


def test_committed_tuning_can_be_printed(monkeypatch):
    tuning = script("tune_attention", monkeypatch)
    for path in (ROOT / "scripts").glob("tune_attention.*.json"):
        assert "| forward 16 " in tuning.table(json.loads(path.read_text(encoding="utf-8")))


def test_committed_results_can_be_printed(bench):
    for path in (ROOT / "scripts").glob("bench_attention.*.json"):
        assert "| square " in bench.table(json.loads(path.read_text(encoding="utf-8")))


def test_block_masks_have_the_sparsity_they_are_asked_for(bench):
    for block in (16, 64, 128):
        keep = bench.block_mask(16, 2048, 2048, block, 0.9, seed=1)
        assert abs(1 - keep.float().mean().item() - 0.9) < 0.01
        assert keep.diagonal(dim1=1, dim2=2).all()
