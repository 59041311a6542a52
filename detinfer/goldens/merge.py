"""One result of what every rank found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from detinfer.goldens.collect import WHOLE
from detinfer.goldens.result import (
    AxisResult,
    Comparison,
    Consistency,
    Control,
    Divergence,
    Invariance,
    Result,
    Tally,
    Verdict,
)
from detinfer.goldens.sweep import KEPT
from detinfer.models.ranks import Held

_WORST: tuple[Verdict, ...] = ("diverged", "stale", "vacuous", "not_promised", "same", "not_run")


def merge(results: Sequence[Result], held: Sequence[Held]) -> Result:
    """Counts added up, the worst verdict of each kind, the first cause wherever it was; ``held`` by rank."""
    whole, size = results[0], len(results)
    if size == 1:
        return whole
    names = order(whole.invariance.units)
    return replace(
        whole,
        invariance=_invariance([result.invariance for result in results], names),
        golden=_golden([result.golden for result in results], names),
        control=_control([result.control for result in results], names),
        consistency=Consistency(
            verdict="diverged" if any(one.differing for one in held) else "same" if held[0].tensors else "not_run",
            ranks=size,
            tensors=held[0].tensors,
            differing=max(one.differing for one in held),
            first=held[0].first,
        ),
    )


def order(units: Sequence[Tally]) -> dict[str, int]:
    """The place of each unit in the order of execution, without the whole model, which comes last."""
    return {tally.name: index for index, tally in enumerate(units) if tally.name != WHOLE}


def _invariance(parts: Sequence[Invariance], names: dict[str, int]) -> Invariance:
    found = first([part.first for part in parts], names)
    everything = [replace(one, rank=rank) for rank, part in enumerate(parts) for one in part.divergences]
    return replace(
        parts[0],
        verdict=_worst(part.verdict for part in parts),
        batches=sum(part.batches for part in parts),
        rows_possible=sum(part.rows_possible for part in parts),
        rows_compared=sum(part.rows_compared for part in parts),
        rows_differing=sum(part.rows_differing for part in parts),
        units=_tallies([part.units for part in parts]),
        first=found,
        divergences=everything[:KEPT],
        order_free=list(dict.fromkeys(op for part in parts for op in part.order_free)),
        reasons=_reasons([part.reasons for part in parts]),
        axes=_axes([part.axes for part in parts]),
    )


def _axes(parts: Sequence[Sequence[AxisResult]]) -> list[AxisResult]:
    """All ranks walk the same axes: counts added up, the first row that differs wherever it was."""
    return [
        replace(
            same[0],
            verdict=_worst(one.verdict for one in same),
            comparisons=sum(one.comparisons for one in same),
            rows_compared=sum(one.rows_compared for one in same),
            rows_differing=sum(one.rows_differing for one in same),
            first=first([one.first for one in same], {}),
        )
        for same in zip(*parts, strict=True)
    ]


def _golden(parts: Sequence[Comparison], names: dict[str, int]) -> Comparison:
    return replace(
        parts[0],
        verdict=_worst(part.verdict for part in parts),
        calls=sum(part.calls for part in parts),
        rows_compared=sum(part.rows_compared for part in parts),
        rows_differing=sum(part.rows_differing for part in parts),
        first=first([part.first for part in parts], names),
        reasons=_reasons([part.reasons for part in parts]),
    )


def _control(parts: Sequence[Control], names: dict[str, int]) -> Control:
    return replace(
        parts[0],
        verdict=_worst(part.verdict for part in parts),
        trials_diverged=max(part.trials_diverged for part in parts),
        rows_compared=sum(part.rows_compared for part in parts),
        rows_differing=sum(part.rows_differing for part in parts),
        units=_tallies([part.units for part in parts]),
        first=first([part.first for part in parts], names),
        axes=_axes([part.axes for part in parts]),
    )


def _worst(verdicts: Iterable[Verdict]) -> Verdict:
    return min(verdicts, key=_WORST.index)


def first(parts: Sequence[Divergence | None], names: Mapping[str, int]) -> Divergence | None:
    """Of every rank's first divergence the innermost unit that ran first; of one unit, the lowest rank's.

    ``names``: the place of each unit in the order of execution.
    """
    found = [replace(part, rank=rank) for rank, part in enumerate(parts) if part is not None]
    return min(found, key=lambda one: names.get(one.unit, len(names)), default=None)


def _tallies(parts: Sequence[Sequence[Tally]]) -> list[Tally]:
    whole: dict[str, Tally] = {}
    for tally in (tally for part in parts for tally in part):
        seen = whole.get(tally.name)
        if seen is None:
            whole[tally.name] = replace(tally, ulps=dict(tally.ulps), trials=dict(tally.trials))
            continue
        seen.rows_possible += tally.rows_possible
        seen.rows_compared += tally.rows_compared
        seen.rows_differing += tally.rows_differing
        seen.batches += tally.batches
        for ours, theirs in ((seen.ulps, tally.ulps), (seen.trials, tally.trials)):
            for name, count in theirs.items():
                ours[name] = ours.get(name, 0) + count
        seen.skipped = seen.skipped or tally.skipped
    return list(whole.values())


def _reasons(parts: Sequence[Sequence[str]]) -> list[str]:
    """What every rank says once, the rest with the rank's number."""
    everyone = set(parts[0]).intersection(*parts[1:])
    own = [f"rank {rank}: {reason}" for rank, part in enumerate(parts) for reason in part if reason not in everyone]
    return [reason for reason in parts[0] if reason in everyone] + own
