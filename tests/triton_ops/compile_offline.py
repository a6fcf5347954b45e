"""Compile the kernels for an H100 or H200 on a machine without a GPU, and report what was compiled as JSON.

Run by test_triton_compilation.py in a process of its own, where Triton compiles instead of interpreting. Launches
go through the real launchers with CPU tensors; Triton's driver is replaced by one that only names the target.
"""

import json
import random
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from triton_ops import AttentionLayout, decode, launch, norm, ops, rows
from triton_ops.api import advance_beams, continue_beams
from triton_ops.beam_state import BeamState
from triton_ops.call import Call
from triton_ops.testing import HOPPER_KERNELS, random_offsets

compiled = {}


launched: list[tuple] = []  # the arguments of every launch


class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *arguments):
        launched.append(arguments[9:])  # after grid, stream, kernel and hooks


class Utils:
    def load_binary(self, *_):
        return 1, 1, 32, 0, 1024

    def unload_module(self, _):
        pass

    def get_device_properties(self, _):
        return dict(max_shared_mem=227 * 1024)


class Driver:
    utils, launcher_cls = Utils(), Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_only(self, grid):
    def launch(*args, **options):
        kernel = self.run(*args, grid=grid, warmup=True, **options)
        wgmma = "wgmma.mma_async" in kernel.asm["ptx"]
        constants = {p.name: options[p.name] for p in self.params if p.is_constexpr}
        offsets = options["p_anchor"] is not None if "p_anchor" in options else None
        compiled[id(kernel)] = dict(
            name=self.__name__, shared=kernel.metadata.shared, wgmma=wgmma, offsets=offsets, **constants
        )

    return launch


def attend(dtype, dim, tile, dropout_p, size, batch):
    """Under a mask of cells in such tiles, or for None one of offsets."""
    if tile is None:
        layout = random_offsets(2, 600)
    else:
        layout = AttentionLayout.from_keep_mask(torch.ones(2, 600, 600, dtype=torch.bool), tile=tile)
    q, k, v = (torch.empty(size, batch, 2, dim, dtype=dtype).permute(1, 2, 0, 3) for _ in range(3))
    lengths = torch.ones(batch, dtype=torch.int64)
    seed = torch.ones(1, dtype=torch.int64) if dropout_p else None
    mask = layout.words, layout.row_shift, layout.tables(training=True), *layout.tile
    rest = (*mask, lengths, lengths, seed, dropout_p, 0.1, layout.slope, layout.anchor)
    out, lse = ops.attention_op(q, k, v, *rest)
    ops.attention_backward_op(torch.empty_like(out), None, q, k, v, out, lse, *rest)


def repeated(size, tile, dim=64):
    """Forward and backward four times, first at multiples of 16 bytes, then elsewhere, launches and all.

    Returns how many launches Triton bound in each, whether all passed the tensors, and beside them the same, the sizes
    of the vectors of which the first passed descriptors, and the kernels that repeat with tensors, not addresses.
    """
    layout = AttentionLayout.from_keep_mask(torch.ones(2, size, size, dtype=torch.bool), tile=tile)
    tables = [*layout.query_table()[:2], *layout.key_table()[:2]] if size > 128 else []
    lengths = torch.full((3,), size)
    mask = layout.words, layout.row_shift, tables, *layout.tile
    call = Call(*mask, lengths, lengths, None, 0.0, 0.125)
    bound, tensors, others, vectors, whole = [], [], [], [], []
    run_launch = launch.Launch.__call__

    def watched(self, **named):
        run_launch(self, **dict(named))
        arguments = launched.pop()
        tensors.extend(stands_for(*pair) for pair in zip(arguments, named.items(), strict=False))
        others[-1].append(arguments[len(named) :])
        if len(others) == 1:
            vectors.extend(x.shape[0] for x in arguments if len(getattr(x, "block_shape", ())) == 1)
        if len(others) == 2 and any(isinstance(x, torch.Tensor) for x in arguments):
            whole.append(self.kernel.__name__)

    for shift in (0, 0, 1, 1):
        store = [torch.zeros(3 * 2 * size * dim + 1, dtype=torch.bfloat16) for _ in range(4)]
        q, k, v, grad = (x[shift : x.numel() - 1 + shift].view(3, 2, size, dim) for x in store)
        others.append([])
        with (
            mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as run,
            mock.patch.object(launch.Launch, "__call__", watched),
        ):
            out, lse = ops._forward(q, k, v, call)
            ops._backward(grad, None, q, k, v, out, lse, call)
        bound.append(run.call_count)
    same = all(tensors) and others[0] == others[1] and others[2] == others[3]
    return dict(bound=bound, same=same, vectors=vectors, whole=whole)


