"""``detinfer golden``: look at goldens on the disk, check them, remove what was left behind."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from detinfer.cli.options import golden_path
from detinfer.errors import EXIT_GOLDEN, EXIT_SAME

_path = click.Path(path_type=Path)
_force = click.option("--force", is_flag=True, help="Replace a golden that is there.")


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
        here = (
            "[yellow]pending[/]"
            if entry.pending
            else "yes"
            if entry.here
            else f"[yellow]{entry.problem.partition(':')[0]}[/]"
        )
        table.add_row(str(entry.path), entry.of, entry.dtype, ranks, entry.environment, here, size)
    shown = Console(highlight=False)
    # A line a golden: a path that is cut is of no use.
    shown.width = max(shown.width, 110 + max((len(str(entry.path)) for entry in entries), default=0))
    shown.print(table if entries else f"{folder}: no golden")


@golden.command()
@click.argument("path", type=golden_path)
def show(path: Path) -> None:
    """What the golden at PATH holds: target, prompts, units, decisions, and what its environment differs in from here."""
    from detinfer.goldens import pending, registry

    for name, value in registry.described(pending.resolve(path)):
        print(f"{name:<14} {value}")
    for line in pending.changes(pending.resolve(path)):
        print(f"{'pending':<14} {line}")


@golden.command()
@click.argument("paths", type=golden_path, nargs=-1, required=True)
@click.pass_context
def check(context: click.Context, paths: tuple[Path, ...]) -> None:
    """Read the goldens at PATHS whole: every file and tensor against its digest.

    Exits with 4 where one is damaged, or where a changed one waits beside it to be accepted. A PATH is a golden, a file
    of one, or a folder with goldens below. That is what the pre-commit hook runs.
    """
    from detinfer.goldens import pending, registry

    failed = 0
    for path in registry.at(paths):
        problem = registry.problem(path)
        if problem is None and (pending.is_pending(path) or pending.pending(path).exists()):
            name = path.name if pending.is_pending(path) else pending.pending(path).name
            problem = f"whole, but {name} waits: accept or reject it"
        failed += problem is not None
        print(f"{path}: {problem or 'whole'}")
    context.exit(EXIT_GOLDEN if failed else EXIT_SAME)


@golden.command()
@click.argument("path", type=_path)
@click.option("--reason", required=True, help="Why it changed: kept in its manifest.")
@click.option("--in-ci", is_flag=True, help="Accept although the variable CI is set.")
def accept(path: Path, reason: str, in_ci: bool) -> None:
    """Put the golden that waits beside PATH (PATH.pending) in its place."""
    from detinfer.goldens import pending

    print(f"accepted: {pending.accept(_waiting(path), reason, in_ci)}")


@golden.command()
@click.argument("path", type=_path)
def reject(path: Path) -> None:
    """Remove the golden that waits beside PATH; the one at PATH stays."""
    from detinfer.goldens import pending

    print(f"removed: {pending.reject(_waiting(path))}")


def _waiting(path: Path) -> Path:
    """The golden that is meant: of the one that waits, of a name, or itself."""
    from detinfer.goldens import pending

    if pending.is_pending(path):
        return path.with_name(path.name.removesuffix(pending.SUFFIX))
    return pending.resolve(path)


@golden.command()
@click.argument("url")
@click.argument("path", type=_path)
@_force
def fetch(url: str, path: Path, force: bool) -> None:
    """Copy the golden in the remote folder URL (s3://, hf://, ...) to PATH, every file against its digest."""
    from detinfer.goldens import remote

    print(f"fetched: {remote.fetch(url, path, force)}")


@golden.command()
@click.argument("path", type=_path)
@click.argument("url")
@_force
def push(path: Path, url: str, force: bool) -> None:
    """Copy the golden at PATH to the remote folder URL, after reading it whole."""
    from detinfer.goldens import pending, remote

    remote.push(pending.resolve(path), url, force)
    print(f"pushed: {url}")


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
