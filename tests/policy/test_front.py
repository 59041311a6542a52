"""The short way of ``dist.all_reduce``: taken where it may be, with the reference's bytes, and nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL between ranks needs two GPUs or more")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])]


@pytest.fixture(scope="module", params=DEVICES)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three processes saw, or one for each GPU; NVLink multicast is left alone."""
    native.library()
    folder = tmp_path_factory.mktemp("front")
    script = Path(__file__).parent / "front_cases.py"
    paths = os.pathsep.join(path for path in sys.path if path)
    quiet = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
    environment = os.environ | quiet | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, folder, request.param], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


@pytest.mark.parametrize("case", FRONT + OPERATOR)
def test_bytes_and_ways(ranks: list[dict[str, Any]], case: str) -> None:
    """The reference's bytes on every rank, by the way that the case is to take."""
    for rank in ranks:
        ways, same = rank[case]
        # Proofs, made at a first call, go through the communicator too.
        assert same and ways[-1] == ("front" if case in FRONT else "operator"), rank[case]
        assert rank["order shows"] or len(ranks) == 2  # two commute


def test_it_is_taken_out(ranks: list[dict[str, Any]]) -> None:
    """torch's own function is back, and the one kept from inside is the same as that: gloo's order."""
    for rank in ranks:
        assert rank["replaced"] and rank["restored"] and rank["left"] and rank["max"]
        assert rank["kept"][0] == []
    if len(ranks) > 2:
        assert not all(rank["kept"][1] for rank in ranks)
