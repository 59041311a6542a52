"""The GPU library that is built: rows that a kernel holds lie in registers, read from its machine code."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from detinfer import native

MOST = 16
"""Bytes of local memory of a thread: a word or two that did not fit are no part of a row."""


def stacks(library: str) -> dict[str, int]:
    """Bytes of local memory that a thread of each kernel of a library takes."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump on this machine: it comes with CUDA's toolkit")
    said = subprocess.run([tool, "--dump-resource-usage", library], capture_output=True, text=True, check=True).stdout
    return {name: int(size) for name, size in re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+)", said)}


@pytest.mark.gpu
def test_rows_lie_in_registers() -> None:
    """nvcc's ``--split-compile`` put them into local memory: norms and softmax of many rows took two to three times as long."""
    found = native.load_gpu()
    if isinstance(found, native.NotLoaded):
        pytest.skip(f"no GPU library: {found.reason}")
    rows = {name: size for name, size in stacks(str(found.path)).items() if re.search(r"\d(norm|softmax)I", name)}
    assert len(rows) > 60
    assert {name: size for name, size in rows.items() if size > MOST} == {}
