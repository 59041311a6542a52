"""Scope tp's row-parallel layers: the tree over groups, at every number of ranks that can share them, byte for byte."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from detinfer import bits
from detinfer.errors import RefusedError, TargetError
from detinfer.models import row_parallel
from detinfer.models.ranks import ALONE
from detinfer.models.row_parallel import RowLookup, RowSum, check, groups, keep, tree
from detinfer.policy import Guarantee, Policy, deterministic

sys.path.append(str(Path(__file__).parent))
from tp_groups import Together, cancelling, joined, reference


def cut(module: nn.Linear, rank: int, size: int) -> nn.Linear:
    """A rank's share: its columns of the weight, and the layer's own number of inputs."""
    share = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    share.weight = nn.Parameter(module.weight.chunk(size, 1)[rank].clone(), requires_grad=False)
    share.bias = module.bias
    return share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=bits.dtype_name)
@pytest.mark.parametrize(("count", "sizes"), [(8, (1, 2, 4, 8)), (3, (1, 3)), (6, (1, 3, 6)), (12, (1, 3, 6))])
def test_every_number_of_ranks_has_the_bytes_of_the_tree(
    count: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Each size against explicit chains and the tree; ranks in order, or begun at another, would give other bytes."""
    terms, outputs = count * 8, 5
    x, weight = (part.to(dtype) for part in cancelling(terms, outputs, count))
    whole = nn.Linear(terms, outputs, dtype=dtype)
    whole.weight = nn.Parameter(weight, requires_grad=False)
    whole.bias = nn.Parameter(torch.arange(outputs).to(dtype) / 4, requires_grad=False)
    summed = reference(x.float(), weight.float(), count)
    wanted = (summed + whole.bias.float()).to(dtype)
    shares = {size: [cut(whole, rank, size) for rank in range(size)] for size in sizes}
    with deterministic(Policy(Guarantee("tp"), groups=count)):
        for size in sizes:
            parts: list[Tensor] = []
            for rank in range(size):
                mine = x.chunk(size, 1)[rank]
                RowSum("layer", shares[size][rank], Together(rank, size, parts), count)(mine)
            got = (joined(parts) + whole.bias.float()).to(dtype)
            assert bits.as_bytes(got) == bits.as_bytes(wanted), f"{size} ranks"
        alone = RowSum("layer", whole, ALONE, count)(x)
        assert bits.as_bytes(alone) == bits.as_bytes(wanted)
        chains = [
            part.float() @ w.float().t() for part, w in zip(x.chunk(count, 1), weight.chunk(count, 1), strict=True)
        ]
    turned = joined([*chains[1:], chains[0]])
    assert bits.as_bytes(turned) != bits.as_bytes(summed), "a rotated order shows"
    whole_chain = reference(x.float(), weight.float(), 1)
    assert bits.as_bytes(whole_chain) != bits.as_bytes(summed), "and so does one chain of all"


def test_groups_do_not_depend_on_ranks() -> None:
    """The largest power of two up to 8, or the policy's number where it divides; which ranks can share them."""
    assert [groups(n) for n in (576, 1536, 100, 90, 77)] == [8, 8, 4, 2, 1]
    assert groups(576, 3) == 3
    with pytest.raises(TargetError, match="77 inputs"):
        groups(77, 3)
    works = {count: [n for n in range(1, 9) if not refused(count, n)] for count in (1, 3, 4, 6, 8)}
    assert works == {1: [1], 3: [1, 3], 4: [1, 2, 4], 6: [1, 3, 6], 8: [1, 2, 4, 8]}
    leaves = [torch.tensor([float(n)]) for n in (1, 2**25, -(2**25), 3, 5, 7)]
    # Three leaves a rank joined first are not the tree over six: why two ranks cannot share six groups.
    assert not torch.equal(tree([tree(leaves[:3]), tree(leaves[3:])]), tree(leaves))
    assert bits.as_bytes(tree([tree(leaves[:2]), tree(leaves[2:4]), tree(leaves[4:])])) == bits.as_bytes(tree(leaves))


def refused(count: int, size: int) -> bool:
    """Whether ``size`` ranks cannot share ``count`` groups."""
    try:
        check(count, size)
    except TargetError:
        return True
    return False


def test_a_missing_row_is_minus_zero() -> None:
    """Rows shared out over three ranks add up to the row itself, its -0 included; +0 for a missing one would lose it."""
    table = torch.tensor([[-0.0, 1.0], [2.0, -0.0], [-0.0, -0.0], [3.0, 0.0], [0.5, -0.5], [-0.0, 7.0]])
    ids = torch.tensor([[0, 5, 2], [3, 1, 4]])
    parts: list[Tensor] = []
    for rank in range(3):
        share = nn.Embedding(6, 2)
        share.weight = nn.Parameter(table[rank * 2 : rank * 2 + 2].clone(), requires_grad=False)
        RowLookup("table", share, Together(rank, 3, parts))(ids)
    assert bits.as_bytes(joined(parts)) == bits.as_bytes(table[ids])
    zeros = joined([torch.where(part == 0, torch.zeros(()), part) for part in parts])
    assert bits.as_bytes(zeros) != bits.as_bytes(table[ids])


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_which_models_keep_it() -> None:
    """A dense plan is kept, on every row-parallel layer; other sums and models without a plan are refused."""
    import zoo

    llama = zoo.build("llama", torch.float32)
    ids = zoo.tokens(3, 7)
    with deterministic("batch"):
        before = llama(ids).logits
    keep("llama", llama, ALONE)
    with deterministic("tp"):
        after = llama(ids).logits
        assert bits.as_bytes(llama(ids[1:2]).logits) == bits.as_bytes(after[1:2]), "a row alone"
    assert bits.as_bytes(before) != bits.as_bytes(after), "groups are another order"
    kept = [
        name for name, part in llama.named_modules() if isinstance(part.__dict__.get("forward"), row_parallel.RowSum)
    ]
    assert [name.rsplit(".", 1)[1] for name in kept] == ["o_proj", "down_proj"] * 2
    for name, why in (("olmoe", "rowwise_split_input"), ("gpt2", "no tensor-parallel plan")):
        with pytest.raises(RefusedError, match=why):
            keep(name, zoo.build(name, torch.float32), ALONE)
