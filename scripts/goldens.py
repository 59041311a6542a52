"""Checks the goldens in goldens/: each has a reason, verifies, under other settings too, and is recorded twice alike.

    python scripts/goldens.py [FOLDER ...]

Runs in an environment that has the project (scripts/environment.py makes one); called by the nox session `goldens`. As
many checks run at a time as there are CPUs: most of each is spent starting Python and importing torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
TRIALS = "8"
SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "torch's lowest capability": {"ATEN_CPU_CAPABILITY": "default"},
}
"""Variables that must not change a golden's verdict; the goldens here hold portable operations only."""


def settings() -> dict[str, dict[str, str]]:
    """``SETTINGS``, and the kernels held to each instruction set below the best one that this CPU has."""
    code = "from detinfer import native; print(*native.load().levels)"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, check=True)
    return SETTINGS | {f"kernels at {level}": {"DETINFER_CPU_ISA": level} for level in done.stdout.split()[:-1]}


def main(arguments: list[str]) -> int:
    """Check every golden; 0 where all hold, else 1."""
    folders = [Path(argument).resolve() for argument in arguments]
    folders = folders or sorted(path.parent for path in (CHECKOUT / "goldens").rglob("manifest.json"))
    failures = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        todo = [(name, pool.submit(check)) for name, check in checks(folders)]
        for name, done in todo:
            failures += not report(name, *done.result())
    print(f"{len(folders)} goldens, {failures} failed checks", flush=True)
    if not folders:
        print("there is no golden to check: goldens/ holds no manifest.json", flush=True)
        return 1
    return int(failures > 0)


Outcome = tuple[bool, float, str]
"""Whether a check passed, the seconds it took, what to print where it did not."""


def checks(folders: list[Path]) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """Every check of every golden: its name, and what makes it."""
    variants = settings()
    for folder in folders:
        name = os.path.relpath(folder, CHECKOUT)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        yield f"{name}: a reason is written", partial(has_reason, manifest)
        vectors = manifest.get("kind") == "vectors"  # csrc alone computes them: torch's settings are not in them
        for setting, variables in variants.items():
            if vectors and setting in SETTINGS and variables:
                continue
            verify = partial(detinfer, variables, "verify", name, "--n-trials", TRIALS)
            yield f"{name}: verify, {setting}", verify
        yield f"{name}: record twice", partial(record_twice, folder)


def has_reason(manifest: dict[str, Any]) -> Outcome:
    """Whether the manifest says why the golden is as it is."""
    return bool(manifest["reason"].strip()), 0.0, "it has none"


def record_twice(folder: Path) -> Outcome:
    """Record two goldens with the command in the manifest, and compare all their bytes."""
    command = shlex.split(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["command"])
    start = time.monotonic()
    found = []
    with tempfile.TemporaryDirectory() as place:
        for number in ("1", "2"):
            output = Path(place) / number
            done, _, text = detinfer({}, *command[1:], "--output", str(output))
            if not done:
                return False, time.monotonic() - start, text
            found.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in output.iterdir()})
    different = sorted(name for name in {*found[0], *found[1]} if found[0].get(name) != found[1].get(name))
    return not different, time.monotonic() - start, f"these files differ: {', '.join(different)}"


def detinfer(variables: dict[str, str], *arguments: str) -> Outcome:
    """Run one command of detinfer from the checkout: whether its exit code is 0, seconds, its output."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "detinfer", *arguments],
        cwd=CHECKOUT,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    text = f"$ detinfer {shlex.join(arguments)}\n{done.stdout}exit code {done.returncode}"
    return done.returncode == 0, time.monotonic() - start, text


def report(check: str, passed: bool, seconds: float, text: str) -> bool:
    """Print one line for a check, and its output where it failed."""
    print(f"{'passed' if passed else 'FAILED'}  {check} ({seconds:.1f} s)", flush=True)
    if not passed:
        print(text, flush=True)
    return passed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
