"""Every check of the project, in one shared environment: the nox sessions one after the other, tests last.

    python3 scripts/check.py [SESSION ...]

Makes or reuses the environment (see environment.py), needs nothing installed before. A session that mostly waits for the
network runs beside the others and is printed when it has ended. Exits with 0 where every session passed; the last line
counts the tests of all sessions.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import IO

import environment
import evaluations
import hip

SESSIONS = ("lint", "types", "build", "goldens", "demo", "docs", "interception", "tests")
WHERE_PREPARED = {"hip": lambda: hip.prepared(hip.tools()), "evaluations": evaluations.prepared}
"""Sessions that run where their tools are: these are large, and have to be asked for to be fetched."""
BESIDE = frozenset({"interception"})
"""Sessions that run beside those before the tests: they fetch and unpack packages, on one core."""
LAST = frozenset({"tests"})
"""Sessions that have the machine for themselves: they run something on every core."""
REPORTS = environment.CHECKOUT / "build" / "reports"
"""Where each session's pytest leaves its counts (JUnit XML)."""


def main(sessions: list[str]) -> int:
    """Run ``sessions`` (all by default) and print the sum of their tests."""
    start = time.monotonic()
    python = environment.prepare(("dev", "hf"), smollm2=True)
    shutil.rmtree(REPORTS, ignore_errors=True)
    chosen = sessions or [*SESSIONS, *(name for name, prepared in WHERE_PREPARED.items() if prepared())]
    command = [str(python), "-m", "nox", "--no-venv", "--session"]
    variables = environment.variables(python)
    front = [name for name in chosen if name not in BESIDE | LAST]
    first = lanes(command, variables, front, [name for name in chosen if name in BESIDE])
    last = lanes(command, variables, [name for name in chosen if name in LAST], [])
    status = first or last
    passed, failed, skipped = counts(REPORTS)
    print(f"checks: {'passed' if status == 0 else 'FAILED'} in {time.monotonic() - start:.0f} s")
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return status


def lanes(command: list[str], variables: dict[str, str], front: list[str], beside: list[str]) -> int:
    """nox's first status that is not 0: of the sessions ``front``, and of ``beside``, which run meanwhile."""

    def nox(sessions: list[str], output: IO[str] | None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, *sessions],
            cwd=environment.CHECKOUT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            text=True,
        )

    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        running = [nox(sessions, output) for sessions, output in ((beside, said), (front, None)) if sessions]
        try:
            statuses = [process.wait() for process in reversed(running)]
        finally:
            for process in running:
                process.terminate()
        said.seek(0)
        print(said.read(), end="", flush=True)
    return next(filter(None, statuses), 0)


def counts(folder: Path) -> tuple[int, int, int]:
    """Tests that passed, failed and were skipped, over all reports in ``folder``; an error counts as failed."""
    passed = failed = skipped = 0
    for report in sorted(folder.glob("*.xml")):
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            left = int(suite.get("skipped", 0))
            passed += int(suite.get("tests", 0)) - bad - left
            failed += bad
            skipped += left
    return passed, failed, skipped


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
