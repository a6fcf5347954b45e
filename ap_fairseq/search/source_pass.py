"""The encoders and the caches of cross-attention for a few short sources, as a CUDA graph.

A sentence alone keeps a GPU busy for a tenth of the time that the host takes to launch the hundred kernels before the
first step of its search.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ap_fairseq.search.static_decoder import StaticDecoder

MAX_TOKENS = 512  # of all sources: more keep a GPU busy


class SourcePass:
    """What comes before the steps of a search, for so many sources of so many tokens at most.

    Columns beyond a sentence's end have slots, too, so that slots are the same for all sources; attention looks at the
    lengths.

    Args:
        decoder: whose caches are filled. It owns the pass, so that the pass keeps no reference to it.
        n: sentences.
        size: columns that they are padded to.
    """

    def __init__(self, decoder: StaticDecoder, n: int, size: int):
        device = decoder.penalties.device
        with torch.inference_mode(False):  # a later batch may come outside of it
            self.tokens = torch.full((n, size), decoder.rules.pad, dtype=torch.int64, device=device)
        every = torch.ones(n, size, dtype=torch.bool, device=device)
        self.slots = decoder.source_slots(every, decoder.capacity.positions - 1)
        for module, own in self.slots.items():
            decoder.reserve(module, own.column.numel())
        self.graph: torch.cuda.CUDAGraph | None = None
        self.encoder_outs: list[dict[str, list[Tensor]]] = []
        self.layouts = decoder.encoder_layouts()

    def __call__(self, decoder: StaticDecoder, tokens: Tensor) -> list[dict[str, list[Tensor]]]:
        """Encode *tokens*, int64 (n, S), and fill the caches; the results are overwritten by the next call."""
        size = tokens.size(1)
        self.tokens.fill_(decoder.rules.pad)[:, :size] = tokens
        if self.graph is not None:
            self.graph.replay()
            return self._cut(size)
        self._run(decoder)
        found = self._cut(size)
        self.layouts = decoder.encoder_layouts()  # of which the graph holds addresses
        if decoder.capture:
            self.graph, _ = decoder.source_pool.capture(lambda: self._run(decoder))
        return found

    def _run(self, decoder: StaticDecoder) -> None:
        self.encoder_outs = decoder.encode({"src_tokens": self.tokens})
        decoder.fill_sources(self.encoder_outs, self.slots)

    def is_valid(self, decoder: StaticDecoder) -> bool:
        """Whether the encoders' masks are those that the graph reads."""
        return self.layouts == decoder.encoder_layouts()

    def _cut(self, size: int) -> list[dict[str, list[Tensor]]]:
        """Return the encoders' results for *size* columns."""
        time_first, by_sentence = ("encoder_out",), ("encoder_padding_mask", "encoder_embedding")
        return [
            {
                name: [x[:size] if name in time_first else x[:, :size] if name in by_sentence else x for x in values]
                for name, values in encoder_out.items()
            }
            for encoder_out in self.encoder_outs
        ]
