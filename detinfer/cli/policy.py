"""``detinfer policy``: what the policy of this project decides on this machine, and why."""

from __future__ import annotations

import json
from typing import Any

import click

from detinfer import bits
from detinfer.policy import Accepted, Decision, explain
from detinfer.policy.aiter import explain_aiter
from detinfer.policy.configured import configured
from detinfer.policy.dispatch import explain_dispatch
from detinfer.policy.listing_collectives import explain_collectives
from detinfer.policy.refusals import DTYPES
from detinfer.policy.switches import read_switches


@click.group()
def policy() -> None:
    """What the policy decides on this machine."""


@policy.command("explain")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--policy", "scope", metavar="SCOPE", help="Scope, in place of the configured one: batch or run.")
@click.option("--allow", multiple=True, metavar="OP", help="In place of the configured list. Repeatable.")
@click.option(
    "--dtype",
    "names",
    multiple=True,
    type=click.Choice([bits.dtype_name(dtype) for dtype in DTYPES]),
    help="In place of all three. Repeatable.",
)
def explain_command(as_json: bool, scope: str | None, allow: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Print every operation and path with its decision and the reason; makes every proof."""
    found, origins = configured(scope=scope, allow=allow or None)
    dtypes = [dtype for dtype in DTYPES if not names or bits.dtype_name(dtype) in names]
    decisions = [*explain(found, dtypes), *explain_collectives(found, dtypes), *explain_dispatch(), *explain_aiter()]
    switches = read_switches(found)
    if as_json:
        rows = [decision.to_json() for decision in decisions]
        read = [{"name": s.switch.name, "value": s.value, "contradicts": s.contradiction} for s in switches]
        text = {"policy": found.to_json(), "origins": origins, "switches": read, "decisions": rows}
        click.echo(json.dumps(text, indent=1, sort_keys=True))
        return
    for name, value in found.to_json().items():
        shown = ", ".join(value) or "nothing" if isinstance(value, list) else value
        click.echo(f"{name:<10} {shown}  ({origins.get(name, 'default')})")
    for set_ in switches:
        click.echo(f"{set_.switch.name}={set_.value}  {set_.contradiction or set_.switch.meaning}")
    click.echo()
    for line in _lines(decisions):
        click.echo(line)
    accepted = sum(isinstance(decision, Accepted) for decision in decisions)
    click.echo(f"\n{accepted} accepted, {len(decisions) - accepted} refused")


def _lines(decisions: list[Decision]) -> list[str]:
    """One line for each operation, path and reason; proofs of several dtypes are counted together."""
    grouped: dict[tuple[Any, ...], list[int]] = {}
    for decision in decisions:
        proof = decision.proof if isinstance(decision, Accepted) else None
        key = (isinstance(decision, Accepted), decision.op, decision.path, decision.reason)
        grouped.setdefault(key, []).append(proof.cases if proof is not None else 0)
    lines = []
    for (accepted, op, path, reason), cases in grouped.items():
        compared = f" [{sum(cases)} results compared]" if sum(cases) else ""
        lines.append(f"{'accepted' if accepted else 'refused ':<8}  {op:<44} {path:<18} {reason}{compared}")
    return lines
