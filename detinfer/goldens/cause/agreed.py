"""What ranks agree on of a cause: which operation comes first on any of them, and what each knows of it.

Each rank watches its own part of the same run. An operation that differs spreads to the others with the next sum, so the
first on any rank is the cause. Ranks count what they do together: that tells the order of what each does on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from detinfer.goldens.cause.operations import Key
from detinfer.goldens.result import Cause, named
from detinfer.models.ranks import Ranks

Place = tuple[int, bool, int]
"""How many joint operations come before, whether it is one, and of another its number among this rank's."""


@dataclass(frozen=True)
class First:
    """The first operation that differs on any rank.

    ``number`` is its number on this rank, None where the others alone make it or differ in it; ``ranks`` are those on which
    it differs; ``joint``: all of them make it together.
    """

    number: int | None
    ranks: list[int]
    joint: bool


@dataclass(frozen=True)
class Known:
    """What one rank knows of the first operation; ``cause`` where its results differ there."""

    cause: Cause | None
    inputs_differing: list[int]
    inputs_unknown: list[int]
    repeats: bool


def first(ranks: Ranks, keys: Sequence[Key], beside: Mapping[int, int], number: int | None) -> First | None:
    """The first of every rank's own ``number``, an operation of ``keys``; None where no rank has found one.

    All ranks call it together. ``beside`` says which operations have one to be laid beside: of a joint one all ranks must.
    """
    everyone = ranks.share(None if number is None else _place(keys, number))
    met = [place for place in everyone if place is not None]
    if not met:
        return None
    where = min(met)
    before, joint, _ = where
    if joint:
        own = [i for i, key in enumerate(keys) if key.joint][before : before + 1]
        number = own[0] if own and own[0] in beside else None
        if ranks.any(number is None):
            return None
    differing = [rank for rank, place in enumerate(everyone) if place == where]
    return First(number if joint or ranks.rank in differing else None, differing, joint)


def _place(keys: Sequence[Key], number: int) -> Place:
    joint = keys[number].joint
    return sum(key.joint for key in keys[:number]), joint, 0 if joint else number


def together(ranks: Ranks, found: First, known: Known | None) -> Cause:
    """One cause of what every rank knows, the same on all; those that do not make the operation know nothing."""
    everyone: list[Known | None] = ranks.share(known)
    cause: Cause = next(one.cause for one in everyone if one is not None and one.cause is not None)
    if ranks.size == 1:
        return cause
    heard = [one for one in everyone if one is not None]
    differing = [rank for rank, one in enumerate(everyone) if one is not None and one.inputs_differing]
    return replace(
        cause,
        ranks=found.ranks,
        inputs_differing=sorted({number for one in heard for number in one.inputs_differing}),
        inputs_unknown=sorted({number for one in heard for number in one.inputs_unknown}),
        repeats=all(one.repeats for one in heard),
        note=f"what it is given differs already on {named(differing)}" if found.joint and differing else cause.note,
    )
