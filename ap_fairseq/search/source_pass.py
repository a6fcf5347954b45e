"""The encoders and the caches of cross-attention for a few short sources, as a CUDA graph.

A sentence alone keeps a GPU busy for a tenth of the time that the host takes to launch the hundred kernels before the
first step of its search.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ap_fairseq.cuda_graphs import GraphPool
from ap_fairseq.model.attention import PrunedMultiheadAttention
from ap_fairseq.model.kv_cache import SourceSlots
from ap_fairseq.search.rules import SearchRules
from ap_fairseq.search.running import EncoderOuts
from ap_fairseq.search.stored_columns import StoredColumns
from triton_ops import Layout

MAX_TOKENS = 512  # of all sources: more keep a GPU busy

Slots = dict[PrunedMultiheadAttention, SourceSlots]


class SourceDecoder(Protocol):
    """What a pass asks of the decoder whose caches it fills; see `static_decoder.StaticDecoder`."""

    rules: SearchRules
    capture: bool
    source_pool: GraphPool
    stored: StoredColumns

    def encode(self, net_input: dict[str, Tensor]) -> EncoderOuts: ...
    def encoder_layouts(self) -> list[Layout | None]: ...
    def reserve(self, module: PrunedMultiheadAttention, n_slots: int) -> None: ...
    def fill_sources(self, encoder_outs: EncoderOuts, slots: Slots) -> None: ...


class SourcePass:
    """What comes before the steps of a search, for *n* sources of at most *size* tokens.

    Columns beyond a sentence's end have slots, too, so that slots are the same for all sources; attention looks at the
    lengths.

    Args:
        decoder: whose caches are filled. It owns the pass, so that the pass keeps no reference to it.
        n: sentences.
        size: columns that they are padded to.
        max_len: the longest search that may follow.
    """

    def __init__(self, decoder: SourceDecoder, n: int, size: int, max_len: int, device: torch.device):
        with torch.inference_mode(False):  # a later batch may come outside of it
            self.tokens = torch.full((n, size), decoder.rules.pad, dtype=torch.int64, device=device)
        every = torch.ones(n, size, dtype=torch.bool, device=device)
        self.slots = decoder.stored.slots(every, max_len)
        for module, own in self.slots.items():
            decoder.reserve(module, own.column.numel())
        self.graph: torch.cuda.CUDAGraph | None = None
        self.encoder_outs: EncoderOuts = []
        self.layouts = decoder.encoder_layouts()

    def __call__(self, decoder: SourceDecoder, tokens: Tensor) -> EncoderOuts:
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

    def _run(self, decoder: SourceDecoder) -> None:
        self.encoder_outs = decoder.encode({"src_tokens": self.tokens})
        decoder.fill_sources(self.encoder_outs, self.slots)

    def is_valid(self, decoder: SourceDecoder) -> bool:
        """Whether the encoders' masks are those that the graph reads."""
        return self.layouts == decoder.encoder_layouts()

    def _cut(self, size: int) -> EncoderOuts:
        """Return the encoders' results for *size* columns."""
        time_first, by_sentence = ("encoder_out",), ("encoder_padding_mask", "encoder_embedding")
        return [
            {
                name: [x[:size] if name in time_first else x[:, :size] if name in by_sentence else x for x in values]
                for name, values in encoder_out.items()
            }
            for encoder_out in self.encoder_outs
        ]
