"""The shared vocabulary of every stage: attention kinds, attention sites, and how to find them in a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from ap_fairseq.files import UserError

if TYPE_CHECKING:  # commands that only read files run without fairseq
    from fairseq.models import BaseFairseqModel
    from fairseq.modules import MultiheadAttention
    from torch import nn


class AttentionKind(StrEnum):
    """Where an attention module sits in a transformer.

    A translation model has all three kinds, a language model DECODER_SELF alone, RoBERTa ENCODER_SELF alone.
    """

    ENCODER_SELF = "encoder_self"
    DECODER_SELF = "decoder_self"
    CROSS = "cross"

    @property
    def causal(self) -> bool:
        """Whether only cells with key position j <= query position i exist."""
        return self is AttentionKind.DECODER_SELF

    @property
    def flag(self) -> str:
        """The spelling used on command lines, e.g. ``encoder-self``."""
        return self.value.replace("_", "-")


class AttentionSite(NamedTuple):
    """One attention module of a model."""

    kind: AttentionKind
    layer: int


def layers_of(part: nn.Module | None) -> list[Any]:
    """Return all layers of an encoder or decoder: to iterate fairseq's list in training mode drops some at random."""
    layers = getattr(part, "layers", ())
    return [layers[i] for i in range(len(layers))]


def attention_sites(model: BaseFairseqModel) -> Iterator[tuple[AttentionSite, MultiheadAttention]]:
    """Yield every attention module of a fairseq transformer, language model or RoBERTa with its site.

    A decoder with ``cross_self_attention`` attends to source and target at once; such modules belong to none of the
    three kinds and are left out.
    """
    encoder, decoder = (getattr(model, part, None) for part in ("encoder", "decoder"))
    for layer, module in enumerate(layers_of(getattr(encoder, "sentence_encoder", encoder))):  # the former of RoBERTa
        yield AttentionSite(AttentionKind.ENCODER_SELF, layer), module.self_attn
    for layer, module in enumerate(layers_of(decoder)):
        if module.self_attn.self_attention:
            yield AttentionSite(AttentionKind.DECODER_SELF, layer), module.self_attn
        if module.encoder_attn is not None:
            yield AttentionSite(AttentionKind.CROSS, layer), module.encoder_attn


def architecture(model: BaseFairseqModel) -> dict[str, list[int]]:
    """Return ``{kind: [layers, heads]}`` of a model, the shape that statistics and masks of it have."""
    shape: dict[str, list[int]] = {}
    for site, module in attention_sites(model):
        layers, _ = shape.get(site.kind.value, [0, 0])
        shape[site.kind.value] = [layers + 1, module.num_heads]
    return shape


def describe_architecture(shape: Mapping[str, list[int]]) -> str:
    """Return e.g. ``encoder_self 6 layers x 4 heads, cross 6 layers x 4 heads``."""
    return ", ".join(f"{kind} {layers} layers x {heads} heads" for kind, (layers, heads) in shape.items())


def per_kind(name: str, text: str | float | None) -> dict[AttentionKind, float]:
    """Parse ``8``, for all kinds, or ``encoder_self=4,cross=3``.

    Raises:
        UserError: for anything else, naming the option *name*.
    """
    if text in (None, ""):
        return {}
    values: dict[AttentionKind, float] = {}
    try:
        if "=" not in str(text):
            return dict.fromkeys(AttentionKind, float(text))
        for part in str(text).split(","):
            kind, value = part.split("=")
            site_kind = AttentionKind(kind.strip())
            if site_kind in values:
                raise UserError(f"{name} is {text!r}, which gives {site_kind} twice; give it once")
            values[site_kind] = float(value)
        return values
    except ValueError as error:
        kinds = ", ".join(AttentionKind)
        raise UserError(
            f"{name} is {text!r}, expected a number, or numbers per kind such as cross=4 (kinds: {kinds})"
        ) from error
