"""Mixture of experts on CPU: bytes against the reference, ties, and orders that must not pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from detinfer import bits, deterministic
from detinfer.errors import UnsupportedDtype
from detinfer.ops import moe
from detinfer.ops.evidence import REFERENCE_NAME, from_values, to_values
from detinfer.reference import elementwise, matmul
from detinfer.reference import moe as reference
from detinfer.reference.arithmetic import rounded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HIDDEN, INNER, EXPERTS, TOKENS, CHOSEN = 21, 14, 5, 31, 3


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Both signs, exponents spread over eight powers of two."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.ldexp(rng.integers(-127, 128, shape) / 128, rng.integers(-7, 1, shape))).float()


def silu_gate(both: torch.Tensor) -> torch.Tensor:
    left, right = both.chunk(2, dim=-1)
    return torch.nn.functional.silu(left) * right


def clamped_gate(both: torch.Tensor) -> torch.Tensor:
    """gpt-oss's: interleaved, clamped, one added."""
    left, right = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
    return (right + 1) * (left * torch.sigmoid(left * 1.702))


def silu_of(both: Any, name: Any) -> Any:
    left, right = np.split(both, 2, axis=-1)
    return rounded(rounded(elementwise.unary("silu", left), name) * right, name)


def clamped_of(both: Any, name: Any) -> Any:
    left, right = np.minimum(both[..., ::2], np.float32(7)), np.clip(both[..., 1::2], np.float32(-7), np.float32(7))
    scale = rounded(elementwise.unary("sigmoid", rounded(left * np.float32(1.702), name)), name)
    return rounded(rounded(right + np.float32(1), name) * rounded(left * scale, name), name)


def case(dtype: torch.dtype, form: str) -> tuple[Any, ...]:
    """x, chosen, weights, layer and shared. Experts 0, 2 and 4 add A, A and -2A for every second token."""
    up, down = draw(1, EXPERTS, 2 * INNER, HIDDEN), draw(2, EXPERTS, HIDDEN, INNER)
    up[2::2] = up[0]
    down[0] *= 2.0**11
    down[2], down[4] = down[0], -2 * down[0]
    up_bias, down_bias = draw(3, EXPERTS, 2 * INNER), draw(4, EXPERTS, HIDDEN)
    up_bias[2::2] = up_bias[0]
    x, shared = draw(5, TOKENS, HIDDEN).to(dtype), draw(6, TOKENS, HIDDEN) / 64
    chosen = torch.from_numpy(reference.top_k(draw(7, TOKENS, EXPERTS).numpy(), CHOSEN))
    weights = draw(8, TOKENS, CHOSEN).abs()
    chosen[::2] = torch.tensor([0, 2, 4])
    weights[::2, 1], weights[::2, 2] = weights[::2, 0] * (1 + 5 / 2**19), weights[::2, 0]
    up, down, up_bias, down_bias = (t.to(dtype) for t in (up, down, up_bias, down_bias))
    if form == "gpt_oss":
        swapped = up.mT.contiguous(), down.mT.contiguous()
        return x, chosen, weights, moe.Experts(*swapped, clamped_gate, up_bias, down_bias, transposed=True), None
    return x, chosen, weights, moe.Experts(up, down, silu_gate), shared


