"""Vectors from the reference: explicit loops in numpy, no kernel.

Each set is only given out when a rotated order over ranks, and a sum rounded at every step, would have given other bytes
on its cancelling inputs: vectors that a wrong order passes prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np

from detinfer.collectives import patterns
from detinfer.collectives.patterns import DTYPES
from detinfer.errors import UsageError, Vacuous
from detinfer.goldens.vectors.case import OPERATIONS, Case, tensor
from detinfer.reference.all_reduce import all_reduce
from detinfer.reference.all_reduce_rms_norm import all_reduce_rms_norm
from detinfer.reference.arithmetic import Bits, DType, Float, load, store
from detinfer.reference.reduce_scatter import reduce_scatter
from detinfer.reference.rows import add_rms_norm, rms_norm

RANKS = range(2, 9)
EPS = 1e-5
SUMS: tuple[dict[str, str], ...] = (
    {"op": "sum", "order": "rank_order"},
    {"op": "sum", "order": "rank_tree"},
    {"op": "avg", "order": "rank_order"},
    {"op": "max", "order": "rank_order"},
    {"op": "min", "order": "rank_order"},
)
WEIGHT_MODES = ("llama", "fp32", "gemma")


def make(operation: str) -> list[Case]:
    """The vectors of an operation; UsageError for one that has none."""
    if operation not in OPERATIONS:
        raise UsageError(f"vectors:{operation}: there are vectors for {', '.join(OPERATIONS)}")
    makers: dict[str, Callable[[], Iterator[Case]]] = {
        "all_reduce": _all_reduce,
        "reduce_scatter": _reduce_scatter,
        "all_reduce_rms_norm": _all_reduce_rms_norm,
        "rms_norm": _rms_norm,
    }
    return list(makers[operation]())


def _rng(*seed: object) -> np.random.Generator:
    return np.random.default_rng([*" ".join(map(str, seed)).encode()])


def shows_order(parts: list[Bits], dtype: DType, where: str) -> None:
    """Raise Vacuous unless every rotation, and rounding at each step, gives other bytes for the sum of ``parts``."""
    wanted = all_reduce(parts, dtype).tobytes()
    if len(parts) < 3:
        return
    for turn in range(1, len(parts)):
        if all_reduce([*parts[turn:], *parts[:turn]], dtype).tobytes() == wanted:
            raise Vacuous(f"{where}: an order that begins at rank {turn} gives the same bytes: choose other inputs")
    if dtype != "float32" and patterns.stored_each_step(parts, dtype).tobytes() == wanted:
        raise Vacuous(f"{where}: rounding at every step gives the same bytes: choose other inputs")


def _inputs(ranks: int, dtype: DType) -> Iterator[tuple[str, list[Bits]]]:
    for count in (77, 333):
        parts = patterns.cancellation(_rng("cancellation", ranks, dtype, count), ranks, (count,), dtype)
        shows_order(parts, dtype, f"cancellation of {count}, {ranks} ranks, {dtype}")
        yield f"cancellation of {count}", parts
    yield "one element", patterns.cancellation(_rng("one", ranks, dtype), ranks, (1,), dtype)
    yield "no element", [part[:0] for part in patterns.zeros(ranks, dtype)]
    yield "spread exponents", patterns.spread(_rng("spread", ranks, dtype), ranks, (7, 19), dtype)
    yield "signed zeros", patterns.zeros(ranks, dtype)
    yield "special values", patterns.special(_rng("special", ranks, dtype), ranks, (3, 49), dtype)


def _all_reduce() -> Iterator[Case]:
    for ranks, dtype in product(RANKS, DTYPES):
        for name, parts in _inputs(ranks, dtype):
            held = [tensor(part, dtype) for part in parts]
            for how in SUMS:
                out = all_reduce(parts, dtype, how["op"], how["order"])  # type: ignore[arg-type]
                yield Case(name, dtype, ranks, dict(how), held, {"out": tensor(out, dtype)})


def _reduce_scatter() -> Iterator[Case]:
    for ranks, dtype in product(RANKS, DTYPES):
        for dim, shape in ((0, (3 * ranks, 7)), (1, (5, ranks)), (-1, (2, 3, 5 * ranks))):
            parts = patterns.cancellation(_rng("scatter", ranks, dtype, dim), ranks, shape, dtype)
            shows_order(parts, dtype, f"reduce_scatter, dimension {dim}, {ranks} ranks, {dtype}")
            for part in parts:
                part.flat[:: part.size // ranks] = store(np.array([-0.0], np.float32), dtype)[0]
            outputs = {f"rank{rank}": tensor(reduce_scatter(parts, rank, dtype, dim), dtype) for rank in range(ranks)}
            held = [tensor(part, dtype) for part in parts]
            yield Case(f"dimension {dim}", dtype, ranks, {"dim": dim}, held, outputs)


def _rows(parts: list[Bits], rng: np.random.Generator, dtype: DType) -> list[Bits]:
    """The last row's values become special ones, the row before all -0."""
    odd = patterns.special(rng, len(parts), parts[0].shape[1:], dtype)
    negative = store(np.array([-0.0], np.float32), dtype)[0]
    for part, last in zip(parts, odd, strict=True):
        part[-1], part[-2] = last, negative
    return parts


