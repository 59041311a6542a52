"""The operations of a run, in order: what the dispatcher is asked for below autograd, with the module that asks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from detinfer.models.targets import tensors
from detinfer.policy.modules import ModuleStack


@dataclass(frozen=True)
class Key:
    """An operation of a run: its name, the module that calls it, and which forward call of the model it belongs to."""

    name: str
    path: str
    call: int


@dataclass
class Operation:
    """One operation with its arguments and results, every tensor a copy."""

    key: Key
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[torch.Tensor]

    def __call__(self) -> list[torch.Tensor]:
        """Run it again on copies of its arguments."""
        return tensors(self.function(*copied(self.args), **{name: copied(v) for name, v in self.kwargs.items()}))


Seen = Callable[[int, Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]], None]
"""``seen(number, function, arguments, keywords, results)``, called after each operation."""


class Watch(TorchDispatchMode):
    """Numbers the operations of a run and hands each to ``seen``; ``call`` counts the model's forward calls."""

    def __init__(self, stack: ModuleStack, seen: Seen | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.keys: list[Key] = []
        self.call = 0
        self._stack, self._seen = stack, seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, then note it."""
        result = func(*args, **(kwargs or {}))
        self.keys.append(Key(func.name(), self._stack.path(), self.call))
        if self._seen is not None:
            with _disable_current_modes():
                self._seen(len(self.keys) - 1, func, args, kwargs or {}, tensors(result))
        return result


Run = Callable[["Watch"], None]
"""What is watched; it may set the mode's ``call``."""


class Found(Exception):
    """Ends a run whose rest is of no interest."""


def watch(run: Run, seen: Seen | None = None) -> list[Key]:
    """Run ``run`` and return the keys of its operations; ``seen`` may end it by raising Found."""
    stack = ModuleStack()
    with stack.watching():
        mode = Watch(stack, seen)
        with mode, suppress(Found):
            run(mode)
    return mode.keys


def copied(value: Any) -> Any:
    """Tensors in nested tuples and lists as copies: what an operation is given may change afterwards."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value


class _Before(TorchDispatchMode):
    """Keeps the arguments of one operation as they were before it ran: it may change them."""

    def __init__(self, keys: list[Key], number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._keys, self._number = keys, number
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, after a look at its arguments."""
        if len(self._keys) == self._number:
            with _disable_current_modes():
                self.given = copied(args), {name: copied(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def operation(run: Run, number: int) -> Operation:
    """Operation ``number`` of a run, which must be the run that the number came from."""
    held: list[Operation] = []
    stack = ModuleStack()

    def seen(at: int, func: Any, args: Any, kwargs: Any, results: list[torch.Tensor]) -> None:
        if at == number:
            args, kwargs = before.given
            held.append(Operation(mode.keys[at], func, args, kwargs, copied(results)))
            raise Found

    with stack.watching():
        mode = Watch(stack, seen)
        before = _Before(mode.keys, number)
        with mode, before, suppress(Found):
            run(mode)
    return held[0]


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
