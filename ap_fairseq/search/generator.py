"""fairseq's sequence generator whose beam search over pruned transformers runs on the device."""

from __future__ import annotations

import functools
import logging
import math

import torch
from fairseq.search import BeamSearch
from fairseq.sequence_generator import SequenceGenerator

from ap_fairseq.files import UserError
from ap_fairseq.model.attention import PrunedMultiheadAttention, decoding_at_most
from ap_fairseq.model.transformer import PrunedTransformerModel
from ap_fairseq.search.static_decoder import AT_MAX_LEN, BEFORE_MIN_LEN, Capacity, StaticDecoder, bucket
from ap_fairseq.sites import AttentionKind, attention_sites

logger = logging.getLogger(__name__)


class PrunedSequenceGenerator(SequenceGenerator):
    """fairseq's generator; beam search over pruned transformers runs on static buffers and CUDA graphs.

    Other searches and models use fairseq's own loop, which is logged once with the reason; so does a CPU without
    kernels, where batches rounded up to the size of buffers only cost time.
    """

    needs_kernels = True  # tests of the rules of the search run without

    def __init__(self, models, tgt_dict, **kwargs):
        super().__init__(models, tgt_dict, **kwargs)
        self._decoder: StaticDecoder | None = None
        # Penalties of every word that hold for all hypotheses (3, V): usually, too early to end, and at the end.
        penalty = torch.zeros(3, self.vocab_size)
        penalty[:, self.pad] = -math.inf
        penalty[:, self.unk] -= self.unk_penalty
        if self.token_indices_to_suppress is not None:
            penalty[:, self.token_indices_to_suppress] = -math.inf
        penalty[BEFORE_MIN_LEN, self.eos] = -math.inf
        others = torch.arange(self.vocab_size) != self.eos
        penalty[AT_MAX_LEN, others] = -math.inf
        self.penalty = penalty

    def _not_covered(self, device: torch.device, prefix_tokens, constraints) -> str | None:
        """Why fairseq's own loop is needed, or None."""
        if type(self.search) is not BeamSearch:
            return f"the search {type(self.search).__name__}"
        if not all(isinstance(model, PrunedTransformerModel) for model in self.model.models):
            return "an ensemble with models other than pruned_transformer"
        if not all(model.decoder.layers for model in self.model.models):
            return "a decoder without layers"
        if any(model.decoder.adaptive_softmax is not None for model in self.model.models):
            return "adaptive softmax"
        if not all(layer.self_attn.self_attention for model in self.model.models for layer in model.decoder.layers):
            return "attention to source and target at once (--cross-self-attention)"
        if any(module.dropout_module.apply_during_inference for _, module in self._sites()):
            return "dropout during inference (--retain-dropout)"
        if any(module.dynamic is not None for _, module in self._sites()):
            return "pruning at inference time (--attention-top-k, --attention-threshold)"
        if 2 * self.beam_size >= self.vocab_size:
            return f"a beam of {self.beam_size} with {self.vocab_size} words"
        if self.needs_kernels and device.type == "cpu" and not self.runs_kernels(device):
            return "decoding on a CPU without Triton kernels"
        options = {
            "prefix tokens (--prefix-size)": prefix_tokens is not None,
            "constraints": constraints is not None,
            "a language model": self.lm_model is not None,
            "--no-repeat-ngram-size": self.repeat_ngram_blocker is not None,
            "--match-source-len": self.match_source_len,
        }
        return next((name for name, given in options.items() if given), None)

    def runs_kernels(self, device: torch.device) -> bool:
        """Whether steps of decoding on *device* run on the kernels."""
        module, dtype = self._decoder_modules()[0], next(self.model.models[0].parameters()).dtype
        return module.runs_kernels(dtype, device)

    def _pruned_models(self) -> list[PrunedTransformerModel]:
        return [model for model in self.model.models if isinstance(model, PrunedTransformerModel)]

    def _sites(self):
        return [site for model in self._pruned_models() for site in attention_sites(model)]

    def _decoder_modules(self) -> list[PrunedMultiheadAttention]:
        return [module for (kind, _), module in self._sites() if kind is not AttentionKind.ENCODER_SELF]

    @torch.no_grad()
    def _generate(self, sample, prefix_tokens=None, constraints=None, bos_token=None):
        net_input = sample["net_input"]
        source = net_input["src_tokens"]
        max_len = min(int(self.max_len_a * source.size(1) + self.max_len_b), self.max_len - 1)
        if self.match_source_len:
            max_len = source.size(1)
        for model in self._pruned_models():  # --eval-bleu does not prepare them for inference
            model.log_cache_savings()
        reason = self._not_covered(source.device, prefix_tokens, constraints)
        if reason is not None:
            log_fallback(reason)
            with decoding_at_most(max_len + 1, self._decoder_modules()):
                return super()._generate(sample, prefix_tokens, constraints, bos_token)

        if self.min_len > max_len:
            raise UserError(f"--min-len {self.min_len} is above the maximum length {max_len} of this batch")
        encoder_outs = self.model.forward_encoder(net_input)
        needed = Capacity(
            sentences=bucket(source.size(0)),
            source_length=max(256, bucket(source.size(1))),
            positions=min(max(256, bucket(max_len + 1)), self.max_len),
        )
        if self._decoder is None or not self._decoder.serves(needed):
            capacity = needed if self._decoder is None else needed.joined(self._decoder.capacity)
            self._decoder = None  # its memory is free before the next one is made
            with torch.inference_mode(False):  # a later batch may come outside of it
                self._decoder = StaticDecoder(self, capacity, source.device)
        return self._decoder.search(encoder_outs, max_len, self.eos if bos_token is None else bos_token)


@functools.cache
def log_fallback(reason: str) -> None:
    """Log, once in a process, that a search is fairseq's."""
    logger.info(f"fairseq's own generator is used: {reason} is not covered by pruned_translation's")
