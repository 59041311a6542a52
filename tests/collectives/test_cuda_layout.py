"""The structures that Python fills in for the GPU library lie in memory as csrc/communicator_gpu.h has them."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from detinfer.collectives import cuda_native

CSRC = Path(__file__).parents[2] / "csrc"
HEADER = CSRC / "communicator_gpu.h"
STRUCTURES: dict[str, type[ctypes.Structure]] = {"GpuConfig": cuda_native.Config, "GpuCall": cuda_native.Call}


def _fields(structure: str) -> list[str]:
    """The names of a structure's fields in the header, in order."""
    body = re.search(rf"struct {structure} {{(.*?)\n}};", HEADER.read_text(), re.DOTALL)
    assert body is not None
    lines = re.sub(r"//[^\n]*", "", body[1]).split(";")
    return [re.findall(r"\w+", part)[-1] for line in lines if line.strip() for part in line.split(",")]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_field_lies_where_csrc_has_it(structure: str, tmp_path: Path) -> None:
    """Names, order, sizes and offsets, as the C++ compiler counts them."""
    here = STRUCTURES[structure]
    names = [field[0] for field in here._fields_]
    assert [name.rstrip("_") for name in names] == _fields(structure)
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert compiler, "no C++ compiler: the project builds with one"
    print_all = "".join(
        f'std::printf("%zu %zu\\n", offsetof({structure}, {name}), sizeof({structure}::{name}));\n'
        for name in _fields(structure)
    )
    source = tmp_path / "layout.cpp"
    source.write_text(
        f'#include <cstddef>\n#include <cstdio>\n#include "{HEADER}"\nusing namespace detinfer;\n'
        f'int main() {{\n{print_all}std::printf("%zu\\n", sizeof({structure}));\n}}\n'
    )
    program = tmp_path / "layout"
    subprocess.run([compiler, "-std=c++17", str(source), "-o", str(program)], check=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.split("\n")
    offsets = [tuple(map(int, line.split())) for line in printed[: len(names)]]
    assert offsets == [(getattr(here, name).offset, getattr(here, name).size) for name in names]
    assert int(printed[len(names)]) == ctypes.sizeof(here)
