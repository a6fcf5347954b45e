"""fairseq's generator for ``--print-alignment``, with the search on the device.

The search itself computes no attention weights: one pass over its finished hypotheses does, all positions at once. The
mask row of a position is that of the step which decoded it, so the weights are those of the steps.
"""

from __future__ import annotations

import torch
from fairseq.data import data_utils
from fairseq.sequence_generator import SequenceGeneratorWithAlignment
from torch import Tensor

from ap_fairseq.files import UserError
from ap_fairseq.search.generator import TURN, PrunedSequenceGenerator
from ap_fairseq.search.running import EncoderOuts

MAX_ELEMENTS = 1 << 26  # of attention weights and activations of a layer that are computed at a time


class PrunedSequenceGeneratorWithAlignment(SequenceGeneratorWithAlignment, PrunedSequenceGenerator):
    """`PrunedSequenceGenerator` whose hypotheses have an ``alignment``, as fairseq prints it.

    The weights are those of ``--alignment-layer`` and ``--alignment-heads``; where the model names none, the mean over
    all heads of the last layer, as in fairseq.

    Args:
        print_alignment: ``hard`` or ``soft``; the other arguments are fairseq's.

    Raises:
        UserError: for language models.
    """

    def __init__(self, models, tgt_dict, left_pad_target=False, print_alignment="hard", **kwargs):
        if not all(hasattr(model, "encoder") for model in models):
            raise UserError("--print-alignment: a language model has no cross-attention to align by; leave it out")
        super().__init__(models, tgt_dict, left_pad_target, print_alignment, **kwargs)
        self.hard = print_alignment == "hard"

    @torch.no_grad()
    def generate(self, models, sample, **kwargs):
        """As fairseq's; only searches in its own loop add the ``attention`` itself."""
        prefix = kwargs.get("prefix_tokens")
        if self.fallback_reason(kwargs.get("constraints")) is not None:
            return super().generate(models, sample, **kwargs)
        with TURN:  # the next search may overwrite the output of the encoders
            return self._search_and_align(sample, prefix, kwargs.get("bos_token"))

    def _search_and_align(self, sample: dict, prefix: Tensor | None, bos_token: int | None) -> list[list[dict]]:
        arrays, encoder_outs = self.search_on_device(sample, prefix, bos_token)
        found = arrays.lists()
        source, first_token = sample["net_input"]["src_tokens"], self.eos if bos_token is None else bos_token
        hypotheses = [(number, h) for number, sentence in enumerate(found) for h in sentence]
        longest = max(h["tokens"].numel() for _, h in hypotheses)
        sides = [model.cfg.decoder for model in self.model.models]
        per_token = max(side.attention_heads * source.size(1) + side.ffn_embed_dim for side in sides)
        size = max(1, MAX_ELEMENTS // (longest * per_token))
        for start in range(0, len(hypotheses), size):
            self._align(hypotheses[start : start + size], source, encoder_outs, first_token)
        return found

    def _align(
        self, hypotheses: list[tuple[int, dict]], source: Tensor, encoder_outs: EncoderOuts, first_token: int
    ) -> None:
        """Add the alignments of hypotheses, each with the number of its sentence."""
        sentence = torch.tensor([number for number, _ in hypotheses], device=source.device)
        tokens = data_utils.collate_tokens([h["tokens"] for _, h in hypotheses], self.pad).to(source.device)
        previous = tokens.roll(1, 1)
        previous[:, 0] = first_token
        previous[:, 1:].masked_fill_(tokens[:, 1:].eq(self.pad), self.pad)
        weights = torch.stack(
            [
                attention_weights(model, encoder_out, sentence, previous)
                for model, encoder_out in zip(self.model.models, encoder_outs, strict=True)
            ]
        ).mean(0)
        source = source[sentence]
        if self.hard:
            words = hard_alignment(weights, source, self.pad, self.eos).tolist()
            for (_, h), aligned in zip(hypotheses, words, strict=True):
                n = int(h["tokens"].ne(self.eos).sum())
                h["alignment"] = list(zip(aligned[:n], range(n), strict=True)) if aligned[0] >= 0 else []
        else:
            weights, source, tokens = weights.cpu(), source.cpu(), tokens.cpu()
            for (_, h), *parts in zip(hypotheses, weights, source, tokens, strict=True):
                h["alignment"] = self.extract_alignment(*parts, self.pad, self.eos)


def attention_weights(model, encoder_out: dict, sentence: Tensor, previous: Tensor) -> Tensor:
    """Return the cross-attention weights by which hypotheses are aligned, (N, T, S), in the caller's order of columns.

    Args:
        sentence: int64 (N,), the sentence of each hypothesis in *encoder_out*.
        previous: int64 (N, T), their tokens before each position, padded on the right.

    Raises:
        UserError: the model has no cross-attention.
    """
    layer, heads = model.cfg.alignment_layer, model.cfg.alignment_heads
    _, extra = model.decoder.extract_features(
        previous,
        encoder_out=model.encoder.reorder_encoder_out(encoder_out, sentence),
        alignment_layer=model.decoder.num_layers - 1 if layer is None else layer,
        alignment_heads=heads,
    )
    weights = extra["attn"][0]
    if weights is None:
        raise UserError("--print-alignment: the model has no cross-attention to align by (--no-cross-attention)")
    return weights


def hard_alignment(weights: Tensor, source: Tensor, pad: int, eos: int) -> Tensor:
    """Find the source token with the largest weight at each position, as fairseq's ``extract_hard_alignment``.

    Args:
        weights: (N, T, S).
        source: int64 (N, S), padded anywhere.

    Returns:
        int64 (N, T), counted without padding and *eos*; -1 where a source has nothing else.
    """
    words = source.ne(pad) & source.ne(eos)
    number = words.cumsum(1) - 1
    best = weights.masked_fill(~words[:, None], float("-inf")).argmax(2)
    return number.gather(1, best).masked_fill(~words.any(1, keepdim=True), -1)
