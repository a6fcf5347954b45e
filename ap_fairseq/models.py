"""The registered model ``pruned_transformer`` and its architectures: fairseq's transformer with pruned attention."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
from typing import Any, Optional  # fairseq's parser reads Optional[X], not X | None

import numpy as np
import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.distributed import fsdp_wrap
from fairseq.logging import metrics
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import (
    TransformerConfig,
    TransformerDecoderBase,
    TransformerEncoderBase,
    TransformerModelBase,
    transformer_legacy,
)
from fairseq.models.transformer.transformer_config import DecoderConfig, EncDecBaseConfig, QuantNoiseConfig
from fairseq.modules import transformer_layer
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from omegaconf import II, DictConfig, OmegaConf
from torch import Tensor, nn

from ap_fairseq.artifacts import ArtifactError, PruningMasks, dictionary_hashes, file_sha256
from ap_fairseq.attention import MASK_BUFFERS, PrunedMultiheadAttention
from ap_fairseq.compat import drop_bettertransformer_copies
from ap_fairseq.decoding import peak_share
from ap_fairseq.dynamic import DynamicPruning
from ap_fairseq.sites import AttentionKind, architecture, attention_sites
from ap_fairseq.training_graphs import TrainingGraphs, not_captured
from triton_ops.api import BACKENDS

logger = logging.getLogger(__name__)


# -- configuration ----------------------------------------------------------------------------------------------------

# Sizes that follow another one unless they are given, as in fairseq's base architecture.
_FOLLOWS = {
    "decoder_embed_dim": II("model.encoder_embed_dim"),
    "decoder_ffn_embed_dim": II("model.encoder_ffn_embed_dim"),
    "decoder_input_dim": II("model.decoder_embed_dim"),
    "decoder_output_dim": II("model.decoder_embed_dim"),
}


def _flat_fields() -> list[tuple[str, Any, Any]]:
    """Return the fields of fairseq's nested TransformerConfig under the flat names of its command line.

    A nested config in a model of a plugin crashes fairseq's parser or silently ignores ``--encoder-layers`` and
    friends; flat names work for ``fairseq-train``, ``fairseq-hydra-train`` and stored checkpoints alike.
    """
    nested = {"encoder": EncDecBaseConfig, "decoder": DecoderConfig, "quant_noise": QuantNoiseConfig}
    flat = []
    for outer in dataclasses.fields(TransformerConfig):
        if outer.name == "_name":
            continue
        if outer.name not in nested:
            flat.append((outer.name, outer.type, dataclasses.field(default=outer.default, metadata=outer.metadata)))
            continue
        for inner in dataclasses.fields(nested[outer.name]):
            if inner.name == "_name":
                continue
            name = f"{outer.name}_{inner.name}"
            default = _FOLLOWS.get(name, inner.default)
            inner_type = Optional[str] if inner.name == "layers_to_keep" else inner.type  # given and parsed as "0,2,4"
            flat.append((name, inner_type, dataclasses.field(default=default, metadata=inner.metadata)))
    return flat


_PluginFields = [
    (
        "attention_masks",
        Optional[str],
        dataclasses.field(
            default=None,
            metadata={
                "help": "pruning masks to start training with (ap-masks); checkpoints carry them from then on. Given "
                "together with a pruned checkpoint, the file replaces the checkpoint's masks"
            },
        ),
    ),
    (
        "attention_backend",
        ChoiceEnum(BACKENDS),
        dataclasses.field(
            default="auto",
            metadata={"help": "what computes attention: triton kernels, eager torch, or whichever suits the device"},
        ),
    ),
    (
        "cuda_graphs",
        ChoiceEnum(("auto", "off")),
        dataclasses.field(
            default="auto",
            metadata={
                "help": "on a GPU, replay training updates as CUDA graphs, one for each shape of batch; off runs every "
                "update directly"
            },
        ),
    ),
    (
        "attention_top_k",
        Optional[str],
        dataclasses.field(
            default=None,
            metadata={
                "help": "for analysis: each query attends to its k best keys only (Gupta et al. 2021); a number, or "
                "numbers per kind such as encoder_self=4,cross=3"
            },
        ),
    ),
    (
        "attention_threshold",
        Optional[str],
        dataclasses.field(
            default=None,
            metadata={
                "help": "for analysis: attention probabilities below this become 0 (Ji et al. 2021); a number, or "
                "numbers per kind"
            },
        ),
    ),
    (
        "attention_log_bits",
        int,
        dataclasses.field(
            default=0,
            metadata={
                "help": "for analysis: round the probabilities above --attention-threshold to 2^N - 1 values on a log "
                "scale (Ji et al. 2021 use 3); 0 for no rounding"
            },
        ),
    ),
]

PrunedTransformerConfig = dataclasses.make_dataclass(
    "PrunedTransformerConfig", _flat_fields() + _PluginFields, bases=(FairseqDataclass,)
)
PrunedTransformerConfig.__module__ = __name__
PrunedTransformerConfig.__doc__ = "fairseq's TransformerConfig with flat names, plus the flags of this plugin."


def _is_interpolation(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("${")


# -- layers, encoder, decoder -----------------------------------------------------------------------------------------


def _attention(embed_dim: int, cfg: TransformerConfig, kind: AttentionKind, **kwargs) -> PrunedMultiheadAttention:
    side = cfg.encoder if kind is AttentionKind.ENCODER_SELF else cfg.decoder
    xformers = cfg.decoder if kind is AttentionKind.DECODER_SELF else cfg.encoder
    return PrunedMultiheadAttention(
        embed_dim,
        side.attention_heads,
        kind=kind,
        backend=cfg.attention_backend,
        dynamic=DynamicPruning.from_options(kind, cfg.attention_top_k, cfg.attention_threshold, cfg.attention_log_bits),
        max_rows=None if kind is AttentionKind.ENCODER_SELF else cfg.max_target_positions,
        dropout=cfg.attention_dropout,
        q_noise=cfg.quant_noise.pq,
        qn_block_size=cfg.quant_noise.pq_block_size,
        xformers_att_config=xformers.xformers_att_config,
        **kwargs,
    )


class PrunedTransformerEncoderLayer(transformer_layer.TransformerEncoderLayerBase):
    """fairseq's encoder layer with pruned self-attention."""

    def build_self_attention(self, embed_dim, cfg):
        return _attention(embed_dim, cfg, AttentionKind.ENCODER_SELF)


