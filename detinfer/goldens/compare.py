"""Compare two nodes row by row, byte by byte."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from detinfer import bits
from detinfer.goldens.batch import Dimensions
from detinfer.goldens.tree import Node, tensors


@dataclass(frozen=True)
class Difference:
    """The first differing element of a node: where it lies and both values."""

    path: str
    row: tuple[int, ...]
    element: int
    got: str
    expected: str
    ulp: int | None
    batch_row: int | None
    note: str = ""


@dataclass(frozen=True)
class Rows:
    """How many rows (last dimensions) were compared and differ, the first difference, and how far elements are apart."""

    compared: int
    differing: int
    first: Difference | None
    ulps: dict[str, int] = field(default_factory=dict)


@bits.unseen
def compare(got: Node, expected: Node, dimensions: Dimensions | None = None, batch: int = 1) -> Rows:
    """Every row of every tensor; ``dimensions`` and ``batch`` say to which request of a batch a row belongs."""
    left, right = dict(tensors(got)), dict(tensors(expected))
    if left.keys() != right.keys():
        note = f"outputs are {', '.join(left) or 'none'} and should be {', '.join(right) or 'none'}"
        return Rows(1, 1, Difference("", (), 0, "", "", None, None, note))
    compared = differing = 0
    first: Difference | None = None
    ulps: Counter[str] = Counter()
    for path, value in left.items():
        wanted = right[path]
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            rows, wrong = max(1, rows_of(wanted)), max(1, rows_of(wanted))
            note = f"{value.dtype} {list(value.shape)} should be {wanted.dtype} {list(wanted.shape)}"
            found: Difference | None = Difference(path, (), 0, "", "", None, None, note)
        else:
            equal = bits.rows_equal(value, wanted)
            rows, wrong = equal.numel(), int((~equal).sum())
            found = _locate(path, value, wanted, (dimensions or {}).get(path), batch) if wrong else None
            if wrong and bits.has_ulp(value.dtype):
                ulps.update(bits.ulp_histogram(value, wanted))
        compared, differing, first = compared + rows, differing + wrong, first or found
    return Rows(compared, differing, first, dict(ulps))


def rows_of(tensor: torch.Tensor) -> int:
    """Rows of a tensor: what its last dimension repeats over; 1 for a vector or a scalar."""
    return tensor.numel() // tensor.shape[-1] if tensor.dim() > 1 and tensor.shape[-1] else 1


def _locate(path: str, value: torch.Tensor, wanted: torch.Tensor, dim: int | None, batch: int) -> Difference:
    mismatch: Any = bits.first_mismatch(value, wanted)
    index = tuple(mismatch.index)
    return Difference(
        path=path,
        row=index[:-1],
        element=index[-1] if index else 0,
        got=mismatch.got,
        expected=mismatch.expected,
        ulp=mismatch.ulp,
        batch_row=None if dim is None else index[dim] * batch // value.shape[dim],
    )


@bits.unseen
def by_digests(got: Node, wanted: Node, golden: Any) -> Rows:
    """Every row against the digests of a golden that does not store the tensors: which rows differ, not in what."""
    left, right = dict(tensors(got)), dict(tensors(wanted))
    if left.keys() != right.keys():
        return compare(got, wanted)
    compared = differing = 0
    first: Difference | None = None
    for path, value in left.items():
        digests: torch.Tensor = golden.row_digests(right[path])
        now = bits.row_digests(value)
        if digests.shape != now.shape:
            note = f"{value.dtype} {list(value.shape)}: not the recorded shape"
            compared, differing = compared + 1, differing + 1
            first = first or Difference(path, (), 0, "", "", None, None, note)
            continue
        wrong = (digests != now).any(dim=-1)
        compared, differing = compared + len(wrong), differing + int(wrong.sum())
        if bits.digest(value) != right[path] and first is None:
            flat = int(wrong.nonzero()[0]) if bool(wrong.any()) else 0
            row = tuple(int(i) for i in np.unravel_index(flat, value.shape[:-1])) if value.dim() > 1 else ()
            first = Difference(path, row, 0, "", "", None, None, "the golden holds digests only, no values")
    return Rows(compared, differing, first)
