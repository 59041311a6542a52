"""``detinfer locate``: find the operation behind a divergence of a saved result, and write a script that shows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import torch
from rich.console import Console

from detinfer import errors
from detinfer.cli import options
from detinfer.cli.opened import opened
from detinfer.errors import UsageError


@click.command()
@click.argument("result", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--control", is_flag=True, help="The first divergence of the control, found with the policy off.")
@click.option("--golden", type=click.Path(path_type=Path), metavar="DIR", help="Where the golden is now.")
@click.option("--target", "spec", metavar="TARGET", help="Where the model is now [default: where it was recorded].")
@options.device_option
@click.option(
    "--script", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Write a script that shows it."
)
@click.pass_context
def locate(
    context: click.Context,
    result: Path,
    control: bool,
    golden: Path | None,
    spec: str | None,
    device: str | None,
    script: Path | None,
) -> None:
    """Name the first operation whose results differ in RESULT, a file that `detinfer verify --json` wrote.

    The run alone and the run that differed are made again and watched operation by operation. Exits with 1 where the
    divergence shows again, with 0 where it does not.
    """
    from detinfer.goldens.cause import script as script_writer
    from detinfer.goldens.cause.again import again
    from detinfer.policy import deterministic
    from detinfer.reporters import json as json_reporter
    from detinfer.reporters import text

    saved = json_reporter.read(result)
    first = saved.first("control" if control else "invariance")
    if first is None:
        what = "its control (is there one?)" if control else "its invariance"
        raise UsageError(f"{result}: nothing diverged in {what}: there is no cause to locate")
    if first.axis.startswith("tp:"):
        raise UsageError(
            f"{result}: what differs is the file of another number of ranks: its cause is in the result (golden, cause), and "
            f"is told again by: {first.command}"
        )
    console = Console(stderr=True, highlight=False)
    with opened(context, golden or saved.path, console, spec=spec, device=device, tp=None, reductions=None) as held:
        with torch.no_grad() if control else deterministic(replace(held.policy, uncovered="trust")):
            located = again(held.golden, held.target, held.requests, first, saved.options)
        shown = Console(highlight=False)
        if located is None:
            shown.print("no operation was found whose results differ: the divergence did not show again")
            context.exit(errors.EXIT_SAME)
        text.show_cause(located.cause, shown)
        if script is not None:
            written = script_writer.write(located, script, None if control else held.policy.guarantee.scope)
            shown.print(f"  script: {written}", soft_wrap=True)
    context.exit(errors.EXIT_DIVERGED)
