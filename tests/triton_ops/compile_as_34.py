"""Compile for an H200, as under triton 3.4, what kernels in Gluon compute from triton 3.6 on; print the kernels' names.

Run by test_triton_compilation.py in a process of its own, as compile_offline.py is.
"""

import json
import sys

import torch
import triton
from triton.runtime.jit import JITFunction


def main():
    triton.__version__ = "3.4.0"
    sys.modules["triton_ops.hopper"] = None  # importing it fails, as there
    from compile_offline import Driver, attend, compile_only, compiled

    triton.runtime.driver.set_active(Driver())
    JITFunction.__getitem__ = compile_only
    attend(torch.bfloat16, 64, 128, 0.0, 600, 2)
    print(json.dumps([kernel["name"] for kernel in compiled.values()]))


if __name__ == "__main__":
    main()
