"""The GPU library's sources pass the compiler's front ends, device and host; nothing is assembled and nothing runs.

Templates are instantiated for two ranks. Instructions written in assembly are not looked at: the whole compilation is
``scripts/gpu.py``, which takes minutes.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted(path.name for path in CSRC.glob("*.cu"))
FLAGS = ("-std=c++17", "-arch=sm_90", "-fmad=false", "-DDETINFER_RANKS_BUILT=2", "--fdevice-syntax-only")


def errors(source: Path) -> str:
    """What the compiler says of a source that it refuses; nothing of one that it takes."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on this machine: the CUDA sources are not compiled")
    command = [nvcc, *FLAGS, "-c", str(source), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""


@pytest.mark.parametrize("source", SOURCES)
def test_compiles(source: str) -> None:
    """Every source, for the architecture that ships."""
    assert errors(CSRC / source) == ""


@pytest.mark.parametrize(
    ("file", "before", "planted"),
    [
        ("gpu/blanks.h", "// What a reducing or", "static __device__ void fence_system() {}\n"),
        ("gpu/packets.h", "// Ends the call", "__device__ void end() { Wrong<N>::end(); }\n"),
        ("all_gather.cu", "int all_gather(", "#ifndef __CUDA_ARCH__\nint broken() { return nowhere; }\n#endif\n"),
    ],
    ids=["a name defined twice", "a name that is none", "host code alone"],
)
def test_faults_are_seen(file: str, before: str, planted: str, tmp_path: Path) -> None:
    """A fault in a header's function, in a template, in code that the device never sees."""
    folder = tmp_path / "csrc"
    shutil.copytree(CSRC, folder)
    text = (folder / file).read_text()
    assert text.count(before) == 1
    (folder / file).write_text(text.replace(before, planted + before))
    assert "error" in errors(folder / "all_gather.cu")
