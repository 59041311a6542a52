"""Stress inputs for matmul, and the proof of its kernel on them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from detinfer.bits import first_mismatch
from detinfer.errors import Vacuous
from detinfer.ops.evidence import Evidence, from_values, to_values
from detinfer.reference import matmul as reference
from detinfer.reference.arithmetic import Float

ROWS = (1, 2, 5, 13)
COLUMNS = (1, 33, 70)
KINDS = (("spread", 1), ("spread", 15), ("spread", 77), ("tiny", 33), ("special", 5))
"""Kinds of inputs, see ``stress``, and their K."""

_TINY = {torch.float32: (-70, -72), torch.bfloat16: (-70, -72), torch.float16: (-14, -12)}
_SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 3.0e38, -3.0e38, 1.0e-38], np.float32)


@functools.cache
def stress(
    m: int, k: int, n: int, dtype: torch.dtype, kind: str = "spread"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a [m, k], b [k, n] and c [n]; read them only.

    ``spread``: exponents spread over ten powers of two, and the first product is taken away by the last, so that what
    lies between is rounded coarsely: another order of k gives other bits, in bf16 too. ``tiny``: products about the
    least normal fp32, which an instruction that flushes subnormals gets wrong (in fp16, subnormal operands).
    ``special``: zeros of both signs, infinities, NaN, values whose products overflow and underflow.
    """
    random = np.random.default_rng(1000 * k + n)

    def values(*shape: int) -> Float:
        if kind == "special":
            return random.choice(_SPECIAL, shape)
        sign = random.integers(0, 2, shape) * 2 - 1
        return np.ldexp(sign * random.integers(128, 256, shape) / 128, random.integers(-7, 3, shape)).astype(np.float32)

    a, b, c = values(m, k), values(k, n), values(n)
    if kind == "tiny":
        a, b, c = (np.ldexp(x, e) for x, e in zip((a, b, c), (*_TINY[dtype], sum(_TINY[dtype])), strict=True))
    elif kind == "spread" and k >= 3:
        a[:, 0] = 2.0**13 * (1 + np.arange(m) % 64 / 64)
        a[:, -1] = -a[:, 0]
        b[-1] = b[0]
    return from_values(a, dtype), from_values(b, dtype), from_values(c, dtype)


def expected(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> torch.Tensor:
    """What the reference gives for a [..., M, K], b [..., K, N] and c that broadcasts to [..., M, N]."""
    addend = None if c is None else to_values(c)
    return from_values(reference.matmul(to_values(a), to_values(b), addend, alpha, beta), a.dtype)


def reversed_order(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same product with k descending: equal but for rounding."""
    return expected(a.flip(-1), b.flip(-2))


@functools.cache
def _chain(dtype: torch.dtype, kind: str, terms: int) -> Float:
    """The reference's sums at the most rows and columns, before c: computed once for all operations."""
    a, b, _ = stress(ROWS[-1], terms, COLUMNS[-1], dtype, kind)
    chain = reference.chain(to_values(a), to_values(b))
    if terms == max(k for _, k in KINDS) and first_mismatch(reversed_order(a, b), from_values(chain, dtype)) is None:
        raise Vacuous(f"the proof of matmul on {dtype}: its inputs do not show a wrong order; report it")
    return chain


Run = Callable[[Callable[..., Any], torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Each operation on a [M, K], b [K, N], c [N] -> [M', N'], the first rows and columns of the product; whether c is added.
_RUNS: dict[str, tuple[Run, bool]] = {
    "aten::linear": (lambda op, a, b, c: op(a, b.t().contiguous(), c), True),
    "aten::matmul": (lambda op, a, b, c: op(a[None], b)[0], False),
    "aten::mm": (lambda op, a, b, c: op(a, b), False),
    "aten::addmm": (lambda op, a, b, c: op(c, a, b), True),
    "aten::bmm": (lambda op, a, b, c: op(a.expand(3, *a.shape), b.expand(3, *b.shape))[2], False),
    "aten::baddbmm": (lambda op, a, b, c: op(c, a.expand(3, *a.shape), b.expand(3, *b.shape))[1], True),
    "aten::mv": (lambda op, a, b, c: op(a, b[:, 0])[:, None], False),
    "aten::addmv": (lambda op, a, b, c: op(c[:1], a, b[:, 0])[:, None], True),
    "aten::dot": (lambda op, a, b, c: op(a[0], b[:, 0])[None, None], False),
}


def adds(op: str) -> bool:
    """Whether ``run`` adds c in ``op``."""
    return _RUNS[op][1]


def run(op: str, function: Callable[..., Any], a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """``function`` as ``op`` on a [M, K], b [K, N], c [N]: [M', N'], the first rows and columns of the product."""
    return _RUNS[op][0](function, a, b, c)


def prove(op: str, dtype: torch.dtype, function: Callable[..., Any]) -> tuple[int, bytes]:
    """Compare ``function`` with the reference at every size and kind; Diverged with the first mismatch."""
    evidence = Evidence(op, dtype)
    for kind, terms in KINDS:
        a, b, c = stress(ROWS[-1], terms, COLUMNS[-1], dtype, kind)
        want = from_values(reference.finish(_chain(dtype, kind, terms), to_values(c) if adds(op) else None), dtype)
        for rows in ROWS:
            for columns in COLUMNS:
                got = run(op, function, a[:rows], b[:, :columns], c[:columns])
                where = f"{kind}, K {terms}, M {rows}, N {columns}"
                evidence.expect(got, want[: got.shape[0], : got.shape[1]], where)
    return evidence.total()
