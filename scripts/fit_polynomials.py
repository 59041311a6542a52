"""Fit the polynomials of the elementwise family with mpmath and measure their errors.

Prints, for each polynomial of csrc/cpu/math.h and detinfer/reference/elementwise.py, its coefficients (lowest power
first) and the largest relative error of the function built from the *rounded* coefficients. Run it to check the
tables, or with another degree to trade speed for accuracy. With ``--gelu`` it prints the table of gelu's tail instead,
as csrc/cpu/gelu_table.h or as detinfer/reference/gelu_table.py:

    python scripts/fit_polynomials.py
    python scripts/fit_polynomials.py --gelu c++
    python scripts/fit_polynomials.py --gelu python
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from mpmath import chebyfit, cos, erf, erfc, exp, fabs, linspace, log, lu_solve, matrix, mp, mpf, pi, sin, sqrt

mp.dps = 40
Real = Callable[[mpf], mpf]
POINTS = 1500


@dataclass(frozen=True)
class Fit:
    """A function f(x) = base(x) + factor(x) p(x) on ``interval``, p of ``degree``: minimax in relative error."""

    name: str
    f: Real
    base: Real
    factor: Real
    interval: tuple[mpf, mpf]
    degree: int
    single: bool = False


def _fill(function: Real, limit: mpf) -> Real:
    return lambda x: limit if x == 0 else function(x)


ERFC_K = mpf("3.0")
ERFC_END = mpf("10.75")


def _erfcx_scaled(u: mpf) -> mpf:
    z = ERFC_K * (1 + u) / (1 - u)
    return exp(z * z) * erfc(z) * (z + ERFC_K)


HALF_LN2 = log(mpf(2)) / 2 * mpf("1.0001")
LOG_END = ((sqrt(mpf(2)) - 1) / (sqrt(mpf(2)) + 1)) ** 2 * mpf("1.0001")
SIN_END = (pi / 2) ** 2 * mpf("1.0001")
ZERO, ONE = mpf(0), mpf(1)

FITS = [
    Fit(
        "exp32: e^r = 1 + r + r^2 p(r), in fp32", exp, lambda r: 1 + r, lambda r: r * r, (-HALF_LN2, HALF_LN2), 4, True
    ),
    Fit(
        "exp2: 2^f = 1 + f p(f)", lambda f: mpf(2) ** f, lambda f: ONE, lambda f: f, (mpf("-0.5001"), mpf("0.5001")), 6
    ),
    Fit(
        "log: log((1+s)/(1-s)) = s (2 + t p(t)), t = s^2",
        _fill(lambda t: log((1 + sqrt(t)) / (1 - sqrt(t))) / sqrt(t), mpf(2)),
        lambda t: mpf(2),
        lambda t: t,
        (ZERO, LOG_END),
        4,
    ),
    Fit(
        "sin: sin(r) = r (1 + t p(t)), t = r^2",
        _fill(lambda t: sin(sqrt(t)) / sqrt(t), ONE),
        lambda t: ONE,
        lambda t: t,
        (ZERO, SIN_END),
        4,
    ),
    Fit(
        "erf: erf(x) = x p(t), t = x^2 <= 1",
        _fill(lambda t: erf(sqrt(t)) / sqrt(t), 2 / sqrt(pi)),
        lambda t: ZERO,
        lambda t: ONE,
        (ZERO, mpf("1.001")),
        7,
    ),
    Fit(
        f"erfcx: e^(z^2) erfc(z) (z + k) = p(u), u = (z-k)/(z+k), k = {ERFC_K}",
        _erfcx_scaled,
        lambda u: ZERO,
        lambda u: ONE,
        (-ONE, (ERFC_END - ERFC_K) / (ERFC_END + ERFC_K)),
        11,
    ),
]


def minimax(fit: Fit) -> list[mpf]:
    """Coefficients of p, lowest power first: Remez's exchange on a grid of Chebyshev points."""
    low, high = fit.interval
    grid = [(low + high) / 2 - (high - low) / 2 * cos(pi * (i + mpf("0.5")) / POINTS) for i in range(POINTS)]
    grid = [x for x in grid if fit.factor(x) != 0]
    # |factor|: a weight that changes sign inside the interval would break the alternation that Remez exchanges.
    weight = [fabs(fit.factor(x)) / fit.f(x) for x in grid]
    wanted = [(fit.f(x) - fit.base(x)) / fit.factor(x) * w for x, w in zip(grid, weight, strict=True)]
    size = fit.degree + 2
    chosen = [round((len(grid) - 1) * (1 - float(cos(pi * i / (size - 1)))) / 2) for i in range(size)]
    solution = matrix(size, 1)
    for _ in range(40):
        system, right = matrix(size, size), matrix(size, 1)
        for row, i in enumerate(chosen):
            for power in range(fit.degree + 1):
                system[row, power] = weight[i] * grid[i] ** power
            system[row, size - 1] = (-1) ** row
            right[row] = wanted[i]
        solution = lu_solve(system, right)
        error = [w * _horner(list(solution)[:-1], x) - y for w, x, y in zip(weight, grid, wanted, strict=True)]
        peaks = _alternating_peaks(error, size)
        if len(peaks) < size or peaks == chosen:
            break
        chosen = peaks
    return list(solution)[:-1]


