"""AttentionStats, PruningMasks and scores -> one folder to look at: page, figures, tables, numbers.

analysis.py    the numbers: concentration, patterns, kept-mass curves; pure functions
results.py     scores (ap-evaluate, sweeps) and kernel benchmarks, read and grouped
statements.py  how the kinds of attention differ, in sentences
plots.py       matplotlib figures with alternative texts
tables.py      tables of kinds, heads, masks and systems
content.py     the content of a report, computed once
page.py        report.html from template/
build.py       reads the inputs, writes the folder
export.py      mean attention for numpy and BertViz-style tools
"""
