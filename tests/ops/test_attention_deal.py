"""Decode with several splits to a program: the bytes of one split to a program, whatever the row and the call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer.bits import as_bytes
from detinfer.ops import attention_cuda_launch as launches
from detinfer.ops import attention_cuda_variants as variants
from detinfer.ops.attention_cuda import reference, scaled_dot_product_attention
from detinfer.ops.attention_cuda_launch import Keys
from detinfer.ops.attention_cuda_proof import by_path, causal_mask, stress
from detinfer.ops.attention_deal import Chip, Deal

COUNTS = (2, 3, 4, 8, 16)
SHAPES = ((2, 3), (2, 2), (4, 2), (2, 5))
"""Warps, stages of the pipeline."""


def test_interpreted_on_the_cpu() -> None:
    """Each deal gives the bytes of one split to a program: groups, ends of blocks and splits, masks, pages, windows, padding.

    The splits that a launch left, merged here one after the other, are its result; a program's own two merged first are not.
    """
    triton = pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.7.1")
    if triton.__version__ < "3.7":
        pytest.skip("the interpreter of Triton 3.6 does not take these kernels")
    program = Path(__file__).parent / "attention_deal_interpreted.py"
    here = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", program], env=here, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    cases: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    assert len(cases) == 21
    for name, case in cases.items():
        assert not case["other bytes"], f"{name}: other bytes with {case['other bytes']} splits to a program"
        assert case["in order"], f"{name}: the splits that were left are not the result"
        # Three splits merged by two first are merged in order.
        assert case["two first"] is (case["splits"] < 4), f"{name} would not show another association"
    assert sum(case["splits"] >= 4 for case in cases.values()) >= 12


def test_a_deal_needs_no_other_machine_code() -> None:
    """How many splits a program takes is a number: all counts above one are one kernel, which a growing row keeps."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.7.1")
    from detinfer.ops.attention_triton import decode

    (each,) = (parameter for parameter in decode.params if parameter.name == "each")
    assert each.do_not_specialize and not each.is_constexpr


def rows() -> Iterator[tuple[str, Any, Keys, torch.Tensor, bool]]:
    """(name, query, key and value, what is seen, the plain kernel's result, whether four splits or more are merged)."""
    for heads in ((4, 4), (8, 2), (8, 1)):
        for keys in (256, 257, 1023, 1025, 4096, 4097):
            inputs = stress(heads, 1, keys, 128, torch.bfloat16)
            yield f"{heads[0]} heads on {heads[1]}, {keys} keys", inputs, Keys(), reference(*inputs), keys > 768
    inputs = query, key, value = stress((8, 2), 3, 1300, 128, torch.bfloat16, 2)
    yield "three rows", inputs, Keys(None, True, 1297), reference(*inputs, causal_mask(3, 1300)), True
    zero = torch.zeros((), dtype=torch.int32, device="cuda")
    windowed = reference(*inputs, causal_mask(3, 1300, 900), first=zero)
    yield "a window", inputs, Keys(None, True, 1297, 900), windowed, True
    draw = torch.Generator("cuda").manual_seed(3)
    seen = torch.randint(0, 10, (2, 1, 3, 1300), generator=draw, device="cuda") < 7
    seen[1, :, 1], seen[0, :, :, :40] = False, False
    added = torch.zeros(seen.shape, device="cuda").masked_fill(~seen, -torch.inf)
    for mask in (seen, (added + torch.arange(1300, device="cuda") % 11 / 4).bfloat16()):
        want = reference(*inputs, added if mask is seen else mask)
        yield f"{mask.dtype}", inputs, Keys(mask.expand(2, 8, 3, 1300)), want, True
    starts, lengths = (torch.tensor(n, dtype=torch.int32, device="cuda") for n in ((10, 300), (1300, 1299)))
    at, end = torch.arange(1300, device="cuda"), lengths[:, None] - 2 + torch.arange(3, device="cuda")
    padded = (at >= starts[:, None, None]) & (at < end[..., None])
    padding = torch.zeros(padded.shape, device="cuda").masked_fill(~padded, -torch.inf)[:, None]
    yield "padding", inputs, Keys(None, True, 0, 0, starts, lengths), reference(*inputs, padding), False
    table = torch.randperm(2 * 82, generator=draw, device="cuda").to(torch.int32).view(2, 82)
    caches = [torch.full((164, 2, 16, 128), torch.nan, dtype=t.dtype, device="cuda") for t in (key, value)]
    for cache, t in zip(caches, (key, value), strict=True):
        filled = torch.full((2, 2, 82 * 16, 128), torch.nan, dtype=t.dtype, device="cuda")
        filled[:, :, :1300] = t
        cache[table.long()] = filled.view(2, 2, 82, 16, 128).transpose(1, 2)
    lengths = torch.tensor([1300, 1300], dtype=torch.int32, device="cuda")
    want = reference(*inputs, causal_mask(3, 1300))
    yield "pages", (query, *caches), Keys(None, True, 0, 0, None, lengths, table), want, True


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]} warps, {shape[1]} stages")
def test_every_deal_gives_the_plain_kernels_bytes(shape: tuple[int, int]) -> None:
    for name, inputs, keys, want, many in rows():
        for deal in (*(Deal(each, *shape) for each in (1, *COUNTS)), Deal(1, *shape, whole=True)):
            for _ in range(1 if deal.whole else 3):  # programs arrive in another order each time
                got = by_path(inputs, keys, "decode", deal)
                assert as_bytes(got.cpu()) == as_bytes(want.cpu()), f"{name}, {deal}"
        if many and keys.table is None and keys.added is None and not keys.window and inputs[0].shape[2] == 1:
            backwards = reference(*inputs, backwards=True)
            assert as_bytes(backwards.cpu()) != as_bytes(want.cpu()), f"{name} would not show another order"


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "batch"), [("SEVERAL", 14), ("WHOLE", 64)])
def test_other_deals_and_their_proofs(kind: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine code for several splits, and that for whole rows, is proved before its first result, once."""
    proved: dict[str, int] = {}
    monkeypatch.setattr(variants, "_proved", proved)
    monkeypatch.setattr(launches, "chip", lambda _: Chip(132, 227 << 10))
    inputs = stress((32, 8), 1, 1025, 128, torch.bfloat16, batch)
    launch = launches.plan(*inputs, Keys(), 128**-0.5, None, False)
    assert launch.constants[kind] and (launch.numbers[7] > 1) is (kind == "SEVERAL")
    first, _ = launch.start(*inputs, Keys())
    deals = len(variants.COUNTS) if kind == "SEVERAL" else 1
    assert len(proved) == 1 and min(proved.values()) >= 2 * deals * 1024
    want = reference(*inputs)
    assert as_bytes(first.cpu()) == as_bytes(want.cpu())
    query, key, value = inputs
    sdpa: Any = scaled_dot_product_attention
    for keys in (200, 600):
        again = sdpa(query, key[:, :, :keys], value[:, :, :keys], enable_gqa=True)
        assert as_bytes(again.cpu()) == as_bytes(reference(query, key[:, :, :keys], value[:, :, :keys]).cpu())
    assert len(proved) == 1, "a row that grows meets other machine code"
