"""all_reduce + add + RMSNorm in one call: both outputs, both modes, every weight mode, on every rank and path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ranks import Call, Ranks, Tensor

from detinfer.collectives.stress import cancelling, special
from detinfer.reference.all_reduce import rank_order
from detinfer.reference.all_reduce_rms_norm import all_reduce_rms_norm
from detinfer.reference.arithmetic import DType, load, store
from detinfer.reference.rows import add_rms_norm

EPS = 1e-6
MODES = ("R", "U")
WEIGHT_MODES = ("llama", "fp32", "gemma")
SHAPES = ((1, 1), (3, 7), (2, 77), (1, 0), (5, 1000), (3, 2890))
"""The last two are larger than the staging area, a row of the last one too."""


def inputs(shape: tuple[int, int], dtype: DType, seed: int) -> tuple[Any, Any]:
    """A residual about as large as what the ranks' sum leaves, and a weight of about 1; as stored bits."""
    random = np.random.default_rng(seed)
    residual = np.ldexp(random.integers(-(2**23), 2**23, shape).astype(np.float32), -27)
    weight = (1 + random.integers(-(2**22), 2**22, shape[1]) / 2**23).astype(np.float32)
    return store(residual, dtype), store(weight, dtype)


def both(group: Ranks, parts: list[Any], residual: Any, weight: Any, dtype: str, **options: Any) -> list[Any]:
    """(norm, residual_out) of every rank, on both paths."""
    size = len(parts)
    shared = (Tensor(residual, dtype), None if weight is None else Tensor(weight, dtype), EPS)
    calls = [
        [Call("all_reduce_rms_norm", (Tensor(part, dtype), *shared), {"path": path, **options}, str(size))]
        for part in parts
        for path in ("1stage",)
    ]
    other = [[Call(c.method, c.arguments, {**c.options, "path": "2stage"}, c.on)] for (c,) in calls]
    return [result for run in (calls, other) for (result,) in group.run(run)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_both_outputs(group: Ranks, size: int, dtype: DType) -> None:
    """The reference's bytes in all modes, at widths of no vector, with rows that go in pieces."""
    for shape in SHAPES:
        parts = [part.reshape(shape) for part in cancelling(size, int(np.prod(shape)), dtype)]
        residual, weight = inputs(shape, dtype, size)
        for mode in MODES:
            for weight_mode in WEIGHT_MODES:
                found = both(group, parts, residual, weight, dtype, mode=mode, weight_mode=weight_mode)
                factor = load(weight, dtype)
                norm, total = all_reduce_rms_norm(parts, residual, factor, EPS, dtype, mode, weight_mode)  # type: ignore[arg-type]
                assert len(found) == 2 * size
                for result in found:
                    assert result[0].tobytes() == norm.tobytes(), (shape, mode, weight_mode, result)
                    assert result[1].tobytes() == total.tobytes(), (shape, mode, weight_mode)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_inputs_tell_the_modes_apart(group: Ranks, dtype: DType) -> None:
    """On the inputs of these tests a rotated sum and each other mode have other bytes."""
    shape, size = (5, 1000), 3
    parts = [part.reshape(shape) for part in cancelling(size, 5000, dtype)]
    residual, bits = inputs(shape, dtype, size)
    found = {}
    for mode in MODES:
        for kind in WEIGHT_MODES:
            results = both(group, parts, residual, bits, dtype, mode=mode, weight_mode=kind)
            (found[mode, kind],) = {result[0].tobytes() for result in results}
    assert len(set(found.values())) == len(MODES) * len(WEIGHT_MODES)
    rotated, _ = all_reduce_rms_norm(parts[1:] + parts[:1], residual, load(bits, dtype), EPS, dtype)
    assert rotated.tobytes() != found["R", "llama"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_sum_is_rounded_first(group: Ranks, dtype: DType) -> None:
    """Terms of one size, whose sum has more bits than the dtype: adding the residual to them unrounded is something else."""
    shape = (5, 1000)
    parts = [inputs(shape, dtype, 10 + r)[0] for r in range(3)]
    residual, bits = inputs(shape, dtype, 9)
    weight = load(bits, dtype)
    for mode in MODES:
        expected = all_reduce_rms_norm(parts, residual, weight, EPS, dtype, mode, "fp32")  # type: ignore[arg-type]
        for result in both(group, parts, residual, bits, dtype, mode=mode, weight_mode="fp32"):
            assert [out.tobytes() for out in result] == [out.tobytes() for out in expected]
        unrounded = rank_order([load(part, dtype) for part in parts])
        fused, total = add_rms_norm(unrounded, load(residual, dtype), weight, EPS, "fp32", mode, dtype)  # type: ignore[arg-type]
        assert store(fused, dtype).tobytes() != expected[0].tobytes()
        assert store(total, dtype).tobytes() != expected[1].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_special_values(group: Ranks, dtype: DType) -> None:
    """NaN and infinities in a few elements of many rows; and no weight."""
    parts = [part.reshape(-1, 4) for part in special(3, dtype)]
    residual = np.zeros_like(parts[0])
    for mode in MODES:
        expected = all_reduce_rms_norm(parts, residual, None, EPS, dtype, mode, "fp32")  # type: ignore[arg-type]
        for result in both(group, parts, residual, None, dtype, mode=mode, weight_mode="fp32"):
            assert [bits.tobytes() for bits in result] == [bits.tobytes() for bits in expected]


def test_tree_and_a_weight_of_another_dtype(group: Ranks) -> None:
    """The order over ranks is the caller's; a float32 weight on bfloat16 rows."""
    shape = (4, 301)
    parts = [part.reshape(shape) for part in cancelling(5, 4 * 301, "bfloat16")]
    residual, weight = inputs(shape, "bfloat16", 1)
    wide = load(weight, "bfloat16") * np.float32(1 + 2**-20)
    norms = {}
    for order in ("rank_order", "rank_tree"):
        arguments = (Tensor(residual, "bfloat16"), Tensor(wide, "float32"), EPS)
        calls = [
            [Call("all_reduce_rms_norm", (Tensor(part, "bfloat16"), *arguments), {"order": order}, "5")]
            for part in parts
        ]
        (norms[order],) = {tuple(bits.tobytes() for bits in result) for (result,) in group.run(calls)}
        expected = all_reduce_rms_norm(parts, residual, wide, EPS, "bfloat16", order=order)  # type: ignore[arg-type]
        assert norms[order] == tuple(bits.tobytes() for bits in expected)
    assert norms["rank_order"] != norms["rank_tree"]


def test_shapes_that_do_not_fit(group: Ranks) -> None:
    """Errors that name what disagrees, before anybody waits."""
    x = Tensor(np.zeros((2, 3), np.float32), "float32")
    wrong = Tensor(np.zeros((3, 2), np.float32), "float32")
    short = Tensor(np.zeros(2, np.float32), "float32")
    for arguments, options, word in (
        ((x, wrong, None, EPS), {}, "residual"),
        ((x, x, short, EPS), {}, "weight"),
        ((x, x, None, EPS), {"mode": "S"}, "mode"),
    ):
        found = group.run([[Call("all_reduce_rms_norm", arguments, options, "2")]] * 2)
        assert [result[0] for (result,) in found] == ["UsageError"] * 2
        assert all(word in result[1] for (result,) in found)
