"""What several reporters say of a result in the same words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from detinfer.goldens.result import AxisResult, Cause, Divergence, Result, Tally, named


@dataclass(frozen=True)
class Layer:
    """The units of one decoder layer together: rows, and differing rows by trial."""

    name: str
    units: int
    compared: int
    differing: int
    trials: dict[int, int]


def fingerprint(result: Result) -> str:
    """The name of the fingerprint that a result was made under; empty where it has none."""
    return str((result.system_fingerprint or {}).get("fingerprint", ""))


def layer(name: str) -> str:
    """The block that a unit belongs to: everything up to the first number of its name."""
    if not name:
        return "the whole model"
    found = re.match(r"(.*?\.\d+)(\.|$)", name)
    return found.group(1) if found else name


def layers(tallies: Sequence[Tally]) -> list[Layer]:
    """The units added up by layer, in the order in which they first come."""
    groups: dict[str, list[Tally]] = {}
    for tally in tallies:
        groups.setdefault(layer(tally.name), []).append(tally)
    found = []
    for name, members in groups.items():
        trials: dict[int, int] = {}
        for tally in members:
            for number, count in tally.trials.items():
                trials[int(number)] = trials.get(int(number), 0) + count
        compared = sum(tally.rows_compared for tally in members)
        found.append(Layer(name, len(members), compared, sum(tally.rows_differing for tally in members), trials))
    return found


def ulps(tallies: Sequence[Tally]) -> list[tuple[str, int]]:
    """Differing elements by distance, over all units, nearest first and NaN last."""
    counts: dict[str, int] = {}
    for tally in tallies:
        for distance, count in tally.ulps.items():
            counts[distance] = counts.get(distance, 0) + count
    return by_distance(counts)


def by_distance(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """The entries of a histogram of distances, nearest first and NaN last."""
    return sorted(counts.items(), key=lambda item: float("inf") if item[0] == "nan" else int(item[0].split("-")[0]))


def verdicts(result: Result) -> list[tuple[str, str, str]]:
    """(name, verdict, sentence) of each judged part, then of the control where there was one."""
    invariance, golden, control = result.invariance, result.golden, result.control
    compared = invariance.rows_compared + sum(axis.rows_compared for axis in other_axes(result))
    differing = invariance.rows_differing + sum(axis.rows_differing for axis in other_axes(result))
    found: list[tuple[str, str, str]] = [
        ("invariance", invariance.verdict, f"{differing:,} of {compared:,} rows differ from the same rows alone"),
        ("golden", golden.verdict, f"{golden.rows_differing:,} of {golden.rows_compared:,} rows differ from the file"),
    ]
    if result.consistency.ranks > 1:
        ranks = result.consistency
        found.append(
            ("ranks", ranks.verdict, f"{ranks.differing:,} of {ranks.tensors:,} shared results differ between ranks")
        )
    if control.verdict != "not_run":
        sentence = (
            f"{control.trials_diverged} of {control.trials} trials diverge with the policy off; reported, not judged"
        )
        found.append(("control", control.verdict, sentence))
    return found


def other_axes(result: Result) -> list[AxisResult]:
    """The axes that were walked beside the trials."""
    swept = ("batch", "position", "neighbours")
    return [axis for axis in result.invariance.axes if axis.name not in swept and axis.verdict != "not_run"]


def place(first: Divergence) -> str:
    """Where a divergence was found, in a line."""
    if first.axis:
        case = "" if first.trial is None else f"case {first.trial}, "
        where = f"{first.axis}; {case}request {first.request}, row {list(first.row)}"
    elif first.batch is None:
        where = f"request {first.request} alone, row {list(first.row)}"
    else:
        where = f"trial {first.trial}, batch {first.batch}, request {first.request} at position {first.position}"
        where += f", row {list(first.row)}"
    return (f"rank {first.rank}, " if first.rank is not None else "") + f"{where}, element {first.element}"


def values(found: Divergence | Cause) -> str:
    """The two values of a difference, in hex, and their distance."""
    ulp = f", {found.ulp} ULP apart" if found.ulp is not None else ""
    note = found.note if isinstance(found, Divergence) else ""
    return note or f"got {found.got}, expected {found.expected}{ulp}"


def inputs(cause: Cause) -> str:
    """Whether the operands of the operation behind a divergence are the same on both sides."""
    if cause.inputs_differing:
        return f"operand {', '.join(map(str, cause.inputs_differing))} differs already"
    if cause.inputs_unknown:
        return f"what of operand {', '.join(map(str, cause.inputs_unknown))} is this request's cannot be told"
    return "its inputs agree"


def on_ranks(cause: Cause) -> str:
    """``, on ranks 0, 1 and 2``: those of several on which an operation's results differ; nothing where there is one."""
    return f", on {named(cause.ranks)}" if cause.ranks else ""


def repeats(cause: Cause) -> str:
    """Whether the operation gives its bytes again."""
    return "each side repeats itself" if cause.repeats else "it does not repeat itself: a race, not a choice"
