"""Attention's Triton kernels compile for AMD's matrix units and NVIDIA's, and lay out the keys of a product in one way.

Compiled, or run by Triton's interpreter: nothing here runs on a GPU, and none of the kernels has ever run on AMD's.
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

triton = pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.7.1")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from detinfer.ops import attention_deal, attention_plain_triton, attention_prefill_triton, attention_triton  # noqa: E402

sys.path.append(str(Path(__file__).parent))
from uniform_registers import unwritten  # noqa: E402

AMD = (GPUTarget("hip", "gfx942", 64), GPUTarget("hip", "gfx950", 64))
NVIDIA = GPUTarget("cuda", 90, 32)

COMMON: dict[str, Any] = {
    "G": 4, "SHARE": 1, "D": 64, "DV": 64, "DP": 64, "DVP": 64, "PAGE": 0, "CAUSAL": True, "WINDOW": False,
    "SPANS": False, "MASK": 0, "STARTED": False, "COUNTED": False, "SINK": False, "WANT_LSE": False,
}  # fmt: skip
TILES = {**COMMON, "BM": 64}
FEW = {**COMMON, "BM": 16, "POSITIONS": 1, "SCAN": False, "SEVERAL": False, "WHOLE": False}
WHOLE = {**FEW, "D": 128, "DV": 128, "DP": 128, "DVP": 128, "WHOLE": True}
PREFILL = {
    "G": 4, "SHARE": 1, "D": 64, "DV": 64, "DP": 64, "DVP": 64, "BM": 64, "CAUSAL": True, "WANT_LSE": False,
}  # fmt: skip
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tiles, a mask": (attention_triton.tiles, {**TILES, "SPANS": True, "MASK": 1}),
    "decode, a mask": (attention_triton.decode, {**FEW, "CAUSAL": False, "MASK": 1, "SCAN": True}),
    "decode, a mask too long to be read there": (
        attention_triton.decode,
        {**FEW, "CAUSAL": False, "MASK": 1, "SPANS": True},
    ),
    "decode, pages, a window, sinks": (
        attention_triton.decode,
        {**FEW, "PAGE": 16, "COUNTED": True, "WINDOW": True, "SINK": True},
    ),
    "decode, several splits to a program": (
        attention_triton.decode,
        {**FEW, "D": 128, "DV": 128, "DP": 128, "DVP": 128, "SEVERAL": True},
    ),
    "decode, whole rows": (attention_triton.decode, WHOLE),
    "prefill": (attention_prefill_triton.prefill, PREFILL),
    "plain": (
        attention_plain_triton.plain,
        {"D": 64, "DV": 64, "DP": 64, "DVP": 64, "SINK": False, "SPLIT": 0, "BACKWARDS": False},
    ),
}
"""Each kernel with constants of a call."""

_TYPES = {"LSE": "*fp32", "TOPS": "*fp32", "TOTALS": "*fp32", "OUTS": "*fp32", "ADDED": "*fp32", "c": "fp32"}


def compiled(name: str, target: Any, **options: int) -> Any:
    kernel, constants = KERNELS[name]
    dtype = "bf16"
    types = {}
    for argument in kernel.arg_names:
        if argument in constants:
            types[argument] = "constexpr"
        elif argument in ("Q", "K", "V", "OUT", "SINKS"):
            types[argument] = f"*{dtype}"
        elif argument in ("KD", "VD"):
            types[argument] = f"tensordesc<{dtype}[1, 1, 64, 64]>"
        elif argument in ("BIAS", "MASKS"):
            types[argument] = "*u8"
        elif argument == "SHARE":
            types[argument] = "i32"
        else:
            types[argument] = _TYPES.get(argument, "*i32" if argument.isupper() and len(argument) > 2 else "i32")
    # As at a launch: rows of K and V start on 16 bytes.
    aligned = [
        place
        for place, argument in enumerate(kernel.arg_names)
        if argument not in constants and (argument in "QKV" or re.fullmatch(r"OUTS?|[qkvo]_[bhin]|[kv]_page", argument))
    ]
    attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    chosen = {"enable_fp_fusion": False, "num_warps": 4, "num_stages": 2, **options}
    return triton.compile(source, target=target, options=chosen)


@pytest.mark.parametrize("target", AMD, ids=lambda target: target.arch)
@pytest.mark.parametrize("name", KERNELS)
def test_amd(name: str, target: Any) -> None:
    """Code for the processor, with instructions of its matrix unit."""
    if triton.__version__ < "3.7" and name.startswith("decode, a mask"):
        pytest.skip("Triton 3.6 cannot compile this kernel for AMD: AMD's GPUs need 3.7 or later")
    assembly = compiled(name, target).asm["amdgcn"]
    assert target.arch in assembly
    assert re.search(r"v_mfma_f32_\d+x\d+x\d+_?bf16", assembly)


@pytest.mark.parametrize("name", KERNELS)
def test_nvidia(name: str) -> None:
    """Matrix instructions, no contraction, and no operand whose keys lie in another order than the others'."""
    made = compiled(name, NVIDIA)
    assert re.search(r"(wgmma\.mma_async|mma)\.sync", made.asm["ptx"])
    widths = set(re.findall(r"kWidth = (\d+)", made.asm["ttgir"]))
    assert widths <= {"2"}, f"keys are permuted inside a product: {widths}"
    assert widths


