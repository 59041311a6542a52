# mypy: ignore-errors
# ruff: noqa: E741 -- O and S are matrices
"""``prefill`` with warps of their own for each job, on the matrix unit of compute capability 9: the same order, the same bits.

One warp asks for K and V, and two groups of four warps share what arrives, 64 rows each: half of what ``prefill`` reads. Each
group runs by itself, so that the products of one run beside the weights of the other; inside a group the product of the last
weights with V runs beside the weights of the next block (Shah et al., FlashAttention-3, 2024, sections 3.1 and 3.2). A program
computes one tile after another, and what loads is ahead by as many blocks as there is room for, in the next tile too.

Written in Gluon, the language under Triton's, in which a program says which warps do what.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from detinfer.ops import attention_triton
from detinfer.ops.attention_triton import _FREE, _LN2, _LOOSE, BLOCK

GROUPS = gl.constexpr(2)
"""Groups of four warps that compute; a tile has 64 rows for each, as many as a product on the unit."""

_split_length = gluon.jit(attention_triton._split_length.fn)
_exponent = gluon.jit(attention_triton._exponent.fn)
_meet = getattr(gl, "barrier", None) or gl.thread_barrier  # the warps of a group; Triton 3.7 renamed it


@gluon.jit
def _merge(top, total, out, m, z, acc):
    """A split's (m, z, acc) after those merged so far."""
    wide: gl.constexpr = gl.SliceLayout(1, out.type.layout)
    new = gl.maximum(top, m)
    base = _exponent(new)
    a = gl.exp2(top - base)
    c = gl.exp2(m - base)
    total = gl.fma(total, a, z * c)
    out = gl.fma(out, gl.convert_layout(a, wide)[:, None], acc * gl.convert_layout(c, wide)[:, None])
    return new, total, out


@gluon.jit
def _row_sum(p):
    """The sum of 64 weights by halves."""
    ROWS: gl.constexpr = p.shape[0]
    x = gl.sum(gl.reshape(p, (ROWS, 2, 32)), 1)
    x = gl.sum(gl.reshape(x, (ROWS, 2, 16)), 1)
    x = gl.sum(gl.reshape(x, (ROWS, 2, 8)), 1)
    x = gl.sum(gl.reshape(x, (ROWS, 2, 4)), 1)
    x = gl.sum(gl.reshape(x, (ROWS, 2, 2)), 1)
    return gl.convert_layout(gl.sum(x, 1), gl.SliceLayout(1, p.type.layout))


@gluon.jit
def _weights(s, n0, end, c, m, fresh, MASKED: gl.constexpr):
    """(weights, their sums, the new maximum, what the sums so far are multiplied by) from the scores of a block."""
    if MASKED:
        visible = (n0 + gl.arange(0, BLOCK, gl.SliceLayout(0, s.type.layout)))[None, :] < end[:, None]
        s = gl.where(visible, s, float("-inf"))
    highest = gl.max(s, 1)
    highest = gl.where(highest == float("-inf"), highest, highest * c)
    new = gl.maximum(gl.where(fresh, float("-inf"), m), highest)
    base = _exponent(new)
    p = gl.exp2(gl.fma(s, c, -base[:, None]))
    if MASKED:
        p = gl.where(visible, p, 0.0)
    return p, _row_sum(p), new, gl.exp2(m - base)


