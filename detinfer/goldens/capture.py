"""Record what every unit of a model is given and gives, through hooks: no change to the model's code."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from detinfer import bits
from detinfer.errors import TargetError
from detinfer.goldens import tree
from detinfer.goldens.tree import Node
from detinfer.goldens.units import ATTENTION_SUFFIX, Kind, module_units


@dataclass
class Call:
    """One call of a unit: its arguments as they came in and its outputs, every tensor a copy.

    ``arguments`` is the node of ``(args, kwargs)``. ``outputs`` is the node of ``(result, caches)``, the caches being
    the unit's own layers of every KV cache among the arguments, as the call left them.
    """

    name: str
    kind: Kind
    type: str
    arguments: Node
    outputs: Node


@dataclass
class Skipped:
    """A unit that was called but cannot be replayed, and why."""

    name: str
    kind: Kind
    type: str
    reason: str


TRIM_BYTES = 1 << 26
"""Bytes of tensors that are looked at between two calls of ``trim``."""


@functools.cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library than glibc
        return None


def trim() -> None:
    """Have the C library give back what is free: glibc before 2.38 seldom reuses a freed aligned block, as torch's are."""
    if (give_back := _malloc_trim()) is not None:
        give_back(0)


class Capture:
    """Collects the calls made inside ``with capture.running():`` in the order in which they end: innermost first."""

    def __init__(
        self,
        model: nn.Module,
        chosen: Callable[[str], bool],
        *,
        watch_state: bool = False,
        copy: Callable[[Node], Node] | None = None,
        keep: Callable[[Call], Call] = lambda call: call,
    ) -> None:
        """``copy`` takes what is wanted of arguments and outputs, all of it by default; it must hold none of their memory.

        ``keep`` gets every call as it ends and returns what is held of it.
        """
        self._model, self._copy, self._keep = model, copy or _copied, keep
        self._units = module_units(model)
        self._names = {module: name for name, module in model.named_modules()}
        self._chosen = chosen
        self._watch_state = watch_state
        self._owners: list[nn.Module] = []
        self._seen: dict[str, Iterator[int]] = {}
        self._open: list[tuple[str, Node | None, str]] = []
        self._looked = 0
        self.calls: dict[str, Call | Skipped] = {}

    def _name(self, base: str) -> str:
        # A module that runs twice in one forward pass has a call of its own each time: norm, norm#1, ...
        count = next(self._seen.setdefault(base, itertools.count()))
        return base if count == 0 else f"{base}#{count}"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hooks are on inside this block and off after it, whatever happens."""
        self.calls, self._seen = {}, {}
        with ExitStack() as stack:
            for module in self._model.modules():
                handles = (
                    module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
                    module.register_forward_hook(self._after, with_kwargs=True),
                )
                for handle in handles:
                    stack.callback(handle.remove)
            stack.enter_context(_AttentionWatch(self))
            yield

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._owners.append(module)
        unit = self._units.get(module)
        if unit is None or not self._chosen(unit.name):
            return
        with _disable_current_modes():
            name = self._name(unit.name)
            try:
                node = self._copy(tree.encode((args, _keywords(kwargs)), unit.layers))
                reason = ""
            except tree.NotEncodable as error:
                node, reason = None, f"cannot be replayed: {error}"
            self._open.append((name, node, reason))
            self._state_before = _state(module) if self._watch_state else None

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._owners and self._owners[-1] is module:
            self._owners.pop()
        unit = self._units.get(module)
        if unit is None or not self._chosen(unit.name):
            return
        with _disable_current_modes():
            name, arguments, reason = self._open.pop()
            if self._watch_state and unit.kind == "leaf":
                _check_state(unit.name, self._state_before, _state(module))
            self._finish(name, unit.kind, type(module).__name__, arguments, reason, output, (args, kwargs), unit.layers)

    def attention(self, arguments: tuple[Any, ...], keywords: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Called for each scaled_dot_product_attention; returns its result."""
        owner = self._names.get(self._owners[-1], "") if self._owners else ""
        base = (owner or "model") + ATTENTION_SUFFIX
        if not self._chosen(base):
            return run()
        with _disable_current_modes():
            name = self._name(base)
            node: Node | None
            try:
                node, reason = self._copy(tree.encode((arguments, keywords))), ""
            except tree.NotEncodable as error:
                node, reason = None, f"cannot be replayed: {error}"
        output = run()
        with _disable_current_modes():
            self._finish(name, "attention", "scaled_dot_product_attention", node, reason, output, (), frozenset())
        return output

    def _finish(
        self,
        name: str,
        kind: Kind,
        type_name: str,
        arguments: Node | None,
        reason: str,
        output: Any,
        given: Any,
        layers: frozenset[int],
    ) -> None:
        if arguments is None:
            self.calls[name] = Skipped(name, kind, type_name, reason)
            return
        try:
            outputs = self._copy(tree.encode(outcome(output, given), layers))
        except tree.NotEncodable as error:
            self.calls[name] = Skipped(name, kind, type_name, f"its output cannot be compared: {error}")
            return
        self._looked += sum(t.numel() * t.dtype.itemsize for _, t in (*tree.tensors(arguments), *tree.tensors(outputs)))
        if self._looked > TRIM_BYTES:
            trim()
            self._looked = 0
        self.calls[name] = self._keep(Call(name, kind, type_name, arguments, outputs))


