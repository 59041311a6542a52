"""The operations of a run, in order: what the dispatcher is asked for below autograd, with the module that asks.

What all ranks of a model do together is an operation of each. Every rank then watches the same run to its end, also where
it has seen enough: the others wait for its part of what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import SequenceMatcher
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from detinfer.models.ranks import ALONE, Ranks
from detinfer.models.targets import tensors
from detinfer.policy.modules import ModuleStack


@dataclass(frozen=True)
class Key:
    """An operation of a run: its name, the module that calls it, and which forward call of the model it belongs to.

    ``joint``: all ranks make it together.
    """

    name: str
    path: str
    call: int
    joint: bool = False


@dataclass
class Operation:
    """One operation with its arguments and results, every tensor a copy."""

    key: Key
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[torch.Tensor]

    def __call__(self) -> list[torch.Tensor]:
        """Run it again on copies of its arguments; a joint one by all ranks."""
        given = {name: copied(value) for name, value in self.kwargs.items()}
        return _results(self.function, self.args, self.function(*copied(self.args), **given))


class OverRanks:
    """What the layers of a model have its ranks do, in the place of an operator: the dispatcher does not know it."""

    _schema = SimpleNamespace(returns=())

    def __init__(self, name: str, call: Callable[..., Any]) -> None:
        self._name, self._call = name, call

    def name(self) -> str:
        """As an operator's: ``detinfer::all_reduce``."""
        return self._name

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
_WAITS = ("wait_tensor", "_wrap_tensor_autograd")
_STACKED = ("_allgather_base_", "all_gather_into_tensor")


def _joint(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether all ranks call it together: a collective, or an operation on tensors that are spread over ranks."""
    namespace = func.name().partition("::")[0]
    collective = namespace in _NAMESPACES and not waits(func)
    return collective or isinstance(func, OverRanks) or any(_spread(t) for t in tensors(args))


def waits(func: Any) -> bool:
    """Whether an operation hands on what a collective has given."""
    namespace, _, name = func.name().partition("::")
    return namespace in _NAMESPACES and name.startswith(_WAITS)


def _spread(t: torch.Tensor) -> bool:
    return hasattr(t, "to_local")


def local(t: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, and what is in torch's wrapper of a collective that may still run."""
    held: Any = t.to_local() if hasattr(t, "to_local") else t
    if hasattr(held, "trigger_wait"):
        held = torch.ops._c10d_functional.wait_tensor(held.elem)
    part: torch.Tensor = held
    return part


def _results(func: Any, args: tuple[Any, ...], value: Any) -> list[torch.Tensor]:
    """The tensors that an operation gives; a collective may hand them out before they are there."""
    namespace, _, name = func.name().partition("::")
    found = tensors(value)
    if namespace == "c10d":
        for work in value if isinstance(value, list | tuple) else (value,):
            if isinstance(work, torch.ScriptObject):
                torch._C._distributed_c10d.Work.unbox(work).wait()
    elif namespace in _NAMESPACES:
        found = [torch.ops._c10d_functional.wait_tensor(t) for t in found]
    if name in _STACKED:  # every rank's, one after the other in front: each is a result of its own
        own = args[1 if namespace == "c10d" else 0]
        found = [part for whole in found for part in torch.split(whole, own.shape[0])]
    return [local(t) for t in found]


Seen = Callable[[int, Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]], None]
"""``seen(number, function, arguments, keywords, results)``, called after each operation."""


class Watch(TorchDispatchMode):
    """Numbers the operations of a run and hands each to ``seen``; ``call`` counts the model's forward calls.

    ``given``: the arguments of operation ``keeps`` as they were before it ran, which may change them.
    """

    def __init__(self, stack: ModuleStack, seen: Seen | None = None, ranks: Ranks = ALONE, keeps: int = -1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.keys: list[Key] = []
        self.call = 0
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._stack, self._seen, self._ranks, self._keeps = stack, seen, ranks, keeps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, then note it."""
        return self._run(func, args, kwargs or {})

    def over_ranks(self, name: str, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """The same for what the dispatcher does not see (``Ranks.watcher``)."""
        return self._run(OverRanks(name, call), args, {})

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number = len(self.keys)
        if number == self._keeps:
            with _disable_current_modes():
                self.given = copied(args), {name: copied(value) for name, value in kwargs.items()}
        result = func(*args, **kwargs)
        self.keys.append(Key(func.name(), self._stack.path(), self.call, _joint(func, args)))
        if self._seen is not None:
            with _disable_current_modes():
                try:
                    self._seen(number, func, args, kwargs, _results(func, args, result))
                except Found:
                    if self._ranks.size == 1:
                        raise
                    self._seen = None
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The modules, the dispatcher and the ranks are watched inside this block."""
        before = self._ranks.watcher
        with self._stack.watching(), self:
            self._ranks.watcher = self.over_ranks
            try:
                yield
            finally:
                self._ranks.watcher = before


Run = Callable[["Watch"], None]
"""What is watched; it may set the mode's ``call``."""


class Found(BaseException):
    """Ends a run whose rest is of no interest; on several ranks it ends the watching alone.

    No Exception: a module that catches those goes on otherwise, and whoever runs one takes them for the module's own.
    """


def watch(run: Run, seen: Seen | None = None, ranks: Ranks = ALONE) -> list[Key]:
    """Run ``run`` and return the keys of its operations; ``seen`` may end it by raising Found."""
    mode = Watch(ModuleStack(), seen, ranks)
    with suppress(Found), mode.watching():
        run(mode)
    return mode.keys


def copied(value: Any) -> Any:
    """Tensors in nested tuples and lists as copies: what an operation is given may change afterwards."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value


def operation(run: Run, number: int | None, ranks: Ranks = ALONE) -> Operation | None:
    """Operation ``number`` of a run, which must be the run that the number came from; None for none.

    All ranks call it together, those that ask for none too.
    """
    held: list[Operation] = []

    def seen(at: int, func: Any, args: Any, kwargs: Any, results: list[torch.Tensor]) -> None:
        if at == number:
            args, kwargs = mode.given
            held.append(Operation(mode.keys[at], func, args, kwargs, copied(results)))
            raise Found

    mode = Watch(ModuleStack(), seen, ranks, -1 if number is None else number)
    with suppress(Found), mode.watching():
        run(mode)
    return held[0] if held else None


def matched(alone: list[Key], other: list[Key]) -> dict[int, int]:
    """Number of an operation of the other run -> that of the run alone, where both make the same call in one order.

    Every forward call of the other run is laid beside the one call of the run alone, or beside the one of its number.
    """
    single = {key.call for key in alone} == {0}
    found: dict[int, int] = {}
    for call in dict.fromkeys(key.call for key in other):
        left = [i for i, key in enumerate(alone) if single or key.call == call]
        right = [i for i, key in enumerate(other) if key.call == call]
        names = [[(keys[i].name, keys[i].path) for i in part] for keys, part in ((alone, left), (other, right))]
        for a, b, size in SequenceMatcher(None, names[0], names[1], autojunk=False).get_matching_blocks():
            found.update((right[b + i], left[a + i]) for i in range(size))
    return found
