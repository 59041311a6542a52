"""The built-in models: their layers against the reference, and every number of ranks, as threads."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detinfer import bits, deterministic
from detinfer.errors import TargetError
from detinfer.models import builtin, rope, targets
from detinfer.models.cache import KVCache
from detinfer.models.moe import Experts, TopK
from detinfer.models.ranks import ALONE, Ranks
from detinfer.models.weights import draw
from detinfer.ops.evidence import REFERENCE_NAME, from_values, to_values
from detinfer.reference import all_reduce, elementwise, matmul, moe
from detinfer.reference.arithmetic import rounded

sys.path.append(str(Path(__file__).parent))
import threads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = range(1, 9)


def tokens(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, builtin.VOCABULARY, shape))


def logits(
    size: int, ids: torch.Tensor, dtype: torch.dtype = torch.float32, add: Any = all_reduce.all_reduce
) -> tuple[list[torch.Tensor], threads.Together]:
    """builtin:moe on ``size`` ranks: the logits of each, and what the ranks added."""
    together = threads.Together(size, add)
    with deterministic("batch", uncovered="trust"):

        def work(ranks: Ranks) -> torch.Tensor:
            with torch.no_grad():
                found: torch.Tensor = builtin.build("moe", dtype, 0, ranks)(ids).logits
                return found

        return threads.run(together, work), together


# --- layers against the reference


def test_top_k_takes_the_lower_index_of_equal_logits() -> None:
    values = np.random.default_rng(1).integers(-2, 3, (200, 7)).astype(np.float32)
    values[0] = [1, 0, 1, 0, 1, 1, 1]
    weights, experts = TopK(3)(torch.from_numpy(values))
    wanted = moe.top_k(values, 3)
    assert wanted[0].tolist() == [0, 2, 4]
    assert bits.as_bytes(experts) == wanted.tobytes()
    highest = np.stack([np.argsort(row[::-1], kind="stable")[::-1][:3] for row in values])
    assert highest.tolist() != wanted.tolist(), "ties stand among the logits"
    assert weights.shape == (200, 3)
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_are_joined_in_the_contracts_order(dtype: torch.dtype) -> None:
    """Every row's bytes are the reference's; another order of the experts, or a rounding in between, gives others."""
    name, hidden, inner = REFERENCE_NAME[dtype], 15, 7
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    gate, up, down = (draw(0, part, 5, *shape).to(dtype) for part, shape in shapes.items())
    gate[2::2], up[2::2] = gate[0], up[0]  # experts 0, 2 and 4 add A, A and -2A
    down[0] *= 2.0**11
    down[2], down[4] = down[0], -2 * down[0]
    x = draw(1, "x", 3, 11, hidden).to(dtype)
    chosen = moe.top_k(draw(2, "logits", 33, 5).numpy(), 3)
    weights = draw(3, "weights", 33, 3).abs()
    chosen[::2], weights[::2, 1], weights[::2, 2] = [0, 2, 4], weights[::2, 0] * (1 + 5 / 2**19), weights[::2, 0]
    shared = draw(4, "shared", 3, 11, hidden) / 64
    module = Experts(gate, up, down)
    with deterministic("batch"):
        got = module(x, weights.view(3, 11, 3), torch.from_numpy(chosen).view(3, 11, 3), shared)
        alone = [
            module(x[i : i + 1, j : j + 1], weights.view(3, 11, 3)[i : i + 1, j : j + 1],
                   torch.from_numpy(chosen).view(3, 11, 3)[i : i + 1, j : j + 1], shared[i : i + 1, j : j + 1])
            for i in range(3) for j in range(11)
        ]  # fmt: skip
    assert bits.as_bytes(torch.cat(alone, 0)) == bits.as_bytes(got.view(33, 1, hidden)), "a token alone"

    rows = to_values(x).reshape(33, hidden)

    def product(values: Any, weight: torch.Tensor) -> Any:
        return matmul.matmul(values, to_values(weight).T)

    outputs = np.zeros((33, 3, hidden), np.float32)
    for token in range(33):
        for place in range(3):
            expert = chosen[token, place]
            row = rows[token : token + 1]
            left = rounded(product(row, gate[expert]), name)
            left = rounded(elementwise.unary("silu", left), name)
            both = rounded(left * rounded(product(row, up[expert]), name), name)
            outputs[token, place] = product(both, down[expert])[0]
    w, s = weights.numpy(), shared.numpy().reshape(33, hidden)

    def stored(values: Any) -> bytes:
        return bits.as_bytes(from_values(values, dtype).view(3, 11, hidden))

    wanted = moe.combine(w, outputs, s)
    assert stored(wanted) == bits.as_bytes(got)
    assert stored(moe.combine(w[:, ::-1], outputs[:, ::-1], s)) != bits.as_bytes(got), "last expert first"
    assert stored(moe.combine(w, rounded(outputs, "bfloat16"), s)) != bits.as_bytes(got), "experts rounded"
    first = s.copy()
    for place in range(3):
        first = first + w[:, place, None] * outputs[:, place]
    assert stored(first) != bits.as_bytes(got), "shared expert first"


def test_rotary_tables_are_the_functions_values() -> None:
    cos, sin = rope.tables(256, 10)
    for position in (0, 1, 17, 255):
        for i in range(5):
            angle = np.float32(position) * np.float32(10000.0 ** (-i / 5))
            assert cos[position, i].item() == pytest.approx(math.cos(angle), abs=3e-7)
            assert sin[position, i].item() == pytest.approx(math.sin(angle), abs=3e-7)
    x = draw(0, "x", 2, 3, 4, 10)
    turned = rope.rotate(x, cos[5:9], sin[5:9])
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert bits.as_bytes(rope.rotate(x, cos[:1], sin[:1])) == bits.as_bytes(x), "position 0 turns nothing"


# --- the models


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", builtin.NAMES)
def test_a_sequence_in_pieces_gives_the_same_bytes(name: str, dtype: torch.dtype) -> None:
    """Whole, in pieces of 5, 1 and 6, and token by token; each row alone and in a batch."""
    module, ids = builtin.build(name, dtype, 0, ALONE), tokens(3, 12)
    with deterministic("batch"):
        whole = module(ids).logits
        assert bool(torch.isfinite(whole).all())
        for cuts in ([5, 1, 6], [1] * 12):
            cache = KVCache()
            found = [module(piece, cache).logits for piece in ids.split(cuts, dim=1)]
            assert bits.as_bytes(torch.cat(found, 1)) == bits.as_bytes(whole)
        for row in range(3):
            assert bits.as_bytes(module(ids[row : row + 1]).logits) == bits.as_bytes(whole[row : row + 1])


def test_weights_of_a_seed_are_one_and_the_same() -> None:
    first, again, other = (targets.load("builtin:moe", seed=seed).weights_digest for seed in (0, 0, 1))
    assert first == again != other
    assert first == "04f240a4f0e9212f8e16fb036e0763ecc540ee6243d0680258f2e4ad4492f5f0", (
        "the generator gives other numbers here"
    )


@pytest.mark.parametrize(
    ("spec", "word"),
    [("builtin:mixtral", "built-in models are dense, moe"), ("builtin:", "built-in models are dense, moe")],
)
def test_unknown_names(spec: str, word: str) -> None:
    with pytest.raises(TargetError, match=word):
        targets.load(spec)


def test_nine_ranks_are_too_many() -> None:
    with pytest.raises(TargetError, match="8 at most"):
        builtin.build("moe", torch.float32, 0, threads.Thread(threads.Together(9), 0))


def test_positions_end_somewhere() -> None:
    with pytest.raises(TargetError, match="position 257"):
        builtin.build("dense", torch.float32, 0, ALONE)(tokens(1, 257))


# --- ranks


@pytest.mark.parametrize("size", SIZES)
def test_the_ranks_hold_the_whole_model_between_them(size: int) -> None:
    """Every byte of a row-parallel or column-parallel weight is on one rank, in order of rank."""
    whole = dict(builtin.build("moe", torch.float32, 0, ALONE).named_parameters())
    parts = [
        dict(builtin.build("moe", torch.float32, 0, threads.Thread(threads.Together(size), rank)).named_parameters())
        for rank in range(size)
    ]
    cut = {"q_proj": 0, "o_proj": 1, "gate_proj": 0, "down_proj": 1, "shared_down": 1, "shared_up": 0, "experts.up": 1}
    cut |= {"experts.gate": 1, "experts.down": 2, "shared_gate": 0, "up_proj": 0}
    seen = set()
    for name, tensor in whole.items():
        for part, dim in cut.items():
            if part in name:
                joined = torch.cat([rank[name] for rank in parts], dim)
                assert bits.as_bytes(joined) == bits.as_bytes(tensor), name
                assert min(rank[name].shape[dim] for rank in parts) > 0
                seen.add(part)
    assert seen == set(cut)


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_has_the_same_logits_and_they_are_the_models(size: int) -> None:
    """Bytes across ranks and in a batch; the value of one rank's model, which adds in another order; order shows."""
    ids = tokens(3, 6)
    found, together = logits(size, ids)
    assert {bits.as_bytes(one) for one in found} == {bits.as_bytes(found[0])}
    for row in range(3):
        assert bits.as_bytes(logits(size, ids[row : row + 1])[0][-1]) == bits.as_bytes(found[0][row : row + 1])
    alone = logits(1, ids)[0][0]
    assert float((found[0] - alone).abs().max()) < 0.1 * float(alone.abs().max())
    if size >= 3:
        assert bits.as_bytes(logits(size, ids, add=threads.rotated)[0][0]) != bits.as_bytes(found[0])
        for name, parts in together.parts:
            terms = [to_values(part) for part in parts]
            stored = [bits.as_bytes(from_values(all_reduce.rank_order(order), torch.float32))
                      for order in (terms, [*terms[1:], terms[0]])]  # fmt: skip
            assert stored[0] != stored[1], f"{name}: a rotated order gives the same bytes"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rotated_order_shows_in_every_dtype(dtype: torch.dtype) -> None:
    """In the logits of the whole model. (In 16 bits it takes ranks whose terms are all small: 3 ranks have none.)"""
    ids, size = tokens(2, 6), 3 if dtype == torch.float32 else 6
    found = logits(size, ids, dtype)[0]
    assert bool(torch.isfinite(found[0]).all())
    assert {bits.as_bytes(one) for one in found} == {bits.as_bytes(found[0])}
    assert bits.as_bytes(logits(size, ids, dtype, threads.rotated)[0][0]) != bits.as_bytes(found[0])