class PrunedTransformerDecoderLayer(transformer_layer.TransformerDecoderLayerBase):
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


def _wrap_layer(layer: nn.Module, cfg: TransformerConfig, stock_class: type) -> nn.Module:
    """Apply activation checkpointing and FSDP as fairseq does, and keep the dropout names of the stock layer."""
    for module in (layer.dropout_module, layer.activation_dropout_module):
        module.module_name = stock_class.__name__
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)


class PrunedTransformerEncoder(TransformerEncoderBase):
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
        """What fairseq's computes, which asks the device in every layer whether there is padding."""
        padding = src_tokens.eq(self.padding_idx)
        x, embedding = self.forward_embedding(src_tokens, token_embeddings)
        x = x.masked_fill(padding[..., None], 0).transpose(0, 1)
        states, fc_results = [x], []
        for layer in self.layers:
            result = layer(x, encoder_padding_mask=without_waiting(padding))
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

        The repetition is only noted (``beam`` [int]): cross-attention serves all beams of a sentence from one copy.
        Hypotheses of a sentence must stay together from then on, as every search of fairseq keeps them.
        """
        n_sentences = encoder_out["source_shift"][0].numel()
        beam = encoder_out.get("beam", [1])[0]
        if beam > 1:
            if new_order.numel() == n_sentences * beam:
                return encoder_out
            new_order = new_order[::beam] // beam
        else:
            beam, remainder = divmod(new_order.numel(), n_sentences)
            sentences = torch.arange(n_sentences, device=new_order.device)
            repeated = remainder == 0 and beam > 1 and torch.equal(new_order, sentences.repeat_interleave(beam))
            if repeated and not self.cfg.cross_self_attention:  # there the decoder joins it to every hypothesis
                return {**encoder_out, "beam": [beam]}
            beam = 1
        shift = [part.index_select(0, new_order) for part in encoder_out["source_shift"]]
        return {**super().reorder_encoder_out(encoder_out, new_order), "source_shift": shift, "beam": [beam]}


class PrunedTransformerDecoder(TransformerDecoderBase):
    """fairseq's decoder with pruned attention; alignments come back in the caller's own order of source columns."""

    def __init__(self, cfg, dictionary, embed_tokens, no_encoder_attn=False, output_projection=None):
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn, output_projection)
        self.dropout_module.module_name = "TransformerDecoder"
        self.alignment_needed = False  # set while fairseq reads alignments (`compat`)

    def build_decoder_layer(self, cfg, no_encoder_attn=False):
        layer = PrunedTransformerDecoderLayer(cfg, no_encoder_attn)
        return _wrap_layer(layer, cfg, transformer_layer.TransformerDecoderLayerBase)

    def extract_features(
        self,
        prev_output_tokens,
        encoder_out=None,
        incremental_state=None,
        full_context_alignment=False,
        alignment_layer=None,
        alignment_heads=None,
    ):
        if alignment_layer is None and (self.training or not self.alignment_needed):
            alignment_layer = self.num_layers  # no layer: weights cost a slower path
        ordinary = incremental_state is None and encoder_out is not None and not full_context_alignment
        if ordinary and alignment_layer == self.num_layers and not self.cross_self_attention:
            return self._features(prev_output_tokens, encoder_out)
        x, extra = super().extract_features(
            prev_output_tokens,
            encoder_out,
            incremental_state,
            full_context_alignment,
            alignment_layer,
            alignment_heads,
        )
        weights = extra["attn"][0]  # (B, T, S) over right-padded columns, or None
        if weights is not None and encoder_out is not None and encoder_out.get("source_shift"):
            columns = weights.transpose(1, 2)
            shift = encoder_out["source_shift"][0]
            shift = shift.repeat_interleave(weights.size(0) // shift.numel())  # beams share their sentence
            extra["attn"] = [rotate_left(columns, -shift).transpose(1, 2)]
        return x, extra

    def _features(self, tokens: Tensor, encoder_out: dict[str, list[Tensor]]) -> tuple[Tensor, dict[str, Any]]:
        """What fairseq's decoder computes for whole sentences, without waiting for the device.

        Args:
            tokens: (B, T), padded on the right.

        Returns:
            Features (B, T, C), and the states of all layers in a dictionary.
        """
        positions = None if self.embed_positions is None else self.embed_positions(tokens)
        x = self.embed(tokens, positions).transpose(0, 1)
        padding, causal = without_waiting(tokens.eq(self.padding_idx)), x.new_empty(0)  # only its presence is read
        states = [x]
        for layer in self.layers:
            x = layer(
                x,
                encoder_out["encoder_out"][0],
                encoder_out["encoder_padding_mask"][0],
                self_attn_mask=causal,
                self_attn_padding_mask=padding,
            )[0]
            states.append(x)
        return self.finish(x).transpose(0, 1), {"attn": [None], "inner_states": states}

    def embed(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """Embed tokens (..., ) and add their positional embeddings (..., C): the input of the first layer, (..., C)."""
        x = self.embed_scale * self.embed_tokens(tokens)
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


def without_waiting(padding: Tensor) -> Tensor | None:
    """Return None in place of a mask without padding where that is known at once: not on a GPU."""
    return padding if padding.is_cuda or padding.any() else None


def left_padding(tokens: Tensor, pad: int) -> Tensor:
    """Count the padding before the first token of each row: (B, T) -> int64 (B,)."""
    return tokens.eq(pad).long().cumprod(1).sum(1)


def rotate_left(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate row b of *x* (B, T, ...) left by shift[b] positions; negative shifts rotate right."""
    index = (torch.arange(x.size(1), device=x.device)[None, :] + shift[:, None]) % x.size(1)
    return x[torch.arange(x.size(0), device=x.device)[:, None], index]


