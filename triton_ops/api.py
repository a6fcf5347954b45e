"""Public functions: check the arguments, then hand over to the kernels or to torch under a dense mask."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import beam_state
from .beam_state import BeamState
from .dense import attend_dense, draw_seed
from .layout import AttentionLayout, Layout
from .reference import decode_reference, laid_out_as, without_padding

if TYPE_CHECKING:
    from .call import Call

HEAD_SIZES = (16, 32, 64, 96, 128)
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BACKENDS = ("auto", "triton", "sdpa")
INTEGERS = (torch.int32, torch.int64)
_REMEMBERED = frozenset((bool, int, float, str, type(None)))  # types of options of calls that are


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1 when triton was imported)."""
    from .config import INTERPRETED

    return INTERPRETED


def use_kernels(backend: str, dtype: torch.dtype, head_size: int, device: torch.device) -> bool:
    """Resolve a back end for inputs of a type, a head size and a device: whether the kernels run.

    `auto` takes the kernels for tensors on a GPU whose dtype and head size they support. `triton` by name is used or
    refused with a ValueError that says why, never replaced.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "sdpa" or (backend == "auto" and device.type != "cuda"):
        return False
    problem = None
    if dtype not in KERNEL_DTYPES:
        problem = f"dtype {dtype}; the kernels take {', '.join(str(t) for t in KERNEL_DTYPES)}"
    elif head_size not in HEAD_SIZES:
        problem = f"head size {head_size}; the kernels take {', '.join(map(str, HEAD_SIZES))}"
    elif device.type != "cuda" and not interpreted():
        problem = f"tensors on {device}; move them to a GPU, or set TRITON_INTERPRET=1 before the first import"
    if problem is None:
        return True
    if backend == "triton":
        raise ValueError(f"backend 'triton' cannot run on {problem}; or use backend 'sdpa'")
    return False


def _integers(name: str, table: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A table with adjacent elements in its rows, as kernels read it."""
    if table.dtype not in INTEGERS:
        raise TypeError(f"{name} must be int32 or int64, got {table.dtype}")
    if table.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(table.shape)}")
    if table.device != device:
        raise ValueError(f"{name} is on {table.device} but q is on {device}; move it with .to(q.device)")
    return _rows(table)


def _checked_lengths(name: str, lengths: Tensor | None, batch: int, size: int, device: torch.device) -> Tensor | None:
    if lengths is None:
        return None
    lengths = _integers(name, lengths, (batch,), device)
    if not lengths.is_cuda and not torch.compiler.is_compiling():
        check_length_values(name, lengths, size)
    return lengths


def _one_integer(name: str, value: int | Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> int | Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype not in dtypes or value.device != device:
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"{name} must be one {kinds} on {device}, got {value.numel()} of {value.dtype} on {value.device}"
            )
        return value
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, or a tensor that holds one, got {value!r}") from None


