"""Attention Pruning for fairseq.

Imported where fairseq is loaded, as by ``--user-dir``, the package registers its tasks and models. What needs numpy
only, such as ``ap-masks``, imports it without fairseq; a Python program names ``ap_fairseq.plugin`` to register.
"""

import sys

from ap_fairseq.version import __version__

if "fairseq" in sys.modules:
    import ap_fairseq.plugin  # noqa: F401

__all__ = ["__version__"]
