"""The elementwise functions, in numpy: float32 in, float32 out, each result a function of its element alone.

``exp``, ``sigmoid``, ``silu``, ``gelu`` and ``rsqrt`` are float32 operations and fused multiply-adds; all others are computed in
float64 with plain additions, multiplications and divisions in the order written here, then rounded once. Coefficients
are minimax fits (``scripts/fit_polynomials.py`` makes them and measures their errors), lowest power first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from detinfer.reference.arithmetic import Double, Float, fma, single
from detinfer.reference.gelu_table import GELU_TAIL

# e^r = 1 + r + r^2 p(r) for |r| <= ln(2) / 2, relative error 2^-28.0
EXP32 = (0.4999999403953552, 0.1666652113199234, 0.04166838899254799, 0.008368716575205326, 0.001381459878757596)
# 2^f = 1 + f p(f) for |f| <= 1/2, relative error 2^-34.3
EXP2 = (
    0.6931471807047656,
    0.24022651067002554,
    0.055504103653925045,
    0.009618038059717188,
    0.0013333935354189089,
    0.00015466781488233383,
    1.5196134651605056e-05,
)
# log((1 + s) / (1 - s)) = s (2 + t p(t)), t = s^2, for |s| <= 0.1716, relative error 2^-44.9
LOG = (0.666666666757733, 0.39999995631048296, 0.28572108206138563, 0.2217622742909408, 0.19583608979432876)
# sin(r) = r (1 + t p(t)), t = r^2, for |r| <= pi / 2, relative error 2^-35.3
SIN = (
    -0.16666666626128793,
    0.008333331107692498,
    -0.00019840868087282436,
    2.7525377966453593e-06,
    -2.3888792846445797e-08,
)
# erf(x) = x p(t), t = x^2 <= 1, relative error 2^-34.8
ERF = (
    1.1283791670577323,
    -0.3761263843151409,
    0.11283781919072519,
    -0.026865396446270843,
    0.00522093431389411,
    -0.0008482653326882801,
    0.00011255580711650851,
    -9.637350259490087e-06,
)
# e^(z^2) erfc(z) (z + 3) = p((z - 3) / (z + 3)) for 0 <= z <= 10.75, relative error 2^-34.3
ERFC = (
    1.0740069070878444,
    -0.883394454074371,
    0.5902283577205105,
    -0.31046721574814956,
    0.11952775273992115,
    -0.02682790557708882,
    -0.0012125994291804117,
    0.0030381360753707898,
    -0.0005454656983890007,
    -0.0002875864292095903,
    9.534712487146012e-05,
    3.932515558483703e-05,
)

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
LOG10_E = 0.4342944819032518


def polynomial(coefficients: Sequence[float], x: Double) -> Double:
    """Horner's rule, highest power first, a multiplication and an addition for each step."""
    p = np.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        p = p * x + c
    return p


def exponential(v: Float, low: Any = None) -> tuple[Float, Float]:
    """(q, k) with e^(v + low) = 2^k (1 + q), k the integer nearest to v / ln 2, for |v| <= 130 and tiny ``low``."""
    k = fma(v, np.float32(LOG2_E), np.float32(1.5 * 2**23)) - np.float32(1.5 * 2**23)
    r = fma(k, np.float32(-0.693145751953125), v)
    r = fma(k, np.float32(-1.428606765330187e-06), r)
    r = r if low is None else r + low
    c = np.full_like(v, EXP32[-1])
    for coefficient in reversed(EXP32[:-1]):
        c = fma(c, r, np.float32(coefficient))
    return fma(c, r * r, r), k


def times_power_of_two(v: Float, k: Float) -> Float:
    """v 2^k with one rounding."""
    return single(np.ldexp(v.astype(np.float64), np.nan_to_num(k).astype(np.int32)))


def exp(x: Float) -> Float:
    """e^x."""
    q, k = exponential(_clamp(x, -110.0, 90.0))
    return times_power_of_two(np.float32(1) + q, k)


def _divide_by_one_plus(n: Float, n_low: Float, t: Float) -> Float:
    # (n + n_low) / (1 + t): what the divisor and the quotient lost to rounding is found exactly and given back.
    d = np.float32(1) + t
    d_low = t - (d - np.float32(1))
    reciprocal = np.float32(1) / d
    y = n * reciprocal
    rest = fma(-y, d_low, fma(-y, d, n)) + n_low
    return fma(rest, reciprocal, y)


