"""``detinfer locate``: find the operation behind a divergence of a saved result, and write a script that shows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from rich.console import Console

from detinfer import errors
from detinfer.cli import options, ranks
from detinfer.cli.opened import opened
from detinfer.errors import UsageError

if TYPE_CHECKING:
    from detinfer.goldens.cause.locate import Located
    from detinfer.models.ranks import Ranks


@click.command()
@click.argument("result", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--control", is_flag=True, help="The first divergence of the control, found with the policy off.")
@click.option("--golden", type=click.Path(path_type=Path), metavar="DIR", help="Where the golden is now.")
@click.option("--target", "spec", metavar="TARGET", help="Where the model is now [default: where it was recorded].")
@options.device_option
@click.option("--tp", type=int, metavar="N", help="Ranks, started here [default: those of the result].")
@options.timeout_option
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
    tp: int | None,
    rank_timeout: float | None,
    script: Path | None,
) -> None:
    """Name the first operation whose results differ in RESULT, a file that `detinfer verify --json` wrote.

    The run alone and the run that differed are made again and watched operation by operation. Exits with 1 where the
    divergence shows again, with 0 where it does not. What was found on several ranks is searched for on as many.
    """
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
    size = ranks.size(tp, saved.ranks)
    if size != saved.ranks:
        raise UsageError(
            f"{result}: what it holds was found on {_count(saved.ranks)} and is searched for on as many, not on {size}: "
            f"detinfer locate {result}{f' --tp {saved.ranks}' if saved.ranks > 1 else ''}"
        )
    console = Console(stderr=True, quiet=ranks.number() > 0, highlight=False)
    opening = opened(
        context,
        golden or saved.path,
        console,
        spec=spec,
        device=device,
        tp=size,
        reductions=None,
        rank_timeout=rank_timeout,
    )
    with opening as held:
        with torch.no_grad() if control else deterministic(replace(held.policy, uncovered="trust")):
            located = again(held.golden, held.target, held.requests, first, saved.options, held.ranks)
        shown = Console(quiet=held.ranks.rank > 0, highlight=False)
        if located is None:
            shown.print("no operation was found whose results differ: the divergence did not show again")
        else:
            text.show_cause(located.cause, shown)
            if script is not None:
                written = _written(located, script, None if control else held.policy.guarantee.scope, held.ranks)
                shown.print(f"  script: {written}", soft_wrap=True)
        held.ranks.share(None)  # a launcher may end the others as soon as one leaves
    context.exit(errors.EXIT_SAME if located is None else errors.EXIT_DIVERGED)


def _count(size: int) -> str:
    return "one rank" if size == 1 else f"{size} ranks"


def _written(located: Located, folder: Path, scope: str | None, among: Ranks) -> Path:
    """The script, written by the rank that holds the operation; UsageError, on all of them, where there can be none."""
    from detinfer.goldens.cause import script as script_writer

    holds = among.share(located.operations is not None)
    writer = holds.index(True) if True in holds else 0
    written, problem = folder, ""
    if among.rank == writer:
        try:
            written = script_writer.write(located, folder, scope)
        except UsageError as error:
            problem = str(error)
    told: tuple[Path, str] = among.share((written, problem))[writer]
    if told[1]:
        raise UsageError(told[1])
    return told[0]