def _weight(rng: np.random.Generator, n: int, dtype: DType) -> Float:
    return load(store(1 + patterns.small(rng, (n,)), dtype), dtype)


def _all_reduce_rms_norm() -> Iterator[Case]:
    for ranks, dtype, n in product(RANKS, DTYPES, (1, 15, 77)):
        rng = _rng("norm", ranks, dtype, n)
        parts = patterns.cancellation(rng, ranks, (4, n), dtype)
        if n > 1:
            shows_order(parts, dtype, f"all_reduce_rms_norm of {n}, {ranks} ranks, {dtype}")
        parts = _rows(parts, rng, dtype)
        residual = store(patterns.small(rng, (4, n)), dtype)
        residual[-2] = parts[0][-2]
        weight = _weight(rng, n, dtype)
        held = [tensor(part, dtype) for part in parts]
        inputs = {"residual": tensor(residual, dtype), "weight": tensor(store(weight, dtype), dtype)}
        for mode, weight_mode in product(("R", "U"), WEIGHT_MODES):
            norm, total = all_reduce_rms_norm(parts, residual, weight, EPS, dtype, mode, weight_mode)  # type: ignore[arg-type]
            how = {"mode": mode, "weight_mode": weight_mode, "eps": EPS.hex()}
            outputs = {"norm": tensor(norm, dtype), "residual_out": tensor(total, dtype)}
            yield Case(f"rows of {n}", dtype, ranks, how, held, outputs, inputs)


def _rms_norm() -> Iterator[Case]:
    for dtype, n in product(DTYPES, (1, 15, 49, 77, 1025)):
        rng = _rng("rms_norm", dtype, n)
        count = 16 if n < 100 else 9 if dtype == "float32" else 3
        numbers = patterns.small(rng, (count, n))
        numbers[::2, 0] = 64  # beside its square the others' are rounded away, one by one or in sums: order shows
        numbers[1::2] *= 64
        x = _rows([store(numbers, dtype)], rng, dtype)[0]
        residual = store(patterns.small(rng, (count, n)), dtype)
        residual[-2] = x[-2]
        weight = _weight(rng, n, dtype)
        values, added = load(x, dtype), load(residual, dtype)
        held, kept = [tensor(x, dtype)], tensor(store(weight, dtype), dtype)
        for mode in WEIGHT_MODES:
            how: dict[str, Any] = {"mode": mode, "eps": EPS.hex()}
            norm = store(rms_norm(values, weight, EPS, mode, dtype)[0], dtype)  # type: ignore[arg-type]
            if n >= 49 and dtype == "float32":
                _shows_row_order(values, weight, mode, norm)
            yield Case(f"rows of {n}", dtype, 1, how, held, {"norm": tensor(norm, dtype)}, {"weight": kept})
            for residual_mode in ("R", "U"):
                norm, total = (
                    store(part, dtype)
                    for part in add_rms_norm(values, added, weight, EPS, mode, residual_mode, dtype)  # type: ignore[arg-type]
                )
                outputs = {"norm": tensor(norm, dtype), "residual_out": tensor(total, dtype)}
                inputs = {"weight": kept, "residual": tensor(residual, dtype)}
                yield Case(f"rows of {n}", dtype, 1, how | {"residual_mode": residual_mode}, held, outputs, inputs)
        bare = store(rms_norm(values, None, EPS, "fp32", dtype)[0], dtype)
        yield Case(f"rows of {n}", dtype, 1, {"mode": "fp32", "eps": EPS.hex()}, held, {"norm": tensor(bare, dtype)})


def _shows_row_order(values: Float, weight: Float, mode: str, wanted: Bits) -> None:
    # A rotation would keep nearly all pairs of the halving: every second element, then the others, does not.
    n = values.shape[1]
    order = np.concatenate([np.arange(1, n, 2), np.arange(0, n, 2)])
    turned = np.empty_like(values)
    turned[:, order] = rms_norm(values[:, order], weight[order], EPS, mode, "float32")[0]  # type: ignore[arg-type]
    if store(turned, "float32").tobytes() == wanted.tobytes():
        raise Vacuous(f"rms_norm: rows of {n} added in another order give the same bytes: choose other inputs")