# -- model ------------------------------------------------------------------------------------------------------------


@register_model("pruned_transformer", dataclass=PrunedTransformerConfig)
class PrunedTransformerModel(TransformerModelBase):
    """fairseq's transformer whose attention is pruned by global masks.

    Parameters have the names of the stock model, so dense checkpoints are a warm start (``--finetune-from-model``).
    Masks are buffers of the attention modules; ``mask_metadata`` holds their provenance as JSON, one character to an
    int64 (integers survive half precision and checkpoint averaging), with the SHA-256 of the masks.
    """

    def __init__(self, cfg, encoder, decoder):
        super().__init__(cfg, encoder, decoder)
        self.register_buffer("mask_metadata", torch.zeros(0, dtype=torch.int64))
        self._masks_are_explicit = False
        self._said_what_caches_hold = False
        self._logged_sparsity: dict[str, float] = {}  # effective sparsity of each kind, for the training logs
        self._graphs: TrainingGraphs | None = None
        self._use_graphs = cfg.cuda_graphs == "auto"

    @classmethod
    def add_args(cls, parser):
        """Add the model's flags; defaults are left to the architecture."""
        gen_parser_from_dataclass(parser, PrunedTransformerConfig(), delete_default=True)

    @classmethod
    def build_model(cls, cfg, task):
        """Build the model and, if ``attention_masks`` names a file, set its masks.

        The name is then erased from the configuration: checkpoints carry the masks themselves, and must not depend on
        a file that may move or change.

        Raises:
            ArtifactError: if the masks cannot be read or were made for another architecture or dictionary.
            ValueError: for ``--left-pad-target``.
        """
        if getattr(task.cfg, "left_pad_target", False):
            raise ValueError(
                "--left-pad-target is set; masks count tokens from column 0, so leave targets right-padded"
            )
        path = cfg.attention_masks
        _erase_mask_path(cfg)
        flat = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True) if OmegaConf.is_config(cfg) else vars(cfg)
        args = argparse.Namespace(**{name: value for name, value in flat.items() if not _is_interpolation(value)})
        transformer_legacy.base_architecture(args)
        model = super().build_model(TransformerConfig.from_namespace(args), task)
        if path:
            masks = PruningMasks.load(path)
            masks.require_model(architecture(model), dictionary_hashes(task), path)
            model.set_masks(masks, file_sha256(path))
            logger.info(f"attention masks {path}: {describe_sparsity(model.masks_provenance())}")
        return model

    @classmethod
    def build_encoder(cls, cfg, src_dict, embed_tokens):
        return PrunedTransformerEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg, tgt_dict, embed_tokens):
        return PrunedTransformerDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)

    def forward(
        self,
        src_tokens,
        src_lengths,
        prev_output_tokens,
        return_all_hiddens=True,
        features_only=False,
        alignment_layer=None,
        alignment_heads=None,
    ):
        """As fairseq's model; updates are replayed as CUDA graphs where that is possible, without states of layers."""
        graphs = self._training_graphs(src_tokens.device)
        if graphs is not None and alignment_layer is None and alignment_heads is None:
            features = graphs(src_tokens, prev_output_tokens)
            if features is not None:
                output = features if features_only else self.decoder.output_layer(features)
                return output, {"attn": [None], "inner_states": []}
        return super().forward(
            src_tokens,
            src_lengths,
            prev_output_tokens,
            return_all_hiddens,
            features_only,
            alignment_layer,
            alignment_heads,
        )

    def _training_graphs(self, device: torch.device) -> TrainingGraphs | None:
        if not (self.training and torch.is_grad_enabled()):
            return None
        if self._graphs is None and self._use_graphs and device.type == "cuda":
            reason = not_captured(self)
            if reason is None:
                self._graphs = TrainingGraphs(self)
                logger.info("training updates are replayed as CUDA graphs, one for each shape of batch (--cuda-graphs)")
            else:
                logger.info(f"training updates run directly: {reason} cannot be captured as a CUDA graph")
                self._use_graphs = False
        return self._graphs

    # -- masks --------------------------------------------------------------------------------------------------------

    def set_masks(self, masks: PruningMasks, file_hash: str | None = None) -> None:
        """Give every attention module its mask; a checkpoint loaded afterwards does not replace them."""
        tensors = {name: torch.from_numpy(array) for name, array in masks.packed().items()}
        for (kind, layer), module in attention_sites(self):
            module.set_mask(
                tensors[f"{kind.value}.keep"][layer].clone(),
                tensors[f"{kind.value}.beyond"][layer].clone(),
                tensors[f"{kind.value}.range"].clone(),
            )
        provenance = {**masks.metadata, "file_sha256": file_hash, "masks_sha256": self.masks_sha256()}
        self.mask_metadata = encode_provenance(provenance).to(self.mask_metadata.device)
        self._masks_are_explicit = True
        self._logged_sparsity = effective_sparsity(provenance)

    def prepare_for_inference_(self, cfg):
        """fairseq's hook before generation: logs what the masks save in the caches."""
        super().prepare_for_inference_(cfg)
        self.say_what_caches_hold()

    def say_what_caches_hold(self) -> None:
        """Log, once, what the masks save in the caches of decoding."""
        if not self._said_what_caches_hold:
            self._said_what_caches_hold = True
            logger.info(describe_caches(self))

    def masks_sha256(self) -> str:
        """Hash the masks themselves, from the buffers."""
        digest = hashlib.sha256()
        for site, module in attention_sites(self):
            digest.update(f"{site.kind.value}.{site.layer}".encode())
            for name in MASK_BUFFERS:
                digest.update(np.ascontiguousarray(getattr(module, name).cpu().numpy()).tobytes())
        return digest.hexdigest()

    def masks_provenance(self) -> dict[str, Any] | None:
        """Return the provenance stored with the masks, or None if the model has no masks.

        Raises:
            ArtifactError: if provenance and masks do not belong together, as after averaging checkpoints with
                different masks.
        """
        provenance = decode_provenance(self.mask_metadata)
        if provenance is not None and provenance["masks_sha256"] != self.masks_sha256():
            raise ArtifactError(DAMAGED_MASKS)
        return provenance

    def _load_from_state_dict(self, state_dict, prefix, *args):
        key = prefix + "mask_metadata"
        stored = state_dict.get(key)
        if stored is not None and not self._masks_are_explicit:
            self.mask_metadata = torch.empty_like(stored, device=self.mask_metadata.device)
        else:
            if stored is not None and not torch.equal(stored.cpu(), self.mask_metadata.cpu()):
                logger.warning("the masks of --attention-masks replace those of the checkpoint")
            state_dict[key] = self.mask_metadata
        super()._load_from_state_dict(state_dict, prefix, *args)

    def upgrade_state_dict_named(self, state_dict, name):
        drop_bettertransformer_copies(state_dict)
        super().upgrade_state_dict_named(state_dict, name)

    def load_state_dict(self, state_dict, strict=True, model_cfg=None, args=None):
        """As fairseq's, and check that masks and provenance belong together.

        Raises:
            ArtifactError: if they do not. With LayerDrop at inference time (``encoder_layers_to_keep`` in
                ``--model-overrides``) only the masks of the kept layers are loaded, and nothing is checked.
        """
        known = self._holds_masks_of(state_dict)
        kept = {name: getattr(model_cfg, name, None) for name in LAYERS_TO_KEEP}  # fairseq erases them
        result = super().load_state_dict(state_dict, strict, model_cfg, args)
        if any(kept.values()) and not self._masks_are_explicit:
            self._leave_out_layers(kept)
        if not known:
            self._announce_masks()
        return result

    def _holds_masks_of(self, state_dict) -> bool:
        """Whether loading changes no mask: ``--store-ema`` loads after every update."""
        own = {k: v for k, v in self.named_buffers() if k.endswith((*MASK_BUFFERS, "mask_metadata"))}
        return self.mask_metadata.numel() > 0 and all(
            key in state_dict and torch.equal(state_dict[key].to(value.device), value) for key, value in own.items()
        )

    def _leave_out_layers(self, kept: dict[str, str | None]) -> None:
        """Make the provenance that of the masks that are left."""
        provenance = decode_provenance(self.mask_metadata)
        if provenance is not None:
            logger.info(f"the masks are those of some layers ({kept}), the effective sparsity is that of all")
            provenance |= {"masks_sha256": self.masks_sha256(), **kept}
            self.mask_metadata = encode_provenance(provenance).to(self.mask_metadata.device)

    def _announce_masks(self) -> None:
        provenance = self.masks_provenance()
        if provenance is None:
            logger.warning("the checkpoint holds no attention masks and --attention-masks names none")
        else:
            logger.info(f"attention masks {provenance['masks_sha256'][:12]}: {describe_sparsity(provenance)}")
        self._logged_sparsity = effective_sparsity(provenance)

    # -- logs ---------------------------------------------------------------------------------------------------------

    def set_num_updates(self, num_updates):
        """fairseq's hook before each training step: adds ``pruned_KIND``, the effective sparsity, to its metrics.

        What is logged inside a training step reaches every progress bar of fairseq: json, simple and tqdm, TensorBoard,
        Weights & Biases, Aim, AzureML.
        """
        super().set_num_updates(num_updates)
        for kind, share in self._logged_sparsity.items():
            metrics.log_scalar(f"pruned_{kind}", share, weight=0, priority=850, round=4)


