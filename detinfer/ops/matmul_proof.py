"""The proof of the matmul family: chains on which order shows, at row counts where kernels change."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from detinfer.errors import Diverged
from detinfer.ops import matmul
from detinfer.ops.evidence import Evidence, from_values, to_values
from detinfer.reference import matmul as reference
from detinfer.reference.arithmetic import Float

TERMS = (1, 15, 77)
ROWS = (1, 2, 5, 13)
COLUMNS = (1, 33, 70)


@functools.cache
def _operands(dtype: torch.dtype, terms: int, subnormal: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a [13, K], b [K, 70], c [70]: exponents spread, the first and the last product nearly cancel."""
    rng = np.random.default_rng(terms)

    def values(*shape: int) -> Float:
        mantissa = rng.integers(128, 256, size=shape) * (rng.integers(0, 2, size=shape) * 2 - 1) / 128.0
        return np.ldexp(mantissa, rng.integers(-7, 3, size=shape)).astype(np.float32)

    a, b, c = values(ROWS[-1], terms), values(terms, COLUMNS[-1]), values(COLUMNS[-1])
    if terms > 2:
        a[:, 0] = 2.0**13 * (1 + np.arange(ROWS[-1]) / 32)
        a[:, -1] = -a[:, 0]
        b[0] = b[-1] = 1
    if subnormal:
        # Products down among the subnormals: an instruction that flushes them must not be used here.
        tiny = {torch.float32: -100, torch.bfloat16: -100, torch.float16: -12}[dtype]
        a, b = np.ldexp(values(ROWS[-1], terms), tiny), np.ldexp(values(terms, COLUMNS[-1]), tiny // 3)
    return from_values(a, dtype), from_values(b, dtype), from_values(c, dtype)


@functools.cache
def _chains(dtype: torch.dtype, terms: int, subnormal: bool) -> Float:
    a, b, _ = _operands(dtype, terms, subnormal)
    return reference.matmul(to_values(a), to_values(b))


def _expected(dtype: torch.dtype, terms: int, subnormal: bool, bias: bool) -> torch.Tensor:
    chains = _chains(dtype, terms, subnormal)
    if bias:
        chains = chains + to_values(_operands(dtype, terms, subnormal)[2])
    return from_values(chains, dtype)


Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Each operation on a [M, K], b [K, N], c [N] -> [M, N], and whether c is added.
_RUNS: dict[str, tuple[Run, bool]] = {
    "aten::linear": (lambda a, b, c: matmul.linear(a, b.t().contiguous(), c), True),
    "aten::matmul": (lambda a, b, c: matmul.matmul(a[None], b)[0], False),
    "aten::mm": (lambda a, b, c: matmul.mm(a, b), False),
    "aten::addmm": (lambda a, b, c: matmul.addmm(c, a, b), True),
    "aten::bmm": (lambda a, b, c: matmul.bmm(a.expand(3, *a.shape), b.expand(3, *b.shape))[2], False),
    "aten::baddbmm": (lambda a, b, c: matmul.baddbmm(c, a.expand(3, *a.shape), b.expand(3, *b.shape))[1], True),
    "aten::mv": (lambda a, b, c: torch.stack([matmul.mv(a, column) for column in b.t()[:3]], 1), False),
    "aten::addmv": (lambda a, b, c: torch.stack([matmul.addmv(c[i], a, b[:, i]) for i in range(_few(b))], 1), True),
    "aten::dot": (lambda a, b, c: torch.stack([matmul.dot(a[0], column) for column in b.t()[:3]])[None], False),
}


def _few(b: torch.Tensor) -> int:
    return min(3, b.shape[1])


def prove(op: str, dtype: torch.dtype) -> tuple[int, bytes]:
    """Compare one operation with the reference; Diverged with the first mismatch."""
    run, bias = _RUNS[op]
    evidence = Evidence(op, dtype)
    shown = False
    for terms in TERMS:
        for subnormal in (False, True):
            a, b, c = _operands(dtype, terms, subnormal)
            expected = _expected(dtype, terms, subnormal, bias)
            for rows in ROWS:
                for columns in COLUMNS:
                    got = run(a[:rows], b[:, :columns], c[:columns])
                    place = f"K {terms}, M {rows}, N {columns}{', subnormal products' if subnormal else ''}"
                    evidence.expect(got, expected[: got.shape[0], : got.shape[1]], place)
        shown = shown or _order_shows(dtype, terms)
    if not shown:
        raise Diverged(f"{op} on {dtype}: the proof's inputs do not show a wrong order; report it")
    return evidence.total()


def _order_shows(dtype: torch.dtype, terms: int) -> bool:
    a, b, _ = _operands(dtype, terms, False)
    other: Any = from_values(reference.matmul(to_values(a)[:, ::-1], to_values(b)[::-1]), dtype)
    return bool((other != _expected(dtype, terms, False, False)).any())
