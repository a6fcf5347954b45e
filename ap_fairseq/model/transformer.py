"""The registered model ``pruned_transformer`` and its architectures: fairseq's transformer with pruned attention."""

from __future__ import annotations

import argparse
import logging

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerConfig, TransformerModelBase, transformer_legacy

from ap_fairseq.files import UserError
from ap_fairseq.model.config import PrunedTransformerConfig
from ap_fairseq.model.layers import PrunedTransformerDecoder, PrunedTransformerEncoder
from ap_fairseq.model.pruned_model import PrunedModel
from ap_fairseq.model.training_graphs import CapturedUpdates

logger = logging.getLogger(__name__)


@register_model("pruned_transformer", dataclass=PrunedTransformerConfig)
class PrunedTransformerModel(CapturedUpdates, PrunedModel, TransformerModelBase):
    """fairseq's transformer whose attention is pruned by global masks."""

    def __init__(self, cfg, encoder, decoder):
        super().__init__(cfg, encoder, decoder)
        self._use_graphs = cfg.cuda_graphs == "auto"

    @classmethod
    def add_args(cls, parser):
        """Add the model's flags; defaults are left to the architecture."""
        gen_parser_from_dataclass(parser, PrunedTransformerConfig(), delete_default=True)

    @classmethod
    def build_model(cls, cfg, task):
        """Build the model and, if ``attention_masks`` names a file, set its masks.

        Raises:
            ArtifactError: if the masks cannot be read or were made for another architecture or dictionary.
            UserError: for ``--left-pad-target``, ``--ddp-backend fully_sharded``, and alignments of a layer or heads
                that the model does not have.
        """
        if getattr(task.cfg, "left_pad_target", False):
            raise UserError("--left-pad-target is set; masks count tokens from column 0, so leave targets right-padded")
        args, masks = cls.take_options(cfg)
        transformer_legacy.base_architecture(args)
        _require_alignment(args)
        model = super().build_model(TransformerConfig.from_namespace(args), task)
        if getattr(task.cfg, "load_alignments", False):
            model.decoder.guided_alignment = True
            logger.info("guided alignment: links to cells that every head prunes add a constant to the loss")
        model.start_with(args, masks, task)
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
        """As fairseq's model; updates are replayed as CUDA graphs where that is possible, without states of layers.

        Attention weights are returned where somebody reads them (:meth:`PrunedTransformerDecoder.extract_features`).
        """
        asks_weights = self.decoder.alignment_needed or (alignment_layer, alignment_heads) != (None, None)
        replayed = None if asks_weights else self.replayed(src_tokens, prev_output_tokens, features_only)
        return replayed or super().forward(
            src_tokens,
            src_lengths,
            prev_output_tokens,
            return_all_hiddens,
            features_only,
            alignment_layer,
            alignment_heads,
        )


def _require_alignment(args: argparse.Namespace) -> None:
    for name, value, first, last in (
        ("--alignment-layer", args.alignment_layer, 0, args.decoder_layers - 1),
        ("--alignment-heads", args.alignment_heads, 1, args.decoder_attention_heads),
    ):
        if value is not None and not first <= value <= last:
            raise UserError(f"{name} {value}: the decoder of this model has {first} to {last}")


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
