"""``detinfer fingerprint``: what decides bits here, as one short string, and what two of them differ in."""

from __future__ import annotations

import json
from pathlib import Path

import click

from detinfer.cli import options
from detinfer.errors import EXIT_DIVERGED, EXIT_SAME


@click.group()
def fingerprint() -> None:
    """One string for the policy, its decisions and proofs, and the environment."""


@fingerprint.command("show")
@options.policy_option
@options.allow_option
@click.option("--json", "as_json", is_flag=True, help="Print the JSON behind it, which explain reads.")
def show(scope: str | None, allow: tuple[str, ...], as_json: bool) -> None:
    """Print this machine's fingerprint under the project's policy; makes every proof."""
    from detinfer.fingerprint import capture

    found = capture(options.policy(scope, allow))
    click.echo(json.dumps(found.to_json(), indent=1, sort_keys=True) if as_json else str(found))


@fingerprint.command("explain")
@click.argument("a", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("b", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.pass_context
def explain(context: click.Context, a: Path, b: Path) -> None:
    """Say what the fingerprints in the files A and B differ in: results files, or what show --json printed.

    Exits with 0 when they are the same, with 1 when they are not.
    """
    from detinfer.fingerprint import differences, read

    left, right = read(a), read(b)
    click.echo(f"a  {left}  {a}\nb  {right}  {b}")
    found = differences(left, right)
    for name, one, other in found:
        click.echo(f"{name}\n  a  {one}\n  b  {other}")
    click.echo(f"{len(found)} differences" if found else "the same")
    context.exit(EXIT_DIVERGED if found else EXIT_SAME)
