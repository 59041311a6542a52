"""Stress inputs for reductions along rows, and the proof of each operation of the rows family on them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from detinfer.ops.evidence import REFERENCE_NAME, WIDTHS, Evidence, from_values, to_values
from detinfer.reference import rows as reference
from detinfer.reference.arithmetic import Float


@functools.cache
def cancelling(n: int, dtype: torch.dtype, rows: int = 3) -> torch.Tensor:
    """[rows, n]: small terms of 2^-20 to 2^-7, the first element about 2^15, the last nearly its negative, and from 49
    elements on two more large ones in between that cancel exactly.

    Next to a large term fp32 keeps a few bits of a small one, and which it keeps depends on the order; what is left in
    the end is small, so that even bf16 shows it. Read it only.
    """
    random = np.random.default_rng(n)
    values = np.ldexp(random.integers(-(2**23), 2**23, (rows, n)).astype(np.float64), -23)
    values = np.ldexp(values, random.integers(-20, -6, (rows, n)))
    if n >= 3:
        values[:, 0] = random.integers(2**22, 2**23, rows) / 2**8
        values[:, -1] = -values[:, 0] * (1 + 2.0**-20)
    if n >= 49:
        values[:, n // 3] = random.integers(2**22, 2**23, rows) / 2**8
        values[:, n // 3 * 2] = -values[:, n // 3]
    return from_values(values.astype(np.float32), dtype)


@functools.cache
def spread(n: int, dtype: torch.dtype, rows: int = 3) -> torch.Tensor:
    """[rows, n]: both signs, magnitudes of 2^-7 to 1, for sums of squares, in which nothing can cancel. Read it only."""
    random = np.random.default_rng(n + 2)
    values = np.ldexp(random.integers(-(2**23), 2**23, (rows, n)).astype(np.float64), -23)
    return from_values(np.ldexp(values, random.integers(-7, 1, (rows, n))).astype(np.float32), dtype)


@functools.cache
def logits(n: int, dtype: torch.dtype, rows: int = 3) -> torch.Tensor:
    """[rows, n]: in even rows values of -24 to 8, so that the exponentials spread over 2^46, and from the second row on
    every seventh masked by -Inf; in odd rows 0 in the first place and -19 to -15 in all others.

    The exponentials of the others are then 2^-27 to 2^-22 beside a 1: added to it one by one they are lost, together
    they are not. Read it only.
    """
    random = np.random.default_rng(n + 1)
    values = random.integers(-(2**20) * 3, 2**20, (rows, n)) / 2**17
    if n > 7:
        values[1:, 3::7] = -np.inf
    values[1::2] = random.integers(-19 * 2**18, -15 * 2**18, values[1::2].shape) / 2**18
    values[1::2, 0] = 0
    return from_values(values.astype(np.float32), dtype)


def _edges(dtype: torch.dtype) -> torch.Tensor:
    # NaN, infinities of one and of both signs, all masked, negative zeros, subnormals.
    rows = np.zeros((7, 21), np.float32)
    rows[0, 5] = np.nan
    rows[1, 3] = np.inf
    rows[2, 3], rows[2, 9] = np.inf, -np.inf
    rows[3] = -np.inf
    rows[4] = -0.0
    rows[5] = np.float32(1e-40)
    rows[6, 20] = -3.0
    return from_values(rows, dtype)


def vector(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[n]: weights of both signs, up to 2 in magnitude."""
    random = np.random.default_rng(seed)
    return from_values((random.integers(-(2**23), 2**23, n) / 2**22).astype(np.float32), dtype)


def prove(
    op: str, dtype: torch.dtype, function: Callable[..., Any], statistics: torch.dtype | None = None
) -> tuple[int, bytes]:
    """Compare ``function`` with the reference of ``op`` on stress rows of odd widths and on rows of special values.

    ``statistics`` is the dtype of LayerNorm's mean and rstd; that of the rows unless given.
    """
    evidence = Evidence(op, dtype)
    kind = kind_of(op)
    checks: dict[str, Callable[..., None]] = {
        "sum": _reductions,
        "mean": _reductions,
        "amax": _extremes,
        "amin": _extremes,
        "max": _extremes,
        "min": _extremes,
        "softmax": _softmaxes,
        "log_softmax": _softmaxes,
        "rms_norm": _rms_norms,
        "fused_rms_norm": _rms_norms,
        "native_layer_norm": functools.partial(_layer_norms, statistics or dtype),
    }
    checks[kind](op, kind, dtype, function, evidence)
    return evidence.total()


def kind_of(op: str) -> str:
    """``softmax`` of ``aten::_softmax``, ``sum`` of ``aten::sum.dim_IntList``."""
    return op.removeprefix("aten::").removeprefix("_").partition(".")[0]


