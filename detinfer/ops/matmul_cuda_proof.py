"""Proofs of the matmul family on a GPU: of its operations on stress inputs, and of every path for one shape.

A shape's proof also times the paths and keeps the fastest for each number of rows. Expected rows are computed once, by the
tile path, which is compared with the plain kernel and with fp64; rows do not depend on how many there are, so each path
has to give the same bytes at every number of rows. One answer comes back from the device at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from detinfer import native
from detinfer.bits import dtype_name, first_mismatch
from detinfer.errors import Diverged, NativeError, UsageError, Vacuous
from detinfer.ops import cublaslt, matmul_cuda, matmul_proof
from detinfer.ops.evidence import Evidence
from detinfer.ops.matmul_blocks import BLOCKS, candidates
from detinfer.ops.matmul_table import DENSE, PIECE, Choice, Key, Table, use

FP32_ROWS = (*range(1, 129), *range(256, 2049, 128))
"""Numbers of rows at which a proof compares in fp32, where csrc's own kernels alone run."""

TUNED_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192, 16384)
"""Numbers of rows at which paths are timed; those between take the choice of the next greater one."""

_SKINNY_ROWS = (8, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64)
"""Rows of x of a block of each of csrc's variants in bf16 and fp16."""

VARIANTS = {"reference": 1, "skinny": len(_SKINNY_ROWS), "stream": len(BLOCKS), "tile": 3}
"""How many variants each path has; in fp32 ``tile`` has one more."""

_ALGORITHMS = 8
_OWN_ROWS = 2048  # above, csrc's kernels are timed only where there is no cuBLASLt
_COLD_BYTES = 192 << 20  # of weights in one timing: several times the second cache
_RESULT_BYTES = 2 << 30  # of one product in a proof
_INT = {2: torch.int16, 4: torch.int32}


