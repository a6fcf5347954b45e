"""Seeded inputs and the float64 error budget, for tests and benchmarks."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import config
from .api import block_sparse_attention
from .layout import AttentionLayout, Layout
from .offsets import SLOPE_BITS, OffsetLayout
from .reference import attention_reference, decode_reference, dropout_keep, linear_rows_reference, visible_cells

# Roundings, in units of machine epsilon, that the kernels may add to the error of the reference. Half precision: P
# (or dS) and the output, half an epsilon each. float32: products of three tf32 terms keep 22 bits of each factor
# and drop the product of the low parts, 3 · 2^-22 in all, on top of the output's rounding.
ROUNDING_BAND = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 6.5}

# Kernels in Gluon, and the sizes of heads that each takes.
HOPPER_KERNELS = {
    "_hopper_forward_kernel": config.HOPPER_FORWARD,
    "_hopper_dq_kernel": config.HOPPER_DQ,
    "_hopper_dkdv_kernel": config.HOPPER_DKDV,
}


def block_mask(
    heads: int,
    q_size: int,
    k_size: int,
    block: int | tuple[int, int],
    sparsity: float,
    seed: int,
    device="cpu",
    diagonal: bool = True,
) -> Tensor:
    """A random keep mask (heads, q_size, k_size) of blocks whose expected sparsity is as asked.

    block: its size, or queries and keys. With `diagonal` the blocks on the diagonal are always kept, and the others
    correspondingly less often.
    """
    rows, cols = (block, block) if isinstance(block, int) else block
    generator = torch.Generator().manual_seed(seed)
    n_q, n_k = -(-q_size // rows), -(-k_size // cols)
    kept = (1.0 - sparsity) * n_q * n_k
    first_q, first_k = torch.arange(n_q)[:, None] * rows, torch.arange(n_k) * cols
    always = (first_q < first_k + cols) & (first_k < first_q + rows) & diagonal
    rest = always.numel() - int(always.sum())
    chance = min(1.0, max(0.0, (kept - int(always.sum())) / rest)) if rest else 1.0
    blocks = (torch.rand(heads, n_q, n_k, generator=generator) < chance) | always
    mask = blocks.to(device).repeat_interleave(rows, 1)[:, :q_size]
    return mask.repeat_interleave(cols, 2)[:, :, :k_size]


def random_offsets(heads: int, k_size: int, device="cpu") -> OffsetLayout:
    """A tenth of the offsets of sentences of `k_size` keys, and the diagonal, whose slope is 0.9."""
    keep = torch.rand(heads, 2 * k_size - 1, generator=torch.Generator().manual_seed(1)) < 0.1
    keep[:, k_size - 1] = True
    anchor = torch.zeros(heads, dtype=torch.int64)
    return OffsetLayout.from_offsets(keep, round(0.9 * (1 << SLOPE_BITS)), anchor, k_size).to(device)


@dataclass
class Case:
    """One attention problem, inputs included. Padded positions of q, k, v and the gradient hold NaN.

    keep: as in `reference.visible_cells`.
    offsets: what the kernels read of it where it is one of offsets; else they read a layout made with `tile`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None = None
    q_lengths: Tensor | None = None
    k_lengths: Tensor | None = None
    causal: bool = False
    dropout_p: float = 0.0
    seed: int = 0
    scale: float = 1.0
    tile: int | tuple[int, int] | None = None
    offsets: OffsetLayout | None = None
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        self.layout = self.offsets or AttentionLayout.from_keep_mask(self.keep, tile=self.tile)

    def to(self, device: torch.device | str) -> Case:
        """Return this problem on *device*: nothing is computed there, and strides stay."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (Tensor, Layout)):
                setattr(moved, name, value.to(device))
        return moved

    def options(self) -> dict:
        return dict(
            q_lengths=self.q_lengths,
            k_lengths=self.k_lengths,
            causal=self.causal,
            dropout_p=self.dropout_p,
            seed=self.seed,
            scale=self.scale,
        )


def make_case(
    *,
    batch: int,
    heads: int,
    q_size: int,
    k_size: int,
    dim: int,
    dtype: torch.dtype,
    keep: Tensor,
    seed: int = 0,
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    time_first: bool = True,
    gap: int = 0,
    use_lse: bool = False,
    device="cpu",
    **options,
) -> Case:
    """Normal inputs, padded with NaN: (B, H, T, D) views of time-first tensors or of tensors in that order.

    gap: elements between the end of a row and the next.
    """
    generator = torch.Generator().manual_seed(seed)

    def tensor(size: int, lengths: Tensor | None) -> Tensor:
        shape = (size, batch, heads, dim + gap) if time_first else (batch, heads, size, dim + gap)
        # Cut last: what is converted has no gaps any more.
        x = torch.randn(shape, generator=generator).to(device=device, dtype=dtype)[..., :dim]
        x = x.permute(1, 2, 0, 3) if time_first else x
        if lengths is not None:
            x.masked_fill_((torch.arange(size, device=device) >= lengths[:, None])[:, None, :, None], torch.nan)
        return x

    q_lengths = None if q_lengths is None else q_lengths.to(device)
    k_lengths = None if k_lengths is None else k_lengths.to(device)
    grad_lse = torch.randn(batch, heads, q_size, generator=generator).to(device) if use_lse else None
    return Case(
        tensor(q_size, q_lengths),
        tensor(k_size, k_lengths),
        tensor(k_size, k_lengths),
        keep.to(device),
        tensor(q_size, q_lengths),
        grad_lse,
        q_lengths,
        k_lengths,
        seed=seed,
        **options,
    )


def _clean(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x without its poison, for gradients: reference code multiplies padded rows by 0."""
    return x if lengths is None else torch.nan_to_num(x)