@pytest.mark.parametrize("dtype", DTYPES, ids=bits.dtype_name)
@pytest.mark.parametrize("form", ["mixtral", "gpt_oss"])
def test_experts_have_the_references_bytes(form: str, dtype: torch.dtype) -> None:
    """All rows together, each alone, in any batch; other orders and roundings on the way give other bytes."""
    name = REFERENCE_NAME[dtype]
    x, chosen, weights, layer, shared = case(dtype, form)
    with deterministic("batch"):
        got = moe.experts(x, chosen, weights, layer, shared)
        for rows in ([i] for i in range(TOKENS)):
            part = None if shared is None else shared[rows]
            alone = moe.experts(x[rows], chosen[rows], weights[rows], layer, part)
            assert bits.as_bytes(alone) == bits.as_bytes(got[rows]), rows
        order = torch.from_numpy(np.random.default_rng(0).permutation(TOKENS)[:17])
        part = None if shared is None else shared[order]
        some = moe.experts(x[order], chosen[order], weights[order], layer, part)
        assert bits.as_bytes(some) == bits.as_bytes(got[order]), "17 rows in another order"

    values = to_values(x)
    outputs = np.zeros((TOKENS, CHOSEN, HIDDEN), np.float32)
    for token in range(TOKENS):
        for place, expert in enumerate(chosen[token].tolist()):
            (up, up_bias), (down, down_bias) = layer.product("up", expert), layer.product("down", expert)
            added = (None, None) if up_bias is None else (to_values(up_bias), to_values(down_bias))
            both = rounded(matmul.matmul(values[token : token + 1], to_values(up).T, added[0]), name)
            inner = (clamped_of if form == "gpt_oss" else silu_of)(both, name)
            outputs[token, place] = matmul.matmul(inner, to_values(down).T, added[1])[0]
    w, s = weights.numpy(), None if shared is None else shared.numpy()

    def stored(found: Any) -> bytes:
        return bits.as_bytes(from_values(found, dtype))

    assert stored(reference.combine(w, outputs, s)) == bits.as_bytes(got)
    assert stored(reference.combine(w[:, ::-1], outputs[:, ::-1], s)) != bits.as_bytes(got), "the last expert first"
    assert stored(reference.combine(w, rounded(outputs, "bfloat16"), s)) != bits.as_bytes(got), "experts rounded"
    rotated = reference.combine(np.roll(w, 1, 1), np.roll(outputs, 1, 1), s)
    assert stored(rotated) != bits.as_bytes(got), "experts rotated"


@pytest.mark.parametrize("dtype", DTYPES, ids=bits.dtype_name)
def test_topk_breaks_ties_by_the_lower_index(dtype: torch.dtype) -> None:
    """Under a policy torch.topk is the reference's, in every form; a router's last ties go to the first experts."""
    values = np.random.default_rng(1).integers(-2, 3, (200, 7)).astype(np.float32)
    values[0] = [1, 0, 1, -0.0, 1, 1, 1]
    values[1] = [0, -0.0, np.nan, 3, np.nan, np.inf, -1]
    x = from_values(values, dtype)
    for k, largest in ((3, True), (7, True), (1, False), (5, False)):
        wanted = torch.from_numpy(reference.top_k(values, k, largest))
        with deterministic("batch") as active:
            for form in (torch.topk, lambda *a, **kw: torch.topk(*a, **kw, sorted=False)):
                got, index = form(x, k, dim=-1, largest=largest)
                assert bits.as_bytes(index) == bits.as_bytes(wanted)
                assert bits.as_bytes(got) == bits.as_bytes(
                    torch.stack([row[i] for row, i in zip(x, wanted, strict=True)])
                )
            out = (torch.empty(0, dtype=dtype), torch.empty(0, dtype=torch.int64))
            torch.topk(x, k, largest=largest, out=out)
            assert bits.as_bytes(out[1]) == bits.as_bytes(wanted)
            columns = torch.topk(x.t(), k, dim=0, largest=largest)[1]
            assert bits.as_bytes(columns.t().contiguous()) == bits.as_bytes(wanted)
            assert torch.topk(x.to(torch.int64).abs(), 2)[1].shape == (200, 2)
        assert {d.path for (op, _), d in active.decisions.items() if op == "aten::topk"} >= {moe.PATH}
    highest = np.stack([np.argsort(row[::-1], kind="stable")[::-1][:3] for row in values[2:]])
    assert highest.tolist() != reference.top_k(values[2:], 3).tolist(), "ties stand among the values"


def test_topk_of_what_torch_refuses_is_torchs_own_error() -> None:
    with deterministic("batch"):
        with pytest.raises(RuntimeError, match="out of range"):
            torch.topk(torch.ones(3), 4)
        with pytest.raises(IndexError, match="range"):
            torch.topk(torch.ones(3), 1, dim=2)


def test_proofs() -> None:
    for dtype in DTYPES:
        cases, results = moe.prove("aten::topk", dtype)
        assert cases > 1000 and results
    with pytest.raises(UnsupportedDtype):
        moe.prove("aten::topk", torch.float64)
