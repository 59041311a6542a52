"""Attention's bytes: the reference's, and the same whatever the call that a query row comes in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detinfer import native
from detinfer.bits import first_mismatch
from detinfer.errors import Diverged, RefusedError, UnsupportedDtype, UsageError
from detinfer.ops import attention_proof
from detinfer.ops.attention import NAME, prove, scaled_dot_product_attention
from detinfer.ops.attention_proof import expected, stress
from detinfer.ops.evidence import from_values, to_values
from detinfer.reference import attention as reference
from detinfer.reference import rows
from detinfer.reference.arithmetic import fma
from detinfer.reference.elementwise import exp

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
gqa = functools.partial(scaled_dot_product_attention, enable_gqa=True)


def same(got: torch.Tensor, want: torch.Tensor, where: str = "") -> None:
    found = first_mismatch(got, want)
    assert found is None, f"{where}: {found}"


def differ(got: torch.Tensor, other: torch.Tensor, where: str = "") -> None:
    assert first_mismatch(got, other) is not None, f"{where}: the inputs do not show the order"


def reversed_keys(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The same attention with the keys in descending order: equal but for rounding."""
    return gqa(query, key.flip(2), value.flip(2))


def online(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: int) -> torch.Tensor:
    """The usual online softmax over tiles of keys, rescaled at each new maximum: another order."""
    group = query.shape[1] // key.shape[1]
    q, k, v = to_values(query), *(np.repeat(to_values(t), group, axis=1) for t in (key, value))
    s = reference.scores(q, k, q.shape[-1] ** -0.5, None)
    top = np.full((*s.shape[:-1], 1), -np.inf, np.float32)
    total, o = np.zeros_like(top), np.zeros((*s.shape[:-1], v.shape[-1]), np.float32)
    for start in range(0, s.shape[-1], tile):
        block = s[..., start : start + tile]
        new = np.maximum(top, block.max(-1, keepdims=True))
        factor, p = exp(top - new), exp(block - new)
        total, o, top = total * factor, o * factor, new
        for j in range(p.shape[-1]):
            total = total + p[..., j, None]
            o = fma(p[..., j, None], v[..., None, start + j, :], o)
    return from_values(o / total, query.dtype)


