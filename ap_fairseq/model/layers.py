"""fairseq's encoder and decoder with pruned attention."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.models.transformer import TransformerConfig, TransformerDecoderBase, TransformerEncoderBase
from fairseq.modules import AdaptiveInput, transformer_layer
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.quant_noise import quant_noise
from torch import Tensor, nn

from ap_fairseq.model.attention import NotScriptable, PrunedMultiheadAttention
from ap_fairseq.model.cpu_linear import PackedLinear, project
from ap_fairseq.model.dynamic import DynamicPruning
from ap_fairseq.model.kv_cache import group_hypotheses
from ap_fairseq.sites import AttentionKind


def _attention(embed_dim: int, cfg: TransformerConfig, kind: AttentionKind, **kwargs) -> PrunedMultiheadAttention:
    side = cfg.encoder if kind is AttentionKind.ENCODER_SELF else cfg.decoder
    xformers = cfg.decoder if kind is AttentionKind.DECODER_SELF else cfg.encoder
    return PrunedMultiheadAttention(
        embed_dim,
        side.attention_heads,
        kind=kind,
        backend=cfg.attention_backend,
        dynamic=DynamicPruning.from_options(kind, cfg.attention_top_k, cfg.attention_threshold, cfg.attention_log_bits),
        max_steps=None if kind is AttentionKind.ENCODER_SELF else cfg.max_target_positions,
        dropout=cfg.attention_dropout,
        q_noise=cfg.quant_noise.pq,
        qn_block_size=cfg.quant_noise.pq_block_size,
        xformers_att_config=xformers.xformers_att_config,
        **kwargs,
    )


class PackedFeedForward:
    """The part of a layer that makes its linear layers; fairseq's own layer class comes after it."""

    def build_fc1(self, input_dim, output_dim, q_noise, qn_block_size):
        return quant_noise(PackedLinear(input_dim, output_dim), q_noise, qn_block_size)

    build_fc2 = build_fc1


class PrunedTransformerEncoderLayer(PackedFeedForward, transformer_layer.TransformerEncoderLayerBase):
    """fairseq's encoder layer with pruned self-attention."""

    def build_self_attention(self, embed_dim, cfg):
        return _attention(embed_dim, cfg, AttentionKind.ENCODER_SELF)


class PrunedTransformerDecoderLayer(PackedFeedForward, transformer_layer.TransformerDecoderLayerBase):
    """fairseq's decoder layer with pruned self- and cross-attention.

    Weights are computed where the decoder asks for them; ``need_attn`` would ask in every layer outside training.
    """

    def __init__(self, cfg, no_encoder_attn=False, add_bias_kv=False, add_zero_attn=False):
        super().__init__(cfg, no_encoder_attn, add_bias_kv, add_zero_attn)
        self.need_attn = False

    def make_generation_fast_(self, **kwargs):
        """fairseq's hook before generation, which would set ``need_attn``."""

    def build_self_attention(self, embed_dim, cfg, add_bias_kv=False, add_zero_attn=False):
        if cfg.cross_self_attention:  # attends to source and target at once: neither kind, so it stays dense
            return super().build_self_attention(embed_dim, cfg, add_bias_kv, add_zero_attn)
        return _attention(
            embed_dim, cfg, AttentionKind.DECODER_SELF, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn
        )

    def build_encoder_attention(self, embed_dim, cfg):
        return _attention(embed_dim, cfg, AttentionKind.CROSS, kdim=cfg.encoder.embed_dim, vdim=cfg.encoder.embed_dim)


def is_plain(layer: nn.Module) -> bool:
    """Whether a step of a decoder layer is its products, normalisations, attention and activation, and nothing else."""
    attentions = [part for part in (layer.self_attn, layer.encoder_attn) if part is not None]
    linear = [layer.fc1, layer.fc2, *(getattr(x, name) for x in attentions for name in ("q_proj", "out_proj"))]
    dropouts = (layer.dropout_module, layer.activation_dropout_module)
    scales = (layer.c_attn, layer.attn_ln, layer.ffn_layernorm, layer.w_resid)  # --scale-heads and its like
    return (
        all(type(part) in (nn.Linear, PackedLinear) for part in linear)
        and not any(dropout.apply_during_inference for dropout in dropouts)
        and all(scale is None for scale in scales)
    )


