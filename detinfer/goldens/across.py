"""A golden of one number of ranks against a run on another: shares of tensors are laid beside what they are shares of.

A unit's result is whole on every rank, or cut along one dimension, or each rank's part of a sum. Which it is shows from
the shapes of all ranks here and in the file: a dimension whose sizes add up to the same on both sides is one that is
cut, and the recorded shares joined along it are the whole, of which each rank compares its own slice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from detinfer import bits
from detinfer.goldens import tree
from detinfer.goldens.collect import WHOLE
from detinfer.goldens.compare import Rows, by_digests, compare
from detinfer.goldens.replay import Replay
from detinfer.goldens.result import AxisResult, Comparison, Tally
from detinfer.goldens.sweep import Key, divergence
from detinfer.goldens.tree import Node
from detinfer.models.ranks import Ranks

Shapes = dict[str, tuple[tuple[int, ...], str]]
"""By path of a node's tensors: shape and digest."""


class Unaligned(Exception):
    """Why a result cannot be laid beside the recorded one."""


@dataclass
class Recorded:
    """What the file has of one call: the node of every rank that recorded it, digests in place of tensors."""

    nodes: list[Node]

    def stored(self, golden: Any, path: str) -> list[torch.Tensor] | None:
        """A path's tensor on every recorded rank; None where the golden holds digests alone."""
        found = [golden.tensor(dict(tree.tensors(node))[path]) for node in self.nodes]
        return None if any(tensor is None for tensor in found) else found


@dataclass
class _Found:
    comparison: Comparison
    reasons: Counter[str] = field(default_factory=Counter)


def judge(
    golden: Any,
    alone: Iterable[tuple[Replay | None, Key, Node]],
    ranks: Ranks,
    *,
    promised: bool,
    command: str,
    model: str,
) -> tuple[Comparison, AxisResult]:
    """Compare what every unit and the whole model give alone with a file of another number of ranks.

    All ranks call it together. Without the promise (scope ``tp``) a difference is reported and is no failure. The file's
    verdict, and the axis ``tp``.
    """
    manifest = golden.manifest
    recorded = _recorded(manifest)
    results = [(unit, key, node) for unit, key, node in alone]
    shapes = ranks.share([shapes_of(node) for _, _, node in results])
    found = _Found(Comparison(verdict="same"))
    for number, (unit, key, node) in enumerate(results):
        name = WHOLE if unit is None else unit.name
        entry = recorded.get((name, key))
        if entry is None:
            found.reasons["not recorded on these ranks"] += 1
            continue
        here = [rank[number] for rank in shapes]
        tally = Tally(name, "model" if unit is None else unit.kind, model if unit is None else unit.type)
        rows = _compare(golden, entry, node, here, ranks.rank, found)
        if rows is not None and rows.first is not None and found.comparison.first is None:
            how = f"tp: {manifest.ranks} -> {ranks.size}"
            found.comparison.first = replace(
                divergence(tally, key[1], [key], rows, rows.first), command=command, axis=how
            )
    comparison = found.comparison
    many = f"recorded on {_ranks(manifest.ranks)}, verified on {_ranks(ranks.size)}"
    left = [f"{count:,} outputs not compared: {why}" for why, count in sorted(found.reasons.items())]
    if comparison.rows_differing:
        comparison.verdict = "diverged" if promised else "not_promised"
    elif not comparison.rows_compared:
        comparison.verdict = "vacuous"
    comparison.reasons = [f"{many}; scope {'tp promises' if promised else 'batch promises no'} equal bits", *left]
    axis = AxisResult(
        "tp",
        "the tensor-parallel size",
        comparison.verdict,
        comparison.calls,
        comparison.rows_compared,
        comparison.rows_differing,
        note=many,
        first=comparison.first if comparison.verdict == "diverged" else None,
    )
    return comparison, axis


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _recorded(manifest: Any) -> dict[tuple[str, Key], Recorded]:
    found: dict[tuple[str, Key], Recorded] = {}
    for unit in manifest.units:
        for call in unit["calls"] if unit["skipped"] is None else ():
            key = (unit["name"], (call["request"], call["step"]))
            found.setdefault(key, Recorded([])).nodes.append(call["outputs"])
    for request, steps in enumerate(manifest.outputs["results"]):
        for step, node in enumerate(steps):
            found[WHOLE, (request, step)] = Recorded([node])  # every rank had it, and rank 0 wrote it
    return found


