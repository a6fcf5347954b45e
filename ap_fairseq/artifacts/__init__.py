"""The two files that travel between the stages: attention statistics and pruning masks."""

from ap_fairseq.artifacts.masks import PruningMasks, extrapolated, grown
from ap_fairseq.artifacts.statistics import DIVERGED, NO_LENGTHS, AttentionStats
from ap_fairseq.artifacts.storage import CONTENTS, pack_cells, unpack_cells

__all__ = [
    "CONTENTS",
    "DIVERGED",
    "NO_LENGTHS",
    "AttentionStats",
    "PruningMasks",
    "extrapolated",
    "grown",
    "pack_cells",
    "unpack_cells",
]
