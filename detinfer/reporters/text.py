"""A result as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from detinfer.goldens.result import Cause, Divergence, Result, Tally
from detinfer.reporters import summary

_STYLES = {
    "same": "green",
    "diverged": "bold red",
    "stale": "yellow",
    "vacuous": "yellow",
    "not_promised": "yellow",
    "not_run": "dim",
}


def show(result: Result, console: Console) -> None:
    """Print the sweep, the layers, what could have failed, and the verdicts."""
    invariance, golden, control = result.invariance, result.golden, result.control
    ranks = f", {result.consistency.ranks} ranks" if result.consistency.ranks > 1 else ""
    console.print(f"golden   {result.path}: {result.target}, {result.dtype}, scope {result.policy['scope']}{ranks}")
    console.print(
        f"sweep    {invariance.trials} trials, mean batch {invariance.mean_batch}, {invariance.batches:,} batches, "
        f"{invariance.rows_compared:,} of {invariance.rows_possible:,} rows compared",
        soft_wrap=True,
    )
    console.print(_layers(result))
    if invariance.axes:
        console.print(_axes(result))
    _sensitivity(result, console)
    for part, what in ((invariance, "invariance"), (golden, "golden"), (control, "control")):
        if part.first is not None and (what != "control" or invariance.first is None):
            allowed = part.verdict == "not_promised"
            _first(part.first, "not promised" if allowed else what, console, getattr(part, "cause", None))
    _verdict(
        console, "invariance", invariance.verdict, f"{invariance.rows_differing:,} rows differ", invariance.reasons
    )
    differing = f"{golden.rows_differing:,} of {golden.rows_compared:,} rows differ from the file"
    reasons = [*golden.reasons, *(f"{name}: recorded {then}, now {now}" for name, then, now in golden.stale)]
    _verdict(console, "golden", golden.verdict, differing, reasons if golden.verdict != "same" else [])
    ranked = result.consistency
    if ranked.ranks > 1:
        count = (
            f"{ranked.differing:,} of {ranked.tensors:,} results that {ranked.ranks} ranks share differ between ranks"
        )
        _verdict(console, "ranks", ranked.verdict, count, [ranked.first] if ranked.first else [])
    if golden.stale and golden.verdict == "same":
        console.print("           judged in another environment: every operation in it is portable", style="dim")
    if control.verdict != "not_run":
        walked = [axis for axis in control.axes if axis.verdict != "not_run"]
        axes = f", {sum(axis.rows_differing > 0 for axis in walked)} of {len(walked)} other axes" if walked else ""
        console.print(
            f"control    {control.trials_diverged} of {control.trials} trials{axes} diverge with the policy off "
            f"({control.rows_differing:,} of {control.rows_compared:,} rows; reported, not judged)"
        )
        kinds = _kinds([tally for tally in control.units if tally.rows_differing])
        if kinds:
            console.print(f"           in {kinds}", soft_wrap=True)


def _layers(result: Result) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("layer", "left"), ("units", "right"), ("batches", "right"), ("rows", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("differ", justify="right")
    control = {tally.name: tally for tally in result.control.units}
    if control:
        table.add_column("policy off", justify="right")
    groups: dict[str, list[Tally]] = {}
    for tally in result.invariance.units:
        groups.setdefault(summary.layer(tally.name), []).append(tally)
    for name, tallies in groups.items():
        differ = sum(tally.rows_differing for tally in tallies)
        skipped = sum(tally.skipped is not None for tally in tallies)
        row = [
            name,
            f"{len(tallies) - skipped}" + (f" (+{skipped} skipped)" if skipped else ""),
            f"{sum(tally.batches for tally in tallies):,}",
            f"{sum(tally.rows_compared for tally in tallies):,}",
            f"[bold red]{differ:,}[/]" if differ else "0",
        ]
        if control:
            row.append(f"{sum(control[tally.name].rows_differing for tally in tallies if tally.name in control):,}")
        table.add_row(*row)
    return table


def _axes(result: Result) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("axis", "comparisons", "rows", "differ"):
        table.add_column(name, justify="left" if name == "axis" else "right")
    control = {axis.name: axis for axis in result.control.axes}
    if control:
        table.add_column("policy off", justify="right")
    table.add_column("", style="dim")
    for axis in result.invariance.axes:
        ran = axis.verdict != "not_run"
        differ = f"[bold red]{axis.rows_differing:,}[/]" if axis.rows_differing else "0"
        row = (
            [axis.name, f"{axis.comparisons:,}", f"{axis.rows_compared:,}", differ] if ran else [axis.name, "", "", ""]
        )
        if control:
            off = control.get(axis.name)
            row.append("" if off is None or off.verdict == "not_run" else f"{off.rows_differing:,}")
        table.add_row(*row, axis.note if ran else f"not run: {axis.note}")
    return table


def _kinds(tallies: Sequence[Tally]) -> str:
    counts: dict[str, int] = {}
    for tally in tallies:
        label = "the whole model" if not tally.name else f"{tally.name.rsplit('.', 1)[-1]} ({tally.kind})"
        counts[label] = counts.get(label, 0) + 1
    return ", ".join(f"{label} x {count}" if count > 1 else label for label, count in counts.items())


def _sensitivity(result: Result, console: Console) -> None:
    kinds: dict[tuple[str, str], list[bool | None]] = {}
    for probe in result.invariance.sensitivity:
        kinds.setdefault((probe.operation, probe.dtype), []).append(probe.seen)
    for (operation, dtype), seen in kinds.items():
        judged = [one for one in seen if one is not None]
        free = f", {len(seen) - len(judged)} with fewer than 3 terms or ranks" if len(judged) < len(seen) else ""
        console.print(
            f"planted  {operation} {dtype}: a wrong order seen at {sum(judged)} of {len(judged)} recorded shapes{free}",
            soft_wrap=True,
        )
    if result.invariance.order_free:
        console.print(f"no order {', '.join(result.invariance.order_free)}", style="dim", soft_wrap=True)


def _first(first: Divergence, what: str, console: Console, cause: Cause | None) -> None:
    title = {
        "control": "with the policy off, the first to differ",
        "invariance": "first cause",
        "golden": "first cause",
        "not promised": "the first to differ, as it may",
    }
    console.print(f"\n[bold]{title[what]}[/] {first.unit} ({first.type}, {first.phase} step {first.step})")
    console.print(
        f"  {summary.place(first)}\n  {summary.values(first)}; {first.rows_differing:,} of {first.rows_compared:,} rows differ"
    )
    if cause is not None:
        show_cause(cause, console)
    elif what == "invariance":
        console.print("  no operation was found behind it when the run was made again")
    if what not in ("control", "not promised"):
        if not first.axis:
            console.print("  its inputs agree, its output does not")
        console.print(f"  redo: {first.command}", soft_wrap=True)
    console.print()


def show_cause(cause: Cause, console: Console) -> None:
    """Print the operation behind a divergence."""
    console.print(
        f"  operation [bold]{cause.operation}[/] in {cause.path}, {cause.dtype}{summary.on_ranks(cause)}",
        soft_wrap=True,
    )
    console.print(f"    alone {cause.alone}; here {cause.other}", soft_wrap=True)
    console.print(
        f"    element {list(cause.index)}: {summary.values(cause)}; "
        f"{cause.elements_differing:,} of {cause.elements:,} elements differ",
        soft_wrap=True,
    )
    console.print(f"    {summary.inputs(cause)}; {summary.repeats(cause)}", soft_wrap=True)
    if cause.only_there:
        console.print(f"    only here, before it: {', '.join(cause.only_there)}", soft_wrap=True)
    if cause.batch is not None:
        console.print(f"    smallest batch that shows it: {cause.batch}, of requests {cause.requests}")
    if cause.note:
        console.print(f"    {cause.note}", soft_wrap=True)
    for side, names in (("alone", cause.kernels_alone), ("here", cause.kernels_other)):
        if names:
            console.print(f"    kernels {side}: {'; '.join(names)}", soft_wrap=True)


def _verdict(console: Console, what: str, verdict: str, count: str, reasons: Sequence[str]) -> None:
    console.print(f"{what:<10} [{_STYLES[verdict]}]{verdict.upper().replace('_', ' ')}[/]  {count}")
    for reason in reasons:
        console.print(f"           {reason}", soft_wrap=True)
