"""Mixtures of experts of scope tp: experts joined in each group, groups by the tree, at every size, byte for byte."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detinfer import bits
from detinfer.collectives.launch import launch
from detinfer.errors import RefusedError, TargetError
from detinfer.models.ranks import ALONE
from detinfer.models.row_parallel import keep
from detinfer.models.row_parallel_experts import ExpertSum
from detinfer.policy import Guarantee, Policy, deterministic
from detinfer.reference import moe as reference_moe

HERE = Path(__file__).parent
sys.path.append(str(HERE))
from tp_groups import Together, joined, reference  # noqa: E402

EXPERTS, OUTPUTS, CHOSEN = 5, 24, 3


class Module(nn.Module):
    """What transformers' interface gives an experts module. The gate lets the first half through as it is."""

    has_gate, is_concatenated, has_bias, is_transposed = True, True, False, False

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(up, False), nn.Parameter(down, False)

    def _apply_gate(self, both: Tensor) -> Tensor:
        return both.chunk(2, dim=-1)[0]


class Share(Tensor):
    """A rank's share, which knows the whole's shape as transformers' does."""

    whole: Any

    @property
    def shape(self) -> Any:
        return self.whole

    def to_local(self) -> Tensor:
        return self.as_subclass(Tensor)


def share(module: Module, rank: int, size: int) -> Module:
    """Columns of the gate, then those of the other half; the inner columns of the down projections."""
    gate, up = module.gate_up_proj.chunk(2, dim=1)
    mine = Module(
        torch.cat([gate.chunk(size, 1)[rank], up.chunk(size, 1)[rank]], 1),
        module.down_proj.chunk(size, 2)[rank].clone(),
    )
    for name in ("gate_up_proj", "down_proj"):
        part = getattr(mine, name).detach().as_subclass(Share)
        part.whole = getattr(module, name).shape
        del mine._parameters[name]
        setattr(mine, name, part)
    return mine


def case(inner: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Module]:
    """x [tokens, inner], chosen and weights [tokens, 3], and experts whose inner values are x's, each expert's turned."""
    group = inner // count
    # Of opposite sign, in the first two groups: what is added before they meet is lost.
    large = [group - 1, 2 * group - 1]
    random = np.random.default_rng(count)
    x = torch.from_numpy(random.integers(64, 128, (5, inner)) / 128).float()
    x[:, large] = 1.0
    x = x.to(dtype)
    chosen = torch.from_numpy(np.stack([random.permutation(EXPERTS)[:CHOSEN] for _ in x]))
    weights = torch.from_numpy(random.integers(65, 128, chosen.shape) / 128).float().to(dtype)
    one = torch.eye(inner)
    up = torch.stack([torch.cat([one, one.roll(expert, 0)]) for expert in range(EXPERTS)]).to(dtype)
    down = torch.from_numpy(random.integers(-127, 128, (EXPERTS, OUTPUTS, inner)) / 2048).float()
    down[..., large] = torch.tensor([4096.0, -4096.0])
    return x, chosen, weights, Module(up, down.to(dtype))


def outputs(x: Tensor, chosen: Tensor, module: Module, columns: slice) -> Any:
    """fp32 [tokens, 3, OUTPUTS]: each chosen expert's chain over these inner columns."""
    found = np.zeros((*chosen.shape, OUTPUTS), np.float32)
    for token, experts in enumerate(chosen.tolist()):
        for place, expert in enumerate(experts):
            weight = module.down_proj[expert, :, columns].float()
            found[token, place] = reference(x[token : token + 1, columns].float(), weight, 1)[0].numpy()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=bits.dtype_name)
