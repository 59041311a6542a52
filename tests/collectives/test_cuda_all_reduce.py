"""Collectives of 2 to 8 ranks on one GPU: the reference's bytes, by every path, on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cuda_ranks import SMALL, Here, same, tensor_of

from detinfer.collectives.stress import cancelling, special
from detinfer.reference import all_gather as gather_reference
from detinfer.reference import all_reduce as reference
from detinfer.reference import reduce_scatter as scatter_reference
from detinfer.reference.all_reduce_rms_norm import all_reduce_rms_norm
from detinfer.reference.arithmetic import DType, load, rounded, store

pytestmark = pytest.mark.gpu

DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
ORDERS = ("rank_order", "rank_tree")
PATHS = ("push", "push_tiles", "pull", "two_shot", "push_tiles@2x1024", "two_shot@3x512")
COUNTS = (1, 2, 3, 5, 7, 8, 9, 15, 49, 77, 100, 1000, 2890, 4096, 30001, 200003)


@pytest.fixture(scope="module", params=range(2, 9))
def here(request: pytest.FixtureRequest) -> Iterator[Here]:
    """Ranks of every number."""
    found = Here(request.param)
    yield found
    found.close()


def held(nbytes: int) -> bool:
    """Whether the path push takes a message of this size."""
    return nbytes <= SMALL.push_channels * SMALL.push_bytes


def stepwise(parts: list[Any], dtype: DType) -> Any:
    """The sum that is rounded to the dtype after each addition."""
    total = load(parts[0], dtype)
    for part in parts[1:]:
        total = rounded(total + load(part, dtype), dtype)
    return store(total, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum(here: Here, dtype: DType) -> None:
    """Both orders, every path and count; a rotated, reversed or stepwise rounded sum would have other bytes."""
    for n in COUNTS:
        parts = cancelling(here.size, n, dtype)
        tensors = [tensor_of(part, dtype) for part in parts]
        for order in ORDERS:
            expected = reference.all_reduce(parts, dtype, "sum", order)
            for path in PATHS:
                if path == "push" and not held(tensors[0].nbytes):
                    continue
                for rank, out in enumerate(here.all_reduce(tensors, path, order=order)):
                    assert same(out, expected), (n, order, path, rank)
        if n < 1000:
            continue
        right = reference.all_reduce(parts, dtype)
        wrong = {"from zero": reference.all_reduce([np.zeros_like(parts[0]), *parts], dtype)}
        if here.size > 2:
            for turn in range(1, here.size):
                wrong[f"from rank {turn}"] = reference.all_reduce(parts[turn:] + parts[:turn], dtype)
            wrong["reversed"] = reference.all_reduce(parts[::-1], dtype)
            if dtype != "float32":
                wrong["rounded at each step"] = stepwise(parts, dtype)
        assert [name for name, value in wrong.items() if value.tobytes() == right.tobytes()] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["sum", "avg", "max", "min"])
def test_special_values(here: Here, op: Any, dtype: DType) -> None:
    """NaN, infinities, zeros of both signs and subnormals, in place too."""
    parts = special(here.size, dtype)
    tensors = [tensor_of(part, dtype) for part in parts]
    expected = reference.all_reduce(parts, dtype, op)
    for path in PATHS:
        for in_place in (False, True):
            for out in here.all_reduce(tensors, path, in_place, op=op):
                assert same(out, expected), (path, in_place)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ones_bits(here: Here, dtype: DType) -> None:
    """Words of ones, which are what push takes for no data, on some ranks: their sums are NaN, and others stay what they are."""
    parts = [part.copy() for part in cancelling(here.size, 4001, dtype)]
    for rank, part in enumerate(parts):
        part[16 * rank : 16 * rank + 8] = -1 % (1 << 8 * part.itemsize)
    tensors = [tensor_of(part, dtype) for part in parts]
    for op in ("sum", "max"):
        expected = reference.all_reduce(parts, dtype, op)
        for path in PATHS:
            for _ in range(5 if path == "push" else 1):  # every bank of push
                assert all(same(out, expected) for out in here.all_reduce(tensors, path, op=op)), (op, path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned(here: Here, dtype: DType) -> None:
    """A tensor that starts one element into another, on some ranks only, and strided ones."""
    parts = cancelling(here.size, 2890, dtype)
    expected = reference.all_reduce(parts, dtype)
    tensors = [tensor_of(part, dtype, "offset" if r % 2 else "dense") for r, part in enumerate(parts)]
    spread = []
    for tensor in tensors:
        room = torch.zeros(2890, 2, dtype=tensor.dtype, device="cuda")
        room[:, 0] = tensor
        spread.append(room[:, 0])
    for path in PATHS:
        for given in (tensors, spread):
            out = [tensor_of(np.zeros_like(parts[0]), dtype, "offset") for _ in parts]
            copies = [part.contiguous() for part in given] if given is spread else given
            here.run(
                lambda c, copies=copies, out=out, path=path: c.all_reduce(copies[c.rank], path=path, out=out[c.rank])
            )
            assert all(same(each, expected) for each in out), path


@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_scatter_and_all_gather(here: Here, dtype: DType) -> None:
    """reduce_scatter is the slice of all_reduce, and gathering the slices gives all_reduce."""
    for width in (1, 5, 16, 1001, 4096):
        parts = [part.reshape(here.size * width, 3) for part in cancelling(here.size, here.size * width * 3, dtype)]
        tensors = [tensor_of(part, dtype) for part in parts]
        whole = reference.all_reduce(parts, dtype)
        for path in ("push", "two_shot"):
            out = [torch.full_like(tensors[0][:width], -3) for _ in tensors]
            here.run(lambda c, t=tensors, out=out, path=path: c.reduce_scatter(t[c.rank], path=path, out=out[c.rank]))
            for rank, each in enumerate(out):
                assert same(each, scatter_reference.reduce_scatter(parts, rank, dtype)), (width, path, rank)
            for gather_path in ("push", "push_tiles"):
                back = [torch.full_like(tensors[0], -3) for _ in tensors]
                here.run(lambda c, p=gather_path, o=out, b=back: c.all_gather(o[c.rank], path=p, out=b[c.rank]))
                assert all(same(each, whole) for each in back), (width, path, gather_path)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("kind", ["uint8", "int16", "float32", "int64"])
def test_all_gather_bytes(here: Here, kind: str, dim: int) -> None:
    """Any dtype along any dimension, by both paths; every byte arrives, NaN payloads too."""
    for shape in ((3, 5, 7), (1, 33, 128), (2, 1, 1000)):
        random = np.random.default_rng([dim, *shape])
        size = getattr(torch, kind).itemsize
        parts = [random.integers(0, 256, (*shape, size), np.uint8).view(f"u{size}")[..., 0] for _ in range(here.size)]
        tensors = [tensor_of(part, kind) for part in parts]
        expected = gather_reference.all_gather(parts, dim)
        for path in ("push", "push_tiles"):
            out = [torch.zeros(expected.shape, dtype=getattr(torch, kind), device="cuda") for _ in parts]
            here.run(lambda c, t=tensors, o=out, p=path: c.all_gather(t[c.rank], dim=dim, path=p, out=o[c.rank]))
            assert all(same(each, expected) for each in out), (shape, path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_mode", ["llama", "fp32", "gemma"])
@pytest.mark.parametrize("mode", ["R", "U"])
def test_rms_norm(here: Here, mode: Any, weight_mode: Any, dtype: DType) -> None:
    """Every mode and path, at row lengths of models and odd ones, for few and many rows; both outputs.

    push takes rows by one block, and by groups of two, four and eight of these.
    """
    for rows, n in ((1, 8), (2, 1000), (1, 2880), (3, 4096), (5, 2880), (20, 1032), (40, 104), (1, 8192), (2, 16384)):
        shape = (rows, n)
        parts = [part.reshape(shape) for part in cancelling(here.size, rows * n, dtype, 1)]
        residual = cancelling(2, rows * n, dtype, 2)[1].reshape(shape)
        random = np.random.default_rng(n)
        weight = store((random.integers(-128, 128, n) / 64).astype(np.float32), dtype)
        wide = dtype != "float32" and rows % 2 == 0  # an fp32 weight for a 16-bit row
        values = load(weight, dtype)
        expected = all_reduce_rms_norm(parts, residual, values, 1e-6, dtype, mode, weight_mode)
        factor = tensor_of(values.view(np.uint32), "float32") if wide else tensor_of(weight, dtype)
        x = [tensor_of(part, dtype) for part in parts]
        r = tensor_of(residual, dtype)
        for path in PATHS:
            if path == "push" and (
                -(-rows // SMALL.push_channels) * n * x[0].element_size() > SMALL.push_bytes or n > 8192
            ):
                continue
            norm, total = [torch.full_like(t, -3) for t in x], [torch.full_like(t, -3) for t in x]
            here.run(
                lambda c, x=x, r=r, w=factor, p=path, norm=norm, total=total: c.all_reduce_rms_norm(
                    x[c.rank],
                    r,
                    w,
                    1e-6,
                    mode=mode,
                    weight_mode=weight_mode,
                    path=p,
                    out=norm[c.rank],
                    residual_out=total[c.rank],
                )
            )
            for rank in range(here.size):
                assert same(total[rank], expected[1]), (shape, path, rank)
                assert same(norm[rank], expected[0]), (shape, path, rank)


@pytest.mark.parametrize(("rows", "n"), [(16, 1032), (8, 1032), (4, 2056), (2, 4104)], ids=["1", "2", "4", "8"])
def test_row_sum_order(here: Here, rows: int, n: int) -> None:
    """Rows that push gives to one block and to groups of 2, 4 and 8: the order of row_sum, by every path.

    A sum of squares is well conditioned: another order shows in some rows alone, and in float32. Hence many of them.
    """
    shown = 0
    for seed in range(16):
        random = np.random.default_rng([seed, n])
        parts = [part.reshape(rows, n) for part in cancelling(here.size, rows * n, "float32", seed)]
        mantissa = random.integers(-(2**23), 2**23, (rows, n)).astype(np.float64)
        residual = store((mantissa / 2**16).astype(np.float32), "float32")
        expected = all_reduce_rms_norm(parts, residual, None, 1e-6, "float32")
        mixed = random.permutation(n)
        other = all_reduce_rms_norm([part[:, mixed] for part in parts], residual[:, mixed], None, 1e-6, "float32")
        assert other[1].tobytes() == expected[1][:, mixed].tobytes()
        shown += int((other[0] != expected[0][:, mixed]).any(axis=1).sum())
        x, r = [tensor_of(part, "float32") for part in parts], tensor_of(residual, "float32")
        for path in PATHS:
            out = [(torch.full_like(r, -3), torch.full_like(r, -3)) for _ in x]
            here.run(
                lambda c, x=x, r=r, p=path, out=out: c.all_reduce_rms_norm(
                    x[c.rank], r, None, 1e-6, path=p, out=out[c.rank][0], residual_out=out[c.rank][1]
                )
            )
            for rank, (norm, total) in enumerate(out):
                assert same(total, expected[1]), (seed, path, rank)
                assert same(norm, expected[0]), (seed, path, rank)
    assert shown >= 1
