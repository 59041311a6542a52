"""``prefill_hopper`` without a GPU: its protocol and its order, byte for byte against the written one.

Products are chains in float32 on both sides here, the matrix unit's own sums being its own.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer.bits import first_mismatch

sys.path.append(str(Path(__file__).parent))
import gluon_emulated
from gluon_emulated import Pointer, Stuck, described, exp2, loaded, log2, product

BLOCK, LEAST, MOST, ROWS, STAGES, PROGRAMS = 64, 64, 4, 128, 2, 3
"""Splits of 64 keys up to 256 keys, of 128 up to 512, and so on: short ones, so that many meet; and few programs, so that each has
several tiles."""


@pytest.fixture(scope="module")
def kernel() -> tuple[Any, Any]:
    return emulated()


def emulated() -> tuple[Any, Any]:
    """The language, and the kernel with short splits."""
    gluon, module = loaded("attention_prefill_hopper")
    module.attention_triton.LEAST, module.attention_triton.MOST = LEAST, MOST
    return gluon, module


def drawn(
    heads: tuple[int, int], queries: int, keys: int, depth: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(keys)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, generator=draw) / 64

    query, key = integers(2, heads[0], queries, depth), integers(2, heads[1], keys, depth)
    value = torch.ldexp(
        integers(2, heads[1], keys, depth), torch.randint(-6, 2, (2, heads[1], keys, 1), generator=draw)
    )
    near, far = slice(1, keys // 2, 5), slice(1 + keys // 2, keys // 2 * 2, 5)  # large values of one weight that cancel
    key[:, :, far] = key[:, :, near]
    value[:, :, near] = integers(2, heads[1], len(range(keys)[near]), depth) * 512
    value[:, :, far] = -value[:, :, near]
    return query.bfloat16(), key.bfloat16(), value.bfloat16()


def called(kernel: tuple[Any, Any], given: tuple[torch.Tensor, ...], causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(the result, log of the sums) as a launch would have them; whatever is not written is NaN."""
    gluon, module = kernel
    q, k, v = given
    (batch, heads, queries, depth), (kv_heads, keys) = q.shape, k.shape[1:3]
    group, wide = heads // kv_heads, max(64, 1 << (depth - 1).bit_length())
    out = torch.full(q.shape, math.nan, dtype=q.dtype)
    lse = torch.full(q.shape[:3], math.nan)
    c = depth**-0.5 * math.log2(math.e)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3])
    tiles = -(-queries // (ROWS // group))
    gluon.run(
        module.prefill_hopper, (min(PROGRAMS, tiles * batch * kv_heads), 1),
        *map(Pointer, given), described(k, BLOCK, wide), described(v, BLOCK, wide), Pointer(out), Pointer(lse),
        tiles, batch * kv_heads, kv_heads, heads, queries, keys, keys - queries, c, *strides,
        group, 1, depth, depth, wide, wide, ROWS, causal, True, STAGES,
    )  # fmt: skip
    return out, lse


def written(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, backwards: bool = False, most: int = MOST
) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of docs/ops/attention.md, all rows at once; ``backwards`` and another ``most`` are wrong ones."""
    group, queries, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    c = torch.tensor(q.shape[3] ** -0.5 * math.log2(math.e))
    end = torch.arange(queries) + keys - queries + 1 if causal else torch.full((queries,), keys)
    length = torch.full((queries,), LEAST)
    for _ in range(9):
        length = torch.where(length * most < end, length * 2, length)
    nothing = torch.full(q.shape[:3], -math.inf)
    m, z, acc = nothing, torch.zeros(q.shape[:3]), torch.zeros(q.shape)
    done = []  # (rows at whose split's end it stands, maximum, sum, values)
    for n0 in range(0, keys, BLOCK):
        here = slice(n0, min(n0 + BLOCK, keys))
        fresh = (n0 % length == 0) & (n0 < end)
        done.append((fresh, m, z, acc))
        m, z, acc = torch.where(fresh, nothing, m), torch.where(fresh, 0, z), torch.where(fresh[:, None], 0, acc)
        seen = torch.arange(n0, n0 + BLOCK) < end[:, None]
        s = torch.zeros(*q.shape[:3], BLOCK)
        s[..., : here.stop - n0] = product(q, k[:, :, here].mT, torch.zeros(*q.shape[:3], here.stop - n0))
        s = s.masked_fill(~seen, -math.inf)
        new = torch.maximum(m, s.amax(-1) * c)
        base = torch.where(new == -math.inf, 0, new)
        p = exp2((s.double() * c.double() - base[..., None].double()).float()).masked_fill(~seen, 0.0)
        x = p
        for half in (32, 16, 8, 4, 2, 1):
            x = x[..., :half] + x[..., half:]
        a = exp2(m - base)
        z = (z.double() * a.double() + x[..., 0].double()).float()
        values = torch.where(seen[..., : here.stop - n0].any(0)[:, None], v[:, :, here], 0)
        acc = product(p[..., : here.stop - n0].to(q.dtype), values, acc * a[..., None])
        m = new
    done.append((torch.ones(queries, dtype=torch.bool), m, z, acc))
    top, total, out = nothing, torch.zeros(q.shape[:3]), torch.zeros(q.shape)
    for ends, m, z, acc in reversed(done) if backwards else done:
        new = torch.maximum(top, m)
        base = torch.where(new == -math.inf, 0, new)
        a, b = exp2(top - base), exp2(m - base)
        merged = (total.double() * a.double() + (z * b).double()).float()
        wide = (out.double() * a[..., None].double() + (acc * b[..., None]).double()).float()
        top, total = torch.where(ends, new, top), torch.where(ends, merged, total)
        out = torch.where(ends[:, None], wide, out)
    result = (out * (1 / total)[..., None] + 0.0).to(q.dtype)
    return result, (top + log2(total)) * 0.6931471805599453


def same(got: torch.Tensor, want: torch.Tensor, where: Any) -> None:
    found = first_mismatch(got, want)
    assert found is None, f"{where}: {found}"


@pytest.mark.parametrize("heads", [(4, 1), (3, 1), (2, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all keys"])
def test_the_order(heads: tuple[int, int], causal: bool, kernel: tuple[Any, Any]) -> None:
    """Every row of prompts that end on both sides of a tile, a block and a split, with more blocks than stages."""
    positions = ROWS // (heads[0] // heads[1])
    for queries, keys in ((1, 1), (positions, 64), (65, 65), (100, 128), (70, 70 + positions), (64, 320)):
        given = drawn(heads, queries, keys, 16)
        if causal and any(0 < at < queries and at % positions for at in (256 + queries - keys, 512 + queries - keys)):
            continue  # rows of a tile whose splits are of two lengths go by another kernel
        for what, got, want in zip(
            ("result", "sums"), called(kernel, given, causal), written(*given, causal), strict=True
        ):
            same(got, want, (what, queries, keys))
    given = drawn(heads, positions, 256, 16)
    want = written(*given, causal)[0]
    same(called(kernel, given, causal)[0], want, "many splits")
    assert first_mismatch(written(*given, causal, backwards=True)[0], want) is not None, "the order of splits shows"
    assert first_mismatch(written(*given, causal, most=2)[0], want) is not None, "their length shows"


def test_what_a_row_must_not_see(kernel: tuple[Any, Any]) -> None:
    """NaN and infinities behind a row change no bit of it, and a row that sees them has no finite value."""
    query, key, value = drawn((4, 1), 128, 128, 16)
    want = written(query, key, value, True)[0]
    key[:, :, 70:], value[:, :, 80:] = math.nan, math.inf
    got = called(kernel, (query, key, value), True)[0]
    same(got[:, :, :70], want[:, :, :70], "rows before")
    assert not got[:, :, 80:].isfinite().any()


def test_strides(kernel: tuple[Any, Any]) -> None:
    """[B, S, H, D] as models have it, and K and V that lie in a longer cache."""
    query, key, value = drawn((4, 2), 128, 128, 16)
    want = written(query, key, value, True)[0]
    longer = [torch.full((2, 200, 2, 16), math.nan, dtype=t.dtype) for t in (key, value)]
    for t, own in zip(longer, (key, value), strict=True):
        t[:, :128] = own.transpose(1, 2)
    given = (query.transpose(1, 2).contiguous().transpose(1, 2), *(t[:, :128].transpose(1, 2) for t in longer))
    same(called(kernel, given, True)[0], want, "transposed")


FREED = "        mbarrier.arrive(values_read.index(before), count=1)\n"
PRODUCT = "        product = warpgroup_mma(p, values.index(before)"
FAULTS = {
    "values are freed before they are read": [(FREED, ""), (PRODUCT, FREED + PRODUCT)],
    "values are never freed": [(FREED, "")],
    "values are awaited a phase early": [
        (
            "index(before), (done + j - 1) // STAGES & 1)",
            "index(before), ((done + j - 1) // STAGES & 1) ^ 1)",
        )
    ],
    "keys are awaited a phase early": [
        ("index(at), (done + j) // STAGES & 1)", "index(at), ((done + j) // STAGES & 1) ^ 1)")
    ],
    "a split is not merged": [
        (
            "            top, total, out = _merge(top, total, out, m, z, acc)\n            acc = gl",
            "            acc = gl",
        )
    ],
    "a tile's last values are kept": [("            mbarrier.arrive(values_read.index(last), count=1)\n", "")],
    "the ring begins anew with each tile": [("            done += blocks\n            last", "            last")],
    "the last block is left out": [("whole, blocks, length", "whole, blocks - 1, length")],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_show(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same checks on a kernel with one line changed: other bytes, or a group that waits for ever."""
    text = (gluon_emulated.OPS / "attention_prefill_hopper.py").read_text()
    for before, after in FAULTS[fault]:
        assert before in text, "the line is another now"
        text = text.replace(before, after, 1)
    for name in ("attention_triton", "attention_prefill_hopper"):
        (tmp_path / f"{name}.py").write_text((gluon_emulated.OPS / f"{name}.py").read_text())
    (tmp_path / "attention_prefill_hopper.py").write_text(text)
    monkeypatch.setattr(gluon_emulated, "OPS", tmp_path)
    monkeypatch.setattr(gluon_emulated, "PATIENCE", 1.0)
    given = drawn((2, 1), 300, 300, 16)  # blocks of a tile that do not go into the ring
    gluon, module = emulated()
    gluon.late = 0.002
    try:
        got = called((gluon, module), given, False)[0]
    except (Stuck, AssertionError) as stuck:
        print(stuck)
    else:
        assert first_mismatch(got, written(*given, False)[0]) is not None