@pytest.mark.parametrize(("count", "sizes"), [(8, (1, 2, 4, 8)), (3, (1, 3)), (6, (1, 3, 6))])
def test_every_number_of_ranks_has_the_bytes_of_the_tree(
    count: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Explicit chains, experts in order of rank, the tree; any other order of these three would give other bytes."""
    inner = count * 6
    x, chosen, weights, module = case(inner, count, dtype)
    slices = [slice(start, start + 6) for start in range(0, inner, 6)]
    found = [outputs(x, chosen, module, columns) for columns in slices]
    share_of = weights.float().numpy()

    def combined(parts: list[Any]) -> Tensor:
        return joined([torch.from_numpy(reference_moe.combine(share_of, part, None)) for part in parts])

    summed = combined(found)
    wanted = bits.as_bytes(summed.to(dtype))
    with deterministic(Policy(Guarantee("tp"), groups=count)):
        for size in sizes:
            parts: list[Tensor] = []
            for rank in range(size):
                ExpertSum("layer", share(module, rank, size), Together(rank, size, parts), count)(x, chosen, weights)
            assert bits.as_bytes(joined(parts).to(dtype)) == wanted, f"{size} ranks"
        alone = ExpertSum("layer", module, ALONE, count)
        assert bits.as_bytes(alone(x, chosen, weights)) == wanted
        for row in range(len(x)):
            one = slice(row, row + 1)
            assert bits.as_bytes(alone(x[one], chosen[one], weights[one])) == bits.as_bytes(summed[one].to(dtype))
    others = {
        "groups rotated": combined([*found[1:], found[0]]),
        "one chain": combined([outputs(x, chosen, module, slice(0, inner))]),
        "experts' trees, then experts": torch.from_numpy(
            reference_moe.combine(share_of, joined([torch.from_numpy(part) for part in found]).numpy(), None)
        ),
        "experts rotated": joined(
            [
                torch.from_numpy(reference_moe.combine(np.roll(share_of, 1, 1), np.roll(part, 1, 1), None))
                for part in found
            ]
        ),
    }
    same = [name for name, other in others.items() if bits.as_bytes(other) == bits.as_bytes(summed)]
    assert same == []


def test_what_cannot_be_shared() -> None:
    """Groups that do not divide the inner columns, ranks that cannot share them, shares that are none."""
    _, _, _, module = case(24, 3, torch.float32)
    with pytest.raises(TargetError, match="24 inputs of a row-parallel layer cannot be cut into 5 groups"):
        ExpertSum("layer", module, ALONE, 5)
    with pytest.raises(TargetError, match="3 ranks cannot share 8 groups"):
        ExpertSum("layer", share(module, 0, 3), Together(0, 3, []), None)
    with pytest.raises(TargetError, match="inner columns of layer are not shared out evenly"):
        ExpertSum("layer", share(module, 0, 4), Together(0, 2, []), 2)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_which_models_keep_it() -> None:
    """Each mixture's experts modules; a shared expert that is cut too, and other sums over ranks, are refused."""
    import zoo

    for name in ("mixtral", "qwen3_moe", "qwen2_moe"):
        model, ids = zoo.build(name, torch.bfloat16), zoo.tokens(3, 7)
        keep(name, model, ALONE)
        kept = [part for part in model.modules() if isinstance(part.__dict__.get("forward"), ExpertSum)]
        assert len(kept) == 2
        with deterministic("tp"):
            whole = model(ids).logits
            assert bits.as_bytes(model(ids[1:2]).logits) == bits.as_bytes(whole[1:2]), "a row alone"
    for name, why in (("deepseek_v3", "a shared expert joins the others"), ("olmoe", "rowwise_split_input")):
        with pytest.raises(RefusedError, match=why):
            keep(name, zoo.build(name, torch.float32), ALONE)
    with pytest.raises(RefusedError, match="on meta: scope tp of a mixture of experts runs on CPU"):
        keep("qwen3_moe", zoo.build("qwen3_moe", torch.float32).to("meta"), ALONE)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_models_at_one_and_two_ranks(tmp_path: Path) -> None:
    """The logits and every module's result of models that transformers cut are those of the whole model."""
    import tp_scope
    import zoo

    names = ["mixtral", "qwen3_moe", "qwen2_moe"]
    for name in names:
        zoo.build(name, torch.bfloat16).save_pretrained(tmp_path / name)
    found = launch(tp_scope.run, 2, str(tmp_path), names, preload=("transformers", "detinfer.models.tensor_parallel"))
    assert isinstance(found, dict), "no rank left early"
    whole = tp_scope.whole(str(tmp_path), names)
    for rank in (0, 1):
        assert {name: one["logits"] for name, one in found[rank].items()} == whole["tp"]
        assert all(one["held"][0] >= 10 and one["held"][1:] == (0, "") for one in found[rank].values()), found[rank]
        assert all(one["batch"] != whole["batch"][name] for name, one in found[rank].items()), "scope batch differs"