def _reductions(op: str, kind: str, dtype: torch.dtype, function: Callable[..., Any], evidence: Evidence) -> None:
    truth: Callable[[Float], Float] = reference.row_sum if kind == "sum" else reference.mean
    for n in WIDTHS:
        x = cancelling(n, dtype)
        values = to_values(x)
        if "." not in op:
            evidence.expect(function(x), from_values(truth(values.reshape(1, -1))[0], dtype), f"all of 3 x {n}")
            continue
        expected = from_values(truth(values), dtype)
        evidence.expect(function(x, [-1]), expected, f"width {n}")
        evidence.expect(function(x.t().contiguous(), [0], True), expected[None], f"over dimension 0 of {n}")
        if dtype is not torch.float32:
            evidence.expect(
                function(x, [1], dtype=torch.float32), from_values(truth(values), torch.float32), f"width {n} to fp32"
            )
    edges = _edges(dtype)
    rows = from_values(truth(to_values(edges)), dtype)
    if "." in op:
        evidence.expect(function(edges, [1]), rows, "special values")
        cube = cancelling(77, dtype, 6).reshape(2, 3, 77)
        flat = to_values(cube).transpose(1, 0, 2).reshape(3, -1)
        evidence.expect(function(cube, [2, 0]), from_values(truth(flat), dtype), "over dimensions 2 and 0")
        flat = to_values(cube).transpose(0, 2, 1).reshape(-1, 3)
        evidence.expect(function(cube, [1]), from_values(truth(flat), dtype).reshape(2, 77), "over dimension 1")
    else:
        for i in range(len(edges)):
            evidence.expect(function(edges[i]), rows[i], f"special values {i}")


def _extremes(op: str, kind: str, dtype: torch.dtype, function: Callable[..., Any], evidence: Evidence) -> None:
    truth = reference.greatest if kind.endswith("max") else reference.least
    for n in WIDTHS:
        zeros = from_values(np.where(np.arange(3 * n).reshape(3, n) % 5 < 2, np.float32(-0.0), np.float32(0)), dtype)
        for x in (cancelling(n, dtype), zeros, -zeros.abs(), _edges(dtype)):
            if kind in ("max", "min"):
                expected = from_values(truth(to_values(x).reshape(1, -1))[0], dtype)
                evidence.expect(function(x), expected, f"all of {list(x.shape)}")
                continue
            expected = from_values(truth(to_values(x)), dtype)
            evidence.expect(function(x, [1]), expected, f"rows of {list(x.shape)}")
            evidence.expect(function(x.t().contiguous(), [0], True), expected[None], f"columns of {list(x.shape)}")


def _softmaxes(op: str, kind: str, dtype: torch.dtype, function: Callable[..., Any], evidence: Evidence) -> None:
    truth = reference.softmax if kind == "softmax" else reference.log_softmax
    for n in WIDTHS:
        x = logits(n, dtype)
        expected = from_values(truth(to_values(x)), dtype)
        evidence.expect(function(x, -1, False), expected, f"width {n}")
        evidence.expect(function(x.t(), 0, False), expected.t().contiguous(), f"over dimension 0 of {n}")
    x = _edges(dtype)
    evidence.expect(function(x, 1, False), from_values(truth(to_values(x)), dtype), "special values")
    if dtype is not torch.float32:
        evidence.expect(function(x, 1, True), from_values(truth(to_values(x)), torch.float32), "half_to_float")


def _rms_norms(op: str, kind: str, dtype: torch.dtype, function: Callable[..., Any], evidence: Evidence) -> None:
    for n in WIDTHS:
        for x in (spread(n, dtype), _edges(dtype)):
            size = x.shape[1]
            for weight in (vector(size, dtype, n), None):
                w = None if weight is None else to_values(weight)
                y, r = reference.rms_norm(to_values(x), w, 1e-6, "fp32", REFERENCE_NAME[dtype])
                got = function(x, [size], weight, 1e-6)
                where = f"width {size}, {'no weight' if w is None else 'weight'}"
                if kind == "fused_rms_norm":
                    evidence.expect(got[1], from_values(r[:, None], torch.float32), f"{where}, r")
                    got = got[0]
                evidence.expect(got, from_values(y, dtype), where)


def _layer_norms(
    statistics: torch.dtype, op: str, kind: str, dtype: torch.dtype, function: Callable[..., Any], evidence: Evidence
) -> None:
    for n in WIDTHS:
        for x in (spread(n, dtype), cancelling(n, dtype), _edges(dtype)):
            size = x.shape[1]
            weight, bias = vector(size, dtype, n), vector(size, dtype, n + 1)
            for w, b in ((weight, bias), (weight, None), (None, None)):
                expected = reference.layer_norm(
                    to_values(x), None if w is None else to_values(w), None if b is None else to_values(b), 1e-5
                )
                got = function(x, [size], w, b, 1e-5)
                for name, one, truth in zip(("norm", "mean", "rstd"), got, expected, strict=True):
                    wanted = from_values(truth, dtype) if name == "norm" else from_values(truth[:, None], statistics)
                    evidence.expect(one, wanted, f"width {size}, {name}")
