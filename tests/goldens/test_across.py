"""Goldens on another number of ranks: which dimension is shared out, and that each share meets its own slice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detinfer import bits
from detinfer.goldens import across
from detinfer.goldens.across import Unaligned, cut
from detinfer.models.ranks import Ranks

WHOLE = torch.arange(2 * 9 * 4, dtype=torch.float32).view(2, 9, 4)


def test_the_dimension_that_is_shared_out() -> None:
    """From the shapes of all ranks on both sides; uneven shares too, and none where all ranks hold all."""
    assert cut([(1, 5, 90)], [(1, 5, 30)] * 3) == 2
    assert cut([(1, 5, 30)] * 3, [(1, 5, 90)]) == 2
    assert cut([(1, 6, 5, 8)], [(1, 3, 5, 8)] * 2) == 1
    assert cut([(1, 77)], [(1, 25), (1, 26), (1, 26)]) == 1
    assert cut([(1, 5, 48)] * 2, [(1, 5, 48)] * 3) is None
    for then, now, says in (
        (
            [(1, 4, 10)],
            [(1, 1, 10), (1, 2, 10), (1, 2, 10)],
            "no shares of one tensor",
        ),  # heads that several ranks hold
        ([(1, 4, 10)], [(1, 2, 5)] * 2, "no shares of one tensor"),
        ([(4, 10)], [(1, 4, 10)], "another number of dimensions"),
    ):
        with pytest.raises(Unaligned, match=says):
            cut(then, now)


class Told(Ranks):
    """One of three ranks; what the others share is given."""

    def __init__(self, rank: int, shared: list[Any]) -> None:
        super().__init__()
        self.rank, self.size, self._shared = rank, 3, shared

    def share(self, value: Any, first: bool = False) -> list[Any]:
        assert value == self._shared[self.rank]
        return self._shared


def judged(here: list[torch.Tensor], rank: int, *, promised: bool = True, stored: bool = True) -> Any:
    """The comparison of rank ``rank``'s share with a file of one rank that holds WHOLE as a unit's output and result."""
    digest = bits.digest(WHOLE)
    node = {"tensor": digest}
    golden: Any = SimpleNamespace(
        manifest=SimpleNamespace(
            ranks=1,
            units=[{"name": "unit", "skipped": None, "calls": [{"request": 0, "step": 0, "outputs": node}]}],
            outputs={"results": [[node]]},
            tensors={digest: {"shape": list(WHOLE.shape)}},
        ),
        tensor=lambda _: WHOLE if stored else None,
        row_digests=lambda _: bits.row_digests(WHOLE),
    )
    unit: Any = SimpleNamespace(name="unit", kind="leaf", type="Linear")
    alone = [(unit, (0, 0), {"tensor": here[rank]}), (None, (0, 0), {"tensor": WHOLE})]
    shared = [[across.shapes_of({"tensor": one}), across.shapes_of({"tensor": WHOLE})] for one in here]
    return across.judge(golden, alone, Told(rank, shared), promised=promised, command="again", model="Model")


@pytest.mark.parametrize("dim", [1, 2])
def test_each_share_meets_its_own_slice(dim: int) -> None:
    """Uneven along the last dimension; another rank's share, or one bit, is a difference with its place."""
    shares = [part.contiguous() for part in WHOLE.split([3, 3, 3] if dim == 1 else [1, 2, 1], dim)]
    for rank in range(3):
        found, axis = judged(shares, rank)
        assert (found.verdict, axis.verdict, found.rows_differing) == ("same", "same", 0)
        assert found.rows_compared == shares[rank].numel() // shares[rank].shape[-1] + 18
    wrong = [one.clone() for one in shares]
    wrong[2].view(torch.int32)[1, -1, -1] ^= 1
    found, axis = judged(wrong, 2)
    assert (found.verdict, found.rows_differing, axis.rows_differing) == ("diverged", 1, 1)
    assert (found.first.unit, found.first.axis, found.first.command) == ("unit", "tp: 1 -> 3", "again")
    turned = [shares[2], *shares[:2]] if dim == 1 else [shares[2], shares[1], shares[0]]
    assert judged(turned, 0)[0].rows_differing > 0
    found, axis = judged(wrong, 2, promised=False)
    assert (found.verdict, axis.verdict, axis.first) == ("not_promised", "not_promised", None)


def test_what_cannot_be_laid_beside_the_file_is_counted() -> None:
    """A rank's part of a sum, and a share of a tensor that is not stored; whole results are compared by digests."""
    parts = [WHOLE + rank for rank in range(3)]
    found, _ = judged(parts, 1)
    assert found.rows_compared == 18 and "1 outputs not compared: each rank's part of a sum" in found.reasons
    shares = [part.contiguous() for part in WHOLE.chunk(3, 1)]
    found, _ = judged(shares, 1, stored=False)
    assert found.rows_compared == 18 and any("digests alone" in reason for reason in found.reasons)
