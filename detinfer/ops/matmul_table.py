"""Which path is the fastest for a shape on this machine, as it was measured and proved."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

DENSE = 1024
"""Every number of rows up to this one is proved, and its multiples up to ``PIECE``."""

PIECE = 16384
"""Most rows of one product where cuBLASLt runs; more are cut into pieces."""


class Key(NamedTuple):
    """What may pick another kernel, but for the number of rows: a table holds for one key.

    Operands are [rows, k] and [n, k] with k contiguous, x without gaps between rows, every pointer on 16 bytes.
    """

    n: int
    k: int
    dtype: torch.dtype
    w_stride: int
    added: bool
    device: int


class Choice(NamedTuple):
    """A path, with the shape of a block of csrc's kernels (-1: by a rule) or with cuBLASLt's algorithm."""

    path: str
    variant: int = -1
    algorithm: bytes = b""


@dataclass(frozen=True)
class Table:
    """The choices for one key: ``choices[i]`` up to ``uppers[i]`` rows, the last one for all that is more.

    cuBLASLt is chosen only at numbers of rows that are proved: each up to ``dense``, and those in ``sampled``.
    ``compared`` elements were compared in all.
    """

    key: Key
    uppers: tuple[int, ...]
    choices: tuple[Choice, ...]
    dense: int
    sampled: tuple[int, ...]
    compared: int

    def choose(self, rows: int) -> Choice:
        """The choice for a number of rows."""
        return self.choices[min(bisect.bisect_left(self.uppers, rows), len(self.choices) - 1)]

    def piece(self, rows: int) -> int:
        """How many of ``rows`` rows the next product takes: all, or the most that is proved."""
        if rows <= self.dense:
            return rows
        at = bisect.bisect_right(self.sampled, rows)
        return self.sampled[at - 1] if at else self.dense


_tables: dict[Key, Table] = {}

calls: dict[tuple[Any, ...], Any] = {}
"""What ``matmul_cuda`` has prepared from the tables, dropped whenever these change."""


def table(key: Key) -> Table | None:
    """The table for a key, or None where nothing was measured."""
    return _tables.get(key)


def tables() -> Mapping[Key, Table]:
    """All tables of this process."""
    return MappingProxyType(_tables)


def use(found: Iterable[Table]) -> None:
    """Take tables into use; one for the same key is replaced."""
    for one in found:
        _tables[one.key] = one
    calls.clear()


def forget() -> None:
    """Use no table: every product runs the path that is right by construction."""
    _tables.clear()
    calls.clear()