LAYERS_TO_KEEP = ("encoder_layers_to_keep", "decoder_layers_to_keep")
DAMAGED_MASKS = (
    "the masks in this checkpoint do not match the SHA-256 stored with them; it is damaged, or an average of "
    "checkpoints with different masks"
)


def encode_provenance(provenance: dict[str, Any]) -> Tensor:
    """Return a JSON document as int64 (n,), one character each."""
    return torch.tensor([ord(c) for c in json.dumps(provenance, sort_keys=True)], dtype=torch.int64)


def decode_provenance(codes: Tensor | None) -> dict[str, Any] | None:
    """Invert :func:`encode_provenance`; None for an absent or empty tensor.

    Raises:
        ArtifactError: if the codes are no JSON document.
    """
    if codes is None or codes.numel() == 0:
        return None
    try:
        return json.loads("".join(map(chr, codes.tolist())))
    except ValueError as error:
        raise ArtifactError(DAMAGED_MASKS) from error


def _erase_mask_path(cfg) -> None:
    """Set ``attention_masks`` to None in *cfg* and in the run's configuration that it was merged from."""
    cfg.attention_masks = None
    parent = cfg._get_parent() if isinstance(cfg, DictConfig) else None
    if parent is not None and parent.get("model") is not None:
        parent.model.attention_masks = None


