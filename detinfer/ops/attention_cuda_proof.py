"""The proof of attention on a GPU: every path against the plain kernel, bytes, on inputs in which an order shows."""

from __future__ import annotations

import math

import torch

from detinfer.bits import first_mismatch
from detinfer.errors import Diverged
from detinfer.ops.attention_cuda import attention, paged_attention, reference, scaled_dot_product_attention
from detinfer.ops.attention_cuda_launch import Keys, run
from detinfer.ops.attention_deal import BY_RULE, Deal
from detinfer.ops.evidence import Evidence

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def stress(
    heads: tuple[int, int], queries: int, keys: int, depth: int, dtype: torch.dtype, batch: int = 1, seed: int = 1
) -> Inputs:
    """query [batch, H, queries, depth], key and value of Hkv heads on the GPU, on which the order of keys shows.

    ``heads`` is (H, Hkv). The scores spread over some units, so that weights of many sizes meet. Values have exponents
    spread over ten bits, and each sum of them has large terms of both signs, scattered over the keys, that cancel.
    """
    draw = torch.Generator("cuda").manual_seed(seed * 1000003 + keys * 1009 + depth)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=draw, device="cuda").float()

    q, k = integers(-255, 256, batch, heads[0], queries, depth), integers(-255, 256, batch, heads[1], keys, depth)
    q, k = q / 128, k / 128
    v = integers(-255, 256, batch, heads[1], keys, depth)
    v = torch.ldexp(v, integers(-14, -4, batch, heads[1], keys, 1))
    at = torch.randperm(keys, generator=draw, device="cuda")
    pairs = keys // 8
    large = integers(1, 256, batch, heads[1], pairs, depth) * 128
    v[:, :, at[:pairs]] = large
    v[:, :, at[pairs : 2 * pairs]] = -large
    k[:, :, at[pairs : 2 * pairs]] = k[
        :, :, at[:pairs]
    ]  # one weight for both: what is left shows what was rounded away
    return q.to(dtype), k.to(dtype), v.to(dtype)


def causal_mask(queries: int, keys: int, window: int = 0) -> torch.Tensor:
    """[queries, keys] fp32 on the GPU: 0 where row i, which is at position keys - queries + i, sees, else -inf."""
    at = torch.arange(keys, device="cuda")
    end = torch.arange(keys - queries + 1, keys + 1, device="cuda")[:, None]
    seen = (at < end) & (at >= (end - window if window else 0))
    return torch.zeros(queries, keys, device="cuda").masked_fill(~seen, -math.inf)