@bits.unseen
def shapes_of(node: Node) -> Shapes:
    return {path: (tuple(tensor.shape), bits.digest(tensor)) for path, tensor in tree.tensors(node)}


@bits.unseen
def _compare(golden: Any, entry: Recorded, node: Node, here: Sequence[Shapes], mine: int, found: _Found) -> Rows | None:
    """Compare one call's outputs, path by path; the first path that differs."""
    first: Rows | None = None
    found.comparison.calls += 1
    for path, tensor in tree.tensors(node):
        try:
            rows = _path(golden, entry, path, tensor, here, mine)
        except Unaligned as error:
            found.reasons[str(error)] += 1
            continue
        found.comparison.rows_compared += rows.compared
        found.comparison.rows_differing += rows.differing
        if rows.first is not None and first is None:
            first = replace(rows, first=replace(rows.first, path=path))
    return first


def _path(golden: Any, entry: Recorded, path: str, tensor: torch.Tensor, here: Sequence[Shapes], mine: int) -> Rows:
    whole = beside(golden, entry, path, tensor, here, mine)
    if isinstance(whole, str):
        return by_digests({"tensor": tensor}, {"tensor": whole}, golden)
    return compare({"tensor": tensor}, {"tensor": whole})


def beside(
    golden: Any, entry: Recorded, path: str, tensor: torch.Tensor, here: Sequence[Shapes], mine: int
) -> torch.Tensor | str:
    """What the file has of rank ``mine``'s ``tensor``: the tensor, on the same device, or its digest where there is no more.

    ``here`` are all ranks' shapes and digests. Raises Unaligned where it cannot be laid beside the file.
    """
    digests = [dict(tree.tensors(node)).get(path) for node in entry.nodes]
    if None in digests or any(path not in rank for rank in here):
        raise Unaligned("another structure")
    shapes = [rank[path][0] for rank in here]
    if len(set(shapes)) == 1 and len({rank[path][1] for rank in here}) > 1 and len(here) > 1:
        partial = "each rank's part of a sum"
    else:
        partial = ""
    then = [tuple(golden.manifest.tensors[digest]["shape"]) for digest in digests]
    dim = cut(then, shapes)
    if dim is None:
        if partial or len(set(digests)) > 1:
            raise Unaligned(partial or "each recorded rank's part of a sum")
        stored: torch.Tensor | None = golden.tensor(digests[0])
        return str(digests[0]) if stored is None else stored.to(tensor.device)
    parts = entry.stored(golden, path)
    if parts is None:
        raise Unaligned("a share of a tensor of which the golden holds digests alone")
    whole = torch.cat(parts, dim)
    start = sum(shape[dim] for shape in shapes[:mine])
    return whole.narrow(dim, start, tensor.shape[dim]).to(tensor.device)


def cut(then: Sequence[Sequence[int]], now: Sequence[Sequence[int]]) -> int | None:
    """The dimension along which ranks hold shares, from their shapes then and now; None where every rank holds all.

    Raises Unaligned where neither is so.
    """
    if len({len(shape) for shape in [*then, *now]}) > 1:
        raise Unaligned("another number of dimensions")
    differing = [dim for dim in range(len(now[0])) if len({shape[dim] for shape in [*then, *now]}) > 1]
    if not differing:
        return None
    dim = differing[0]
    if len(differing) > 1 or sum(shape[dim] for shape in then) != sum(shape[dim] for shape in now):
        raise Unaligned(f"shapes {list(then[0])} and {list(now[0])} are no shares of one tensor")
    return dim