def effective_sparsity(provenance: dict[str, Any] | None) -> dict[str, float]:
    """Return the effective sparsity of each kind, in [0, 1]; empty without masks."""
    return {kind: value["effective"] for kind, value in (provenance or {}).get("sparsity", {}).items()}


def describe_sparsity(provenance: dict[str, Any]) -> str:
    """Return e.g. ``effective sparsity encoder_self 50.0%, cross 49.9% (effective, granularity 1)``."""
    procedure = provenance.get("procedure", {})
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in effective_sparsity(provenance).items())
    return f"effective sparsity {shares} ({procedure.get('procedure')}, granularity {procedure.get('granularity')})"


def describe_caches(model: PrunedTransformerModel) -> str:
    """Return what the caches of decoding hold of a target and a source as long as the recorded range of the masks."""
    ends: dict[AttentionKind, list[Tensor]] = {AttentionKind.DECODER_SELF: [], AttentionKind.CROSS: []}
    for (kind, _), module in attention_sites(model):
        if kind in ends:
            ends[kind].append(module.last_rows(*module.mask_range.tolist()))
    alive, positions = peak_share(ends[AttentionKind.DECODER_SELF])
    stored = sum(int((last >= 0).sum()) for last in ends[AttentionKind.CROSS])
    columns = sum(last.numel() for last in ends[AttentionKind.CROSS])

    def saving(part: int, whole: int, what: str) -> str:
        return f"{part:,} of {whole:,} {what}" + (f" ({1 - part / whole:.1%} less)" if whole else "")

    return (
        "caches hold what a coming mask row of the head keeps: decoder self-attention at most "
        f"{saving(alive, positions, 'positions')}, cross-attention {saving(stored, columns, 'source columns')}, over "
        "all heads and layers, for texts as long as the recorded range"
    )


# The same sizes, and so the same functions, as fairseq's.
for _name in (
    "transformer_iwslt_de_en",
    "transformer_wmt_en_de",
    "transformer_wmt_en_de_big",
    "transformer_vaswani_wmt_en_de_big",
    "transformer_vaswani_wmt_en_fr_big",
    "transformer_tiny",
):
    _architecture = getattr(transformer_legacy, "tiny_architecture" if _name == "transformer_tiny" else _name)
    register_model_architecture("pruned_transformer", f"pruned_{_name}")(_architecture)
