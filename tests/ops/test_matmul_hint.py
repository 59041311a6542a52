"""What a user is told of linear layers on a GPU that nobody proved: once, and only where it costs time."""

from __future__ import annotations

import pytest
import torch

from detinfer.ops import cublaslt, matmul_cuda, matmul_wide


@pytest.fixture(autouse=True)
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are planned, not run: the tensors lie on the CPU."""
    monkeypatch.setattr(matmul_cuda, "kernel", lambda path, *_: path)
    monkeypatch.setattr(matmul_cuda, "_accelerates", lambda _: True)
    monkeypatch.setattr(matmul_wide, "available", lambda _: False)
    monkeypatch.setattr(cublaslt, "available", lambda: True)
    monkeypatch.setattr(cublaslt, "ready", lambda _: True)
    matmul_cuda._tell.cache_clear()


def plan(rows: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """The path of ``rows`` x 64 x 32."""
    x, w = torch.zeros(rows, 64, dtype=dtype), torch.zeros(32, 64, dtype=dtype)
    ((_, _, path),) = matmul_cuda.plan(x, w, None, 1.0, 1.0, True)
    return str(path)


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    assert [plan(rows) for rows in (1, 64)] == ["skinny", "skinny"] and not caplog.records
    assert plan(600, torch.float32) == "stream" and not caplog.records, "no proof would make fp32 faster there"
    assert [plan(rows) for rows in (65, 600, 65)] == ["skinny", "tile", "skinny"]
    (record,) = caplog.records
    assert record.name == "detinfer" and "detinfer prove TARGET" in record.getMessage()


def test_without_cublaslt_there_is_nothing_to_say(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cublaslt, "available", lambda: False)
    assert plan(600) == "tile" and not caplog.records
