"""The configurations of the pruned models: fairseq's flags, flat, and those of this plugin."""

import dataclasses
from typing import Any, Optional  # fairseq's parser reads Optional[X], not X | None

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.dataclass.constants import StrEnum
from fairseq.models.transformer import TransformerConfig
from fairseq.models.transformer.transformer_config import DecoderConfig, EncDecBaseConfig, QuantNoiseConfig
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from omegaconf import II

from triton_ops.api import BACKENDS

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


# Checkpoints of version 0.1 call sdpa "eager": a second name of that choice, which the command line does not offer.
_Backend = StrEnum("Choices", {name: name for name in BACKENDS} | {"eager": "sdpa"})

InheritedConfig = dataclasses.make_dataclass("InheritedConfig", _flat_fields(), bases=(FairseqDataclass,))
InheritedConfig.__module__ = __name__


@dataclasses.dataclass
class PruningOptions(FairseqDataclass):
    """The flags that every pruned model has."""

    attention_masks: Optional[str] = dataclasses.field(
        default=None,
        metadata={
            "help": "pruning masks to start training with (a file of ap-masks); checkpoints carry them from then "
            "on. Given together with a pruned checkpoint, the file replaces the checkpoint's masks. none: keep "
            "every cell, as a dense model does, or what the masks of the checkpoint keep"
        },
    )
    attention_backend: _Backend = dataclasses.field(
        default="auto",
        metadata={
            "help": "what computes attention: the Triton kernels, torch's attention under a dense mask (sdpa), or "
            "whichever suits the device"
        },
    )
    attention_top_k: Optional[str] = dataclasses.field(
        default=None,
        metadata={
            "help": "for analysis: each query attends to its k best keys only (Gupta et al. 2021); a number, or "
            "numbers per kind such as encoder_self=4,cross=3"
        },
    )
    attention_threshold: Optional[str] = dataclasses.field(
        default=None,
        metadata={
            "help": "for analysis: attention probabilities below this become 0 (Ji et al. 2021); a number, or "
            "numbers per kind"
        },
    )
    attention_log_bits: int = dataclasses.field(
        default=0,
        metadata={
            "help": "for analysis: round the probabilities above --attention-threshold to 2^N - 1 values on a log "
            "scale (Ji et al. 2021 use 3); 0 for no rounding"
        },
    )


@dataclasses.dataclass
class DecoderOptions(PruningOptions):
    """Those of a pruned model with a decoder, whose training can be captured."""

    cuda_graphs: ChoiceEnum(("auto", "off")) = dataclasses.field(
        default="auto",
        metadata={
            "help": "on a GPU, replay training updates as CUDA graphs, one for each shape of batch; off runs every "
            "update directly"
        },
    )


@dataclasses.dataclass
class PrunedTransformerConfig(DecoderOptions, InheritedConfig):
    """fairseq's TransformerConfig with flat names, plus the flags of this plugin."""

    alignment_layer: Optional[int] = dataclasses.field(
        default=None,
        metadata={
            "help": "decoder layer whose cross-attention learns the alignments of --load-alignments, from 0 (default: "
            "the last)"
        },
    )
    alignment_heads: Optional[int] = dataclasses.field(
        default=None, metadata={"help": "how many heads of that layer learn alignments, from the first (default: all)"}
    )


@dataclasses.dataclass
class PrunedLanguageModelConfig(DecoderOptions, TransformerLanguageModelConfig):
    """The flags of fairseq's ``transformer_lm``, plus those of this plugin."""


OWN_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(PrunedTransformerConfig)
    if field.name not in InheritedConfig.__dataclass_fields__
}
