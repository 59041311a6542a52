"""torch.distributed under a policy between GPUs over NCCL: every way of calling reaches the GPUs' own path."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL between ranks needs two GPUs or more"),
]

SCRIPT = Path(__file__).parent / "distributed_cases.py"
NAMES = re.findall(r"^@case\ndef (\w+)", SCRIPT.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote; NVLink multicast is left alone."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join(path for path in (str(SCRIPT.parent), *sys.path) if path)
    quiet = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, "cuda"],
        env=os.environ | quiet | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    crashes = "".join(path.read_text() for path in folder.glob("crash-*.txt"))
    assert done.returncode == 0, crashes + done.stderr[-4000:]
    size = min(torch.cuda.device_count(), 8)
    return [json.loads((folder / f"{size}-{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.parametrize("name", NAMES)
def test_every_way_of_calling(ranks: Any, name: str) -> None:
    """The reference's bytes on every rank. Two ranks commute; from three on, every rotated order has other bytes."""
    for rank in ranks:
        inside = rank["inside"][name]
        assert inside.get("same"), inside
        assert any(count > 0 and "ranks)" in op for op, count in inside["counts"].items()), inside
        assert rank["trusted"].get(name, {"same": True}).get("same"), rank["trusted"][name]
        assert rank["rotated"] == [len(ranks) > 2] * (len(ranks) - 1)


def test_decisions(ranks: Any) -> None:
    """Sums and gathers take the GPUs' own path, proved at the group's size on every one of its ways."""
    for rank in ranks:
        sums = [row for row in rank["decisions"] if row["op"] == "c10d::allreduce_"]
        assert sums and {row["path"] for row in sums} == {"cuda/all_reduce"}
        assert sums[0]["proof"]["subject"] == f"all_reduce sum float32 {len(ranks)} ranks"
        assert sums[0]["proof"]["cases"] >= 4 * 2 * 67 * len(ranks)


def test_transformers_tensor_parallelism(ranks: Any) -> None:
    """from_pretrained(tp_plan="auto"): every sum over GPUs is the reference's, and a row does not see its batch."""
    for rank in ranks:
        found = rank["llama"]
        assert found["sums"] == found["counts"][f"c10d::allreduce_(sum, {len(ranks)} ranks)"] == found["planned"] >= 4
        assert found["same"] == found["sums"] and found["ranks agree"] and found["alone"]
        assert len(ranks) == 2 or found["rotated"] > 0
