"""Every machine code of attention is proved before its first result is handed out; its inputs get the same machine code."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detinfer.bits import as_bytes
from detinfer.errors import Diverged, RefusedError
from detinfer.ops import attention_cuda_launch as launches
from detinfer.ops import attention_cuda_variants as variants
from detinfer.ops.attention_cuda import attention, paged_attention, reference, scaled_dot_product_attention
from detinfer.ops.attention_cuda_launch import Keys
from detinfer.ops.attention_cuda_proof import causal_mask, exact, stress
from detinfer.policy import deterministic


def shaped() -> Iterator[torch.Tensor]:
    """Tensors as models have them: heads inside positions, a slice of a cache, expanded, one sequence, one row."""
    yield torch.zeros(3, 40, 8, 64).transpose(1, 2)
    yield torch.zeros(2, 8, 1000, 80)[:, :, :333]
    yield torch.zeros(2, 1, 50, 20).expand(2, 6, 50, 20)
    yield torch.zeros(1, 1, 1, 70)
    yield torch.zeros(5, 3, 7, 9)[:, :, :, :8]
    yield torch.zeros(4, 1, 1, 90).expand(4, 12, 30, 90)


def test_strides_make_the_same_code() -> None:
    """The same modulo 16, one where one is, none where none is; and no element lies over another."""
    for like in shaped():
        shape = tuple(min(n, most) for n, most in zip(like.shape, (2, 2, 21, like.shape[3]), strict=True))
        for given in (shape, (*shape[:2], 37, shape[3])):
            strides = variants._strides(like, given)
            for own, found in zip(like.stride(), strides, strict=True):
                assert own % 16 == found % 16 and (own == 1) == (found == 1) and (own == 0) == (found == 0)
            places = torch.zeros(1, dtype=torch.int64)
            for n, stride in zip(given, strides, strict=True):
                if stride:
                    places = (places[:, None] + torch.arange(n) * stride).reshape(-1)
            assert len(places.unique()) == len(places)


def test_a_model_under_a_policy_can_be_the_first_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof's own operations, float64 among them, are no operations of the model: the policy, which refuses them, has no say."""
    q, k, v = (torch.ones(1, 1, 4, 8) for _ in range(3))
    proved: list[torch.Tensor] = []

    def prove(_launch: Any, _code: str, *given: Any) -> int:
        proved.append(exact(*given[:3])[0])
        given[-1].update(variants._WRONG)
        return 1

    monkeypatch.setattr(variants, "_prove", prove)
    monkeypatch.setattr(variants, "_proved", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with deterministic("batch"):
        with pytest.raises(RefusedError, match="float64"):
            exact(q, k, v)
        variants.check(SimpleNamespace(), "code", q, k, v, Keys(None, False, 0))  # type: ignore[arg-type]
        with pytest.raises(RefusedError, match="float64"):
            exact(q, k, v)
    assert len(proved) == len(variants.LENGTHS) and variants.proved() == {"code": len(variants.LENGTHS)}


def test_values_lie_where_they_are_put() -> None:
    """An address like the call's, and every value as it was given."""
    values = torch.arange(2 * 2 * 21 * 8, dtype=torch.float32).reshape(2, 2, 21, 8)
    for first in range(4):
        like = torch.zeros(1000 + first)[first:].as_strided((2, 3, 30, 8), (300, 100, 9, 1))
        held = variants._like(like, values)
        assert held.data_ptr() % 16 == like.data_ptr() % 16
        assert as_bytes(held.contiguous()) == as_bytes(values)


def test_pages() -> None:
    """Every key is where the table says, in pages out of order; the rest is NaN."""
    keys = torch.arange(2 * 3 * 50 * 4, dtype=torch.float32).reshape(2, 3, 50, 4)
    table, (held,) = variants._pages(16, (keys,), torch.zeros(2, 9, dtype=torch.int32))
    found = torch.stack([held[table[b].long()].transpose(0, 1).reshape(3, 64, 4) for b in range(2)])
    assert as_bytes(found[:, :, :50].contiguous()) == as_bytes(keys)
    assert table.flatten().tolist() != sorted(table.flatten().tolist())
    assert int(held.isnan().sum()) == held.numel() - keys.numel()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """No machine code is proved yet."""
    proved: dict[str, int] = {}
    monkeypatch.setattr(variants, "_proved", proved)
    return proved


def calls(depth: int, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """Calls of every kind on 600 keys."""
    query, key, value = stress((8, 2), 300, 600, depth, dtype, 2)
    row = query[:, :, -1:].contiguous()
    hidden = causal_mask(300, 600).to(dtype).expand(2, 1, 300, 600)
    own = hidden.expand(2, 8, 300, 600).contiguous()
    integers = functools.partial(torch.tensor, dtype=torch.int32, device="cuda")
    plain: Any = scaled_dot_product_attention
    sdpa = functools.partial(plain, enable_gqa=True)
    sinks = torch.ones(8, dtype=dtype, device="cuda")
    yield "causal", lambda: sdpa(query, key, value, None, 0.0, True)
    yield "a row", lambda: sdpa(row, key, value)
    yield "a mask", lambda: sdpa(query, key, value, hidden)
    yield "a mask of each head, a row", lambda: sdpa(row, key, value, own[:, :, -1:] > -1)
    many = [t.repeat(1, 1, 30, 1) for t in (key, value)]
    yield "a long mask, a row", lambda: sdpa(row, *many, hidden[:, :, -1:].repeat(1, 1, 1, 30))
    yield "a window", lambda: attention(query, key, value, window=100)
    yield "sinks", lambda: attention(query, key, value, sinks=sinks)
    yield "starts", lambda: attention(query, key, value, starts=integers([3, 40]), lengths=integers([600, 500]))
    caches = [t.transpose(1, 2).reshape(2 * 600 // 16, 16, 2, depth) for t in (key, value)]
    table = torch.arange(75, dtype=torch.int32, device="cuda")[:74].view(2, 37)
    for rows in (query, row):
        yield "pages", lambda rows=rows: paged_attention(rows, *caches, table, integers([590, 400]))
    shown = [t[:, :1].expand(2, 6, 600, depth) for t in (key, value)]
    yield "one head shown many times", lambda: plain(query[:, :6], *shown)
    packed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    yield "heads inside positions", lambda: sdpa(*packed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("depth", [64, 128])
def test_every_kind_of_call_is_proved(depth: int, dtype: torch.dtype, fresh: dict[str, int]) -> None:
    """The first call of a kind proves its machine code, and the second finds it proved."""
    for kind, call in calls(depth, dtype):
        before = dict(fresh)
        first = call()
        assert len(fresh) > len(before) or kind in ("pages", "heads inside positions"), kind
        after = dict(fresh)
        assert as_bytes(call().cpu()) == as_bytes(first.cpu()) and fresh == after
    assert len(fresh) >= 8 and min(fresh.values()) >= 64


@pytest.mark.gpu
def test_a_wrong_order_is_refused(fresh: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine code does not give the plain kernel's bytes, its result is never handed out."""
    query, key, value = stress((4, 2), 60, 600, 64, torch.bfloat16)
    backwards = functools.partial(reference, backwards=True)
    with monkeypatch.context() as patched:
        patched.setattr(variants, "reference", lambda *args, **given: backwards(*args, **{**given, "backwards": True}))
        for _ in range(2):
            with pytest.raises(Diverged, match=r"attention.*tiles|prefill"):
                attention(query, key, value)
    assert not fresh
    attention(query, key, value)
    assert len(fresh) == 1


@pytest.mark.gpu
def test_a_compilers_fault_is_seen(fresh: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles of 16 columns ptxas 12.8 loses half of a descriptor: the proof refuses, or a later ptxas gives the bytes."""
    query, key, value = stress((4, 4), 300, 700, 12, torch.bfloat16, 2)
    want = reference(query, key, value, causal_mask(300, 700))
    monkeypatch.setattr(launches, "padded", lambda depth: max(16, launches._power(depth)))
    try:
        got = attention(query, key, value)
    except Diverged as refused:
        print(refused)
        assert not fresh
    else:
        assert as_bytes(got.cpu()) == as_bytes(want.cpu())


@pytest.mark.gpu
def test_a_capture_proves_nothing(fresh: dict[str, int]) -> None:
    """Machine code that is first met while a graph is captured is refused; after a warm-up the graph is captured."""
    query, key, value = stress((4, 2), 60, 600, 64, torch.bfloat16)
    attention(query, key, value)
    fresh.clear()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RefusedError, match="warm-up"), torch.cuda.graph(graph):
        attention(query, key, value)
    want = attention(query, key, value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attention(query, key, value)
    graph.replay()
    assert as_bytes(got.cpu()) == as_bytes(want.cpu())
