"""Check that JSON values have a declared shape: no key too many, none missing, every value of its type.

A shape is ``str``, ``int`` or ``bool``; ``JSON`` for any JSON value; ``[shape]`` for a list; ``{"key": shape}`` for an
object with exactly these keys; ``Each(shape)`` for an object with any keys; ``Null(shape)`` for null or that shape;
``Word(...)`` for one of some strings; ``Hex()`` for a SHA-256; ``Maybe(shape)`` for a key of an object that may be
missing.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from detinfer.errors import GoldenError


@dataclass(frozen=True)
class Each:
    """An object whose values all have one shape; ``keys`` is a pattern that every key matches."""

    shape: Any
    keys: str = r".*"


@dataclass(frozen=True)
class Null:
    """Null, or a value of the shape."""

    shape: Any


@dataclass(frozen=True)
class Maybe:
    """A key that may be missing, with a value of the shape where it is not."""

    shape: Any


class Word:
    """One of some strings."""

    def __init__(self, *words: str) -> None:
        self.words = words


class Hex:
    """The hex of a SHA-256."""

    PATTERN = r"[0-9a-f]{64}"


class Json:
    """Any JSON value; NaN and the infinities are none."""


JSON = Json()


def check(value: Any, shape: Any, where: str) -> None:
    """Raise GoldenError, which names the place, unless ``value`` has ``shape``."""
    if isinstance(shape, type) and shape is not Hex:
        if type(value) is not shape:
            _wrong(where, _NAMES[shape], value)
    elif isinstance(shape, list):
        for i, item in enumerate(_list(value, where)):
            check(item, shape[0], f"{where}[{i}]")
    elif isinstance(shape, dict):
        for name in sorted(shape.keys() ^ _object(value, where).keys()):
            if not isinstance(shape.get(name), Maybe):
                raise GoldenError(f"{where}: {'missing' if name in shape else 'unknown'} key {name!r}")
        for name, inner in shape.items():
            if name in value:
                check(value[name], inner.shape if isinstance(inner, Maybe) else inner, f"{where}.{name}")
    elif isinstance(shape, Each):
        for name, item in _object(value, where).items():
            if not re.fullmatch(shape.keys, name):
                raise GoldenError(f"{where}: {name!r} is no key that may stand here")
            check(item, shape.shape, f"{where}.{name}")
    elif isinstance(shape, Null):
        if value is not None:
            check(value, shape.shape, where)
    elif isinstance(shape, Word):
        if value not in shape.words:
            _wrong(where, f"one of {', '.join(shape.words)}", value)
    elif isinstance(shape, Hex):
        if not (isinstance(value, str) and re.fullmatch(Hex.PATTERN, value)):
            _wrong(where, "a SHA-256 in hex", value)
    else:
        _check_json(value, where)


_NAMES = {str: "a string", int: "an integer", bool: "true or false"}


def _list(value: Any, where: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        _wrong(where, "a list", value)
    items: list[Any] | tuple[Any, ...] = value
    return items


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        _wrong(where, "an object", value)
    items: dict[str, Any] = value
    return items


def _check_json(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for name, item in _object(value, where).items():
            _check_json(item, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        _wrong(where, "a finite number", value)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        _wrong(where, "a JSON value", value)


def _wrong(where: str, wanted: str, value: Any) -> None:
    shown = repr(value)
    raise GoldenError(f"{where}: expected {wanted}, found {shown if len(shown) <= 60 else shown[:57] + '...'}")
