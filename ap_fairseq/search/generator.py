"""fairseq's sequence generator whose searches over pruned models run on the device."""

from __future__ import annotations

import functools
import logging
import threading

import torch
from fairseq.modules import CharacterTokenEmbedder
from fairseq.search import DiverseBeamSearch
from fairseq.sequence_generator import EnsembleModelWithAlignment, SequenceGenerator
from torch import Tensor

from ap_fairseq.files import UserError
from ap_fairseq.model.cpu_linear import can_pack, use_int8
from ap_fairseq.model.kv_cache import limit_steps
from ap_fairseq.model.language_model import PrunedLanguageModel
from ap_fairseq.model.pruned_model import PrunedModel
from ap_fairseq.model.transformer import PrunedTransformerModel
from ap_fairseq.search.capacity import Capacity, bucket
from ap_fairseq.search.host_decoder import HostDecoder
from ap_fairseq.search.hypotheses import Hypotheses
from ap_fairseq.search.restrictions import NGramBlock
from ap_fairseq.search.rules import SearchRules
from ap_fairseq.search.running import FOLLOWING, Batch, EncoderOuts, RunningSearch
from ap_fairseq.search.static_decoder import StaticDecoder, decoder_modules
from ap_fairseq.search.strategies import covers
from ap_fairseq.sites import attention_sites

logger = logging.getLogger(__name__)

TURN = threading.RLock()  # of the searches of a process: threads may share a generator and its buffers

UNWATCHED_STEPS = 8  # that the device does while the host reads a batch, or encodes one

SEARCH_OPTIONS = {  # by fairseq's search that is not covered: what chooses it
    "LexicallyConstrainedBeamSearch": "--constraints",
    "PrefixConstrainedBeamSearch": "prefix_allowed_tokens_fn",
}


class LimitedEnsemble(EnsembleModelWithAlignment):
    """fairseq's ensemble, which tells pruned decoders how many steps a search takes at most."""

    max_steps: int | None = None

    def forward_decoder(self, tokens, encoder_outs, incremental_states, temperature=1.0):
        for model, state in zip(self.models, incremental_states, strict=True):
            if self.max_steps is not None and isinstance(model, PrunedModel):
                limit_steps(state, self.max_steps)
        return super().forward_decoder(tokens, encoder_outs, incremental_states, temperature)


