"""Checks the goldens in goldens/: each has a reason, verifies, under other settings too, and is recorded twice alike.

    python scripts/goldens.py [FOLDER ...]

Runs in an environment that has the project (scripts/environment.py makes one); called by the nox session `goldens`. A
process works for one setting and goes through all goldens, as importing torch takes longer than most of the checks; the
two recordings of a golden are made by two processes. As many processes run at a time as there are CPUs.
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
from concurrent.futures import Future, ThreadPoolExecutor
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

Outcome = tuple[bool, float, str]
"""Whether a check passed, the seconds it took, what to print where it did not."""


def settings() -> dict[str, dict[str, str]]:
    """``SETTINGS``, and the kernels held to each instruction set below the best one that this CPU has."""
    code = "from detinfer import native; print(*native.load().levels)"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, check=True)
    return SETTINGS | {f"kernels at {level}": {"DETINFER_CPU_ISA": level} for level in done.stdout.split()[:-1]}


def main(arguments: list[str]) -> int:
    """Check every golden; 0 where all hold, else 1."""
    folders = [Path(argument).resolve() for argument in arguments]
    folders = folders or sorted(path.parent for path in (CHECKOUT / "goldens").rglob("manifest.json"))
    manifests = {os.path.relpath(path, CHECKOUT): json.loads((path / "manifest.json").read_text()) for path in folders}
    failures = 0
    for name, manifest in manifests.items():
        failures += not report(f"{name}: a reason is written", *has_reason(manifest))
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(os.cpu_count()) as pool:
        recordings = [pool.submit(detinfer, {}, record(manifests, Path(place), turn)) for turn in ("1", "2")]
        todo: list[tuple[str, list[str], Future[list[Outcome]]]] = []
        for setting, variables in settings().items():
            # csrc alone computes vectors: torch's settings are not in them.
            names = [
                n for n, m in manifests.items() if m.get("kind") != "vectors" or not (setting in SETTINGS and variables)
            ]
            commands = [["verify", name, "--n-trials", TRIALS] for name in names]
            todo.append((setting, names, pool.submit(detinfer, variables, commands)))
        for name, *both in zip(manifests, *(done.result() for done in recordings), strict=True):
            folder = name.replace(os.sep, "_")
            failures += not report(f"{name}: record twice", *alike(both, [Path(place, t, folder) for t in ("1", "2")]))
        for setting, names, done in todo:
            for name, outcome in zip(names, done.result(), strict=True):
                failures += not report(f"{name}: verify, {setting}", *outcome)
    print(f"{len(folders)} goldens, {failures} failed checks", flush=True)
    if not folders:
        print("there is no golden to check: goldens/ holds no manifest.json", flush=True)
        return 1
    return int(failures > 0)


def record(manifests: dict[str, dict[str, Any]], place: Path, turn: str) -> list[list[str]]:
    """The command in each manifest, with a folder in ``place`` to write to."""
    return [
        [*shlex.split(manifest["command"])[1:], "--output", str(place / turn / name.replace(os.sep, "_"))]
        for name, manifest in manifests.items()
    ]


def has_reason(manifest: dict[str, Any]) -> Outcome:
    """Whether the manifest says why the golden is as it is."""
    return bool(manifest["reason"].strip()), 0.0, "it has none"


def alike(outcomes: list[Outcome], outputs: list[Path]) -> Outcome:
    """Whether two recordings were made and have the same bytes in all their files."""
    seconds = sum(outcome[1] for outcome in outcomes)
    for done, _, text in outcomes:
        if not done:
            return False, seconds, text
    found = [
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in output.iterdir()} for output in outputs
    ]
    different = sorted(name for name in {*found[0], *found[1]} if found[0].get(name) != found[1].get(name))
    return not different, seconds, f"these files differ: {', '.join(different)}"


def detinfer(variables: dict[str, str], commands: list[list[str]]) -> list[Outcome]:
    """Run commands of detinfer one after the other in one process: whether each exit code is 0, seconds, its output."""
    with tempfile.TemporaryDirectory() as place:
        results, said = Path(place) / "results", Path(place) / "said"
        with said.open("ab") as output:  # for appending: what ranks say is in it too
            process = subprocess.run(
                [sys.executable, __file__, "--commands", str(results), str(said)],
                cwd=CHECKOUT,
                env={**os.environ, **variables},
                input=json.dumps(commands),
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
        lines = results.read_text().splitlines() if results.exists() else []
        text = said.read_bytes()
    found: list[Outcome] = []
    end = 0
    for words, line in zip(commands, lines, strict=False):
        code, seconds, begin, end = json.loads(line)
        found.append((code == 0, seconds, _text(words, text[begin:end], code)))
    # A command that ended the process has written nothing, nor have those after it.
    code = f"{process.returncode} of the process"
    return found + [(False, 0.0, _text(words, text[end:], code)) for words in commands[len(found) :]]


def _text(words: list[str], said: bytes, code: object) -> str:
    return f"$ detinfer {shlex.join(words)}\n{said.decode(errors='replace')}exit code {code}"


def run(results: Path, said: Path) -> None:
    """In a process of its own: run the commands of standard input, and write how each ended and where its output is."""
    sys.path[0] = str(CHECKOUT)  # as python -m has it: goldens/ holds targets
    from detinfer import cli

    commands = json.load(sys.stdin)
    for words in commands:
        start, begin = time.monotonic(), said.stat().st_size
        sys.argv[1:] = words  # a manifest holds the command
        code = cli.run()
        sys.stdout.flush()
        sys.stderr.flush()
        with results.open("a") as file:
            file.write(json.dumps([code, time.monotonic() - start, begin, said.stat().st_size]) + "\n")


def report(check: str, passed: bool, seconds: float, text: str) -> bool:
    """Print one line for a check, and its output where it failed."""
    print(f"{'passed' if passed else 'FAILED'}  {check} ({seconds:.1f} s)", flush=True)
    if not passed:
        print(text, flush=True)
    return passed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--commands"]:
        run(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main(sys.argv[1:]))
