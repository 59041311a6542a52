"""How decode's splits are dealt to programs on a GPU, and how far these load ahead: matters of speed, which change no bit.

The rule was written from times of heads of depth 128 in bf16, 4 and 8 query heads on each of K and V, on one H200
(docs/reference/benchmarks.md).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

WHOLE = 0.9
"""Rows for each multiprocessor from which a program takes a whole row, merges its splits as they end and leaves none: what is
left has to be written, announced and read again, and that was up to a tenth of the time."""

WHOLE_MASKED = 3.0
"""The same where a mask or padding may make some rows longer than others: a launch lasts as long as its longest row then, and
only among so many, by arithmetic, do others make up for a row of twice the mean."""

FITTING = 4
"""Programs that run on a multiprocessor at a time. Where there are no more rows than multiprocessors, programs take so many
splits that all fit: of a few more, the last ones would run alone. More rows would be cut into fewer parts than these, too few
where one is much longer than the rest: they have a program for each split, which took up to 1.1 times as long at 1024 keys and
no longer from 4096 on."""

STAGES = ((1.0, 5), (2.0, 3), (4.0, 2))
"""Stages of the pipeline for whole rows, up to so many for each multiprocessor; 3 beyond. A program that is alone on one has to
load further ahead than those which hide each other's waiting; with fewer stages more programs fit."""

_STAGE_BYTES = 32 << 10  # of 64 keys and values of depth 128, once for each stage but the first
_OTHER_BYTES = 24 << 10  # at most, of what else such a program keeps in shared memory


class Chip(NamedTuple):
    """What of a GPU the rule looks at."""

    processors: int
    shared: int
    """Bytes of shared memory that a program can have."""


@functools.cache
def chip(device: torch.device) -> Chip:
    """The numbers of a device."""
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0)  # AMD's have no such number
    return Chip(int(properties.multi_processor_count), int(shared))


@dataclass(frozen=True)
class Deal:
    """How decode's splits are dealt to programs: ``each`` to one, its warps, stages of its pipeline. 0: by the rule.
    ``whole``: all of a row to one, whatever ``each`` says.

    More than one ``each`` is machine code of its own, the same for any number; whole rows are another.
    """

    each: int = 0
    warps: int = 0
    stages: int = 0
    whole: bool = False


BY_RULE = Deal()


class Dealt(NamedTuple):
    """What the rule says of a launch. ``several``: the machine code that takes any number of splits."""

    each: int
    several: bool
    whole: bool
    stages: int


def whole_from(masked: bool, own_lengths: bool) -> float:
    """From how many rows for each multiprocessor a program takes a whole one. ``masked``: there is a mask, or padding. With
    ``own_lengths``, as requests in a paged cache have them, never: a row may be any number of times as long as the others."""
    return math.inf if own_lengths else WHOLE_MASKED if masked else WHOLE


def by_rule(rows: int, splits: int, most: int, on: Chip, stages: int, measured: bool, whole: float) -> Dealt:
    """For ``rows`` rows of ``splits`` splits, ``most`` in any row. ``measured``: whether the rule is for heads like these on a
    GPU like this one; if not, no program takes a whole row, and each has ``stages``. ``whole``: what ``whole_from`` says.

    Which machine code runs follows from the number of rows alone: rows grow, and other code must not be compiled and proved
    in the middle of a generation.
    """
    if measured and rows >= whole * on.processors:
        return Dealt(1, False, True, _stages(rows, on))
    if measured and rows * most <= 2 * on.processors:
        stages = min(3, _fitting_stages(on))  # two programs of a multiprocessor at most, however long the rows
    several = any(_each(rows, n, on) > 1 for n in range(2, most + 1))
    return Dealt(_each(rows, splits, on), several, False, stages)


def _each(rows: int, splits: int, on: Chip) -> int:
    """Splits that a program takes: as few as let all programs fit at a time; one where rows are many."""
    if rows > on.processors:
        return 1
    fitting = (n for n in range(1, splits + 1) if rows * -(-splits // n) <= FITTING * on.processors)
    return next(fitting, 1)


def _stages(rows: int, on: Chip) -> int:
    wanted = next((stages for upper, stages in STAGES if rows <= upper * on.processors), 3)
    return min(wanted, _fitting_stages(on))


def _fitting_stages(on: Chip) -> int:
    """The most stages that shared memory has room for; two where it has room for less than that, or says nothing."""
    return 1 + max(1, (on.shared - _OTHER_BYTES) // _STAGE_BYTES)