def _wrap_layer(layer: nn.Module, cfg: TransformerConfig, stock_class: type) -> nn.Module:
    """Apply activation checkpointing as fairseq does, and keep the dropout names of the stock layer."""
    for module in (layer.dropout_module, layer.activation_dropout_module):
        module.module_name = stock_class.__name__
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return layer


class PrunedTransformerEncoder(NotScriptable, TransformerEncoderBase):
    """fairseq's encoder, which first moves each sentence to column 0: masks are indexed by token position.

    Its output adds ``source_shift`` [(B,) int64]: the padding that each sentence had on its left.
    """

    def __init__(self, cfg, dictionary, embed_tokens, return_fc=False):
        super().__init__(cfg, dictionary, embed_tokens, return_fc)
        self.dropout_module.module_name = "TransformerEncoder"

    def build_encoder_layer(self, cfg):
        layer = PrunedTransformerEncoderLayer(cfg, return_fc=self.return_fc)
        return _wrap_layer(layer, cfg, transformer_layer.TransformerEncoderLayerBase)

    def forward(self, src_tokens, src_lengths=None, return_all_hiddens=False, token_embeddings=None):
        shift = left_padding(src_tokens, self.padding_idx)
        src_tokens = rotate_left(src_tokens, shift)
        if token_embeddings is not None:
            token_embeddings = rotate_left(token_embeddings, shift)
        output = super().forward(src_tokens, src_lengths, return_all_hiddens, token_embeddings)
        return {**output, "source_shift": [shift]}

    def forward_scriptable(self, src_tokens, src_lengths=None, return_all_hiddens=False, token_embeddings=None):
        """Compute the same as fairseq's, which asks the device in every layer whether there is padding."""
        padding = src_tokens.eq(self.padding_idx)
        x, embedding = self.forward_embedding(src_tokens, token_embeddings)
        x = x.masked_fill(padding[..., None], 0).transpose(0, 1)
        states, fc_results = [x], []
        for layer in self.layers:
            result = layer(x, encoder_padding_mask=padding_or_none(padding))
            x, fc_result = result if isinstance(result, tuple) else (result, None)
            states.append(x)
            fc_results.append(fc_result)
        return {
            "encoder_out": [x if self.layer_norm is None else self.layer_norm(x)],  # (S, B, C)
            "encoder_padding_mask": [padding],
            "encoder_embedding": [embedding],
            "encoder_states": states if return_all_hiddens else [],
            "fc_results": fc_results if return_all_hiddens else [],
            "src_tokens": [],
            "src_lengths": [(~padding).sum(1, dtype=torch.int32, keepdim=True)],
        }

    def reorder_encoder_out(self, encoder_out, new_order):
        """fairseq's hook, called once to repeat each sentence for its beams, then after each step of the search.

        Repetitions are only noted (``beam`` [int]) where each sentence has as many hypotheses, one after the other:
        cross-attention serves all of them from one copy. Orders of any other kind are followed by copying.
        """
        n_sentences, beam = encoder_out["encoder_out"][0].size(1), encoder_out.get("beam", [1])[0]
        if self.cfg.cross_self_attention:  # the decoder joins it to every hypothesis
            sentences, beam = new_order, 1
        else:
            sentences, beam = group_hypotheses(new_order, n_sentences, beam)
        if sentences is not None:
            shift = [part.index_select(0, sentences) for part in encoder_out.get("source_shift", [])]
            encoder_out = {**super().reorder_encoder_out(encoder_out, sentences), "source_shift": shift}
        unrepeated = {name: value for name, value in encoder_out.items() if name != "beam"}
        return unrepeated if beam == 1 else {**unrepeated, "beam": [beam]}