def _checked_seed(seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    if seed is None:
        return None
    seed = _one_integer("seed", seed, (torch.int64,), device)
    if isinstance(seed, Tensor):
        return seed
    return torch.full((1,), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def _results(out: Tensor, *details: Tensor | None) -> Tensor | tuple[Tensor, ...]:
    """Return out, or a tuple of out and the requested details."""
    wanted = [x for x in details if x is not None]
    return (out, *wanted) if wanted else out


def check_length_values(name: str, lengths: Tensor, size: int) -> None:
    """Raise ValueError if a length is negative or above `size`.

    Called for CPU tensors in every call outside of torch.compile. On a GPU it would be a host synchronisation, so
    there the kernels clamp lengths to [0, size] and this check is for the caller to make where a synchronisation
    costs nothing.
    """
    if lengths.numel() == 0:
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > size:
        raise ValueError(f"{name} must lie in [0, {size}], the sequence size, got values from {low} to {high}")


def _rows(x: Tensor) -> Tensor:
    """The kernels read rows of D consecutive elements; every other stride is free."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_kinds(q: Tensor, k: Tensor, v: Tensor, layout: Layout, heads: int) -> None:
    """Check types, devices and heads, for the forward pass and the decode step."""
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v must share one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise TypeError(f"q, k, v must be float16, bfloat16, float32 or, in back end sdpa, float64, got {q.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must be on one device, got {q.device}, {k.device} and {v.device}")
    if layout.device != q.device:
        raise ValueError(f"layout is on {layout.device} but q is on {q.device}; use layout.to(q.device), once")
    if layout.mask_heads not in (1, heads):
        raise ValueError(f"layout has {layout.mask_heads} heads but q has {heads}; it must have {heads} or 1")


def _check_sizes(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> None:
    """Check what q, k and v (B, H, T, D) have to have in common, and that the layout covers them."""
    (batch, heads, q_size, dim), k_size = q.shape, k.size(2)
    if k.shape != (batch, heads, k_size, dim) or v.shape != k.shape:
        raise ValueError(
            f"k and v must both be ({batch}, {heads}, Tk, {dim}) to fit q, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    _check_kinds(q, k, v, layout, heads)
    if layout.q_size < q_size or layout.k_size < k_size:
        raise ValueError(
            f"layout covers {layout.q_size} x {layout.k_size} positions but q x k has {q_size} x {k_size}; "
            "extend the keep mask first"
        )


def _check_cache(q: Tensor, k: Tensor, v: Tensor, layout: Layout, n_tables: int, has_offsets: bool) -> None:
    """Check that caches of a decoding step fit q (B, beam, H, D), the layout, and the tables that are given."""
    batch, beam, heads, dim = q.shape
    if n_tables != (k.dim() <= 3) or has_offsets != (k.dim() == 2):
        raise ValueError(
            "a pool (R, H, D) or (R, D) needs one of block_table and cache_starts, (R, D) also cache_offsets, and "
            f"other caches none: got k {tuple(k.shape)} with {n_tables} of them, "
            f"{'with' if has_offsets else 'without'} cache_offsets"
        )
    _check_kinds(q, k, v, layout, heads)
    expected: tuple[int, ...]
    if n_tables:
        expected = (k.size(0), dim) if has_offsets else (k.size(0), heads, dim)
    else:
        expected = (batch, heads, k.size(-2), dim) if k.dim() == 4 else (batch, beam, heads, k.size(-2), dim)
    if k.shape != expected:
        raise ValueError(f"k and v must be {expected} to fit q {tuple(q.shape)}, got {tuple(k.shape)}")


def _check_scale(scale: float | None, dim: int) -> float:
    if dim == 0:
        raise ValueError("q, k, v have heads of size 0; the last dimension must be 1 or more")
    scale = dim**-0.5 if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}; fold a sign into q")
    return scale


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention is a matrix product: under autocast its inputs take the autocast type, as in SDPA."""
    kind = q.device.type
    if torch.is_autocast_enabled(kind) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v


def _wants_grad(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _call_key(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], seed: int | Tensor | None, options: tuple
) -> tuple | None:
    """Return all that the checks of a call look at, if it can be remembered and the kernels take the tensors as is.

    tensors: q, k, v and both lengths. options: (causal, dropout_p, scale, ...).
    """
    if not _REMEMBERED.issuperset(map(type, options)):  # a tensor may have another value the next time
        return None
    q, k, v, *others = tensors
    strides = q.stride(), k.stride(), v.stride()
    if not strides[0][-1] == strides[1][-1] == strides[2][-1] == 1:  # they are copied
        return None
    kinds: list[tuple | None] = []
    for x in (*others, seed):
        if x is None:
            kinds.append(None)
        elif isinstance(x, Tensor) and x.dim() > 0 and x.stride(-1) == 1:  # else they are copied, or refused
            kinds.append((x.shape, x.stride(), x.dtype, x.device))
        else:
            return None
    shapes, types, devices = (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype), (q.device, k.device, v.device)
    return shapes, strides, types, devices, *kinds, _wants_grad(q, k, v), *options


def _kernel_call(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout_p: float, scale: float, *, remembered: bool
) -> Call:
    """What the kernels read beside q, k and v, but for lengths and seed, which `Call.on` adds."""
    from .call import Call
    from .small import small_size

    small = small_size(q.size(2), k.size(2), q.size(3), q.dtype) is not None
    tables = [] if small else layout.tables(_wants_grad(q, k, v))
    mask = layout.words, layout.row_shift, tables, *layout.tile
    alike: dict | None = {} if remembered else None
    return Call(*mask, None, None, None, dropout_p, scale, layout.slope, layout.anchor, alike)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    return_probs: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Attention over the kept cells of `layout`; tiles of which nothing is kept are skipped.

    q: (B, H, Tq, D); k, v: (B, H, Tk, D): float16, bfloat16 or float32, any strides (views of time-first
        tensors need no copy as long as the D elements of a row are adjacent). D is 16, 32, 64, 96 or 128; back end
        sdpa takes any, and float64. Under autocast they take the autocast type.
    layout: of H heads or 1, with q_size >= Tq and k_size >= Tk; its upper left corner is used. Call the `prepare` of an
        `AttentionLayout` before a trace (torch.compile) or a capture (CUDA graphs). The cells of an `OffsetLayout`
        depend on the k_lengths of each sentence; not with causal.
    q_lengths, k_lengths: (B,) int32 or int64, valid positions from the left (right padding). Padded query
        rows give 0. What padding holds has no effect, NaN and infinity included. On a GPU lengths are clamped to the
        sizes (`check_length_values` checks them).
    causal: also drop the cells j > i.
    dropout_p, seed: dropout on the probabilities. `seed` is an int or a one-element int64 tensor on the
        device (read when the kernel runs, so a captured CUDA graph can change it); None draws one from
        torch's generator. The same seed gives the same bits in every back end.
    scale: of the scores; D ** -0.5 by default.
    backend: "triton", the kernels; "sdpa", torch's attention under a dense mask; "auto", the kernels for tensors on a
        GPU that they take, else sdpa. torch's fused attention has neither a seed nor lse or probabilities: where they
        are asked for, sdpa computes the definition step by step.
    return_lse: also return log Σ exp of every row's scores, (B, H, Tq) float32 (float64 for float64 inputs), in natural
        units.
    return_probs: also return the probabilities before dropout, (B, H, Tq, Tk) of the type of lse. The kernels never
        form them: the definition is computed for these alone, in addition.

    Returns out (B, H, Tq, D), laid out in memory as q, or a tuple (out, lse if asked for, probabilities if asked for).
    Rows without a visible key are 0, with lse -inf and gradient 0. Definition and references: `reference.py`.

    Gradients by autograd; the kernels have no second derivative, and no part in torch.func's transforms (grad, vmap).

    Positions inside the lengths should be finite, pruned ones too. A pruned pair counts with probability 0, and
    0 · NaN is NaN: in any back end a key or value that is not finite may reach every row of its head of its sentence,
    but no other head or sentence. Skipped tiles are not read where tile lists are used, above 128 positions; up to 128
    the kernels read everything inside the lengths.

    Raises ValueError or TypeError, naming both values, for shapes, types, devices, lengths or a back end that
    do not fit. `layout` remembers calls that ran on the kernels: one that differs in values alone is not checked again.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v must be (B, H, T, D), got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}")
    q, k, v = _autocast(q, k, v)
    options = causal, dropout_p, scale, backend, return_lse, return_probs
    key = None if torch.compiler.is_compiling() else _call_key((q, k, v, q_lengths, k_lengths), seed, options)
    known = None if key is None else layout.known_calls.get(key)
    if known is not None:  # like an earlier call: no function of its own, whose call would cost each of them time
        attend, call = known
        for name, values, size in (("q_lengths", q_lengths, q.size(2)), ("k_lengths", k_lengths, k.size(2))):
            if values is not None and not values.is_cuda:
                check_length_values(name, values, size)
        if dropout_p > 0 and seed is None:
            seed = draw_seed(q.device)
        out, lse = attend(q, k, v, call.on(q_lengths, k_lengths, seed if dropout_p > 0 else None))
        return (out, lse) if return_lse else out

    _check_sizes(q, k, v, layout)
    (batch, _, q_size, dim), k_size = q.shape, k.size(2)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    q_lengths = _checked_lengths("q_lengths", q_lengths, batch, q_size, q.device)
    k_lengths = _checked_lengths("k_lengths", k_lengths, batch, k_size, q.device)
    if causal and not isinstance(layout, AttentionLayout):
        raise ValueError("causal=True with a layout of offsets: these say which keys of another text are kept")
    scale = _check_scale(scale, dim)
    seed = _checked_seed(seed, q.device) if dropout_p > 0 else None

    probs = None
    kernels = use_kernels(backend, q.dtype, dim, q.device)
    if return_probs or not kernels:
        out, lse, probs = attend_dense(
            without_padding(q, q_lengths),
            without_padding(k, k_lengths),
            without_padding(v, k_lengths),
            layout.keep_mask(q_size, k_size, k_lengths),
            scale=scale,
            q_lengths=q_lengths,
            k_lengths=k_lengths,
            causal=causal,
            dropout_p=dropout_p,
            seed=seed,
            details=return_lse or return_probs,
        )
        if not kernels:
            return _results(out, lse if return_lse else None, probs if return_probs else None)

    from .ops import attend  # imports triton, which sdpa does not need

    if dropout_p > 0 and seed is None:
        seed = draw_seed(q.device)
    read = layout.causal() if causal and isinstance(layout, AttentionLayout) else layout
    call = _kernel_call(q, k, v, read, dropout_p, scale, remembered=key is not None)
    if key is not None and probs is None:
        layout.remember(key, (attend, call))
    rows = tuple(_rows(x) for x in (q, k, v))
    out, lse = attend(*rows, call.on(q_lengths, k_lengths, seed))
    if rows[0] is not q:
        out = laid_out_as(out, q)
    return _results(out, lse if return_lse else None, probs)


@torch.no_grad()
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    step: int | Tensor,
    *,
    k_lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    cache_starts: Tensor | None = None,
    cache_offsets: Tensor | None = None,
    scale: float | None = None,
    settled: bool = False,
    backend: str = "auto",
) -> Tensor:
    """One decoding step: row `step` of the mask for one query per (sentence, beam, head).

    q: (B, beam, H, D), of the types and head sizes of `block_sparse_attention`, as k and v.
    k, v: caches, any strides with adjacent D, of which only kept positions are read:
        (B, beam, H, S, D), one per hypothesis; (B, H, S, D), one per sentence for all its beams; or a pool in
        which `block_table` or `cache_starts` finds a position: R slots (R, H, D), or (R, D) with `cache_offsets`, where
        every head has slots of its own. S may exceed what is filled.
    layout: as in `block_sparse_attention`. Ahead of a trace or a capture call `row_lists`.
    step: decode step = cached length before the step, an int or a one-element int32 or int64 tensor on the device
        (read when the kernel runs, so that a captured CUDA graph can be replayed for every step).
    k_lengths: (B,) int32 or int64, valid cache positions of each sentence, at most layout.k_size. Without it (decoder
        self-attention), positions up to layout.k_size and S are visible as the mask says: pass a causal layout or
        lengths step + 1.
    block_table: (B, beam, S) int32 or int64, the slot of position s of each hypothesis. Beams that share a prefix
        share its slots, and reordering beams permutes this table, not the caches.
    cache_starts: (B,) int32 or int64, the slot of each sentence's position 0, for caches that all beams of a
        sentence share (cross-attention); its positions follow one another, and k_lengths says how many. With
        `cache_offsets` (B, H).
    cache_offsets: (H, S) int32 or int64: position s of head h is in slot cache_offsets[h, s] + what `block_table` or
        `cache_starts` says. So a pool needs no slots for positions that a head never keeps.
    settled: whether step, lengths and tables were written before the kernel that was launched last had begun, so that
        they may be read while that one ends.

    Returns (B, beam, H, D); rows without a visible key are 0. No gradient. Under autocast q and the caches take the
    autocast type: caches that are kept in another are converted in every step. Raises ValueError or TypeError as
    `block_sparse_attention` does, also for a step outside the layout unless it lies on a GPU, where it is clamped.
    Values of the tables are not checked.
    """
    if q.dim() != 4 or k.dim() not in (2, 3, 4, 5) or v.shape != k.shape:
        raise ValueError(
            "q must be (B, beam, H, D) and k, v alike (B, H, S, D), (B, beam, H, S, D), (R, H, D) or (R, D), "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    q, k, v = _autocast(q, k, v)
    batch, beam, heads, dim = q.shape
    n_tables = (block_table is not None) + (cache_starts is not None)
    _check_cache(q, k, v, layout, n_tables, cache_offsets is not None)
    size = layout.k_size if cache_starts is not None else k.size(-2)
    if block_table is not None:
        size = block_table.size(-1) if block_table.dim() else 0
        block_table = _integers("block_table", block_table, (batch, beam, size), q.device)
    elif cache_offsets is not None:
        size = cache_offsets.size(-1) if cache_offsets.dim() else 0
    if cache_starts is not None:
        starts = (batch,) if cache_offsets is None else (batch, heads)
        cache_starts = _integers("cache_starts", cache_starts, starts, q.device)
        if k_lengths is None:
            raise ValueError("cache_starts needs k_lengths, which say how many positions follow; got None")
    if cache_offsets is not None:
        cache_offsets = _integers("cache_offsets", cache_offsets, (heads, size), q.device)
    k_size = min(size, layout.k_size)
    k_lengths = _checked_lengths("k_lengths", k_lengths, batch, k_size, q.device)
    scale = _check_scale(scale, dim)
    step = _one_integer("step", step, INTEGERS, q.device)
    on_host = not isinstance(step, Tensor) or not (step.is_cuda or torch.compiler.is_compiling())
    if on_host and not 0 <= step < layout.q_size:
        raise ValueError(f"step must lie in [0, {layout.q_size}), the rows of the layout, got {int(step)}")
    if not isinstance(step, Tensor):
        step = torch.full((1,), step, dtype=torch.int64, device=q.device)

    if not use_kernels(backend, q.dtype, dim, q.device):
        row = layout.keep_row(step, k_size, k_lengths)
        named = dict(block_table=block_table, cache_starts=cache_starts, cache_offsets=cache_offsets)
        return decode_reference(q, k, v, row, scale=scale, k_lengths=k_lengths, **named)

    from .ops import decode_step

    lists = layout.row_lists()
    tables = (k_lengths, block_table, cache_starts, cache_offsets)
    return decode_step(
        _rows(q), _rows(k), _rows(v), *lists, step, k_size, *tables, scale, layout.slope, layout.anchor, settled
    )


def append_to_pool(kv: Tensor, pool: Tensor, offsets: Tensor, step: Tensor) -> None:
    """Write the keys and values of one decode step into a pool as `decode_attention` reads it, by the kernel.

    kv: (N, 2, H, D), of N hypotheses; D contiguous.
    pool: (R, 2, D), changed in place.
    offsets: (H, S) int32 or int64: hypothesis n and head h are written to row offsets[h, step] + n.
    step: one-element int32 or int64 tensor on the device.

    Raises ValueError or TypeError for shapes, types, strides or devices that do not fit, and where the kernels cannot
    run. Values of the tables are not checked.
    """
    shapes = [tuple(x.shape) for x in (kv, pool, offsets)]
    n, _, heads, dim = shapes[0] if kv.dim() == 4 else (0, 0, 0, 0)
    if offsets.dim() != 2 or shapes != [(n, 2, heads, dim), (pool.size(0), 2, dim), (heads, offsets.size(1))]:
        raise ValueError(
            f"kv must be (N, 2, H, D), pool (R, 2, D) and offsets (H, S), got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    if kv.dtype != pool.dtype or offsets.dtype not in INTEGERS:
        raise TypeError(
            f"kv and pool must share one dtype, and offsets be int32 or int64, got {kv.dtype}, {pool.dtype} and "
            f"{offsets.dtype}"
        )
    if pool.stride(2) != 1 or offsets.stride(1) != 1 or not kv.device == pool.device == offsets.device == step.device:
        raise ValueError(
            f"rows of pool and offsets must be contiguous, got strides {pool.stride()} and {offsets.stride()}, and all "
            f"tensors on one device, got {kv.device}, {pool.device}, {offsets.device} and {step.device}"
        )
    _one_integer("step", step, INTEGERS, kv.device)
    use_kernels("triton", kv.dtype, dim, kv.device)
    from .ops import append_step

    append_step(_rows(kv), pool, offsets, step)


def advance_beams(state: BeamState, n: int, logits: Tensor, penalty: Tensor | None, eos: int, kernels: bool) -> None:
    """Choose how the first *n* sentences go on, and record it.

    Args:
        logits: (n * beam, V), of the next token.
        penalty: float32 (V,), added to log-probabilities. These count as -inf where they are NaN, as in fairseq. None:
            *logits* are float32 log-probabilities, penalized already.
        eos: the token that ends a hypothesis.
        kernels: whether the kernels do it, for beams that they take.
    """
    scores, k = state.scores[:n], 2 * state.beam
    size = beam_state.group_size(logits.size(1), 2)
    if kernels and state.beam <= beam_state.MAX_KERNEL_BEAM:
        from . import beam_search  # imports triton

        logits = logits.contiguous()
        maxima, lse = beam_search.largest_of_groups(logits, penalty, size)
        beam_search.choose(state, n, logits, penalty, lse, maxima, size, eos)
    else:
        log_probs = beam_state.penalized_log_probs(logits, penalty).view(n, state.beam, -1)
        if log_probs.is_cpu:
            beam_state.choose_on_host(state, n, *beam_state.best_on_host(log_probs, scores, k), eos)
        else:
            groups = beam_state.best_groups(log_probs.unflatten(2, (-1, size)).amax(-1), scores, k)
            beam_state.choose(state, n, *beam_state.best_continuations(log_probs, scores, groups, size), eos)
    state.step.add_(1)


def continue_beams(
    state: BeamState, n: int, sums: Tensor, parent: Tensor, token: Tensor, eos: int, kernels: bool
) -> None:
    """Go on with the first *n* sentences by given continuations, and record it.

    Args:
        sums: float32 (n, k), beam <= k <= 2 * beam.
        parent, token: int64 (n, k), the hypothesis that is continued, and by which token.
        eos, kernels: as in `advance_beams`.
    """
    if kernels and state.beam <= beam_state.MAX_KERNEL_BEAM:
        from . import beam_search  # imports triton

        beam_search.continue_by(state, n, sums.contiguous(), parent.contiguous(), token.contiguous(), eos)
    else:
        beam_state.choose(state, n, sums, parent, token, eos)
    state.step.add_(1)


def best_tokens(logits: Tensor, penalty: Tensor | None, k: int, kernels: bool) -> tuple[Tensor, Tensor]:
    """Return the *k* largest log-probabilities of each hypothesis, penalized, and their tokens: (N, k), best first.

    Args:
        logits, penalty, kernels: as in `advance_beams`.
    """
    size = beam_state.group_size(logits.size(1), k)
    if kernels:
        from . import beam_search  # imports triton

        logits = logits.contiguous()
        maxima, lse = beam_search.largest_of_groups(logits, penalty, size)
    else:
        logits, penalty = beam_state.penalized_log_probs(logits, penalty), None
        lse, maxima = logits.new_zeros(logits.size(0)), logits.unflatten(1, (-1, size)).amax(-1)
    return beam_state.best_of_groups(logits, penalty, lse, maxima, size, k)
