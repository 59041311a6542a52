"""The first cause where the number of ranks is another than the golden's: a module, and whether its sum over ranks did it.

Modules are compared in the order of execution. The first whose output differs from the recorded one while its inputs do not
is the cause. A row-parallel layer of scope ``tp`` is taken apart once more: the ranks' parts are added again here, in the
written order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from detinfer import bits
from detinfer.goldens import tree
from detinfer.goldens.across import Recorded, Unaligned, beside, shapes_of
from detinfer.goldens.cause import align
from detinfer.goldens.cause.locate import element
from detinfer.goldens.format import Golden
from detinfer.goldens.replay import Replay
from detinfer.goldens.result import Cause, Divergence
from detinfer.goldens.sweep import Key
from detinfer.goldens.tree import Node
from detinfer.models import row_parallel
from detinfer.models.parallel import AllReduce
from detinfer.models.ranks import Ranks
from detinfer.models.ranks_proof import SUBJECT
from detinfer.models.row_parallel import RowSum
from detinfer.models.tensor_parallel import SUMMED, styles

Outputs = list[tuple[torch.Tensor, Any]]
"""Tensors, and what the file has of each: a tensor, its digest, or None."""

_PRODUCT, _TREE = "aten::linear", f"{SUBJECT}.rank_tree"


def find(
    golden: Golden, module: nn.Module, units: Sequence[Replay], ranks: Ranks, first: Divergence | None
) -> Cause | None:
    """The cause of the first output that differs on any rank; ``first`` is this rank's own. All ranks call it together.

    None where nothing differs, where the whole model alone does, or where the golden holds digests alone.
    """
    order = {unit.name: number for number, unit in enumerate(units)}
    own = None if first is None or first.unit not in order else (order[first.unit], (first.request, first.step))
    met = [one for one in ranks.share(own) if one is not None]
    if not met:
        return None
    number, key = min(met)
    unit = units[number]
    recorded = _recorded(golden, unit.name, key)
    differing, unknown = _inputs(golden, recorded["arguments"], unit.arguments[key], ranks)
    outputs = _beside(golden, recorded["outputs"], unit.alone[key], ranks)
    many = f"{golden.manifest.ranks} then, {ranks.size} now"
    operation, note = _operation(module, unit, key, outputs, ranks, many, sound=not differing)
    cause = _cause(unit.name, outputs, operation, note)
    everyone = ranks.share(cause and replace(cause, inputs_differing=differing, inputs_unknown=unknown))
    named = [rank for rank, one in enumerate(everyone) if one is not None]
    return replace(everyone[named[0]], ranks=named if ranks.size > 1 else []) if named else None


def _recorded(golden: Golden, name: str, key: Key) -> dict[str, Recorded]:
    calls = [
        call
        for unit in golden.manifest.units
        if unit["name"] == name and unit["skipped"] is None
        for call in unit["calls"]
        if (call["request"], call["step"]) == key
    ]
    return {what: Recorded([call[what] for call in calls]) for what in ("arguments", "outputs")}


@bits.unseen
def _beside(golden: Golden, entry: Recorded, node: Node, ranks: Ranks) -> Outputs:
    """Every floating-point tensor of a node and what the file has of it."""
    here = ranks.share(shapes_of(node))
    found: Outputs = []
    for path, tensor in tree.tensors(node):
        if tensor.is_floating_point():
            try:
                found.append((tensor, beside(golden, entry, path, tensor, here, ranks.rank)))
            except Unaligned:
                found.append((tensor, None))
    return found


@bits.unseen
def _inputs(golden: Golden, entry: Recorded, node: Node, ranks: Ranks) -> tuple[list[int], list[int]]:
    """Which inputs differ on some rank, and which could be compared on none."""
    differing, unknown = set(), set()
    for number, (tensor, wanted) in enumerate(_beside(golden, entry, node, ranks)):
        if wanted is None:
            unknown.add(number)
        elif (bits.digest(tensor) != wanted) if isinstance(wanted, str) else not _same(tensor, wanted):
            differing.add(number)
    everyone = ranks.share((differing, unknown))
    return sorted(set().union(*(one for one, _ in everyone))), sorted(set().union(*(one for _, one in everyone)))


def _operation(
    module: nn.Module, unit: Replay, key: Key, outputs: Outputs, ranks: Ranks, many: str, sound: bool
) -> tuple[str, str]:
    """What of the unit it was, and in words; all ranks have the same module, and add its parts together."""
    forward = None if unit.module is None else vars(unit.module).get("forward")
    if sound and isinstance(forward, RowSum):
        args, _ = tree.decode(unit.arguments[key])
        x: torch.Tensor = args[0]
        total = row_parallel.tree([part.to(x.device) for part in ranks.share(forward.own(x).cpu())])
        wanted = outputs[0][1]
        if isinstance(wanted, torch.Tensor) and _same(forward.rounded(total, x.dtype), wanted):
            return _TREE, f"over ranks ({many}): added again in the written order, their parts give the recorded bytes"
        return (
            _PRODUCT,
            f"over ranks ({many}): added in the written order, their parts give other bytes than were recorded",
        )
    summed = isinstance(unit.module, AllReduce) or styles(module).get(unit.name.partition("#")[0]) in SUMMED
    if summed:
        return SUBJECT, f"a sum over ranks: {many}"
    return unit.type, f"over ranks ({many})"


@bits.unseen
def _cause(path: str, outputs: Outputs, operation: str, note: str) -> Cause | None:
    """The first element of a unit's outputs that differs on this rank."""
    for tensor, wanted in outputs:
        if isinstance(wanted, torch.Tensor) and not _same(tensor, wanted):
            return Cause(
                operation=operation,
                path=path,
                alone=align.shape([wanted]),
                other=align.shape([tensor]),
                note=note,
                **element(wanted, tensor),
            )
    return None


@bits.unseen
def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bits.count_mismatches(a.cpu(), b.cpu()) == 0