class _AttentionWatch(TorchFunctionMode):
    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self._capture = capture

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._capture.attention(args, kwargs, lambda: func(*args, **kwargs))
        return func(*args, **kwargs)


def outcome(output: Any, given: Any) -> tuple[Any, list[Any]]:
    """What a call leaves behind: its result and the KV caches that it was given, in their state after the call."""
    return output, list(tree.caches(given))


def _keywords(kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(kwargs.items()))


@bits.unseen
def _copied(node: Node) -> Node:
    # Cloned at once: a later operation may change the tensor in place.
    return tree.map_tensors(node, lambda _, tensor: tensor.detach().clone(memory_format=torch.contiguous_format))


@bits.unseen
def _state(module: nn.Module) -> tuple[torch.Tensor, dict[str, object]]:
    return _drawn(), _kept(module)


def _drawn() -> torch.Tensor:
    """The states of torch's generators."""
    drawn = torch.get_rng_state()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        drawn = torch.cat([drawn, torch.cuda.get_rng_state()])
    return drawn


def _kept(module: nn.Module) -> dict[str, object]:
    """What a module itself keeps, by name: numbers, and of its tensors which they are and how often they were written."""
    found: dict[str, object] = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int | float | str | bool) and not name.startswith("_")
    }
    for name, tensor in itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
        found[name] = ("tensor", id(tensor), -1 if tensor.is_inference() else tensor._version)
    return found


@bits.unseen
def states(model: nn.Module) -> dict[str, object]:
    """What all modules keep between calls, by name, and where torch's random numbers are."""
    found: dict[str, object] = {"random numbers": _drawn().numpy().tobytes()}
    for name, module in model.named_modules():
        found |= {f"{name}.{what}".lstrip("."): value for what, value in _kept(module).items()}
    return found


def changed(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """The names of ``states`` that have other values now."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


@bits.unseen
def _check_state(name: str, before: Any, after: Any) -> None:
    if not torch.equal(before[0], after[0]):
        raise TargetError(
            f"layer {name} draws random numbers: its output cannot be recorded. Put the model in eval mode, or leave "
            f"the layer out with --layers"
        )
    changed = sorted(key for key in after[1] if before[1].get(key) != after[1][key])
    if changed:
        raise TargetError(
            f"layer {name} changes its own state ({', '.join(changed)}) when it runs: a later call would see other "
            f"values. Record a model that keeps its state in its arguments, or leave the layer out with --layers"
        )
