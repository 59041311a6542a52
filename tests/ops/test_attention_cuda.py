"""Attention on a GPU: a row's bytes are those of the plain kernel on its keys, by every kernel and in every kind of call."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from detinfer.bits import first_mismatch
from detinfer.errors import RefusedError, UnsupportedDtype, UsageError
from detinfer.ops.attention_cuda import (
    COVERED,
    NAME,
    attention,
    paged_attention,
    prove,
    reference,
    scaled_dot_product_attention,
)
from detinfer.ops.attention_cuda_launch import Keys
from detinfer.ops.attention_cuda_proof import by_path, causal_mask, check_close, stress

pytestmark = pytest.mark.gpu

FEW = (torch.bfloat16, torch.float16)
DEPTHS = (20, 64, 80, 96, 128, 192, 256)


def same(got: torch.Tensor, want: torch.Tensor, where: str = "") -> None:
    found = first_mismatch(got.cpu(), want.cpu())
    assert found is None, f"{where}: {found}"


def differ(got: torch.Tensor, want: torch.Tensor) -> None:
    assert first_mismatch(got.cpu(), want.cpu()) is not None, "these inputs would not show a wrong order"


def sdpa(*inputs: Any, **options: Any) -> torch.Tensor:
    result: torch.Tensor = scaled_dot_product_attention(*inputs, enable_gqa=True, **options)
    return result


@pytest.mark.parametrize("dtype", [*FEW, torch.float32])
def test_the_proof(dtype: torch.dtype) -> None:
    """Prefill, pieces, decode, padding, masks, a window, pages, NaN that must not be seen."""
    cases, results = prove(NAME, dtype)
    assert cases > 1_000_000
    assert (cases, results) == prove(NAME, dtype)


@pytest.mark.parametrize("dtype", FEW)
@pytest.mark.parametrize("depth", DEPTHS)
def test_depths_and_kernels(depth: int, dtype: torch.dtype) -> None:
    """Every row by every kernel, near fp64; the splits from the last one, or of another length, give other bytes."""
    for heads in ((4, 2), (9, 3), (5, 5)):
        inputs = stress(heads, 600, 600, depth, dtype)
        query, key, value = inputs
        mask = causal_mask(600, 600)
        want = reference(*inputs, mask)
        check_close(want, inputs, mask, f"depth {depth}")
        differ(reference(*inputs, mask, backwards=True), want)
        differ(reference(*inputs, mask, split=128), want)
        for path in ("tiles", "prefill")[: None if depth <= 128 and depth % 8 == 0 else 1]:
            same(by_path(inputs, Keys(None, True), path), want, path)
        for at in (0, 63, 255, 256, 599):
            row = (query[:, :, at : at + 1], key[:, :, : at + 1], value[:, :, : at + 1])
            same(by_path(row, Keys(), "decode"), want[:, :, at : at + 1], f"decode on {at + 1} keys")


@pytest.mark.parametrize("dtype", FEW)
@pytest.mark.parametrize(("depth", "value_depth"), [(24, 16), (12, 12), (192, 128)])
def test_heads_of_two_depths(depth: int, value_depth: int, dtype: torch.dtype) -> None:
    """Keys deeper than values, and heads narrower than a tile: every kernel, under no mask, a bool one and an added one."""
    query, key, value = stress((4, 4), 70, 300, depth, dtype, 2)
    value = value[..., :value_depth].contiguous()
    draw = torch.Generator("cuda").manual_seed(5)
    seen = torch.randint(0, 10, (2, 1, 70, 300), generator=draw, device="cuda") < 8
    bias = torch.randint(-8, 9, (2, 1, 70, 300), generator=draw, device="cuda") / 4
    causal = causal_mask(70, 300)
    hidden = torch.zeros(seen.shape, device="cuda").masked_fill(~seen, -math.inf)
    want = reference(query, key, value, causal)
    check_close(want, (query, key, value), causal, f"{depth} and {value_depth}")
    differ(reference(query, key, value, causal, backwards=True), want)
    paths = ("tiles", "prefill") if depth % 8 == value_depth % 8 == 0 and depth <= 128 else ("tiles",)
    for path in paths:
        same(by_path((query, key, value), Keys(None, True, 230), path), want, path)
    same(by_path((query[:, :, -1:], key, value), Keys(), "decode"), want[:, :, -1:], "decode")
    for mask, added in ((seen, hidden), ((hidden + bias).to(dtype), (hidden + bias).to(dtype))):
        masked = reference(query, key, value, added)
        for path in ("tiles", "decode"):
            got = by_path((query, key, value), Keys(mask.expand(2, 4, 70, 300)), path)
            same(got, masked, f"{mask.dtype} by {path}")
        same(sdpa(query, key, value, mask), masked, "as a program calls it")


@pytest.mark.parametrize("dtype", FEW)
def test_splits_grow_with_the_row(dtype: torch.dtype) -> None:
    """Where 4096 keys become 4097 the splits of a row become longer, in prefill at any cut and in decode alike."""
    query, key, value = stress((4, 1), 300, 4250, 64, dtype)
    want = reference(query, key, value, causal_mask(300, 4250))
    same(attention(query, key, value), want, "the tail of a prompt")
    same(by_path((query, key, value), Keys(None, True, 3950), "tiles"), want, "tiles")
    aligned = reference(query[:, :, :256], key[:, :, :4224], value[:, :, :4224], causal_mask(256, 4224))
    same(attention(query[:, :, :256], key[:, :, :4224], value[:, :, :4224]), aligned, "a cut at a tile")
    for at in (144, 145, 146, 147, 299):
        seen = slice(0, 3951 + at)
        row = (query[:, :, at : at + 1], key[:, :, seen], value[:, :, seen])
        same(by_path(row, Keys(), "decode"), want[:, :, at : at + 1], f"decode on {3951 + at} keys")
    same(
        by_path((query[:, :, -3:], key, value), Keys(None, True, 4247), "decode"), want[:, :, -3:], "three rows at once"
    )
    differ(reference(query[:, :, -1:], key, value, split=256), want[:, :, -1:])


@pytest.mark.parametrize("dtype", FEW)
def test_a_static_cache_in_a_graph(dtype: torch.dtype) -> None:
    """One captured call, replayed as the sequence grows: the mask alone says how far, unused slots hold NaN."""
    query, key, value = stress((4, 1), 1, 4250, 64, dtype)
    slots = [torch.full_like(t, math.nan) for t in (key, value)]
    mask = torch.zeros(1, 1, 1, 4250, dtype=torch.bool, device="cuda")
    mask[..., 0] = True
    sdpa(query, *slots, mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = sdpa(query, *slots, mask)
    for length in (1, 70, 256, 257, 4000, 4097, 4250, 300):
        for own, t in zip(slots, (key, value), strict=True):
            own.fill_(math.nan)
            own[:, :, :length] = t[:, :, :length]
        mask.zero_()
        mask[..., :length] = True
        want = reference(query, key[:, :, :length], value[:, :, :length])
        for _ in range(10):
            got.zero_()
            graph.replay()
            same(got, want, f"{length} keys")


def test_a_mask_too_long_for_the_decode_kernel() -> None:
    """A static cache of more slots than that kernel reads the mask of: what a row sees is found before."""
    query, key, value = stress((4, 1), 1, 4250, 64, torch.bfloat16)
    slots = [torch.full((1, 1, 17000, 64), math.nan, dtype=t.dtype, device="cuda") for t in (key, value)]
    seen = torch.zeros(1, 1, 1, 17000, dtype=torch.bool, device="cuda")
    for own, t in zip(slots, (key, value), strict=True):
        own[:, :, 300:4550] = t
    seen[..., 300:4550] = True
    want = reference(query, key, value)
    added = torch.zeros(seen.shape, dtype=torch.bfloat16, device="cuda").masked_fill(~seen, -math.inf)
    for mask in (seen, added):
        same(sdpa(query, *slots, mask), want, f"{mask.dtype}")


@pytest.mark.parametrize("dtype", FEW)
def test_masks(dtype: torch.dtype) -> None:
    """Bool and added masks with holes, shared by the heads or not; a row that sees nothing is +0; broadcast rows."""
    query, key, value = stress((6, 2), 70, 700, 64, dtype, 2)
    draw = torch.Generator("cuda").manual_seed(3)
    kept = torch.randint(0, 10, (2, 6, 70, 700), generator=draw, device="cuda") < 7
    kept[:, :, 5] = False
    kept[:, :, 6, :300] = False
    for holes in (kept, kept[:, :1], kept[:1, :1, :1]):
        for path in ("tiles", "decode"):
            seen = holes.expand(2, 6, 70, 700)
            added = torch.zeros(seen.shape, device="cuda").masked_fill(~seen, -math.inf)
            want = reference(query, key, value, added)
            same(by_path((query, key, value), Keys(seen), path), want, f"bool by {path}")
            added = (added + torch.arange(700, device="cuda") % 11 / 4).to(dtype)
            want = reference(query, key, value, added)
            same(by_path((query, key, value), Keys(added), path), want, f"added by {path}")
    assert not sdpa(query, key, value, kept)[:, :, 5].view(torch.int16).any()
    hidden_key, hidden_value = key.clone(), value.clone()
    hidden_key[:, :, 40], hidden_value[:, :, 41] = math.nan, math.inf
    kept[..., 40:42] = False
    same(sdpa(query, hidden_key, hidden_value, kept), sdpa(query, key, value, kept), "NaN behind a hole")


@pytest.mark.parametrize("dtype", FEW)
def test_windows_padding_pages_and_sinks(dtype: torch.dtype) -> None:
    query, key, value = stress((4, 2), 90, 500, 64, dtype, 2)
    zero = torch.zeros((), dtype=torch.int32, device="cuda")
    for window in (1, 64, 100, 499):
        want = reference(query, key, value, causal_mask(90, 500, window), first=zero)
        same(attention(query, key, value, window=window), want, f"a window of {window}")
        got = by_path((query[:, :, -1:], key, value), Keys(None, True, 499, window), "decode")
        same(got, want[:, :, -1:], f"a window of {window} in decode")
    starts = torch.tensor([10, 170], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([500, 333], dtype=torch.int32, device="cuda")
    pages = torch.randperm(80, device="cuda").to(torch.int32).view(2, 40)
    caches = [torch.full((80, 16, 2, 64), math.nan, dtype=dtype, device="cuda") for _ in range(2)]
    sinks = torch.tensor([-3.0, 0.5, 4.0, 80.0], dtype=dtype, device="cuda")
    for sequence, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        own = (query[sequence : sequence + 1], key[sequence : sequence + 1], value[sequence : sequence + 1])
        cut = (own[0], own[1][:, :, start:length], own[2][:, :, start:length])
        want = reference(*cut, causal_mask(90, length - start))
        padded = [torch.full_like(t, math.nan) for t in (key, value)]
        for t, source in zip(padded, own[1:], strict=True):
            t[sequence, :, start:length] = source[0, :, start:length]
        got = attention(query, *padded, starts=starts, lengths=lengths)
        same(got[sequence : sequence + 1], want, "left and right padding")
        at = torch.arange(500, device="cuda")
        end = length - 90 + 1 + torch.arange(90, device="cuda")[:, None]
        seen = ((at >= start) & (at < end)).expand(2, 1, 90, 500)
        same(sdpa(query, *padded, seen)[sequence : sequence + 1], want, "the same by a mask")
        for cache, t in zip(caches, own[1:], strict=True):
            for n in range(length):
                cache[pages[sequence, n // 16], n % 16] = t[0, :, n]
    for sequence, length in enumerate(lengths.tolist()):
        own = (
            query[sequence : sequence + 1],
            key[sequence : sequence + 1, :, :length],
            value[sequence : sequence + 1, :, :length],
        )
        want = reference(*own, causal_mask(90, length), sinks=sinks)
        got = paged_attention(query, caches[0], caches[1], pages, lengths, sinks=sinks)
        same(got[sequence : sequence + 1], want, "pages and sinks")
        got = paged_attention(query[:, :, -1:], caches[0], caches[1], pages, lengths, sinks=sinks)
        same(got[sequence : sequence + 1], want[:, :, -1:], "pages and sinks in decode")
        differ(want, reference(*own, causal_mask(90, length)))


def test_covered_forms() -> None:
    """The backends' own operations give the same bytes, and the log of each row's sum."""
    query, key, value = stress((4, 4), 100, 100, 64, torch.bfloat16)
    want = reference(query, key, value, causal_mask(100, 100))
    scores = (query.double() @ key.double().mT / 8 + causal_mask(100, 100)).logsumexp(-1)
    for name, arguments in (
        ("flash", (0.0, True)),
        ("efficient", (None, True, 0.0, True)),
        ("cudnn", (None, True, 0.0, True)),
    ):
        out, lse, *_ = COVERED[f"aten::_scaled_dot_product_{name}_attention"](query, key, value, *arguments)
        same(out, want, name)
        assert (lse.double() - scores).abs().max().item() < 1e-3


def test_torch_itself_differs() -> None:
    """The control: a prompt goes to torch's flash kernel, which takes no mask; a step on a static cache goes to others, which
    give other bytes."""
    query, key, value = stress((8, 8), 700, 700, 64, torch.bfloat16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        whole = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    steps = range(300, 700, 7)
    for backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            rows = [
                F.scaled_dot_product_attention(
                    query[:, :, at : at + 1], key, value, (torch.arange(700, device="cuda") <= at)[None]
                )
                for at in steps
            ]
        differ(torch.cat(rows, 2), whole[:, :, list(steps)].contiguous())


def test_layouts_and_refusals() -> None:
    query, key, value = stress((4, 2), 33, 77, 64, torch.bfloat16, 2)
    want = sdpa(query, key, value)
    across = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    got = sdpa(*across)
    same(got, want, "heads inside of tokens")
    assert got.stride() == across[0].stride()
    same(sdpa(*(t.mT.contiguous().mT for t in (query, key, value))), want, "columns")
    same(sdpa(query[0], key[0], value[0]), want[0], "three dimensions")
    same(sdpa(query, key, value, scale=-0.125), reference(-query, key, value), "a negative scale")
    square = query, key[:, :, :33], value[:, :, :33]
    flat = sdpa(*square, is_causal=True, scale=0.0)  # a masked score times 0 would be NaN
    same(flat, reference(*square, causal_mask(33, 33), scale=0.0), "a scale of 0")
    same(sdpa(query, key[:, :, :0], value[:, :, :0]), torch.zeros_like(want), "no keys")
    with pytest.raises(UnsupportedDtype, match="float64"):
        sdpa(query.double(), key.double(), value.double())
    with pytest.raises(RefusedError, match="dropout"):
        sdpa(query, key, value, None, 0.5)
    with pytest.raises(RefusedError, match="a depth of 320"):
        sdpa(*(t.repeat(1, 1, 1, 5) for t in (query, key, value)))
    with pytest.raises(UsageError, match="one GPU"):
        sdpa(query, key.cpu(), value)
    with pytest.raises(UsageError, match="leave out window"):
        attention(query, key, value, mask=torch.ones(33, 77, dtype=torch.bool, device="cuda"), window=4)
    with pytest.raises(UsageError, match=r"lengths is torch\.int64"):
        attention(query, key, value, lengths=torch.tensor([7, 7], device="cuda"))
