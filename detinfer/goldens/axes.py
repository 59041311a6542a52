"""Axes of invariance: the ways in which a request's run may change without changing its bits, and what each found.

``batch``, ``position`` and ``neighbours`` are what the trials of a sweep vary. The others run the whole model another
way (``schedules``) and compare every row of logits with the same request run alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from detinfer import bits
from detinfer.errors import RefusedError, UsageError
from detinfer.goldens import captured, encoders, paged, schedules
from detinfer.goldens.compare import compare
from detinfer.goldens.result import AxisResult, Divergence
from detinfer.goldens.runner import Request, Target
from detinfer.goldens.schedules import Model, Rows, Way

SWEPT = {
    "batch": "the number of rows",
    "position": "the row's place in the batch",
    "neighbours": "what the other rows hold",
}
"""Varied by every trial of the sweep."""


@dataclass(frozen=True)
class Axis:
    """A way of running a model; ``needs`` gives the reason why a model cannot be run so, or None.

    ``off``: it can be run with the policy off too. ``eager``: the same steps as operations that can be watched, where those of
    ``way`` cannot be.
    """

    name: str
    what: str
    way: Way | None
    needs: Callable[[Model], str | None] = lambda _: None
    off: bool = True
    eager: Way | None = None


def _masks(model: Model) -> str | None:
    return None if model.takes("attention_mask", "position_ids") else "its forward takes no mask and no positions"


def _longer(model: Model) -> str | None:
    return None if min(map(len, model.tokens)) > 1 else "a request of one token cannot be cut"


def _decodes(model: Model) -> str | None:
    short = any(len(tokens) < prompt + 2 for tokens, prompt in zip(model.tokens, model.prompts, strict=True))
    return "fewer than three decode steps were recorded" if short else _croppable(model)


def _croppable(model: Model) -> str | None:
    if reason := _longer(model):
        return reason
    return "its KV cache has sliding windows, which cannot be cut back" if model.slides else None


def _transformers(model: Model) -> str | None:
    found = type(model.module).__module__.startswith("transformers.")
    return None if found else "only transformers' models take another KV cache"


_ON_GPU = "the model runs on a GPU: the CPU's threads launch its kernels and compute nothing"


def _cpu(model: Model) -> str | None:
    on_cpu = all(p.device.type == "cpu" for p in model.module.parameters())
    return None if on_cpu else _ON_GPU


def _gpu(model: Model) -> str | None:
    on_gpu = all(p.device.type == "cuda" for p in model.module.parameters())
    return None if on_gpu else "the model runs on the CPU"


def _graph(model: Model) -> str | None:
    return _gpu(model) or _transformers(model) or _decodes(model)


def _ranked(model: Model) -> str | None:
    if _gpu(model) is None:
        return "between GPUs the tests of collectives compare the paths, each on every size"
    return None if model.ranked else "the model is on one rank: --tp N"


def _never(reason: str) -> Callable[[Model], str | None]:
    return lambda _: reason


AXES = (
    Axis("permutation", "the order of the rows", schedules.permutation),
    Axis("left-padding", "padding in front", schedules.left_padding, _masks),
    Axis("right-padding", "padding behind", schedules.right_padding, _masks),
    Axis("chunks", "prefill in pieces", schedules.chunks, _longer),
    Axis("prefill-decode", "prefill against decode", schedules.prefill_decode, _longer),
    Axis("prefix", "a warm prefix against a cold one", schedules.prefix, _croppable),
    Axis("static-cache", "a KV cache of fixed size", schedules.static_cache, _transformers),
    Axis("speculative", "several decoded tokens in one step", schedules.speculative, _decodes),
    Axis("threads", "the number of threads", schedules.threads, _cpu),
    Axis("paged", "a paged KV cache, requests packed", paged.paged, paged.needs),
    Axis("collectives", "paths of sums over ranks", schedules.collectives, _ranked),
    Axis("compiled", "torch.compile", schedules.compiled, off=False, eager=schedules.prefill_decode),
    Axis("graph", "a CUDA graph against eager", captured.graph, _graph, eager=captured.graph_eagerly),
    Axis("streams", "CUDA streams", captured.streams, _gpu, eager=captured.streams_in_turn),
    Axis(
        "tp",
        "the tensor-parallel size",
        None,
        _never("the golden was recorded on as many ranks: --tp N verifies it on another number"),
    ),
)
NAMES = (*SWEPT, *(axis.name for axis in AXES))


def chosen(names: str | None) -> tuple[str, ...]:
    """The axes of ``--axes``: all for None; UsageError for a name that is none."""
    if names is None:
        return NAMES
    found = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in found if name not in NAMES]
    if unknown or not found:
        raise UsageError(f"--axes {names}: {', '.join(unknown) or 'none'} is no axis; there are {', '.join(NAMES)}")
    return found


@dataclass
class Walk:
    """Runs axes against what the requests gave alone; call ``case`` for each axis and number, then read ``results``.

    ``alone`` are the sweep's results by (request, step). ``command`` gives the line that redoes a case.
    """

    target: Target
    requests: Sequence[Request]
    alone: dict[tuple[int, int], Any]
    command: Callable[[str, int], str] = lambda axis, number: ""
    results: dict[str, AxisResult] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = Model(self.target, self.requests) if self.target.kind == "causal_lm" else None
        self.encoder = encoders.encoder(self.target, self.requests)
        # With layers picked the whole model is left out, and there is nothing to hold an axis against.
        self._expected: list[torch.Tensor] = []
        if self.alone and (self.model or self.encoder):
            of = schedules if self.model else encoders
            self._expected = of.expected(self.alone, self.requests)

    def able(self, names: Sequence[str]) -> list[Axis]:
        """The axes among ``names`` that this model can be run along; the others' reasons go into ``results``."""
        found = []
        for axis in AXES:
            if axis.name not in names:
                continue
            reason = self._reason(axis)
            if reason is None and axis.name == "right-padding" and self.model is not None and self.model.slides:
                note = "prefill alone: a sliding window is counted in slots, and the hole has some"
            else:
                note = reason or ""
            self.results[axis.name] = AxisResult(axis.name, axis.what, note=note)
            if reason is None:
                found.append(axis)
        return found

    def _reason(self, axis: Axis) -> str | None:
        if self.model is not None:
            return axis.needs(self.model)
        if self.encoder is None:
            return "only a language model has it"
        if axis.name == "threads" and self.encoder.device.type != "cpu":
            return _ON_GPU
        return None if axis.name in encoders.WAYS else "an encoder has none"

    def case(self, axis: Axis, number: int, seed: int) -> bool:
        """Run case ``number`` of an axis and add it to ``results``; whether a row differs."""
        part = self.part(axis, number, seed)
        self.add(part)
        return part.rows_differing > 0

    def part(self, axis: Axis, number: int, seed: int) -> AxisResult:
        """What case ``number`` of an axis finds, on its own. A refused operation makes it ``not_run``, with the reason."""
        found, rng = AxisResult(axis.name, axis.what, "same"), random.Random(f"{seed}/{axis.name}/{number}")
        try:
            for rows in self._way(axis, rng):
                self._judge(axis, number, rows, found)
        except RefusedError as error:
            found.verdict, found.note = "not_run", str(error)
        return found

    def _way(self, axis: Axis, rng: random.Random) -> Iterator[Rows]:
        if self.encoder is not None:
            return encoders.WAYS[axis.name](self.encoder, rng)
        assert self.model is not None and axis.way is not None
        return axis.way(self.model, rng)

    def add(self, part: AxisResult) -> None:
        """Count a case in. Cases added in the order of their numbers give the same result wherever they were run."""
        found = self.results[part.name]
        found.comparisons += part.comparisons
        found.rows_compared += part.rows_compared
        found.rows_differing += part.rows_differing
        found.first = found.first or part.first
        if part.verdict == "not_run":
            found.verdict, found.note = "not_run", part.note
            return
        if found.verdict == "not_run":
            found.verdict = "same"
        if found.rows_differing:
            found.verdict = "diverged"

    @bits.unseen
    def _judge(self, axis: Axis, number: int, rows: Rows, found: AxisResult) -> None:
        wanted = torch.stack([self._expected[request][position] for request, position in rows.places])
        compared = compare({"tensor": rows.flat()}, {"tensor": wanted})
        found.comparisons += 1
        found.rows_compared += compared.compared
        found.rows_differing += compared.differing
        if compared.first is None or found.first is not None:
            return
        row = compared.first.row[0] if compared.first.row else 0
        request, position = rows.places[row]
        step = 0 if self.encoder else max(0, position - len(self.requests[request].tokens) + 1)
        found.first = Divergence(
            unit="the whole model",
            kind="model",
            type=type(self.target.module).__name__,
            phase="prefill" if step == 0 else "decode",
            step=step,
            request=request,
            path="",
            row=(position,),
            element=compared.first.element,
            got=compared.first.got,
            expected=compared.first.expected,
            ulp=compared.first.ulp,
            rows_differing=compared.differing,
            rows_compared=compared.compared,
            trial=number,
            note=compared.first.note,
            command=self.command(axis.name, number),
            axis=f"{axis.name}: {rows.how}",
        )


def swept(names: Sequence[str], trials: Sequence[Any], rows: int, differing: int, batches: int) -> list[AxisResult]:
    """What the trials say of the axes that they vary together: how many sizes, places and companies there were."""
    places = {(request, place, len(t.batch)) for t in trials for place, request in enumerate(t.batch)}
    counts = {
        "batch": f"{len({len(t.batch) for t in trials})} sizes",
        "position": f"{len(places)} places of a request",
        "neighbours": f"{len({t.batch for t in trials if len(t.batch) > 1})} companies",
    }
    verdict = "diverged" if differing else "same" if rows else "not_run"
    one = AxisResult("", "", verdict, batches, rows, differing)  # type: ignore[arg-type]
    if not rows:
        counts = dict.fromkeys(counts, "no row of a result could be compared")
    return [replace(one, name=name, what=SWEPT[name], note=counts[name]) for name in SWEPT if name in names]


def failures(found: Sequence[AxisResult]) -> list[str]:
    """What the axes that diverged say, a line each."""
    return [
        f"{axis.name}: {axis.rows_differing:,} of {axis.rows_compared:,} rows differ"
        for axis in found
        if axis.verdict == "diverged" and axis.first is not None
    ]
