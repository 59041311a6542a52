"""What a rank does in test_tensor_parallel.py: every model cut by its plan, rows alone and in a batch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parent))


def run(folder: str, names: list[str]) -> dict[str, Any]:
    """By model: rows, those that differ in the batch with the policy and without it, and what the ranks share."""
    import zoo

    from detinfer import bits, deterministic
    from detinfer.collectives.launch import join, place
    from detinfer.models import targets
    from detinfer.models.ranks import Spread

    mine = place()
    assert mine is not None
    found: dict[str, Any] = {}
    with join(mine, 300) as communicator:
        ranks = Spread(communicator)
        for name in names:
            target = targets.load(f"hf:{folder}/{name}", ranks=ranks)
            model: Any = target.module
            ids = zoo.tokens(5, 13)
            sides = []
            for policy in (deterministic("batch"), torch.no_grad()):
                with policy:
                    whole = model(ids).logits
                    alone = [model(ids[row : row + 1]).logits for row in range(5)]
                sides.append(
                    sum(bits.as_bytes(a[0]) != bits.as_bytes(row) for a, row in zip(alone, whole, strict=True))
                )
                if len(sides) == 1:
                    ranks.settle()
                    held = ranks.held.tensors, ranks.held.differing, ranks.held.first
                    logits = bits.digest(whole)
            ranks.settle()
            found[name] = {"policy": sides[0], "off": sides[1], "held": held, "logits": logits}
            found[name]["weights"] = target.weights_digest
        dist.destroy_process_group()
    return found
