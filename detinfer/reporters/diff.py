"""Two recordings side by side, as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from detinfer.goldens.diff import Diff, Unit
from detinfer.reporters import summary

_STYLES = {"same": "dim", "cause": "bold red", "spread": "yellow", "missing": "yellow"}


def show(found: Diff, console: Console) -> None:
    """Print what differs: environment, model, policy, inputs, layers, distances, tokens."""
    console.print(f"a  {found.a}\nb  {found.b}", soft_wrap=True)
    for title, rows in (("environment", found.environment), ("model", found.model), ("policy", found.policy)):
        if rows:
            console.print(_pairs(title, rows))
        else:
            console.print(f"{title}: the same", style="dim")
    for line in found.inputs or ["the same"]:
        console.print(f"inputs: {line}", style=None if found.inputs else "dim")
    console.print(_layers(found.units))
    counts: Counter[str] = Counter()
    for unit in [*found.units, found.logits]:
        counts.update(unit.ulps)
    if counts:
        ordered = summary.by_distance(counts)
        console.print("ULP      " + ", ".join(f"{distance}: {count:,}" for distance, count in ordered), soft_wrap=True)
    if found.first is not None:
        unit = next(unit for unit in found.units if unit.name == found.first)
        console.print(f"\n[bold]first cause[/] {unit.name} ({unit.type})\n  {unit.first}", soft_wrap=True)
        console.print("  its inputs agree, its output does not\n")
    logits = found.logits
    console.print(f"results  {logits.rows_differing:,} of {logits.rows_compared:,} rows differ")
    for prompt, step, one, two in found.tokens:
        console.print(f"tokens   prompt {prompt} parts at step {step}: {one} and {two}")
    if not found.tokens:
        console.print("tokens   the same", style="dim")
    console.print("[green]SAME[/]" if found.same() else "[bold red]DIFFERENT[/]")


def _pairs(title: str, rows: Sequence[tuple[str, str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (title, "a", "b"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _layers(units: Sequence[Unit]) -> Table:
    """A line a layer; the units inside it that are causes are named."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layer", "units", "calls", "rows", "differ", ""):
        table.add_column(name, justify="left" if name in ("layer", "") else "right")
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(summary.layer(unit.name), []).append(unit)
    for name, members in groups.items():
        states = [unit.state for unit in members]
        worst = next(state for state in ("cause", "missing", "spread", "same") if state in states)
        causes = [unit.name.removeprefix(f"{name}.") for unit in members if unit.state == "cause"]
        table.add_row(
            f"[{_STYLES[worst]}]{name}[/]",
            str(len(members)),
            f"{sum(unit.calls for unit in members):,}",
            f"{sum(unit.rows_compared for unit in members):,}",
            f"{sum(unit.rows_differing for unit in members):,}",
            f"cause in {', '.join(causes[:4])}" if causes else worst if worst != "same" else "",
        )
    return table
