"""The registered model ``pruned_transformer_lm`` and its architectures: fairseq's language model, pruned."""

from __future__ import annotations

import argparse
import logging
from unittest import mock

from fairseq.data import Dictionary
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, register_model, register_model_architecture
from fairseq.models import transformer_lm as stock
from fairseq.models.transformer import TransformerConfig
from omegaconf import OmegaConf
from torch import Tensor, nn

from ap_fairseq.files import UserError
from ap_fairseq.model.config import PrunedLanguageModelConfig
from ap_fairseq.model.layers import PrunedTransformerDecoder
from ap_fairseq.model.pruned_model import PrunedModel
from ap_fairseq.model.training_graphs import CapturedUpdates

logger = logging.getLogger(__name__)

SCALES = ("scale_fc", "scale_attn", "scale_heads", "scale_resids")


@register_model("pruned_transformer_lm", dataclass=PrunedLanguageModelConfig)
class PrunedLanguageModel(CapturedUpdates, PrunedModel, stock.TransformerLanguageModel):
    """fairseq's transformer language model whose self-attention is pruned by global masks.

    A mask row is a token's place in the block that the model reads, of ``--tokens-per-sample`` or of the context window
    of ``fairseq-eval-lm``.
    """

    def __init__(self, decoder: PrunedTransformerDecoder):
        super().__init__(decoder)
        self.cfg = decoder.cfg
        self._use_graphs = self.cfg.cuda_graphs == "auto"

    @classmethod
    def add_args(cls, parser):
        """Add the model's flags; defaults are left to the architecture."""
        gen_parser_from_dataclass(parser, PrunedLanguageModelConfig(), delete_default=True)

    @classmethod
    def build_model(cls, cfg, task):
        """Build the model and, if ``attention_masks`` names a file, set its masks.

        Raises:
            ArtifactError: if the masks cannot be read or were made for another architecture or dictionary.
            UserError: for ``--base-layers`` and ``--ddp-backend fully_sharded``.
        """
        if cfg.base_layers:
            raise UserError(f"--base-layers {cfg.base_layers}: pruned_transformer_lm has no BASE layers; leave it out")
        args, masks = cls.take_options(cfg)
        if OmegaConf.is_config(cfg):  # in which fairseq's decoder does not find them
            for name in [name for name in SCALES if getattr(args, name)]:
                logger.warning(f"--{name.replace('_', '-')} has no effect, as in fairseq's own transformer_lm")
                setattr(args, name, False)
        # Embeddings are built and tied as fairseq does it, for its adaptive softmax too; only the decoder is ours.
        with mock.patch.object(stock, "TransformerDecoder", _build_decoder):
            model = super().build_model(args, task)
        model.start_with(args, masks, task)
        return model

    def forward(self, src_tokens: Tensor, features_only: bool = False, **kwargs):
        """As fairseq's model; updates are replayed as CUDA graphs where that is possible, without states of layers."""
        asks_more = kwargs.keys() - {"src_lengths", "return_all_hiddens"}
        replayed = None if asks_more else self.replayed(None, src_tokens, features_only)
        return replayed or super().forward(src_tokens, features_only=features_only, **kwargs)


def _build_decoder(
    args: argparse.Namespace, dictionary: Dictionary, embed_tokens: nn.Module, no_encoder_attn: bool
) -> PrunedTransformerDecoder:
    return PrunedTransformerDecoder(TransformerConfig.from_namespace(args), dictionary, embed_tokens, no_encoder_attn)


# The same sizes, and so the same functions, as fairseq's.
for _name, _model in list(ARCH_MODEL_REGISTRY.items()):
    if _model is stock.TransformerLanguageModel and _name != "transformer_lm":
        register_model_architecture("pruned_transformer_lm", f"pruned_{_name}")(ARCH_CONFIG_REGISTRY[_name])
