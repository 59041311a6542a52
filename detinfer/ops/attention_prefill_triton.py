# mypy: ignore-errors
"""``tiles`` of attention_triton for the common case alone: dense K and V that the copy engine reads, and no mask."""

import triton
import triton.language as tl

from detinfer.ops.attention_triton import (
    _FREE,
    _LOOSE,
    BLOCK,
    _exponent,
    _finish,
    _merge,
    _row_sum,
    _split_length,
    _walk,
)


@triton.jit
def _steps(
    q, KD, VD, batch, kv, full, hi, length, end, c, m, z, acc, top, total, out,
    DP: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """The blocks of keys up to ``hi``, those from ``full`` on with a look at which row sees what; splits are merged where
    the next one begins. One loop, so that its pipeline fills once: a second one for the last blocks cost a short row more
    than the blocks did."""
    for n0 in range(0, hi, BLOCK):
        k = tl.reshape(KD.load([batch, kv, n0, 0]), (BLOCK, DP))
        s = tl.dot(q, tl.trans(k))
        if n0 >= full:
            s = tl.where((n0 + tl.arange(0, BLOCK))[None, :] < end[:, None], s, float("-inf"))
        highest = tl.max(s, 1)
        highest = tl.where(highest == float("-inf"), highest, highest * c)
        fresh = (n0 & (length - 1)) == 0
        new = tl.maximum(tl.where(fresh, float("-inf"), m), highest)
        base = _exponent(new)
        p = tl.exp2(tl.fma(s, c, -base[:, None]))  # 0 where masked: c is not 0 here
        sums = _row_sum(p, p.shape[0])
        p = p.to(q.dtype)
        a = tl.exp2(m - base)
        if fresh:
            top, total, out = _merge(top, total, out, m, z, acc)
            acc = tl.zeros_like(acc)
            z = sums
        else:
            acc = acc * a[:, None]
            z = tl.fma(z, a, sums)
        v = tl.reshape(VD.load([batch, kv, n0, 0]), (BLOCK, DVP))
        acc = tl.dot(p, v, acc)
        m = new
    return m, z, acc, top, total, out


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=_LOOSE)
def prefill(
    Q, K, V, KD, VD, OUT, LSE, HK, H, LQ, LK, shift, nil, c,
    q_b, q_h, q_i, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_i,
    G: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, CAUSAL: tl.constexpr, WANT_LSE: tl.constexpr,
):  # fmt: skip
    """A tile of BM // G positions of G query heads. ``nil`` is 0: what follows the loop is computed anew, not kept."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    batch = tl.program_id(1) // HK
    head = tl.program_id(1) % HK
    r = tl.arange(0, BM)
    i = tile * (BM // G) + r // G
    h = head * G + r % G
    valid = (r < BM // G * G) & (i < LQ)
    od = tl.arange(0, DP)
    q_at = batch.to(tl.int64) * q_b + h.to(tl.int64) * q_h + i.to(tl.int64) * q_i
    q = tl.load(Q + q_at[:, None] + od[None, :], mask=valid[:, None] & (od < D)[None, :], other=0.0)
    least = LK
    hi = LK
    if CAUSAL:
        least = tl.minimum(tile * (BM // G) + shift + 1, LK)
        hi = tl.minimum(tl.minimum(tile * (BM // G) + BM // G, LQ) + shift, LK)
    full = least // BLOCK * BLOCK
    split = _split_length(least)
    m = tl.full((BM,), float("-inf"), tl.float32)
    z = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DVP), tl.float32)
    top, total, out = m, z, acc
    end = tl.zeros((BM,), tl.int32) + LK
    if CAUSAL:
        end = tl.minimum(i + shift + 1, LK)
    m, z, acc, top, total, out = _steps(
        q, KD, VD, batch, head // SHARE, full, hi, split, end, c, m, z, acc, top, total, out, DP, DVP
    )
    r = tl.arange(0, BM)
    i = (tile + nil) * (BM // G) + r // G
    top, total, out = _merge(top, total, out, m, z, acc)
    o, lse = _finish(top, total, out, top, False)
    ov = tl.arange(0, DVP)
    head = (tl.program_id(1) + nil) % HK
    h = head * G + r % G
    valid = (r < BM // G * G) & (i < LQ)
    o_at = batch.to(tl.int64) * o_b + h.to(tl.int64) * o_h + i.to(tl.int64) * o_i
    o_in = valid[:, None] & (ov < DV)[None, :]
    tl.store(OUT + o_at[:, None] + ov[None, :], o.to(OUT.dtype.element_ty), mask=o_in)
    if WANT_LSE:
        tl.store(LSE + (batch * H + h) * LQ + i, lse, mask=valid)
    worst = tl.max(tl.max(tl.where(o_in & ((tl.abs(o) < float("inf")) == 0), 1, 0), 1), 0)
    if worst > 0:
        # NaN or an infinity, maybe out of a V that a row must not see: 0 * NaN is not nothing. Once more, a position at
        # a time, with the keys of that position alone.
        kv = (head // SHARE).to(tl.int64)
        K += batch.to(tl.int64) * k_b + kv * k_h
        V += batch.to(tl.int64) * v_b + kv * v_h
        first = (tile + nil) * (BM // G)
        q = tl.load(Q + (q_at + nil)[:, None] + od[None, :], mask=valid[:, None] & (od < D)[None, :], other=0.0)
        for at in range(first, tl.minimum(first + BM // G, LQ)):
            limit = LK
            if CAUSAL:
                limit = tl.minimum(at + shift + 1, LK)
            ends = tl.where(i == at, limit, 0)
            m = tl.full((BM,), float("-inf"), tl.float32)
            z = tl.zeros((BM,), tl.float32)
            acc = tl.zeros((BM, DVP), tl.float32)
            top, total, out = m, z, acc
            m, z, acc, top, total, out = _walk(
                q, K, V, K, k_n, v_n, 0, 0, 0, limit, limit, 0, split, ends * 0, ends, q_at[:, None], 0, c,
                m, z, acc, top, total, out, D, DV, DP, DVP, 0, 0, True, True, True,
            )  # fmt: skip
            top, total, out = _merge(top, total, out, m, z, acc)
            o, lse = _finish(top, total, out, top, False)
            own = o_in & (i == at)[:, None]
            tl.store(OUT + o_at[:, None] + ov[None, :], o.to(OUT.dtype.element_ty), mask=own)
            if WANT_LSE:
                tl.store(LSE + (batch * H + h) * LQ + i, lse, mask=valid & (i == at))
