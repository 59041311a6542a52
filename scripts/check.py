"""Every check of the project, in one shared environment: the nox sessions one after the other, tests last.

    python3 scripts/check.py [SESSION ...]

Makes or reuses the environment (see environment.py), needs nothing installed before. Exits with nox's status; the last
line counts the tests of all sessions.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import environment
import evaluations
import hip

SESSIONS = ("lint", "types", "build", "goldens", "demo", "docs", "interception", "tests")
WHERE_PREPARED = {"hip": lambda: hip.prepared(hip.tools()), "evaluations": evaluations.prepared}
"""Sessions that run where their tools are: these are large, and have to be asked for to be fetched."""
REPORTS = environment.CHECKOUT / "build" / "reports"
"""Where each session's pytest leaves its counts (JUnit XML)."""


def main(sessions: list[str]) -> int:
    """Run ``sessions`` (all by default) and print the sum of their tests."""
    start = time.monotonic()
    python = environment.prepare(("dev", "hf"), smollm2=True)
    shutil.rmtree(REPORTS, ignore_errors=True)
    chosen = sessions or [*SESSIONS, *(name for name, prepared in WHERE_PREPARED.items() if prepared())]
    nox = subprocess.run(
        [python, "-m", "nox", "--no-venv", "--session", *chosen],
        cwd=environment.CHECKOUT,
        env=environment.variables(python),
        stdin=subprocess.DEVNULL,
        check=False,
    )
    passed, failed, skipped = counts(REPORTS)
    print(f"checks: {'passed' if nox.returncode == 0 else 'FAILED'} in {time.monotonic() - start:.0f} s")
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return nox.returncode


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