def adversarial(rows: int, k: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """[rows, k] in which an order shows: exponents spread over nine bits, and two large columns, whose products cancel
    where the other operand holds one value in both: next to them fp32 keeps few bits of the small terms."""
    draw = torch.Generator(device).manual_seed(seed)
    values = torch.randint(-127, 128, (rows, k), generator=draw, device=device).float()
    values = torch.ldexp(values, torch.randint(-12, -3, (rows, k), generator=draw, device=device))
    if k >= 16:
        values[:, 1], values[:, k - k // 7 - 1] = 300.0, -300.0
    return values.to(dtype)


def operands(rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, k] and weight [n, k] in whose products an order of k shows."""
    x, w = adversarial(rows, k, dtype, device, rows), adversarial(n, k, dtype, device, n)
    if k >= 16:
        x[:, 1] = x[:, k - k // 7 - 1] = 900.0
    return x, w


def _differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Whether any byte differs, as a tensor on the device: a proof compares gigabytes and waits once."""
    as_int = _INT[a.element_size()]
    return (a.view(as_int) != b.view(as_int)).any()


@dataclass(frozen=True)
class Measured:
    """A table, the microseconds of every candidate at each tuned number of rows, and what cuBLASLt failed at."""

    table: Table
    times: dict[int, dict[Choice, float]]
    failed: tuple[str, ...]


def prove_shape(
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    w_stride: int | None = None,
    bias: bool = False,
    rows: Sequence[int] | None = None,
    repeats: int = 3,
) -> Measured:
    """Measure and prove linear [*, k] -> [*, n] on ``device``, and take the table into use.

    ``rows`` replaces the numbers of rows that are proved (all up to 1024, then multiples of 1024 up to 16384 as memory
    allows). A candidate of cuBLASLt that gives other bytes anywhere is dropped, and csrc's kernels take its place. Raises
    Diverged where csrc's paths differ from one another or from fp64 by more than rounding, Vacuous where the inputs do not
    show a wrong order, UsageError for a stride that no fast path takes.
    """
    if dtype not in native.DTYPES:
        raise UsageError(f"prove: {dtype_name(dtype)} has no order on a GPU; use float32, bfloat16 or float16")
    stride = k if w_stride is None else w_stride
    size = dtype.itemsize
    if k < 1 or n < 1 or stride < k or k * size % 16 or (n > 1 and stride * size % 16):
        raise UsageError(
            f"prove {k} -> {n} with rows {stride} apart: rows of k elements on 16-byte boundaries are needed"
        )
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    most = min(PIECE, max(DENSE, _RESULT_BYTES // (n * size) // DENSE * DENSE))
    if dtype is torch.float32:
        most = min(most, FP32_ROWS[-1])
    dense = tuple(range(1, DENSE + 1))
    proved = tuple(rows or (FP32_ROWS if dtype is torch.float32 else (*dense, *range(2 * DENSE, most + 1, DENSE))))
    tuned = [m for m in TUNED_ROWS if m <= most]
    x, given = operands(max(*proved, *tuned), n, k, dtype, device)
    w = torch.empty(n * stride, dtype=dtype, device=device).as_strided((n, k), (stride, 1)).copy_(given)
    c = adversarial(1, n, dtype, device, 5).expand(len(x), n) if bias else None
    expected = _expected(x, w, c)
    key = Key(n, k, dtype, stride, bias, device.index)
    times = {m: dict(_timed(x[:m], w, None if c is None else c[:m], repeats)) for m in tuned}
    failed: list[str] = []
    dropped: set[Choice] = set()
    found = torch.empty_like(expected)
    wrong = [0]
    while wrong:
        best = {
            m: _fastest(timed, dropped, matmul_cuda.by_rule(m, n, dtype, device.index)) for m, timed in times.items()
        }
        table = Table(key, *_merged(best), DENSE if set(dense) <= set(proved) else 0, proved, sum(proved) * n)
        wrong = _mismatches(table, proved, x, w, c, expected, found)
        ours = [m for m in wrong if table.choose(m).path != "cublaslt_no_split"]
        if ours:
            choice = table.choose(ours[0])
            _run(choice, x[: ours[0]], w, None if c is None else c[: ours[0]], found[: ours[0]])
            where = first_mismatch(found[: ours[0]], expected[: ours[0]])
            raise Diverged(
                f"{choice.path} (variant {choice.variant}) at {ours[0]} x {k} x {n} in {dtype_name(dtype)}: {where}"
            )
        failed += [f"cuBLASLt gives other bytes at {m} x {k} x {n} in {dtype_name(dtype)}" for m in wrong[:3]]
        dropped |= {table.choose(m) for m in wrong}
    use([table])
    return Measured(table, times, tuple(failed))


def _fastest(timed: dict[Choice, float], dropped: set[Choice], otherwise: Choice) -> Choice:
    left = [(time, choice) for choice, time in timed.items() if choice not in dropped]
    return min(left)[1] if left else otherwise


def _expected(x: torch.Tensor, w: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
    """All rows by the tile path, the first compared with the plain kernel, with fp64, and with k reversed."""
    (n, k), dtype = w.shape, x.dtype
    head = slice(0, min(len(x), 128))
    first = None if c is None else c[head]
    expected = matmul_cuda.product(x, w, c, path="tile")
    plain = matmul_cuda.product(x[head], w, first, path="reference")
    where = f"{k} -> {n} in {dtype_name(dtype)}"
    if mismatch := first_mismatch(expected[head], plain):
        raise Diverged(
            f"the tile path differs from the plain kernel, {where}: {mismatch}: do not use this GPU; report it"
        )
    small = slice(0, min(n, 512))
    left, right = x[:16].double(), w[small].double()
    exact, size = left @ right.t(), left.abs() @ right.abs().t()
    if c is not None:
        exact, size = exact + c[:16, small], size + c[:16, small].abs()
    bound = size * (k * 2.0**-23) + exact.abs() * torch.finfo(dtype).eps
    if bool(((expected[:16, small].double() - exact).abs() > bound).any()):
        raise Diverged(f"the plain kernel is further from fp64 than rounding can be, {where}: report it")
    turned = matmul_cuda.product(x[head].flip(1), w[small].flip(1), None, path="reference")
    if k >= 64 and not bool(
        _differ(turned, matmul_cuda.product(x[head], w[small].contiguous(), None, path="reference"))
    ):
        raise Vacuous(f"the inputs do not show a reversed order, {where}: nothing was proved; report it")
    return expected


def _mismatches(
    table: Table,
    proved: Sequence[int],
    x: torch.Tensor,
    w: torch.Tensor,
    c: torch.Tensor | None,
    expected: torch.Tensor,
    found: torch.Tensor,
) -> list[int]:
    """The numbers of rows at which the table's choice gives other bytes."""
    flags = torch.zeros(len(proved), dtype=torch.bool, device=x.device)
    for i, m in enumerate(proved):
        out = found[:m]
        out.view(_INT[out.element_size()]).fill_(-1)
        _run(table.choose(m), x[:m], w, None if c is None else c[:m], out)
        flags[i] = _differ(out, expected[:m])
    return [m for m, bad in zip(proved, flags.tolist(), strict=True) if bad]


def _step(choice: Choice, x: torch.Tensor, w: torch.Tensor, c: torch.Tensor | None) -> matmul_cuda.Step:
    if choice.path == "cublaslt_no_split":
        return matmul_cuda.cublaslt_kernel(choice.algorithm, x, w, c)
    return matmul_cuda.chosen_kernel(choice, x, w, c)


def _run(choice: Choice, x: torch.Tensor, w: torch.Tensor, c: torch.Tensor | None, out: torch.Tensor) -> None:
    """One product on the current device; c's address is taken from c."""
    stream = torch._C._cuda_getCurrentRawStream(x.device.index)
    added = 0 if c is None else c.data_ptr()
    _step(choice, x, w, c)(x.data_ptr(), w.data_ptr(), added, out.data_ptr(), stream)


def _candidates(x: torch.Tensor, w: torch.Tensor, c: torch.Tensor | None) -> Iterator[Choice]:
    """What may be fast for x [m, k] times w [n, k]."""
    (m, k), n = x.shape, w.shape[0]
    if x.dtype is torch.float32:
        processors = matmul_cuda.processors(x.device.index)
        yield from (Choice("stream", variant) for variant in candidates(m, n, processors))
        return
    for variant, width in enumerate(_SKINNY_ROWS):
        if width <= 2 * m + 6 and m <= 3 * width:
            yield Choice("skinny", variant)
    if m <= _OWN_ROWS or not cublaslt.available():
        yield matmul_cuda.by_rule(m, n, x.dtype, x.device.index)
    if cublaslt.available():
        problem = cublaslt.Problem(x.dtype, m, n, k, k, w.stride(0), 0 if c is None else c.data_ptr())
        found = cublaslt.Product(problem, x.device.index).algorithms(_ALGORITHMS)
        yield from (Choice("cublaslt_no_split", -1, algorithm) for algorithm in found)


def _timed(x: torch.Tensor, w: torch.Tensor, c: torch.Tensor | None, repeats: int) -> Iterator[tuple[Choice, float]]:
    """Microseconds of each candidate, from replays of a CUDA graph over weights that the second cache does not hold."""
    n, stride = w.shape[0], w.stride(0)
    copies = max(2, min(8, _COLD_BYTES // (n * stride * w.element_size())))
    large = x.shape[0] * n * w.shape[1] > 1 << 36
    weights = [w] if large else [w, *(w.clone() for _ in range(copies - 1))]
    out = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    for choice in _candidates(x, w, c):
        if (time := _graph_time(choice, x, weights, c, out, repeats)) is not None:
            yield choice, time


def _graph_time(
    choice: Choice,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    c: torch.Tensor | None,
    out: torch.Tensor,
    repeats: int,
) -> float | None:
    """None where the kernel is not for this shape."""
    cuda: Any = torch.cuda  # untyped in torch
    try:
        _run(choice, x, weights[0], c, out)  # loads the kernel
    except NativeError:
        return None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            _run(choice, x, weight, c, out)
    graph.replay()
    times: list[float] = []
    for _ in range(repeats):
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e3 / len(weights))
    return min(times)


def _merged(best: dict[int, Choice]) -> tuple[tuple[int, ...], tuple[Choice, ...]]:
    """Neighbouring numbers of rows with one choice as one entry."""
    uppers: list[int] = []
    choices: list[Choice] = []
    for upper, choice in sorted(best.items()):
        if choices and choices[-1] == choice:
            uppers[-1] = upper
        else:
            uppers.append(upper)
            choices.append(choice)
    return tuple(uppers), tuple(choices)


def prove(op: str, dtype: torch.dtype, function: Callable[..., Any]) -> tuple[int, bytes]:
    """Compare ``function`` with the order's definition at every size and kind of stress input.

    In fp32 that is the CPU's reference; in bf16 and fp16 the plain kernel, which is compared with fp64 on the same inputs.
    """
    device = torch.device("cuda", torch.cuda.current_device())

    def there(*given: Any, **scalars: Any) -> torch.Tensor:
        moved = [t.to(device) if isinstance(t, torch.Tensor) else t for t in given]
        return _copied_back(function(*moved, **scalars))

    if dtype is torch.float32:
        return matmul_proof.prove(op, dtype, there)
    evidence = Evidence(op, dtype)
    sizes = (*matmul_proof.KINDS, ("spread", 640), ("spread", LONG))
    for kind, terms in sizes:
        a, b, c = matmul_proof.stress(matmul_proof.ROWS[-1], terms, matmul_proof.COLUMNS[-1], dtype, kind)
        for columns in matmul_proof.COLUMNS:
            x, w = a.to(device), b[:, :columns].t().to(device)
            added = c[:columns].to(device).expand(len(x), columns) if matmul_proof.adds(op) else None
            want = _copied_back(matmul_cuda.product(x, w, added, path="reference"))
            if kind == "spread":
                _check_bound(x, w, added, want, f"{op} on {dtype_name(dtype)}, K {terms}, N {columns}")
            if (
                terms == LONG
                and first_mismatch(
                    _copied_back(matmul_cuda.product(x.flip(1), w.flip(1), added, path="reference")), want
                )
                is None
                and columns > 1
            ):
                raise Vacuous(f"the proof of {op} on {dtype}: its inputs do not show a wrong order; report it")
            for rows in matmul_proof.ROWS:
                got = matmul_proof.run(op, there, a[:rows], b[:, :columns], c[:columns])
                evidence.expect(got, want[: got.shape[0], : got.shape[1]], f"{kind}, K {terms}, M {rows}, N {columns}")
    return evidence.total()


LONG = 4999
"""A K that has leaves for every N of the proofs, and is no multiple of anything."""


def _copied_back(t: torch.Tensor) -> torch.Tensor:
    return t.cpu()


def _check_bound(x: torch.Tensor, w: torch.Tensor, c: torch.Tensor | None, found: torch.Tensor, where: str) -> None:
    left, right = x.double().cpu(), w.double().cpu()
    exact, size = left @ right.t(), left.abs() @ right.abs().t()
    if c is not None:
        exact, size = exact + c.double().cpu(), size + c.double().cpu().abs()
    bound = size * (x.shape[1] * 2.0**-23) + exact.abs() * torch.finfo(x.dtype).eps + torch.finfo(x.dtype).tiny
    if bool(((found.double() - exact).abs() > bound).any()):
        raise Diverged(f"{where}: the plain kernel is further from fp64 than rounding can be: do not use it; report it")
