"""One pass over all requests alone, with every unit's calls: what record writes and what verify recomputes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from detinfer import bits
from detinfer.goldens.batch import Dimensions, NoBatch, find
from detinfer.goldens.capture import Call, Capture, Skipped
from detinfer.goldens.runner import Request, Target, run, run_language_model
from detinfer.goldens.tree import Node, map_tensors, tensors

PHASES = ("prefill", "decode")
WHOLE = ""
"""Stands for the whole model where units are named."""


def phase(step: int) -> str:
    """``prefill`` for step 0, ``decode`` after."""
    return PHASES[min(step, 1)]


@dataclass
class Collected:
    """Calls by (request, step) and unit name, results by (request, step), greedy tokens by request."""

    calls: dict[tuple[int, int], dict[str, Call | Skipped]] = field(default_factory=dict)
    results: dict[tuple[int, int], Node] = field(default_factory=dict)
    tokens: list[tuple[int, ...]] = field(default_factory=list)


Key = tuple[int, int]
"""(request, step)"""


class Keep:
    """What is held of a call, and of a request's result at a step, once it has been seen: all of it."""

    def call(self, key: Key, call: Call) -> Call:
        """What is held of a call, when it ends."""
        return call

    def result(self, key: Key, node: Node) -> Node:
        """What is held of a result, when its request has been run."""
        return node


def collect(
    target: Target,
    requests: Sequence[Request],
    chosen: Callable[[str], bool],
    *,
    watch_state: bool = False,
    keep: Keep | None = None,
) -> Collected:
    """Run each request alone."""
    holder, here = keep or Keep(), (0, 0)
    capture = Capture(target.module, chosen, watch_state=watch_state, keep=lambda call: holder.call(here, call))
    found = Collected()
    for index, request in enumerate(requests):

        @contextmanager
        def around(step: int, index: int = index) -> Iterator[None]:
            nonlocal here
            here = index, step
            with capture.running():
                yield
            found.calls[index, step] = capture.calls

        if target.kind == "causal_lm":
            logits, tokens = run_language_model(target, [request], around)
            results: list[Node] = [{"tensor": step} for step in logits]
            found.tokens.append(tokens[0])
        else:
            results = run(target, [request], around)
        for step, result in enumerate(results):
            found.results[index, step] = holder.result((index, step), result)
    return found


@dataclass
class Shape:
    """How a unit's calls are put into a batch, phase by phase; ``reason`` says why they cannot be."""

    arguments: dict[str, Dimensions] = field(default_factory=dict)
    outputs: dict[str, Dimensions] = field(default_factory=dict)
    reason: str | None = None
    kind: str = ""


def shapes(target: Target, request: Request, chosen: Callable[[str], bool]) -> dict[str, Shape]:
    """Find every unit's batch dimensions, and the whole model's (``WHOLE``), by running at batch 1 and at batch 2."""
    probe = replace(request, steps=min(request.steps, 2))
    capture = Capture(target.module, chosen, copy=_without_values)
    seen: dict[tuple[int, int], dict[str, Call | Skipped]] = {}
    results: dict[int, list[Node]] = {}
    for size in (1, 2):

        @contextmanager
        def around(step: int, size: int = size) -> Iterator[None]:
            with capture.running():
                yield
            seen[size, step] = capture.calls

        results[size] = run(target, [probe] * size, around)
    found: dict[str, Shape] = {WHOLE: Shape()}
    try:
        for step, (alone_result, paired_result) in enumerate(zip(results[1], results[2], strict=True)):
            found[WHOLE].outputs[phase(step)] = find(alone_result, paired_result)
    except NoBatch as error:
        found[WHOLE].reason = f"cannot be put into a batch: {error}"
    for (size, step), calls in seen.items():
        if size != 1:
            continue
        for name, alone in calls.items():
            shape = found.setdefault(name, Shape(kind=alone.kind))
            paired = seen[2, step].get(name)
            if isinstance(alone, Skipped) or shape.reason is not None:
                shape.reason = shape.reason or (alone.reason if isinstance(alone, Skipped) else None)
            elif not isinstance(paired, Call):
                shape.reason = "is not called at batch 2"
            else:
                try:
                    shape.arguments[phase(step)] = find(alone.arguments, paired.arguments)
                    shape.outputs[phase(step)] = find(alone.outputs, paired.outputs)
                    if not any(dim is not None for dim in shape.arguments[phase(step)].values()):
                        raise NoBatch("no argument has a batch dimension")
                except NoBatch as error:
                    shape.reason = f"cannot be put into a batch: {error}"
    return found


@bits.unseen
def _without_values(node: Node) -> Node:
    return map_tensors(node, lambda _, tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))


@bits.unseen
def nonfinite(node: Node) -> str | None:
    """Where a node's floating-point tensors hold NaN or infinity: the first path and what is there, or None."""
    for path, tensor in tensors(node):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            what = "NaN" if bool(torch.isnan(tensor).any()) else "an infinity"
            return f"{path or 'output'} holds {what}"
    return None