@pytest.mark.parametrize("name", KERNELS)
def test_no_uniform_register_is_read_before_it_is_written(name: str, tmp_path: Path) -> None:
    """What the assembler of Triton 3.6 does wrong in tiles of 16 columns (``uniform_registers``)."""
    text = sass(compiled(name, NVIDIA), tmp_path)
    assert text.count("MMA") >= 2 and not unwritten(text)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"MASK": 1, "SCAN": True},
        {"MASK": 2, "SCAN": True},
        {"PAGE": 16, "COUNTED": True, "WINDOW": True, "SINK": True},
    ],
    ids=["plain", "a bool mask", "an added mask", "pages, a window, sinks"],
)
def test_whole_rows_fit_in_shared_memory(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In as much of it as the rule counts with, where it asks for the most stages."""
    monkeypatch.setitem(KERNELS, "whole", (attention_triton.decode, {**WHOLE, "G": 8, **more}))
    stages = max(stages for _, stages in attention_deal.STAGES)
    shared = compiled("whole", NVIDIA, num_warps=2, num_stages=stages).metadata.shared
    assert shared <= (stages - 1) * attention_deal._STAGE_BYTES + attention_deal._OTHER_BYTES
    assert more or shared > (stages - 1) * attention_deal._STAGE_BYTES


def sass(code: Any, folder: Path) -> str:
    """The machine code, in words."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip(f"this Triton has no {tool}")
    file = folder / "kernel.cubin"
    file.write_bytes(code.asm["cubin"])
    return subprocess.run([tool, "--dump-sass", file], capture_output=True, text=True, check=True).stdout


def test_a_lost_write_is_found() -> None:
    """The fault as it was seen, in short: one path writes UR30, the other does not, and a descriptor is made of it."""
    lost = """
        /*0000*/ S2UR UR4, SR_CTAID.X ;
        /*0010*/ @P0 BRA 0x0040 ;
        /*0020*/ USHF.R.S32.HI UR30, URZ, 0x1f, UR4 ;
        /*0030*/ BRA 0x0050 ;
        /*0040*/ UMOV UR12, UR4 ;
        /*0050*/ UIADD3 UR30, UP0, UR30, 0x20, URZ ;
        /*0060*/ UMOV UR31, 0xc0000010 ;
        /*0070*/ HGMMA.64x16x16.F32.BF16 R32, R40, gdesc[UR28].tnspB, R32 ;
        /*0080*/ EXIT ;
    """
    assert unwritten(lost) == [("0x50 UIADD3 UR30, UP0, UR30, 0x20, URZ", 30)]
    assert not unwritten(lost.replace("UMOV UR12, UR4", "UMOV UR30, UR4"))
    assert [n for _, n in unwritten(lost.replace("R32, R40, gdesc[UR28]", "R32, gdesc[UR28]"))] == [30, 28, 29]


@pytest.mark.skipif(triton.__version__ < "3.7", reason="the interpreter of Triton 3.6 does not take these kernels")
def test_interpreted_on_the_cpu() -> None:
    """Decode, tiles and prefill on splits, masks short and long, windows, sinks, padding and pages, near fp64."""
    program = Path(__file__).parent / "attention_interpreted.py"
    here = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", program], env=here, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    shown = {name: found.pop(name) for name in list(found) if name.startswith("proof")}
    assert "do not use it" in shown.pop("proof, a wrong order").lower()
    assert len(shown) == 2 and all(count >= 8 * 2 * 24 for count in shown.values())
    assert len(found) == 34
    wrong = {name: error for name, error in found.items() if (error < 1e-6) is name.endswith("rows turned")}
    assert not wrong, "far from fp64, or a wrong head would be as near"


def test_a_byte_that_weights_depend_on_would_permute_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """What _mask_byte is for: with a plain load of the mask, the same kernel fails the check above."""

    @triton.jit
    def loaded(at, mask):  # type: ignore[no-untyped-def]
        return triton.language.load(at, mask=mask, other=0)

    monkeypatch.setattr(attention_triton, "_mask_byte", loaded)
    attention_triton._walk.hash = attention_triton.decode.hash = None
    found = set(re.findall(r"kWidth = (\d+)", compiled("decode, a mask", NVIDIA).asm["ttgir"]))
    assert found - {"2"}
