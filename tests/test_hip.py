"""scripts/hip.py: which sources it compiles for AMD, and what it takes for a fault in their disassembly."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hip() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("hip", ROOT / "scripts/hip.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_source_is_compiled_or_named(hip: Any) -> None:
    """A new .cu file is compiled for AMD unless the script says why not; what it names exists."""
    every = {path.stem for path in (ROOT / "csrc").glob("*.cu")}
    assert set(hip.sources()) | set(hip.NVIDIA_ONLY) == every
    assert set(hip.ORDERED) <= set(hip.sources())


def test_what_is_wrong(hip: Any) -> None:
    """A source that waits for other ranks needs both instructions; others only have to compile."""
    good = f"  {hip.RELEASE}\n  s_waitcnt vmcnt(0)\n  {hip.ACQUIRE}\n"
    assert hip.wrong("all_reduce", good) is None
    assert hip.wrong("all_reduce", "") == "does not compile"
    assert "has no buffer_wbl2" in hip.wrong("all_reduce", hip.ACQUIRE)
    assert "has no buffer_inv" in hip.wrong("all_gather", hip.RELEASE)
    assert "buffer_wbl2 sc0 sc1 and no buffer_inv" in hip.wrong("all_gather", "s_endpgm")
    assert hip.wrong("communicator_gpu", "s_endpgm") is None


def test_the_tools_are_looked_for(hip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder that the variable names; all three have to be there."""
    monkeypatch.setenv("DETINFER_HIP_TOOLS", str(tmp_path))
    assert hip.tools() == tmp_path
    for name in ("ziglang", "clang_tidy"):
        (tmp_path / name).mkdir()
    assert not hip.prepared(tmp_path)
    (tmp_path / "triton").mkdir()
    assert hip.prepared(tmp_path)
    monkeypatch.delenv("DETINFER_HIP_TOOLS")
    assert hip.tools() == ROOT / "build/hip"
