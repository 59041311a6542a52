"""``detinfer verify`` over ranks, stopped at a trial from outside (``stops/sitecustomize.py``), and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from detinfer import cli

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SMALL = ("--n-prompts", "2", "--length", "3", "--decode-steps", "1")


def environment(stop: str) -> dict[str, str]:
    """For a process that is stopped at a trial."""
    return {**os.environ, "PYTHONPATH": f"{HERE / 'stops'}{os.pathsep}{ROOT}", "STOP": stop}


def odd(fault: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """detinfer as a command, with a fault of ``odd_batch.py`` on some ranks; ``more`` goes into its environment."""
    held = {name: value for name, value in environment("").items() if name != "STOP"}
    command = [sys.executable, "-m", "detinfer", *words]
    around = {**held, "ODD": fault, "COLUMNS": "200", **more}
    return subprocess.run(command, cwd=ROOT, env=around, capture_output=True, text=True, check=False)


def stopped(stop: str, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """detinfer as a command; ``stop`` is that of ``stops/sitecustomize.py``, or nothing."""
    command = [sys.executable, *launcher, "-m", "detinfer", *words]
    return subprocess.run(command, cwd=ROOT, env=environment(stop), capture_output=True, text=True, check=False)


def record(folder: Path) -> Path:
    """builtin:moe on 3 ranks."""
    assert cli.run(["record", "builtin:moe", "--tp", "3", "-o", str(folder), *SMALL]) == 0
    return folder


def result(file: Path) -> dict[str, Any]:
    """What was saved, without the times."""
    held: dict[str, Any] = json.loads(file.read_text())
    del held["seconds"]
    return held


def done(file: Path) -> list[set[str]]:
    """By rank, what a partial result holds."""
    held = result(file)["unfinished"]
    return [set(held["done"]), *(set(other) for other in held["others"])]
