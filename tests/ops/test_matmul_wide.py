"""``wide``: what it takes, when its machine code is made and proved, and that a wrong kernel is not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer.errors import Diverged, UsageError
from detinfer.ops import matmul_wide, matmul_wide_proof, moe_cuda
from detinfer.ops.matmul_blocks import WIDE
from detinfer.ops.matmul_wide import Code, Kind, lies, takes

BF16 = torch.bfloat16
KIND = Kind(0, BF16, BF16, (128, 256), grouped=False, biased=False, even=True, across=False)
SOURCE = Path(matmul_wide.__file__).with_name("matmul_triton.py")


def test_the_rule() -> None:
    """By assignments for each expert: of what was measured the least, the middle and the most; csrc's tiles below."""
    measured = {(8, 2): (64, 128, 128), (128, 8): (64, 64, 128), (32, 4): (64, 128, 128)}
    for (experts, places), rows in measured.items():
        assert tuple(moe_cuda.wide_rows(tokens * places, experts) for tokens in (64, 512, 4096)) == rows
        assert [moe_cuda.wide_rows(tokens * places, experts) for tokens in (1, 8)] == [0, 0]
    assert moe_cuda.wide_rows(127, 4) == 0 and moe_cuda.wide_rows(128, 4) == 64, "fewer assignments than were measured"
    assert moe_cuda.wide_rows(511, 128) == 0 and moe_cuda.wide_rows(512, 128) == 64, "fewer for each expert"
    assert moe_cuda.wide_rows(127, 1) == 0 and moe_cuda.wide_rows(128, 1) == 128
    assert moe_cuda.wide_rows(0, 4) == 0


def test_what_it_takes() -> None:
    """Only layouts of one kind, so that a kind's machine code is right for all of them."""
    w = torch.zeros(3, 512, 384, dtype=BF16)
    gaps = torch.zeros(3, 512, 400, dtype=BF16)[..., :384]
    assert takes(w) and takes(w[0]) and takes(w.mT) and takes(gaps) and takes(w[0].half())
    shifted = torch.zeros(3 * 512 * 384 + 8, dtype=BF16)
    assert takes(shifted[8:].view(3, 512, 384))
    for bad, why in (
        (w.float(), "dtype"),
        (w[:, :255], "fewer columns than a tile"),
        (w[:, :264], "columns are no multiple of 16"),
        (w[..., :376], "k"),
        (w[..., ::2], "nothing is contiguous"),
        (torch.zeros(3, 512, 392, dtype=BF16)[..., :384], "rows are 392 apart"),
        (torch.zeros(3 * 512 * 384 + 1, dtype=BF16)[1:].view(3, 512, 384), "an odd address"),
        (torch.zeros(3 * (512 * 384 + 8), dtype=BF16).as_strided((3, 512, 384), (512 * 384 + 8, 384, 1)), "experts"),
    ):
        assert not takes(bad), why
    x = torch.zeros(40, 384, dtype=BF16)
    assert lies(x) and lies(gaps[0]) and lies(x[1:])
    assert not lies(x.t()) and not lies(torch.zeros(40, 392, dtype=BF16)[:, 4:388])
    assert not lies(torch.zeros(40, 392, dtype=BF16)[:, :384])


class Machine:
    """Stands for a GPU: what is captured, and how often code was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing, self.made, self.result = False, [], "code"
        monkeypatch.setattr(matmul_wide, "_codes", {})
        monkeypatch.setattr(matmul_wide, "available", lambda device: device == 0)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(matmul_wide_proof, "made_and_proved", self._make)

    def _make(self, kind: Kind) -> Any:
        self.made.append(kind)
        return self.result


def test_code_is_made_once_and_never_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    machine.capturing = True
    assert matmul_wide.code(KIND) is None and not machine.made
    machine.capturing = False
    assert matmul_wide.code(KIND) == matmul_wide.code(KIND) == "code" and machine.made == [KIND]
    machine.capturing = True
    assert matmul_wide.code(KIND) == "code", "proved before: it runs inside a capture"
    machine.capturing, machine.result = False, None
    other = KIND._replace(biased=True)
    assert matmul_wide.code(other) is matmul_wide.code(other) is None
    assert machine.made == [KIND, other], "a compiler that failed is not asked again"
    assert matmul_wide.code(KIND._replace(device=1)) is None, "another GPU"


def test_a_compiler_that_fails_is_said_and_does_no_harm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler")

    class Nothing:
        def __init__(self, device: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Nothing)
    monkeypatch.setattr(matmul_wide_proof, "inputs", lambda kind: None)
    monkeypatch.setattr(matmul_wide_proof, "_make", broken)
    assert matmul_wide_proof.made_and_proved(KIND) is None
    assert "Failed to find C compiler" in caplog.text and "the same bytes" in caplog.text


def test_what_a_start_gives_triton() -> None:
    """Addresses, numbers and constants in the order of the kernel's arguments, and a program for each tile."""
    given: list[Any] = []

    class Made:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, stream: given.append((grid, args, stream))

    numbers = (1000, 1, 600, 64, 64, 0, 64, 1)
    Code(KIND, Made()).start((1, 2, 3, 4, 5, 6), numbers, 9)
    Code(KIND._replace(grouped=True), Made()).start((1, 2, 3, 4, 5, 6), numbers, 9, 11)
    constants = (128, 256, matmul_wide.BAND)
    assert given == [
        ((8 * 3, 1, 1), (1, 2, 3, 4, 5, 6, *numbers, *constants, False, False, True, False), 9),
        ((11 * 3, 1, 1), (1, 2, 3, 4, 5, 6, *numbers, *constants, True, False, True, False), 9),
    ]


