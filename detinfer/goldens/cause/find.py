"""From a divergence of a sweep to its cause: both runs made again, and watched."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from detinfer import bits
from detinfer.goldens import merge
from detinfer.goldens.axes import AXES, SWEPT
from detinfer.goldens.cause import align, packed
from detinfer.goldens.cause.layers import Calls, first_layer
from detinfer.goldens.cause.locate import Located, by_batch, by_spans, locate
from detinfer.goldens.cause.operations import Run, Watch, watch
from detinfer.goldens.collect import phase
from detinfer.goldens.compare import compare
from detinfer.goldens.replay import Replay
from detinfer.goldens.result import Divergence
from detinfer.goldens.runner import Request, Target, run
from detinfer.goldens.schedules import Model, Way
from detinfer.goldens.sweep import EDGES, Key, Trial
from detinfer.models.ranks import ALONE, Ranks


def find(
    target: Target,
    requests: Sequence[Request],
    units: Sequence[Replay],
    trials: Sequence[Trial],
    first: Divergence,
    seed: int,
    ranks: Ranks = ALONE,
) -> Located | None:
    """The operation behind ``first``, a divergence of these trials or of an axis; None where it cannot be told.

    Call it under the policy (or without one) that the divergence was found under; ``units`` hold their arguments. On
    several ranks all call it together with the same ``first`` (``together``), and each gets the same cause.
    """
    axis = first.axis.partition(":")[0]
    if axis and axis not in SWEPT:
        return _of_axis(target, requests, axis, first, seed, ranks)
    trial = next((trial for trial in trials if trial.number == first.trial), None)
    if trial is None:
        return None
    unit = next((unit for unit in units if unit.name == first.unit), None)
    if first.kind == "model":
        return _of_model(target, requests, trial, first, ranks)
    return _of_unit(unit, trial, first, ranks)


def together(ranks: Ranks, own: Divergence | None, names: Mapping[str, int]) -> Divergence | None:
    """The divergence that all ranks search the cause of, each of which met its ``own``: the one that a result names."""
    return merge.first(ranks.share(own), names) if ranks.size > 1 else own


def _of_unit(unit: Replay | None, trial: Trial, first: Divergence, ranks: Ranks) -> Located | None:
    keys = [(request, first.step) for request in trial.batch]
    row = first.position or 0
    own = (first.request, first.step)
    part: list[Key] | None = None
    if unit is not None:
        part = next((p for p in unit.companies(keys) if len(p) == first.batch and p[row] == own), None)
    if ranks.any(part is None) or unit is None or part is None:
        return None
    unit.alone.setdefault(own, unit.run([own]))
    found = locate(
        lambda _: _run(unit, [own]),
        lambda _: _run(unit, part),
        by_batch(len(part), row),
        unit.name,
        ranks=ranks,
    )
    if found is None:
        return None
    batch, members = _smallest(unit, part, own, ranks)
    return replace(found, cause=replace(found.cause, batch=batch, requests=members))


def _run(unit: Replay, keys: Sequence[Key]) -> None:
    unit.run(keys)


def _smallest(unit: Replay, part: Sequence[Key], own: Key, ranks: Ranks) -> tuple[int, list[int]]:
    """The least number of rows of which one differs from the row alone on any rank, and the requests in them."""
    for size in range(1, len(part) + 1):
        for keys in ([own] * size, list(part[:size])):
            for key in keys:
                unit.alone.setdefault(key, unit.run([key]))
            dimensions = unit.outputs_batch[phase(own[1])]
            if ranks.any(compare(unit.run(keys), unit.expected(keys), dimensions, size).differing > 0):
                return size, sorted({request for request, _ in keys})
    return len(part), sorted({request for request, _ in part})


def _of_model(
    target: Target, requests: Sequence[Request], trial: Trial, first: Divergence, ranks: Ranks
) -> Located | None:
    own, row = requests[first.request], first.position or 0

    def watched(batch: Sequence[Request]) -> Run:
        def go(mode: Watch) -> None:
            run(target, batch, lambda step: _numbered(mode, step))

        return go

    batch = [requests[index] for index in trial.batch]
    found = locate(watched([own]), watched(batch), by_batch(len(batch), row), ranks=ranks)
    if found is None:
        return None
    alone = run(target, [own])
    for size in [edge for edge in EDGES if edge < len(batch)]:
        for got, wanted in zip(run(target, [own] * size), alone, strict=True):
            one = wanted.get("tensor")
            if one is None or "tensor" not in got or got["tensor"].shape != (size, *one.shape[1:]):
                continue  # results whose shape is another with each batch
            whole = {"tensor": one.expand_as(got["tensor"])}
            if ranks.any(compare(got, whole).differing > 0):
                return replace(found, cause=replace(found.cause, batch=size, requests=[first.request]))
    return replace(found, cause=replace(found.cause, batch=len(batch), requests=sorted(set(trial.batch))))


class _numbered:
    """Tells the watch which step of the model is running."""

    def __init__(self, mode: Watch, step: int) -> None:
        self._mode, self._step = mode, step

    def __enter__(self) -> None:
        self._mode.call = self._step

    def __exit__(self, *_: object) -> None:
        pass


_ONLY = {"compiled": "as compiled", "graph": "under the graph's replay", "streams": "on other streams"}
"""Where bits differ on an axis whose steps agree when they are run eagerly."""


def _of_axis(
    target: Target, requests: Sequence[Request], name: str, first: Divergence, seed: int, ranks: Ranks
) -> Located | None:
    axis = next(axis for axis in AXES if axis.name == name)
    if axis.way is None or target.kind != "causal_lm":
        return None
    model, draw = Model(target, requests), f"{seed}/{name}/{first.trial}"
    if name == "paged":
        return packed.find(model, random.Random(draw), first.request, ranks)
    found = _of_way(model, axis.eager or axis.way, draw, first.request, ranks)
    if axis.eager is None:
        return found
    if found is not None:
        return found.noted("run eagerly, the same steps differ too")
    alike = (
        f"run eagerly, the same steps agree: bits differ only {_ONLY[name]}, and this is the first module that shows it"
    )
    return _of_layers(model, axis.way, draw, first.request, alike, ranks)


def _of_way(model: Model, way: Way, draw: str, request: int, ranks: Ranks) -> Located | None:
    calls: list[tuple[align.Sizes, list[align.Span]]] = []
    keys: set[int] = set()

    def other(mode: Watch) -> None:
        calls.clear()
        with _counted(model, mode, calls, keys):
            for rows in way(model, random.Random(draw)):
                spans = [
                    align.Span(row, part.at, part.start, part.end - part.start, part.gap, part.keys)
                    for row, part in enumerate(rows.parts)
                    if part.request == request
                ]
                calls[rows.call][1].extend(spans)

    watch(other)  # for the sizes, which say how long the run alone has to be
    taken = [size for many, _ in calls for size in (many.batch, many.tokens)]
    padded = _padded(model, request, [*taken, *keys])
    one = align.Sizes(1, len(padded), len(padded))
    sizes = list(calls)
    return locate(lambda _: _prefill(model, padded), other, by_spans(one, sizes), integers=False, ranks=ranks)


def _of_layers(model: Model, way: Way, draw: str, request: int, note: str, ranks: Ranks) -> Located | None:
    sizes = Calls(model.module)
    with sizes.watching():
        for _ in way(model, random.Random(draw)):
            pass
    padded = _padded(model, request, [size for many in sizes.sizes for size in (many.batch, many.tokens)])
    with Calls(model.module).watching() as alone:
        _prefill(model, padded)
    with Calls(model.module).watching() as calls:
        rows = way(model, random.Random(draw))
        one = align.Sizes(1, len(padded), len(padded))
        return first_layer(model.module, alone.outputs[0], one, request, rows, calls, note, ranks)


def _padded(model: Model, request: int, taken: Sequence[int]) -> list[int]:
    """A request's tokens and more, so many that their number is no other size: what comes after changes nothing before."""
    tokens = model.tokens[request]
    length = align.lonely(len(tokens), sorted(set(taken)))
    return [*tokens, *[tokens[-1]] * (length - len(tokens))]


def _prefill(model: Model, tokens: Sequence[int]) -> None:
    model([tokens])


@contextmanager
def _counted(model: Model, mode: Watch, calls: list[Any], keys: set[int]) -> Iterator[None]:
    """Number the calls of a model, and keep the sizes of each; ``keys``: how many any layer saw in any."""

    def before(_: Any, __: Any, ___: Any) -> None:
        mode.call = len(calls)

    def after(_: Any, __: Any, given: dict[str, Any], output: Any) -> None:
        batch, length = given["input_ids"].shape
        seen = _keys(output.past_key_values)
        keys.update(seen)
        calls.append((align.Sizes(batch, length, seen[0] if seen else 0), []))

    handles = [
        model.module.register_forward_pre_hook(before, with_kwargs=True),
        model.module.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@bits.unseen
def _keys(cache: Any) -> list[int]:
    """Keys that each layer of a call saw: the length of its cache, of slots where it has a fixed size."""
    layers = getattr(cache, "layers", None) or ()
    held = [
        layer[0] if isinstance(layer, tuple) else getattr(layer, "keys", None)
        for layer in (layers.values() if isinstance(layers, dict) else layers)
    ]
    return [int(keys.shape[-2]) for keys in held if keys is not None and keys.dim() > 2]
