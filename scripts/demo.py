"""The main job on a real model: record SmolLM2-135M-Instruct, verify it in random batches, print what was proved.

    python3 scripts/demo.py [--short] [--folder FOLDER]

Makes or reuses the environment (see environment.py), needs nothing installed before. Exits with the status of
`detinfer verify`: 0 where every compared byte is equal.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environment

FULL: dict[str, tuple[object, ...]] = {"record": (), "verify": ("--n-trials", 50)}
SHORT: dict[str, tuple[object, ...]] = {"record": ("--n-prompts", 2, "--decode-steps", 2), "verify": ("--n-trials", 4)}


def main() -> int:
    """Record, verify, and sum up."""
    parser = argparse.ArgumentParser(description="Record and verify SmolLM2-135M-Instruct.")
    parser.add_argument("--short", action="store_true", help="fewer prompts, steps and trials")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the golden is written (default: runs)")
    options = parser.parse_args()
    python = environment.prepare(("hf",), smollm2=True)
    golden, report = options.folder / "smollm2", options.folder / "smollm2.json"
    report.unlink(missing_ok=True)

    start = time.monotonic()
    size = SHORT if options.short else FULL
    status = detinfer(
        python, "record", "smollm2", "-o", golden, *size["record"], "--force", "--reason", "demonstration"
    )
    if status == 0:
        status = detinfer(python, "verify", golden, *size["verify"], "--control", "--json", report)
    if report.is_file():
        print()
        for line in proved(json.loads(report.read_text(encoding="utf-8"))):
            print(line)
    print(f"detinfer's exit code {status}, {time.monotonic() - start:.0f} s after the installation", flush=True)
    return status


def detinfer(python: Path, *arguments: object) -> int:
    """Show and run one command of detinfer; its exit status."""
    words = [str(argument) for argument in arguments]
    print("\n$ detinfer " + shlex.join(words), flush=True)
    return subprocess.run([str(python), "-m", "detinfer", *words], check=False).returncode


def proved(result: dict[str, Any]) -> Iterator[str]:
    """What the verification's report says, one sentence a line."""
    rows, golden, control = result["invariance"], result["golden"], result["control"]
    reducing = [probe for probe in rows["sensitivity"] if probe["seen"] is not None]
    seen = sum(probe["seen"] for probe in reducing)
    yield (
        f"invariance {rows['verdict']}: in {rows['trials']} random batches (mean size {rows['mean_batch']:.1f}) "
        f"{rows['rows_differing']:,} of {rows['rows_compared']:,} rows differ from the same row run alone"
    )
    yield (
        f"golden {golden['verdict']}: "
        f"{golden['rows_differing']:,} of {golden['rows_compared']:,} rows differ from the recorded bytes"
    )
    yield f"sensitivity: a planted wrong order was seen in {seen} of {len(reducing)} reducing operations and shapes"
    yield (
        f"control (policy off; reported, not judged): {control['trials_diverged']} of {control['trials']} batches and "
        f"{control['rows_differing']:,} of {control['rows_compared']:,} rows differ"
    )


if __name__ == "__main__":
    sys.exit(main())
