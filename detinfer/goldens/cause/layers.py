"""The first module whose output differs: for runs whose operations cannot be watched, as a graph's replays cannot.

What each module gives is kept as the tensors that it gave: of a captured graph they are the places that every replay writes
to again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from detinfer import bits
from detinfer.goldens.cause import align
from detinfer.goldens.cause.align import Pair
from detinfer.goldens.cause.first import same
from detinfer.goldens.cause.locate import Located, element
from detinfer.goldens.result import Cause
from detinfer.goldens.schedules import Part, Rows
from detinfer.models.ranks import ALONE, Ranks
from detinfer.models.targets import tensors

Outputs = dict[tuple[str, int], list[torch.Tensor]]
"""By a module's name, and how often it was called before in the same pass: what it gave, in the order in which it ended."""


class Calls:
    """Every pass of a model while ``watching``: the sizes of its batch, and what each module gave."""

    def __init__(self, module: nn.Module) -> None:
        self.sizes: list[align.Sizes] = []
        self.outputs: list[Outputs] = []
        self._module = module

    @contextmanager
    def watching(self) -> Iterator[Calls]:
        """Hooks on all modules."""
        handles = [self._module.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name, part in self._module.named_modules():
            handles.append(part.register_forward_hook(self._ends(name)))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, _: nn.Module, __: Any, given: dict[str, Any]) -> None:
        batch, length = given["input_ids"].shape
        self.sizes.append(align.Sizes(batch, length, 0))
        self.outputs.append({})

    def _ends(self, name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if self.outputs:
                held, again = self.outputs[-1], 0
                while (name, again) in held:
                    again += 1
                held[name, again] = [t for t in tensors(_values(output)) if t.is_floating_point()]

        return hook


def _values(output: Any) -> list[Any]:
    if isinstance(output, dict):
        return list(output.values())
    return list(output) if isinstance(output, list | tuple) else [output]


@bits.unseen
def first_layer(
    module: nn.Module,
    alone: Outputs,
    one: align.Sizes,
    request: int,
    rows: Iterable[Rows],
    calls: Calls,
    note: str,
    ranks: Ranks = ALONE,
) -> Located | None:
    """The first module whose output for ``request`` differs from ``alone``; ``rows`` is a way run under ``calls``.

    On several ranks the way is run to its end, for all take part in its passes; the first on any rank is found.
    """
    met: tuple[tuple[int, int], Cause] | None = None
    for number, found in enumerate(rows):
        if met is None:
            met = _first(module, alone, one, request, number, found, calls, note)
        if met is not None and ranks.size == 1:
            break
    everyone = ranks.share(met)
    where = min((one[0] for one in everyone if one is not None), default=None)
    if where is None:
        return None
    named = [rank for rank, one in enumerate(everyone) if one is not None and one[0] == where]
    cause: Cause = everyone[named[0]][1]
    return Located(replace(cause, ranks=named) if ranks.size > 1 else cause)


def _first(
    module: nn.Module,
    alone: Outputs,
    one: align.Sizes,
    request: int,
    number: int,
    found: Rows,
    calls: Calls,
    note: str,
) -> tuple[tuple[int, int], Cause] | None:
    """The first module of the call behind ``found``, which is the way's ``number``th, and where it stands among all."""
    sizes, outputs = calls.sizes[found.call], calls.outputs[found.call]
    for place, ((name, again), held) in enumerate(outputs.items()):
        for expected, got in zip(alone.get((name, again), []), held, strict=False):
            for pair in _pairs(expected, got, one, sizes, request, found.parts):
                if not same(expected, got, pair):
                    return (number, place), _cause(module, name, expected, got, pair, note)
    return None


def _pairs(
    expected: torch.Tensor,
    got: torch.Tensor,
    one: align.Sizes,
    sizes: align.Sizes,
    request: int,
    parts: Sequence[Part],
) -> Iterator[Pair]:
    for row, part in enumerate(parts):
        if part.request == request:
            span = align.Span(row, part.at, part.start, part.end - part.start, part.gap, part.keys)
            pair = align.rows_of_span(expected, got, one, sizes, span)
            if pair is not None:
                yield pair


def _cause(module: nn.Module, name: str, expected: torch.Tensor, got: torch.Tensor, pair: Pair, note: str) -> Cause:
    return Cause(
        operation=type(module.get_submodule(name)).__name__,
        path=".".join(filter(None, [type(module).__name__, name])),
        alone=align.shape([expected]),
        other=align.shape([got]),
        note=note,
        **element(expected[pair[0]], got[pair[1]]),
    )
