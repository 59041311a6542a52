"""No interleaving of the GPU protocols reads a wrong value or gets stuck, and each planted fault is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from protocol_model import blanks, fault, lead, packets, tiles


@pytest.mark.parametrize(("ranks", "calls"), [(2, 5), (3, 2)])
def test_packets(ranks: int, calls: int) -> None:
    """Two banks are enough; with one, a fast rank overwrites what a slow one has not read (mutant 5)."""
    assert fault([packets(rank, ranks, calls) for rank in range(ranks)]) is None
    found = fault([packets(rank, ranks, calls, banks=1) for rank in range(ranks)])
    assert found is not None
    assert "nobody can go on" in found


def test_blanks() -> None:
    """Four banks, of which the last read is blanked in each call and told in the next; a bank comes round in the fifth.

    Two ranks: a place has one writer and one reader, whoever else there is.
    """
    assert fault([blanks(rank, 2, 5) for rank in range(2)]) is None


@pytest.mark.parametrize(
    ("planted", "word"),
    [
        ({"cleared": False}, "reads"),
        ({"banks": 2}, "nobody can go on"),
        ({"told": False}, "nobody can go on"),
        ({"released": False}, "nobody can go on"),
    ],
    ids=["not blanked (7)", "two banks (5)", "blanked, but not told", "told before it is blank"],
)
def test_faults_of_blanks(planted: dict[str, bool | int], word: str) -> None:
    """An old word is taken for a new one, or a new one is blanked."""
    found = fault([blanks(rank, 2, 5, **planted) for rank in range(2)])  # type: ignore[arg-type]
    assert found is not None
    assert word in found


@pytest.mark.parametrize("slots", [8, 6])
def test_tiles_of_two_ranks(slots: int) -> None:
    """The ring goes round inside a call, and on across short calls."""
    assert fault([tiles(rank, 2, 10, slots=slots) for rank in range(2)]) is None
    assert fault([tiles(rank, 2, 2, calls=5, slots=slots) for rank in range(2)]) is None


def test_fewer_slots_fail() -> None:
    """Four slots are too few: the ring's length is what keeps a tile until it is read."""
    found = fault([tiles(rank, 2, 10, slots=4) for rank in range(2)])
    assert found is not None
    assert "reads" in found


@pytest.mark.parametrize(("sums", "most"), [(False, 6), (True, 10)], ids=["push_tiles", "two_shot"])
def test_quick_warps(sums: bool, most: int) -> None:
    """No warp is so far ahead of another that the counts of stored tiles, which are used in turn, could be mixed up."""
    header = (Path(__file__).parents[2] / "csrc/gpu/tiles.h").read_text()
    counts = re.search(r"kCounts = (\d+);", header)
    assert counts is not None
    assert max(lead(30, sums, stuck) for stuck in range(40)) == most < int(counts[1])


def test_tiles_of_three_ranks() -> None:
    """The same between three."""
    assert fault([tiles(rank, 3, 1, calls=2) for rank in range(3)]) is None


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "planted",
    [{"released": False}, {"fresh": False}, {"slots": 1}],
    ids=["relaxed flag (1)", "acquire that does not reach all readers (2, 3)", "one slot (4)"],
)
def test_planted_faults(ranks: int, planted: dict[str, bool | int]) -> None:
    """Each is found, as a wrong value that is read."""
    found = fault([tiles(rank, ranks, 3, **planted) for rank in range(ranks)])  # type: ignore[arg-type]
    assert found is not None
    assert "reads" in found
