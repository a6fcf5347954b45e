"""Test set-up shared by every suite."""

import os

import torch

# Triton decides between compiling and interpreting when it is first imported, so this must come before any test module.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
