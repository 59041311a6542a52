"""``detinfer env``: what this machine is, and which of it makes a golden stale."""

from __future__ import annotations

import json

import click

from detinfer import environment, native
from detinfer.native import Loaded


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def env(as_json: bool) -> None:
    """Print the environment's fingerprint and the state of the native library."""
    state = native.load()
    found = environment.capture(native.isa() if isinstance(state, Loaded) else "none").to_json()
    library = (
        {"path": str(state.path), "instruction_sets": list(state.levels), "in_use": native.isa()}
        if isinstance(state, Loaded)
        else {"not_loaded": state.reason}
    )
    if as_json:
        click.echo(json.dumps({"environment": found, "native": library}, indent=1, sort_keys=True))
        return
    for name, value in sorted(found.items()):
        mark = "*" if name in environment.STALE_FIELDS else " "
        click.echo(f"{mark} {name:<24} {value}")
    click.echo("* a golden that was recorded with another value is stale, unless every operation in it is portable\n")
    for name, value in library.items():
        click.echo(f"  {name:<24} {value}")
