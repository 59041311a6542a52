# mypy: ignore-errors
# ruff: noqa: SIM108 -- a branch on a constant is an if statement in Triton
"""``wide``: products of many rows in Triton, of one weight or of many experts': on Hopper they go through ``wgmma``, which
csrc's tiles do not use. The order is csrc/matmul_gpu.h's: one fp32 accumulator, k ascending, then the bias.

``matmul_wide`` starts it. Triton's language is not Python's typing: mypy leaves this file out.
"""

import triton
import triton.language as tl

DEPTH = tl.constexpr(64)
"""Of k, what a stage of the pipeline holds."""


@triton.jit(do_not_specialize=("assignments", "places"))
def wide(
    X, W, BIAS, ORDER, TILES, OUT, assignments, places, N, K, x_row, w_expert, w_n, w_k,
    BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr, GROUPED: tl.constexpr, BIASED: tl.constexpr,
    EVEN: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """BN columns of x W^T for BM assignments. GROUPED: those of a tile of TILES; else all go to expert 0. EVEN: K is whole
    stages. ACROSS: the weights' columns are contiguous, not their k. Programs go down BAND tiles before the next columns, so
    that those which run together share what the second cache holds."""
    program = tl.program_id(0)
    columns = tl.cdiv(N, BN)
    tall = tl.cdiv(assignments, BM)
    if GROUPED:
        tall = tl.load(TILES)
        if program >= tall * columns:
            return
    band = program // (BAND * columns)
    within = program - band * BAND * columns
    high = tl.minimum(tall - band * BAND, BAND)
    tile = band * BAND + within % high
    expert = 0
    first = tile * BM
    end = assignments
    if GROUPED:
        expert = tl.load(TILES + 1 + 3 * tile)
        first = tl.load(TILES + 2 + 3 * tile)
        end = tl.load(TILES + 3 + 3 * tile)
    at = first + tl.arange(0, BM)
    here = at < end
    n = within // high * BN + tl.arange(0, BN)
    known = n < N
    # Rows and columns past the end are not stored. Of one weight they are the first ones again, each another: if all were the
    # last one, every program would read the same line of the second cache many times at once.
    if GROUPED:
        a = tl.load(ORDER + tl.minimum(at, end - 1))
        column = tl.minimum(n, N - 1)
    else:
        a = at % assignments
        column = n % N
    k = tl.arange(0, DEPTH)
    x = X + (a // places).to(tl.int64)[:, None] * x_row + k[None, :]
    w = W + expert.to(tl.int64) * w_expert if GROUPED else W
    if ACROSS:
        w += k.to(tl.int64)[:, None] * w_k + n[None, :] * w_n
    else:
        w += column.to(tl.int64)[:, None] * w_n + k[None, :] * w_k
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, DEPTH):
        inside = k0 + k < K
        if EVEN:
            left = tl.load(x)
        else:
            left = tl.load(x, mask=inside[None, :], other=0.0)
        if ACROSS:
            right = tl.load(w, mask=inside[:, None] & known[None, :], other=0.0)
        elif EVEN:
            right = tl.load(w)
        else:
            right = tl.load(w, mask=inside[None, :], other=0.0)
        acc = tl.dot(left, right if ACROSS else tl.trans(right), acc)
        x += DEPTH
        w += DEPTH * w_k
    if BIASED:
        acc += tl.load(BIAS + expert * N + column).to(tl.float32)[None, :]
    row = at
    if GROUPED:
        row = a
    to = OUT + row.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(to, acc.to(OUT.dtype.element_ty), mask=here[:, None] & known[None, :])
