"""Dense model + batches -> :class:`~ap_fairseq.artifacts.AttentionStats`."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairseq.distributed import utils as distributed_utils
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

from ap_fairseq.artifacts import DIVERGED, NO_LENGTHS, AttentionStats
from ap_fairseq.files import UserError
from ap_fairseq.lengths import support_of
from ap_fairseq.relative import RelativeStats, scaled
from ap_fairseq.sites import AttentionKind, AttentionSite, attention_sites

INITIAL_LOSS_SCALE = 128.0  # as fairseq's training in half precision; halved when gradients overflow
SMALLEST_LOSS_SCALE = 2.0**-14


@dataclass
class _Attended:
    """One site in one forward pass."""

    output: Tensor  # (Tq, B, C), what the output projection got
    weights: Tensor | None = None  # (H, B, Tq, Tk)
    values: Tensor | None = None  # (Tk, B, H, D)


class AttentionRecorder:
    """Accumulates the attention of every site of a model, batch by batch.

    The recorder hooks the model's own attention modules: it asks them for per-head weights (which fairseq computes
    before dropout) and sums them over the batch in float64. Statistics are indexed by token position, so batches must
    be padded on the right; padded queries are left out, padded keys have probability 0.

    Use::

        with AttentionRecorder(model, max_positions=(1024, 1024)) as recorder:
            for sample in batches:
                recorder.begin(sample["net_input"]["src_tokens"], sample["net_input"]["prev_output_tokens"], pad)
                model(**sample["net_input"])
        stats = recorder.finish()

    With *importance* the model must run with gradients enabled, and ``recorder.add_importance(loss)`` must follow with
    its training loss. That adds, for each cell, how much the loss depends on the attention there: see
    :func:`squared_removal_effect`. Parameters get no gradients.

    Args:
        model: a fairseq transformer, language model or RoBERTa.
        max_positions: (source, target): cells at or beyond these positions are counted but not recorded.
        importance: also record what the loss depends on.
        slope: also sum cross-attention by offset from the diagonal of this slope (:mod:`ap_fairseq.relative`), over
            the sentences without positions beyond *max_positions*.
    """

    def __init__(
        self, model: nn.Module, max_positions: tuple[int, int], importance: bool = False, slope: int | None = None
    ):
        self.limit_source, self.limit_target = max_positions
        self.importance = importance
        self.slope = slope
        self.sites = list(attention_sites(model))
        self.lengths: collections.Counter[tuple[int, int]] = collections.Counter()  # of (target, source) lengths
        self._mass: dict[AttentionKind, Tensor] = {}
        self._end_mass: dict[AttentionKind, Tensor] = {}
        self._query_padding: dict[AttentionKind, Tensor] = {}
        self._last_source: Tensor | None = None
        self._importance: dict[AttentionKind, Tensor] = {}
        self._centre: Tensor | None = None  # int64 (B, T)
        self._within: Tensor | None = None  # bool (B, T), rows that are summed by offset
        self._relative: dict[str, Tensor] = {}  # mass and importance, float64 (layers, heads, offsets)
        self._attended: dict[AttentionSite, _Attended] = {}  # by the batch whose loss is awaited
        self._loss_scale = INITIAL_LOSS_SCALE
        self._hooks = []
        layers = {kind: sum(site.kind is kind for site, _ in self.sites) for kind in AttentionKind}
        for site, module in self.sites:
            if getattr(module, "use_xformers", False):
                raise UserError(f"{site.kind.value} layer {site.layer} uses xFormers attention, which has no weights")
            if site.kind not in self._mass:
                shape = (layers[site.kind], module.num_heads, *self._limits(site.kind))
                self._mass[site.kind] = torch.zeros(shape, dtype=torch.float64, device=module.out_proj.weight.device)
                if site.kind is not AttentionKind.DECODER_SELF:
                    self._end_mass[site.kind] = self._mass[site.kind].new_zeros(shape[:2])
                if importance:
                    self._importance[site.kind] = torch.zeros_like(self._mass[site.kind])
                if slope is not None and site.kind is AttentionKind.CROSS:
                    names = ("mass", "importance") if importance else ("mass",)
                    offsets = 2 * self.limit_source - 1
                    self._relative = {name: self._mass[site.kind].new_zeros(*shape[:2], offsets) for name in names}
            # Stock fairseq otherwise hands full-context attention to torch, which averages the heads away.
            module.skip_embed_dim_check = True
            self._hooks.append(module.register_forward_pre_hook(_ask_for_head_weights, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._hook(*site)))
            if importance:
                self._hooks += self._watch(site, module)

    def _limits(self, kind: AttentionKind) -> tuple[int, int]:
        queries = self.limit_source if kind is AttentionKind.ENCODER_SELF else self.limit_target
        keys = self.limit_target if kind is AttentionKind.DECODER_SELF else self.limit_source
        return queries, keys

    def __enter__(self) -> AttentionRecorder:
        return self

    def __exit__(self, *exc_info) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def begin(self, src_tokens: Tensor, prev_output_tokens: Tensor, pad: int) -> None:
        """Announce the batch that the next forward pass will see.

        Args:
            src_tokens: (B, S) source tokens, padded on the right with *pad*.
            prev_output_tokens: (B, T) decoder input, padded on the right with *pad*; in a model of encoder or decoder
                alone, the same tokens.
        """
        source_padding, target_padding = src_tokens.eq(pad), prev_output_tokens.eq(pad)
        for side, padding in (("source", source_padding), ("target", target_padding)):
            if bool((padding[:, :-1] & ~padding[:, 1:]).any()):
                raise ValueError(f"the {side} batch is padded on the left; attention is recorded by token position")
        self._query_padding = {
            AttentionKind.ENCODER_SELF: source_padding,
            AttentionKind.DECODER_SELF: target_padding,
            AttentionKind.CROSS: target_padding,
        }
        source_lengths, target_lengths = (~source_padding).sum(1), (~target_padding).sum(1)
        self._last_source = source_lengths - 1
        if self._relative:
            rows = torch.arange(prev_output_tokens.size(1), device=prev_output_tokens.device)
            self._centre = torch.minimum(scaled(self.slope, rows), self._last_source[:, None])
            inside = (source_lengths <= self.limit_source) & (target_lengths <= self.limit_target)
            self._within = ~target_padding & inside[:, None]
        self.lengths.update(zip(target_lengths.tolist(), source_lengths.tolist(), strict=True))

    def _hook(self, kind: AttentionKind, layer: int):
        def accumulate(module, args, output):
            weights = output[1].detach()  # (H, B, Tq, Tk) float32, before dropout
            n_queries, n_keys = self._add(self._mass[kind][layer], kind, weights)
            if kind is AttentionKind.CROSS and self._relative:
                self._add_by_offset(self._relative["mass"][layer], weights)
            if kind in self._end_mass:
                last = self._last_source.view(1, -1, 1, 1).expand(*weights.shape[:3], 1)
                on_end = weights.gather(3, last).squeeze(3).masked_fill(self._query_padding[kind], 0)  # (H, B, Tq)
                on_end = on_end.masked_fill((self._last_source >= n_keys)[:, None], 0)
                self._end_mass[kind][layer] += on_end[:, :, :n_queries].sum((1, 2), dtype=torch.float64)

        return accumulate

    def _add(self, total: Tensor, kind: AttentionKind, cells: Tensor) -> tuple[int, int]:
        """Add *cells* (H, B, Tq, Tk) of real queries to *total* (H, Tq, Tk); return how far they were recorded."""
        padding = self._query_padding[kind]  # (B, Tq)
        recorded = cells.masked_fill(padding[None, :, :, None], 0).sum(1, dtype=torch.float64)
        n_queries, n_keys = (min(a, b) for a, b in zip(recorded.shape[1:], total.shape[1:], strict=True))
        total[:, :n_queries, :n_keys] += recorded[:, :n_queries, :n_keys]
        return n_queries, n_keys

    def _add_by_offset(self, total: Tensor, cells: Tensor) -> None:
        """Add *cells* (H, B, Tq, Tk) to *total* (H, 2 S - 1) of their offsets."""
        n_keys = min(cells.size(3), self.limit_source)  # longer sentences are not summed
        sums = sum_by_offset(cells[..., :n_keys], self._centre, self._within)
        margin = (total.size(1) - sums.size(1)) // 2
        total[:, margin : margin + sums.size(1)] += sums

    # -- importance ---------------------------------------------------------------------------------------------------

    def _watch(self, site: AttentionSite, module: MultiheadAttention) -> list:
        """Hook *module* so that a forward pass leaves what :meth:`add_importance` needs of *site*."""

        def require_gradient(projection, args):
            (output,) = args
            if not output.requires_grad:  # the first attention of a model whose parameters are frozen
                output = output.detach().requires_grad_()
            self._attended[site] = _Attended(output)
            return (output,)

        def keep(module, args, kwargs, output):
            # Not every path of every module calls v_proj, so the values are computed again.
            values = F.linear(kwargs["value"], module.v_proj.weight, module.v_proj.bias).detach()
            attended = self._attended[site]
            attended.weights, attended.values = output[1].detach(), values.unflatten(2, (module.num_heads, -1))

        return [
            module.out_proj.register_forward_pre_hook(require_gradient),
            module.register_forward_hook(keep, with_kwargs=True),
        ]

    def record(self, model: nn.Module, criterion: nn.Module, sample: dict[str, Any], pad: int) -> dict[str, Any]:
        """Record a batch of fairseq's, with importance if that is recorded; return what the criterion logs."""
        source = sample["net_input"]["src_tokens"]
        self.begin(source, sample["net_input"].get("prev_output_tokens", source), pad)
        with torch.set_grad_enabled(self.importance):
            loss, _, logging_output = criterion(model, sample)
            if self.importance:
                self.add_importance(loss)
        return logging_output

    def add_importance(self, loss: Tensor) -> None:
        """Add what *loss* depends on, after the forward pass that gave it.

        Args:
            loss: scalar, summed over sentences (not averaged), so that a batch counts as its sentences would alone.

        Raises:
            UserError: if the gradients are not finite at any scale of the loss.
        """
        attended, self._attended = self._attended, {}
        gradients = self._gradients(loss, [site.output for site in attended.values()])
        for ((kind, layer), site), gradient in zip(attended.items(), gradients, strict=True):
            output_gradient = gradient.unflatten(2, site.values.shape[2:])
            weights_gradient = torch.einsum("qbhd,kbhd->hbqk", output_gradient, site.values.to(gradient.dtype))
            effect = squared_removal_effect(site.weights, weights_gradient)
            self._add(self._importance[kind][layer], kind, effect)
            if kind is AttentionKind.CROSS and self._relative:
                self._add_by_offset(self._relative["importance"][layer], effect)

    def _gradients(self, loss: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        """Return d loss / d output, at least float32: the loss is scaled so that half precision can hold them."""
        while True:
            # The graph is kept for another try, and goes with the loss.
            # Without cross-attention the loss does not depend on the encoder: its gradients are 0.
            gradients = torch.autograd.grad(
                loss * self._loss_scale, outputs, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            if all(bool(gradient.isfinite().all()) for gradient in gradients):
                break
            self._loss_scale /= 2
            if self._loss_scale < SMALLEST_LOSS_SCALE:
                raise UserError(
                    f"the gradients of a loss of {loss.item()} are not finite, even of {SMALLEST_LOSS_SCALE} of it: "
                    f"{DIVERGED}"
                )
        wide = [g if g.dtype is torch.float64 else g.float() for g in gradients]
        return [gradient / self._loss_scale for gradient in wide]

    def finish(
        self, group: dist.ProcessGroup | None = None, validation_lengths: np.ndarray | None = None, **metadata
    ) -> AttentionStats:
        """Return the statistics of all batches (of all ranks of *group*), cut to the longest recorded positions.

        Args:
            group: process group to sum over; None for a single process.
            validation_lengths: int64 (n, 3), to store with the statistics.
            metadata: provenance, likewise.

        Raises:
            UserError: if no sentence was recorded.
            ArtifactError: if a probability or an importance is not finite.
        """
        lengths = self._sum_over(group)
        if not len(lengths):
            raise UserError("no sentence was recorded; the subset is empty or every sentence was skipped")
        full = {kind: support_of(kind, lengths) for kind in self._mass}
        cut = {kind: tuple(map(min, n.shape, self._limits(kind))) for kind, n in full.items()}
        support = {kind: n[: cut[kind][0], : cut[kind][1]] for kind, n in full.items()}

        def recorded(cells: dict[AttentionKind, Tensor]) -> dict[AttentionKind, np.ndarray]:
            return {kind: x[:, :, : cut[kind][0], : cut[kind][1]].cpu().numpy() for kind, x in cells.items()}

        metadata = {
            **metadata,
            "sentences": int(lengths[:, 2].sum()),
            "pairs_beyond_range": {kind.value: int(n.sum() - support[kind].sum()) for kind, n in full.items()},
            "pairs_recorded": {kind.value: int(n.sum()) for kind, n in support.items()},
        }
        return AttentionStats(
            recorded(self._mass),
            support,
            metadata,
            end_mass={kind: total.cpu().numpy() for kind, total in self._end_mass.items()},
            importance=recorded(self._importance),
            lengths=lengths,
            relative=self._relative_stats(lengths),
            validation_lengths=NO_LENGTHS if validation_lengths is None else validation_lengths,
        )

    def _relative_stats(self, lengths: np.ndarray) -> RelativeStats | None:
        """Return cross-attention by offset, cut to the longest source that was summed."""
        sources = lengths[(lengths[:, :2] <= (self.limit_target, self.limit_source)).all(1), 1]
        if not self._relative or not len(sources):
            return None
        margin = self.limit_source - int(sources.max())
        cut = {name: x[..., margin : x.size(2) - margin].cpu().numpy() for name, x in self._relative.items()}
        return RelativeStats(self.slope, **cut)

    def _sum_over(self, group: dist.ProcessGroup | None) -> np.ndarray:
        """Add up the accumulators of all ranks in place, and return the lengths of all sentences, int64 (n, 3)."""
        if group is not None:
            totals = self._mass, self._end_mass, self._importance, self._relative
            for total in (tensor for part in totals for tensor in part.values()):
                dist.all_reduce(total, group=group)
        lengths = sum(gathered(self.lengths, group), collections.Counter())
        return np.array([(*pair, count) for pair, count in sorted(lengths.items())], dtype=np.int64)


def data_parallel_group() -> dist.ProcessGroup | None:
    """Return the group of the ranks that share the data, None for a single process."""
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    return distributed_utils.get_data_parallel_group() if distributed else None


def gathered(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Return *value* of each rank of *group*; without a group, of this process."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def squared_removal_effect(weights: Tensor, gradient: Tensor) -> Tensor:
    """Estimate for each cell the squared change of the loss if the cell were pruned.

    To first order, setting a_j to 0 changes the loss by -a_j dL/da_j (the Taylor criterion of Molchanov et al. 2017,
    arXiv 1611.06440; Michel et al. 2019, arXiv 1905.10650, rank whole heads so). Summed with their signs, the changes
    cancel in a converged model; their squares add up over sentences (Molchanov et al. 2019, arXiv 1906.10771), and a
    few sentences that need the cell count more than many that hardly do.

    Args:
        weights: (..., Tk) attention probabilities a, 0 for what is masked.
        gradient: (..., Tk) derivative of the loss by each of them.

    Returns:
        (..., Tk) in squared units of the loss.
    """
    return (weights * gradient).square()


def sum_by_offset(cells: Tensor, centre: Tensor, rows: Tensor) -> Tensor:
    """Sum cells by their offset from the centre of their row, always in the same order.

    Args:
        cells: (H, B, Tq, Tk), 0 beyond the source.
        centre: int64 (B, Tq).
        rows: bool (B, Tq), True = summed.

    Returns:
        float64 (H, 2 Tk - 1), offsets -(Tk - 1) to Tk - 1.
    """
    n_keys = cells.size(3)
    offsets = torch.arange(1 - n_keys, n_keys, device=cells.device)
    key = centre[..., None] + offsets  # (B, Tq, 2 Tk - 1)
    outside = (key < 0) | (key >= n_keys) | ~rows[..., None]
    aligned = cells.gather(3, key.clamp(0, n_keys - 1).expand(len(cells), -1, -1, -1))
    return aligned.masked_fill(outside, 0).sum((1, 2), dtype=torch.float64)


def _ask_for_head_weights(module, args, kwargs):
    return args, {**kwargs, "need_weights": True, "need_head_weights": True}