SHAPES = [  # (H, Hkv), queries, keys, depth, value_depth
    ((1, 1), 1, 1, 1, 1),
    ((2, 1), 3, 15, 15, 15),
    ((2, 2), 7, 49, 1, 49),
    ((6, 2), 5, 77, 64, 64),
    ((3, 1), 13, 100, 77, 100),
    ((4, 4), 2, 33, 100, 33),
]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_the_references(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Plain, causal, and with an added mask; keys in another order give other bytes."""
    inputs = stress(*shape, dtype, 2)
    query, key, value = inputs
    want = expected(*inputs)
    same(gqa(*inputs), want, "plain")
    same(gqa(*inputs, is_causal=True), expected(*inputs, is_causal=True), "causal")
    same(gqa(*inputs, scale=0.3), expected(*inputs, scale=0.3), "scale")
    added = from_values(np.arange(shape[1] * shape[2], dtype=np.float32).reshape(shape[1:3]) % 13 / 4 - 1, dtype)
    same(gqa(*inputs, added), expected(*inputs, added), "added")
    if shape[2] > 2:
        differ(want, reversed_keys(*inputs), "reversed keys")
        differ(want, expected(query, key.flip(2), value.flip(2)), "reversed keys, by the reference")
    if shape[3] > 3 and dtype is torch.float32:
        differ(want, gqa(query.flip(3), key.flip(3), value), "reversed depth")


@each_dtype
@pytest.mark.parametrize("keys", [1000, 1030, 2890])
def test_long_rows_are_the_references(keys: int, dtype: torch.dtype) -> None:
    """Rows with more keys than row_sum has lanes, and than a block of K or V."""
    inputs = stress((2, 1), 2, keys, 3, 2, dtype)
    want = expected(*inputs)
    same(gqa(*inputs), want)
    differ(want, reversed_keys(*inputs))


@each_dtype
def test_prefill_chunks_and_decode_agree(dtype: torch.dtype, threads: int) -> None:
    """One prefill, prefill in chunks cut at 1, 7 and 15, and token after token: a row has one value."""
    length = 70
    query, key, value = stress((6, 2), length, length, 64, 64, dtype, 2)
    whole = gqa(query, key, value, is_causal=True)
    for cut in (1, 7, 15):
        for start in range(0, length, cut):
            end = min(start + cut, length)
            mask = torch.ones(end - start, end, dtype=torch.bool).tril(start)
            chunk = gqa(query[:, :, start:end], key[:, :, :end], value[:, :, :end], mask)
            same(chunk, whole[:, :, start:end], f"chunk of {cut} at {start}")
    for at in range(length):
        row, k, v = query[:, :, at : at + 1], key[:, :, : at + 1], value[:, :, : at + 1]
        alone = gqa(row, k, v)
        same(alone, whole[:, :, at : at + 1], f"token {at}")
        # As transformers packs it: the heads of a group as query rows of one head.
        packed = scaled_dot_product_attention(row.reshape(2, 2, 3, 64), k, v)
        same(packed.reshape(2, 6, 1, 64), alone, f"token {at}, packed")
    last = (query[:, :, -1:], key, value)
    differ(whole[:, :, -1:], reversed_keys(*last), "reversed keys")
    for tile in (16, 32):
        differ(whole[:, :, -1:], online(*last, tile), f"online softmax in tiles of {tile}")
    differ(online(*last, 16), online(*last, 32), "tiles of 16 and of 32")


@each_dtype
@pytest.mark.parametrize("queries", [1, 5])
def test_every_row_of_every_batch(queries: int, dtype: torch.dtype, threads: int) -> None:
    """Batches of 1 to 33, the rows in another order each time."""
    inputs = stress((6, 2), queries, 49, 64, 64, dtype, 33)
    alone = [gqa(*(t[row : row + 1] for t in inputs)) for row in range(33)]
    for batch in range(1, 34):
        picked = [(row * 5 + batch) % 33 for row in range(batch)]
        got = gqa(*(t[picked] for t in inputs))
        same(got, torch.cat([alone[row] for row in picked]), f"batch {batch}")
    differ(torch.cat(alone), reversed_keys(*inputs))


@each_dtype
def test_grouped_heads_are_repeated_heads(dtype: torch.dtype, threads: int) -> None:
    """enable_gqa, repeated K and V, and one head for all by broadcasting: the same bytes."""
    query, key, value = stress((6, 2), 33, 33, 64, 64, dtype, 2)
    want = gqa(query, key, value, is_causal=True)
    repeated = (t.repeat_interleave(3, dim=1) for t in (key, value))
    same(scaled_dot_product_attention(query, *repeated, is_causal=True), want, "repeated")
    one = scaled_dot_product_attention(query, key[:, :1], value[:, :1], is_causal=True)
    same(one[:, :3], want[:, :3], "one head for all")
    uneven = gqa(query, key[:, :1], value.repeat_interleave(3, dim=1), is_causal=True)
    same(uneven[:, :3], want[:, :3], "one head of keys, six of values")
    differ(want[:, :, -1:], reversed_keys(query[:, :, -1:], key, value))


def masks(kept: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """A bool mask, and masks of +0 and -inf in ``dtype`` and fp32, that keep the same keys."""
    return [kept] + [torch.zeros(kept.shape, dtype=d).masked_fill(~kept, -torch.inf) for d in {dtype, torch.float32}]


@each_dtype
@pytest.mark.parametrize("keys", [17, 1100])
def test_padding_contributes_nothing(keys: int, dtype: torch.dtype) -> None:
    """Masked keys on the left, on the right and between, with NaN in K and V, give the bytes of the keys alone."""
    query, key, value = stress((3, 1), 4, keys, 16, 16, dtype)
    want = gqa(query, key, value)
    for left, right in ((0, 3), (5, 0), (16, 0), (1, 40), (1023, 9)):
        k, v = (F.pad(t, (0, 0, left, right), value=torch.nan) for t in (key, value))
        kept = torch.zeros(4, left + keys + right, dtype=torch.bool)
        kept[:, left : left + keys] = True
        for mask in masks(kept, dtype):
            same(gqa(query, k, v, mask), want, f"{left} on the left, {right} on the right, {mask.dtype}")
    differ(want, reversed_keys(query, key, value))


@each_dtype
def test_a_masked_key_between_others(dtype: torch.dtype) -> None:
    """Its NaN is never used and it takes no lane: the bytes are those of a call without it."""
    query, key, value = (t.clone() for t in stress((3, 1), 9, 100, 16, 20, dtype))
    kept = (torch.arange(100) * 7 + torch.arange(9)[:, None]) % 5 != 0
    kept[:, 40], kept[:, 71] = False, False
    kept[2] = True  # a row without a hole among rows with some
    kept[2, 40], kept[2, 71:] = True, False
    kept[6, 30:60] = False  # a hole wider than a vector
    key[:, :, 71], value[:, :, 71] = torch.nan, torch.inf
    want = expected(query, key, value, kept)
    assert not want.isnan().any()
    for mask in masks(kept, dtype):
        same(gqa(query, key, value, mask), want, str(mask.dtype))
    alone = [gqa(query[:, :, r : r + 1], key[:, :, kept[r]], value[:, :, kept[r]]) for r in range(9)]
    same(torch.cat(alone, dim=2), want, "the remaining keys alone")
    differ(want, expected(query, key.flip(2), value.flip(2), kept.flip(1)), "reversed keys")


@pytest.mark.parametrize("keys", [30, 100, 1500])
def test_the_lanes_of_a_row_with_holes(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of one size, so that the order of their sum shows: other lanes give other bytes."""
    draw = np.random.default_rng(keys)
    query, key, value = (
        torch.from_numpy(draw.integers(-64, 65, shape).astype(np.float32) / 128)
        for shape in ((1, 3, 11, 16), (1, 1, keys, 16), (1, 1, keys, 5))
    )
    kept = torch.from_numpy(draw.integers(0, 10, (11, keys)) > 0)
    assert keys < 1024 or int(kept.sum(-1).min()) > 1024, "lanes of row_sum are to meet again"
    want = expected(query, key, value, kept)
    for mask in masks(kept, torch.float32):
        same(gqa(query, key, value, mask), want, str(mask.dtype))
    sums = reference.weight_sums

    def in_place(p: Any, allowed: Any) -> Any:  # a masked key keeps its lane, as a missing term
        return rows.row_sum(np.where(allowed, p, np.float32(-0.0)).reshape(-1, keys)).reshape(p.shape[:-1])

    def odd_first(p: Any, allowed: Any) -> Any:  # turning or reversing a row only permutes lanes that are added anyway
        order = np.argsort(np.arange(keys) % 2 == 0, kind="stable")
        return sums(p[..., order], allowed[..., order])

    for wrong in (in_place, odd_first):
        monkeypatch.setattr(reference, "weight_sums", wrong)
        differ(want, expected(query, key, value, kept), wrong.__name__)


@each_dtype
def test_rows_without_keys_are_zero(dtype: torch.dtype) -> None:
    """A fully masked row and a row of no keys give +0; their neighbours are as without them."""
    query, key, value = (t.clone() for t in stress((4, 2), 7, 15, 8, 12, dtype))
    kept = torch.ones(7, 15, dtype=torch.bool)
    kept[1::2] = False
    query[:, :, 3] = torch.nan
    want = gqa(query, key, value).masked_fill(~kept[:, :1], 0.0)
    for mask in masks(kept, dtype):
        same(gqa(query, key, value, mask), want, str(mask.dtype))
    nothing = gqa(query, key, value, torch.zeros(1, 1, dtype=torch.bool))
    same(nothing, torch.zeros_like(nothing), "every row masked")
    empty = gqa(query, key[:, :, :0], value[:, :, :0])
    same(empty, torch.zeros(1, 4, 7, 12, dtype=dtype), "no keys")


@each_dtype
def test_finite_mask_values_count(dtype: torch.dtype) -> None:
    """finfo.min is a value like others: added in fp32 after the scale, and its key is used."""
    query, key, value = (t.clone() for t in stress((2, 1), 3, 15, 8, 8, dtype))
    added = torch.zeros(3, 15, dtype=dtype)
    added[1, 4] = torch.finfo(dtype).min
    added[2] = torch.finfo(dtype).min
    same(gqa(query, key, value, added), expected(query, key, value, added))
    value[:, :, 4] = torch.nan
    assert gqa(query, key, value, added).isnan().all()


@each_dtype
def test_every_instruction_set_and_thread_count(dtype: torch.dtype) -> None:
    """The same bytes, on shapes that are cut into several tasks, tiles and blocks."""
    cases = [
        (stress((6, 2), 150, 150, 64, 64, dtype, 2), {"is_causal": True}),
        (stress((3, 1), 1, 1030, 64, 64, dtype, 5), {}),
        (stress((2, 2), 40, 77, 20, 49, dtype, 2), {"attn_mask": torch.ones(40, 77, dtype=torch.bool).triu(3)}),
    ]
    state, before = native.load(), torch.get_num_threads()
    assert isinstance(state, native.Loaded)
    for inputs, options in cases:
        results = {}
        for level in state.levels:
            for count in (1, 2):
                torch.set_num_threads(count)
                with native.hold_isa(level):
                    results[level, count] = gqa(*inputs, **options)
        torch.set_num_threads(before)
        first = results[state.levels[0], 1]
        for where, got in results.items():
            same(got, first, str(where))
        differ(first[:, :, -1:], reversed_keys(*(t[:, :, -1:] if t is inputs[0] else t for t in inputs)))


@each_dtype
def test_layouts(dtype: torch.dtype) -> None:
    """Any strides, two to five dimensions, broadcasting; the result's shape and strides are torch's."""
    query, key, value = stress((4, 4), 6, 10, 16, 16, dtype, 3)
    op: Callable[..., Any] = scaled_dot_product_attention
    want = op(query, key, value)

    def shuffled(t: torch.Tensor, *order: int) -> torch.Tensor:
        """The same tensor with its memory in another order of dimensions."""
        return t.permute(order).contiguous().permute([order.index(d) for d in range(4)])

    for order in ((0, 2, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2), (3, 2, 1, 0)):
        q, k, v = (shuffled(t, *order) for t in (query, key, value))
        got = op(q, k, v)
        same(got, want, f"memory in order {order}")
        if order[-1] == 3:
            assert got.stride() == F.scaled_dot_product_attention(q, k, v).stride()
    wide = torch.cat([key, key], dim=-1)
    same(op(query, wide[..., :16], value), want, "rows further apart")
    same(op(query[0], key[0], value[0]), want[0], "three dimensions")
    same(op(query[0, 0], key[0, 0], value[0, 0]), want[0, 0], "two dimensions")
    same(op(query[None], key[None], value[None]), want[None], "five dimensions")
    five = op(query.reshape(3, 2, 2, 6, 16), key.reshape(3, 2, 2, 10, 16), value.reshape(3, 2, 2, 10, 16))
    same(five.reshape(3, 4, 6, 16), want, "two leading dimensions")
    shared = op(query, key[:1], value[:1])
    same(shared[:1], want[:1], "K and V shared by the batch")
    kept = torch.ones(6, 1, dtype=torch.bool)
    kept[2] = False
    for mask in (kept, kept.expand(6, 10), kept[None, None], kept.expand(10, 6, 10).transpose(1, 2)[0].t()):
        same(op(query, key, value, mask), want.masked_fill(~kept, 0.0), f"a mask of {list(mask.shape)}")
    by_key = torch.arange(60).reshape(10, 6).t() % 3 != 1
    same(op(query, key, value, by_key), op(query, key, value, by_key.contiguous()), "a mask with strides")
    assert op(query[:, :, :0], key, value).shape == (3, 4, 0, 16)
    assert op(query[:0], key[:0], value[:0]).shape == (0, 4, 6, 16)
    narrow = op(query, key, value[..., :5])
    same(narrow, want[..., :5].contiguous(), "fewer value columns")
    assert narrow.stride() == F.scaled_dot_product_attention(query, key, value[..., :5]).stride()


@each_dtype
def test_nan_is_canonical(dtype: torch.dtype) -> None:
    """Whatever NaN comes in, and Inf - Inf, stores the canonical NaN."""
    query, key, value = (t.clone() for t in stress((1, 1), 4, 9, 4, 4, dtype))
    query[0, 0, 0, 0], query[0, 0, 1, 1] = -torch.nan, torch.inf
    value[0, 0, 3, 2] = -torch.nan
    got = scaled_dot_product_attention(query, key, value)
    integers = torch.int32 if dtype is torch.float32 else torch.int16
    nan = 0x7FFFFFFF if dtype is torch.float32 else 0x7FFF
    assert (got[0, 0, :2].view(integers) == nan).all()
    assert (got[0, 0, :, 2].contiguous().view(integers) == nan).all()
    assert not got[0, 0, 2:, [0, 1, 3]].isnan().any()


@each_dtype
def test_close_to_float64(dtype: torch.dtype) -> None:
    """An invariant kernel can still be wrong: at most a few roundings from torch's double."""
    random = np.random.default_rng(7)
    shapes = ((2, 6, 20, 64), (2, 2, 30, 64), (2, 2, 30, 40))
    query, key, value = (
        from_values((random.integers(-(2**20), 2**20, s) / 2**20).astype(np.float32), dtype) for s in shapes
    )
    got = gqa(query, key, value).double()
    wide = (t.double() for t in (query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1)))
    error = (got - F.scaled_dot_product_attention(*wide)).abs().max().item()
    assert error <= torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps


