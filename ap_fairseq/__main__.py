"""``python -m ap_fairseq``: print the folder for fairseq's ``--user-dir``, wherever the package is installed."""

from pathlib import Path

print(Path(__file__).resolve().parent)
