"""Gluon's language as plain Python on torch tensors: a group of warps is a thread, and a barrier is one of threads.

Nothing of a GPU's timing is here, so what is left open is taken at its worst: a copy writes as soon as it is asked for, and a
product reads its operands only where it is waited for. Whoever frees a tile too early, or waits for another one's phase, gets
other numbers; whoever waits for what never comes gets Stuck.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

import detinfer.ops

OPS = Path(detinfer.ops.__file__).parent
PATIENCE = 20.0  # seconds for what takes milliseconds


class Stuck(Exception):
    """A group waited for a phase that never ended."""


class Values(torch.Tensor):
    """A tensor with the one attribute of Gluon's that torch has otherwise."""

    type = SimpleNamespace(layout=None)  # type: ignore[assignment]


def _values(t: Any) -> Any:
    return t.as_subclass(Values) if isinstance(t, torch.Tensor) else t


class Pointer:
    """An address in a tensor's memory, or many."""

    def __init__(self, base: torch.Tensor, at: Any = 0) -> None:
        self.base, self.at = base, at
        self.dtype = SimpleNamespace(element_ty=base.dtype)

    def __add__(self, by: Any) -> Pointer:
        return Pointer(self.base, self.at + by)

    def memory(self) -> torch.Tensor:
        storage = torch.empty(0, dtype=self.base.dtype).set_(self.base.untyped_storage())  # type: ignore[call-overload]
        return storage[self.base.storage_offset() :]


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, held: torch.Tensor) -> None:
        self.held, self.shape, self.dtype = held, tuple(held.shape), held.dtype

    def index(self, at: Any) -> Shared:
        return Shared(self.held[int(at)])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.held.view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.held.permute(*order))

    def store(self, value: torch.Tensor) -> None:
        self.held.copy_(value)


class Barrier:
    """A phase ends when as many have arrived as it was made for, and the bytes that were announced are there."""

    def __init__(self) -> None:
        self.count = self.left = self.bytes = self.phase = 0
        self.changed = threading.Condition()

    def init(self, count: int) -> None:
        self.count = self.left = count

    def _change(self, arrivals: int, nbytes: int) -> None:
        with self.changed:
            self.left, self.bytes = self.left - arrivals, self.bytes + nbytes
            assert self.left >= 0, "more arrivals than the barrier was made for"
            if self.left == 0 and self.bytes == 0:
                self.left, self.phase = self.count, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity: Any) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase % 2 != int(parity), PATIENCE):
                raise Stuck(f"phase {self.phase} of a barrier never ended")


class Barriers:
    """What is allocated for barriers."""

    def __init__(self, count: int) -> None:
        self.each = [Barrier() for _ in range(count)]

    def index(self, at: Any) -> Barrier:
        return self.each[int(at)]


class Product:
    """A product on the matrix unit that runs until it is waited for."""

    def __init__(self, a: Any, b: Shared, acc: torch.Tensor, use_acc: bool) -> None:
        self._given: Any = (a, b, acc, use_acc)
        self.value: torch.Tensor | None = None

    def end(self) -> None:
        a, b, acc, use_acc = self._given
        left = a.held if isinstance(a, Shared) else a
        self.value = _values(product(left, b.held, acc if use_acc else torch.zeros_like(acc)))


def product(a: torch.Tensor, b: torch.Tensor, acc: torch.Tensor) -> torch.Tensor:
    """acc + a b in float32 for 16-bit a [.., M, K] and b [.., K, N], k ascending: one order for every shape."""
    for k in range(a.shape[-1]):
        acc = acc + a[..., k, None].float() * b[..., k, None, :].float()
    return acc


def exp2(x: torch.Tensor) -> torch.Tensor:
    """In float32, by way of float64: torch's own differs between a vector's lanes and what is left over."""
    return torch.exp2(x.double()).float()


def log2(x: torch.Tensor) -> torch.Tensor:
    """Likewise."""
    return torch.log2(x.double()).float()


