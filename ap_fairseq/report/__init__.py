"""AttentionStats, PruningMasks and scores -> one folder to look at: page, figures, tables, numbers."""
