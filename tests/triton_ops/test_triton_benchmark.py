"""The benchmark's cases run and its table prints; times need a GPU and are replaced here.

And the cases for sanitizers are chosen, and named before they run.
"""

import functools
import importlib.util
import itertools
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from triton_ops import config, small
from triton_ops.config import Config
from triton_ops.reference import attention_reference

ROOT = Path(__file__).resolve().parents[2]


def script(name, monkeypatch, timed=False):
    """A module of scripts/ in which things run once, anywhere, and unless `timed` seem to take 2 ms."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)

    def run_once(run, repeats):
        run()
        return dict(median_ms=2.0, p20_ms=1.0, p80_ms=3.0)

    monkeypatch.setattr(module, "DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    if not timed:
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


def test_the_command_of_a_result_can_be_run(bench, monkeypatch):
    """`--only head sizes`, without quotes, named two arguments."""
    monkeypatch.setattr(bench.torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(sys, "argv", ["scripts/bench_attention.py", "--only", "head sizes"])
    assert bench.provenance()["command"] == "python scripts/bench_attention.py --only 'head sizes'"


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
        "| TFLOP/s | dense mask | bmm, softmax, bmm | SDPA of a step | reference | mask of cells | SDPA, mask built |",
        "| forward | 2 | 0 | 1.00 | | | 1.00 | | |",
        "| relative | 2, 1, 16 |",
        "| forward+backward | 2 | | | | | | 1.00 | 1.00 |",
        "| decode relative | 1x2, 1, 30 |",
        "| step | 2 | | | 1.00 | 1.00 | | | |",
        "bytes per cell",
        "Ceiling, product: 700",
    ):
        assert text in printed


def stand_in(monkeypatch, name, **content):
    """A module that seems to be installed."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def rivals(monkeypatch):
    """FlashAttention-4 and cuDNN as far as the benchmark calls them: attention under the mask of their lists.

    FlashAttention-4's backward pass fails, and cuDNN leaves a block out.
    """

    def listed(counts, indices, rows, columns):
        assert counts.dtype == indices.dtype == torch.int32
        kept = torch.zeros(*counts.shape, 256 // columns, dtype=torch.bool, device=counts.device)
        for b, h, i in itertools.product(*map(range, counts.shape)):
            kept[b, h, i, indices[b, h, i, : counts[b, h, i]].long()] = True
        return kept.repeat_interleave(rows, 2).repeat_interleave(columns, 3)

    class Lists(NamedTuple):
        mask_block_cnt: torch.Tensor
        mask_block_idx: torch.Tensor
        full_block_cnt: torch.Tensor
        full_block_idx: torch.Tensor
        block_size: tuple[int, int]

        def keep(self, by_key=False):
            assert not self.mask_block_cnt.any()
            assert self.mask_block_idx.shape[:3] == self.mask_block_cnt.shape == self.full_block_cnt.shape
            return listed(*self[2:4], *reversed(self.block_size) if by_key else self.block_size)

    def flash_attn_func(q, k, v, block_sparse_tensors, block_sparse_tensors_bwd):
        keep = block_sparse_tensors.keep()
        assert keep.equal(block_sparse_tensors_bwd.keep(by_key=True).transpose(2, 3))
        if q.requires_grad:
            raise ValueError("no blocks of 64 backward")
        tensors = [x.transpose(1, 2) for x in (q, k, v)]
        return attention_reference(*tensors, keep[0], scale=q.size(3) ** -0.5)[0].transpose(1, 2), None

    def forward(q, k, v, q2k_block_index, q2k_block_nums, sparse_block_size):
        assert q2k_block_nums.size(0) == q.size(0)
        keep = listed(q2k_block_nums, q2k_block_index, sparse_block_size, sparse_block_size)[0]
        keep[:, :64, :64] = False
        return dict(o_tensor=attention_reference(q, k, v, keep, scale=q.size(3) ** -0.5)[0])

    stand_in(monkeypatch, "flash_attn")
    stand_in(monkeypatch, "flash_attn.cute", flash_attn_func=flash_attn_func)
    stand_in(monkeypatch, "flash_attn.cute.block_sparsity", BlockSparseTensorsTorch=Lists)
    stand_in(monkeypatch, "cudnn", BSA=types.SimpleNamespace(block_sparse_attention_forward=forward))


def test_rivals_get_our_mask_and_wrong_results_show_in_place_of_times(bench, rivals, monkeypatch):
    def measure(run, repeats):
        try:
            run()
        except ValueError as error:
            return dict(error=str(error))
        return dict(median_ms=2.0)

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "flash_attention_4_dense", dict)
    rows = bench.square_case(2, 2, 256, 0.5, 64, bench.BOTH, 1, rivals=False)
    assert [(row["method"], row["direction"]) for row in rows] == [
        *(("ours", "forward"), ("fa4", "forward"), ("cudnn sparse", "forward")),
        *(("ours", "forward+backward"), ("fa4", "forward+backward")),
    ]
    assert 0 < rows[1]["difference"] < 0.01
    rest = bench.square_case(2, 2, 256, 0.5, 64, ["forward"], 1, rivals=False, without=("fa4",))
    assert [row["method"] for row in rest] == ["ours", "cudnn sparse"]
    report = dict(device="CPU", torch="2", triton="3", commit="0", command="none", rows=rows)
    printed = " ".join(bench.table(report).split())
    assert "| TFLOP/s | FlashAttention-4 | cuDNN, block-sparse |" in printed
    assert "| 1.00 | wrong |" in printed and "| error | |" in printed
    assert "no blocks of 64 backward" in bench.details(report) and "off our results" in bench.details(report)