def sigmoid(x: Float) -> Float:
    """1 / (1 + e^-x), computed as e^x / (1 + e^x) for negative x."""
    q, k = exponential(_clamp(-np.abs(x), -130.0, 0.0))
    p = np.float32(1) + q
    positive = x >= 0
    y = _divide_by_one_plus(
        np.where(positive, np.float32(1), p),
        np.where(positive, np.float32(0), q - (p - np.float32(1))),
        times_power_of_two(p, k),
    )
    return np.where(positive, y, times_power_of_two(y, k))


def silu(x: Float) -> Float:
    """x sigmoid(x); NaN for -Inf, as torch's -Inf / Inf."""
    v = _clamp(-np.abs(x), -130.0, 0.0)
    q, k = exponential(v)
    product = fma(v, q, v)
    product_low = fma(v, q, v - product)
    positive = x >= 0
    y = _divide_by_one_plus(
        np.where(positive, x, product),
        np.where(positive, np.float32(0), product_low),
        times_power_of_two(np.float32(1) + q, k),
    )
    result = np.copysign(np.where(positive, y, times_power_of_two(y, k)), x)  # -0 stays -0
    return np.where(np.abs(x) > 130, np.where(positive, x, x * np.float32(0)), result)


def gelu(x: Float) -> Float:
    """x Phi(x) as max(x, 0) - a Phi(-a), a = |x|, Phi the normal distribution function; NaN for -Inf, as in torch.

    Phi(-a) = e^(-a^2/2) R(a), R from the table of polynomials around the multiples of 1/2. Low parts, where a name ends
    in ``_low``, hold what the rounding of a product lost.
    """
    a = np.abs(x)
    v = _clamp(a, 0.0, 14.6)
    i = np.rint(np.nan_to_num(v) * np.float32(2))
    s = fma(i, np.float32(-0.5), v)
    c = np.array(GELU_TAIL, np.float32)[:, i.astype(np.int64)]
    p = c[7]
    for coefficient in c[6:1:-1]:
        p = fma(p, s, coefficient)
    tail = fma(p, s, c[1])
    tail_low = fma(p, s, c[1] - tail) + c[0]
    h = v * v
    h_low = fma(v, v, -h)
    q, k = exponential(h * np.float32(-0.5), h_low * np.float32(-0.5))
    product = v * tail
    product_low = fma(v, tail_low, fma(v, tail, -product))
    t = times_power_of_two(product + fma(product, q, fma(product_low, q, product_low)), k)
    return single(np.where(x >= 0, x, x * np.float32(0)) - t)


def rsqrt(x: Float) -> Float:
    """1 / sqrt(x), both operations rounded to float32."""
    return single(np.float32(1) / np.sqrt(x))


def add_scaled(x: Float, y: Float, alpha: float) -> Float:
    """x + alpha y: the product is rounded to float32, then the sum."""
    return single(x + np.float32(alpha) * y)


def maximum(x: Float, y: Float) -> Float:
    """The greater of x and y: NaN wins, +0 > -0."""
    r = np.where((x == y) & np.signbit(x), y, np.where(x >= y, x, y))
    return np.where(np.isnan(x) | np.isnan(y), np.float32(np.nan), r)


def minimum(x: Float, y: Float) -> Float:
    """The lesser of x and y: NaN wins, -0 < +0."""
    return -maximum(-x, -y)


def _clamp(x: Any, low: float, high: float) -> Any:
    return np.where(x < low, x.dtype.type(low), np.where(x > high, x.dtype.type(high), x))


def power(t: Double) -> tuple[Double, Double]:
    """(p, n) with 2^t = 2^n (1 + p), n the integer nearest to t."""
    n = np.rint(t)
    f = t - n
    return polynomial(EXP2, f) * f, n


def exp2_(t: Double) -> Double:
    """2^t; exactly 0 for t <= -1023."""
    p, n = power(_clamp(t, -1023.0, 1024.0))
    return np.where(t <= -1023, 0.0, np.ldexp(1.0 + p, np.nan_to_num(n).astype(np.int32)))


