"""Verify a golden: rows against rows here and now, the file against now, and whether either could have failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from detinfer import bits, environment, native
from detinfer.errors import InfrastructureError
from detinfer.goldens import across, axes, stress_inputs, tree
from detinfer.goldens.cause import over_ranks
from detinfer.goldens.cause.find import find, together
from detinfer.goldens.collect import WHOLE
from detinfer.goldens.compare import by_digests, compare
from detinfer.goldens.control import run_control
from detinfer.goldens.format import Golden
from detinfer.goldens.inputs import Options, chosen_units, load_inputs, reductions_of
from detinfer.goldens.jobs import Pool
from detinfer.goldens.ledger import Ledger, run_here
from detinfer.goldens.merge import merge, order
from detinfer.goldens.replay import Replay
from detinfer.goldens.result import AxisResult, Comparison, Control, Divergence, Invariance, Result, Sensitivity, Tally
from detinfer.goldens.resume import Broken, Interrupted, check_alone, unfinished
from detinfer.goldens.runner import Request
from detinfer.goldens.stress import probe
from detinfer.goldens.stress_ranks import probe_ranks
from detinfer.goldens.sweep import Key, Sweep, Trial, divergence
from detinfer.goldens.tasks import Task, Tasks, ready, sweep_of, tasks
from detinfer.goldens.tree import Node
from detinfer.models.ranks import ALONE, Ranks
from detinfer.models.targets import device_of
from detinfer.policy import Policy, deterministic

Progress = Callable[[str, int, int], None]
"""Called with the name of the part under way, how much of it is done, and how much there is."""

Tell = Callable[[Callable[[], Result | None]], None]
"""Is given what tells, from any thread, what was found until now; None: nothing that could be gone on with."""


def verify(
    golden: Golden,
    target: Any,
    requests: Sequence[Request],
    policy: Policy,
    options: Options,
    progress: Progress = lambda part, done, total: None,
    ranks: Ranks = ALONE,
    pool: Pool | None = None,
    saved: dict[str, Any] | None = None,
    tell: Tell = lambda _: None,
) -> Result:
    """Judge invariance and golden under ``policy``; with ``options.control`` also report the sweep without it.

    On several ``ranks`` all call this together: each replays its own units, and all get the result of all. The workers
    of a ``pool`` share the trials out; ``saved`` is the result of an interrupted run of the same options, as JSON values.
    ``tell`` is given a function that says what was found so far.

    Raises Interrupted, which holds what was found, where a KeyboardInterrupt comes, and Broken where a worker or another
    rank dies; other ranks than rank 0 raise what they met itself.
    """
    manifest = golden.manifest
    if elsewhere := manifest.ranks != ranks.size:
        options = replace(options, tp=ranks.size)
    units, chosen, whole = chosen_units(golden, target, policy, options, ranks)
    trials, cases = options.trials(requests), options.cases()
    redo = lambda unit, trial: options.redo(str(golden.path), unit, trial)  # noqa: E731
    now = environment.capture(native.isa(), target.libraries, device_of(target.module))
    result = Result(
        path=str(golden.path),
        target=manifest.target["spec"],
        dtype=manifest.target["dtype"],
        policy=policy.to_json(),
        seed=options.seed,
        environment=now.to_json(),
        sweep={"n_trials": max(options.n_trials, (options.only_trial or 0) + 1), "batch_sizes": options.batch_sizes},
        invariance=Invariance(),
        golden=Comparison(),
        control=Control(),
    )
    clock = _Clock(result.seconds)
    ledger = Ledger(ranks, saved)
    done = ledger.done
    alone = ""
    traced: list[Task] = []
    rest: list[Task] = []

    def share(of: Sequence[Task], held: Tasks, part: str = "trials") -> None:
        total = len(of)
        if pool is not None:
            pool.run(of, held.run, done, options.fail_fast, lambda number: progress(part, number, total))
        else:
            run_here(of, held.run, ledger, options.fail_fast, ranks, lambda number: progress(part, number, total))

    def kept() -> Result | None:
        if ranks.size > 1 and not ledger.counts()[0]:
            return None
        return unfinished(result, golden, options, alone, ledger, len(traced) + len(rest))

    tell(kept)
    try:
        with deterministic(policy) as active:
            progress("inputs", 0, 1)
            recomputed = load_inputs(golden, target, requests, units, chosen, ranks)
            clock("inputs")
            sweep = sweep_of(golden, target, requests, units, whole, options)
            other_size = None
            if elsewhere:
                result.golden, other_size = across.judge(
                    golden,
                    sweep.alone(),
                    ranks,
                    promised=policy.guarantee.scope == "tp",
                    command=options.redo(str(golden.path), WHOLE, None),
                    model=manifest.target["class"],
                )
                result.golden.cause = over_ranks.find(golden, target.module, units, ranks, result.golden.first)
            else:
                result.golden = _judge_golden(golden, sweep, units, chosen, recomputed, progress, redo)
            del recomputed
            sweep.expect(trials)
            clock("alone")
            held = ready(golden, sweep, options)
            names, walk = list(held.axes), held.walk
            alone = ranks.digest(sweep.digest())
            if saved is not None:
                check_alone(saved, alone)
            if pool is not None:
                pool.alone = alone
            # The first trial and the first case of each axis are traced, as the runs alone were.
            traced = [*tasks(trials[:1], (), ()), *tasks((), names, cases[:1])]
            rest = [*tasks(trials[1:], (), ()), *tasks((), names, cases[1:])]
            run_here(
                traced,
                held.run,
                ledger,
                options.fail_fast,
                ranks,
                lambda number: progress("traced", number, len(traced)),
            )
            ledger.take_up()
        with deterministic(replace(policy, uncovered="trust")):
            if not (options.fail_fast and ranks.any(any(part.rows_differing for part in done.values()))):
                share(rest, held)
            clock("trials")
            progress("stress", 0, 1)
            sensitivity, order_free = _sensitivity(active, ranks, device_of(target.module))
            clock("stress")
        held.count([*traced, *rest], done, options.fail_fast)
        result.decisions = [*active.decisions_json(), *ranks.decisions()]
        if other_size is not None:
            walk.results["tp"] = other_size
        found = sweep.found
        swept = axes.swept(options.axes, trials, found.rows_compared, found.rows_differing, found.batches)
        result.invariance = _invariance(
            sweep, trials, chosen, sensitivity, order_free, [*swept, *walk.results.values()]
        )
        result.golden = _staleness(result.golden, manifest, target, result.decisions, policy)

        places = ranks.share(order(result.invariance.units))[0]
        diverged = together(ranks, result.invariance.first, places)
        if diverged is not None:
            progress("cause", 0, 1)
            with deterministic(replace(policy, uncovered="trust")):
                located = find(target, requests, units, trials, diverged, options.seed, ranks)
            result.invariance.cause = located.cause if located is not None else None
            clock("cause")
        if options.control:
            half = trials[: (len(trials) + 1) // 2]
            part = cases[: (len(cases) + 1) // 2]
            control = sweep_of(golden, target, requests, units, whole, options)
            able = list(held.axes.values())
            with nullcontext() if pool is None else pool.unshared():
                result.control = run_control(
                    control, half, able, part, options.seed, done, lambda of, by: share(of, by, "control")
                )
                first = together(ranks, result.control.first, places)
                if first is not None and diverged is None:
                    with torch.no_grad():
                        located = find(target, requests, units, half, first, options.seed, ranks)
                    result.control.cause = located.cause if located is not None else None
            clock("control")
        ranks.settle()
        return merge(ranks.share(result), ranks.share(ranks.held))
    except (KeyboardInterrupt, InfrastructureError) as error:
        # One process has no others that could break; other ranks than rank 0 know of themselves alone.
        broken = isinstance(error, InfrastructureError)
        keeps = None if ranks.rank > 0 or (broken and pool is None and ranks.size == 1) else kept()
        if keeps is None:
            raise
        if broken:
            raise Broken(str(error), keeps) from error
        raise Interrupted(keeps) from None


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self._seconds[part] = round(now - self._last, 2)
        self._last = now


def _judge_golden(
    golden: Golden,
    sweep: Sweep,
    units: Sequence[Replay],
    chosen: Sequence[dict[str, Any]],
    recomputed: dict[tuple[str, Key], tuple[Node, Node]],
    progress: Progress,
    redo: Callable[[str, int | None], str],
) -> Comparison:
    """Compare what each unit gives alone now with the file, unit by unit in the order of execution."""
    recorded = {(entry["name"], (call["request"], call["step"])): call for entry in chosen for call in entry["calls"]}
    order = {unit.name: index for index, unit in enumerate(units)}
    found = Comparison(verdict="same")
    failures: list[tuple[int, Divergence]] = []
    total = sum(len(unit.arguments) for unit in units)
    for done, (unit, key, node) in enumerate(sweep.alone()):
        progress("alone", done, max(total, done + 1))
        found.calls += 1
        if unit is None:
            wanted, place = golden.manifest.outputs["results"][key[0]][key[1]], len(order)
            name, kind, type_name = WHOLE, "model", golden.manifest.target["class"]
        else:
            call = recorded[unit.name, key]
            wanted, place = call["outputs"], order[unit.name]
            name, kind, type_name = unit.name, unit.kind, unit.type
            if (unit.name, key) in recomputed and not _same_digests(recomputed[unit.name, key][0], call["arguments"]):
                found.reasons.append(f"{unit.name}: recomputed inputs differ from the recorded ones at step {key[1]}")
                continue  # its outputs would differ for that reason alone
        rows = _against_file(golden, node, wanted, found)
        if rows is not None:
            tally = Tally(name, kind, type_name)
            failures.append((place, replace(divergence(tally, key[1], [key], *rows), command=redo(name, None))))
    if failures or found.reasons:
        found.verdict = "diverged"
    if failures:
        found.first = min(failures, key=lambda item: item[0])[1]
    return found


@bits.unseen
def _same_digests(node: Node, wanted: Node) -> bool:
    return tree.map_tensors(node, lambda _, tensor: bits.digest(tensor)) == wanted


def _against_file(golden: Golden, node: Node, wanted: Node, found: Comparison) -> Any:
    """Count the rows of one call against the file; (Rows, Difference) of a mismatch, else None."""
    held = list(tree.tensors(node))
    if [(path, bits.digest(tensor)) for path, tensor in held] == list(tree.tensors(wanted)):
        found.rows_compared += sum(bits.rows_of(tensor.shape)[0] for _, tensor in held)
        return None  # nothing of the file is needed to know that every byte is the same
    stored = tree.map_tensors(wanted, lambda _, digest: golden.tensor(digest))
    if all(tensor is not None for _, tensor in tree.tensors(stored)):
        rows = compare(node, stored)
        found.rows_compared += rows.compared
        found.rows_differing += rows.differing
        return None if rows.first is None else (rows, rows.first)
    rows = by_digests(node, wanted, golden)
    found.rows_compared += rows.compared
    found.rows_differing += rows.differing
    return None if rows.first is None else (rows, rows.first)


def _sensitivity(active: Any, ranks: Ranks, device: torch.device) -> tuple[list[Sensitivity], list[str]]:
    """Probe every reducing operation at its recorded shapes, each rank some; the others are free of order."""
    found: list[Sensitivity] = []
    done: set[tuple[str, str, str]] = set()
    calls = dict.fromkeys(call for rank in ranks.share(list(active.reducing_calls())) for call in rank)
    for number, (operation, dtype, shapes) in enumerate(calls):
        if number % ranks.size != ranks.rank:
            continue
        stress = stress_inputs.stress(operation, dtype, shapes, seed=number)
        if stress is None:
            note = "no stress inputs are known for it"
            found.append(Sensitivity(operation, str(dtype).removeprefix("torch."), str(shapes), False, True, 0, note))
        elif (key := (operation, str(dtype), stress.shape)) not in done:
            done.add(key)
            found.append(probe(stress, operation, dtype, device))
    everyone = {(one.operation, one.dtype, one.shape): one for rank in ranks.share(found) for one in rank}
    return [*probe_ranks(ranks), *everyone.values()], active.order_free()


def _invariance(
    sweep: Sweep,
    trials: Sequence[Trial],
    chosen: Sequence[dict[str, Any]],
    sensitivity: list[Sensitivity],
    order_free: list[str],
    found_axes: list[AxisResult],
) -> Invariance:
    found = sweep.found
    tallies = list(found.tallies.values())
    tallies += [
        Tally(unit["name"], unit["kind"], unit["type"], skipped=unit["skipped"]) for unit in chosen if unit["skipped"]
    ]
    invariance = Invariance(
        trials=len(trials),
        batches=found.batches,
        mean_batch=round(sum(len(trial.batch) for trial in trials) / max(1, len(trials)), 2),
        rows_possible=found.rows_possible,
        rows_compared=found.rows_compared,
        rows_differing=found.rows_differing,
        units=tallies,
        divergences=found.divergences,
        sensitivity=sensitivity,
        order_free=order_free,
        axes=found_axes,
    )
    reasons = invariance.reasons
    unstable = [probe for probe in sensitivity if not probe.invariant]
    reasons += [f"{p.operation} ({p.dtype}, {p.shape}): stress rows differ in a batch" for p in unstable]
    order = {tally.name: index for index, tally in enumerate(tallies)}
    if found.divergences:
        # Inputs are the recorded ones, so each unit that differs is a cause by itself: the innermost first one leads.
        names = {name: index for name, index in order.items() if name != WHOLE}
        invariance.first = min(found.divergences, key=lambda item: names.get(item.unit, len(names)))
    if failed := axes.failures(found_axes):
        reasons += failed
        invariance.first = invariance.first or next(axis.first for axis in found_axes if axis.first is not None)
    if found.divergences or unstable or failed:
        invariance.verdict = "diverged"
        return invariance
    unseen = [probe for probe in sensitivity if probe.seen is False]
    reasons += [f"{p.operation} ({p.dtype}, {p.shape}): a planted wrong order was not seen {p.note}" for p in unseen]
    if not any(probe.seen for probe in sensitivity):
        reasons.append("no operation with a reduction ran: no order could have differed")
    if found.rows_compared + sum(axis.rows_compared for axis in found_axes) == 0:
        reasons.append("no row was compared")
    if trials and all(len(trial.batch) == 1 for trial in trials):
        reasons.append("every batch had one row: nothing stood beside it")
    invariance.verdict = "vacuous" if reasons else "same"
    return invariance


def _staleness(
    found: Comparison, manifest: Any, target: Any, decisions: Sequence[dict[str, Any]], policy: Policy
) -> Comparison:
    """A golden is judged where the environment is the recorded one, or every operation is portable, then and now, and
    where a mixture of experts is added over ranks as it was."""
    if (then_added := reductions_of(manifest)) != policy.reductions:
        found.verdict, found.first = "stale", None
        how = f"recorded with {then_added} reductions of mixture-of-experts layers, verified with {policy.reductions} ones"
        found.reasons = [f"{how}, which round in other places: verify with the recorded ones, or record again"]
        return found
    then = environment.Environment.from_json(manifest.environment)
    now = environment.capture(native.isa(), target.libraries, device_of(target.module))
    found.stale = [(name, str(a), str(b)) for name, a, b in environment.differences(then, now)]
    decisions = [*manifest.decisions, *decisions]  # a product on a GPU's matrix unit is not what a CPU gives for it
    if found.stale and not all(decision["portable"] for decision in decisions):
        found.verdict = "stale"
        bound = sorted({decision["op"] for decision in decisions if not decision["portable"]})
        found.reasons = [f"recorded in another environment, and these operations are not portable: {', '.join(bound)}"]
    return found
