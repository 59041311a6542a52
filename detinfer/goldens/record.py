"""Record a golden: every unit's inputs and outputs, the results and the tokens of each request run alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import detinfer
from detinfer import bits, environment, native
from detinfer.errors import Diverged, TargetError
from detinfer.goldens import tree
from detinfer.goldens.capture import Call, Skipped, changed, states
from detinfer.goldens.collect import WHOLE, Collected, Keep, Key, Shape, collect, nonfinite, phase, shapes
from detinfer.goldens.format import GoldenWriter
from detinfer.goldens.manifest import Manifest
from detinfer.goldens.runner import Request
from detinfer.goldens.tree import Node
from detinfer.goldens.units import pattern
from detinfer.models.ranks import ALONE, Ranks
from detinfer.models.targets import device_of
from detinfer.policy import Policy, deterministic

TensorsMode = Literal["full", "slice", "none"]
RUNS = 3
"""Each request is run alone this many times; a golden is written only when all agree."""


@dataclass(frozen=True)
class Recorded:
    """What was written."""

    path: Path
    units: int
    skipped: int
    calls: int
    tokens: list[list[int]]
    bytes: int


def record(
    target: Any,
    requests: Sequence[Request],
    path: Path,
    *,
    policy: Policy,
    inputs: dict[str, Any],
    layers: str | None = None,
    tensors: TensorsMode = "full",
    command: str = "",
    reason: str = "",
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    ranks: Ranks = ALONE,
    shard_bytes: int | None = None,
) -> Recorded | None:
    """Run each request alone three times under ``policy`` and write the golden to the folder ``path``.

    ``inputs`` is the manifest's account of the requests. Raises Diverged when a unit's own runs differ, TargetError
    for a layer whose output is not finite, draws random numbers or keeps state, RefusedError for an operation that
    the policy refuses. Nothing is written unless all is well.

    A tensor is written when its layer has run, in files of at most ``shard_bytes`` (1 GiB), so that memory does not grow
    with the golden. On several ``ranks`` all call this together; rank 0 writes what each recorded, the others hold
    theirs until then and return None.
    """
    matches = pattern(layers).search

    def chosen(name: str) -> bool:
        return matches(name) is not None

    with ExitStack() as stack:
        writer = stack.enter_context(GoldenWriter(path, overwrite, shard_bytes)) if ranks.rank == 0 else None
        with deterministic(policy) as active:
            progress("batch 2, for the shapes")
            shape = shapes(target, requests[0], chosen)
            if shape[WHOLE].reason is not None:
                raise TargetError(
                    f"the model's result {shape[WHOLE].reason}: a request needs one batch dimension throughout"
                )
            first = _runs(target, requests, chosen, progress, _Recorder(shape, writer, tensors))
        if not any(isinstance(call, Call) for calls in first.calls.values() for call in calls.values()):
            raise TargetError(f"no layer matches {layers!r}: nothing would be recorded")
        _check_held(ranks)
        everyone = ranks.share((first, shape, [*active.decisions_json(), *ranks.decisions()]), first=True)
        if writer is None:
            ranks.share(None)  # until rank 0 has written
            return None
        _check_results([found for found, _, _ in everyone])
        progress("writing")

        def write(name: str, node: Node) -> Node:  # what another rank holds; this one's are digests already
            store = _stores(tensors, name, shape)
            return tree.map_tensors(node, lambda _, held: held if isinstance(held, str) else writer.add(held, store))

        units = [
            unit if ranks.size == 1 else {**unit, "rank": rank}
            for rank, (found, shaped, _) in enumerate(everyone)
            for unit in _units(found, shaped, write)
        ]
        results = [
            [write(WHOLE, first.results[index, step]) for step in range(request.steps)]
            for index, request in enumerate(requests)
        ]
        for request in requests:  # a mask may be no layer's argument
            if request.arguments is not None:
                tree.map_tensors(request.arguments, lambda _, tensor: writer.add(tensor, tensors == "full"))
        tokens = [list(row) for row in first.tokens]
        manifest = Manifest(
            detinfer=detinfer.__version__,
            environment=environment.capture(native.isa(), target.libraries, device_of(target.module)).to_json(),
            target={
                "spec": target.spec,
                "kind": target.kind,
                "class": target.class_name,
                "dtype": bits.dtype_name(target.dtype),
                "weights_digest": target.weights_digest,
                "config_digest": target.config_digest,
            },
            inputs=inputs,
            policy=policy.to_json(),
            decisions=_joined([decisions for _, _, decisions in everyone]),
            tensors_mode=tensors,
            units=units,
            outputs={"tokens": tokens, "results": results, "batch": _shape_json(shape[WHOLE])},
            notes=[active.composed_norms],
            command=command,
            reason=reason,
            ranks=ranks.size,
        )
        written = writer.commit(manifest)
    if ranks.size > 1:
        ranks.share(None)
    return Recorded(
        path=written,
        units=sum(unit["skipped"] is None for unit in units),
        skipped=sum(unit["skipped"] is not None for unit in units),
        calls=sum(len(unit["calls"]) for unit in units),
        tokens=tokens,
        bytes=sum(file.stat().st_size for file in written.iterdir()),
    )


def _check_held(ranks: Ranks) -> None:
    ranks.settle()
    if ranks.held.differing:
        raise Diverged(
            f"{ranks.held.differing} of {ranks.held.tensors} sums over ranks are not the same on all ranks, first "
            f"{ranks.held.first}: no golden is written"
        )


@bits.unseen
def _check_results(everyone: Sequence[Collected]) -> None:
    """The whole model's results, which every rank has."""
    for rank, other in enumerate(everyone[1:], 1):
        for key, result in everyone[0].results.items():
            for (_, x), (_, y) in zip(tree.tensors(result), tree.tensors(other.results[key]), strict=True):
                if len({one if isinstance(one, str) else bits.digest(one) for one in (x, y)}) > 1:
                    raise Diverged(
                        f"the model's result: ranks 0 and {rank} differ at {phase(key[1])} step {key[1]} of request "
                        f"{key[0]}: no golden is written"
                    )


