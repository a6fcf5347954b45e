"""Attention that computes only the cells its pruning mask keeps."""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from fairseq.modules import MultiheadAttention
from torch import Tensor

from ap_fairseq.artifacts import grown
from ap_fairseq.files import ArtifactError, UserError
from ap_fairseq.model.cpu_linear import PackedLinear
from ap_fairseq.model.dynamic import DynamicPruning
from ap_fairseq.model.kv_cache import (
    CrossAttentionCache,
    HostCache,
    PagedCache,
    SelfAttentionCache,
    step_limit,
    stored_columns,
)
from ap_fairseq.sites import AttentionKind
from triton_ops import AttentionLayout, Layout, OffsetLayout, block_sparse_attention, use_kernels
from triton_ops.api import HEAD_SIZES
from triton_ops.dense import attend_dense
from triton_ops.layout import unpack_cells
from triton_ops.reference import visible_cells

OFFSET_BUFFERS = ("offset_words", "offset_geometry", "offset_anchor")
MASK_BUFFERS = ("keep_words", "extrapolation_words", "mask_range", *OFFSET_BUFFERS)

# Of masks of one cell and what extends it, as all-ones masks are: built, and their tables, once for all modules.
_shared_layouts: WeakValueDictionary[tuple, AttentionLayout] = WeakValueDictionary()


class NotScriptable:
    """A module that ``torch.jit.script`` refuses with one clear error: kernels and caches are Python."""

    def __prepare_scriptable__(self):
        raise UserError(
            "pruned_transformer cannot be compiled with TorchScript; translate with fairseq-generate or the hub "
            "interface, and script the dense checkpoint instead"
        )


