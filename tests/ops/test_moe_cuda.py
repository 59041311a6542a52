"""Mixtures of experts on a GPU: a token's bytes are those of the token alone, by the plain kernel and in every tile."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from detinfer import bits
from detinfer.bits import first_mismatch
from detinfer.errors import RefusedError, UnsupportedDtype, UsageError
from detinfer.ops import matmul_cuda, matmul_wide, moe, moe_cuda, moe_cuda_proof
from detinfer.ops.moe_cuda_proof import numbers, operands
from detinfer.reference import moe as reference

HALVES = moe_cuda.HALVES
SHAPES = {
    # experts, places, hidden, inner, transposed with biases
    "mixtral": (8, 2, 512, 1792, False),
    "qwen3_moe": (128, 8, 2048, 768, False),
    "gpt_oss": (32, 4, 2880, 2880, True),
    "odd": (5, 3, 51, 33, True),
}
pytestmark = pytest.mark.gpu


def silu_gate(both: torch.Tensor) -> torch.Tensor:
    left, right = both.chunk(2, dim=-1)
    return torch.nn.functional.silu(left) * right


def case(name: str, tokens: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """x, chosen, weights and layer; of three places or more, in odd tokens the last one has the first one's expert and nearly
    cancels it, both far greater than what is between."""
    experts, many, hidden, inner, transposed = SHAPES[name]
    x, up, up_bias = operands(tokens, experts, hidden, 2 * inner, dtype, transposed)
    _, down, down_bias = operands(1, experts, inner, hidden, dtype, transposed)
    random = np.random.default_rng(4)
    chosen = np.stack([random.permutation(experts)[:many] for _ in range(tokens)])
    chosen[tokens // 2 :] = chosen[0]  # a few experts have most of the tokens
    weights = numbers(5, tokens, many).abs()
    if many > 2:
        weights[1::2, 0] *= 2.0**12
        chosen[1::2, -1], weights[1::2, -1] = chosen[1::2, 0], -weights[1::2, 0] * (1 + 2.0**-19)
    if transposed:
        layer = moe.Experts(up.mT, down.mT, silu_gate, up_bias, down_bias, transposed=True)
    else:
        layer = moe.Experts(up, down, silu_gate)
    return x / 128, torch.from_numpy(chosen).cuda(), weights, layer


def places(name: str) -> int:
    """Of two places the sum has one order only."""
    return SHAPES[name][1]


def expect(found: torch.Tensor, expected: torch.Tensor, where: object = None) -> None:
    assert first_mismatch(found.cpu(), expected.cpu()) is None, (where, first_mismatch(found.cpu(), expected.cpu()))


@pytest.mark.parametrize("dtype", HALVES, ids=bits.dtype_name)
@pytest.mark.parametrize("name", SHAPES)
def test_a_token_does_not_see_the_others(name: str, dtype: torch.dtype) -> None:
    """Alone, in batches of every size to 40 at other places, beside experts with one token and with most of them."""
    tokens = 96
    x, chosen, weights, layer = case(name, tokens, dtype)
    whole = moe_cuda.experts(x, chosen, weights, layer, path="reference")
    assert bool(torch.isfinite(whole).all())
    assert torch.unique(whole.float().cpu(), dim=0).shape[0] == tokens, "tokens differ from each other"
    for rows in moe_cuda.TILE_ROWS:
        expect(moe_cuda.experts(x, chosen, weights, layer, tile_rows=rows, path="tile"), whole, f"tiles of {rows}")
    for rows in matmul_wide.ROWS:
        expect(moe_cuda.experts(x, chosen, weights, layer, tile_rows=rows, path="wide"), whole, f"wide tiles of {rows}")
    expect(moe.experts(x, chosen, weights, layer), whole, "the rule's own tiles")
    for count in itertools.chain(range(1, 41), (64, 95)):
        start = 13 * count % (tokens - count + 1)
        part = slice(start, start + count)
        expect(moe_cuda.experts(x[part], chosen[part], weights[part], layer), whole[part], count)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1)).cuda()
    expect(moe_cuda.experts(x[order], chosen[order], weights[order], layer), whole[order], "another order")
    turned = moe_cuda.experts(x, chosen.roll(1, 1), weights.roll(1, 1), layer)
    assert places(name) == 2 or first_mismatch(turned.cpu(), whole.cpu()) is not None, "the order would not show"


class Started:
    """Records the tiles of each start of ``wide``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        start = matmul_wide.Code.start
        monkeypatch.setattr(
            matmul_wide.Code, "start", lambda code, *args: (self.rows.append(code.kind.tile[0]), start(code, *args))
        )

    def during(self, call: Any, *args: Any) -> tuple[Any, set[int]]:
        self.rows.clear()
        return call(*args), set(self.rows)


