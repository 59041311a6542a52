"""The kernels of the collectives between GPUs, run on the CPU: the reference's bytes, by every path, on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cuda_vectors import GOLDENS, called
from fibers import Ranks, same, tensor_of

from detinfer import bits
from detinfer.collectives.stress import cancelling, special
from detinfer.errors import PeerError, RankMismatch
from detinfer.goldens.vectors import file
from detinfer.reference import all_gather as gather_reference
from detinfer.reference import all_reduce as reference
from detinfer.reference import reduce_scatter as scatter_reference
from detinfer.reference.all_reduce_rms_norm import all_reduce_rms_norm
from detinfer.reference.arithmetic import DType, load, rounded, store

PATHS = ("push", "push_tiles", "pull", "two_shot")
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
pytestmark = pytest.mark.usefixtures("on_fibers")


@pytest.fixture(params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Two ranks, and three, between which an order shows."""
    found = Ranks(request.param)
    yield found
    found.close()


def _sums(ranks: Ranks, tensors: list[torch.Tensor], path: str, **options: Any) -> list[torch.Tensor]:
    out = [torch.full_like(tensor, -3) for tensor in tensors]
    ranks.run(lambda c: c.all_reduce(tensors[c.rank], path=path, out=out[c.rank], **options))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum(ranks: Ranks, dtype: DType) -> None:
    """Both orders, at counts with and without a tail, over more tiles than a ring has; other orders have other bytes."""
    for n in (1, 7, 100, 2890, 30001):
        parts = cancelling(ranks.size, n, dtype)
        tensors = [tensor_of(part, dtype, "offset" if n == 2890 else "dense") for part in parts]
        for order in ("rank_order", "rank_tree"):
            expected = reference.all_reduce(parts, dtype, "sum", order)
            for path in PATHS:
                found = _sums(ranks, tensors, path, order=order)
                assert [same(each, expected) for each in found] == [True] * ranks.size, (n, order, path)
    if ranks.size > 2:
        right = reference.all_reduce(parts, dtype)
        total = load(parts[0], dtype)
        for part in parts[1:]:
            total = rounded(total + load(part, dtype), dtype)
        wrong = [reference.all_reduce(parts[turn:] + parts[:turn], dtype) for turn in (1, 2)]
        wrong += [store(total, dtype)] if dtype != "float32" else []
        assert all(value.tobytes() != right.tobytes() for value in wrong)


