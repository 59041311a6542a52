"""all_reduce between real processes: the reference's bytes, on every rank, path, order, size and layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ranks import Call, Ranks, Tensor

from detinfer import native
from detinfer.collectives.stress import cancelling, special
from detinfer.reference import all_reduce as reference
from detinfer.reference.arithmetic import DType, load, rounded, store

DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
PATHS = ("1stage", "2stage", None)
ORDERS = ("rank_order", "rank_tree")
COUNTS = (0, 1, 7, 8, 9, 31, 1000, 5003)
"""Elements of a tensor; a piece is 4096 bytes."""


def reduced(group: Ranks, parts: list[Any], dtype: str, layout: str = "dense", **options: Any) -> list[Any]:
    """What each rank got, in all the paths one after the other: [rank][path]."""
    size = len(parts)
    calls = [
        [Call("all_reduce", (Tensor(part, dtype, layout),), {"path": path, **options}, str(size)) for path in PATHS]
        for part in parts
    ]
    return group.run(calls)


def agrees(found: list[Any], expected: Any) -> bool:
    """Whether every rank has the expected bytes on every path."""
    expected = expected.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[expected.itemsize])
    return all(
        isinstance(result, np.ndarray)
        and result.dtype == expected.dtype
        and result.shape == expected.shape
        and result.tobytes() == expected.tobytes()
        for results in found
        for result in results
    )


def rotations(parts: list[Any], dtype: DType, turn: int) -> Any:
    """The sum that begins with rank ``turn``."""
    return reference.all_reduce(parts[turn:] + parts[:turn], dtype)


def stepwise(parts: list[Any], dtype: DType) -> Any:
    """The sum that is rounded to the dtype after each addition."""
    total = load(parts[0], dtype)
    for part in parts[1:]:
        total = rounded(total + load(part, dtype), dtype)
    return store(total, dtype)


def from_zero(parts: list[Any], dtype: DType) -> Any:
    """The sum that starts at +0."""
    return reference.all_reduce([np.zeros_like(parts[0]), *parts], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", range(2, 9))
def test_sum(group: Ranks, size: int, dtype: DType) -> None:
    """Both orders, every path and count; a sum rotated, from +0, or rounded at each step would have other bytes."""
    for n in COUNTS:
        parts = cancelling(size, n, dtype)
        for order in ORDERS:
            expected = reference.all_reduce(parts, dtype, "sum", order)
            assert agrees(reduced(group, parts, dtype, order=order), expected), (n, order)
        if n < 1000:
            continue
        right = reference.all_reduce(parts, dtype)
        wrong = {"from zero": from_zero(parts, dtype)}
        if size > 2:
            wrong |= {f"from rank {turn}": rotations(parts, dtype, turn) for turn in range(1, size)}
            wrong["reversed"] = reference.all_reduce(parts[::-1], dtype)
            if dtype != "float32":
                wrong["rounded at each step"] = stepwise(parts, dtype)
        if size > 3:
            wrong["tree"] = reference.all_reduce(parts, dtype, "sum", "rank_tree")
        assert [name for name, bits in wrong.items() if bits.tobytes() == right.tobytes()] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(group: Ranks, dtype: DType) -> None:
    """NaN, infinities, zeros, subnormals and overflow, in sums, averages, maxima and minima."""
    for size in (2, 3, 8):
        parts = special(size, dtype)
        for op in ("sum", "avg", "max", "min"):
            expected = reference.all_reduce(parts, dtype, op)  # type: ignore[arg-type]
            assert agrees(reduced(group, parts, dtype, op=op), expected), (size, op)


@pytest.mark.parametrize("op", ["avg", "max", "min"])
def test_other_operations(group: Ranks, op: Any) -> None:
    """Averages in both orders, maxima and minima, on random signs."""
    for size in (3, 7):
        for dtype in DTYPES:
            parts = cancelling(size, 1003, dtype)
            turned = [np.roll(part, 3 * r) for r, part in enumerate(parts)] if op != "avg" else parts
            for order in ORDERS:
                expected = reference.all_reduce(turned, dtype, op, order)
                assert agrees(reduced(group, turned, dtype, op=op, order=order), expected), (size, dtype, order)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.int32, np.int64, np.float64])
def test_native_types(group: Ranks, kind: Any) -> None:
    """Integers wrap; float64 is added in float64."""
    size, dtype = 5, np.dtype(kind)
    random = np.random.default_rng(3)
    if dtype.kind == "f":
        parts = [random.integers(-(2**52), 2**52, 1001) * 2.0 ** random.integers(-60, 9, 1001) for _ in range(size)]
        parts[0], parts[-1] = parts[0] + 2.0**70, parts[-1] - 2.0**70
        parts[0][:3], parts[1][:3] = np.nan, [np.inf, -np.inf, 1.0]
        assert rotated_differs(parts)
    else:
        info = np.iinfo(dtype)
        parts = [random.integers(info.min, info.max, 1001, dtype=dtype, endpoint=True) for _ in range(size)]
    for op in ("sum", "max", "min", *(["avg"] if dtype.kind == "f" else [])):
        for order in ORDERS:
            with np.errstate(all="ignore"):
                expected = reference.all_reduce(parts, None, op, order)  # type: ignore[arg-type]
            assert agrees(reduced(group, parts, dtype.name, op=op, order=order), expected), (op, order)


def rotated_differs(parts: list[Any]) -> bool:
    """Whether a sum that begins with rank 1 has other bytes."""
    with np.errstate(all="ignore"):
        right, wrong = (reference.all_reduce(order, None) for order in (parts, parts[1:] + parts[:1]))
    return right.tobytes() != wrong.tobytes()


@pytest.mark.parametrize("layout", ["offset", "strided", "transposed", "expanded"])
def test_layouts(group: Ranks, layout: str) -> None:
    """Any strides and offsets: the bytes of the same values laid out densely. Ranks may lay theirs out differently."""
    for dtype in DTYPES:
        parts = [part.reshape(17, 83) for part in cancelling(3, 17 * 83, dtype)]
        same = [np.broadcast_to(part[:1], part.shape) for part in parts] if layout == "expanded" else parts
        expected = reference.all_reduce(same, dtype)
        assert agrees(reduced(group, parts, dtype, layout), expected), dtype
    mixed = [Tensor(part, "float16", kind) for part, kind in zip(parts, ("dense", layout, "strided"), strict=True)]
    if layout != "expanded":
        found = group.run([[Call("all_reduce", (part,), {}, "3")] for part in mixed])
        assert agrees(found, expected)


@pytest.mark.parametrize("out", ["same", "overlapping", "strided"])
def test_out(group: Ranks, out: str) -> None:
    """In place, into memory that overlaps the input, and into a tensor with strides."""
    for n in (9, 3001):
        parts = cancelling(4, n, "float32")
        assert agrees(reduced(group, parts, "float32", out=out), reference.all_reduce(parts, "float32")), n


def test_position_and_batch_do_not_matter(group: Ranks) -> None:
    """An element's bytes are the same alone, at any offset, and in a tensor of any length."""
    parts = cancelling(3, 2048, "float32")
    whole = reference.all_reduce(parts, "float32")
    for begin, end in ((0, 1), (1, 2), (5, 2048), (1000, 1017), (2047, 2048)):
        cut = [part[begin:end] for part in parts]
        assert agrees(reduced(group, cut, "float32"), whole[begin:end]), (begin, end)


def test_one_rank_copies_bytes(group: Ranks) -> None:
    """At one rank nothing is computed: a NaN keeps its payload, in every operation."""
    for dtype in DTYPES:
        (part,) = special(1, dtype)
        for op in ("sum", "avg", "max", "min"):
            assert agrees(reduced(group, [part], dtype, op=op), part), (dtype, op)


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_instruction_sets(group: Ranks, level: str) -> None:
    """Every instruction set gives the same bytes, special values too."""
    state = native.load()
    assert isinstance(state, native.Loaded)
    if level not in state.levels:
        pytest.skip(f"this CPU or build has no {level}")
    hold: Callable[[str], Any] = lambda name: group.run([[Call("hold_isa", (name,))]] * 8)  # noqa: E731
    hold(level)
    try:
        for dtype in DTYPES:
            for parts in (cancelling(5, 333, dtype), special(5, dtype)):
                for op in ("sum", "avg", "max"):
                    expected = reference.all_reduce(parts, dtype, op)  # type: ignore[arg-type]
                    assert agrees(reduced(group, parts, dtype, op=op), expected), (dtype, op)
    finally:
        hold(state.levels[-1])
