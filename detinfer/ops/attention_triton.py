# mypy: ignore-errors
# ruff: noqa: RET505, SIM102, SIM108 -- a branch on a constant is an if statement in Triton
"""Triton kernels of attention on GPUs: one order of keys, whatever the launch. docs/ops/attention.md has it in words.

``tiles`` computes many query rows, each program walking all keys of its rows; ``decode`` gives every split of few rows
to a program of its own, and the last one to arrive merges them. Triton's language is not Python's typing: mypy leaves
this file out.

Every multiplication followed by an addition is one that Triton was told not to contract (``enable_fp_fusion=False`` at
each launch) or a written ``fma``. Products of matrices run on the matrix unit, k ascending; the sum of a row's weights
is a written tree, so that it does not depend on how a tile is laid over threads.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(256)
"""Keys of the shortest split."""
MOST = tl.constexpr(16)
"""Splits of a row at most; a longer row has longer splits, by powers of two."""
BLOCK = tl.constexpr(64)
"""Keys between two looks at the maximum."""
_FAR = tl.constexpr(1 << 30)
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)
# Arguments whose values must not make another kernel: it would have to be compiled in the middle of a generation.
_LOOSE = ("LSE", "SINKS", "TABLE", "LENGTHS", "STARTS", "FIRST", "END", "HOLES", "BIAS", "TOPS", "TOTALS", "ARRIVED")
_FREE = (
    "HK",
    "H",
    "LQ",
    "LK",
    "shift",
    "window",
    "each",
    "table_b",
    "span_b",
    "span_h",
    "span_i",
    "bias_b",
    "bias_h",
    "bias_i",
)


@triton.jit
def _split_length(keys):
    """Keys of a split of a row that spans ``keys``."""
    length = keys * 0 + LEAST
    for _ in tl.static_range(9):
        length = tl.where(length * MOST < keys, length * 2, length)
    return length


@triton.jit
def _exponent(m):
    """A maximum as it is subtracted: of no score yet, nothing."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _merge(top, total, out, m, z, acc):
    """A split's (m, z, acc) after those merged so far."""
    new = tl.maximum(top, m)
    base = _exponent(new)
    a = tl.exp2(top - base)
    c = tl.exp2(m - base)
    total = tl.fma(total, a, z * c)
    out = tl.fma(out, a[:, None], acc * c[:, None])
    return new, total, out


@triton.jit
def _row_sum(p, ROWS: tl.constexpr):
    """The sum of 64 weights by halves: weight n and n + 32, then n and n + 16, and so on. Sums of two, which no layout
    of threads can turn around."""
    x = tl.sum(tl.reshape(p, (ROWS, 2, 32)), 1)
    x = tl.sum(tl.reshape(x, (ROWS, 2, 16)), 1)
    x = tl.sum(tl.reshape(x, (ROWS, 2, 8)), 1)
    x = tl.sum(tl.reshape(x, (ROWS, 2, 4)), 1)
    x = tl.sum(tl.reshape(x, (ROWS, 2, 2)), 1)
    return tl.sum(x, 1)


@triton.jit
def _product(p, v, visible, acc, ROWS: tl.constexpr):
    """acc + p v. Where V holds NaN or an infinity that not every row sees, the rows go one by one: 0 * NaN is not nothing."""
    if tl.max(tl.max(tl.where(tl.abs(v.to(tl.float32)) < float("inf"), 0, 1), 1), 0) > 0:
        result = acc
        r = tl.arange(0, ROWS)
        for row in range(ROWS):
            seen = tl.max((visible & (r == row)[:, None]).to(tl.int32), 0) > 0
            own = tl.dot(p, tl.where(seen[:, None], v, 0.0).to(v.dtype), acc, input_precision="ieee")
            result = tl.where((r == row)[:, None], own, result)
    else:
        result = tl.dot(p, v, acc, input_precision="ieee")
    return result