class Gluon:
    """A program's worth of the language: ``run`` calls a kernel once for each program of a grid.

    ``late``: seconds that a product lets go by before it reads, for whoever writes to what it reads too early.
    """

    def __init__(self) -> None:
        self.late = 0.0
        self._own = threading.local()
        self._grid: tuple[int, int] = (0, 0)
        self._program: tuple[int, int] = (0, 0)

    def run(self, kernel: Callable[..., None], grid: tuple[int, int], *arguments: Any) -> None:
        self._grid = grid
        for self._program in itertools.product(*map(range, grid)):
            kernel(*arguments)

    def warp_specialize(self, groups: Sequence[tuple[Any, tuple[Any, ...]]], warps: Any, registers: Any) -> None:
        assert len(groups) == len(warps) + 1 == len(registers) + 1
        failed: list[BaseException] = []

        def work(function: Any, arguments: tuple[Any, ...]) -> None:
            try:
                function(*arguments)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=group, daemon=True) for group in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE)
        if failed:
            raise failed[0]
        assert not any(thread.is_alive() for thread in threads)

    def warpgroup_mma(self, a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async and not isinstance(acc, Product), "an accumulator that is still being written"
        product = Product(a, b, acc, use_acc)
        self._own.__dict__.setdefault("running", []).append(product)
        return product

    def warpgroup_mma_wait(self, num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
        running = self._own.__dict__.setdefault("running", [])
        time.sleep(self.late)
        while len(running) > num_outstanding:
            running.pop(0).end()
        found = [one.value if isinstance(one, Product) else one for one in deps]
        assert all(one is not None for one in found), "a product was used that was not waited for"
        return found[0] if len(found) == 1 else tuple(found)

    def modules(self) -> dict[str, ModuleType]:
        """The modules of Triton that kernels import."""

        def jit(function: Any = None, **_: Any) -> Any:
            if function is None:
                return jit
            function.fn = function
            return function

        def where(condition: Any, a: Any, b: Any) -> Any:
            if isinstance(condition, torch.Tensor) and condition.dim():
                return _values(torch.where(condition, torch.as_tensor(a), torch.as_tensor(b)))
            return a if condition else b

        def two(function: Any) -> Any:
            def call(a: Any, b: Any) -> Any:
                if not any(isinstance(x, torch.Tensor) for x in (a, b)):
                    return max(a, b) if function is torch.maximum else min(a, b)
                return _values(function(*(torch.as_tensor(x) for x in (a, b))))

            return call

        def one(function: Any) -> Any:
            return lambda x, *more: _values(function(x, *more))

        def load(pointer: Pointer, mask: Any, other: float) -> Any:
            found = torch.full(torch.broadcast_shapes(pointer.at.shape, mask.shape), other).to(pointer.base.dtype)
            mask, at = (x.expand(found.shape).as_subclass(torch.Tensor) for x in (mask, pointer.at))
            found[mask] = pointer.memory()[at[mask]]
            return _values(found)

        def store(pointer: Pointer, value: Any, mask: Any) -> None:
            mask, at, value = (x.expand(value.shape).as_subclass(torch.Tensor) for x in (mask, pointer.at, value))
            pointer.memory()[at[mask]] = value[mask]

        def allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
            if layout == "barriers":
                return Barriers(shape[0])
            return Shared(torch.full(tuple(shape), float("nan"), dtype=dtype))

        def copy(described: Any, at: Sequence[Any], barrier: Barrier, to: Shared) -> None:
            batch, head, begin, _ = (int(x) for x in at)
            rows = described.tensor[batch, head, begin : begin + to.shape[2]]
            to.held.zero_()
            to.held[0, 0, : rows.shape[0], : rows.shape[1]] = rows
            barrier._change(0, -described.block_type.nbytes)

        language = {
            "constexpr": lambda x: x, "int64": torch.int64, "float32": torch.float32, "static_range": range,
            "program_id": lambda axis: torch.tensor(self._program[axis]), "num_programs": lambda axis: self._grid[axis],
            "where": where, "maximum": two(torch.maximum), "minimum": two(torch.minimum), "exp2": one(exp2),
            "log2": one(log2), "abs": one(torch.abs), "reshape": one(torch.reshape), "sum": one(torch.sum),
            "max": one(torch.amax), "div_rn": lambda a, b: a / b, "zeros_like": one(torch.zeros_like),
            "fma": lambda a, b, c: _values((a.double() * torch.as_tensor(b).double() + c.double()).float()),
            "arange": lambda begin, end, layout: _values(torch.arange(begin, end)),
            "full": lambda shape, value, dtype, layout: _values(torch.full(shape, value, dtype=dtype)),
            "zeros": lambda shape, dtype, layout: _values(torch.zeros(shape, dtype=dtype)),
            "convert_layout": lambda x, layout: x, "load": load, "store": store, "barrier": lambda: None,
            "allocate_shared_memory": allocate, "warp_specialize": self.warp_specialize,
            **dict.fromkeys(("SliceLayout", "NVMMADistributedLayout", "NVMMASharedLayout", "DotOperandLayout",
                             "BlockedLayout"), lambda *_: None),
        }  # fmt: skip
        barriers = {
            "MBarrierLayout": lambda: "barriers", "init": lambda barrier, count: barrier.init(count),
            "arrive": lambda barrier, count: barrier._change(count, 0),
            "expect": lambda barrier, nbytes: barrier._change(1, nbytes),
            "wait": lambda barrier, parity: barrier.wait(parity),
        }  # fmt: skip
        gl = _module("triton.experimental.gluon.language", **language)
        hopper = _module(
            "triton.experimental.gluon.language.nvidia.hopper",
            fence_async_shared=lambda: None,
            mbarrier=SimpleNamespace(**barriers),
            tma=SimpleNamespace(async_copy_global_to_shared=copy),
            warpgroup_mma=self.warpgroup_mma,
            warpgroup_mma_wait=self.warpgroup_mma_wait,
        )
        tl = _module("triton.language", **language)
        experimental = _module("triton.experimental.gluon", jit=jit, language=gl)
        found = [_module("triton", jit=jit, language=tl), tl, experimental, gl, hopper]
        found += [_module(name) for name in ("triton.experimental", "triton.experimental.gluon.language.nvidia")]
        return {module.__name__: module for module in found}


def _module(name: str, **held: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(held)
    return module


def described(tensor: torch.Tensor, block: int, width: int) -> Any:
    """K or V [B, Hkv, L, D] for the copy engine, in blocks of ``block`` keys, ``width`` columns."""
    nbytes = block * width * tensor.element_size()
    return SimpleNamespace(tensor=tensor, layout=None, block_type=SimpleNamespace(nbytes=nbytes))


def loaded(name: str) -> tuple[Gluon, Any]:
    """(the language, ``detinfer.ops.name`` written in it), whether Triton is installed or not."""
    gluon = Gluon()
    order = "detinfer.ops.attention_triton"
    modules = gluon.modules()
    before = {key: sys.modules.pop(key, None) for key in [*modules, order]}  # no more: torch imports others meanwhile
    try:
        sys.modules.update(modules)
        sys.modules[order] = _source("attention_triton")
        with mock.patch.object(detinfer.ops, "attention_triton", sys.modules[order], create=True):
            return gluon, _source(name)
    finally:
        for key, module in before.items():
            if module is None:
                del sys.modules[key]
            else:
                sys.modules[key] = module


def _source(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"emulated_{name}", OPS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
