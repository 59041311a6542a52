"""``detinfer env``: what this machine is, and which of it makes a golden stale."""

from __future__ import annotations

import json

import click

from detinfer import environment, native
from detinfer.native import Loaded


@click.command()
@click.option(
    "--engine", type=click.Choice(["sglang", "vllm", "transformers"]), help="Print its switches at this policy."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def env(engine: str | None, as_json: bool) -> None:
    """Print the environment's fingerprint and the state of the native library; with --engine, the engine's switches."""
    if engine is not None:
        _switches(engine, as_json)
        return
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


def _switches(engine: str, as_json: bool) -> None:
    """Lines that a shell can read, and beside them what is wrong here."""
    from detinfer.policy.configured import configured
    from detinfer.policy.engines import FLAGS, check

    policy, _ = configured()
    version, found = check(engine, policy)
    if as_json:
        rows = [
            {
                "name": one.setting.name,
                "value": one.setting.value,
                "why": one.setting.why,
                "now": one.now,
                "note": one.note,
            }
            for one in found
        ]
        click.echo(
            json.dumps({"engine": engine, "version": version, "flags": FLAGS[engine], "switches": rows}, indent=1)
        )
        return
    click.echo(f"# {engine} {version or '(not installed here)'} at scope {policy.guarantee.scope}")
    for one in found:
        note = f"; {one.note}" if one.note else ""
        click.echo(f"export {one.setting.name}={one.setting.value}  # {one.setting.why}{note}")
    if not found:
        click.echo("# this scope asks for nothing")
    elif flags := FLAGS[engine]:
        click.echo(f"# and start it with {flags}")
