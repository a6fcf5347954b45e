"""Set-up of the kernel tests: lengths for both kinds of kernels; the interpreter refuses foreign addresses.

On a GPU, addresses outside the tensors of a launch go unnoticed but for the rare one that no tensor of the process has.
"""

import bisect

import pytest
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_ops.config import INTERPRETED


def extent(x):
    """Return the first address of a tensor, and that after its last element."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def merged(extents):
    """Return the sorted starts of the ranges that *extents* cover together, and their ends."""
    starts, ends = [], []
    for start, end in sorted(extents):
        if ends and start <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            starts.append(start)
            ends.append(end)
    return starts, ends


@pytest.fixture(autouse=True, scope="session")
def _checked_addresses():
    if not INTERPRETED:
        yield
        return
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    run, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    starts, ends = [], []

    def checked_run(self, *args, **kwargs):
        tensors = [x.base if isinstance(x, TensorDescriptor) else x for x in (*args, *kwargs.values())]
        extents = [extent(x) for x in tensors if hasattr(x, "data_ptr") and x.numel()]
        starts[:], ends[:] = merged(extents)
        run(self, *args, **kwargs)

    def check(pointers, mask):
        addresses = pointers.data[mask.data]
        if addresses.size:
            first, last = int(addresses.min()), int(addresses.max())
            end = last + max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            place = bisect.bisect_right(starts, first) - 1
            if place < 0 or end > ends[place]:
                raise IndexError(f"a kernel touches {first:#x} to {end:#x}, which no tensor of the launch holds")

    def checked_load(self, ptrs, mask, *args, **kwargs):
        check(ptrs, mask)
        return load(self, ptrs, mask, *args, **kwargs)

    def checked_store(self, ptrs, value, mask, *args, **kwargs):
        check(ptrs, mask)
        return store(self, ptrs, value, mask, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "__call__", checked_run)
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        yield


@pytest.fixture(params=["sentence", "lists"])
def size(request, monkeypatch):
    """A length for each kind of kernels: those of `small.py`, and those of the tile lists.

    The lists serve from 129 on, where the interpreter takes four times as long.
    """
    if request.param == "sentence":
        return 40
    monkeypatch.setattr("triton_ops.small.SMALL_TILES", ())
    return 70
