"""The registered model ``pruned_roberta`` and its architectures: fairseq's RoBERTa with pruned attention."""

from __future__ import annotations

import argparse
from unittest import mock

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, register_model, register_model_architecture
from fairseq.models.roberta import model as stock
from fairseq.models.transformer import TransformerConfig
from fairseq.modules.transformer_sentence_encoder import init_bert_params

from ap_fairseq.files import UserError
from ap_fairseq.model.config import PruningOptions
from ap_fairseq.model.layers import PrunedTransformerEncoder
from ap_fairseq.model.pruned_model import PrunedModel


@register_model("pruned_roberta")
class PrunedRobertaModel(PrunedModel, stock.RobertaModel):
    """fairseq's RoBERTa whose self-attention is pruned by global masks; row 0 is its start symbol."""

    @staticmethod
    def add_args(parser):
        """Add the model's flags; defaults are left to the architecture."""
        stock.RobertaModel.add_args(parser)
        gen_parser_from_dataclass(parser, PruningOptions(), delete_default=True)

    @classmethod
    def build_model(cls, cfg, task):
        """Build the model and, if ``attention_masks`` names a file, set its masks.

        Raises:
            ArtifactError: if the masks cannot be read or were made for another architecture or dictionary.
            UserError: for ``--mha-heads-to-keep`` and ``--ddp-backend fully_sharded``.
        """
        args, masks = cls.take_options(cfg)
        if getattr(args, "mha_heads_to_keep", -1) != -1:
            raise UserError(
                f"--mha-heads-to-keep {args.mha_heads_to_keep}: masks belong to heads that fairseq would remove as it "
                "loads a checkpoint; leave it out"
            )
        with mock.patch.object(stock, "RobertaEncoder", PrunedRobertaEncoder):
            model = super().build_model(args, task)
        if isinstance(cfg, argparse.Namespace):  # what checkpoints store, however long the blocks are that follow
            cfg.max_positions = args.max_positions
        model.start_with(args, masks, task)
        return model


class PrunedRobertaEncoder(stock.RobertaEncoder):
    """fairseq's RoBERTa encoder over pruned layers."""

    def build_encoder(self, args, dictionary, embed_tokens):
        encoder = PrunedTransformerEncoder(TransformerConfig.from_namespace(args), dictionary, embed_tokens)
        encoder.apply(init_bert_params)
        return encoder


def tiny_architecture(args) -> None:
    """Two layers of width 64, as fairseq's ``transformer_lm_gpt2_tiny`` has: for tests."""
    args.encoder_layers = getattr(args, "encoder_layers", 2)
    args.encoder_embed_dim = getattr(args, "encoder_embed_dim", 64)
    args.encoder_ffn_embed_dim = getattr(args, "encoder_ffn_embed_dim", 64)
    args.encoder_attention_heads = getattr(args, "encoder_attention_heads", 2)
    stock.base_architecture(args)


# The same sizes, and so the same functions, as fairseq's.
for _name, _model in list(ARCH_MODEL_REGISTRY.items()):
    if _model is stock.RobertaModel:
        register_model_architecture("pruned_roberta", f"pruned_{_name}")(ARCH_CONFIG_REGISTRY[_name])
register_model_architecture("pruned_roberta", "pruned_roberta_tiny")(tiny_architecture)