class PrunedTransformerDecoder(NotScriptable, TransformerDecoderBase):
    """fairseq's decoder with pruned attention; alignments come back in the caller's own order of source columns."""

    def __init__(self, cfg, dictionary, embed_tokens, no_encoder_attn=False, output_projection=None):
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn, output_projection)
        self.dropout_module.module_name = "TransformerDecoder"
        self.alignment_needed = False  # set while fairseq reads alignments (`compat`)
        self.guided_alignment = False  # whole sentences: a criterion reads them

    def build_decoder_layer(self, cfg, no_encoder_attn=False):
        layer = PrunedTransformerDecoderLayer(cfg, no_encoder_attn)
        return _wrap_layer(layer, cfg, transformer_layer.TransformerDecoderLayerBase)

    def output_layer(self, features):
        return super().output_layer(features) if self.adaptive_softmax else project(self.output_projection, features)

    def extract_features(
        self,
        prev_output_tokens,
        encoder_out=None,
        incremental_state=None,
        full_context_alignment=False,
        alignment_layer=None,
        alignment_heads=None,
    ):
        """As fairseq's, except that ``attn`` is None unless somebody reads it.

        Weights come back where the caller names *alignment_layer*, while ``alignment_needed`` is set, and under
        ``--load-alignments`` (``guided_alignment``): (B, T, S), the mean of *alignment_heads* (default: all), in the
        caller's order of source columns; where the caller names neither, those of the model's options. Guided, cells
        that every head prunes have the smallest positive number in place of 0: a link there adds a constant to the
        criterion's logarithm, and no gradient.
        """
        if alignment_layer is None:
            if not (self.alignment_needed or (self.guided_alignment and incremental_state is None)):
                alignment_layer = self.num_layers  # none of them
            elif alignment_heads is None:
                alignment_layer, alignment_heads = self.cfg.alignment_layer, self.cfg.alignment_heads
        encoder_out = self._for_hypotheses(encoder_out, prev_output_tokens.size(0), incremental_state)
        whole_sentences = incremental_state is None and not full_context_alignment
        if whole_sentences and alignment_layer == self.num_layers and not self.cross_self_attention:
            return self._features(prev_output_tokens, encoder_out)
        x, extra = super().extract_features(
            prev_output_tokens, encoder_out, incremental_state, full_context_alignment, alignment_layer, alignment_heads
        )
        weights = extra["attn"][0]  # (B, T, S) over right-padded columns, or None
        if weights is not None and encoder_out is not None and encoder_out.get("source_shift"):
            columns = weights.transpose(1, 2)
            shift = encoder_out["source_shift"][0].repeat_interleave(encoder_out.get("beam", [1])[0])
            if shift.numel() != weights.size(0):
                raise ValueError(
                    f"alignments of {weights.size(0)} hypotheses need the source_shift of each, got {shift.numel()}: "
                    "order and repeat the encoder's output with encoder.reorder_encoder_out"
                )
            weights = rotate_left(columns, -shift).transpose(1, 2).contiguous()
            if self.guided_alignment and incremental_state is None:
                weights = weights.masked_fill(weights == 0, torch.finfo(weights.dtype).tiny)
            extra["attn"] = [weights]
        return x, extra

    def _for_hypotheses(self, encoder_out: dict | None, n: int, incremental_state: dict | None) -> dict | None:
        """Return the encoder output for *n* hypotheses: repeated, unless caches need no copies.

        Raises:
            ValueError: if it is of another number of hypotheses, whose sentences are unknown.
        """
        cross = self.layers[0].encoder_attn if len(self.layers) else None
        if encoder_out is None or not encoder_out["encoder_out"] or not isinstance(cross, PrunedMultiheadAttention):
            return encoder_out
        if incremental_state is not None and cross.get_incremental_state(incremental_state, "attn_state") is not None:
            return encoder_out  # it is not read any more
        (source,), beam = encoder_out["encoder_out"], encoder_out.get("beam", [1])[0]
        if n != source.size(1) * beam:
            raise ValueError(
                f"{n} hypotheses, but encoder output of {source.size(1) * beam} ({source.size(1)} sentences x {beam}): "
                "repeat it with encoder.reorder_encoder_out, in the order of the hypotheses"
            )
        if incremental_state is not None or beam == 1:
            return encoder_out
        names = ("encoder_padding_mask", "source_shift")
        repeated = {name: [x.repeat_interleave(beam, 0) for x in encoder_out.get(name, [])] for name in names}
        return {**encoder_out, "encoder_out": [source.repeat_interleave(beam, 1)], **repeated, "beam": [1]}

    def _features(self, tokens: Tensor, encoder_out: dict[str, list[Tensor]] | None) -> tuple[Tensor, dict[str, Any]]:
        """Decode whole sentences as fairseq's decoder does, without waiting for the device.

        Args:
            tokens: (B, T), padded on the right.
            encoder_out: None in a language model.

        Returns:
            Features (B, T, C), and the states of all layers in a dictionary.
        """
        positions = None if self.embed_positions is None else self.embed_positions(tokens)
        x = self.embed(tokens, positions).transpose(0, 1)
        padding, causal = padding_or_none(tokens.eq(self.padding_idx)), x.new_empty(0)  # only its presence is read
        source, source_padding = (
            next(iter((encoder_out or {}).get(name, ())), None) for name in ("encoder_out", "encoder_padding_mask")
        )
        states = [x]
        for layer in self.layers:
            x = layer(x, source, source_padding, self_attn_mask=causal, self_attn_padding_mask=padding)[0]
            states.append(x)
        return self.finish(x).transpose(0, 1), {"attn": [None], "inner_states": states}

    def embed(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """Embed tokens (..., ) and add their positional embeddings (..., C): the input of the first layer, (..., C)."""
        adaptive = isinstance(self.embed_tokens, AdaptiveInput) and not self.training
        x = self.embed_scale * (embed_bands(self.embed_tokens, tokens) if adaptive else self.embed_tokens(tokens))
        if self.quant_noise is not None:
            x = self.quant_noise(x)
        if self.project_in_dim is not None:
            x = self.project_in_dim(x)
        if positions is not None:
            x = x + positions
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        return self.dropout_module(x)

    def finish(self, x: Tensor) -> Tensor:
        """Turn the output of the last layer into features, (..., C) -> (..., C')."""
        x = x if self.layer_norm is None else self.layer_norm(x)
        return x if self.project_out_dim is None else self.project_out_dim(x)


def embed_bands(embedding: AdaptiveInput, tokens: Tensor) -> Tensor:
    """Compute what fairseq's adaptive input does for *tokens* (..., ), by all bands, so without waiting for the device.

    Training leaves that to fairseq, which multiplies a token by its own band alone, at the price of a wait.
    """
    first, x = 0, None
    for end, band in zip(embedding.cutoff, embedding.embeddings, strict=True):
        own = band((tokens - first).clamp(0, end - first - 1))
        x = own if x is None else torch.where((tokens >= first)[..., None], own, x)
        first = end
    return x


def padding_or_none(padding: Tensor) -> Tensor | None:
    """Return None in place of a mask without padding where that is known at once: not on a GPU."""
    return padding if padding.is_cuda or padding.any() else None


def left_padding(tokens: Tensor, pad: int) -> Tensor:
    """Count the padding before the first token of each row: (B, T) -> int64 (B,)."""
    return tokens.eq(pad).long().cumprod(1).sum(1)


def rotate_left(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate row b of *x* (B, T, ...) left by shift[b] positions; negative shifts rotate right."""
    index = (torch.arange(x.size(1), device=x.device)[None, :] + shift[:, None]) % x.size(1)
    return x[torch.arange(x.size(0), device=x.device)[:, None], index]
