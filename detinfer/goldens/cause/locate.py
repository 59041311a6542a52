"""The first operation whose results differ between a request run alone and the same request run another way.

Both runs are watched operation by operation. Operations are laid side by side by name and module, results are compared
where they belong to the request, and the first that differs is looked at again: are its inputs the same, does it
repeat itself, which kernels ran.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from detinfer import bits
from detinfer.goldens.cause import agreed, align
from detinfer.goldens.cause.align import Pair
from detinfer.goldens.cause.first import Differs, First, Parts, Results, floating, same
from detinfer.goldens.cause.kernels import confirmed, kernels, operands
from detinfer.goldens.cause.operations import Key, Operation, Run, matched, operation, watch
from detinfer.goldens.result import Cause
from detinfer.models.ranks import ALONE, Ranks

REPEATS = 3
"""Times that the operation is run again on both sides, and at most a run that makes other operations than before."""

CHANCE = "the run, made again, gave other bytes here"
"""Said of a fault that is left to chance, as the order of atomic additions is."""


@dataclass(frozen=True)
class Located:
    """The cause, and the operation of both runs with its arguments: enough to show it without the model.

    There are no ``operations`` of a module in which none could be watched, of one that all ranks make together, on
    another rank than the first of those that differ, and where the run, made again, gave the request its bytes alone.
    """

    cause: Cause
    operations: tuple[Operation, Operation] | None = None
    result: int = 0
    part: Pair = ((), ())

    def noted(self, note: str) -> Located:
        """With ``note``, before what the cause says already."""
        return replace(self, cause=replace(self.cause, note="; ".join(filter(None, [note, self.cause.note]))))


@bits.unseen
def locate(
    alone: Run, other: Run, parts: Parts, prefix: str = "", integers: bool = True, ranks: Ranks = ALONE
) -> Located | None:
    """The first operation of ``other`` that gives the request other bytes than ``alone``; None if none was found.

    None too where ``other`` makes other operations each time that it is run.

    On several ``ranks`` all call it together, and the first on any of them is found. ``prefix`` is the name of the unit that
    is run, for the paths of modules inside it. Without ``integers`` only floating point is compared: positions and masks are
    others where a request is padded or run in pieces.
    """
    results = Results(integers)
    left = watch(alone, results.keep, ranks)
    for _ in range(REPEATS):
        right = watch(other, None, ranks)
        beside = matched(left, right)
        compared = First(results, right, beside, parts)
        seen = watch(other, compared.see, ranks)
        if not ranks.any(seen != right[: len(seen)]):
            break
    else:
        return None  # no operation of such a run can be laid beside one alone
    first = compared.found()
    found = agreed.first(ranks, right, beside, None if first is None else first.number)
    if found is None:
        return None
    number = found.number
    one = operation(alone, None if number is None else beside[number], ranks)
    many = operation(other, number, ranks)
    differs = first if ranks.rank in found.ranks else None
    here = number is not None and one is not None and many is not None and many.key == right[number]
    # What all ranks make together is made again by all or by none.
    met = not ranks.any(not here) if found.joint else here
    known = None
    if met and number is not None and one is not None and many is not None:
        known = _known(one, many, differs, functools.partial(parts, right[number].call))
    elif differs is not None:
        known = _gone(right[differs.number], differs)
    if known is not None and known.cause is not None and number is not None:
        key = right[number]
        extra = [k.name for i, k in enumerate(right[:number]) if i not in beside and k.path == key.path]
        known = replace(
            known, cause=replace(known.cause, path=_path(key, prefix), only_there=list(dict.fromkeys(extra)))
        )
    cause = agreed.together(ranks, found, known)
    if one is None or many is None or first is None or found.joint or ranks.rank != found.ranks[0]:
        return Located(cause)
    if not met or not _shows(one, many, first):
        return Located(cause)
    return Located(cause, (one, many), first.place, first.pair)


def element(expected: torch.Tensor, got: torch.Tensor) -> dict[str, Any]:
    """What a ``Cause`` says of two tensors that differ: the first element that does, and how many do."""
    found = bits.first_mismatch(got, expected)
    assert found is not None
    return {
        "dtype": bits.dtype_name(got.dtype),
        "index": found.index,
        "got": found.got,
        "expected": found.expected,
        "ulp": found.ulp,
        "elements": got.numel(),
        "elements_differing": bits.count_mismatches(got, expected),
    }


def _known(
    one: Operation, many: Operation, differs: Differs | None, parts: Callable[..., Iterator[Pair]]
) -> agreed.Known:
    """What this rank knows of an operation; ``differs``: which result of it differs, and where, or None."""
    differ: list[int] = []
    unknown: list[int] = []
    for number, (a, b) in enumerate(zip(operands(one), operands(many), strict=False)):
        if not floating(a):
            continue
        shared = list(parts(a, b))
        if not shared:
            unknown.append(number)
        elif any(not same(a, b, pair) for pair in shared):
            differ.append(number)
    repeats = all([_again(one), _again(many)])
    on_gpu = [kernels(one), kernels(many)]
    if differs is None:
        return agreed.Known(None, differ, unknown, repeats)
    note = ""
    if not (_holds(one, differs, 0) and _holds(many, differs, 1)):
        repeats, note = False, CHANCE
    elif repeats and not differ and not unknown:
        note = confirmed(one, many, differs, parts)
    cause = Cause(
        operation=many.key.name,
        path=many.key.path,
        alone=align.shape(operands(one)),
        other=align.shape(operands(many)),
        inputs_differing=differ,
        inputs_unknown=unknown,
        repeats=repeats,
        kernels_alone=on_gpu[0],
        kernels_other=on_gpu[1],
        note=note,
        **element(differs.expected, differs.got),
    )
    return agreed.Known(cause, differ, unknown, repeats)


def _gone(key: Key, differs: Differs) -> agreed.Known:
    """What is known of an operation that the run does not come by any more when it is made again."""
    cause = Cause(
        operation=key.name,
        path=key.path,
        alone=align.shape([differs.expected]),
        other=align.shape([differs.got]),
        repeats=False,
        note=f"{CHANCE}, by way of other operations",
        **element(differs.expected, differs.got),
    )
    return agreed.Known(cause, [], [], repeats=False)


def _holds(run: Operation, differs: Differs, side: int) -> bool:
    """Whether the request's part of the result (of side 0, alone, or 1) is what it was when it was seen first."""
    part, wanted = _part(run, differs, side), (differs.expected, differs.got)[side]
    return part is not None and part.shape == wanted.shape and not bits.count_mismatches(part, wanted)


