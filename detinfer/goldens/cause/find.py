"""From a divergence of a sweep to its cause: both runs made again, and watched."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from detinfer import bits
from detinfer.goldens.axes import AXES, SWEPT
from detinfer.goldens.cause import align
from detinfer.goldens.cause.locate import Located, by_batch, by_spans, locate
from detinfer.goldens.cause.operations import Run, Watch, watch
from detinfer.goldens.collect import phase
from detinfer.goldens.compare import compare
from detinfer.goldens.replay import Replay
from detinfer.goldens.result import Divergence
from detinfer.goldens.runner import Request, Target, run
from detinfer.goldens.schedules import Model
from detinfer.goldens.sweep import EDGES, Key, Trial


def find(
    target: Target,
    requests: Sequence[Request],
    units: Sequence[Replay],
    trials: Sequence[Trial],
    first: Divergence,
    seed: int,
) -> Located | None:
    """The operation behind ``first``, a divergence of these trials or of an axis; None where it cannot be told.

    Call it under the policy (or without one) that the divergence was found under; ``units`` hold their arguments.
    """
    axis = first.axis.partition(":")[0]
    if axis and axis not in SWEPT:
        return _of_axis(target, requests, axis, first, seed)
    trial = next((trial for trial in trials if trial.number == first.trial), None)
    if trial is None:
        return None
    unit = next((unit for unit in units if unit.name == first.unit), None)
    return _of_model(target, requests, trial, first) if unit is None else _of_unit(unit, trial, first)


def _of_unit(unit: Replay, trial: Trial, first: Divergence) -> Located | None:
    keys = [(request, first.step) for request in trial.batch]
    row = first.position or 0
    own = (first.request, first.step)
    part = next((p for p in unit.companies(keys) if len(p) == first.batch and p[row] == own), None)
    if part is None:
        return None
    unit.alone.setdefault(own, unit.run([own]))
    found = locate(lambda _: _run(unit, [own]), lambda _: _run(unit, part), by_batch(len(part), row), unit.name)
    if found is None:
        return None
    batch, members = _smallest(unit, part, own)
    return replace(found, cause=replace(found.cause, batch=batch, requests=members))


def _run(unit: Replay, keys: Sequence[Key]) -> None:
    unit.run(keys)


def _smallest(unit: Replay, part: Sequence[Key], own: Key) -> tuple[int, list[int]]:
    """The least number of rows of which one differs from the row alone, and the requests in them."""
    for size in range(1, len(part) + 1):
        for keys in ([own] * size, list(part[:size])):
            for key in keys:
                unit.alone.setdefault(key, unit.run([key]))
            dimensions = unit.outputs_batch[phase(own[1])]
            if compare(unit.run(keys), unit.expected(keys), dimensions, size).differing:
                return size, sorted({request for request, _ in keys})
    return len(part), sorted({request for request, _ in part})


def _of_model(target: Target, requests: Sequence[Request], trial: Trial, first: Divergence) -> Located | None:
    own, row = requests[first.request], first.position or 0

    def watched(batch: Sequence[Request]) -> Run:
        def go(mode: Watch) -> None:
            run(target, batch, lambda step: _numbered(mode, step))

        return go

    batch = [requests[index] for index in trial.batch]
    found = locate(watched([own]), watched(batch), by_batch(len(batch), row))
    if found is None:
        return None
    alone = run(target, [own])
    for size in [edge for edge in EDGES if edge < len(batch)]:
        for got, wanted in zip(run(target, [own] * size), alone, strict=True):
            whole = {"tensor": wanted["tensor"].expand_as(got["tensor"])} if "tensor" in wanted else None
            if whole is not None and compare(got, whole).differing:
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


def _of_axis(target: Target, requests: Sequence[Request], name: str, first: Divergence, seed: int) -> Located | None:
    axis = next(axis for axis in AXES if axis.name == name)
    if axis.way is None or not axis.located or target.kind != "causal_lm":
        return None
    way, request = axis.way, first.request
    model = Model(target, requests)
    calls: list[tuple[align.Sizes, list[align.Span]]] = []

    def other(mode: Watch) -> None:
        calls.clear()
        counted = _Counted(target, requests, mode, calls)
        for rows in way(counted, random.Random(f"{seed}/{name}/{first.trial}")):
            spans = [
                align.Span(row, part.at, part.start, part.end - part.start, part.gap, part.keys)
                for row, part in enumerate(rows.parts)
                if part.request == request
            ]
            calls[-1][1].extend(spans)

    watch(other)  # for the sizes, which say how long the run alone has to be
    taken = sorted({size for many, _ in calls for size in (many.batch, many.tokens, many.keys)})
    tokens = model.tokens[request]
    length = align.lonely(len(tokens), taken)
    padded = [*tokens, *[tokens[-1]] * (length - len(tokens))]  # what comes after changes nothing before
    one = align.Sizes(1, length, length)
    sizes = list(calls)
    return locate(lambda _: _prefill(model, padded), other, by_spans(one, sizes), integers=False)


def _prefill(model: Model, tokens: Sequence[int]) -> None:
    model([tokens])


class _Counted(Model):
    """A model whose calls are numbered, with the sizes of each."""

    def __init__(self, target: Target, requests: Sequence[Request], mode: Watch, calls: list[Any]) -> None:
        super().__init__(target, requests)
        self._mode, self._calls = mode, calls

    def __call__(self, rows: Sequence[Sequence[int]], cache: Any = None, **more: Any) -> tuple[Any, Any]:
        self._mode.call = len(self._calls)
        logits, cache = super().__call__(rows, cache, **more)
        self._calls.append((align.Sizes(len(rows), len(rows[0]), _keys(cache)), []))
        return logits, cache


@bits.unseen
def _keys(cache: Any) -> int:
    """Keys that a call saw: the length of the cache's first layer, of slots where it has a fixed size."""
    layers = getattr(cache, "layers", None) or ()
    for layer in layers.values() if isinstance(layers, dict) else layers:
        keys = layer[0] if isinstance(layer, tuple) else getattr(layer, "keys", None)
        if keys is not None and keys.dim() > 2:
            return int(keys.shape[-2])
    return 0