def run_reference(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv of the definition computed in `dtype`."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (case.q, case.k, case.v))
    keep = case.keep[..., : q.size(2), : k.size(2)]
    out, lse, _ = attention_reference(q, k, v, keep, **case.options())
    outputs, grads = [out], [_clean(case.grad_out, case.q_lengths).to(dtype)]
    if case.grad_lse is not None:
        outputs.append(torch.where(lse.isfinite(), lse, 0.0))
        grads.append(case.grad_lse.to(lse.dtype))
    dq, dk, dv = torch.autograd.grad(outputs, (q, k, v), grads)
    return dict(out=out.detach(), lse=lse.detach(), dq=dq, dk=dk, dv=dv)


def run_kernels(case: Case) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv of the Triton back end."""
    q, k, v = (x.detach().requires_grad_() for x in (case.q, case.k, case.v))
    out, lse = block_sparse_attention(q, k, v, case.layout, backend="triton", return_lse=True, **case.options())
    outputs, grads = [out], [case.grad_out]
    if case.grad_lse is not None:
        outputs.append(lse)
        grads.append(case.grad_lse)
    dq, dk, dv = torch.autograd.grad(outputs, (q, k, v), grads)
    return dict(out=out.detach(), lse=lse.detach(), dq=dq, dk=dk, dv=dv)


def rounding_scale(case: Case) -> dict[str, float]:
    """Norm of each result when every term of its sums is replaced by the root of the sum of squared terms.

    Independent roundings add up in that way (Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019), also where the
    terms themselves cancel.
    """
    q, k, v, g = (torch.nan_to_num(x.double()) for x in (case.q, case.k, case.v, case.grad_out))
    batch, heads, q_size = q.shape[:3]
    keep = case.keep[..., :q_size, : k.size(2)]
    cells = visible_cells(keep, case.q_lengths, case.k_lengths, case.causal)
    scores = (q @ k.transpose(-1, -2) * case.scale).masked_fill(~cells, -torch.inf)
    p = torch.nan_to_num(torch.softmax(scores, -1))
    z = torch.ones_like(p)
    if case.dropout_p > 0:
        bits = dropout_keep(case.seed, batch * heads, q_size, k.size(2), case.dropout_p, q.device)
        z = bits.view_as(p).double() / (1 - case.dropout_p)
    dp = z * (g @ v.transpose(-1, -2))
    delta = (p * dp).sum(-1, keepdim=True)
    # δ = O · dO carries the rounding of O; dP and dlse are float32, whose rounding matters in float32 alone.
    delta_terms = ((z * p @ v).square() * g.square()).sum(-1, keepdim=True).sqrt()
    grad_lse = torch.zeros_like(delta) if case.grad_lse is None else case.grad_lse.double()[..., None]
    ds = (dp - delta + grad_lse).abs() + delta_terms
    if case.q.dtype == torch.float32:
        ds = ds + dp.abs() + grad_lse.abs()
    ds = case.scale * p * ds

    def norm(a: Tensor, b: Tensor) -> float:
        return float((a.square() @ b.square()).sqrt().norm())

    return dict(
        out=norm(z * p, v),
        dq=norm(ds, k),
        dk=norm(ds.transpose(-1, -2), q),
        dv=norm((z * p).transpose(-1, -2), g),
        lse=float(torch.where(cells.any(-1), torch.logsumexp(scores, -1).abs() + 1, 0.0).norm()),
    )


def error_report(case: Case, device: torch.device | str | None = None) -> dict[str, dict[str, float]]:
    """For out, lse, dq, dk and dv: error of the kernels against float64, and the most it may be.

    The allowance is the error of the reference in the same type plus ROUNDING_BAND epsilons of
    `rounding_scale`. Both are relative to the norm of the float64 result. lse is float32 in every type.

    device: where the kernels run; None: where the case is, as all the rest does.
    """
    exact = run_reference(case, torch.float64)
    low = run_reference(case, case.q.dtype)
    got = run_kernels(case if device is None else case.to(device))
    got = {name: x.to(case.q.device) for name, x in got.items()}
    scales = rounding_scale(case)
    report = {}
    for name, reference in exact.items():
        if name == "lse":
            same = torch.isneginf(reference) == torch.isneginf(got[name])
            if not bool(same.all()):
                report[name] = dict(error=float("inf"), allowed=0.0)
                continue
            reference, low[name], got[name] = (
                x.double().masked_fill(torch.isneginf(x), 0.0) for x in (reference, low[name], got[name])
            )
        epsilon = torch.finfo(torch.float32 if name == "lse" else case.q.dtype).eps
        band = ROUNDING_BAND[torch.float32 if name == "lse" else case.q.dtype] * epsilon * scales[name]
        norm = float(reference.norm()) or 1.0
        error = float((got[name].double() - reference).norm())
        reference_error = float((low[name].double() - reference).norm())
        report[name] = dict(error=error / norm, allowed=(reference_error + band) / norm)
    return report


def assert_within_budget(case: Case, device: torch.device | str | None = None) -> None:
    """Raise AssertionError that names every result outside the budget (NaN is outside).

    device: as in `error_report`.
    """
    report = error_report(case, device)
    wrong = {name: row for name, row in report.items() if not row["error"] <= row["allowed"]}
    if wrong:
        raise AssertionError(f"outside the float64 error budget: {wrong}")


def _assert_near(name: str, got: Tensor, low: Tensor, exact: Tensor) -> None:
    """Raise AssertionError unless *got* is as near to float64 as *low*, the reference in a type, plus the band."""
    error, reference_error = (float((x.double() - exact).norm()) for x in (got, low))
    band = ROUNDING_BAND[low.dtype] * torch.finfo(low.dtype).eps * float(exact.norm())
    if not error <= reference_error + band:
        raise AssertionError(f"{name} not within the float64 budget: {error} > {reference_error} + {band}")


def assert_decode_within_budget(got: Tensor, q: Tensor, k: Tensor, v: Tensor, keep_row: Tensor, **options) -> None:
    """Raise AssertionError unless *got* is as near to float64 as the reference in the same type, plus the band.

    Args:
        got: what the kernel gave for the other arguments, which are those of `reference.decode_reference`.
    """
    exact = decode_reference(q.double(), k.double(), v.double(), keep_row, **options)
    low = decode_reference(q, k, v, keep_row, **options)
    _assert_near("decode is", got, low, exact)


def assert_linear_rows_within_budget(got: tuple[Tensor, Tensor], x: Tensor, weight: Tensor, **options) -> None:
    """Raise AssertionError unless both results are as near to float64 as the reference in the same type, plus the band.

    Args:
        got: what the kernel gave for the other arguments, which are those of `reference.linear_rows_reference`.
    """

    def wide(value):
        if isinstance(value, tuple):
            return tuple(map(wide, value))
        return value.double() if isinstance(value, Tensor) else value

    exact = linear_rows_reference(x.double(), weight.double(), **{name: wide(value) for name, value in options.items()})
    low = linear_rows_reference(x, weight, **options)
    for name, *results in zip(("products are", "normalised rows are"), got, low, exact, strict=True):
        _assert_near(name, *results)