def test_refusals() -> None:
    """Dropout, dtypes and shapes without an order, each by name; integers are left to torch."""
    query, key, value = stress((4, 2), 3, 5, 8, 8, torch.float32)
    with pytest.raises(RefusedError, match=r"dropout_p=0\.5"):
        gqa(query, key, value, None, 0.5)
    with pytest.raises(UnsupportedDtype, match=NAME):
        gqa(query.double(), key.double(), value.double())
    with pytest.raises(UnsupportedDtype, match="complex64"):
        gqa(query.to(torch.complex64), key.to(torch.complex64), value.to(torch.complex64))
    with pytest.raises(UsageError, match="one dtype"):
        gqa(query, key.bfloat16(), value)
    with pytest.raises(UsageError, match="int32"):
        gqa(query, key, value, torch.zeros(3, 5, dtype=torch.int32))
    with pytest.raises(UsageError, match=r"\[1, 4, 3, 8\]"):
        gqa(query, key[..., :7], value)
    with pytest.raises(UsageError, match="Lk"):
        gqa(query, key, value[:, :, :4])
    with pytest.raises(UsageError, match="do not fit"):
        scaled_dot_product_attention(query, key, value)
    with pytest.raises(UsageError, match="do not fit"):
        gqa(query[:, :3], key, value)
    with pytest.raises(UsageError, match="do not fit"):
        gqa(query, key, value, torch.ones(4, 5, dtype=torch.bool))
    assert scaled_dot_product_attention(query.int(), key.int(), value.int()) is NotImplemented


@each_dtype
def test_the_proof_is_the_same_at_every_level_and_can_fail(dtype: torch.dtype) -> None:
    """Thousands of results with the same bytes everywhere; a kernel of another order diverges."""
    state = native.load()
    assert isinstance(state, native.Loaded)
    proofs = []
    for level in state.levels:
        with native.hold_isa(level):
            proofs.append(prove(NAME, dtype))
    assert len(set(proofs)) == 1
    assert proofs[0][0] > 5000

    def wrong(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any, **more: Any) -> Any:
        if options or more.get("is_causal") or key.shape[2] < 3:
            return scaled_dot_product_attention(query, key, value, *options, **more)
        return scaled_dot_product_attention(query, key.flip(2), value.flip(2), **more)

    with pytest.raises(Diverged, match=r"one row on (18|35) keys"):
        attention_proof.prove(NAME, dtype, wrong)
    with pytest.raises(UnsupportedDtype):
        prove(NAME, torch.float64)
