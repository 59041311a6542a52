"""What ``record --name`` and ``verify --pending`` do with a golden that is there and has changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from detinfer.errors import EXIT_DIVERGED, EXIT_SAME, UsageError

if TYPE_CHECKING:
    from detinfer.cli.opened import Opened
    from detinfer.goldens.result import Result


def destination(goldens: Path, name: str, target: Any, force: bool) -> tuple[Path, bool]:
    """Where a name's golden is written, and whether what is there may be replaced: a golden is not, one that waits is."""
    from detinfer import environment, native
    from detinfer.goldens import pending

    path = pending.place(goldens, name, environment.capture(native.isa(), target.libraries, target.device))
    if not path.exists() or force:
        return path, force
    return pending.pending(path), True


def settled(written: Path, out: Console) -> int:
    """The exit code of a golden that was written: 1 where it waits to be accepted, 0 where it is the one there."""
    from detinfer.goldens import folder, pending

    if not pending.is_pending(written):
        return EXIT_SAME
    path = written.with_name(written.name.removesuffix(pending.SUFFIX))
    if pending.compare(path) == "same":
        folder.remove(written)
        out.print(f"  unchanged: {path}", soft_wrap=True)
        return EXIT_SAME
    out.print(f"  [yellow]changed[/]: it waits; detinfer golden accept {path} --reason TEXT", soft_wrap=True)
    for line in pending.changes(path):
        out.print(f"    {line}", soft_wrap=True)
    return EXIT_DIVERGED


def keep(held: Opened, result: Result, console: Console) -> None:
    """Record what a golden that is no longer the same would be now, beside it; only where rows agree with each other."""
    from detinfer.goldens import pending
    from detinfer.goldens.record import record

    if result.golden.verdict not in ("diverged", "stale"):
        return
    if result.invariance.verdict == "diverged":
        console.print(
            "no golden is recorded: rows differ from the same rows alone; a golden would hide that", soft_wrap=True
        )
        return
    if held.ranks.size > 1:
        raise UsageError("--pending: not on several ranks; record it again with --tp")
    manifest = held.golden.manifest
    requests = [replace(request, follow=()) for request in held.requests]
    with console.status("recording what waits"):
        written = record(
            held.target,
            requests,
            pending.pending(held.golden.path),
            policy=held.policy,
            inputs=manifest.inputs,
            tensors=manifest.tensors_mode,
            command=manifest.command,
            reason="",
            overwrite=True,
        )
    assert written is not None
    settled(written.path, console)