def exact(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    added: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in fp64, and a bound on the error of one that rounds its weights to the dtype and sums in fp32."""
    group = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if added is not None:
        scores = scores + added.double()
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : v.shape[2]]
    out = weights @ v
    unit = max(torch.finfo(query.dtype).eps, 2.0**-16)
    bound = (weights @ v.abs()) * (2 * unit) + out.abs() * unit + torch.finfo(torch.float32).tiny
    return out, bound


def check_close(
    got: torch.Tensor, inputs: Inputs, added: torch.Tensor | None, where: str, sinks: torch.Tensor | None = None
) -> None:
    """Diverged where a result is further from fp64 than rounding allows: an order may be kept and still be wrong."""
    out, bound = exact(*inputs, added, sinks)
    error = (got.double() - out).abs()
    if not bool((error <= bound).all()):
        worst = (error / bound).max().item()
        raise Diverged(f"attention on a GPU, {where}: {worst:.1f} times the error that rounding allows: report it")


def by_path(inputs: Inputs, keys: Keys, path: str, deal: Deal = BY_RULE) -> torch.Tensor:
    """A call held to one kernel, and decode to a number of splits for a program."""
    return run(*inputs, keys, None, None, False, path, deal)[0]


def prove(op: str, dtype: torch.dtype) -> tuple[int, bytes]:
    """Both kernels against the plain one: causal, in pieces, decode, masks with holes, a window, pages, NaN unseen."""
    evidence = Evidence(op, dtype)

    def expect(got: torch.Tensor, expected: torch.Tensor, where: str) -> None:
        evidence.expect(got.cpu(), expected.cpu(), where)

    inputs = stress((4, 1), 700, 700, 64, dtype, 2)
    query, key, value = inputs
    mask = causal_mask(700, 700)
    expected = reference(query, key, value, mask)
    check_close(expected, inputs, mask, "causal, 700 keys")
    for wrong in (reference(query, key, value, mask, backwards=True), reference(query, key, value, mask, split=128)):
        if first_mismatch(wrong.cpu(), expected.cpu()) is None:
            raise Diverged(f"{op} on {dtype}: the inputs do not show a wrong order, nothing was proved: report it")
    expect(scaled_dot_product_attention(*inputs, None, 0.0, True, enable_gqa=True), expected, "causal, 700 keys")
    many = ("tiles",) if dtype is torch.float32 else ("tiles", "prefill")
    late_key, late_value = key.clone(), value.clone()
    late_key[:, :, 650:], late_value[:, :, 660:] = math.nan, math.inf
    for path in many:
        for cut in (1, 63, 300):
            got = by_path((query[:, :, cut:], key, value), Keys(None, True, cut), path)
            expect(got, expected[:, :, cut:], f"the rows from {cut} by {path}")
        got = by_path((query, late_key, late_value), Keys(None, True), path)
        expect(got[:, :, :650], expected[:, :, :650], f"NaN behind a row by {path}")
    for at in (0, 1, 63, 64, 255, 256, 257, 511, 512, 699):
        row = (query[:, :, at : at + 1], key[:, :, : at + 1], value[:, :, : at + 1])
        for path in ("decode", "tiles"):
            expect(by_path(row, Keys(), path), expected[:, :, at : at + 1], f"one row on {at + 1} keys by {path}")
        for deal in (Deal(2), Deal(3), Deal(1, whole=True)):
            got = by_path(row, Keys(), "decode", deal)
            expect(got, expected[:, :, at : at + 1], f"one row on {at + 1} keys, {deal}")

    padded = [torch.full((2, t.shape[1], 960, 64), math.nan, dtype=dtype, device="cuda") for t in (key, value)]
    seen = torch.zeros(2, 1, 1, 960, dtype=torch.bool, device="cuda")
    for sequence, left in enumerate((37, 200)):
        seen[sequence, :, :, left : left + 700] = True
        for t, own in zip(padded, (key, value), strict=True):
            t[sequence, :, left : left + 700] = own[sequence]
    for path in ("decode", "tiles"):
        got = by_path((query[:, :, -1:], padded[0], padded[1]), Keys(seen.expand(2, 4, 1, 960)), path)
        expect(got, expected[:, :, -1:], f"padding by {path}")

    draw = torch.Generator("cuda").manual_seed(9)
    holes = torch.randint(0, 10, (700, 700), generator=draw, device="cuda") < 7
    holes[5] = False
    added = torch.where(holes, torch.arange(700, device="cuda") % 11 / 4, -math.inf)
    expect(scaled_dot_product_attention(*inputs, added, enable_gqa=True), reference(query, key, value, added), "a mask")
    first = torch.zeros((), dtype=torch.int32, device="cuda")
    windowed = reference(query, key, value, causal_mask(700, 700, 100), first=first)
    expect(attention(*inputs, window=100), windowed, "a window")
    pages = torch.randperm(64, generator=draw, device="cuda").to(torch.int32).view(2, 32)
    caches = [torch.full((64, 32, 1, 64), math.nan, dtype=dtype, device="cuda") for _ in range(2)]
    for t, own in zip(caches, (key, value), strict=True):
        for sequence in range(2):
            for page in range(22):
                rows = own[sequence, 0, page * 32 : page * 32 + 32]
                t[pages[sequence, page], : len(rows), 0] = rows
    lengths = torch.tensor([700, 700], dtype=torch.int32, device="cuda")
    for count in (1, 40):
        got = paged_attention(query[:, :, -count:], caches[0], caches[1], pages, lengths)
        expect(got, expected[:, :, -count:], f"a paged cache, {count} rows")
    return evidence.total()
