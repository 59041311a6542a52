"""Start a command under a policy, wait for it, and add up what its processes decided."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from detinfer.errors import EXIT_SAME, EXIT_USAGE, EXIT_VACUOUS, UsageError
from detinfer.policy.policy import Policy
from detinfer.policy.switches import check_switches
from detinfer.run.child import FOLDER

HOOK = Path(__file__).parent / "hook"


@dataclass
class Row:
    """One operation on these dtypes, over all processes."""

    op: str
    dtypes: list[str]
    accepted: bool
    allowed: bool
    path: str
    reason: str
    count: int = 0
    processes: int = 0


@dataclass
class Outcome:
    """What a run came to: the command's exit code and ours, its processes, decisions and refusals."""

    command: list[str]
    policy: dict[str, Any]
    command_exit_code: int
    processes: list[dict[str, Any]] = field(default_factory=list)
    decisions: list[Row] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    refusals: int = 0

    @property
    def unfinished(self) -> int:
        """Processes that were killed before they wrote their counts."""
        return sum(not process["ended"] for process in self.processes)

    @property
    def exit_code(self) -> int:
        """The command's, unless something was refused (2), or nothing was under the policy at all (5)."""
        if self.refusals:
            return EXIT_USAGE
        if not self.processes and self.command_exit_code == EXIT_SAME:
            return EXIT_VACUOUS
        return self.command_exit_code

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"schema": 1, "exit_code": self.exit_code} | asdict(self)

    def lines(self) -> list[str]:
        """The summary, for a terminal."""
        scope = f"scope {self.policy['scope']}, uncovered {self.policy['uncovered']}"
        said = [f"detinfer run: {_count(len(self.processes), 'process')} used torch under the policy ({scope})"]
        if self.unfinished:
            said.append(
                f"  {_count(self.unfinished, 'process')} ended before the counts were written: they are lower bounds"
            )
        rows = sorted(self.decisions, key=lambda row: (row.accepted, not row.allowed, -row.count))
        for row in [row for row in rows if row.allowed or "::" not in row.op or row.op.startswith("c10d")]:
            kind = "allowed" if row.allowed else "caught" if row.accepted else "refused"
            said.append(
                f"  {kind:<8} {row.op} {', '.join(row.dtypes)}: {row.count} calls in {row.processes} processes, {row.path}"
            )
        others = sum(row.accepted and not row.allowed and not row.op.startswith("c10d") for row in rows)
        if others:
            said.append(f"  accepted {others} other operations, on their proved paths or without a reduction")
        said += [f"  refused  {message}" for message in dict.fromkeys(one["message"] for one in self.refused)]
        if self.refusals:
            said.append(
                f"exit code 2: {_count(self.refusals, 'call')} refused (the command's own exit code was "
                f"{self.command_exit_code})"
            )
        elif self.exit_code == EXIT_VACUOUS:
            said.append(
                "exit code 5: no process of the command imported torch, so nothing was under the policy (Python started with "
                "-I, -E or -S does not see it)"
            )
        return said


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}{'es' if what.endswith('s') else 's'}"


def run(command: Sequence[str], policy: Policy, variables: Mapping[str, str] | None = None) -> Outcome:
    """Run ``command`` with ``variables`` added to the environment, every Python child under ``policy``.

    Raises UsageError for a command that cannot be started, and for an environment that contradicts the policy.
    """
    environment = {**os.environ, **(variables or {})}
    check_switches(policy, environment)
    with tempfile.TemporaryDirectory(prefix="detinfer-run-") as name:
        folder = Path(name)
        (folder / "policy.json").write_text(json.dumps(policy.to_json()), encoding="utf-8")
        environment[FOLDER] = name
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HOOK), environment.get("PYTHONPATH", ""))))
        try:
            process = subprocess.Popen(list(command), env=environment)
        except OSError as error:
            raise UsageError(f"{shlex.join(command)}: it cannot be started: {error.strerror}") from error
        code = _wait(process)
        outcome = Outcome(list(command), policy.to_json(), code)
        for path in sorted(folder.glob("*.jsonl")):
            _add(outcome, path)
    return outcome


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The command's exit code; an interrupt is the command's to answer, and a request to end is handed on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, lambda *_: None)  # the terminal sends it to the command too
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _add(outcome: Outcome, path: Path) -> None:
    rows = {(row.op, tuple(row.dtypes), row.reason): row for row in outcome.decisions}
    met: dict[tuple[str, tuple[str, ...]], Row] = {}
    counts: dict[tuple[str, tuple[str, ...]], int] = {}
    process: dict[str, Any] = {}
    refused = 0
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            ((kind, value),) = json.loads(text).items()
        except ValueError:  # the last line of a process that was killed while it wrote
            continue
        if kind == "process":
            process = {**value, "ended": False}
        elif kind == "decision":
            key = (value["op"], tuple(value["dtypes"]))
            row = rows.get((value["op"], key[1], value["reason"]))
            if row is None:
                row = rows[value["op"], key[1], value["reason"]] = Row(**value)
                outcome.decisions.append(row)
            row.processes += 1
            met[key], counts[key] = row, 1
        elif kind == "refused":
            refused += 1
            outcome.refused.append({**value, "pid": process.get("pid")})
        else:
            process["ended"] = True
            counts |= {(op, tuple(dtypes)): count for op, dtypes, count in value["counts"]}
            refused = value["refusals"]
    for key, row in met.items():
        row.count += counts[key]
    outcome.refusals += refused
    if process:
        outcome.processes.append(process)
