"""Launches that repeat: kernels with everything bound but their tensors.

Triton binds, checks and specialises all arguments of every launch, some fifty here, which costs the host several times
what the launch itself does. All but the tensors is settled by the sizes, strides and types of a call, and a training
step attends many times with the same: such launches are kept, and pass addresses to the compiled kernel alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import INTERPRETED, Config, grids
from .descriptors import aligned

MOST_KEPT = 4096  # calls of one kind, some kilobytes each
_kept: dict[Hashable, list[Launch]] = {}
_epoch = 0


class Launch:
    """A kernel, its grid, and the arguments that stay the same from call to call.

    Attributes:
        kernel: whose first parameters are tensors, in the order in which calls name them.
        numbers: all other arguments by name.
        blocks: those of the tensors that become descriptors, of blocks of this shape; None: into None.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        numbers: dict[str, Any],
        config: Config,
        blocks: Mapping[str, list[int] | None] | None = None,
    ):
        self.kernel, self.grid, self.numbers, self.options = kernel, grid, numbers, config.launch()
        self.blocks = blocks or {}
        self._compiled: Any = None  # takes tensors at multiples of 16 bytes, then `_values`
        self._values: list[Any] = []
        self._descriptions: dict[str, dict[str, Any]] = {}  # attributes of descriptors, but for the tensor

    def __call__(self, **tensors: Tensor | None) -> None:
        """Launch on *tensors*, of the sizes, strides and types of the first call; None where the kernel allows it."""
        at_16_bytes = aligned(*[x for x in tensors.values() if x is not None])
        arguments: dict[str, Any] = tensors
        for name, block in self.blocks.items():
            arguments[name] = None if block is None else self._describe(name, tensors[name], block)
        if at_16_bytes and self._compiled is not None:
            self._compiled[self.grid](*arguments.values(), *self._values)
            return
        compiled = self.kernel[self.grid](**arguments, **self.numbers, **self.options)
        # What Triton specialises on beside the settled: whether addresses are multiples of 16.
        if at_16_bytes and not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "cuda":
            names = self.kernel.arg_names
            if names[: len(tensors)] != list(tensors):
                raise TypeError(f"{self.kernel} takes {names[: len(tensors)]} in this order, got {list(tensors)}")
            self._values = [self.numbers[name] for name in names[len(tensors) :]]
            self._compiled = compiled

    def _describe(self, name: str, x: Any, block: list[int]) -> TensorDescriptor:
        if name not in self._descriptions:
            descriptor = TensorDescriptor(x, x.shape, x.stride(), block)
            self._descriptions[name] = vars(descriptor) | dict(base=None)
        else:  # without its checks, which look at what never changes
            descriptor = object.__new__(TensorDescriptor)
            vars(descriptor).update(self._descriptions[name], base=x)
        return descriptor


def launches_of(
    kernel: Any,
    n_tiles: int,
    heads: int,
    batch: int,
    numbers: dict[str, Any],
    config: Config,
    blocks: Mapping[str, list[int] | None],
) -> list[Launch]:
    """Launches that cover all tiles of all heads: one but for large sizes (`config.grids`)."""
    return [
        Launch(kernel, grid, dict(numbers, first_h=first_h, first_b=first_b), config, blocks)
        for grid, first_h, first_b in grids(n_tiles, heads, batch)
    ]


def kept(key: Hashable, build: Callable[[], list[Launch]]) -> list[Launch]:
    """Return the launches under *key*, which names all that `build` looks at."""
    launches = _kept.get(key)
    if launches is None:
        if len(_kept) >= MOST_KEPT:
            _kept.clear()
        launches = _kept[key] = build()
    return launches


def epoch() -> int:
    """Return how often all launches were forgotten: a part of the keys under which they are kept."""
    return _epoch


def forget() -> None:
    """Build all launches anew: after a change of what `config` chooses."""
    global _epoch
    _epoch += 1
    _kept.clear()