@pytest.mark.usefixtures("capability_9")
@pytest.mark.parametrize("dtype", HALVES, ids=bits.dtype_name)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_many_tokens_run_wide(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On both sides of each number of tokens at which the rule takes other tiles: the plain kernel's bytes for every row."""
    tokens, (experts, many, *_) = 300, SHAPES[name]
    x, chosen, weights, layer = case(name, tokens, dtype)
    whole = moe_cuda.experts(x, chosen, weights, layer, path="reference")
    up = layer.up.mT if layer.transposed else layer.up
    straight = moe_cuda.product(x[:9], up, path="reference")
    assert (
        first_mismatch(moe_cuda.product(x[:9].flip(1), up.flip(2), path="reference").cpu(), straight.cpu()) is not None
    )
    expect(moe_cuda.experts(x, chosen, weights, layer), whole, "the proofs are made here")
    started = Started(monkeypatch)

    def expected(count: int) -> set[int]:
        return {moe_cuda.wide_rows(count * many, experts)} - {0}

    edges = [count for count in range(2, tokens) if expected(count) != expected(count - 1)]
    assert expected(1) == set() and expected(tokens) and edges
    for count in (1, *(at for edge in edges for at in (edge - 1, edge)), tokens):
        part = slice(tokens - count, tokens)
        found, seen = started.during(moe_cuda.experts, x[part], chosen[part], weights[part], layer)
        assert seen == expected(count), (count, "another path than the rule's")
        expect(found, whole[part], count)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(2)).cuda()
    expect(moe_cuda.experts(x[order], chosen[order], weights[order], layer), whole[order], "another order")


@pytest.mark.usefixtures("capability_9")
def test_a_capture_without_a_proof_runs_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled or proved inside a capture; once it was proved outside, ``wide`` runs there too."""
    x, chosen, weights, layer = case("mixtral", 128, torch.bfloat16)
    want = moe_cuda.experts(x, chosen, weights, layer, path="reference")
    monkeypatch.setattr(matmul_wide, "_codes", {})
    started = Started(monkeypatch)
    for proved in (False, True):
        if proved:
            expect(moe_cuda.experts(x, chosen, weights, layer), want)
            assert matmul_wide._codes
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found, seen = started.during(moe_cuda.experts, x, chosen, weights, layer)
        assert bool(seen) == proved and bool(matmul_wide._codes) == proved
        found.zero_()
        graph.replay()
        expect(found, want, proved)


@pytest.mark.usefixtures("capability_9")
def test_rows_of_one_weight_run_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared expert's product, which stays in fp32: the bytes of the plain kernel on both sides of the rule's edge."""
    x, w, bias = operands(200, 1, 704, 400, torch.bfloat16)
    want = moe_cuda.product(x, w, bias, path="reference", unrounded=True)
    expect(moe_cuda.product(x, w, bias, unrounded=True), want)
    started = Started(monkeypatch)
    for count in (127, 128, 129, 200):
        found, seen = started.during(moe.unrounded, x[:count], w[0], bias[0])
        assert bool(seen) == (count >= matmul_wide.LEAST_ROWS)
        expect(found, want[:count], count)


