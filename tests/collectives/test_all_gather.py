"""all_gather: a copy of bytes of any dtype, along any dimension."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import Call, Ranks, Tensor

from detinfer.reference import all_gather as reference

KINDS = {
    "float32": np.uint32,
    "bfloat16": np.uint16,
    "float16": np.uint16,
    "float64": np.uint64,
    "int8": np.uint8,
    "int64": np.uint64,
    "bool": np.uint8,
    "float8_e4m3fn": np.uint8,
    "complex64": np.uint64,
    "uint16": np.uint16,
}


@pytest.mark.parametrize("dtype", [name for name in KINDS if hasattr(torch, name)])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_bytes(group: Ranks, size: int, dtype: str) -> None:
    """All bit patterns survive: NaN payloads, both zeros, larger than the staging area, no elements."""
    kind = np.dtype(KINDS[dtype])
    random = np.random.default_rng(size)
    for shape, dim in (((3,), 0), ((5, 2, 3), 1), ((4, 700), -1), ((0, 4), 0), ((1,), -1), ((64,), 0)):
        most = 2 if dtype == "bool" else 2 ** (8 * kind.itemsize) - 1
        parts = [random.integers(0, most, shape, dtype=kind) for _ in range(size)]
        found = group.run([[Call("all_gather", (Tensor(part, dtype),), {"dim": dim}, str(size))] for part in parts])
        expected = reference.all_gather(parts, dim)
        for (result,) in found:
            assert result.shape == expected.shape, (shape, dim)
            assert result.tobytes() == expected.tobytes(), (shape, dim)
    if size > 1:
        assert expected.tobytes() != reference.all_gather(parts[::-1], dim).tobytes()


def test_layouts(group: Ranks) -> None:
    """Tensors that do not lie densely are gathered as their values."""
    parts = [np.arange(r, r + 35, dtype=np.uint32).reshape(5, 7) for r in range(3)]
    for layout in ("offset", "strided", "transposed"):
        found = group.run([[Call("all_gather", (Tensor(part, "float32", layout),), {}, "3")] for part in parts])
        assert {result.tobytes() for (result,) in found} == {reference.all_gather(parts).tobytes()}
