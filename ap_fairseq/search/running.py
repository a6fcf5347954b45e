"""A search from its batch to its hypotheses, in parts: others may be launched before its results are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from fairseq import utils
from torch import Tensor

FOLLOWING = "following"  # key of a batch of fairseq's: the batch after it, whose search begins while its own is read
EncoderOuts = list[dict[str, list[Tensor]]]  # of each model


class Batch(NamedTuple):
    """What a search starts from.

    Attributes:
        net_input: what fairseq gives the encoders of a batch.
        max_len: tokens of a translation before the one that ends it, at most.
        first_token: that every translation begins with.
        source_lengths: int64 (B,), by which the lengths of translations are judged, if they are.
        prefix: int64 (B, P), tokens that the translations begin with, padded on the right.
    """

    net_input: dict[str, Tensor]
    max_len: int
    first_token: int
    source_lengths: Tensor
    prefix: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """int64 (B, S), of the sources, or prompts."""
        return self.net_input["src_tokens"]

    def is_same(self, other: Batch) -> bool:
        """Whether searches of both are one: they have the same tensors of tokens."""
        same_limits = (self.max_len, self.first_token) == (other.max_len, other.first_token)
        return same_limits and self.tokens is other.tokens and self.prefix is other.prefix


@dataclass
class RunningSearch:
    """A search that has begun.

    Attributes:
        encoder_outs: the output of the encoders, which the next batch may overwrite; None for language models.
        n: places of the batch, of which the unfinished sentences are the first.
        step: the next one.
        prefix_len: steps whose tokens are given.
        phase: of the step before.
        marks: of the models when it began, if that was early (`StaticDecoder.marks`); it goes on only under the same.
    """

    batch: Batch
    encoder_outs: EncoderOuts | None
    n: int
    step: int
    prefix_len: int
    phase: int | None = None
    marks: list[Any] | None = None


def look_ahead(batches: Iterable[dict[str, Any]], on_gpu: bool) -> Iterator[dict[str, Any]]:
    """Yield batches of fairseq's, moved to the GPU if *on_gpu*, each with the next as :data:`FOLLOWING`.

    What *batches* raise is raised after the batches before it.
    """
    moved = map(utils.move_to_cuda, batches) if on_gpu else iter(batches)
    batch = next(moved, None)
    while batch is not None:
        try:
            after = next(moved, None)
        except Exception:
            yield batch
            raise
        if batch and after:  # fairseq has empty ones, too
            batch[FOLLOWING] = after
        yield batch
        batch = after


def host_copy(x: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to the host; the result waits for the copy, and for nothing that is launched later."""
    if not x.is_cuda:
        copy = x.to("cpu", copy=True)
        return lambda: copy
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait() -> Tensor:
        event.synchronize()
        return host

    return wait
