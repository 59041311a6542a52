"""reduce_scatter: every rank's slice of all_reduce, along any dimension."""

from __future__ import annotations

import numpy as np
import pytest
from ranks import Call, Ranks, Tensor

from detinfer.collectives.stress import cancelling
from detinfer.reference import reduce_scatter as reference
from detinfer.reference.arithmetic import DType


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_slices(group: Ranks, size: int, dtype: DType) -> None:
    """Each rank has its slice's bytes in both orders; a sum that begins with the slice's owner would have others."""
    seen = 0
    for shape, dim in (
        ((size, 3), 0),
        ((2, size * 5, 3), 1),
        ((7, size * 2), -1),
        ((size * 701, 3), 0),
        ((0, size), 1),
    ):
        parts = [part.reshape(shape) for part in cancelling(size, int(np.prod(shape)), dtype)]
        for order in ("rank_order", "rank_tree"):
            options = {"dim": dim, "order": order}
            found = group.run([[Call("reduce_scatter", (Tensor(part, dtype),), options, str(size))] for part in parts])
            for r, (result,) in enumerate(found):
                expected = reference.reduce_scatter(parts, r, dtype, dim, "sum", order)  # type: ignore[arg-type]
                assert result.shape == expected.shape, (shape, dim, r)
                assert result.tobytes() == expected.tobytes(), (shape, dim, r, order)
                rotated = reference.reduce_scatter(parts[r:] + parts[:r], r, dtype, dim)
                seen += order == "rank_order" and rotated.tobytes() != expected.tobytes()
    assert seen > 0 or size < 3


def test_with_all_gather_it_is_all_reduce(group: Ranks) -> None:
    """reduce_scatter then all_gather gives all_reduce's bytes."""
    size, dtype = 4, "bfloat16"
    parts = [part.reshape(8, 129) for part in cancelling(size, 8 * 129, dtype)]
    slices = group.run([[Call("reduce_scatter", (Tensor(part, dtype),), {}, "4")] for part in parts])
    whole = group.run([[Call("all_gather", (Tensor(part, dtype),), {}, "4")] for (part,) in slices])
    at_once = group.run([[Call("all_reduce", (Tensor(part, dtype),), {}, "4")] for part in parts])
    assert {bytes(result) for (result,) in whole} == {bytes(at_once[0][0])}


def test_what_cannot_be_cut(group: Ranks) -> None:
    """A dimension that does not divide, that is not there, and a path that it does not have."""
    tensor = Tensor(np.zeros((4, 3), np.float32), "float32")
    for options, word in (({}, "no 3 equal slices"), ({"dim": 2}, "no dimension 2"), ({"path": "2stage"}, "path")):
        found = group.run([[Call("reduce_scatter", (tensor,), options, "3")]] * 3)
        assert [result[0] for (result,) in found] == ["UsageError"] * 3
        assert all(word in result[1] for (result,) in found)