def _shows(one: Operation, many: Operation, differs: Differs) -> bool:
    """Whether the operation as it was made again differs too."""
    left, right = _part(one, differs, 0), _part(many, differs, 1)
    return (
        left is not None and right is not None and left.shape == right.shape and bits.count_mismatches(left, right) > 0
    )


def _part(run: Operation, differs: Differs, side: int) -> torch.Tensor | None:
    place = differs.pair[side]
    if differs.place >= len(run.results) or len(place) > run.results[differs.place].dim():
        return None
    return run.results[differs.place][place]


def _again(run: Operation) -> bool:
    """Whether an operation gives its bytes again when it is run again: as often on every rank, whatever it gives."""
    repeats = True
    for _ in range(REPEATS):
        for got, before in zip(run(), run.results, strict=True):
            repeats &= got.shape == before.shape and not bits.count_mismatches(got, before)
    return repeats


def _path(key: Key, prefix: str) -> str:
    root, _, inner = key.path.partition(".")
    return ".".join(filter(None, [prefix, inner])) if prefix else key.path or root


def by_batch(batch: int, row: int) -> Parts:
    """The parts of a request in row ``row`` of a batch, everything else as alone."""

    def parts(_: int, alone: torch.Tensor, other: torch.Tensor) -> Iterator[Pair]:
        pair = align.rows_of_batch(alone, other, batch, row)
        if pair is not None:
            yield pair

    return parts


def by_spans(one: align.Sizes, calls: Sequence[tuple[align.Sizes, Sequence[align.Span]]]) -> Parts:
    """The parts of a request in the calls of a way of running it; ``one`` are the sizes of its one call alone."""

    def parts(call: int, alone: torch.Tensor, other: torch.Tensor) -> Iterator[Pair]:
        if call >= len(calls):
            return
        many, spans = calls[call]
        for span in spans:
            pair = align.rows_of_span(alone, other, one, many, span)
            if pair is not None:
                yield pair

    return parts
