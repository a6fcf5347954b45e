"""Test set-up shared by every suite."""

import functools
import os

# Before torch is imported. Stages of experiments fork, here from a process that computes: OpenMP's threads would not
# survive it, and the child's first parallel operator would wait for them forever.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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


def _call(function, **arguments):
    return function(**arguments)


# Python keeps the frames of calls in chunks of 16 KiB. A call at the end of one maps another and unmaps it on return,
# in a loop every time: a third of the time of tests in Triton's interpreter. This frame is so large that it gets one
# of 512 KiB, and the frames of a test have room behind it.
_call.__code__ = _call.__code__.replace(co_stacksize=33_000)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    pyfuncitem.obj = functools.partial(_call, pyfuncitem.obj)
    return (yield)
