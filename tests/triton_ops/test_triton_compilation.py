"""What the compiler makes of the kernels for compute capability 9.0; no GPU is needed to ask."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from triton_ops.testing import HOPPER_KERNELS

ROOT = Path(__file__).resolve().parents[2]
GLUON = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
# How many programs of kernels in Gluon are to share a multiprocessor, by elements of a head.
PROGRAMS = {
    "_hopper_forward_kernel": {64: 4, 96: 3, 128: 2},
    "_hopper_dq_kernel": {32: 4, 64: 4, 96: 3, 128: 2},
    "_hopper_dkdv_kernel": {32: 2, 64: 2, 96: 2, 128: 2},
}
SHARED_MEMORY = 227 * 1024  # bytes a block may use on an H100 or H200


def output(script, cache):
    """What a script of this folder prints when Triton compiles, to an empty cache, and ptxas reports."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = dict(os.environ, TRITON_INTERPRET="0", TRITON_DUMP_PTXAS_LOG="1", PYTHONPATH=path)
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, Path(__file__).with_name(script)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    *log, report = output("compile_offline.py", tmp_path_factory.mktemp("triton")).splitlines()
    return json.loads(report) | dict(log=log)


def test_fifty_random_lengths_compile_nothing_after_one_of_each_size_class(report):
    assert report["warm"] > 0 and report["new"] == 0


def test_every_kernel_fits_in_shared_memory(report):
    assert len({kernel["name"] for kernel in report["kernels"]}) == (16 if GLUON else 13)
    assert all(kernel["shared"] <= SHARED_MEMORY for kernel in report["kernels"])


def test_tiles_of_64_rows_use_the_tensor_cores_of_hopper(report):
    large = [k for k in report["kernels"] if min(k.get("G", 0), k.get("GO", 0)) >= 64 and k.get("PRECISION") == "ieee"]
    assert {k["name"] for k in large} == {"_forward_kernel", "_dq_kernel", "_dkdv_kernel"}
    assert all(kernel["wgmma"] for kernel in large)


def test_flat_tiles_use_the_tensor_cores_of_hopper(report):
    """Where 64 queries share keys, a product has 64 rows; blocks of 16 keys alone ran on the older instructions."""
    flat = [k for k in report["kernels"] if k.get("G", 64) < 64 <= k.get("GO", 0)]
    assert {(k["name"], k["GO"], k["G"]) for k in flat} == {
        (name, *tile) for name in ("_forward_kernel", "_dq_kernel") for tile in [(64, 16), (128, 16), (64, 1)]
    }
    assert all(kernel["wgmma"] for kernel in flat)


def test_masks_of_offsets_are_compiled_for_every_attention_kernel(report):
    offsets = [k for k in report["kernels"] if k["offsets"]]
    assert {k["name"] for k in offsets} == {
        *("_forward_kernel", "_dq_kernel", "_dkdv_kernel", "_decode_kernel"),
        *("_small_forward_kernel", "_small_backward_kernel"),
    }
    assert all(k["wgmma"] for k in offsets if k.get("BM", 0) >= 64 and k["PRECISION"] == "ieee")


@pytest.mark.parametrize("size, kernels", [("sentence", 2), ("lists", 3), ("hopper", 3), ("hopper, two parts", 3)])
def test_triton_binds_the_arguments_of_launches_alike_once(report, size, kernels):
    """And always where addresses are no multiples of 16 bytes: kernels are compiled for these, too."""
    repetition = report["repetitions"][size]
    assert repetition["bound"] == [kernels, 0, kernels, kernels]
    assert repetition["same"]


def test_launches_that_repeat_pass_addresses(report):
    assert not any(repetition["whole"] for repetition in report["repetitions"].values())


def test_no_descriptor_is_made_of_a_tensor_that_hopper_cannot_read(report):
    """Hooks of autograd may save the output elsewhere, say: the launch of dQ that was kept took it unseen."""
    assert report["refused"] == []


@pytest.mark.skipif(not GLUON, reason="needs triton 3.6")
def test_rows_of_numbers_begin_where_hopper_can_read_tiles(report):
    """3 x 2 rows of 401 numbers: some began at no multiple of 16 bytes, and launches failed on the GPU."""
    assert report["repetitions"]["hopper"]["vectors"] == [3 * 2 * 404] * 2


@pytest.mark.skipif(not GLUON, reason="needs triton 3.6")
def test_products_on_hopper_run_asynchronously(report):
    """ptxas runs them one by one when registers do not suffice, or when it cannot see that a result is waited for."""
    assert PROGRAMS.keys() == HOPPER_KERNELS.keys()
    for name, programs in PROGRAMS.items():
        hopper = [kernel for kernel in report["kernels"] if kernel["name"] == name]
        assert {k["D"] for k in hopper} == set(HOPPER_KERNELS[name])
        assert all(k["wgmma"] and k["shared"] <= SHARED_MEMORY // programs[k["D"]] for k in hopper)
        assert any(f"Compiling entry function '{name}'" in line for line in report["log"])  # it does report
        assert not [line for line in report["log"] if "serialized" in line and name in line]


def test_triton_without_gluon_computes_the_same_gradients_by_its_own_kernels(tmp_path):
    assert json.loads(output("compile_as_34.py", tmp_path).splitlines()[-1]) == [
        *("_forward_kernel", "_dq_kernel", "_dkdv_kernel")
    ]
