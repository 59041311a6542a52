"""``detinfer diff``: two recordings side by side."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the result as JSON.")
@click.pass_context
def diff(context: click.Context, a: Path, b: Path, json_file: Path | None) -> None:
    """Compare the goldens A and B: environment, model, policy, inputs, layers in order, tokens.

    Of two machines, versions or policies. Exits with 0 when inputs, layers, results and tokens have the same bytes, with
    1 when they do not, whatever the environments.
    """
    from detinfer.goldens.diff import diff as compare
    from detinfer.goldens.format import Golden
    from detinfer.reporters import diff as reporter
    from detinfer.reporters import json as json_reporter

    found = compare(Golden.read(a), Golden.read(b))
    if json_file is not None:
        json_reporter.write(found, json_file)
    reporter.show(found, Console(highlight=False))
    context.exit(found.exit_code())
