"""``detinfer golden``: look at goldens on the disk, check them, remove what was left behind."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from detinfer.errors import EXIT_GOLDEN, EXIT_SAME

_path = click.Path(path_type=Path)


@click.group()
def golden() -> None:
    """List, show, check and tidy goldens; none of these loads a model."""


@golden.command("ls")
@click.argument("folder", type=_path, default="goldens")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_(folder: Path, as_json: bool) -> None:
    """The goldens in FOLDER and below it (default: goldens): what of, in which environment, how large."""
    from detinfer.goldens import registry

    entries = registry.entries(folder)
    if as_json:
        print(json.dumps([entry.to_json() for entry in entries], indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("golden", "of", "dtype", "ranks", "environment", "here", "size"):
        table.add_column(
            name,
            overflow="fold" if name == "golden" else "ellipsis",
            no_wrap=name != "golden",
            justify="right" if name == "size" else "left",
        )
    for entry in entries:
        size = f"{entry.bytes / 1e6:.1f} MB"
        ranks = str(entry.ranks) if entry.ranks > 1 else ""
        here = "yes" if entry.here else f"[yellow]{entry.problem.partition(':')[0]}[/]"
        table.add_row(str(entry.path), entry.of, entry.dtype, ranks, entry.environment, here, size)
    shown = Console(highlight=False)
    # A line a golden: a path that is cut is of no use.
    shown.width = max(shown.width, 110 + max((len(str(entry.path)) for entry in entries), default=0))
    shown.print(table if entries else f"{folder}: no golden")


@golden.command()
@click.argument("path", type=_path)
def show(path: Path) -> None:
    """What the golden at PATH holds: target, prompts, units, decisions, and what its environment differs in from here."""
    from detinfer.goldens import registry

    for name, value in registry.described(path):
        print(f"{name:<14} {value}")


@golden.command()
@click.argument("paths", type=_path, nargs=-1, required=True)
@click.pass_context
def check(context: click.Context, paths: tuple[Path, ...]) -> None:
    """Read the goldens at PATHS whole: every file and tensor against its digest. Exits with 4 where one is damaged.

    A PATH is a golden, a file of one, or a folder with goldens below. That is what the pre-commit hook runs.
    """
    from detinfer.goldens import registry

    failed = 0
    for path in registry.at(paths):
        problem = registry.problem(path)
        failed += problem is not None
        print(f"{path}: {problem or 'whole'}")
    context.exit(EXIT_GOLDEN if failed else EXIT_SAME)


@golden.command()
@click.argument("folder", type=_path, default="goldens")
@click.option("--delete", is_flag=True, help="Remove them; without it they are only listed.")
def prune(folder: Path, delete: bool) -> None:
    """What killed writers left in FOLDER and below it (`.NAME.partial-PID`); never a golden."""
    from detinfer.goldens import registry

    for path in registry.leftovers(folder):
        if delete:
            registry.remove(path)
        print(f"{'removed' if delete else 'left behind'}: {path}")
