"""Of an operation that differs: which kernels ran with which grids, and whether the shapes decide or what the others hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from detinfer import bits
from detinfer.goldens.cause.align import Pair
from detinfer.goldens.cause.first import Differs
from detinfer.goldens.cause.kernels import confirmed, kernels, launched
from detinfer.goldens.cause.locate import by_batch
from detinfer.goldens.cause.operations import Key, Operation
from detinfer.ops.matmul_cuda_proof import operands

ROW, BATCH = 2, 5


def halves_from_four_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One chain each, but with four rows or more the sum of two halves."""
    if len(x) < 4:
        return x @ weight
    half = x.shape[1] // 2
    return x[:, :half] @ weight[:half] + x[:, half:] @ weight[half:]


def scaled_by_all(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows divided by the greatest of the batch and multiplied again, element by element."""
    scale = x.abs().amax() / 3
    return (x[:, :40] / scale) * weight[:1] * scale


def scaled_and_counted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """By what the others hold and by how many they are."""
    return scaled_by_all(x, weight) + (len(x) - 1) * 1e-3


class Function:
    """In place of an operator."""

    _schema = None

    def __init__(self, call: Any) -> None:
        self.call = call

    def name(self) -> str:
        return "aten::mm"

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


def both(call: Any) -> tuple[Operation, Operation, Differs]:
    """The operation on one row alone, and on that row among others, which it gives other bytes."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randint(-127, 128, (BATCH, 96), generator=draw) / 64
    x[0, 0] = 77.0  # the greatest of all, in another row
    weight = torch.randint(-127, 128, (96, 40), generator=draw) / 61
    found = []
    for given in (x[ROW : ROW + 1].clone(), x):
        args = (given, weight)
        found.append(Operation(Key("aten::mm", "layer", 0), Function(call), args, {}, [call(*args)]))
    pair: Pair = ((slice(0, 1), slice(0, 40)), (slice(ROW, ROW + 1), slice(0, 40)))
    seen = [run.results[0][place] for run, place in zip(found, pair, strict=True)]
    assert bits.count_mismatches(*seen) > 0
    return found[0], found[1], Differs(0, 0, pair, *seen)


def parts(a: torch.Tensor, b: torch.Tensor) -> Iterator[Pair]:
    return by_batch(BATCH, ROW)(0, a, b)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (halves_from_four_rows, "the same bytes as here: the shapes decide"),
        (scaled_by_all, "its bytes alone: what the others hold decides"),
        (scaled_and_counted, "other bytes than on either side"),
    ],
)
def test_what_decides(call: Any, says: str) -> None:
    """The other run's shapes are forced on the request alone: zeros stand for everybody else, and no argument is changed."""
    one, many, differs = both(call)
    before = [bits.as_bytes(t) for t in many.args]
    assert says in confirmed(one, many, differs, parts)
    assert [bits.as_bytes(t) for t in many.args] == before


def test_what_cannot_be_told_is_not_said() -> None:
    """An operand in which nothing is known to be the request's, and an operation that all ranks make together."""
    one, many, differs = both(halves_from_four_rows)
    assert confirmed(one, many, differs, lambda a, b: iter(())) == ""
    assert confirmed(one, replace(many, key=replace(many.key, joint=True)), differs, parts) == ""


def test_grids_of_a_trace() -> None:
    """In the order of time, copies without a grid, what the host did left out."""
    events = [
        {"cat": "cpu_op", "name": "aten::mm", "ts": 1.0, "args": {}},
        {"cat": "kernel", "name": "reduce", "ts": 9.5, "args": {"grid": [8, 1, 1], "block": [32, 16, 1]}},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 2, "args": {"bytes": 4}},
        {"cat": "kernel", "name": "nvjet", "ts": 5, "args": {"grid": [132, 1, 2], "block": [384, 1, 1]}},
        {"ph": "M", "name": "process_name", "ts": 0},
    ]
    assert launched(events) == ["Memcpy DtoD", "nvjet <<<132x1x2, 384x1x1>>>", "reduce <<<8x1x1, 32x16x1>>>"]
    assert kernels(both(scaled_by_all)[0]) == [], "on a CPU there are none"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_of_a_product_on_a_gpu() -> None:
    """cuBLAS splits k for few rows and not for many: the kernels have grids, and the shapes decide."""
    x, weight = operands(256, 1280, 8192, torch.bfloat16, torch.device("cuda", 0))
    weight = weight.t()
    mm = torch.ops.aten.mm.default
    alone, among = (
        Operation(Key("aten::mm", "layer", 0), mm, (given, weight), {}, [mm(given, weight)]) for given in (x[:16], x)
    )
    pair: Pair = ((slice(0, 16), slice(0, 1280)), (slice(0, 16), slice(0, 1280)))
    assert bits.count_mismatches(alone.results[0], among.results[0][:16]) > 0, (
        "cuBLAS takes the same order at 16 and 256 rows"
    )
    assert all("<<<" in name for run in (alone, among) for name in kernels(run) if not name.startswith("Mem"))
    assert kernels(alone) != kernels(among)
    differs = Differs(0, 0, pair, alone.results[0], among.results[0][:16])
    said = confirmed(alone, among, differs, lambda a, b: by_batch(16, 0)(0, a, b))
    assert "the shapes decide" in said