@pytest.mark.parametrize("fails", ["nowhere", "in a capture", "always"])
def test_what_cannot_be_captured_is_called_eagerly(fails, monkeypatch):
    bench = script("bench_attention", monkeypatch, timed=True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def run(capturing=False):
        if fails == "always" or capturing:
            raise AssertionError("first line\nsecond")

    monkeypatch.setattr(bench, "time_events", lambda run, repeats: dict(median_ms=2.0))
    monkeypatch.setattr(bench, "time_graph", lambda run, repeats: run(fails == "in a capture") or dict(median_ms=1.0))
    assert (
        bench.measure(run, 1)
        == {
            "nowhere": dict(median_ms=1.0),
            "in a capture": dict(median_ms=2.0, eager="AssertionError: first line"),
            "always": dict(error="AssertionError: first line"),
        }[fails]
    )


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


@pytest.mark.parametrize("name", ["forward 128", "dq 128", "dkdv 128"])
def test_tuning_leaves_out_the_kernels_that_take_no_configuration(monkeypatch, name):
    """Candidates would all have timed the same: those in Gluon, which take their place."""
    tuning = script("tune_attention", monkeypatch)
    monkeypatch.setattr(config, "HOPPER", True)
    search = tuning.searches()[name]
    for candidate in (search.candidates[0], None):
        with search.using(candidate):
            assert not config.HOPPER
        assert config.HOPPER


@pytest.mark.parametrize("name", ["bench_attention", "tune_attention"])
def test_results_that_cannot_be_written_are_refused_at_once(name, monkeypatch, tmp_path, capsys):
    """It was found after the first case, minutes later."""
    with pytest.raises(SystemExit, match="2"):
        script(name, monkeypatch).main(["--out", str(tmp_path / "gone" / "rows.json")])
    assert f"folder {tmp_path / 'gone'} does not exist" in capsys.readouterr().err


def test_tuning_covers_every_kernel_with_candidates_that_can_launch(monkeypatch):
    tuning = script("tune_attention", monkeypatch)
    assert "small forward 32" in tuning.searches() and "small forward 32" not in tuning.searches(128)
    for name, search in (*tuning.searches().items(), *tuning.searches(128).items()):
        module, function = search.name
        assert callable(getattr(importlib.import_module(f"triton_ops.{module}"), function)), name
        assert all(c.warps * 32 * (c.registers or 0) <= tuning.REGISTERS for c in search.candidates)


def test_tuning_takes_any_head_size(monkeypatch):
    tuning = script("tune_attention", monkeypatch)
    seen = []
    monkeypatch.setattr(tuning, "block_sparse_attention", lambda q, k, v, **options: seen.append(q.shape))
    tuning.square(1, 2, 64, 16, dim=32)()
    assert seen == [(1, 2, 64, 32)]
    case = tuning.searches(128)["forward 16"].cases[0]
    assert case.keywords["dim"] == 128


def test_committed_tuning_can_be_printed(monkeypatch):
    tuning = script("tune_attention", monkeypatch)
    for path in (ROOT / "scripts").glob("tune_attention.*.json"):
        assert "| forward 16 " in tuning.table(json.loads(path.read_text(encoding="utf-8")))


def test_committed_results_can_be_printed(bench):
    for path in (ROOT / "scripts").glob("bench_attention.*.json"):
        assert "ours, ms |" in bench.table(json.loads(path.read_text(encoding="utf-8"))), path


def test_block_masks_have_the_sparsity_they_are_asked_for(bench):
    for block in (16, 64, 128):
        keep = bench.block_mask(16, 2048, 2048, block, 0.9, seed=1)
        assert abs(1 - keep.float().mean().item() - 0.9) < 0.01
        assert keep.diagonal(dim1=1, dim2=2).all()


def sanitize(*arguments, before=""):
    code = f"""
import os, runpy, sys
import triton_ops.norm
{before}
sys.argv = {["sanitize_kernels.py", *arguments]}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "scripts")


def test_a_run_of_the_sanitizers_cases_that_is_cut_off_says_where_it_stood():
    """It printed at its end alone: nobody knew what had kept racecheck busy for seven minutes."""
    run = sanitize("sums", before="triton_ops.norm.add_norm = lambda *_: os._exit(9)")
    assert run.returncode == 9
    assert run.stdout.endswith("s  sums: 1 rows of 48\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sums", "decode"], "unknown section decode; choose from attention, hopper, decoding, few_rows, sums, "),
        (["sums", "--only", "of 49"], "no case of these sections has 'of 49' in its name"),
    ],
)
def test_the_sanitizers_cases_that_do_not_exist_are_refused(arguments, message):
    run = sanitize(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert message in run.stderr
