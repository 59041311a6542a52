"""``wide``, the products of many rows in Triton: every result in its place, and code for AMD's and NVIDIA's matrix units.

Interpreted and compiled; ``test_matmul_wide`` and ``test_moe_cuda`` have what a GPU runs.
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
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.7.1")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from detinfer.ops import matmul_wide  # noqa: E402
from detinfer.ops.matmul_triton import wide  # noqa: E402

TARGETS = (GPUTarget("hip", "gfx942", 64), GPUTarget("hip", "gfx950", 64), GPUTarget("cuda", 90, 32))


@pytest.mark.parametrize("across", [False, True], ids=["by k", "across"])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
def test_it_compiles(target: Any, across: bool) -> None:
    """With instructions of the matrix unit; on Hopper those of a group of warps, k in the steps of 16 of the written order."""
    constants = matmul_wide.constants(
        matmul_wide.Kind(
            0, torch.bfloat16, torch.float32, (128, 256), grouped=True, biased=True, even=True, across=across
        )
    )
    assert list(constants) == wide.arg_names[-len(constants) :], "in the kernel's order: a start gives them by place"
    if target.backend == "hip":
        constants["BN"] = 128  # what its shared memory holds
    constants["w_n" if across else "w_k"] = 1
    types = {}
    for name in wide.arg_names:
        pointers = {"X": "*bf16", "W": "*bf16", "BIAS": "*bf16", "ORDER": "*i32", "TILES": "*i32", "OUT": "*fp32"}
        types[name] = "constexpr" if name in constants else pointers.get(name, "i32")
    even = ("X", "W", "OUT", "N", "K", "x_row", "w_expert", "w_k" if across else "w_n")
    attributes = {(wide.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(fn=wide, signature=types, constexprs=constants, attrs=attributes)
    options = {"enable_fp_fusion": False, "num_warps": 8, "num_stages": 3 if target.backend == "cuda" else 2}
    made = triton.compile(source, target=target, options=options).asm
    if target.backend == "cuda":
        assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16", made["ptx"])
        assert made["ptx"].count("cp.async.cg.shared.global") >= 8, (
            "both operands are copied while others are multiplied"
        )
    else:
        assert re.search(r"v_mfma_f32_\d+x\d+x\d+_?bf16", made["amdgcn"])


def test_every_result_is_in_its_place() -> None:
    """Experts with one assignment and with many, rows of a stride, columns and k that end inside a tile, no expert at all."""
    if triton.__version__ < "3.7":
        pytest.skip("the interpreter of Triton 3.6 does not take this kernel")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("matmul_interpreted.py"))],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 16 and not any(found.values()), found
