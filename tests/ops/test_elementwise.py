"""Elementwise functions: accuracy over the whole fp32 range, and one result for a value wherever it lies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mpmath import mp, mpf

from detinfer import native
from detinfer.errors import Diverged, UnsupportedDtype
from detinfer.ops import elementwise
from detinfer.ops.evidence import WIDTHS, every_exponent, from_bits, from_values, to_bits, to_values
from detinfer.reference import elementwise as reference
from detinfer.reference.arithmetic import fma

pytestmark = pytest.mark.usefixtures("overflow_is_expected")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

erf, erfc = np.frompyfunc(math.erf, 1, 1), np.frompyfunc(math.erfc, 1, 1)


def _double(f: Any) -> Callable[[Any], Any]:
    return lambda x: f(x).astype(np.float64)


# The truth in float64, and the largest error in ULP that docs/ops/elementwise.md states.
TRUTH: dict[str, tuple[Callable[[Any], Any], float]] = {
    "silu": (lambda x: x / (1 + np.exp(-x)), 1.12),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), 1.0),
    "exp": (np.exp, 1.01),
    "gelu": (lambda x: x * (0.5 * _double(erfc)(-x * math.sqrt(0.5))), 1.48),
    "gelu_tanh": (lambda x: x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))), 0.51),
    "tanh": (np.tanh, 0.51),
    "exp2": (np.exp2, 0.51),
    "expm1": (np.expm1, 0.51),
    "log": (np.log, 0.51),
    "log2": (np.log2, 0.51),
    "log10": (np.log10, 0.51),
    "log1p": (np.log1p, 0.51),
    "erf": (_double(erf), 0.51),
    "erfc": (_double(erfc), 0.51),
    "sin": (np.sin, 0.51),
    "cos": (np.cos, 0.51),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 1.5),
    "sqrt": (np.sqrt, 0.5),
}


def ulps(got: Any, truth: Any) -> Any:
    """Distance of float32 results from float64 truths in units of float32's last place at the truth.

    Infinite where one is NaN and the other is not, where the signs of zeros differ, and where one is infinite and the
    other's correctly rounded value is not.
    """
    nearest = truth.astype(np.float32)
    _, exponent = np.frexp(truth)
    unit = np.ldexp(1.0, np.maximum(exponent - 24, -149))
    error = np.abs(got.astype(np.float64) - truth) / unit
    error = np.where(np.isinf(got) | np.isinf(nearest), np.inf, error)
    error = np.where((got == 0) & (nearest == 0) & (np.signbit(got) != np.signbit(nearest)), np.inf, error)
    error = np.where(np.isnan(got) | np.isnan(truth), np.inf, error)
    same = (got.view(np.uint32) == nearest.view(np.uint32)) | (np.isnan(got) & np.isnan(truth))
    return np.where(same, 0.0, error)


def every_pattern(step: int) -> torch.Tensor:
    """Every ``step``-th bit pattern of fp32."""
    return from_bits(np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32), torch.float32)


def native_function(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The path of csrc for one of ``reference.UNARY``."""
    if name == "gelu_tanh":
        return lambda x: elementwise.gelu(x, approximate="tanh")
    function: Callable[[torch.Tensor], torch.Tensor] = getattr(elementwise, name)
    return function


def test_ulp_measure_sees_errors() -> None:
    """The yardstick: three units off is three, a wrong sign of zero and a missing infinity are infinite."""
    truth = np.array([1.0, 1e-42, 0.0, -0.0, 1e39, np.nan, 1.0])
    right = truth.astype(np.float32)
    assert (ulps(right, truth) == 0).all()
    wrong = np.array([1.0 + 3 * 2**-23, 1e-42 + 2**-149, -0.0, 0.0, 3e38, 1.0, np.nan], np.float32)
    assert np.round(ulps(wrong, truth)[:2]).tolist() == [3, 1]
    assert np.isinf(ulps(wrong, truth)[2:]).all()