def expm1_(x: Double) -> Double:
    """e^x - 1, as (2^n - 1) + 2^n p."""
    p, n = power(_clamp(x * LOG2_E, -100.0, 1000.0))
    s = np.ldexp(1.0, np.nan_to_num(n).astype(np.int32))
    return np.where(x == 0, x, (s - 1.0) + s * p)


def tanh_(x: Double) -> Double:
    """tanh x = (e^2|x| - 1) / (e^2|x| + 1) with the sign of x."""
    e = expm1_(np.minimum(np.abs(x), 30.0) * 2.0)
    return np.copysign(e / (e + 2.0), x)


def logarithm(x: Double) -> tuple[Double, Double]:
    """(k, log m) with x = 2^k m and m in [sqrt(1/2), sqrt(2)), for positive finite x."""
    m, k = np.frexp(x)
    small = m < np.sqrt(0.5)
    m, k = np.where(small, m * 2.0, m), np.where(small, k - 1, k).astype(np.float64)
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    return k, s * (polynomial(LOG, t) * t + 2.0)


def _log_edges(x: Double, result: Double) -> Double:
    result = np.where(x == np.inf, x, result)
    result = np.where(x == 0, -np.inf, result)
    return np.where((x < 0) | np.isnan(x), np.nan, result)


def log_(x: Double) -> Double:
    """The natural logarithm."""
    k, log_m = logarithm(x)
    return _log_edges(x, k * LN_2 + log_m)


def log2_(x: Double) -> Double:
    """The logarithm to base 2."""
    k, log_m = logarithm(x)
    return _log_edges(x, k + log_m * LOG2_E)


def log1p_(x: Double) -> Double:
    """log(1 + x): the bits of x that 1 + x drops are added back to first order."""
    u = 1.0 + x
    lost = (x - (u - 1.0)) / u
    result = log_(u) + np.where((u == 0) | np.isinf(u) | np.isnan(u), 0.0, lost)
    return np.where(x == 0, x, result)


def softplus_(x: Double, beta: float = 1.0, threshold: float = 20.0) -> Double:
    """log(1 + e^(beta x)) / beta, and x itself where beta x > threshold."""
    beta, threshold = float(np.float32(beta)), float(np.float32(threshold))
    z = x * beta
    total = (np.maximum(z, 0.0) + log1p_(exp2_(-np.abs(z) * LOG2_E))) / np.float64(beta)
    return np.where(z > threshold, x, total)


def _erfc_positive(z: Double, e: Double) -> Double:
    z = np.minimum(z, 30.0)
    reciprocal = 1.0 / (z + 3.0)
    return e * (polynomial(ERFC, (z - 3.0) * reciprocal) * reciprocal)


def erfc_(x: Double) -> Double:
    """1 - erf x."""
    r = _erfc_positive(np.abs(x), exp2_(x * x * -LOG2_E))
    return np.where(x < 0, 2.0 - r, r)


def erf_(x: Double) -> Double:
    """The error function."""
    t = x * x
    large = 1.0 - _erfc_positive(np.abs(x), exp2_(t * -LOG2_E))
    return np.where(np.abs(x) < 1, x * polynomial(ERF, t), np.copysign(large, x))


def gelu_tanh_(x: Double) -> Double:
    """x (1 + tanh v) / 2 with v = sqrt(2 / pi) (x + 0.044715 x^3), as x / (1 + e^-2v)."""
    v = x * (x * x * 0.044715 + 1.0)
    return x / (1.0 + exp2_(v * (-1.5957691216057308 * LOG2_E)))


ONE_OVER_PI = 0x517CC1B727220A94FE13ABE8FA9A6EE06DB14ACC9E21C820FF28B1D5EF5DE2B0
"""The first 256 bits of 1 / pi after the point."""


def _remainder(x: Double, half: int) -> tuple[Double, Any]:
    # x = r + (n + half / 2) pi; pi in three parts, the first two short enough for exact products.
    shift = 0.5 * half
    n = np.rint(x * 0.3183098861837907 - shift)
    h = n + shift
    r = ((x - h * 3.1415926534682512) - h * 1.2154201012607932e-10) - h * 4.044532497591901e-21
    return r, n % 2 != 0


