"""Run one unit of a model on its own, on one recorded call or on several put together into a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch.nn.functional as F
from torch import nn

from detinfer.errors import GoldenError
from detinfer.goldens import tree
from detinfer.goldens.batch import Dimensions, company, join
from detinfer.goldens.capture import outcome
from detinfer.goldens.collect import phase
from detinfer.goldens.tree import Node
from detinfer.goldens.units import ATTENTION_SUFFIX, module_units


@dataclass
class Replay:
    """A unit with its recorded calls: arguments by (request, step), and ``alone``, what it gives for each alone now."""

    name: str
    kind: str
    type: str
    arguments_batch: dict[str, Dimensions]
    outputs_batch: dict[str, Dimensions]
    module: nn.Module | None
    layers: frozenset[int]
    arguments: dict[tuple[int, int], Node] = field(default_factory=dict)
    alone: dict[tuple[int, int], Node] = field(default_factory=dict)
    _company: dict[tuple[int, int], str] = field(default_factory=dict)
    _flat: dict[str, dict[tuple[int, int], tuple[Node, dict[str, Any]]]] = field(default_factory=dict)

    def run(self, keys: Sequence[tuple[int, int]]) -> Node:
        """The node of the outputs of one batch, its rows being the calls ``keys`` in that order."""
        step = keys[0][1]
        joined = self._joined("arguments", keys, self.arguments_batch[phase(step)])
        args, kwargs = tree.decode(joined)
        call: Any = F.scaled_dot_product_attention if self.module is None else self.module
        output = call(*args, **kwargs)
        given = () if self.module is None else (args, kwargs)
        return tree.encode(outcome(output, given), self.layers)

    def expected(self, keys: Sequence[tuple[int, int]]) -> Node:
        """The outputs of the same calls alone, put together the same way."""
        return self._joined("alone", keys, self.outputs_batch[phase(keys[0][1])])

    def _joined(
        self, which: Literal["arguments", "alone"], keys: Sequence[tuple[int, int]], dimensions: Dimensions
    ) -> Node:
        nodes: dict[tuple[int, int], Node] = getattr(self, which)
        # A call's tensors are looked up once, not for every batch that it stands in.
        flat = self._flat.setdefault(which, {})
        for key in keys:
            if key not in flat or flat[key][0] is not nodes[key]:
                flat[key] = nodes[key], dict(tree.tensors(nodes[key]))
        return join([nodes[key] for key in keys], dimensions, [flat[key][1] for key in keys])

    def companies(self, keys: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """The calls, parted into batches whose members may stand together, their order kept."""
        parts: dict[str, list[tuple[int, int]]] = {}
        for key in keys:
            if key not in self._company:
                self._company[key] = company(self.arguments[key], self.arguments_batch[phase(key[1])])
            parts.setdefault(self._company[key], []).append(key)
        return list(parts.values())


def replays(model: nn.Module, units: Sequence[dict[str, Any]]) -> list[Replay]:
    """The replayable units of a manifest, bound to the model's modules; GoldenError when the model lacks one."""
    known = {unit.name: unit for unit in module_units(model).values()}
    found = []
    for unit in units:
        if unit["skipped"] is not None:
            continue
        name = unit["name"]
        base = name.partition("#")[0]
        module: nn.Module | None = None
        layers: frozenset[int] = frozenset()
        if unit["kind"] == "attention":
            owner = base.removesuffix(ATTENTION_SUFFIX)
            missing = owner != "model" and owner not in dict(model.named_modules())
        else:
            missing = base not in known
            if not missing:
                module, layers = known[base].module, known[base].layers
        if missing:
            raise GoldenError(f"the golden has the unit {name}, the model does not: it is a golden of another model")
        found.append(
            Replay(
                name=name,
                kind=unit["kind"],
                type=unit["type"],
                arguments_batch=unit["batch"]["arguments"],
                outputs_batch=unit["batch"]["outputs"],
                module=module,
                layers=layers,
            )
        )
    return found
