"""Compile the kernels of scripts/gluon_kernels.py as scripts/gluon_backward.py launches them, for an H200, without one.

Run by test_triton_compilation.py in a process of its own, as compile_offline.py is.
"""

import json
import sys
from pathlib import Path

import triton
from compile_offline import Driver, compile_only, compiled
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import gluon_backward


def main():
    triton.runtime.driver.set_active(Driver())
    gluon_backward.DEVICE = "cpu"
    x, call, layout, _ = gluon_backward.problem(1, 2, 256, 0.5)
    JITFunction.__getitem__ = compile_only
    gluon_backward.dq(x, layout.query_table(), 132)
    gluon_backward.dkdv(x, layout.key_table())
    print(json.dumps(list(compiled.values())))


if __name__ == "__main__":
    main()
