"""Which source columns cross-attention stores, and the slots that they get."""

from __future__ import annotations

import torch
from torch import Tensor

from ap_fairseq.model.attention import PrunedMultiheadAttention
from ap_fairseq.model.kv_cache import SourceSlots, stored_columns
from ap_fairseq.search.capacity import Capacity, bucket
from triton_ops import Layout

SIZES_MEMO = 256  # lengths for which is remembered what the masks store of a source

# Of each site bool (H, size), and a key of that.
Columns = dict[PrunedMultiheadAttention, tuple[bytes, Tensor]]


class StoredColumns:
    """What cross-attention stores of sources; by the masks alone, so most batches find it computed already.

    Args:
        sites: of cross-attention.
        capacity: of the search.
    """

    def __init__(self, sites: list[PrunedMultiheadAttention], capacity: Capacity):
        self.sites, self.capacity = sites, capacity
        self._found: dict[tuple[int, int], tuple[list[Layout | None], Columns]] = {}  # for which layouts, and that

    def slots(self, real: Tensor, max_len: int) -> dict[PrunedMultiheadAttention, SourceSlots]:
        """Lay out the slots of a batch; bool *real* (B, S) says which source tokens there are. Synchronises."""
        layouts: dict[bytes, SourceSlots] = {}  # sites often store the same columns
        columns = self._columns(real.size(1), max_len, real.device)
        for key, stored in columns.values():
            if key not in layouts:
                layouts[key] = SourceSlots.from_mask(stored, real)
        return {module: layouts[key] for module, (key, _) in columns.items()}

    def _columns(self, size: int, max_len: int, device: torch.device) -> Columns:
        """Return which of the first *size* source columns every site stores."""
        n_rows = self.capacity.rows(max_len)
        last_use = [module.last_use(n_rows, self.capacity.source_length) for module in self.sites]
        layouts, asked = [module.built_layout for module in self.sites], (size, bucket(max_len + 1))
        if asked not in self._found or self._found[asked][0] != layouts:
            if len(self._found) == SIZES_MEMO:
                self._found.clear()
            heads = [module.num_heads for module in self.sites]
            stored = [stored_columns(last, size, n, device) for last, n in zip(last_use, heads, strict=True)]
            on_host = torch.cat(stored).cpu().split(heads)  # one wait for all
            keys = [columns.numpy().tobytes() for columns in on_host]
            found = dict(zip(self.sites, zip(keys, stored, strict=True), strict=True))
            self._found[asked] = layouts, found
        return self._found[asked][1]
