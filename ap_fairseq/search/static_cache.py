"""KV caches over the buffers of a search on the device, which never move and whose steps the device counts."""

from __future__ import annotations

import torch
from torch import Tensor

from ap_fairseq.model.kv_cache import PagedCrossAttention, PagedSelfAttention
from ap_fairseq.search.beams import BeamSearchState
from triton_ops import append_to_pool


class StaticSelfAttentionCache(PagedSelfAttention):
    """The first *n* hypotheses of a search on the device, of the heads of one site; the device counts the steps."""

    settled = True

    def __init__(self, pool: Tensor, beams: BeamSearchState, n: int, heads: slice, projection: tuple[Tensor, Tensor]):
        super().__init__(pool, beams.state.block_table[:n], beams.offsets[heads])
        self.projection, self.device_step, self.kernels = projection, beams.state.step, beams.kernels

    def advance(self, kv: Tensor) -> None:
        if self.kernels:
            append_to_pool(kv, self.pool, self.offsets, self.device_step)
        else:
            number = torch.arange(kv.size(0), device=kv.device)
            begins = self.offsets.index_select(1, self.device_step)
            self.pool.index_put_((begins + number,), kv.permute(2, 0, 1, 3))

    def step(self) -> Tensor:
        return self.device_step


class StaticCrossAttentionCache(PagedCrossAttention):
    """The first *n* sentences of a search on the device, of the heads of one site; the device counts the steps."""

    settled = True

    def __init__(self, pool: Tensor, beams: BeamSearchState, n: int, heads: slice):
        super().__init__(pool, beams.starts[:n, heads], beams.source_offsets[heads], beams.lengths[:n])
        self.device_step, self.positions = beams.state.step, beams.state.block_table.size(1)

    def advance(self, kv: None = None) -> None:
        """Nothing: the search counts the steps."""

    def step(self) -> Tensor:
        return self.device_step

    def layout_size(self) -> tuple[int, int]:
        return self.positions, self.n_columns()
