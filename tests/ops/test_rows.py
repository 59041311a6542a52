"""Reductions along rows: the contract's order to the byte, and a row that nothing but its own elements can reach."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from detinfer.errors import Diverged, UnsupportedDtype, UsageError
from detinfer.ops import rows
from detinfer.ops.evidence import REFERENCE_NAME, WIDTHS, from_bits, from_values, to_bits, to_values
from detinfer.ops.rows_proof import cancelling, logits, spread
from detinfer.reference import rows as reference

pytestmark = pytest.mark.usefixtures("overflow_is_expected")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("llama", "fp32", "gemma")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, shape and every byte agree."""
    return a.dtype == b.dtype and a.shape == b.shape and bool((to_bits(a) == to_bits(b)).all())


def vector(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """n weights in [-2, 2)."""
    return from_values(np.random.default_rng(seed).integers(-(2**22), 2**22, n) / 2**21, dtype)


# Each operation on [rows, n], and the reference of its results: (function of tensors, function of values).
def _norms(n: int, dtype: torch.dtype, turn: Any) -> dict[str, tuple[Any, Any]]:
    w, b = vector(n, dtype, n)[turn], vector(n, dtype, n + 1)[turn]
    wv, bv, name = to_values(w), to_values(b), REFERENCE_NAME[dtype]
    found: dict[str, tuple[Any, Any]] = {
        f"rms_norm {mode}": (
            lambda x, mode=mode: rows.rms_norm(x, w, 1e-6, mode=mode),
            lambda v, mode=mode: reference.rms_norm(v, wv, 1e-6, mode, name)[0],
        )
        for mode in MODES
    }
    found["layer_norm"] = (
        lambda x: rows.native_layer_norm(x, [n], w, b, 1e-5)[0],
        lambda v: reference.layer_norm(v, wv, bv, 1e-5)[0],
    )
    return found


def operations(n: int, dtype: torch.dtype, turn: Any = slice(None)) -> dict[str, tuple[Any, Any]]:
    """Every operation that gives one result or one row of results for each row; ``turn`` permutes weights and biases."""
    return {
        "sum": (lambda x: rows.sum_dims(x, [-1]), reference.row_sum),
        "mean": (lambda x: rows.mean_dims(x, [-1]), reference.mean),
        "softmax": (lambda x: rows.softmax(x), reference.softmax),
        "log_softmax": (lambda x: rows.log_softmax(x), reference.log_softmax),
        **_norms(n, dtype, turn),
    }


OPERATIONS = tuple(operations(1, torch.float32))


def inputs(op: str, n: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    """[count, n] on which another order shows."""
    make = logits if "softmax" in op else spread if "norm" in op else cancelling
    return make(n, dtype, count)


def riffle(n: int) -> torch.Tensor:
    """Every second place from the second on, then the others: another order of n terms.

    A reversal or a rotation would not do: modulo 1024 both map the lanes that are joined onto lanes that are joined.
    """
    return torch.tensor([*range(1, n, 2), *range(0, n, 2)])


def by_the_book(row: Any, square: bool = False) -> Any:
    """row_sum of one row, one addition at a time, as the contract's sentences say it."""
    lanes = [np.float32(-0.0)] * 1024
    for i, e in enumerate(row):
        lanes[i % 1024] = np.float32(float(e) * float(e) + float(lanes[i % 1024])) if square else lanes[i % 1024] + e
    half = 512
    while half >= 1:
        for lane in range(half):
            lanes[lane] = lanes[lane] + lanes[lane + half]
        half //= 2
    return lanes[0]


@pytest.mark.parametrize("n", [*WIDTHS, 1023, 1024, 1025, 2048])
def test_reference_is_the_written_order(n: int) -> None:
    """The vectorised reference against one addition at a time; the row in another order gives other bytes."""
    values = to_values(cancelling(n, torch.float32))
    expected = np.array([by_the_book(row) for row in values])
    assert reference.row_sum(values).tobytes() == expected.tobytes()
    # Products of 12-bit numbers: the sum of squares is exact in float64, which stands in for the FMA.
    short = to_values(from_values(values, torch.bfloat16))
    expected = np.array([by_the_book(row, square=True) for row in short])
    assert reference.square_sum(short).tobytes() == expected.tobytes()
    if n >= 15:
        assert reference.row_sum(values).tobytes() != reference.row_sum(values[:, riffle(n)]).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPERATIONS)
def test_reference_bytes(op: str, dtype: torch.dtype, level: str) -> None:
    """csrc gives the reference's bytes in every row, and on these inputs another order gives other bytes.

    Where every term is positive (the exponentials of a softmax, the squares of a norm) an order shows in the sum's last
    bits alone: in 16-bit results it takes thousands of rows to see it.
    """
    hidden = dtype is not torch.float32 and op not in ("sum", "mean")
    n, count = (100, 16000) if hidden else (2890, 33)
    function, truth = operations(n, dtype)[op]
    x, turn = inputs(op, n, dtype, count), riffle(n)
    got = function(x)
    other = operations(n, dtype, turn)[op][0](x[:, turn])
    other = other[:, turn.argsort()] if other.dim() == 2 else other
    assert (to_bits(other) != to_bits(got)).any()
    assert same(got[:33], from_values(truth(to_values(x[:33])), dtype))
    for n in WIDTHS:
        function, truth = operations(n, dtype)[op]
        x = inputs(op, n, dtype, 33)
        assert same(function(x), from_values(truth(to_values(x)), dtype)), n


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_row_equals_itself_alone(op: str, dtype: torch.dtype, threads: int) -> None:
    """M = 1 to 130 rows, one thread and two: row i of M has the bytes of row i alone."""
    for n in (49, 1000):
        function, _ = operations(n, dtype)[op]
        x = inputs(op, n, dtype, 130)
        alone = torch.cat([function(x[i : i + 1]) for i in range(130)])
        assert len({to_bits(row).tobytes() for row in alone}) > 30
        for count in range(1, 131):
            start = (130 - count) * (count % 2)
            assert same(function(x[start : start + count]), alone[start : start + count]), count


@pytest.mark.parametrize("op", OPERATIONS)
def test_threads_and_levels(op: str, level: str, threads: int) -> None:
    """Many long rows, enough for two threads to share."""
    for dtype in DTYPES:
        function, truth = operations(2890, dtype)[op]
        x = inputs(op, 2890, dtype, 64)
        assert same(function(x), from_values(truth(to_values(x)), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_moves_nothing(dtype: torch.dtype) -> None:
    """Zeros (of either sign) after the end of a row, and masked logits, leave every bit where it was."""
    for n, padded in itertools.pairwise((1, 15, 49, 77, 100, 1000, 1025, 2890)):
        x = cancelling(n, dtype, 5)
        for zero in (0.0, -0.0):
            longer = torch.full((5, padded), zero, dtype=dtype)
            longer[:, :n] = x
            assert same(rows.sum_dims(longer, [-1]), rows.sum_dims(x, [-1]))
        x = logits(n, dtype, 5)
        longer = torch.full((5, padded), -math.inf, dtype=dtype)
        longer[:, :n] = x
        assert same(rows.softmax(longer)[:, :n].contiguous(), rows.softmax(x))
        assert (to_bits(rows.softmax(longer)[:, n:]) == 0).all()
        assert same(rows.log_softmax(longer)[:, :n].contiguous(), rows.log_softmax(x))
        # Zeros between the elements move them to other lanes.
        moved = torch.zeros((5, 2 * n), dtype=dtype)
        moved[:, : n // 2] = cancelling(n, dtype, 5)[:, : n // 2]
        moved[:, -(n - n // 2) :] = cancelling(n, dtype, 5)[:, n // 2 :]
        if n >= 49 and dtype is torch.float32:
            assert not same(rows.sum_dims(moved, [-1]), rows.sum_dims(cancelling(n, dtype, 5), [-1]))


def test_signs_of_zero() -> None:
    """A sum starts at its first term: -0 alone stays -0, with one +0 it is +0; no terms at all are +0."""
    for n in WIDTHS:
        minus = torch.full((3, n), -0.0)
        assert to_bits(rows.sum_dims(minus, [-1])).tolist() == [0x80000000] * 3
        assert to_bits(rows.mean_dims(minus, [-1])).tolist() == [0x80000000] * 3
        minus[1, n // 2] = 0.0
        assert to_bits(rows.sum_dims(minus, [-1])).tolist() == [0x80000000, 0, 0x80000000]
    assert to_bits(rows.sum_dims(torch.zeros(2, 0), [-1])).tolist() == [0, 0]
    assert to_bits(rows.mean_dims(torch.zeros(2, 0), [-1])).tolist() == [0x7FFFFFFF] * 2
    assert to_bits(rows.sum_all(torch.zeros(0))).tolist() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype: torch.dtype) -> None:
    """A row with NaN is NaN (the canonical one), its neighbours are not; a row of -Inf has no softmax."""
    x = torch.zeros(5, 21, dtype=dtype)
    x[1, 20], x[2, 4], x[3, 4:6] = -math.nan, math.inf, torch.tensor([math.inf, -math.inf], dtype=dtype)
    nan = 0x7FFFFFFF if dtype is torch.float32 else 0x7FFF
    total = rows.sum_dims(x, [-1])
    assert total.isnan().tolist() == [False, True, False, True, False]
    assert to_bits(total)[[1, 3]].tolist() == [nan, nan]
    for function in (rows.softmax, rows.log_softmax):
        y = function(x)
        assert y.isnan().all(-1).tolist() == [False, True, True, True, False]
        assert y.isnan().any(-1).tolist() == [False, True, True, True, False]
        assert set(to_bits(function(torch.full((2, 33), -math.inf, dtype=dtype))).ravel().tolist()) == {nan}
    assert set(to_bits(rows.rms_norm(x)[1]).tolist()) == {nan}


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dimensions(dtype: torch.dtype) -> None:
    """Reduced dimensions move last in ascending order and are flattened row by row; keepdim; negative numbers."""
    x = cancelling(77, dtype, 60).reshape(3, 4, 5, 77)
    values = to_values(x)
    for count in range(5):
        for dims in itertools.permutations(range(4), count):
            kept = [d for d in range(4) if d not in dims] if dims else []
            reduced = sorted(dims) if dims else [0, 1, 2, 3]
            flat = values.transpose(kept + reduced).reshape([*(values.shape[d] for d in kept), -1])
            expected = reference.row_sum(flat.reshape(-1, flat.shape[-1])).reshape(flat.shape[:-1])
            got = rows.sum_dims(x, [d - 4 * (d % 2) for d in dims])
            assert same(got, from_values(expected, dtype)), dims
            kept_dims = rows.sum_dims(x, list(dims), keepdim=True)
            assert kept_dims.shape == x.sum(list(dims), keepdim=True).shape
            assert same(kept_dims.reshape(got.shape), got)
    assert same(rows.sum_all(x), rows.sum_dims(x, None))
    assert same(rows.mean_all(x), from_values(reference.mean(values.reshape(1, -1))[0], dtype))
    assert same(rows.sum_dims(x.transpose(1, 3), [1]), rows.sum_dims(x, [3]).transpose(1, 2).contiguous())
    wide = cancelling(1300, dtype, 1000).t().contiguous()  # columns of more terms than there are lanes
    assert same(rows.sum_dims(wide, [0]), from_values(reference.row_sum(to_values(wide).T), dtype))
    assert not same(rows.sum_dims(wide, [0]), rows.sum_dims(wide[riffle(1300)], [0]))
    for function in (rows.softmax, rows.log_softmax):
        for dim in range(4):
            moved = function(x.movedim(dim, -1).contiguous()).movedim(-1, dim)
            got = function(x, dim)
            assert got.is_contiguous()
            assert same(got, moved.contiguous())
    assert rows.sum_dims(torch.tensor(3.0), [0]).item() == 3
    assert rows.softmax(torch.tensor(3.0, dtype=dtype), 0).item() == 1
    with pytest.raises(IndexError):
        rows.sum_dims(x, [4])
    with pytest.raises(RuntimeError, match="multiple times"):
        rows.sum_dims(x, [0, 0])


def test_dtype_arguments() -> None:
    """A result's dtype other than the input's: widening is exact, narrowing is the input's rounding, as in torch."""
    x = cancelling(1000, torch.bfloat16, 9)
    wide = from_values(to_values(x), torch.float32)
    assert same(rows.sum_dims(x, [-1], dtype=torch.float32), rows.sum_dims(wide, [-1]))
    assert same(rows.mean_dims(x, [-1], dtype=torch.float32), rows.mean_dims(wide, [-1]))
    assert same(rows.softmax(x, dtype=torch.float32), rows.softmax(wide))
    assert same(rows.softmax_core(x, -1, True), rows.softmax(wide))
    assert same(rows.log_softmax_core(x, -1, True), rows.log_softmax(wide))
    fine = cancelling(1000, torch.float32, 9)
    assert same(rows.sum_dims(fine, [-1], dtype=torch.bfloat16), rows.sum_dims(fine.bfloat16(), [-1]))
    whole = torch.arange(10)
    assert rows.sum_all(whole) is NotImplemented
    assert rows.mean_all(whole) is NotImplemented
    assert rows.amax(whole) is NotImplemented
    assert rows.softmax(whole) is NotImplemented
    assert rows.mean_dims(whole, [0], dtype=torch.float32).item() == 4.5
    for function in (rows.sum_all, rows.mean_all, rows.softmax, rows.amax, rows.rms_norm):
        for dtype in (torch.float64, torch.complex64):
            with pytest.raises(UnsupportedDtype):
                function(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype: torch.dtype, level: str) -> None:
    """Both outputs, each weight mode, both residual modes, and weights of fp32 beside 16-bit data."""
    name = REFERENCE_NAME[dtype]
    distinct = set()
    for n in WIDTHS:
        x, residual = cancelling(n, dtype, 7), cancelling(n, dtype, 7).flip(-1)
        for weight in (vector(n, dtype, n), vector(n, torch.float32, n), None):
            w = None if weight is None else to_values(weight)
            for mode, residual_mode in itertools.product(MODES, ("R", "U")):
                y, total = reference.add_rms_norm(to_values(x), to_values(residual), w, 1e-5, mode, residual_mode, name)
                got = rows.rms_norm(x, weight, 1e-5, mode=mode, residual=residual, residual_mode=residual_mode)
                assert same(got[0], from_values(y, dtype)), (n, mode, residual_mode)
                assert same(got[1], from_values(total, dtype))
                if n == 2890 and weight is not None and weight.dtype is dtype:
                    distinct.add(to_bits(got[0]).tobytes())
    # In fp32 the sum and the product are not rounded again, so that only gemma differs.
    assert len(distinct) == (2 if dtype is torch.float32 else 6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_aten_norms(dtype: torch.dtype) -> None:
    """Several normalized dimensions, the default eps, absent weights, statistics in torch's shapes and dtypes."""
    x = cancelling(2890, dtype, 6).reshape(2, 3, 34, 85)
    flat = to_values(x).reshape(6, -1)
    y, r = reference.rms_norm(flat, None, torch.finfo(torch.float32).eps, "fp32", REFERENCE_NAME[dtype])
    assert same(rows.rms_norm_aten(x, [34, 85]), from_values(y, dtype).reshape(x.shape))
    norm, rstd = rows.fused_rms_norm(x, [34, 85], None, None)
    assert same(rstd, from_values(r, torch.float32).reshape(2, 3, 1, 1))
    assert same(norm, rows.rms_norm_aten(x, [34, 85]))
    weight, bias = vector(2890, dtype, 1).reshape(34, 85), vector(2890, dtype, 2).reshape(34, 85)
    for w, b in ((weight, bias), (None, bias), (weight.float(), bias.float()), (None, None)):
        values = [None if t is None else to_values(t).ravel() for t in (w, b)]
        y, center, r = reference.layer_norm(flat, *values, 1e-5)
        got = rows.native_layer_norm(x, [34, 85], w, b, 1e-5)
        theirs = torch.native_layer_norm(x, [34, 85], w, b, 1e-5)
        statistic = theirs[1].dtype
        assert [t.shape for t in got] == [t.shape for t in theirs]
        assert same(got[0], from_values(y, dtype).reshape(x.shape))
        assert same(got[1], from_values(center, statistic).reshape(2, 3, 1, 1))
        assert same(got[2], from_values(r, statistic).reshape(2, 3, 1, 1))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        rows.rms_norm_aten(x, [85, 34])
    with pytest.raises(UsageError, match="residual"):
        rows.rms_norm(x, residual=x[0])
    with pytest.raises(UsageError, match="elements"):
        rows.rms_norm(x, torch.ones(3))
    with pytest.raises(UsageError, match="mode"):
        rows.rms_norm(x, mode="bert")  # type: ignore[arg-type]


@pytest.mark.parametrize("op", ["sum", "mean", "softmax", "log_softmax", "rms_norm fp32", "layer_norm"])
def test_close_to_the_truth(op: str) -> None:
    """The order is a good one as well: close to float64 on rows without cancellation."""
    x = vector(64 * 2890, torch.float32, 9).reshape(64, 2890)
    v = to_values(x).astype(np.float64)
    w, b = (to_values(vector(2890, torch.float32, s)).astype(np.float64) for s in (2890, 2891))
    spread = v - v.mean(-1, keepdims=True)
    truth = {
        "sum": lambda: v.sum(-1),
        "mean": lambda: v.mean(-1),
        "softmax": lambda: np.exp(v) / np.exp(v).sum(-1, keepdims=True),
        "log_softmax": lambda: v - np.log(np.exp(v).sum(-1, keepdims=True)),
        "rms_norm fp32": lambda: v / np.sqrt((v * v).mean(-1, keepdims=True) + 1e-6) * w,
        "layer_norm": lambda: spread / np.sqrt((spread * spread).mean(-1, keepdims=True) + 1e-5) * w + b,
    }[op]()
    got = to_values(operations(2890, torch.float32)[op][0](x))
    assert np.abs(got - truth).max() <= 2e-6 * max(np.abs(truth).max(), np.abs(v).sum(-1).max() * ("sum" in op) * 0.1)


def test_greatest_and_least() -> None:
    """NaN wins, +0 > -0, wherever in the row or the column they lie; nothing to choose from is an error."""
    for n in WIDTHS:
        for place in {0, n // 2, n - 1}:
            x = torch.full((2, n), -0.0)
            x[0, place] = 0.0
            assert torch.signbit(rows.amax(x, [1])).tolist() == [False, True]
            assert torch.signbit(rows.amin(-x, [1])).tolist() == [True, False]
            assert torch.signbit(rows.amax(x.t(), [0])).tolist() == [False, True]
            x[1, place] = math.nan
            assert to_bits(rows.amax(x, [1]))[1] == to_bits(rows.amin(x.t(), [0]))[1] == 0x7FFFFFFF
            assert to_bits(rows.max_all(x)).tolist() == to_bits(rows.min_all(x)).tolist() == 0x7FFFFFFF
    with pytest.raises(IndexError):
        rows.amax(torch.zeros(3, 0), [1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", rows.COVERED)
def test_proof(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation is proved in each dtype, twice with the same bytes; one wrong last bit fails the proof."""
    cases, results = rows.prove(op, dtype)
    assert cases >= 14
    assert rows.prove(op, dtype) == (cases, results)
    right = rows.COVERED[op]

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        last = result[-1] if isinstance(result, tuple) else result
        bits = to_bits(last).copy()
        bits.reshape(-1)[-1] ^= 1
        broken = from_bits(bits, last.dtype)
        return (*result[:-1], broken) if isinstance(result, tuple) else broken

    monkeypatch.setitem(rows.COVERED, op, wrong)
    with pytest.raises(Diverged, match=op):
        rows.prove(op, dtype)


@pytest.mark.parametrize("op", sorted(rows.REDUCES))
def test_proof_sees_a_wrong_order(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The canonical kernel on operands in another order fails the proof of every operation that contains a sum."""
    right = rows.COVERED[op]

    def disordered(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        dim = -1 if "softmax" not in op and "sum" not in op and "mean" not in op else 0 if x.shape[0] > 3 else -1
        turn = riffle(x.shape[dim])
        weights = [a[turn] if isinstance(a, torch.Tensor) else a for a in args]
        result = right(x.index_select(dim, turn), *weights, **kwargs)
        parts = result if isinstance(result, tuple) else (result,)
        back = tuple(p.index_select(dim, turn.argsort()) if p.shape == x.shape else p for p in parts)
        return back if isinstance(result, tuple) else back[0]

    monkeypatch.setitem(rows.COVERED, op, disordered)
    with pytest.raises(Diverged, match=op):
        rows.prove(op, torch.float32)
