"""What ``record`` and ``verify`` do with vectors, which are goldens of one operation."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from detinfer.cli import options

PREFIX = "vectors:"


def record(target: str, output: Path, reason: str, force: bool) -> None:
    """Compute an operation's vectors from the reference and write them."""
    from detinfer.goldens.vectors import file
    from detinfer.goldens.vectors.make import make

    operation = target.removeprefix(PREFIX)
    cases = make(operation)
    command = options.command_line(("-o", "--output"), flags=("--force",))
    written = file.write(output, operation, cases, reason=reason, command=command, overwrite=force)
    size = sum(item.stat().st_size for item in written.iterdir())
    out = Console(highlight=False)
    out.print(f"[bold]recorded[/] {written}: {len(cases)} vectors of {operation}, {size / 1e6:.1f} MB", soft_wrap=True)


def verify(folder: Path, ranks: int | None, json_file: Path | None) -> int:
    """Replay a folder of vectors through every path of this machine; returns the exit code."""
    from detinfer.goldens.vectors.replay import replay
    from detinfer.reporters import json as json_reporter
    from detinfer.reporters import vectors as reporter

    with Console(stderr=True, highlight=False).status("replaying vectors"):
        result = replay(folder, ranks)
    if json_file is not None:
        json_reporter.write(result, json_file)
    reporter.show(result, Console(highlight=False))
    return result.exit_code()
