"""``detinfer run``: any program under the policy."""

from __future__ import annotations

import json
from pathlib import Path

import click

from detinfer.cli import options
from detinfer.errors import UsageError


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--policy", "scope", metavar="SCOPE", help="Scope, in place of the configured one: batch or run.")
@options.allow_option
@click.option(
    "--uncovered",
    type=click.Choice(["refuse", "trust"]),
    help="Operations that nothing covers: refuse them, which traces every call, or trust them [default: the project's].",
)
@click.option(
    "--engine",
    type=click.Choice(["sglang", "vllm", "transformers"]),
    help="Also set this engine's switches (detinfer env).",
)
@click.option(
    "--report", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write the summary as JSON."
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def run(
    context: click.Context,
    scope: str | None,
    allow: tuple[str, ...],
    uncovered: str | None,
    engine: str | None,
    report: Path | None,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND with the policy in force in every Python process that it starts: detinfer run -- torchrun script.py.

    Ends with what was caught, allowed and refused over all processes. The exit code is the command's, unless something
    was refused (2, also where the program went on), or no process used torch (5).
    """
    from detinfer.policy.configured import configured
    from detinfer.policy.engines import wanted
    from detinfer.run.parent import run as start

    if report is not None and not report.absolute().parent.is_dir():
        raise UsageError(f"--report {report}: there is no folder {report.parent}")
    policy, _ = configured(scope=scope, allow=allow or None, uncovered=uncovered)
    outcome = start(command, policy, wanted(engine, policy) if engine else None)
    if report is not None:
        report.write_text(json.dumps(outcome.to_json(), indent=1) + "\n", encoding="utf-8")
    for line in outcome.lines():
        click.echo(line, err=True)
    context.exit(outcome.exit_code)