def misplaced(size, tile):
    """The descriptors of tensors at no multiple of 16 bytes, which the driver refuses, as (kernel, parameter).

    Of forward and backward with one tensor after another moved there; launches are kept from a run with none.
    """
    layout = AttentionLayout.from_keep_mask(torch.ones(2, size, size, dtype=torch.bool), tile=tile)
    tables = [*layout.query_table()[:2], *layout.key_table()[:2]]
    call = Call(layout.words, layout.row_shift, tables, *layout.tile, None, None, None, 0.0, 0.125)
    q, k, v, grad = (torch.zeros(3, 2, size, 64, dtype=torch.bfloat16) for _ in range(4))
    out, lse = ops._forward(q, k, v, call)
    arguments = [grad, q, k, v, out, lse]
    found = []
    run_launch = launch.Launch.__call__

    def watched(self, **named):
        described = [name for name, block in self.blocks.items() if block is not None]
        found.extend((self.kernel.__name__, name) for name in described if named[name].data_ptr() % 16 != 0)
        run_launch(self, **dict(named))

    with mock.patch.object(launch.Launch, "__call__", watched):
        for i in (None, *range(len(arguments))):
            some = list(arguments)
            if i is not None:
                some[i] = some[i].new_zeros(some[i].numel() + 1)[1:].view_as(some[i])
            grad, q, k, v, out, lse = some
            ops._forward(q, k, v, call)
            ops._backward(grad, None, q, k, v, out, lse, call)
    return found


def stands_for(argument, named):
    """Whether a compiled kernel is given a tensor, by itself, by address or by descriptor; where there is one."""
    name, x = named
    if x is None:
        return argument is None or argument == 0
    if hasattr(argument, "block_shape"):  # a descriptor, of Triton or of Gluon
        return name.startswith("d_") and argument.base is x and tuple(argument.shape) == x.shape
    return argument is x or argument == x.data_ptr() or (argument is None and name.startswith("d_"))


def decode_steps(dtype, dim, size, batch, beam=3):
    """With every kind of cache and every combination of tables; cross-attention under a mask of offsets, too."""
    cells = AttentionLayout.from_keep_mask(torch.ones(2, 8, size, dtype=torch.bool), tile=64)
    q = torch.empty(batch, beam, 2, dim, dtype=dtype)
    lengths = torch.ones(batch, dtype=torch.int64)
    rows, offsets = torch.zeros(batch, beam, size, dtype=torch.int32), torch.zeros(2, size, dtype=torch.int32)
    starts = torch.zeros(batch, 2, dtype=torch.int64)
    pool = torch.empty(size, 2, dim, dtype=dtype)
    for layout, k, *tables in [
        (cells, torch.empty(batch, beam, 2, size, dim, dtype=dtype), None, None, None),
        (cells, torch.empty(batch, 2, size, dim, dtype=dtype), None, None, None),
        (cells, pool, rows, None, None),
        (cells, pool[:, 0], rows, None, offsets),
        (cells, pool, None, starts[:, 0].contiguous(), None),
        (cells, pool[:, 0], None, starts, offsets),
        (random_offsets(2, size), pool[:, 0], None, starts, offsets),
    ]:
        mask = layout.slope, layout.anchor
        for settled in (False, True):
            ops.decode_op(q, k, k, *layout.row_lists(), torch.tensor([3]), size, lengths, *tables, 0.1, *mask, settled)


