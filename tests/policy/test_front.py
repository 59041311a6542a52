"""The short way of ``dist.all_reduce``: taken where it may be, with the reference's bytes, and nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from detinfer import native

OPERATOR = [
    "first",
    "bfloat16 first",
    "early",
    "async",
    "coalesced",
    "thread",
    "subclass",
    "traced",
    "inner first",
]
FRONT = ["second", "by name", "bfloat16 second", "strided", "inner second"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three processes saw."""
    native.library()
    folder = tmp_path_factory.mktemp("front")
    script = Path(__file__).parent / "front_cases.py"
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, folder], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("case", FRONT + OPERATOR)
def test_bytes_and_ways(ranks: list[dict[str, Any]], case: str) -> None:
    """The reference's bytes on every rank, by the way that the case is to take."""
    for rank in ranks:
        ways, same = rank[case]
        # Proofs, made at a first call, go through the communicator too.
        assert same and ways[-1] == ("front" if case in FRONT else "operator"), rank[case]
        assert rank["order shows"]


def test_it_is_taken_out(ranks: list[dict[str, Any]]) -> None:
    """torch's own function is back, and the one kept from inside is the same as that: gloo's order."""
    for rank in ranks:
        assert rank["replaced"] and rank["restored"] and rank["left"] and rank["max"]
        assert rank["kept"][0] == []
    assert not all(rank["kept"][1] for rank in ranks)