@pytest.mark.parametrize("name", TRUTH)
def test_accuracy_over_the_whole_range(name: str) -> None:
    """Every 4099th pattern of fp32 (a million values): all exponents, subnormals, tails, infinities, NaN."""
    x = every_pattern(4099)
    truth, bound = TRUTH[name]
    expected = truth(to_values(x).astype(np.float64))
    error = ulps(to_values(native_function(name)(x)), expected)
    worst = int(error.argmax())
    assert error[worst] <= bound, f"{name}({float(x[worst])!r}): {error[worst]} ULP"
    assert bound <= 2


@pytest.mark.parametrize("name", reference.UNARY)
def test_reference_on_every_exponent(name: str) -> None:
    """csrc and the readable reference agree in every byte."""
    x = every_pattern(32771)
    expected = from_values(reference.unary(name, to_values(x)), torch.float32)
    assert (to_bits(native_function(name)(x)) == to_bits(expected)).all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_16_bit_dtypes_on_all_patterns(dtype: torch.dtype, level: str) -> None:
    """All 65536 values of bf16 and fp16 in one call (where a table serves some functions) and in small ones."""
    x = from_bits(np.arange(65536).astype(np.uint16), dtype)
    for name in reference.UNARY:
        expected = to_bits(from_values(reference.unary(name, to_values(x)), dtype))
        function = native_function(name)
        assert (to_bits(function(x)) == expected).all(), name
        assert (to_bits(torch.cat([function(part) for part in x.split(10007)])) == expected).all(), name


def test_same_bytes_at_every_level(level: str, threads: int) -> None:
    """Baseline, AVX2, AVX-512; one thread and two."""
    x = every_pattern(65537)
    for name in reference.UNARY:
        got = native_function(name)(x)
        with native.hold_isa("baseline"):
            torch.set_num_threads(1)
            expected = native_function(name)(x)
            torch.set_num_threads(threads)
        assert (to_bits(got) == to_bits(expected)).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", reference.UNARY)
