"""Put single requests together into one batch, and say which dimension of each tensor that is.

The batch dimension is found by running at batch 1 and at batch 2 and comparing shapes, never guessed: the dimension
whose size doubles. A tensor whose shape stays is shared by all rows of a batch (a causal mask, rotary angles), and
only requests whose shared tensors have the same bytes may stand in one batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from detinfer import bits
from detinfer.goldens.tree import Node, map_tensors, tensors

Dimensions = dict[str, "int | None"]
"""Path of a tensor -> its batch dimension, or None for a tensor that all rows share."""


class NoBatch(Exception):
    """The layer cannot be run on a batch of recorded requests; the message says why."""


def find(one: Node, two: Node) -> Dimensions:
    """The batch dimension of each tensor of a node, from the same call at batch 1 and at batch 2."""
    alone, paired = dict(tensors(one)), dict(tensors(two))
    if alone.keys() != paired.keys():
        raise NoBatch("other tensors are passed at batch 2 than at batch 1")
    found: Dimensions = {}
    for path, tensor in alone.items():
        before, after = tuple(tensor.shape), tuple(paired[path].shape)
        changed = [i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
        if len(before) != len(after) or len(changed) > 1 or any(after[i] != 2 * before[i] for i in changed):
            raise NoBatch(f"{path}: shape {list(before)} at batch 1 becomes {list(after)} at batch 2")
        found[path] = changed[0] if changed else None
    return found


@bits.unseen
def join(nodes: Sequence[Node], dimensions: Dimensions, held: Sequence[dict[str, torch.Tensor]] | None = None) -> Node:
    """One node whose batched tensors are those of ``nodes``, one after another; the rest is the first node's.

    ``held`` are the nodes' tensors by path, where the caller has them.
    """
    parts = held if held is not None else [dict(tensors(node)) for node in nodes]

    def leaf(path: str, tensor: torch.Tensor) -> torch.Tensor:
        dim = dimensions[path]
        return tensor if dim is None else torch.cat([one[path] for one in parts], dim)

    return map_tensors(nodes[0], leaf)


@bits.unseen
def company(node: Node, dimensions: Dimensions) -> str:
    """Requests with the same key may stand in one batch: equal shapes, values and shared tensors."""

    def leaf(path: str, tensor: torch.Tensor) -> list[object]:
        if dimensions[path] is None:
            return [bits.digest(tensor)]
        return [str(tensor.dtype), list(tensor.shape)]

    return json.dumps(map_tensors(node, leaf), sort_keys=True)
