"""Faults that chance decides: the search makes the run again and again, and what it saw once need not come back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from detinfer import bits
from detinfer.errors import UsageError
from detinfer.goldens.cause.locate import CHANCE, Located, by_batch, locate
from detinfer.goldens.cause.script import write

BATCH, ROW = 3, 1


class Sum(nn.Module):
    """Three parts of a row: alone in their order, and in the passes of a batch as ``ways`` says, one after another.

    The search counts the operations of the first pass, compares the second, and takes the operation found from the third.
    """

    def __init__(self, *ways: str) -> None:
        super().__init__()
        self.ways = list(ways)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c = x.unbind(1)
        way = self.ways.pop(0) if len(x) > 1 else "written"
        if way == "turned":
            return b + c + a
        if way == "rolled":
            return c + a + b
        if way == "subtracted":
            return a - -b + c
        return a + b + c


def search(*ways: str) -> Located | None:
    torch.manual_seed(0)
    x = torch.randn(BATCH, 3, 8) * torch.tensor([2.0**12, 1.0, 2.0**-12])[None, :, None]
    a, b, c = x[ROW]
    assert bits.count_mismatches(b + c + a, a + b + c) > 0, "inputs on which the order shows"
    model = nn.Sequential(Sum(*ways))

    def alone(_: object) -> None:
        model(x[ROW : ROW + 1])

    def batch(_: object) -> None:
        model(x)

    return locate(alone, batch, by_batch(BATCH, ROW))


def told(found: Located | None) -> tuple[str, str, bool, str]:
    assert found is not None
    cause = found.cause
    assert cause.got != cause.expected and 0 < cause.elements_differing <= cause.elements == 8
    return cause.operation, cause.path, cause.repeats, cause.note


def test_what_does_not_come_back(tmp_path: Path) -> None:
    """The element is the one that was seen; no script is written of an operation that shows nothing."""
    found = search("written", "turned", "written")
    assert told(found) == ("aten::add.Tensor", "Sequential.0", False, CHANCE)
    assert found is not None and found.operations is None
    with pytest.raises(UsageError, match="does not repeat itself"):
        write(found, tmp_path / "show", None)
    assert not (tmp_path / "show").exists()


def test_what_differs_otherwise_each_time(tmp_path: Path) -> None:
    """The script shows the operation as it was made again."""
    found = search("written", "turned", "rolled")
    assert told(found) == ("aten::add.Tensor", "Sequential.0", False, CHANCE)
    assert found is not None
    script = write(found, tmp_path / "show", None)
    assert subprocess.run([sys.executable, str(script)], check=False, capture_output=True).returncode == 1


def test_what_comes_by_other_operations() -> None:
    """The run that is made again does not call it at all."""
    found = search("written", "turned", "subtracted")
    assert told(found) == ("aten::add.Tensor", "Sequential.0", False, f"{CHANCE}, by way of other operations")
    assert found is not None and found.operations is None


def test_what_does_not_change() -> None:
    """A fault that is there each time is no matter of chance."""
    operation, path, repeats, note = told(search("turned", "turned", "turned"))
    assert (operation, path, repeats) == ("aten::add.Tensor", "Sequential.0", True)
    assert CHANCE not in note


def test_operations_that_change() -> None:
    """A run that makes others once, as one that fills a cache, is made again; one that never settles has no cause."""
    warm = search("subtracted", "turned", "turned", "turned", "turned")
    assert told(warm)[:3] == ("aten::add.Tensor", "Sequential.0", True)
    assert search(*["subtracted", "turned"] * 3) is None