def test_other_tiles_are_refused() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    x = torch.zeros(4, 16, dtype=BF16)
    with pytest.raises(UsageError, match="64 or 128 rows, not 32"):
        matmul_wide.held(x, x, None, None, None, torch.zeros(4, 4), 1, (32, 256))


FAULTS = {
    "k from its end": (
        ("    k = tl.arange(0, DEPTH)\n", "    k = tl.arange(0, DEPTH) + (K - DEPTH)\n"),
        ("        x += DEPTH\n", "        x -= DEPTH\n"),
        ("        w += DEPTH * w_k\n", "        w -= DEPTH * w_k\n"),
    ),
    "a sum that is rounded in every stage": (
        ("        w += DEPTH * w_k\n", "        w += DEPTH * w_k\n        acc = acc.to(tl.bfloat16).to(tl.float32)\n"),
    ),
    "the bias first": (
        ("    acc = tl.zeros((BM, BN), tl.float32)\n",
         "    acc = tl.zeros((BM, BN), tl.float32) + tl.load(BIAS + expert * N + column).to(tl.float32)[None, :]\n"),
        ("    if BIASED:\n", "    if BIASED and K < 0:\n"),
    ),
    "a tile without its last row": (("    here = at < end\n", "    here = at + 1 < end\n"),),
    "results a row further": (("    to = OUT + row.to(tl.int64)", "    to = OUT + (row + 1).to(tl.int64)"),),
}  # fmt: skip
"""Kernels with another order of a sum, or that write elsewhere, as changes of the kernel's text."""


def planted(fault: str, folder: Path) -> Any:
    """The kernel with a fault."""
    text = SOURCE.read_text()
    for old, new in FAULTS[fault]:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "matmul_planted.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.wide


@pytest.mark.gpu
@pytest.mark.usefixtures("capability_9")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_not_proved(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detinfer.ops import matmul_triton

    kind = KIND._replace(device=torch.cuda.current_device(), tile=(64, 256), biased=True)
    monkeypatch.setattr(matmul_triton, "wide", planted(fault, tmp_path))
    with pytest.raises(Diverged, match=r"wide of BM=64, BN=256, .* the machine code that Triton and ptxas made here"):
        matmul_wide_proof.made_and_proved(kind)


@pytest.mark.gpu
@pytest.mark.usefixtures("capability_9")
@pytest.mark.parametrize("across", [False, True], ids=["by k", "across"])
@pytest.mark.parametrize("grouped", [False, True], ids=["rows", "grouped"])
@pytest.mark.parametrize("even", [False, True], ids=["a part of a stage", "whole stages"])
def test_each_kind_is_proved(even: bool, grouped: bool, across: bool) -> None:
    """What the GPU makes of each way through the kernel, tiles, dtypes and biases taking turns."""
    turn = even + grouped + across
    kind = Kind(
        torch.cuda.current_device(), matmul_wide.DTYPES[turn % 2], torch.float32 if grouped != even else
        matmul_wide.DTYPES[turn % 2], ((128, 256), *(block[:2] for block in WIDE))[(even + across) % 3], grouped, turn % 3 == 0, even, across,
    )  # fmt: skip
    code = matmul_wide_proof.made_and_proved(kind)
    assert code is not None, "Triton makes code on this machine"
    assert matmul_wide_proof.proved()[code.made.hash] > 250_000


@pytest.mark.gpu
@pytest.mark.usefixtures("capability_9")
@pytest.mark.parametrize("dtype", matmul_wide.DTYPES)
def test_not_a_number_and_infinity(dtype: torch.dtype) -> None:
    """The plain kernel's bytes also there: one NaN for all."""
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.ones(300, 128, dtype=dtype, device=device)
    w = torch.ones(1, 256, 128, dtype=dtype, device=device)
    x[3, 5], x[4, 6], x[5, 7], x[6, 1] = torch.nan, torch.inf, -torch.inf, -torch.nan
    x[7, 3], x[7, 9] = torch.inf, -torch.inf
    w[0, 11, 7], w[0, 12, 100], w[0, 13] = torch.nan, torch.inf, 0.0
    for unrounded in (False, True):
        want = moe_cuda.product(x, w, path="reference", unrounded=unrounded)
        found = moe_cuda.product(x, w, path="wide", unrounded=unrounded)
        as_int = torch.int32 if unrounded else torch.int16
        assert bool((found.view(as_int) == want.view(as_int)).all())
        assert bool(want.isnan().any()) and bool(want.isinf().any())