def _alternating_peaks(error: list[mpf], count: int) -> list[int]:
    peaks: list[int] = []
    for i, e in enumerate(error):
        if peaks and (error[peaks[-1]] > 0) == (e > 0):
            if fabs(e) > fabs(error[peaks[-1]]):
                peaks[-1] = i
        else:
            peaks.append(i)
    while len(peaks) > count:
        peaks.pop(0 if fabs(error[peaks[0]]) < fabs(error[peaks[-1]]) else -1)
    return peaks


def _horner(coefficients: list[mpf], x: mpf) -> mpf:
    p = mpf(0)
    for c in reversed(coefficients):
        p = p * x + c
    return p


GELU_INTERVALS, GELU_DEGREE = 32, 6


def _gelu_tail(a: mpf) -> mpf:
    return exp(a * a / 2) * erfc(a / sqrt(mpf(2))) / 2


def gelu_table() -> tuple[list[list[float]], mpf]:
    """Coefficients of e^(a^2/2) Phi(-a) in s = a - i/2 for each i from 0 to 31, and the largest relative error.

    Row 0 holds what the constant coefficients lose by rounding to fp32, row 1 + j the coefficients of s^j.
    """
    rows: list[list[float]] = [[] for _ in range(GELU_DEGREE + 2)]
    worst = mpf(0)
    for i in range(GELU_INTERVALS):
        center, low, high = mpf(i) / 2, mpf(0) if i == 0 else mpf("-0.25"), mpf("0.25")
        fitted = chebyfit(lambda s, center=center: _gelu_tail(center + s), [low, high], GELU_DEGREE + 1)[::-1]
        single = [float(np.float32(float(c))) for c in fitted]
        lost = float(np.float32(float(fitted[0] - mpf(single[0]))))
        for row, value in zip(rows, [lost, *single], strict=True):
            row.append(value)
        for s in linspace(low, high, 101):
            built = _horner([mpf(single[0]) + mpf(lost), *map(mpf, single[1:])], s)
            worst = max(worst, fabs(built / _gelu_tail(center + s) - 1))
    return rows, worst


def _short_hex(value: float) -> str:
    mantissa, _, exponent = value.hex().partition("p")
    return f"{mantissa.rstrip('0').rstrip('.')}p{exponent}"


def print_gelu_table(language: str) -> None:
    """Print the table as a C++ header or as a Python module."""
    rows, worst = gelu_table()
    what = (
        f"e^(a^2/2) Phi(-a) in s = a - i/2 for i from 0 to {GELU_INTERVALS - 1}, relative error 2^{float(mp.log(worst, 2)):.1f}:\n"
        "what the constant coefficients lose by rounding to fp32, then the coefficients of s^0 to s^6.\n"
        "Made by scripts/fit_polynomials.py --gelu."
    )
    python = language == "python"
    if python:
        print(f'"""{what}\n"""\n\nGELU_TAIL = (')
    else:
        print("\n".join(f"// {line}" for line in what.splitlines()))
        print("#pragma once\n\nnamespace detinfer {\nnamespace {\n")
        print(f"alignas(64) constexpr float kGeluTail[{len(rows)}][{GELU_INTERVALS}] = {{")
    for row in rows:
        print("    (" if python else "    {")
        for i in range(0, GELU_INTERVALS, 1 if python else 4):
            print(
                "        "
                + " ".join(f"{v!r}," if python else f"{_short_hex(v)}f," for v in row[i : i + (1 if python else 4)])
            )
        print("    )," if python else "    },")
    print(")" if python else "};\n\n}  // namespace\n}  // namespace detinfer")


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description="Fit the polynomials of the elementwise family.")
    parser.add_argument("--gelu", choices=("c++", "python"))
    if (language := parser.parse_args().gelu) is not None:
        print_gelu_table(language)
        return
    for fit in FITS:
        rounded = [float(np.float32(float(c))) if fit.single else float(c) for c in minimax(fit)]
        worst = max(
            fabs((fit.base(x) + fit.factor(x) * _horner([mpf(c) for c in rounded], x)) / fit.f(x) - 1)
            for x in linspace(*fit.interval, 4001)
        )
        print(f"{fit.name}\n  degree {fit.degree}, largest relative error 2^{float(mp.log(worst, 2)):.1f}")
        for c in rounded:
            print(f"    {c!r:>24}  {c.hex()}")


if __name__ == "__main__":
    main()