class PrunedMultiheadAttention(NotScriptable, MultiheadAttention):
    """fairseq's multi-head attention under a global mask per head.

    Parameters and their names are those of the stock module. The mask is stored in persistent buffers, so checkpoints
    are self-contained:

    - ``keep_words`` int64 (heads, Tq, ceil(Tk / 32)) and ``extrapolation_words`` int64 (heads,
      ceil((Tq + Tk - 1) / 32)): 32 cells to a word, bit set = kept (see :func:`ap_fairseq.artifacts.pack_cells`);
    - ``mask_range`` int64 (2,): Tq, Tk. Before a mask is set all three are empty, and a forward pass is an error;
    - ``offset_words`` int64 (heads, ceil(O / 32)), ``offset_geometry`` int64 (2,): the slope, and the number O of
      offsets, and ``offset_anchor`` int64 (heads,). With them cross-attention is under a mask relative to a scaled
      diagonal (:mod:`ap_fairseq.relative`), and the others keep everything. Empty for other masks.

    Args:
        embed_dim, num_heads: as in fairseq.
        kind: the attention kind, which decides causality and where keys come from.
        backend: ``triton`` (block-sparse kernels), ``sdpa`` (torch's attention under a dense mask, any device) or
            ``auto``, which takes the kernels for half and single precision on a GPU and else sdpa. ``triton`` raises
            UserError where the kernels cannot run.
        dynamic: pruning per sentence, on top of the mask; not with ``triton``.
        max_steps: of decoding, at most. The caches drop what no mask row below keeps; None: unknown, so they keep all.
            A search that knows better says so (see :func:`ap_fairseq.model.kv_cache.limit_steps`).

    Attributes:
        selected: bool (B, heads, S), the source tokens of a batch that heads may attend to within the mask, True =
            visible; None: all (see :mod:`ap_fairseq.model.head_masking`).
        built_layout: the layout that passes read now, if any; a graph that holds its address must keep it alive.

    Raises:
        UserError: for options that have no meaning under a mask (quant-noise, xFormers, bias_kv, zero_attn), or a
            head size that ``triton`` does not support.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kind: AttentionKind,
        backend: str = "auto",
        dynamic: DynamicPruning | None = None,
        max_steps: int | None = None,
        **kwargs,
    ):
        unsupported = {
            "q_noise": "--quant-noise-pq",
            "xformers_att_config": "--encoder-xformers-att-config/--decoder-xformers-att-config",
            "add_bias_kv": "add_bias_kv",
            "add_zero_attn": "add_zero_attn",
        }
        for name, option in unsupported.items():
            if kwargs.get(name):
                raise UserError(f"{option} is set ({name}={kwargs[name]!r}); pruned attention does not support it")
        if backend == "triton" and embed_dim // num_heads not in HEAD_SIZES:
            raise UserError(
                f"--attention-backend triton: heads of {embed_dim} / {num_heads} = {embed_dim // num_heads} elements; "
                f"the kernels take {', '.join(map(str, HEAD_SIZES))}; choose another number of heads, or sdpa"
            )
        if dynamic is not None and backend == "triton":
            raise UserError(
                "--attention-backend triton with --attention-top-k or --attention-threshold: these need all scores, "
                "which the kernels never form; use sdpa"
            )
        super().__init__(
            embed_dim,
            num_heads,
            self_attention=kind is not AttentionKind.CROSS,
            encoder_decoder_attention=kind is AttentionKind.CROSS,
            **kwargs,
        )
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            projection.__class__ = PackedLinear
        self.kind = kind
        self.backend = backend
        self.dynamic = dynamic
        self.max_steps = max_steps
        # The name that --retain-dropout-modules knows.
        self.dropout_module.module_name = MultiheadAttention.__name__
        self.register_buffer("keep_words", torch.zeros(num_heads, 0, 0, dtype=torch.int64))
        self.register_buffer("extrapolation_words", torch.zeros(num_heads, 0, dtype=torch.int64))
        self.register_buffer("mask_range", torch.zeros(2, dtype=torch.int64))
        for name, value in no_offsets(num_heads).items():
            self.register_buffer(name, value)
        self.mask_is_explicit = False
        self.selected: Tensor | None = None
        self.built_layout: Layout | None = None

    # -- the mask -----------------------------------------------------------------------------------------------------

    def set_mask(
        self,
        keep_words: Tensor,
        extrapolation_words: Tensor,
        mask_range: Tensor,
        offset_words: Tensor | None = None,
        offset_geometry: Tensor | None = None,
        offset_anchor: Tensor | None = None,
    ) -> None:
        """Take a packed mask (shapes as the buffers). A checkpoint loaded afterwards does not replace it."""
        buffers = no_offsets(self.num_heads)
        buffers |= {"keep_words": keep_words, "extrapolation_words": extrapolation_words, "mask_range": mask_range}
        if offset_words is not None:
            buffers |= zip(OFFSET_BUFFERS, (offset_words, offset_geometry, offset_anchor), strict=True)
        for name, value in buffers.items():
            setattr(self, name, value.to(self.out_proj.weight.device))
        self.mask_is_explicit = True
        self.built_layout = None

    @property
    def is_relative(self) -> bool:
        """Whether the mask is relative to a scaled diagonal."""
        return self.offset_geometry.numel() > 0

    def _load_from_state_dict(self, state_dict, prefix, *args):
        words = state_dict.get(prefix + "keep_words")
        if words is not None and not self.mask_is_explicit and words.shape[:1] != (self.num_heads,):
            raise ArtifactError(
                f"{prefix}keep_words has shape {tuple(words.shape)}, the mask of that many heads, but the model has "
                f"{self.num_heads} heads there; give it the attention heads that the checkpoint was trained with "
                "(--model-overrides changes them, too)"
            )
        for name in MASK_BUFFERS:
            key = prefix + name
            if self.mask_is_explicit or key not in state_dict:  # a dense checkpoint, or an explicit mask that wins
                state_dict[key] = getattr(self, name)
            else:
                setattr(self, name, torch.empty_like(state_dict[key], device=getattr(self, name).device))
        self.built_layout = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def keep_mask(self, n_queries: int, n_keys: int) -> Tensor:
        """Return the keep mask, bool (heads, n_queries, n_keys), True = kept; the diagonal pattern beyond its range.

        Of a relative mask (1, heads, n_queries, n_keys), for a source of *n_keys* tokens.
        """
        return self.layout(n_queries, n_keys).keep_mask(n_queries, n_keys)

    @torch.inference_mode(False)  # what is kept may be needed for training later
    def layout(self, n_queries: int, n_keys: int) -> Layout:
        """Return the mask as attention reads it: at least (n_queries, n_keys), built once and kept."""
        layout = self.built_layout
        if layout is None or layout.device != self.keep_words.device:
            layout = self.built_layout = self._build_layout(n_queries, n_keys)
        elif layout.q_size < n_queries or layout.k_size < n_keys:  # either side only grows
            size = max(layout.q_size, n_queries), max(layout.k_size, n_keys)
            layout = self.built_layout = self._build_layout(*size)
        return layout

    def _build_layout(self, n_queries: int, n_keys: int) -> Layout:
        if not self.is_relative:
            if self.mask_range.tolist() == [1, 1]:
                return self._shared_layout(_doubled(n_queries), _doubled(n_keys))
            return AttentionLayout.from_keep_mask(self._unpack(n_queries, n_keys))
        slope, n_offsets = self.offset_geometry.tolist()
        n_keys = max(n_offsets // 2 + 1, _doubled(n_keys))
        return OffsetLayout.from_offsets(unpack_cells(self.offset_words, n_offsets), slope, self.offset_anchor, n_keys)

    def _shared_layout(self, n_queries: int, n_keys: int) -> AttentionLayout:
        words = torch.cat((self.keep_words.flatten(), self.extrapolation_words.flatten()))
        key = self.kind, words.device, n_queries, n_keys, *words.tolist()
        layout = _shared_layouts.get(key)
        if layout is None:
            layout = _shared_layouts[key] = AttentionLayout.from_keep_mask(self._unpack(n_queries, n_keys))
        return layout

    def last_use(self, n_rows: int, n_keys: int) -> Tensor:
        """Return the last of the first *n_rows* mask rows that keeps each column, int64 (heads, n_keys); or -1.

        Under a relative mask that is always the last row: what rows keep depends on the sentence.
        """
        if self.is_relative:
            return self.offset_words.new_full((self.num_heads, n_keys), n_rows - 1)
        return self.layout(n_rows, n_keys).last_use(n_rows)[:, :n_keys]

    def _unpack(self, n_queries: int, n_keys: int) -> Tensor:
        recorded_queries, recorded_keys = self.mask_range.tolist()
        if recorded_queries == 0:
            raise ArtifactError(
                f"this pruned_transformer has no masks for its {self.kind.value} attention: start training with "
                "--attention-masks FILE, or load a checkpoint that was trained with it"
            )
        keep = unpack_cells(self.keep_words, recorded_keys)
        if n_queries <= recorded_queries and n_keys <= recorded_keys:
            return keep
        pattern = unpack_cells(self.extrapolation_words, recorded_queries + recorded_keys - 1)
        n_queries, n_keys = max(recorded_queries, _doubled(n_queries)), max(recorded_keys, _doubled(n_keys))
        cells = grown(keep.cpu().numpy(), pattern.cpu().numpy(), self.kind, (n_queries, n_keys))
        return torch.from_numpy(cells).to(keep.device)

    # -- attention ----------------------------------------------------------------------------------------------------

    def split_heads(self, x: Tensor) -> Tensor:
        """(T, B, H*D) -> (B, H, T, D), a view."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        incremental_state: dict | None = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as fairseq's module does, within the mask.

        Args:
            query: (Tq, B, C); one token with *incremental_state*.
            key: (Tk, B, C) encoder output for cross-attention; ignored in self-attention.
            value: ignored: it is the key.
            key_padding_mask: (B, Tk), True = padded. Padding must be on the right: masks count tokens from column 0.
            attn_mask: decoder self-attention passes its causal mask; only its presence is read.
            need_weights, need_head_weights: return attention probabilities, averaged over heads or not.

        Returns:
            Output (Tq, B, C), in which padded queries of self-attention are 0 before the output projection, and
            weights: None, (B, Tq, Tk), or (H, B, Tq, Tk).

        Raises:
            ArtifactError: if no mask was set.
            ValueError: for full-context decoder self-attention, *before_softmax* or an encoder *attn_mask*.
        """
        if before_softmax:
            raise ValueError("before_softmax: pruned attention has no raw scores for pruned cells")
        expects_causal_mask = self.kind.causal and incremental_state is None
        if (attn_mask is not None) != expects_causal_mask:
            raise ValueError(
                f"{self.kind.value} attention {'needs' if expects_causal_mask else 'does not take'} an attn_mask: its "
                "pruning mask is defined for the order of attention that was recorded"
            )
        want_weights = need_weights or need_head_weights
        if incremental_state is not None:
            output, weights = self._decode(query[0], key, key_padding_mask, incremental_state, want_weights)
        else:
            if self.self_attention and not query.is_cpu:
                q, k, v = F.linear(query, *self.stacked_projection()).chunk(3, dim=-1)
            else:
                source = query if self.self_attention else key
                q, k, v = self.q_proj(query), self.k_proj(source), self.v_proj(source)
            output, weights = self._attend(*map(self.split_heads, (q, k, v)), key_padding_mask, want_weights)
        output = self.out_proj(output.permute(2, 0, 1, 3).flatten(2))
        if not want_weights:
            return output, None
        return output, weights.transpose(0, 1) if need_head_weights else weights.mean(1)

    def _dropout_p(self) -> float:
        dropout = self.dropout_module
        return dropout.p if self.training or dropout.apply_during_inference else 0.0

    def runs_kernels(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether attention to tensors of that type on that device runs on the kernels.

        Raises:
            UserError: if the back end ``triton`` cannot run there.
        """
        by_sentence = self.dynamic is not None or self.selected is not None
        try:
            return not by_sentence and use_kernels(self.backend, dtype, self.head_dim, device)
        except ValueError as error:
            raise UserError(f"--attention-backend {self.backend}: {error}") from error

    def waits_for_device(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a step of decoding waits for the step's number, if its cache counts on the device."""
        return not (self.runs_kernels(dtype, device) or (self.is_relative and self.dynamic is None))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Whole sentences: (B, H, T, D) each -> output (B, H, Tq, D), and weights (B, H, Tq, Tk) or None."""
        lengths = None if key_padding is None else real_lengths(key_padding)
        q_lengths = lengths if self.self_attention else None
        options = dict(q_lengths=q_lengths, k_lengths=lengths, dropout_p=self._dropout_p(), scale=self.scaling)
        layout = self.layout(q.size(2), k.size(2))
        if self.dynamic is not None or self.selected is not None:
            keep = layout.keep_mask(q.size(2), k.size(2), lengths)
            if self.selected is not None:
                keep = keep & self.selected[:, :, None]
            softmax = None if self.dynamic is None else self.dynamic.probabilities
            output, _, weights = attend_dense(q, k, v, keep, softmax=softmax, details=want_weights, **options)
            return output, weights
        backend = "triton" if self.runs_kernels(q.dtype, q.device) else "sdpa"
        attended = block_sparse_attention(q, k, v, layout, backend=backend, return_probs=want_weights, **options)
        return attended if want_weights else (attended, None)

    # -- decoding -----------------------------------------------------------------------------------------------------

    def _decode(
        self, query: Tensor, key: Tensor | None, key_padding: Tensor | None, incremental_state: dict, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One step: query (N, C) -> output (N, H, 1, D), and weights (N, H, 1, S) or None.

        In self-attention padding of the target is not looked at: it is on the right, where only padding sees it. The
        encoder output of cross-attention may be that of N hypotheses, or of N / beam sentences (the first time; later
        it is not read).
        """
        cache = self._cache(incremental_state)
        q, kv = self._project_step(query, None if cache is None else cache.projection)
        if cache is None:
            max_steps = step_limit(incremental_state, self.max_steps)
            if self.self_attention:
                cache = SelfAttentionCache.empty_like(kv, self.last_use, max_steps)
            else:
                cache = self._cross_cache(key, key_padding, q.size(0), max_steps)
            self.set_incremental_state(incremental_state, "attn_state", {"cache": cache})
        cache.advance(kv)
        if isinstance(cache, HostCache):  # of a search, which has no dropout and reads no weights
            return cache.attend(q, self.scaling).unsqueeze(2), None

        dropout_p = self._dropout_p()
        kernels = self.runs_kernels(q.dtype, q.device)
        if kernels and dropout_p and self.backend == "triton":
            raise UserError(
                f"dropout {dropout_p} while decoding (--retain-dropout) with --attention-backend triton: the decoding "
                "kernel has none; use auto or sdpa"
            )
        kernels = kernels and not dropout_p
        output = weights = None
        if want_weights or not kernels:
            output, weights = self._attend_gathered(q, cache, want_weights, dropout_p)
        if kernels:
            output = cache.attend(q, self.layout(*cache.layout_size()), self.scaling)
        return output.unsqueeze(2), weights

    def _attend_gathered(
        self, q: Tensor, cache: PagedCache, want_weights: bool, dropout_p: float
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with the queries q (N, H, D) of a step by torch: (N, H, D), and weights (N, H, 1, S) or None."""
        keep = self._step_mask(cache)
        k, v, lengths = cache.dense(keep)
        by_sentence = q.unflatten(0, (k.size(0), -1)).transpose(1, 2)  # (B, H, beam, D): a step's beams are queries
        selected, weights = cache.selected, None
        keep = (keep if selected is None else keep & selected).unsqueeze(-2)
        if q.is_cpu and not (want_weights or self.dynamic is not None or self.is_relative or selected is not None):
            # Without what `attend_dense` does for empty rows: on a CPU torch gives 0 for them.
            cells = None if lengths is None and keep.all() else visible_cells(keep, None, lengths)
            output = F.scaled_dot_product_attention(
                by_sentence, k, v, attn_mask=cells, dropout_p=dropout_p, scale=self.scaling
            )
        else:
            softmax = None if self.dynamic is None else self.dynamic.probabilities
            options = dict(k_lengths=lengths, dropout_p=dropout_p, scale=self.scaling, softmax=softmax)
            output, _, weights = attend_dense(by_sentence, k, v, keep, details=want_weights, **options)
        output = output.transpose(1, 2).flatten(0, 1)
        return output, None if weights is None else weights.transpose(1, 2).flatten(0, 1).unsqueeze(2)

    def _step_mask(self, cache: PagedCache) -> Tensor:
        """Return the mask row of the step, bool (H, columns), or (B, H, columns) of a mask relative to a diagonal."""
        return self.mask_row(cache.step(), cache.n_columns(), cache.lengths if self.is_relative else None)

    def mask_row(self, step: int | Tensor, size: int, lengths: Tensor | None = None) -> Tensor:
        """Return the first *size* columns of the mask row *step*, bool (H, size).

        Of a relative mask (B, H, size), for sources of *lengths*, int64 (B,).
        """
        if self.is_relative:
            step = torch.as_tensor(step, device=self.keep_words.device)
            return self.layout(1, size).keep_row(step, size, lengths)
        row = int(step)
        return self.keep_mask(row + 1, size)[:, row]

    def keeps_all(self, n_queries: int, n_keys: int) -> bool:
        """Whether the mask keeps every attendable cell of its first queries and keys; False of a relative one."""
        if self.is_relative:
            return False
        keep = self.keep_mask(n_queries, n_keys)
        return bool((keep | torch.ones_like(keep).triu(1) if self.kind.causal else keep).all())

    def _cross_cache(
        self, key: Tensor, key_padding: Tensor | None, n_hypotheses: int, max_steps: int | None
    ) -> CrossAttentionCache:
        size = key.size(0)
        last_use = None if max_steps is None else self.last_use(max_steps, size)
        stored = stored_columns(last_use, size, self.num_heads, key.device)
        cache = CrossAttentionCache.from_encoder_output(
            self.project_source, stored, key, key_padding, n_hypotheses, max_steps
        )
        cache.selected = self.selected
        return cache

    def _project_step(self, query: Tensor, projection: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        """(N, C) -> q (N, H, D), and in self-attention keys and values (N, 2, H, D)."""
        sizes = (self.num_heads, self.head_dim)
        if not self.self_attention:
            return self.q_proj(query).unflatten(-1, sizes), None
        if projection is not None:
            qkv = F.linear(query, *projection).unflatten(-1, (3, *sizes))
        else:  # to stack the weights for the few rows of a step takes longer than two more products
            parts = (self.q_proj, self.k_proj, self.v_proj)
            qkv = torch.stack([part(query) for part in parts], 1).unflatten(-1, sizes)
        return qkv[:, 0], qkv[:, 1:]

    def stacked_projection(self) -> tuple[Tensor, Tensor]:
        """Return weight (3C, C) and bias (3C,) of q, k and v, for one product in place of three."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        return torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])

    def project_source(self, source: Tensor) -> Tensor:
        """Encoder output (R, C) -> keys and values (R, 2, H, D)."""
        kv = torch.stack([self.k_proj(source), self.v_proj(source)], 1)
        return kv.unflatten(-1, (self.num_heads, self.head_dim))

    def _cache(self, incremental_state: dict) -> PagedCache | HostCache | None:
        state = self.get_incremental_state(incremental_state, "attn_state")
        return None if state is None else state["cache"]

    def reorder_incremental_state(self, incremental_state: dict, new_order: Tensor) -> dict:
        """fairseq's hook after each step of a search: hypothesis i continues hypothesis new_order[i]."""
        cache = self._cache(incremental_state)
        if cache is not None:
            cache.reorder(new_order)
        return incremental_state


def no_offsets(num_heads: int) -> dict[str, Tensor]:
    """Return the buffers of offsets of a mask that has none."""
    return {
        "offset_words": torch.zeros(num_heads, 0, dtype=torch.int64),
        "offset_geometry": torch.zeros(0, dtype=torch.int64),
        "offset_anchor": torch.zeros(0, dtype=torch.int64),
    }


def upgrade_masks(parameters: dict[str, Tensor]) -> None:
    """Bring masks of older checkpoints into today's form, in place: version 0.1 had other names, 0.2 no offsets."""
    for key in [key for key in parameters if key.endswith("keep_words")]:
        prefix = key.removesuffix("keep_words")
        if f"{prefix}beyond_words" in parameters:
            parameters[f"{prefix}extrapolation_words"] = parameters.pop(f"{prefix}beyond_words")
        for name, value in no_offsets(len(parameters[key])).items():
            parameters.setdefault(prefix + name, value)


def real_lengths(padding: Tensor) -> Tensor:
    """Count the real tokens of right-padded rows: bool (B, T), True = padded -> int64 (B,).

    All layers of a model get the same mask, so the count is kept as long as the mask lives: as an attribute of it. A
    weak dictionary would run Python when the mask goes, during the backward pass, where an interrupt is dropped.
    """
    version = None if padding.is_inference() else padding._version
    known = padding.__dict__.get("real_lengths")
    if known is None or known[0] != version:
        known = padding.__dict__["real_lengths"] = (version, padding.size(1) - padding.sum(1))
    return known[1]


def _doubled(size: int) -> int:
    """The power of two from *size* on: ever longer sentences build a layout only a few times."""
    return 1 << (size - 1).bit_length()