def search_step(size, batch, beam=3):
    state = BeamState.empty(batch, size, beam, torch.device("cpu"))
    for penalty in (torch.zeros(96), None):
        advance_beams(state, batch, torch.zeros(batch * beam, 96), penalty, eos=2, kernels=True)
    sums, tokens = torch.zeros(batch, beam), torch.zeros(batch, beam, dtype=torch.int64)
    continue_beams(state, batch, sums, tokens, tokens, eos=2, kernels=True)
    kv, pool = torch.empty(batch * beam, 2, 2, 32), torch.empty(size, 2, 32)
    offsets = torch.zeros(2, size, dtype=torch.int32)
    ops.append_step(kv, pool, offsets, state.step)
    used = torch.zeros(2, dtype=torch.int64)
    decode.number(batch * beam, state.block_table, offsets, used, used, used, state.step)


def few_rows(n, size):
    """The products of a decoder layer with all that may happen around them."""
    half = dict(dtype=torch.float16)
    table, tokens = torch.empty(1000, 512, **half), torch.zeros(n, dtype=torch.int64)
    x = rows.embed_rows(tokens, table, 2.0, table, torch.zeros(1, dtype=torch.int64))
    vector = torch.empty(2048, **half)
    norm = rows.Norm(vector[:512], vector[:512], 1e-5)
    offsets, step = torch.zeros(8, size, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    slots = rows.Slots(torch.empty(8 * n, 2, 64, **half), offsets, step)
    q, x = rows.linear_rows(x, torch.empty(1536, 512, **half), vector[:1536], norm=norm, keep_normed=True, slots=slots)
    x, _ = rows.linear_rows(q, torch.empty(512, 512, **half), vector[:512], residual=x)
    for activation in ("relu", "gelu"):
        hidden, _ = rows.linear_rows(x, torch.empty(2048, 512, **half), vector, norm=norm, activation=activation)
        rows.linear_rows(hidden, torch.empty(512, 2048, **half), vector[:512], residual=x)
    rows.linear_rows(x, table, None, norm=norm)
    rows.linear_rows(torch.empty(n, 16, **half), torch.empty(8, 16, **half), None)


def many_rows(n):
    """What comes between two products of a decoder layer."""
    for c in (512, 1000):
        x, vector = torch.empty(n, c, dtype=torch.float16), torch.empty(c, dtype=torch.float16)
        for y in (None, x):
            norm.add_norm(x, y, rows.Norm(vector, vector, 1e-5))


def main():
    triton.runtime.driver.set_active(Driver())
    repetitions = dict(sentence=repeated(100, 64), lists=repeated(150, 64), hopper=repeated(401, 128))
    repetitions["hopper, two parts"] = repeated(401, 128, 96)
    refused = misplaced(401, 128)
    JITFunction.__getitem__ = compile_only
    launch.forget()
    attend(torch.bfloat16, 64, 64, 0.0, 300, 2)
    attend(torch.bfloat16, 64, 128, 0.1, 300, 2)
    attend(torch.bfloat16, 128, 128, 0.1, 300, 2)
    for dim in set().union(*HOPPER_KERNELS.values()) - {64}:
        attend(torch.bfloat16, dim, 128, 0.0, 300, 2)
    attend(torch.float16, 64, 128, 0.0, 300, 2)
    attend(torch.float16, 64, 128, 0.0, 300, 2)
    for tile in [(64, 16), (128, 16), (64, 1)]:
        attend(torch.bfloat16, 64, tile, 0.0, 300, 2)
    attend(torch.float32, 96, None, 0.1, 300, 2)
    before_lengths = len(compiled)

    def lengths_seen(size, batch):
        attend(torch.bfloat16, 32, 64, 0.1, size, batch)
        attend(torch.bfloat16, 64, None, 0.0, size, batch)
        attend(torch.bfloat16, 64, 128, 0.0, size, batch)
        attend(torch.bfloat16, 64, 128, 0.0, size, batch)
        decode_steps(torch.bfloat16, 32, size, batch)
        search_step(size, batch)
        few_rows(min(size, rows.MAX_ROWS), size)
        many_rows(size)

    for size in (5, 10, 20, 50, 100, 300):
        lengths_seen(size, 3)
    warm = len(compiled)
    draw = random.Random(0)
    for _ in range(50):
        lengths_seen(draw.randint(1, 600), draw.randint(1, 8))
    report = dict(
        kernels=list(compiled.values()), warm=warm - before_lengths, new=len(compiled) - warm, repetitions=repetitions,
        refused=refused,
    )  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