def test_a_result_does_not_depend_on_the_place(name: str, dtype: torch.dtype) -> None:
    """An element alone, and at every place of rows that are no multiple of a vector; and it would show."""
    x = from_values(((np.arange(2890) * 7919 % 2890) - 1445).astype(np.float32) / 173, dtype)
    function = native_function(name)
    alone = torch.cat([function(x[i : i + 1]) for i in range(len(x))])
    for width in WIDTHS:
        for start in {0, len(x) - width, (len(x) - width) // 2}:
            row = function(x[start : start + width])
            assert (to_bits(row) == to_bits(alone[start : start + width])).all(), (width, start)
    rows = function(x[:2880].reshape(5, 576).t())  # strided
    assert (to_bits(rows.contiguous()) == to_bits(alone[:2880].reshape(5, 576).t().contiguous())).all()
    if name in ("silu", "sigmoid", "exp") and dtype is torch.float32:
        # A tail computed with another exp, as in torch's scalar loops, would give other bytes at these places.
        v = to_values(x)
        other = {"silu": v / (1 + np.exp(-v)), "sigmoid": 1 / (1 + np.exp(-v)), "exp": np.exp(v)}[name]
        differs = to_bits(from_values(other.astype(np.float32), dtype)) != to_bits(alone)
        assert any(differs[width - width % 16 : width].any() for width in WIDTHS)


SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize(
    ("name", "results"),
    [
        ("silu", (0.0, -0.0, math.inf, math.nan, math.nan)),
        ("gelu", (0.0, -0.0, math.inf, math.nan, math.nan)),
        ("gelu_tanh", (0.0, -0.0, math.inf, math.nan, math.nan)),
        ("sigmoid", (0.5, 0.5, 1.0, 0.0, math.nan)),
        ("tanh", (0.0, -0.0, 1.0, -1.0, math.nan)),
        ("exp", (1.0, 1.0, math.inf, 0.0, math.nan)),
        ("expm1", (0.0, -0.0, math.inf, -1.0, math.nan)),
        ("log", (-math.inf, -math.inf, math.inf, math.nan, math.nan)),
        ("log1p", (0.0, -0.0, math.inf, math.nan, math.nan)),
        ("erf", (0.0, -0.0, 1.0, -1.0, math.nan)),
        ("erfc", (1.0, 1.0, 0.0, 2.0, math.nan)),
        ("sin", (0.0, -0.0, math.nan, math.nan, math.nan)),
        ("cos", (1.0, 1.0, math.nan, math.nan, math.nan)),
        ("rsqrt", (math.inf, -math.inf, 0.0, math.nan, math.nan)),
        ("softplus", (math.log(2), math.log(2), math.inf, 0.0, math.nan)),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(name: str, results: tuple[float, ...], dtype: torch.dtype) -> None:
    """Signed zeros, infinities and NaN, to the byte; every NaN is the canonical one, whatever NaN came in."""
    expected = from_values(np.array(results, np.float32), dtype)
    assert to_bits(native_function(name)(torch.tensor(SPECIAL, dtype=dtype))).tolist() == to_bits(expected).tolist()
    nans = every_exponent(dtype)
    nans = nans[nans.isnan()]
    assert len(nans) > 3
    canonical = 0x7FFFFFFF if dtype is torch.float32 else 0x7FFF
    assert set(to_bits(native_function(name)(nans)).tolist()) == {canonical}


def test_tails_against_many_digits() -> None:
    """Relative accuracy where float64's own functions would be the doubtful part: 60 digits."""
    mp.dps = 60
    x = torch.tensor([-14.2, -13.0, -9.5, -5.0, -1.0, -1e-3, 1e-30, 0.7, 6.0])
    truths = {
        "gelu": [mpf(float(v)) * mp.erfc(-mpf(float(v)) / mp.sqrt(2)) / 2 for v in x],
        "erfc": [mp.erfc(mpf(float(v))) for v in -x],
        "silu": [mpf(float(v)) / (1 + mp.exp(-mpf(float(v)))) for v in x * 7],
    }
    for name, truth in truths.items():
        argument = {"gelu": x, "erfc": -x, "silu": x * 7}[name]
        got = to_values(native_function(name)(argument))
        assert (ulps(got, np.array([float(t) for t in truth])) <= 1.48).all(), name
    large = torch.tensor(
        [2.0**20, 2.0**20 - 0.0625, 16367173.0 * 2.0**72, 3.4028234663852886e38, 1e22, 710.0, 51471.85]
    )
    for name, function in (("sin", mp.sin), ("cos", mp.cos)):
        truth = np.array([float(function(mpf(float(v)))) for v in large])
        assert (ulps(to_values(native_function(name)(large)), truth) <= 0.51).all(), name


INF, NAN = math.inf, math.nan
POWERS = [
    *((x, 0.0, 1.0) for x in (0.0, -0.0, INF, -INF, NAN, -3.0)),
    *((1.0, y, 1.0) for y in (INF, -INF, NAN, -0.0)),
    *((-1.0, y, 1.0) for y in (INF, -INF, 2.0, 1e30)),
    *((-0.0, y, INF) for y in (-2.0, -0.5, -INF)),
    (-0.0, -3.0, -INF),
    (0.0, -3.0, INF),
    (-0.0, 3.0, -0.0),
    (-0.0, 0.5, 0.0),
    (-0.0, 2.0, 0.0),
    (0.5, -INF, INF),
    (0.5, INF, 0.0),
    (-2.0, INF, INF),
    (-2.0, -INF, 0.0),
    (-INF, 3.0, -INF),
    (-INF, 2.0, INF),
    (-INF, -3.0, -0.0),
    (-INF, 0.5, INF),
    (INF, -0.5, 0.0),
    (-8.0, 3.0, -512.0),
    (-8.0, 0.5, NAN),
    (-8.0, -1.0, -0.125),
    (NAN, 2.0, NAN),
    (2.0, NAN, NAN),
    (2.0, 127.0, 2.0**127),
    (2.0, 128.0, INF),
    (2.0, -149.0, 2.0**-149),
    (-2.0, 16777217.0 - 1, INF),
]


def test_pow_special_cases() -> None:
    """C99 annex F, in each of the three overloads."""
    x, y, expected = (torch.tensor(column) for column in zip(*POWERS, strict=True))
    bits = to_bits(from_values(to_values(expected), torch.float32)).tolist()
    assert to_bits(elementwise.pow_tensor_tensor(x, y)).tolist() == bits
    assert [to_bits(elementwise.pow_tensor_scalar(torch.tensor([a]), b))[0] for a, b, _ in POWERS] == bits
    assert [to_bits(elementwise.pow_scalar(a, torch.tensor([b])))[0] for a, b, _ in POWERS] == bits


def test_pow_accuracy() -> None:
    """A million pairs of all exponents, and the exponents that models use."""
    x = every_pattern(4099)
    y = x[torch.from_numpy(np.random.default_rng(3).permutation(len(x)))]
    y = torch.where(y.abs() > 1000, y * 2.0**-100, y).clamp(-200, 200).nan_to_num(0.75)
    near = from_values(2.0 ** (np.random.default_rng(4).integers(-(2**20), 2**20, len(x)) / 2**19), torch.float32)
    for base, exponent in ((x, y), (near, y), *((x, torch.full_like(x, e)) for e in (2.0, 3.0, -0.5, 0.1, 10.0))):
        truth = np.power(to_values(base).astype(np.float64), to_values(exponent).astype(np.float64))
        assert ulps(to_values(elementwise.pow_tensor_tensor(base, exponent)), truth).max() <= 0.51


def test_square_is_one_rounding() -> None:
    """pow(x, 2) is x * x, rounded once, in a scalar exponent and in a tensor of exponents."""
    x = every_pattern(9973)
    expected = to_bits(from_values(to_values(x) * to_values(x), torch.float32))
    assert (to_bits(elementwise.pow_tensor_scalar(x, 2)) == expected).all()
    assert (to_bits(elementwise.pow_tensor_tensor(x, torch.full_like(x, 2))) == expected).all()
    cubes = elementwise.pow_tensor_scalar(x, 3)
    assert (to_bits(elementwise.pow_tensor_tensor(x, torch.full_like(x, 3))) == to_bits(cubes)).all()
    assert ulps(to_values(cubes), to_values(x).astype(np.float64) ** 3).max() <= 0.51


@pytest.mark.parametrize("dtype", DTYPES)
def test_pow_broadcasts_and_promotes(dtype: torch.dtype) -> None:
    """Shapes broadcast; the result's dtype is torch's; a scalar is rounded to it."""
    x = from_values(np.arange(1, 16, dtype=np.float32)[:, None] / 3, dtype)
    y = from_values(np.arange(-7, 8, dtype=np.float32) / 5, dtype)
    got = elementwise.pow_tensor_tensor(x, y)
    assert (to_bits(got) == to_bits(from_values(reference.power_of(to_values(x), to_values(y)), dtype))).all()
    other = elementwise.pow_tensor_tensor(x, y.float())
    assert other.dtype is torch.float32
    assert other.shape == (15, 15)
    tenth = to_values(from_values([0.1], dtype))
    got = elementwise.pow_tensor_scalar(x, 0.1)
    assert (to_bits(got) == to_bits(from_values(reference.power_of(to_values(x), tenth), dtype))).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_softplus_scalars(dtype: torch.dtype) -> None:
    """beta and threshold, and both branches."""
    x = from_values(np.arange(-3000, 3000, dtype=np.float32) / 50, dtype)
    for beta, threshold in ((1, 20), (0.3, 5), (2, -1)):
        expected = from_values(reference.softplus(to_values(x), beta, threshold), dtype)
        got = elementwise.softplus(x, beta, threshold)
        assert (to_bits(got) == to_bits(expected)).all()
        assert (to_bits(got) != to_bits(x)).any()
        assert ulps(reference.softplus(to_values(x), beta, 1e9), _softplus(to_values(x), beta)).max() <= 0.51


def _softplus(x: Any, beta: float) -> Any:
    beta = float(np.float32(beta))
    return np.logaddexp(0, x.astype(np.float64) * beta) / beta


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_scaled_rounds_the_product(dtype: torch.dtype) -> None:
    """Product, then sum, each rounded to fp32; a fused multiply-add would give other bytes on these inputs."""
    x = every_exponent(dtype)
    x, y = x[:1500], x[1500:]
    got = to_bits(elementwise.add_scaled(x, y, 0.3))
    assert (
        got == to_bits(from_values(reference.quiet(reference.add_scaled)(to_values(x), to_values(y), 0.3), dtype))
    ).all()
    if dtype is torch.float32:
        a, b = (from_values(np.random.default_rng(i).integers(1, 2**23, 2890) / 2**20, dtype) for i in (1, 2))
        got = to_bits(elementwise.add_scaled(a, b, 0.3))
        assert (got == to_bits(from_values(reference.add_scaled(to_values(a), to_values(b), 0.3), dtype))).all()
        assert (got != to_bits(from_values(fma(to_values(b), np.float32(0.3), to_values(a)), dtype))).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_maximum_and_minimum_have_one_answer(dtype: torch.dtype) -> None:
    """NaN wins, +0 > -0, at every place and in either order of the operands."""
    zeros = torch.tensor([0.0, -0.0, 0.0, -0.0] * 25, dtype=dtype)
    others = torch.tensor([0.0, -0.0, -0.0, 0.0] * 25, dtype=dtype)
    for a, b in ((zeros, others), (others, zeros)):
        assert torch.signbit(elementwise.maximum(a, b)).tolist() == [False, True, False, False] * 25
        assert torch.signbit(elementwise.minimum(a, b)).tolist() == [False, True, True, True] * 25
    nan, one = torch.tensor([math.nan], dtype=dtype), torch.tensor([1.0], dtype=dtype)
    for function in (elementwise.maximum, elementwise.minimum):
        assert to_bits(function(nan, one)).tolist() == to_bits(function(one, nan)).tolist()
        assert function(nan, one).isnan().all()
    low, high = torch.tensor(-1.0, dtype=dtype), torch.tensor([2.0], dtype=dtype)
    x = torch.tensor([-3.0, 0.5, 9.0], dtype=dtype)
    assert elementwise.clamp_tensor(x, low, high).tolist() == [-1.0, 0.5, 2.0]
    assert elementwise.clamp_tensor(x, None, high).tolist() == [-3.0, 0.5, 2.0]


def test_integers_and_unsupported_dtypes() -> None:
    """Integers become floats where torch makes them so; float64 and complex are refused by name."""
    whole = torch.arange(-3, 4)
    assert (to_bits(elementwise.exp(whole)) == to_bits(elementwise.exp(whole.float()))).all()
    assert elementwise.silu(whole) is NotImplemented
    assert elementwise.pow_tensor_scalar(whole, 2) is NotImplemented
    assert elementwise.maximum(whole, whole) is NotImplemented
    assert (
        to_bits(elementwise.pow_tensor_scalar(whole, 0.5)) == to_bits(elementwise.pow_tensor_scalar(whole.float(), 0.5))
    ).all()
    for dtype in (torch.float64, torch.complex64):
        x = torch.ones(3, dtype=dtype)
        for function, name in (
            (elementwise.silu, "silu"),
            (elementwise.exp, "exp"),
            (elementwise.softplus, "softplus"),
        ):
            with pytest.raises(UnsupportedDtype, match=f"aten::{name}"):
                function(x)
        with pytest.raises(UnsupportedDtype, match="aten::pow"):
            elementwise.pow_tensor_scalar(x, 2)


def test_shapes() -> None:
    """No elements, no dimensions, and results of their own: the input stays as it was."""
    assert elementwise.exp(torch.zeros(0, 3)).shape == (0, 3)
    assert elementwise.exp(torch.tensor(0.0)).item() == 1.0
    x = torch.zeros(4, 5)
    y = elementwise.exp(x)
    assert y.data_ptr() != x.data_ptr()
    assert x.sum() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", elementwise.COVERED)
def test_proof(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation is proved in each dtype, twice with the same bytes; one wrong last bit fails the proof."""
    cases, results = elementwise.prove(op, dtype)
    assert cases > 1000
    assert len(results) == cases * dtype.itemsize
    assert elementwise.prove(op, dtype) == (cases, results)
    places = [name for name in dir(elementwise) if getattr(elementwise, name) is elementwise.COVERED[op]]
    right = elementwise.COVERED[op]
    if op == "aten::gelu":
        places, right = ["_gelu"], elementwise._gelu

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        bits = to_bits(right(*args, **kwargs)).copy()
        bits.reshape(-1)[-1] ^= 1
        return from_bits(bits, dtype)

    for name in places:
        monkeypatch.setattr(elementwise, name, wrong)
    monkeypatch.setitem(elementwise.COVERED, op, wrong)
    with pytest.raises(Diverged, match=op):
        elementwise.prove(op, dtype)
