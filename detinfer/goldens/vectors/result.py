"""What a replay of vectors found, as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from detinfer import errors
from detinfer.goldens.result import SCHEMA, Verdict


@dataclass(frozen=True)
class Mismatch:
    """The first element of one output that differs: where, on which rank, and both values' bits in hex."""

    case: str
    path: str
    rank: int
    output: str
    place: str


@dataclass
class Cell:
    """One path at one number of ranks and dtype: vectors replayed, elements compared, elements that differ.

    ``refused`` is the reason where the path does not take these vectors.
    """

    path: str
    ranks: int
    dtype: str
    vectors: int = 0
    compared: int = 0
    differing: int = 0
    refused: str | None = None


@dataclass
class VectorResult:
    """Everything that replaying a folder of vectors found."""

    path: str
    operation: str
    reason: str
    verdict: Verdict = "not_run"
    vectors: int = 0
    cells: list[Cell] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    def exit_code(self) -> int:
        """1 where bytes differ, 5 where nothing could have failed, else 0."""
        return {"diverged": errors.EXIT_DIVERGED, "vacuous": errors.EXIT_VACUOUS}.get(self.verdict, errors.EXIT_SAME)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


KEPT = 20
"""Mismatches kept with all details; the cells count the rest."""


def merge(parts: Sequence[tuple[list[Cell], list[Mismatch]]]) -> tuple[list[Cell], list[Mismatch]]:
    """The ranks' findings as one: counts added up, vectors counted once, the first mismatches kept."""
    cells: dict[tuple[int, str, str], Cell] = {}
    mismatches: list[Mismatch] = []
    for found, differing in parts:
        for cell in found:
            whole = cells.setdefault((cell.ranks, cell.path, cell.dtype), Cell(cell.path, cell.ranks, cell.dtype))
            whole.vectors = max(whole.vectors, cell.vectors)
            whole.compared += cell.compared
            whole.differing += cell.differing
            whole.refused = whole.refused or cell.refused
        mismatches += differing
    return list(cells.values()), mismatches[:KEPT]
