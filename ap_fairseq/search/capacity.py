"""Sizes of the buffers of a search, rounded so that few of them come."""

from __future__ import annotations

import operator
from typing import NamedTuple


def bucket(n: int) -> int:
    """Round a batch size up to 1, 2, 3, 4, 6, 8, 12, ...: few graphs, at most a third of a batch empty."""
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


class Capacity(NamedTuple):
    """Sizes that buffers are made for: sentences in a batch, source tokens of a sentence, target length."""

    sentences: int
    source_length: int
    positions: int

    def covers(self, other: Capacity) -> bool:
        """Whether buffers of this capacity serve a batch that needs *other*."""
        return all(map(operator.ge, self, other))

    def joined(self, other: Capacity) -> Capacity:
        """Return the smallest capacity that covers both."""
        return Capacity(*map(max, self, other))

    def rows(self, max_len: int) -> int:
        """Return the mask rows that a search of *max_len* tokens may read, rounded: most batches ask for the same."""
        return min(bucket(max_len + 1), self.positions)
