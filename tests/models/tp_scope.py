"""What a rank does in test_row_parallel_experts.py: models cut by their plans, under scope tp and under scope batch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.append(str(Path(__file__).parent))


def logits(model: Any, scope: str) -> str:
    """The digest of a batch's logits."""
    import zoo

    from detinfer import bits, deterministic
    from detinfer.policy import Guarantee, Policy

    with deterministic(Policy(Guarantee(scope))):  # type: ignore[arg-type]
        return bits.digest(model(zoo.tokens(5, 9)).logits)


def whole(folder: str, names: list[str]) -> dict[str, dict[str, str]]:
    """By scope and model: what one rank has."""
    from detinfer.models import targets
    from detinfer.policy import Guarantee, Policy

    found: dict[str, dict[str, str]] = {"tp": {}, "batch": {}}
    for scope, by_name in found.items():
        for name in names:
            policy = Policy(Guarantee(scope))  # type: ignore[arg-type]
            by_name[name] = logits(targets.load(f"hf:{folder}/{name}", policy=policy).module, scope)
    return found


def run(folder: str, names: list[str]) -> dict[str, Any]:
    """By model: the logits under both scopes, and what the ranks share under scope tp."""
    from detinfer.collectives.launch import join, place
    from detinfer.models import targets
    from detinfer.models.ranks import Spread
    from detinfer.policy import Guarantee, Policy

    mine = place()
    assert mine is not None
    found: dict[str, Any] = {}
    with join(mine, 300) as communicator:
        for name in names:
            spec, ranks = f"hf:{folder}/{name}", Spread(communicator)
            batch = logits(targets.load(spec, ranks=ranks, policy=Policy(Guarantee("batch"))).module, "batch")
            ranks = Spread(communicator)
            model = targets.load(spec, ranks=ranks, policy=Policy(Guarantee("tp"))).module
            found[name] = {"batch": batch, "logits": logits(model, "tp")}
            ranks.settle()
            found[name]["held"] = ranks.held.tensors, ranks.held.differing, ranks.held.first
        dist.destroy_process_group()
    return found