def _large_remainder(x: float, half: int) -> tuple[float, bool]:
    # For 2^20 <= |x| < 2^128, in integers: x = m 2^e, and m times 96 bits of 2^e / pi, one of them before the point.
    fraction, exponent = np.frexp(abs(x))
    m, e = int(fraction * 2**24), int(exponent) - 24
    window = (ONE_OVER_PI >> (256 - 95 - e)) % 2**96
    turns = m * window
    if x < 0:
        turns = -turns
    turns = (turns - half * 2**94) % 2**96
    n, rest = divmod(turns + 2**94, 2**95)
    return float(rest - 2**94) * 2.0**-95 * np.pi, n % 2 == 1


def sine(x: Float, half: int = 0) -> Float:
    """sin x, or cos x where ``half`` is 1: the sine of the remainder by pi, negated for odd multiples."""
    r, odd = _remainder(x.astype(np.float64), half)
    for place in np.argwhere((np.abs(x) >= 2.0**20) & np.isfinite(x)):
        i = tuple(place)
        r[i], odd[i] = _large_remainder(float(x[i]), half)
    t = r * r
    s = r * (1.0 + t * polynomial(SIN, t))
    return single(np.where(odd ^ bool(half), -s, s))


def pow_(x: Double, y: Double) -> Double:
    """x^y, with the special cases of C99 annex F; x x where y is 2 and x x x where y is 3."""
    a = np.abs(x)
    k, log_a = logarithm(a)
    log2_a = np.where(a == 0, -np.inf, np.where(np.isfinite(a), k + log_a * LOG2_E, a))
    r = exp2_(y * log2_a)
    whole = (np.rint(y) == y) | ~(np.abs(y) < 2.0**24)
    odd = (np.abs(y) < 2.0**24) & (y % 2 == 1)
    negative = np.signbit(x)
    r = np.where(negative & odd, -r, r)
    r = np.where(negative & ~whole & (a != 0) & np.isfinite(a), np.nan, r)
    r = np.where(y == 2, x * x, r)
    r = np.where(y == 3, x * x * x, r)
    r = np.where((a == 1) & np.isinf(y), 1.0, r)
    return np.where((x == 1) | (y == 0), 1.0, r)


def _in_double(f: Callable[[Double], Double]) -> Callable[[Float], Float]:
    return lambda x: single(f(x.astype(np.float64)))


def _in_double2(f: Callable[[Double, Double], Double]) -> Callable[[Float, Float], Float]:
    return lambda x, y: single(f(x.astype(np.float64), y.astype(np.float64)))


UNARY: dict[str, Callable[[Float], Float]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": _in_double(gelu_tanh_),
    "sigmoid": sigmoid,
    "tanh": _in_double(tanh_),
    "exp": exp,
    "exp2": _in_double(exp2_),
    "expm1": _in_double(expm1_),
    "log": _in_double(log_),
    "log2": _in_double(log2_),
    "log10": _in_double(lambda x: log_(x) * LOG10_E),
    "log1p": _in_double(log1p_),
    "erf": _in_double(erf_),
    "erfc": _in_double(erfc_),
    "sin": sine,
    "cos": lambda x: sine(x, 1),
    "rsqrt": rsqrt,
    "sqrt": np.sqrt,
}
"""Functions of one operand, by the name of csrc's operation."""


def quiet(f: Callable[..., Float]) -> Callable[..., Float]:
    """``f`` with numpy's warnings about overflow and NaN off."""

    def inside(*args: Any, **kwargs: Any) -> Float:
        with np.errstate(all="ignore"):
            return f(*args, **kwargs)

    return inside


def unary(name: str, x: Float) -> Float:
    """``UNARY[name]``, without numpy's warnings."""
    return quiet(UNARY[name])(np.asarray(x, np.float32))


def power_of(x: Any, y: Any) -> Float:
    """x^y in float32, shapes broadcast."""
    x, y = np.broadcast_arrays(np.asarray(x, np.float32), np.asarray(y, np.float32))
    return quiet(_in_double2(pow_))(x, y)


def softplus(x: Float, beta: float = 1.0, threshold: float = 20.0) -> Float:
    """Softplus in float32."""
    return quiet(_in_double(lambda v: softplus_(v, beta, threshold)))(x)