class PrunedSequenceGenerator(SequenceGenerator):
    """fairseq's generator; searches over pruned models run on static buffers and CUDA graphs, or on the CPU.

    Constrained searches and other models use fairseq's own loop, which is logged once with the reason.

    Args:
        cpu_int8: linear layers of the models multiply in 8-bit integers from now on. A search on a GPU or by fairseq's
            own loop then raises UserError.

    Attributes:
        nbest: hypotheses of a sentence that a search on the device returns at most; None, as at first: all, as
            fairseq's does, whose commands print --nbest of them.
        in_arrays: such a search returns :class:`Hypotheses`, not fairseq's lists; one with alignments returns lists
            all the same.
        decoder: the buffers and graphs of searches on the device; None before the first.
    """

    def __init__(self, models, tgt_dict, cpu_int8=False, **kwargs):
        super().__init__(models, tgt_dict, **kwargs)
        self.model, self.cpu_int8 = LimitedEnsemble(list(self.model.models)), cpu_int8
        if cpu_int8:
            use_int8(self.model)
        self.nbest: int | None = None
        self.in_arrays = False
        self.decoder: StaticDecoder | None = None
        self._begun: RunningSearch | None = None  # of the batch that comes next, in the buffers of the decoder
        on_gpu = next(self.model.parameters()).is_cuda
        if on_gpu and self._not_covered(None) is None and self._runs_kernels():
            from triton_ops import beam_search, ops  # noqa: F401  (takes a second, which the first batch is spared)
        if self.repeat_ngram_blocker is not None:
            self.repeat_ngram_blocker = NGramBlock(self.repeat_ngram_blocker.no_repeat_ngram_size, self.pad)

    def _not_covered(self, constraints) -> str | None:
        """Why fairseq's own loop is needed, or None."""
        models = self.model.models
        if not covers(self.search):
            name = type(self.search).__name__
            return f"the search {name} ({SEARCH_OPTIONS.get(name, 'search_strategy')})"
        if others := [
            type(x).__name__ for x in models if not isinstance(x, PrunedTransformerModel | PrunedLanguageModel)
        ]:
            return f"a model {others[0]} (ap-apply --attention-masks none converts transformers)"
        if not all(model.decoder.layers for model in models):
            return "a decoder without layers (--decoder-layers 0)"
        if any(isinstance(model.decoder.embed_tokens, CharacterTokenEmbedder) for model in models):
            return "words from their characters (--character-embeddings)"
        if not all(layer.self_attn.self_attention for model in models for layer in model.decoder.layers):
            return "attention to source and target at once (--cross-self-attention)"
        modules = [module for model in models for _, module in attention_sites(model)]
        if any(module.dropout_module.apply_during_inference for module in modules):
            return "dropout during inference (--retain-dropout)"
        if any(module.dynamic is not None for module in modules):
            return "pruning at inference time (--attention-top-k, --attention-threshold)"
        if 2 * self.beam_size >= self.vocab_size:
            return f"--beam {self.beam_size} with a vocabulary of {self.vocab_size} tokens"
        if any(module.selected is not None for module in modules):
            return "masking of heads (--head-masking)"
        options = {
            "constraints (--constraints)": constraints is not None,
            "a language model (--lm-path)": self.lm_model is not None,
        }
        return next((name for name, given in options.items() if given), None)

    def _runs_kernels(self) -> bool:
        parameter = next(self.model.parameters())
        return decoder_modules(self.model.models)[0].runs_kernels(parameter.dtype, parameter.device)

    def _decoder_class(self, device: torch.device) -> type[StaticDecoder]:
        return HostDecoder if device.type == "cpu" and not self._runs_kernels() else StaticDecoder

    def fallback_reason(self, constraints: Tensor | None) -> str | None:
        """Return why fairseq's own loop translates a batch, or None; log it."""
        reason = self._not_covered(constraints)
        if self.cpu_int8:
            self._require_int8(reason)
        if reason is not None:
            log_fallback(reason)
        return reason

    def _require_int8(self, fallback: str | None) -> None:
        """Raise UserError unless a search runs on a CPU in float32."""
        parameter = next(self.model.parameters())
        if parameter.device.type != "cpu":
            raise UserError(f"--cpu-int8 with a model on {parameter.device}: translate with --cpu, or leave it out")
        if not can_pack(parameter):
            raise UserError(
                f"--cpu-int8 with parameters in {parameter.dtype}: leave --fp16 and --bf16 out, or this flag"
            )
        if fallback is None and self._decoder_class(parameter.device) is not HostDecoder:
            fallback = "the kernels (--attention-backend triton)"
        if fallback is not None:
            raise UserError(
                f"--cpu-int8 is for the search on a CPU, which does not cover {fallback}; leave one of them out"
            )

    @torch.no_grad()
    def _generate(self, sample, prefix_tokens=None, constraints=None, bos_token=None):
        if self.fallback_reason(constraints) is None:
            found, _ = self.search_on_device(sample, prefix_tokens, bos_token, sample.get(FOLLOWING))
            return found if self.in_arrays else found.lists()
        if isinstance(self.search, DiverseBeamSearch):
            sample = {**sample, "id": None}  # by which fairseq would look up sentences of the batch
        with TURN:
            self._log_cache_savings()
            self.model.max_steps = self._limits(sample)[0] + 1
            return super()._generate(sample, prefix_tokens, constraints, bos_token)

    def _log_cache_savings(self) -> None:
        for model in self.model.models:  # --eval-bleu does not prepare them for inference
            if isinstance(model, PrunedModel):
                model.log_cache_savings()

    def _limits(self, sample: dict) -> tuple[int, Tensor]:
        """Return the maximum length of translations, and the lengths of the sources, as fairseq counts them."""
        source, lengths = sample["net_input"]["src_tokens"], sample["net_input"].get("src_lengths")
        if lengths is None:
            lengths = (source.ne(self.eos) & source.ne(self.pad)).sum(1)
        if self.match_source_len:
            return int(lengths.max()), lengths
        return min(int(self.max_len_a * source.size(1) + self.max_len_b), self.max_len - 1), lengths

    def search_on_device(
        self, sample: dict, prefix_tokens: Tensor | None, bos_token: int | None, following: dict | None = None
    ) -> tuple[Hypotheses, EncoderOuts | None]:
        """Translate a batch that needs no fallback.

        Args:
            following: the batch after this one, whose search begins while the hypotheses of this one are read.

        Returns:
            Its hypotheses and the encoders' outputs, which the search after it may overwrite.

        Raises:
            UserError: if translations may not be as long as they must be, or a sentence has none.
        """
        self._log_cache_savings()
        first_token = self.eos if bos_token is None else bos_token
        with TURN:
            batch, rules = self._batch(sample, first_token, prefix_tokens), SearchRules.from_generator(self)
            if self.min_len > batch.max_len:
                raise UserError(
                    f"--min-len {self.min_len} is above the maximum length {batch.max_len} of this batch; lower "
                    "it, or raise --max-len-b"
                )
            decoder = self._decoder_for(batch, rules)
            search, self._begun = self._begun, None  # nothing goes on with a search that was interrupted
            if search is None or not search.batch.is_same(batch) or search.marks != decoder.marks():
                search = decoder.begin(batch)
            # Random numbers belong to batches in turn; prefixes, and errors, come with their batch.
            ahead = following is not None and rules.strategy is None and prefix_tokens is None
            next_batch = self._batch(following, first_token) if ahead else None
            if (
                next_batch is None
                or self.min_len > next_batch.max_len
                or not decoder.serves(rules, self._capacity(next_batch))
            ):
                return decoder.finish(search, self.nbest)(), search.encoder_outs
            return self._finish_beside(decoder, search, next_batch), search.encoder_outs

    def _decoder_for(self, batch: Batch, rules: SearchRules) -> StaticDecoder:
        """Return a decoder with room for a batch: the last one, if that serves it."""
        needed = self._capacity(batch)
        if self.decoder is None or not self.decoder.serves(rules, needed):
            capacity = needed if self.decoder is None else needed.joined(self.decoder.capacity)
            self._begun = self.decoder = None  # its memory is free before the next one is made
            device = batch.tokens.device
            with torch.inference_mode(False):  # a later batch may come outside of it
                self.decoder = self._decoder_class(device)(self.model.models, rules, capacity, device)
        return self.decoder

    def _finish_beside(self, decoder: StaticDecoder, search: RunningSearch, next_batch: Batch) -> Hypotheses:
        """Finish a search and return what it found; before that is read, the search of the batch after it begins."""
        decoder.launch(search, _unwatched(search.batch))
        encoder_outs = decoder.encode_early(next_batch)
        read = decoder.finish(search, self.nbest)
        begun = decoder.begin(next_batch, encoder_outs)
        decoder.launch(begun, _unwatched(next_batch))
        begun.marks = decoder.marks()
        self._begun = begun
        return read()

    def _batch(self, sample: dict, first_token: int, prefix: Tensor | None = None) -> Batch:
        max_len, lengths = self._limits(sample)
        return Batch(sample["net_input"], max_len, first_token, lengths, prefix)

    def _capacity(self, batch: Batch) -> Capacity:
        n, size = batch.tokens.shape
        return Capacity(
            sentences=bucket(n),
            source_length=max(256, bucket(size)) if self.model.has_encoder() else 0,
            positions=max(min(max(256, bucket(batch.max_len + 1)), self.max_len), batch.max_len + 1),
        )


def _unwatched(batch: Batch) -> int:
    """Return how many steps of a search are launched at once, before any translation is likely to be finished."""
    return min(UNWATCHED_STEPS, batch.tokens.size(1) // 4)


FALLBACK = "fairseq's own generator is used: "


@functools.cache
def log_fallback(reason: str) -> None:
    """Log, once in a process, that fairseq's own generator searches."""
    logger.info(f"{FALLBACK}{reason} is not covered by the search on the device")