@pytest.mark.parametrize("op", ["avg", "max", "min"])
def test_special_values(ranks: Ranks, op: Any) -> None:
    """NaN, infinities, zeros of both signs and subnormals, in every dtype."""
    for dtype in DTYPES:
        parts = special(ranks.size, dtype)
        expected = reference.all_reduce(parts, dtype, op)
        for path in PATHS:
            found = _sums(ranks, [tensor_of(part, dtype) for part in parts], path, op=op)
            assert all(same(each, expected) for each in found), (dtype, path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ones_bits(ranks: Ranks, dtype: DType) -> None:
    """Words of ones, which are what push takes for no data, on some ranks: their sums are NaN, and others stay what they are."""
    parts = [part.copy() for part in cancelling(ranks.size, 4001, dtype)]
    for rank, part in enumerate(parts):
        part[16 * rank : 16 * rank + 8] = -1 % (1 << 8 * part.itemsize)
        part[1000 + rank :: 64] = -1 % (1 << 8 * part.itemsize)
    for op in ("sum", "max"):
        expected = reference.all_reduce(parts, dtype, op)
        for path in PATHS:
            for _ in range(5 if path == "push" else 1):  # every bank of push
                found = _sums(ranks, [tensor_of(part, dtype) for part in parts], path, op=op)
                assert [same(each, expected) for each in found] == [True] * ranks.size, (op, path)
    assert not np.isnan(load(expected, dtype)).all() and np.isnan(load(expected, dtype)).sum() >= 8 * ranks.size


def test_reduce_scatter_and_all_gather(ranks: Ranks) -> None:
    """Slices of the sum, and bytes along two dimensions."""
    for width in (1, 5, 4096):
        parts = [
            part.reshape(ranks.size * width, 3) for part in cancelling(ranks.size, ranks.size * width * 3, "bfloat16")
        ]
        tensors = [tensor_of(part, "bfloat16") for part in parts]
        for path in ("push", "two_shot"):
            slices = ranks.run(lambda c, t=tensors, p=path: c.reduce_scatter(t[c.rank], path=p))
            for rank, each in enumerate(slices):
                assert same(each, scatter_reference.reduce_scatter(parts, rank, "bfloat16")), (width, path, rank)
        for path in ("push", "push_tiles"):
            for dim in (0, 1):
                whole = ranks.run(lambda c, t=tensors, p=path, d=dim: c.all_gather(t[c.rank], dim=d, path=p))
                expected = gather_reference.all_gather(parts, dim)
                assert all(same(each, expected) for each in whole), (width, path, dim)


@pytest.mark.parametrize("mode", ["R", "U"])
@pytest.mark.parametrize("weight_mode", ["llama", "fp32", "gemma"])
def test_rms_norm(ranks: Ranks, mode: Any, weight_mode: Any) -> None:
    """Rows of one block and of groups of two, four and eight, and more rows than blocks; a weight of another dtype."""
    for rows, n, dtype in (
        (1, 8, "float32"),
        (1, 2880, "bfloat16"),
        (3, 2056, "float32"),
        (20, 1032, "float32"),
        (9, 2056, "bfloat16"),
        (40, 104, "float16"),
        (7, 1000, "bfloat16"),
    ):
        parts = [part.reshape(rows, n) for part in cancelling(ranks.size, rows * n, dtype, 1)]
        residual = cancelling(2, rows * n, dtype, 2)[1].reshape(rows, n)
        weight = store((np.random.default_rng(n).integers(-128, 128, n) / 64).astype(np.float32), dtype)
        values = load(weight, dtype)
        expected = all_reduce_rms_norm(parts, residual, values, 1e-6, dtype, mode, weight_mode)
        factor = tensor_of(values.view(np.uint32), "float32") if rows == 7 else tensor_of(weight, dtype)
        x, r = [tensor_of(part, dtype) for part in parts], tensor_of(residual, dtype)
        for path in PATHS:
            found = ranks.run(
                lambda c, x=x, r=r, w=factor, p=path: c.all_reduce_rms_norm(
                    x[c.rank], r, w, 1e-6, mode=mode, weight_mode=weight_mode, path=p
                )
            )
            for rank, (norm, total) in enumerate(found):
                assert same(total, expected[1]), (rows, n, path, rank)
                assert same(norm, expected[0]), (rows, n, path, rank)


@pytest.mark.parametrize(("rows", "n"), [(16, 1032), (8, 1032), (4, 2056), (2, 4104)], ids=["1", "2", "4", "8"])
def test_row_sum_order(ranks: Ranks, rows: int, n: int) -> None:
    """Rows of one block and of groups of 2, 4 and 8: the order of row_sum, in float32, where another order shows."""
    shown = 0
    for seed in range(12 if rows < 8 else 4):
        random = np.random.default_rng([seed, n])
        parts = [part.reshape(rows, n) for part in cancelling(ranks.size, rows * n, "float32", seed)]
        mantissa = random.integers(-(2**23), 2**23, (rows, n)).astype(np.float64)
        residual = store((mantissa / 2**16).astype(np.float32), "float32")
        expected = all_reduce_rms_norm(parts, residual, None, 1e-6, "float32")
        mixed = random.permutation(n)
        other = all_reduce_rms_norm([part[:, mixed] for part in parts], residual[:, mixed], None, 1e-6, "float32")
        shown += int((other[0] != expected[0][:, mixed]).any(axis=1).sum())
        x, r = [tensor_of(part, "float32") for part in parts], tensor_of(residual, "float32")
        for path in ("push", "push_tiles", "two_shot")[: 3 if seed < 2 else 1]:
            found = ranks.run(lambda c, x=x, r=r, p=path: c.all_reduce_rms_norm(x[c.rank], r, None, 1e-6, path=p))
            for rank, (norm, total) in enumerate(found):
                assert same(total, expected[1]), (seed, path, rank)
                assert same(norm, expected[0]), (seed, path, rank)
    assert shown >= 1


@pytest.mark.parametrize("operation", ["all_reduce", "reduce_scatter", "all_reduce_rms_norm"])
def test_vectors(ranks: Ranks, operation: str) -> None:
    """The portable vectors of goldens/, unchanged: rows of 1, 15 and 77 elements among them."""
    cases = [case for case in file.read(GOLDENS / operation)[1] if case.ranks == ranks.size]
    assert len(cases) == {"all_reduce": 105, "reduce_scatter": 9, "all_reduce_rms_norm": 54}[operation]
    paths = {
        "all_reduce": (*PATHS, "push_tiles@2x1024", "two_shot@3x512"),
        "reduce_scatter": ("push", "two_shot", "two_shot@2x512"),
        "all_reduce_rms_norm": ("push", "push_tiles", "two_shot"),
    }[operation]
    wrong = []
    for case in cases:
        for path in paths:
            found = ranks.run(lambda c, case=case, path=path: called(c, operation, case, case.parts, case.inputs, path))
            for rank, outputs in enumerate(found):
                for name, got in outputs.items():
                    wanted = case.outputs[name]
                    if got.shape != wanted.shape or bits.digest(got) != bits.digest(wanted):
                        wrong.append((case.label(), path, rank, name))
    assert wrong == []


@pytest.mark.parametrize("first", [2**31 - 4, 2**32 - 4])
def test_counters_wrap(first: int) -> None:
    """Around the middle and the end of the 32-bit counters nothing changes; large calls leave old packets behind."""
    for path in PATHS:
        here = Ranks(3, first_sequence=first)
        for turn in range(6):
            parts = cancelling(3, 20000 if turn % 3 == 0 else 50 + turn, "float16", turn)
            expected = reference.all_reduce(parts, "float16")
            found = _sums(here, [tensor_of(part, "float16") for part in parts], path)
            assert all(same(each, expected) for each in found), (path, turn)
        here.close()


@pytest.mark.parametrize("path", PATHS)
def test_failures(path: str) -> None:
    """Other calls and a rank that does not come are errors, and no numbers."""
    here = Ranks(2, timeout=5.0)
    x = [torch.ones(n, dtype=torch.bfloat16) for n in (1000, 1001)]
    out = [torch.zeros_like(part) for part in x]
    with pytest.raises(RankMismatch, match=r"rank [01] made another call than rank [01]"):
        here.run(lambda c: c.all_reduce(x[c.rank], path=path, out=out[c.rank]))
    assert all(bool((each.isnan() | (each == 0)).all()) for each in out)
    here.close()
    here = Ranks(3, timeout=0.3)
    y = torch.ones(5000)
    late = [torch.zeros_like(y) for _ in range(3)]
    with pytest.raises(PeerError, match=r"rank [02] waited 0\.3 s for rank 1 in all_reduce of 5000 x float32"):
        here.run(lambda c: c.all_reduce(y, path=path, out=late[c.rank]), ranks=(0, 2))
    assert bool(late[0].isnan().all()) and bool(late[2].isnan().all())
    here.close()