@triton.jit
def _mask_byte(at, mask):
    """Bytes of a bool mask, read as parts of words: a value loaded as 8 bits, on which weights then depend, would make
    Triton lay out the keys of a product in another order."""
    address = at.to(tl.int64)
    word = tl.load((address - address % 4).to(tl.pointer_type(tl.int32)), mask=mask, other=0)
    return (word >> (address % 4 * 8).to(tl.int32)) & 255


@triton.jit
def _offsets(n, n0, limit, stride, page_stride, table, PAGE: tl.constexpr):
    """Where the keys n = n0 + 0, 1, ... lie, and the scalar that goes before."""
    if PAGE > 0:
        page = tl.load(table + n // PAGE, mask=n < limit, other=0).to(tl.int64)
        return page * page_stride + (n % PAGE).to(tl.int64) * stride
    else:
        return (n - n0) * stride


@triton.jit
def _leave(space, s, m, z, acc, DVP: tl.constexpr, WIDE: tl.constexpr):
    """Store what split ``s`` found where ``_part`` reads it, WIDE columns at a time."""
    tops, totals, outs, first, r, valid, rows = space
    at = (first + s) * rows + r
    tl.store(tops + at, m, mask=valid)
    tl.store(totals + at, z, mask=valid)
    _leave_columns(outs + at * DVP, acc, valid, DVP, WIDE)


@triton.jit
def _leave_columns(at, acc, valid, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    if WIDTH > WIDE:
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, WIDTH // 2)), (0, 2, 1)))
        _leave_columns(at, left, valid, WIDTH // 2, WIDE)
        _leave_columns(at + WIDTH // 2, right, valid, WIDTH // 2, WIDE)
    else:
        tl.store(at[:, None] + tl.arange(0, WIDTH)[None, :], acc, mask=valid[:, None])


@triton.jit
def _walk(
    q, K, V, table, k_key, v_key, k_page, v_page, lo, hi, limit, origin, length, low, end, bias, bias_key, c,
    m, z, acc, top, total, out,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr, MASK: tl.constexpr,
    MASKED: tl.constexpr, MERGE: tl.constexpr, ALIKE: tl.constexpr, LEAVE: tl.constexpr = False, since=0, space=None,
):  # fmt: skip
    """The blocks of keys from ``lo`` to ``hi``, ascending; splits that end on the way are merged with MERGE, left in
    ``space`` with LEAVE, where the first block of all is ``since``.

    ``low`` and ``end`` say what each row sees; without MASKED every row sees every key. ``limit``: no key from there.
    ALIKE: rows that see a key at all see the same ones.
    """
    on = tl.arange(0, BLOCK)
    od = tl.arange(0, DP)
    ov = tl.arange(0, DVP)
    for n0 in range(lo, hi, BLOCK):
        if LEAVE:
            # In one loop, so that the loads of the next split's keys are under way while this one is left.
            if (((n0 - origin) & (length - 1)) == 0) & (n0 > since):
                _leave(space, (n0 - origin) // length - 1, m, z, acc, DVP, 64)
                m = tl.full(m.shape, float("-inf"), tl.float32)
                z = tl.zeros_like(z)
                acc = tl.zeros_like(acc)
        n = n0 + on
        k_at = _offsets(n, n0, limit, k_key, k_page, table, PAGE)
        v_at = _offsets(n, n0, limit, v_key, v_page, table, PAGE)
        if PAGE > 0:
            k_from = K
            v_from = V
        else:
            k_from = K + (n0 + tl.zeros((), tl.int64)) * k_key
            v_from = V + (n0 + tl.zeros((), tl.int64)) * v_key
        k_ptr = k_from + k_at[:, None] + od[None, :]
        v_ptr = v_from + v_at[:, None] + ov[None, :]
        if MASKED:
            inside = (n < limit)[:, None]
            k = tl.load(k_ptr, mask=inside if DP == D else inside & (od < D)[None, :], other=0.0)
        elif DP == D:
            k = tl.load(k_ptr)
        else:
            k = tl.load(k_ptr, mask=(od < D)[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        b = s * 0.0
        if MASKED:
            visible = (n[None, :] >= low[:, None]) & (n[None, :] < end[:, None])
            if MASK == 1:
                visible = visible & (_mask_byte(bias + n[None, :] * bias_key, visible) != 0)
            if MASK == 2:
                added = tl.load(bias + n[None, :] * bias_key, mask=visible, other=0.0).to(tl.float32)
                visible = visible & (added != float("-inf"))
                b = tl.where(added == 0, 0.0, tl.maximum(added * _LOG2E, -3.0e38))
                s = tl.where(visible, s, float("-inf"))
                highest = tl.max(tl.where(visible, tl.fma(s, c, b), float("-inf")), 1)
            else:
                s = tl.where(visible, s, float("-inf"))
                highest = tl.max(s, 1)
                highest = tl.where(highest == float("-inf"), highest, highest * c)
        else:
            highest = tl.max(s, 1)
            highest = tl.where(highest == float("-inf"), highest, highest * c)
        if MERGE:
            fresh = ((n0 - origin) & (length - 1)) == 0
            new = tl.maximum(tl.where(fresh, float("-inf"), m), highest)
        else:
            new = tl.maximum(m, highest)
        base = _exponent(new)
        if MASKED and MASK == 2:
            # A huge mask swallows the score, as it does in a sum of both.
            near = tl.abs(b) < 16777216.0
            p = tl.exp2(tl.where(near, tl.fma(s, c, b - base[:, None]), tl.fma(s, c, b) - base[:, None]))
        else:
            p = tl.exp2(tl.fma(s, c, -base[:, None]))
        if MASKED:
            p = tl.where(visible, p, 0.0)
        sums = _row_sum(p, p.shape[0])
        p = p.to(q.dtype)
        a = tl.exp2(m - base)
        if MERGE:
            if fresh:
                top, total, out = _merge(top, total, out, m, z, acc)
                acc = tl.zeros_like(acc)
                z = sums
            else:
                acc = acc * a[:, None]
                z = tl.fma(z, a, sums)
        else:
            acc = acc * a[:, None]
            z = tl.fma(z, a, sums)
        if MASKED:
            used = (tl.max(visible.to(tl.int32), 0) > 0)[:, None]
            v = tl.load(v_ptr, mask=used if DVP == DV else used & (ov < DV)[None, :], other=0.0)
            if ALIKE:
                acc = tl.dot(p, v, acc, input_precision="ieee")
            else:
                acc = _product(p, v, visible, acc, p.shape[0])
        else:
            if DVP == DV:
                v = tl.load(v_ptr)
            else:
                v = tl.load(v_ptr, mask=(ov < DV)[None, :], other=0.0)
            acc = tl.dot(p, v, acc, input_precision="ieee")
        m = new
    return m, z, acc, top, total, out


@triton.jit
def _finish(top, total, out, sink, SINK: tl.constexpr):
    """(result, log of the sum): the weights' sum divides once; a zero is +0."""
    if SINK:
        new = tl.maximum(top, sink)
        base = _exponent(new)
        a = tl.exp2(top - base)
        total = tl.fma(total, a, tl.exp2(sink - base))
        out = out * a[:, None]
        top = new
    lse = (top + tl.log2(total)) * _LN2
    return out * tl.div_rn(1.0 + tl.zeros_like(total), total)[:, None] + 0.0, lse


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=_LOOSE)
def tiles(
    Q, K, V, OUT, LSE, SINKS, TABLE, LENGTHS, STARTS, FIRST, END, HOLES, BIAS,
    HK, H, LQ, LK, shift, window, c,
    q_b, q_h, q_i, k_b, k_h, k_n, k_page, v_b, v_h, v_n, v_page, o_b, o_h, o_i,
    table_b, span_b, span_h, span_i, bias_b, bias_h, bias_i, bias_n,
    G: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, PAGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SPANS: tl.constexpr,
    MASK: tl.constexpr, STARTED: tl.constexpr, COUNTED: tl.constexpr, SINK: tl.constexpr, WANT_LSE: tl.constexpr,
):  # fmt: skip
    """A tile of BM // G positions of the G query heads on one head of K and V: every key that its rows see, ascending."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    batch = (tl.program_id(1) // HK).to(tl.int64)
    head = tl.program_id(1) % HK
    r = tl.arange(0, BM)
    i = tile * (BM // G) + r // G
    h = head * G + r % G
    valid = (r < BM // G * G) & (i < LQ)
    kv = (head // SHARE).to(tl.int64)
    K += batch * k_b + kv * k_h
    V += batch * v_b + kv * v_h
    if PAGE > 0:
        TABLE += batch * table_b
    keys = LK
    moved = shift
    if COUNTED:
        keys = tl.minimum(tl.load(LENGTHS + batch), LK)
        moved = keys - LQ
    holes = valid & False
    if SPANS:
        at = batch * span_b + h * span_h + i * span_i
        origin = tl.load(FIRST + at, mask=valid, other=0)
        end = tl.load(END + at, mask=valid, other=0)
        low = origin
        holes = tl.load(HOLES + at, mask=valid, other=0) > 0
    else:
        origin = tl.zeros((BM,), tl.int32)
        if STARTED:
            origin += tl.load(STARTS + batch)
        end = tl.zeros((BM,), tl.int32) + keys
        if CAUSAL:
            end = tl.minimum(i + moved + 1, keys)
        low = origin
        if WINDOW:
            low = tl.maximum(origin, end - window)
    live = valid & (end > low)
    length = _split_length(end - origin)
    od = tl.arange(0, DP)
    ov = tl.arange(0, DVP)
    q_at = batch * q_b + h.to(tl.int64) * q_h + i.to(tl.int64) * q_i
    q = tl.load(Q + q_at[:, None] + od[None, :], mask=valid[:, None] & (od < D)[None, :], other=0.0)
    bias = q_at[:, None]
    if MASK > 0:
        bias = BIAS + (batch * bias_b + h.to(tl.int64) * bias_h + i.to(tl.int64) * bias_i)[:, None]
    empty = valid & (live == 0)
    if tl.max(empty.to(tl.int32), 0) > 0:
        o_at = batch * o_b + h.to(tl.int64) * o_h + i.to(tl.int64) * o_i
        zero = tl.zeros((BM, DVP), OUT.dtype.element_ty)
        tl.store(OUT + o_at[:, None] + ov[None, :], zero, mask=empty[:, None] & (ov < DV)[None, :])
        if WANT_LSE:
            nothing = tl.full((BM,), float("-inf"), tl.float32)
            if SINK:
                nothing = tl.load(SINKS + h, mask=valid, other=0.0).to(tl.float32)
            tl.store(LSE + (batch * H + h) * LQ + i, nothing, mask=empty)
    left = live
    while tl.max(left.to(tl.int32), 0) > 0:
        # Rows whose blocks and splits lie alike go together; nearly always all do.
        first = tl.min(tl.where(left, origin, _FAR), 0)
        split = tl.min(tl.where(left & (origin == first), length, _FAR), 0)
        now = left & (origin == first) & (length == split)
        lo = first + (tl.min(tl.where(now, low, _FAR), 0) - first) // BLOCK * BLOCK
        hi = tl.max(tl.where(now, end, 0), 0)
        full_lo = first + (tl.max(tl.where(now, low, 0), 0) - first + BLOCK - 1) // BLOCK * BLOCK
        full_hi = first + (tl.min(tl.where(now, end, _FAR), 0) - first) // BLOCK * BLOCK
        if SPANS:
            full_hi = tl.where(tl.max((now & holes).to(tl.int32), 0) > 0, lo, full_hi)
        full_lo = tl.minimum(full_lo, hi)
        full_hi = tl.maximum(full_hi, full_lo)
        row_low = tl.where(now, low, _FAR)
        row_end = tl.where(now, end, 0)
        m = tl.full((BM,), float("-inf"), tl.float32)
        z = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, DVP), tl.float32)
        top, total, out = m, z, acc
        if WINDOW:
            m, z, acc, top, total, out = _walk(
                q, K, V, TABLE, k_n, v_n, k_page, v_page, lo, full_lo, hi, first, split, row_low, row_end, bias, bias_n, c,
                m, z, acc, top, total, out, D, DV, DP, DVP, PAGE, MASK, True, True, False,
            )  # fmt: skip
        m, z, acc, top, total, out = _walk(
            q, K, V, TABLE, k_n, v_n, k_page, v_page, full_lo, full_hi, hi, first, split, row_low, row_end, bias, bias_n, c,
            m, z, acc, top, total, out, D, DV, DP, DVP, PAGE, MASK, False, True, False,
        )  # fmt: skip
        m, z, acc, top, total, out = _walk(
            q, K, V, TABLE, k_n, v_n, k_page, v_page, full_hi, hi, hi, first, split, row_low, row_end, bias, bias_n, c,
            m, z, acc, top, total, out, D, DV, DP, DVP, PAGE, MASK, True, True, False,
        )  # fmt: skip
        top, total, out = _merge(top, total, out, m, z, acc)
        sink = top
        if SINK:
            sink = tl.load(SINKS + h, mask=valid, other=0.0).to(tl.float32) * _LOG2E
        o, lse = _finish(top, total, out, sink, SINK)
        o_at = batch * o_b + h.to(tl.int64) * o_h + i.to(tl.int64) * o_i
        tl.store(OUT + o_at[:, None] + ov[None, :], o.to(OUT.dtype.element_ty), mask=now[:, None] & (ov < DV)[None, :])
        if WANT_LSE:
            tl.store(LSE + (batch * H + h) * LQ + i, lse, mask=now)
        left = left & (now == 0)


@triton.jit
def _part(space, s, count, DVP: tl.constexpr):
    """What split ``s`` left; nothing where there is none, and nothing merged changes nothing."""
    tops, totals, outs, first, r, valid, rows = space
    at = (first + s) * rows + r
    ov = tl.arange(0, DVP)
    there = valid & (s < count)
    m = tl.load(tops + at, mask=there, other=float("-inf"), cache_modifier=".cg")
    z = tl.load(totals + at, mask=there, other=0.0, cache_modifier=".cg")
    acc = tl.load(outs + at[:, None] * DVP + ov[None, :], mask=there[:, None], other=0.0, cache_modifier=".cg")
    return m, z, acc


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=_LOOSE)
def decode(
    Q, K, V, OUT, LSE, SINKS, TABLE, LENGTHS, STARTS, FIRST, END, HOLES, BIAS, TOPS, TOTALS, OUTS, ARRIVED,
    HK, H, LQ, LK, shift, window, c, each,
    q_b, q_h, q_i, k_b, k_h, k_n, k_page, v_b, v_h, v_n, v_page, o_b, o_h, o_i,
    table_b, span_b, span_h, span_i, bias_b, bias_h, bias_i, bias_n,
    G: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, PAGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SPANS: tl.constexpr,
    MASK: tl.constexpr, STARTED: tl.constexpr, COUNTED: tl.constexpr, SINK: tl.constexpr, WANT_LSE: tl.constexpr,
    POSITIONS: tl.constexpr, SCAN: tl.constexpr, SEVERAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One split of POSITIONS x G rows that see the same keys; the last program of these rows to arrive merges.

    The rows' keys are those of the first of them. With SCAN they are found here, from the mask. With SEVERAL a program
    takes ``each`` splits that follow each other, and leaves each by itself: merged among themselves first, they would
    give other bits. With WHOLE it takes all, merges each where the next begins, and leaves none.
    """
    piece = tl.program_id(0)
    pieces = tl.num_programs(0)
    if SEVERAL:
        piece *= each
        pieces *= each
    row = tl.program_id(1)
    steps = (LQ + POSITIONS - 1) // POSITIONS
    i0 = row % steps * POSITIONS
    head = row // steps % HK
    batch = (row // steps // HK).to(tl.int64)
    r = tl.arange(0, BM)
    i = i0 + r // G
    h = head * G + r % G
    valid = (r < POSITIONS * G) & (i < LQ)
    kv = (head // SHARE).to(tl.int64)
    K += batch * k_b + kv * k_h
    V += batch * v_b + kv * v_h
    if PAGE > 0:
        TABLE += batch * table_b
    keys = LK
    moved = shift
    if COUNTED:
        keys = tl.minimum(tl.load(LENGTHS + batch), LK)
        moved = keys - LQ
    holes = False
    bias_row = batch * bias_b + (head * G).to(tl.int64) * bias_h + i0.to(tl.int64) * bias_i
    if SCAN:
        wide = tl.arange(0, 1024)
        near = tl.full((1024,), 1 << 30, tl.int32)
        far = tl.zeros((1024,), tl.int32)
        count = tl.zeros((1024,), tl.int32)
        last = keys
        if CAUSAL:
            last = tl.minimum(i0 + moved + 1, keys)
        for n0 in range(0, last, 1024):
            n = n0 + wide
            if MASK == 1:
                seen = (_mask_byte(BIAS + bias_row + n * bias_n, n < last) != 0) & (n < last)
                plain = seen
            else:
                value = tl.load(BIAS + bias_row + n * bias_n, mask=n < last, other=float("-inf")).to(tl.float32)
                seen = value != float("-inf")
                plain = value == 0
            near = tl.minimum(near, tl.where(seen, n, _FAR))
            far = tl.maximum(far, tl.where(seen, n + 1, 0))
            count += plain.to(tl.int32)
        end = tl.max(far, 0)
        origin = tl.minimum(tl.min(near, 0), end)
        holes = tl.sum(count, 0) != end - origin
        low = origin
    elif SPANS:
        span = batch * span_b + head * G * span_h + i0 * span_i
        origin = tl.load(FIRST + span)
        end = tl.load(END + span)
        low = origin
        holes = tl.load(HOLES + span) > 0
    else:
        origin = tl.zeros((), tl.int32)
        if STARTED:
            origin = tl.load(STARTS + batch)
        end = keys
        if CAUSAL:
            end = tl.minimum(i0 + moved + 1, keys)
        low = origin
        if WINDOW:
            low = tl.maximum(origin, end - window)
    ov = tl.arange(0, DVP)
    o_ptr = OUT + (batch * o_b + h.to(tl.int64) * o_h + i.to(tl.int64) * o_i)[:, None] + ov[None, :]
    o_in = valid[:, None] & (ov < DV)[None, :]
    lse_ptr = LSE + (batch * H + h) * LQ + i
    sink = tl.zeros((BM,), tl.float32)
    if SINK:
        sink = tl.load(SINKS + h, mask=valid, other=0.0).to(tl.float32) * _LOG2E
    if end <= low:
        if tl.program_id(0) == 0:
            tl.store(o_ptr, tl.zeros((BM, DVP), OUT.dtype.element_ty), mask=o_in)
            if WANT_LSE:
                nothing = tl.full((BM,), float("-inf"), tl.float32)
                tl.store(lse_ptr, sink / _LOG2E if SINK else nothing, mask=valid)
    else:
        split = _split_length(end - origin)
        begin = (low - origin) // split
        count_all = (end - origin + split - 1) // split
        past = piece + 1
        if WHOLE:
            past = count_all
            piece = begin
        if SEVERAL:
            past = tl.minimum(piece + each, count_all)
            piece = tl.maximum(piece, begin)
        if (piece >= begin) & (piece < count_all) & (piece < past):
            od = tl.arange(0, DP)
            q_at = batch * q_b + h.to(tl.int64) * q_h + i.to(tl.int64) * q_i
            q = tl.load(Q + q_at[:, None] + od[None, :], mask=valid[:, None] & (od < D)[None, :], other=0.0)
            if MASK > 0:
                bias = BIAS + (bias_row + (r // G).to(tl.int64) * bias_i)[:, None]
            else:
                bias = q_at[:, None]
            start = origin + piece * split
            hi = tl.minimum(origin + past * split, end)
            lo = tl.maximum(start, origin + (low - origin) // BLOCK * BLOCK)
            row_low = tl.zeros((BM,), tl.int32) + low
            row_end = tl.where(valid, end, 0)
            m = tl.full((BM,), float("-inf"), tl.float32)
            z = tl.zeros((BM,), tl.float32)
            acc = tl.zeros((BM, DVP), tl.float32)
            first = row.to(tl.int64) * pieces
            space = (TOPS, TOTALS, OUTS, first, r, valid, POSITIONS * G)
            top = tl.full((BM,), float("-inf"), tl.float32)
            total = tl.zeros((BM,), tl.float32)
            out = tl.zeros((BM, DVP), tl.float32)
            full_lo = lo
            if WINDOW:
                full_lo = tl.minimum(tl.maximum(lo, origin + (low - origin + BLOCK - 1) // BLOCK * BLOCK), hi)
                m, z, acc, top, total, out = _walk(
                    q, K, V, TABLE, k_n, v_n, k_page, v_page, lo, full_lo, hi, origin, split, row_low, row_end, bias,
                    bias_n, c, m, z, acc, top, total, out, D, DV, DP, DVP, PAGE, MASK, True, WHOLE, True, SEVERAL, lo, space,
                )  # fmt: skip
            full_hi = tl.maximum(full_lo, origin + (hi - origin) // BLOCK * BLOCK)
            if MASK > 0:
                full_hi = tl.where(holes, full_lo, full_hi)
            m, z, acc, top, total, out = _walk(
                q, K, V, TABLE, k_n, v_n, k_page, v_page, full_lo, full_hi, hi, origin, split, row_low, row_end, bias,
                bias_n, c, m, z, acc, top, total, out, D, DV, DP, DVP, PAGE, MASK, False, WHOLE, True, SEVERAL, lo, space,
            )  # fmt: skip
            m, z, acc, top, total, out = _walk(
                q, K, V, TABLE, k_n, v_n, k_page, v_page, full_hi, hi, hi, origin, split, row_low, row_end, bias,
                bias_n, c, m, z, acc, top, total, out, D, DV, DP, DVP, PAGE, MASK, True, WHOLE, True, SEVERAL, lo, space,
            )  # fmt: skip
            if WHOLE or (count_all - begin == 1):
                top, total, out = _merge(top, total, out, m, z, acc)
                o, lse = _finish(top, total, out, sink, SINK)
                tl.store(o_ptr, o.to(OUT.dtype.element_ty), mask=o_in)
                if WANT_LSE:
                    tl.store(lse_ptr, lse, mask=valid)
            else:
                _leave(space, past - 1, m, z, acc, DVP, DVP)
                tl.debug_barrier()
                before = tl.atomic_add(ARRIVED + row, past - piece, sem="acq_rel")
                if before + past - piece == count_all - begin:
                    for s in range(begin, count_all, 4):
                        # Four at a time, so that their loads are under way together.
                        m0, z0, acc0 = _part(space, s, count_all, DVP)
                        m1, z1, acc1 = _part(space, s + 1, count_all, DVP)
                        m2, z2, acc2 = _part(space, s + 2, count_all, DVP)
                        m3, z3, acc3 = _part(space, s + 3, count_all, DVP)
                        top, total, out = _merge(top, total, out, m0, z0, acc0)
                        top, total, out = _merge(top, total, out, m1, z1, acc1)
                        top, total, out = _merge(top, total, out, m2, z2, acc2)
                        top, total, out = _merge(top, total, out, m3, z3, acc3)
                    o, lse = _finish(top, total, out, sink, SINK)
                    tl.store(o_ptr, o.to(OUT.dtype.element_ty), mask=o_in)
                    if WANT_LSE:
                        tl.store(lse_ptr, lse, mask=valid)
                    tl.store(ARRIVED + row, 0)