@pytest.mark.parametrize("dtype", HALVES, ids=bits.dtype_name)
def test_products_are_linears(dtype: torch.dtype) -> None:
    """Each row of a grouped product has the bytes of ``linear`` with its expert's weight, and is right."""
    x, w, bias = operands(60, 6, 264, 200, dtype)
    chosen = torch.from_numpy(np.random.default_rng(0).integers(0, 6, (60, 2))).cuda()
    groups = moe_cuda.Groups(chosen, 6)
    for across in (w, w.mT.contiguous().mT):
        found = moe_cuda.product(x, across, bias, groups, places=2)
        wide = moe_cuda.product(x, across, bias, groups, places=2, unrounded=True)
        expect(wide.to(dtype), found, "one rounding")
        for a, expert in enumerate(chosen.flatten().tolist()):
            row = x[a // 2 : a // 2 + 1]
            expect(found[a : a + 1], matmul_cuda.linear(row, w[expert], bias[expert], path="reference"), a)
            exact = row.double() @ w[expert].double().t()
            bound = row.double().abs() @ w[expert].double().abs().t() * 264 * 2.0**-23
            assert bool(((wide[a].double() - bias[expert].double() - exact).abs() <= bound).all())


def test_a_graph_replays_the_bytes() -> None:
    """Captured at decode: other experts at replay, no wait for the device on the way."""
    x, chosen, weights, layer = case("qwen3_moe", 8, torch.bfloat16)
    other = (chosen + 17) % 128
    wanted = [moe_cuda.experts(x, one, weights, layer) for one in (chosen, other)]
    static = chosen.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = moe_cuda.experts(x, static, weights, layer)
    for one, expected in zip((chosen, other), wanted, strict=True):
        static.copy_(one)
        graph.replay()
        expect(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=bits.dtype_name)
def test_topk(dtype: torch.dtype) -> None:
    assert moe_cuda.prove("aten::topk", dtype)[0] > 1000
    x = numbers(1, 3, 4, 9, dtype=dtype)
    for dim in (0, 1, 2, -1):
        values, index = moe_cuda.topk(x, 2, dim)
        expect(index, moe.topk(x.cpu(), 2, dim)[1], dim)
        expect(values, moe.topk(x.cpu(), 2, dim)[0], dim)
    assert moe_cuda.topk(x, 10) is NotImplemented


@pytest.mark.parametrize("dtype", HALVES, ids=bits.dtype_name)
def test_proof(dtype: torch.dtype) -> None:
    assert moe_cuda_proof.prove_experts(dtype)[0] > 10000


def test_what_does_not_fit() -> None:
    x, chosen, weights, layer = case("odd", 4, torch.bfloat16)
    chosen[2, 1] = 9
    found = moe_cuda.experts(x, chosen, weights, layer)
    assert bool(found[2].isnan().all()) and not bool(found[[0, 1, 3]].isnan().any()), "an expert that is not there"
    assert moe_cuda.experts(x[:0], chosen[:0], weights[:0], layer).shape == (0, 51)
    with pytest.raises(UnsupportedDtype):
        moe_cuda.product(x.float(), layer.up.float())
    with pytest.raises(UsageError, match="the last dimensions differ"):
        moe_cuda.product(x, layer.up)
    with pytest.raises(RefusedError, match="1024 at most"):
        moe_cuda.Groups(chosen, 1025)


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_the_sum_over_places_is_the_references(tokens: int) -> None:
    """The CPU's bytes: multiplications and additions alone."""
    weights, found, shared = numbers(1, tokens, 6), numbers(2, tokens, 6, 77), numbers(3, tokens, 77)
    found[:, 5], weights[:, 5] = -found[:, 0], weights[:, 0] * (1 + 2.0**-19)
    chosen = torch.zeros(tokens, 6, dtype=torch.int64, device="cuda")
    for dtype in (torch.float32, *HALVES):
        got = moe_cuda.combine(chosen, weights, found, 1, dtype, shared)
        values = reference.combine(weights.cpu().numpy(), found.cpu().numpy(), shared.cpu().numpy())
        expect(got, moe_cuda_proof.from_values(values, dtype))
        expect(got, moe.combine(weights.cpu(), found.cpu(), dtype, shared.cpu()))
