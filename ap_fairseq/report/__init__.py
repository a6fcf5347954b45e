"""AttentionStats, PruningMasks and scores -> one folder to look at: page, figures, tables, numbers.

analysis.py    the numbers: concentration, patterns, kept-mass curves; pure functions
results.py     scores (ap-evaluate, sweeps) and kernel benchmarks, read and grouped
statements.py  what the numbers say about the kinds of attention, in sentences
plots.py       matplotlib figures with alternative texts
tables.py      Markdown and LaTeX
page.py        report.html from template/
export.py      mean attention for numpy and BertViz-style tools
build.py       all of it together
"""