def _joined(decisions: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rank 0's decisions, then those that another rank alone has made."""
    found = {(one["op"], *one["dtypes"]): one for rank in reversed(decisions) for one in rank}
    order = dict.fromkeys((one["op"], *one["dtypes"]) for rank in decisions for one in rank)
    return [found[key] for key in order]


class _Recorder(Keep):
    """The first run: writes every tensor as it comes and keeps its digest; another rank than 0 keeps the tensors."""

    def __init__(self, shape: dict[str, Shape], writer: GoldenWriter | None, tensors: TensorsMode) -> None:
        self._shape, self.writer, self._tensors = shape, writer, tensors

    def call(self, key: Key, call: Call) -> Call:
        if where := nonfinite(call.outputs):
            raise TargetError(
                f"layer {call.name} gives a value that is not finite (request {key[0]}, {phase(key[1])} step {key[1]}: "
                f"{where}): equality of such outputs proves nothing; mend the model or leave the layer out with --layers"
            )
        arguments, outputs = (self._write(call.name, node) for node in (call.arguments, call.outputs))
        return replace(call, arguments=arguments, outputs=outputs)

    def result(self, key: Key, node: Node) -> Node:
        return self._write(WHOLE, node)

    def _write(self, name: str, node: Node) -> Node:
        writer, replayed = self.writer, _replayed(self._shape, name)
        if writer is None:
            return node
        if not replayed:  # nothing of it is in the golden, but the runs are compared
            return _digests(node)
        store = _stores(self._tensors, name, self._shape)
        return tree.map_tensors(node, lambda _, tensor: writer.add(tensor, store))


class _Again(Keep):
    """A later run: compares each call with the first run's as it ends, and keeps nothing of it."""

    def __init__(self, first: Collected, writer: GoldenWriter | None, number: int) -> None:
        self._first, self._writer, self._number = first, writer, number

    def call(self, key: Key, call: Call) -> Call:
        before = self._first.calls[key].get(call.name)
        if isinstance(before, Call):
            self._same(before.arguments, call.arguments, f"layer {call.name}, input", key)
            self._same(before.outputs, call.outputs, f"layer {call.name}, output", key)
        nothing: Node = {"value": None}
        return replace(call, arguments=nothing, outputs=nothing)

    def result(self, key: Key, node: Node) -> Node:
        self._same(self._first.results[key], node, "the model's result", key)
        return {"value": None}

    @bits.unseen
    def _same(self, before: Node, now: Node, what: str, key: Key) -> None:
        left, right = list(tree.tensors(before)), list(tree.tensors(now))
        for (path, x), (_, y) in zip(left, right, strict=True):
            if (x if isinstance(x, str) else bits.digest(x)) == bits.digest(y):
                continue
            held = x if not isinstance(x, str) else self._writer.kept(x) if self._writer is not None else None
            where: object = "other bytes"
            if held is not None:
                alike = held.shape == y.shape and held.dtype == y.dtype
                where = bits.first_mismatch(held, y) if alike else "another shape or dtype"
            raise Diverged(
                f"{what} {path}".rstrip()
                + f": runs 1 and {self._number} of request {key[0]} differ at {phase(key[1])} step {key[1]} "
                f"({where}): the model does not repeat itself on this machine, so no golden is written"
            )


def _replayed(shape: dict[str, Shape], name: str) -> bool:
    return name in shape and shape[name].reason is None


@bits.unseen
def _digests(node: Node) -> Node:
    return tree.map_tensors(node, lambda _, tensor: bits.digest(tensor))


def _stores(tensors: TensorsMode, name: str, shape: dict[str, Shape]) -> bool:
    return tensors == "full" or (tensors == "slice" and (name == WHOLE or name in _ends(shape)))


def _runs(
    target: Any,
    requests: Sequence[Request],
    chosen: Callable[[str], bool],
    progress: Callable[[str], None],
    recorder: _Recorder,
) -> Collected:
    """Every request alone, three times with the same bytes: what ``recorder`` keeps of the first run."""
    progress(f"run 1 of {RUNS}, alone")
    before = states(target.module)
    first = collect(target, requests, chosen, keep=recorder)
    follow = first.tokens or [() for _ in requests]
    requests = [replace(request, follow=follow[index]) for index, request in enumerate(requests)]
    for number in range(2, RUNS + 1):
        progress(f"run {number} of {RUNS}, alone")
        keep = _Again(first, recorder.writer, number)
        try:
            again = collect(target, requests, chosen, watch_state=number == RUNS, keep=keep)
        except Diverged as error:
            if moved := changed(before, states(target.module)):
                more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
                raise Diverged(f"{error}. What it keeps changed while it ran: {', '.join(moved[:3])}{more}") from None
            raise
        for key, calls in first.calls.items():
            for name, call in calls.items():
                if isinstance(call, Call) and not isinstance(again.calls[key].get(name), Call):
                    raise Diverged(f"layer {name} is called in run 1 but not in run {number}: no golden is written")
    return first


def _ends(shape: dict[str, Shape]) -> set[str]:
    """Names of the units in the first and the last block: what ``--tensors slice`` stores."""
    names = [name for name in shape if name != WHOLE]
    blocks = [name for name in names if shape[name].kind == "block"]
    ends = tuple(block + "." for block in {*blocks[:1], *blocks[-1:]})
    return {name for name in names if (name + ".").startswith(ends)} if ends else set(names[:1] + names[-1:])


def _shape_json(shape: Shape) -> dict[str, Any]:
    return {"arguments": shape.arguments, "outputs": shape.outputs}


def _units(found: Collected, shape: dict[str, Shape], write: Callable[[str, Node], Node]) -> list[dict[str, Any]]:
    """The manifest's units in the order in which their calls end: the innermost first."""
    units: dict[str, dict[str, Any]] = {}
    for (request, step), calls in found.calls.items():
        for name, call in calls.items():
            how = shape.get(name, Shape(reason="is not called at batch 1 and 2"))
            unit = units.setdefault(
                name,
                {
                    "name": name,
                    "kind": call.kind,
                    "type": call.type,
                    "batch": _shape_json(how),
                    "calls": [],
                    "skipped": call.reason if isinstance(call, Skipped) else how.reason,
                },
            )
            if isinstance(call, Call) and unit["skipped"] is None:
                unit["calls"].append(
                    {
                        "request": request,
                        "step": step,
                        "arguments": write(name, call.arguments),
                        "outputs": write(name, call.outputs),
                    }
                )
    return list(units.values())
