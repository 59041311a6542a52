"""Calls of reducing operations as values: everything but the tensors' contents, so that a call can be made again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Operand:
    """A tensor argument without its contents: sizes, strides (in elements) and dtype."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """One call: the arguments as they were passed, each tensor replaced by its Operand and each list by a tuple.

    Equal calls are equal and hash alike, so that they can be counted.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The tensor arguments, in order."""
        return tuple(_operands((*self.args, *(value for _, value in self.kwargs))))


Raw = tuple[Any, ...]


def raw(values: Iterable[Any]) -> Raw:
    """Arguments as something that can be hashed, made as cheaply as possible: ``cooked`` turns it into a Call."""
    found = []
    for a in values:
        if isinstance(a, torch.Tensor):
            found.append((a.shape, a.stride(), a.dtype))
        elif isinstance(a, list | tuple):
            found.append(raw(a))
        else:
            found.append(a)
    return tuple(found)


def cooked(op: str, args: Raw, names: tuple[str, ...], values: Raw) -> Call:
    """The Call of ``raw`` arguments by position, and of ``raw`` arguments with these names."""
    return Call(op, _cook(args), tuple(zip(names, _cook(values), strict=True)))


def _cook(values: Raw) -> tuple[Any, ...]:
    return tuple(_cooked(value) for value in values)


def _cooked(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    if value and isinstance(value[0], torch.Size):
        return Operand(tuple(value[0]), value[1], value[2])
    return _cook(value)


def _operands(values: tuple[Any, ...]) -> Iterator[Operand]:
    for value in values:
        if isinstance(value, Operand):
            yield value
        elif isinstance(value, tuple):
            yield from _operands(value)
