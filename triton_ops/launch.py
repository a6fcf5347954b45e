"""Launches that repeat: kernels with everything bound but their tensors.

Triton binds, checks and specialises all arguments of every launch, some fifty here, which costs the host several times
what the launch itself does. All but the tensors is settled by the sizes, strides and types of a call, and a training
step attends many times with the same: such launches are kept, and pass addresses to the compiled kernel alone.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import INTERPRETED, Config, grids

MOST_KEPT = 4096  # calls of one kind, some kilobytes each
MOST_PARTS = 256  # addresses of tensors of one launch
_kept: dict[Hashable, list[Launch]] = {}
_epoch = 0

TakeApart = Callable[[TensorDescriptor], list[Any]]  # a descriptor into arguments of a compiled launcher


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
        self._compiled: Any = None  # takes addresses that are multiples of 16, then `_values`
        self._stream: Callable[[], int] = int  # the current one, of the device of the first call
        self._values: list[Any] = []
        self._run: Any = None  # of the compiled kernel
        self._described: list[tuple[int, str, TakeApart | None]] = []  # place and name of descriptors, from the last on
        self._parts: dict[tuple[str, int], list[Any]] = {}  # of descriptors, by name and address
        self._descriptions: dict[str, tuple[type, dict[str, Any]]] = {}  # descriptors, but for the tensor

    def __call__(self, **tensors: Tensor | None) -> None:
        """Launch on *tensors*, of the sizes, strides and types of the first call; None where the kernel allows it."""
        # Of tensors the compiled launcher would ask the driver whether they are the device's, which `api` has checked.
        arguments: list[Any] = [0 if x is None else x.data_ptr() for x in tensors.values()]
        at_16_bytes = functools.reduce(operator.or_, arguments) % 16 == 0
        if at_16_bytes and self._run is not None and not observed():  # as `triton.JITFunction` launches
            self._repeat(tensors, arguments)
            return
        named: dict[str, Any] = tensors
        for name, block in self.blocks.items():
            named[name] = None if block is None else self._describe(name, tensors[name])
        compiled = self.kernel[self.grid](**named, **self.numbers, **self.options)
        # What Triton specialises on beside the settled: whether addresses are multiples of 16.
        if compiled is None or not at_16_bytes:  # None: a hook of Triton refused the kernel
            return
        if not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "cuda":
            names = self.kernel.arg_names
            if names[: len(tensors)] != list(tensors):
                raise TypeError(f"{self.kernel} takes {names[: len(tensors)]} in this order, got {list(tensors)}")
            self._values = [self.numbers[name] for name in names[len(tensors) :]]
            driver = triton.runtime.driver.active
            self._stream = functools.partial(driver.get_current_stream, driver.get_current_device())
            described = [name for name in tensors if self.blocks.get(name) is not None]
            self._run, each = _unwrapped(compiled.run, len(described))
            places = [names.index(name) for name in described]
            self._described = list(zip(places, described, each, strict=True))
            self._described.reverse()  # places of the others stay
            self._compiled = compiled

    def _repeat(self, tensors: dict[str, Any], arguments: list[Any]) -> None:
        """Launch the compiled kernel on *tensors*, at the addresses in *arguments*."""
        for i, name, take_apart in self._described:
            arguments[i : i + 1] = self._parts_of(name, tensors[name], arguments[i], take_apart)
        handles = self._stream(), self._compiled.function, self._compiled.packed_metadata
        self._run(*self.grid, *handles, None, None, None, *arguments, *self._values)

    def _parts_of(self, name: str, x: Any, address: int, take_apart: TakeApart | None) -> list[Any]:
        if take_apart is None:
            return [self._describe(name, x)]
        parts = self._parts.get((name, address))
        if parts is None:
            if len(self._parts) >= MOST_PARTS:
                self._parts.clear()
            parts = self._parts[name, address] = take_apart(self._describe(name, x))
        return parts

    def _describe(self, name: str, x: Any) -> Any:
        if name not in self._descriptions:
            checked = self._descriptor(x, self.blocks[name])
            self._descriptions[name] = type(checked), vars(checked) | dict(base=None)
            return checked
        kind, attributes = self._descriptions[name]
        descriptor: Any = object.__new__(kind)  # without its checks, which look at what never changes
        vars(descriptor).update(attributes, base=x)
        return descriptor

    def _descriptor(self, x: Any, block: Any) -> Any:
        return TensorDescriptor(x, x.shape, x.stride(), block)


def observed() -> bool:
    """Whether a profiler, say, wants to be told of launches."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any([hook is not None and getattr(hook, "calls", True) for hook in hooks])  # triton 3.4 has one hook or None


def _unwrapped(run: Any, n: int) -> tuple[Any, list[TakeApart | None]]:
    """Return *run* of a compiled kernel without its search for descriptors, and what takes each of *n* of them apart.

    Triton wraps the compiled launcher in a function that looks for descriptors among all arguments, and encodes them
    anew, which takes longer than the launch. Where it does so otherwise than known here, as from triton 3.8 on, *run*
    stays as it is, and None says that it takes whole descriptors.
    """
    wrapper = getattr(run, "launch", None)
    if n > 0 and inspect.isfunction(wrapper):
        found = inspect.getclosurevars(wrapper)
        launcher, metas = found.nonlocals.get("launcher"), found.nonlocals.get("tensordesc_meta")
        take_apart = found.globals.get("make_tensordesc_arg")
        if launcher and take_apart and metas and None not in metas and len(metas) == n:
            direct = copy.copy(run)
            direct.launch = launcher
            return direct, [functools.partial(take_apart, metadata=meta) for meta in metas]
    return run, [None] * n


def launches_of(
    kernel: Any,
    n_tiles: int,
    heads: int,
    batch: int,
    numbers: dict[str, Any],
    config: Config,
    blocks: Mapping[str, list[int] | None],
    kind: type[Launch] = Launch,
) -> list[Launch]:
    """Launches that cover all tiles of all heads: one but for large sizes (`config.grids`)."""
    return [
        kind(kernel, grid, dict(numbers, first_h=first_h, first_b=first_b), config, blocks)
        for grid, first_h, first_b in grids(n_tiles, heads, batch)
    ]


def strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of sentence, head and position of each (B, H, T, D), named as in `primitives.py`: s_qb, s_qh, s_qt."""
    return {f"s_{name}{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bht")}


def kept(key: Hashable, build: Callable[[], list[Launch]]) -> list[Launch]:
    """Return the launches under *key*, which names all that `build` looks at."""
    launches = _kept.get(key)
    if launches is None:
        if len(_kept) >= MOST_KEPT:
            _kept.clear()
        launches = _kept[key] = build()
    return launches


def kept_kernels() -> set[str]:
    """Return the names of the kernels whose launches are kept."""
    return {launch.kernel.__name__ for launches in _kept.values() for launch in launches}


def epoch() -> int:
    """Return how often all launches were forgotten: a part of the keys under which they are kept."""
    return _epoch


def forget() -> None:
    """Build all launches anew: after a change of what `config` chooses."""
    global _epoch
    _epoch += 1
    _kept.clear()