@gluon.jit
def _scores(q, k, S: gl.constexpr):
    """q k^T, not yet there."""
    ROWS: gl.constexpr = q.shape[0]
    none = gl.zeros((ROWS, BLOCK), gl.float32, S)
    return warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _tile(turn, tiles, programs, LQ, LK, shift, HK, G: gl.constexpr, BM: gl.constexpr, CAUSAL: gl.constexpr):
    """(whether there is one, tile, batch, head, keys that every row sees, keys that any sees) of a program's ``turn``.

    Tiles of one head follow each other, the longest first, so that K and V stay in the second cache; every other turn deals
    them backwards, so that no program gets the longer one each time.
    """
    many = gl.num_programs(0)
    item = turn * many + gl.where(turn % 2 == 0, gl.program_id(0), many - 1 - gl.program_id(0))
    tile = tiles - 1 - item % tiles
    program = item // tiles
    least = LK
    hi = LK
    if CAUSAL:
        least = gl.minimum(tile * (BM // G) + shift + 1, LK)
        hi = gl.minimum(gl.minimum(tile * (BM // G) + BM // G, LQ) + shift, LK)
    return program < programs, tile, program // HK, program % HK, least, hi


@gluon.jit
def _steps(
    q, keys, values, keys_there, keys_read, values_there, values_read, done, first, last, length, end, c,
    p, m, z, acc, top, total, out, MASKED: gl.constexpr, STAGES: gl.constexpr, S: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """The blocks from ``first`` to ``last``, before which the ring had ``done`` of other tiles; ``p`` are the weights of the
    block before each, whose product with V is made here. Splits are merged where the next one begins."""
    for j in range(first, last):
        at, before = (done + j) % STAGES, (done + j - 1) % STAGES
        mbarrier.wait(keys_there.index(at), (done + j) // STAGES & 1)
        scores = _scores(q, keys.index(at).reshape((BLOCK, keys.shape[4])), S)
        mbarrier.wait(values_there.index(before), (done + j - 1) // STAGES & 1)
        product = warpgroup_mma(p, values.index(before).reshape((BLOCK, values.shape[4])), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[scores])
        _meet()
        mbarrier.arrive(keys_read.index(at), count=1)
        n0 = j * BLOCK
        fresh = (n0 & (length - 1)) == 0
        weights, sums, new, a = _weights(s, n0, end, c, m, fresh, MASKED)
        # Each branch waits for V's product by itself, in words of its own: a wait above them would be moved by the compilers
        # to where the weights are still to be computed.
        if fresh:
            acc = warpgroup_mma_wait(0, deps=[product])
            top, total, out = _merge(top, total, out, m, z, acc)
            acc = gl.zeros_like(acc)
            z = sums
        else:
            acc, a = warpgroup_mma_wait(0, deps=[product, a])
            acc = acc * gl.convert_layout(a, gl.SliceLayout(1, acc.type.layout))[:, None]
            z = gl.fma(z, a, sums)
        _meet()
        mbarrier.arrive(values_read.index(before), count=1)
        p = gl.convert_layout(weights.to(q.dtype), P)
        m = new
    return p, m, z, acc, top, total, out


@gluon.jit
def _store(
    OUT, LSE, top, total, out, batch, head, H, LQ, r, i, wanted, o_b, o_h, o_i,
    G: gl.constexpr, DV: gl.constexpr, WANT_LSE: gl.constexpr,
):  # fmt: skip
    """The results of the rows that are ``wanted``; whether any of them is NaN or an infinity."""
    O: gl.constexpr = out.type.layout
    one = gl.div_rn(1.0 + gl.zeros_like(total), total)
    o = out * gl.convert_layout(one, gl.SliceLayout(1, O))[:, None] + 0.0
    h = head * G + r % G
    WIDE: gl.constexpr = out.shape[1]
    ov = gl.arange(0, WIDE, gl.SliceLayout(0, O))
    at = batch.to(gl.int64) * o_b + h.to(gl.int64) * o_h + i.to(gl.int64) * o_i
    inside = wanted[:, None] & (ov < DV)[None, :]
    gl.store(OUT + at[:, None] + ov[None, :], o.to(OUT.dtype.element_ty), mask=inside)
    if WANT_LSE:
        lse = gl.convert_layout((top + gl.log2(total)) * _LN2, gl.SliceLayout(1, O))
        gl.store(LSE + (batch * H + h) * LQ + i, lse, mask=wanted)
    return gl.max(gl.max(gl.where(inside & ((gl.abs(o) < float("inf")) == 0), 1, 0), 1), 0) > 0


@gluon.jit
def _compute(
    group, Q, K, V, OUT, LSE, q, spare, keys, values, keys_there, keys_read, values_there, values_read,
    tiles, programs, HK, H, LQ, LK, shift, c, q_b, q_h, q_i, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_i,
    G: gl.constexpr, SHARE: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, DP: gl.constexpr, DVP: gl.constexpr,
    BM: gl.constexpr, CAUSAL: gl.constexpr, WANT_LSE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A group's rows of the program's tiles, from their queries to their results."""
    ROWS: gl.constexpr = BM // GROUPS
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DVP, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    IN: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DP, DP // 8], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, S)
    none = gl.full((ROWS,), float("-inf"), gl.float32, rows)
    nothing = gl.zeros((ROWS, DVP), gl.float32, O)
    many = gl.num_programs(0)
    done = 0
    for turn in range((tiles * programs + many - 1) // many):
        there, tile, batch, head, least, hi = _tile(turn, tiles, programs, LQ, LK, shift, HK, G, BM, CAUSAL)
        if there:
            r = group * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, IN))
            i = tile * (BM // G) + r // G
            od = gl.arange(0, DP, gl.SliceLayout(0, IN))
            at = batch.to(gl.int64) * q_b + (head * G + r % G).to(gl.int64) * q_h + i.to(gl.int64) * q_i
            valid = (r < BM // G * G) & (i < LQ)
            queries = gl.load(Q + at[:, None] + od[None, :], mask=valid[:, None] & (od < D)[None, :], other=0.0)
            _meet()  # all have read the last tile's
            q.store(queries)
            fence_async_shared()
            _meet()

            r = group * ROWS + gl.arange(0, ROWS, rows)
            end = gl.zeros_like(r) + LK
            if CAUSAL:
                end = gl.minimum(tile * (BM // G) + r // G + shift + 1, LK)
            length = _split_length(least)
            blocks = (hi + BLOCK - 1) // BLOCK
            whole = gl.minimum(gl.maximum(least // BLOCK, 1), blocks)  # up to here every row sees every key
            top, total, out, acc = none, gl.zeros((ROWS,), gl.float32, rows), nothing, nothing
            mbarrier.wait(keys_there.index(done % STAGES), done // STAGES & 1)
            scores = _scores(q, keys.index(done % STAGES).reshape((BLOCK, DP)), S)
            s = warpgroup_mma_wait(0, deps=[scores])
            _meet()
            mbarrier.arrive(keys_read.index(done % STAGES), count=1)
            weights, z, m, _a = _weights(s, 0, end, c, none, False, True)
            p = gl.convert_layout(weights.to(q.dtype), P)
            p, m, z, acc, top, total, out = _steps(
                q, keys, values, keys_there, keys_read, values_there, values_read, done, 1, whole, length, end, c,
                p, m, z, acc, top, total, out, False, STAGES, S, P,
            )  # fmt: skip
            p, m, z, acc, top, total, out = _steps(
                q, keys, values, keys_there, keys_read, values_there, values_read, done, whole, blocks, length, end, c,
                p, m, z, acc, top, total, out, True, STAGES, S, P,
            )  # fmt: skip
            done += blocks
            last = (done - 1) % STAGES
            mbarrier.wait(values_there.index(last), (done - 1) // STAGES & 1)
            product = warpgroup_mma(p, values.index(last).reshape((BLOCK, DVP)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[product])
            _meet()
            mbarrier.arrive(values_read.index(last), count=1)
            top, total, out = _merge(top, total, out, m, z, acc)
            r = group * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, O))
            i = tile * (BM // G) + r // G
            valid = (r < BM // G * G) & (i < LQ)
            worst = _store(OUT, LSE, top, total, out, batch, head, H, LQ, r, i, valid, o_b, o_h, o_i, G, DV, WANT_LSE)
            if worst:
                kv = (head // SHARE).to(gl.int64)
                k_at = batch.to(gl.int64) * k_b + kv * k_h
                v_at = batch.to(gl.int64) * v_b + kv * v_h
                _one_by_one(
                    group, tile, batch, head, K + k_at, V + v_at, OUT, LSE, q, spare, H, LQ, LK, shift, c, length, k_n, v_n,
                    o_b, o_h, o_i, G, D, DV, BM, CAUSAL, WANT_LSE, S, O, P, IN,
                )  # fmt: skip


@gluon.jit
def _one_by_one(
    group, tile, batch, head, K, V, OUT, LSE, q, spare, H, LQ, LK, shift, c, length, k_n, v_n, o_b, o_h, o_i,
    G: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, BM: gl.constexpr, CAUSAL: gl.constexpr, WANT_LSE: gl.constexpr,
    S: gl.constexpr, O: gl.constexpr, P: gl.constexpr, IN: gl.constexpr,
):  # fmt: skip
    """A group's rows once more, a position at a time, with the keys of that position alone: NaN or an infinity may come out
    of a V that a row must not see, for 0 * NaN is not nothing."""
    ROWS: gl.constexpr = BM // GROUPS
    rows: gl.constexpr = gl.SliceLayout(1, S)
    DP: gl.constexpr = q.shape[1]
    n = gl.arange(0, BLOCK, gl.SliceLayout(1, IN))
    od = gl.arange(0, DP, gl.SliceLayout(0, IN))
    begin = tile * (BM // G)
    stop = gl.minimum(begin + (group * ROWS + ROWS - 1) // G + 1, gl.minimum(begin + BM // G, LQ))
    for position in range(begin + group * ROWS // G, stop):
        limit = LK
        if CAUSAL:
            limit = gl.minimum(position + shift + 1, LK)
        r = group * ROWS + gl.arange(0, ROWS, rows)
        end = gl.where(begin + r // G == position, limit, 0)
        m = gl.full((ROWS,), float("-inf"), gl.float32, rows)
        z = gl.zeros((ROWS,), gl.float32, rows)
        acc = gl.zeros((ROWS, DP), gl.float32, O)
        top, total, out = m, z, acc
        for n0 in range(0, limit, BLOCK):
            seen = (n0 + n < limit)[:, None]
            at = (n0 + n).to(gl.int64)
            k = gl.load(K + (at * k_n)[:, None] + od[None, :], mask=seen & (od < D)[None, :], other=0.0)
            _meet()
            spare.store(k)
            fence_async_shared()
            _meet()
            s = warpgroup_mma_wait(0, deps=[_scores(q, spare, S)])
            fresh = (n0 & (length - 1)) == 0
            weights, sums, new, a = _weights(s, n0, end, c, m, fresh, True)
            if fresh:
                top, total, out = _merge(top, total, out, m, z, acc)
                acc = gl.zeros_like(acc)
                z = sums
            else:
                acc = acc * gl.convert_layout(a, gl.SliceLayout(1, O))[:, None]
                z = gl.fma(z, a, sums)
            v = gl.load(V + (at * v_n)[:, None] + od[None, :], mask=seen & (od < DV)[None, :], other=0.0)
            _meet()
            spare.store(v)
            fence_async_shared()
            _meet()
            p = gl.convert_layout(weights.to(q.dtype), P)
            acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, spare, acc, is_async=True)])
            m = new
        top, total, out = _merge(top, total, out, m, z, acc)
        r = group * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, O))
        i = begin + r // G
        own = (r < BM // G * G) & (i == position)
        _store(OUT, LSE, top, total, out, batch, head, H, LQ, r, i, own, o_b, o_h, o_i, G, DV, WANT_LSE)


@gluon.jit
def _fetch(
    KD, VD, keys, values, keys_there, keys_read, values_there, values_read, tiles, programs, HK, LQ, LK, shift,
    G: gl.constexpr, SHARE: gl.constexpr, BM: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Asks for block after block of K and V, of tile after tile, as far ahead as there is room."""
    many = gl.num_programs(0)
    done = 0
    for turn in range((tiles * programs + many - 1) // many):
        there, _at, batch, head, _least, hi = _tile(turn, tiles, programs, LQ, LK, shift, HK, G, BM, CAUSAL)
        if there:
            blocks = (hi + BLOCK - 1) // BLOCK
            kv = head // SHARE
            for j in range(blocks):
                at, parity = (done + j) % STAGES, ((done + j) // STAGES & 1) ^ 1
                mbarrier.wait(keys_read.index(at), parity)
                mbarrier.expect(keys_there.index(at), KD.block_type.nbytes)
                tma.async_copy_global_to_shared(KD, [batch, kv, j * BLOCK, 0], keys_there.index(at), keys.index(at))
                mbarrier.wait(values_read.index(at), parity)
                mbarrier.expect(values_there.index(at), VD.block_type.nbytes)
                tma.async_copy_global_to_shared(VD, [batch, kv, j * BLOCK, 0], values_there.index(at), values.index(at))
            done += blocks


@gluon.jit(do_not_specialize=("tiles", "programs", *_FREE), do_not_specialize_on_alignment=_LOOSE)
def prefill_hopper(
    Q, K, V, KD, VD, OUT, LSE, tiles, programs, HK, H, LQ, LK, shift, c,
    q_b, q_h, q_i, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_i,
    G: gl.constexpr, SHARE: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, DP: gl.constexpr, DVP: gl.constexpr,
    BM: gl.constexpr, CAUSAL: gl.constexpr, WANT_LSE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """``tiles`` tiles of BM // G positions of G query heads, for each of ``programs`` = batch x HK; BM is 64 rows for each
    group. As many programs as there are multiprocessors share them."""
    dtype: gl.constexpr = Q.dtype.element_ty
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    q = gl.allocate_shared_memory(dtype, [GROUPS, BM // GROUPS, DP], flat)
    spare = gl.allocate_shared_memory(dtype, [GROUPS, BLOCK, DP], flat)
    keys = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK, DP], KD.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK, DVP], VD.layout)
    keys_there = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_read = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_there = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_read = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_there.index(stage), count=1)
        mbarrier.init(keys_read.index(stage), count=GROUPS)
        mbarrier.init(values_there.index(stage), count=1)
        mbarrier.init(values_read.index(stage), count=GROUPS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_compute, (
                0, Q, K, V, OUT, LSE, q.index(0), spare.index(0), keys, values, keys_there, keys_read, values_there,
                values_read, tiles, programs, HK, H, LQ, LK, shift, c, q_b, q_h, q_i, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h,
                o_i, G, SHARE, D, DV, DP, DVP, BM, CAUSAL, WANT_LSE, STAGES,
            )),
            (_compute, (
                1, Q, K, V, OUT, LSE, q.index(1), spare.index(1), keys, values, keys_there, keys_read, values_there,
                values_read, tiles, programs, HK, H, LQ, LK, shift, c, q_b, q_h, q_i, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h,
                o_i, G, SHARE, D, DV, DP, DVP, BM, CAUSAL, WANT_LSE, STAGES,
            )),
            (_fetch, (
                KD, VD, keys, values, keys_there, keys_read, values_there, values_read, tiles, programs, HK, LQ, LK, shift,
                G, SHARE, BM, CAUSAL, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
