"""Test set-up shared by every suite."""

import os

import hypothesis
import pytest
import torch

# Triton decides between compiling and interpreting when it is first imported, so this must come before any test module.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)  # the same cases in every run
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)
