"""torch.distributed under a policy, between real processes over gloo: every way of calling reaches the ordered paths.

One set of processes does all the work (``distributed_cases.py``, ``distributed_extras.py``); the tests read what it wrote.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from detinfer import native

pytest.importorskip("transformers", reason="transformers is not installed")

ROOT = Path(__file__).parents[2]
SIZES = (2, 3, 4)
COPIES = ("all_gather", "all_gather_into_tensor", "all_gather_coalesced", "functional_all_gather")
COPIES += ("dtensor_shard_to_replicate",)
"""Cases in which nothing is added: gloo gives the same bytes."""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of each world wrote."""
    native.library()  # without it the ranks would share no memory: say so at once
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).parent / "distributed_cases.py"
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, script, folder],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    crashes = "".join(path.read_text() for path in folder.glob("crash-*.txt"))
    assert done.returncode == 0, crashes + done.stderr[-4000:]
    return {n: [json.loads((folder / f"{n}-{r}.json").read_text()) for r in range(n)] for n in SIZES}


def names() -> list[str]:
    """The cases, in the order of the file."""
    text = (Path(__file__).parent / "distributed_cases.py").read_text()
    return re.findall(r"^@case\ndef (\w+)", text, re.MULTILINE)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", names())
def test_every_way_of_calling(worlds: Any, size: int, name: str) -> None:
    """The reference's bytes on every rank; gloo's own order and every rotated one have others."""
    ranks = worlds[size]
    for rank in ranks:
        inside = rank["inside"][name]
        assert inside.get("same"), inside
        # Seen once or more, as the operator that it comes to: nothing passed by.
        assert any(count > 0 and "ranks)" in op for op, count in inside["counts"].items()), inside
        assert rank["trusted"].get(name, {"same": True}).get("same"), rank["trusted"][name]
        assert "error" not in rank["plain"][name], rank["plain"][name]
    # Two ranks commute; from three on, the same inputs show another order.
    assert all(rank["rotated"] == [size > 2] * (size - 1) for rank in ranks)
    if size > 2 and name not in COPIES:
        assert not all(rank["plain"][name]["same"] for rank in ranks)


@pytest.mark.parametrize("size", SIZES)
def test_every_reduction_and_dtype(worlds: Any, size: int) -> None:
    """SUM, AVG, MAX and MIN of each dtype, and an exact PRODUCT, which the backend computes."""
    for rank in worlds[size]:
        assert len(rank["table"]) == 26
        assert [name for name, same in rank["table"].items() if not same] == []


@pytest.mark.parametrize("size", SIZES)
def test_without_shared_memory(worlds: Any, size: int) -> None:
    """Ranks on hosts of their own get the same bytes by the ordered gather, and so do all when one lacks memory."""
    for rank in worlds[size]:
        assert [name for name, found in rank["gathered"]["cases"].items() if not found.get("same")] == []
        reducing = [row for row in rank["gathered"]["decisions"] if row["op"] == "c10d::allreduce_"]
        assert {row["path"] for row in reducing} == {"ordered_gather"}
        assert all(row["proof"]["cases"] > 0 for row in reducing)
        assert rank["one_without_memory"]["same"] and rank["one_without_memory"]["paths"] == ["ordered_gather"]


@pytest.mark.parametrize("size", SIZES)
def test_refusals(worlds: Any, size: int) -> None:
    """What has no order is refused on every rank, traced or not, with the operation, the place and the remedy."""
    for rank in worlds[size]:
        refused = rank["refused"]
        for key in ("product, traced", "product, trusted", "premul", "avg of integers", "float8"):
            assert refused[key][0] == "RefusedError", refused[key]
        text = refused["product, traced"][1]
        for part in ("c10d::allreduce_ (product) on float32", "Sequential.1", "all_gather", "Policy(allow=...)"):
            assert part in text
        assert "float8_e4m3fn" in refused["float8"][1] and "use SUM" not in refused["float8"][1]
        kind, text = refused["ranks differ"]
        assert kind == "RankMismatch" and all(f"of {5 + r} x float32" in text for r in range(size))
        assert refused["afterwards"] == ["same"] and refused["allowed"] == ["True"]


@pytest.mark.parametrize("size", SIZES)
def test_decisions_are_written_down(worlds: Any, size: int) -> None:
    """As a golden's manifest has them: the path, and the proof at the group's size; the same on all ranks."""
    rows = [rank["decisions"] for rank in worlds[size]]
    assert all(row == rows[0] for row in rows)
    sums = [row for row in rows[0] if row["op"] == "c10d::allreduce_"]
    assert sums and all(row["path"] == "csrc/all_reduce" and row["accepted"] and row["portable"] for row in sums)
    assert sums[0]["proof"]["subject"] == f"all_reduce sum float32 {size} ranks"
    assert sums[0]["reason"] == f"sum over {size} ranks, in rank order"


@pytest.mark.parametrize("size", SIZES)
def test_afterwards_everything_is_as_before(worlds: Any, size: int) -> None:
    """Outside the block gloo's own order is back; groups that end inside it end."""
    for rank in worlds[size]:
        for name, found in rank["again"].items():
            assert found["same"] == rank["plain"][name]["same"]
        assert rank["group_ends"] == [True] * 3


@pytest.mark.parametrize("size", SIZES)
def test_transformers_tensor_parallelism(worlds: Any, size: int) -> None:
    """from_pretrained(tp_plan="auto"): every sum over ranks is the reference's, and a row does not see its batch."""
    for rank in worlds[size]:
        found = rank["llama"]
        # 2 x (o, down), and the embedding where this transformers cuts it by rows
        assert found["sums"] == found["counts"][f"c10d::allreduce_(sum, {size} ranks)"] == found["planned"] >= 4
        assert found["same"] == found["sums"]
        assert found["ranks agree"] and found["alone"]
        if size > 2:
            assert found["rotated"] > 0 and found["gloo"] > 0


def test_matrix_in_the_docs(worlds: Any) -> None:
    """docs/concepts/collectives.md lists every case by its call, with what it comes to."""
    page = (ROOT / "docs/concepts/collectives.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| (.+?) \| `(c10d::\w+)` \|", page, re.MULTILINE))
    text = (Path(__file__).parent / "distributed_cases.py").read_text()
    calls = dict(re.findall(r'^@case\ndef (\w+).*\n    """(.*)"""', text, re.MULTILINE))
    seen = {}
    for name, call in calls.items():
        counts = worlds[3][0]["inside"][name]["counts"]
        operators = [op.partition("(")[0] for op in counts if "ranks)" in op]
        seen[call.replace("|", "\\|")] = operators[0]
    assert listed == seen
