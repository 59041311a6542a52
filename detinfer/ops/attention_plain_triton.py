# mypy: ignore-errors
"""Triton kernels beside those of attention_triton: what a mask lets a row see, and the plain reference."""

import triton
import triton.language as tl

from detinfer.ops.attention_triton import (
    _FAR,
    _LOG2E,
    BLOCK,
    _exponent,
    _finish,
    _mask_byte,
    _merge,
    _row_sum,
    _split_length,
)


@triton.jit(
    do_not_specialize=("LK", "moved", "heads", "rows", "mask_b", "mask_h", "mask_i"),
    do_not_specialize_on_alignment=("FIRST", "END", "HOLES"),
)
def spans(
    MASKS, FIRST, END, HOLES, LK, moved, heads, rows, mask_b, mask_h, mask_i, mask_n, KIND: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """Of each row of a mask: its first unmasked key, one past its last, and whether there is more to know of it."""
    row = tl.program_id(0)
    i = row % rows
    at = (
        (row // rows // heads).to(tl.int64) * mask_b
        + (row // rows % heads).to(tl.int64) * mask_h
        + i.to(tl.int64) * mask_i
    )
    wide = tl.arange(0, 1024)
    near = tl.full((1024,), 1 << 30, tl.int32)
    far = tl.zeros((1024,), tl.int32)
    count = tl.zeros((1024,), tl.int32)
    last = LK
    if CAUSAL:
        last = tl.minimum(i + moved + 1, LK)
    for n0 in range(0, last, 1024):
        n = n0 + wide
        if KIND == 1:
            seen = (_mask_byte(MASKS + at + n * mask_n, n < last) != 0) & (n < last)
            plain = seen
        else:
            value = tl.load(MASKS + at + n * mask_n, mask=n < last, other=float("-inf")).to(tl.float32)
            seen = value != float("-inf")
            plain = value == 0
        near = tl.minimum(near, tl.where(seen, n, _FAR))
        far = tl.maximum(far, tl.where(seen, n + 1, 0))
        count += plain.to(tl.int32)
    end = tl.max(far, 0)
    first = tl.minimum(tl.min(near, 0), end)
    tl.store(FIRST + row, first)
    tl.store(END + row, end)
    tl.store(HOLES + row, (tl.sum(count, 0) != end - first).to(tl.int32))


@triton.jit(do_not_specialize=("H", "LQ", "LK", "SHARE"))
def plain(
    Q, K, V, OUT, ADDED, ORIGIN, END, SINKS, H, LQ, LK, SHARE, c,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, SINK: tl.constexpr,
    SPLIT: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """The reference: one query row of contiguous tensors, its splits one after the other. ``ADDED`` is fp32, -inf: masked.

    SPLIT holds splits to that many keys, BACKWARDS merges them from the last: the wrong orders that tests look for.
    """
    row = tl.program_id(0).to(tl.int64)
    h = row // LQ % H
    kv = (row // LQ // H * (H // SHARE) + h // SHARE) * LK
    origin = tl.load(ORIGIN + row)
    end = tl.load(END + row)
    r = tl.arange(0, 16)
    on = tl.arange(0, BLOCK)
    od = tl.arange(0, DP)
    ov = tl.arange(0, DVP)
    q = tl.load(Q + row * D + od[None, :] + r[:, None] * 0, mask=(r == 0)[:, None] & (od < D)[None, :], other=0.0)
    top = tl.full((16,), float("-inf"), tl.float32)
    total = tl.zeros((16,), tl.float32)
    out = tl.zeros((16, DVP), tl.float32)
    length = _split_length(end - origin)
    if SPLIT > 0:
        length = length * 0 + SPLIT
    count = (end - origin + length - 1) // length
    for piece in range(count):
        start = origin + piece * length
        if BACKWARDS:
            start = origin + (count - 1 - piece) * length
        m = tl.full((16,), float("-inf"), tl.float32)
        z = tl.zeros((16,), tl.float32)
        acc = tl.zeros((16, DVP), tl.float32)
        for n0 in range(start, tl.minimum(start + length, end), BLOCK):
            n = n0 + on
            added = tl.load(ADDED + row * LK + n, mask=n < end, other=float("-inf"))
            seen = added != float("-inf")
            k = tl.load(K + (kv + n)[:, None] * D + od[None, :], mask=seen[:, None] & (od < D)[None, :], other=0.0)
            v = tl.load(V + (kv + n)[:, None] * DV + ov[None, :], mask=seen[:, None] & (ov < DV)[None, :], other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            b = tl.where(added == 0, 0.0, tl.maximum(added * _LOG2E, -3.0e38))[None, :] + tl.zeros_like(s)
            sees = seen[None, :] & (r >= 0)[:, None]
            t = tl.where(sees, tl.fma(s, c, b), float("-inf"))
            new = tl.maximum(m, tl.max(t, 1))
            base = _exponent(new)
            near = tl.abs(b) < 16777216.0
            p = tl.exp2(tl.where(near, tl.fma(s, c, b - base[:, None]), tl.fma(s, c, b) - base[:, None]))
            p = tl.where(sees, p, 0.0)
            sums = _row_sum(p, 16)
            p = p.to(q.dtype)
            a = tl.exp2(m - base)
            z = tl.fma(z, a, sums)
            acc = tl.dot(p, v, acc * a[:, None], input_precision="ieee")
            m = new
        top, total, out = _merge(top, total, out, m, z, acc)
    sink = tl.zeros((16,), tl.float32)
    if SINK:
        sink += tl.load(SINKS + h).to(tl.float32) * _LOG2E
    o, _ = _finish(top, total, out, sink, SINK)
    o = tl.where(end > origin, o, 0.0)
    tl.store(
        OUT + row * DV + ov[None, :] + r[:, None] * 0,
        o.to(OUT.dtype.element_ty),
        mask=(r == 0)[:, None] & (ov < DV)[None, :],
    )
