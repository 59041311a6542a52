"""In a Python child of ``detinfer run``: the policy in force for the life of the process, and its account on disk.

A process writes lines of JSON to a file of its own: what it is, each decision when it is first made, each refusal when it
happens, the counts at the end. A process that is killed leaves all but the counts.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing.util
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from detinfer.bits import dtype_name
from detinfer.errors import DetinferError, RefusedError
from detinfer.policy import Active, deterministic
from detinfer.policy.policy import Accepted, Decision, Policy, from_json
from detinfer.policy.state import STATE
from detinfer.run import served

FOLDER = "DETINFER_RUN"
"""Names the folder of the run: the policy and the processes' accounts."""

MOST_MESSAGES = 20
"""Refusals of a process that are written out; further ones are counted."""

_entered: list[Any] = []
_policy: list[Policy] = []


class Account:
    """One process's file; safe to use from several threads, and begun anew in a forked child."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self.active: Active | None = None
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, tuple[torch.dtype, ...]], int] = {}
        self._refusals, self._closed = 0, False
        self._path = self._folder / f"{os.getpid()}-{time.monotonic_ns()}.jsonl"
        words = getattr(sys, "orig_argv", sys.argv)
        place = {name.lower(): os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
        self._write({"process": {"pid": os.getpid(), "parent": os.getppid(), "argv": list(words), **place}})

    def forked(self) -> None:
        """In a forked child: an account of its own."""
        self._base = dict(self.active.counts) if self.active is not None else {}
        self._begin()

    def finish_with_process(self) -> None:
        """In a child of multiprocessing, which ends without ``atexit``."""
        multiprocessing.util.Finalize(None, self.close, exitpriority=0)

    _base: dict[Any, int] = {}  # noqa: RUF012  (replaced, never changed)

    def note(self, op: str, dtypes: Sequence[torch.dtype], decision: Decision) -> None:
        """A collective was decided."""
        key = (op, tuple(dtypes))
        with self._lock:
            first = key not in self._counts
            self._counts[key] = self._counts.get(key, 0) + 1
        if first:
            self._decision(key, decision)

    def refused(self, message: str) -> None:
        """A refusal."""
        with self._lock:
            self._refusals += 1
            if self._refusals > MOST_MESSAGES:
                return
        self._write({"refused": {"message": message}})

    def close(self) -> None:
        """Write the counts."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self.active is not None:
            for key, count in self.active.counts.items():
                if (made := count - self._base.get(key, 0)) > 0 and key not in self._counts:
                    self._counts[key] = made
                    self._decision(key, self.active.decisions[key])
        counts = [[op, [dtype_name(d) for d in dtypes], count] for (op, dtypes), count in self._counts.items()]
        self._write({"end": {"counts": counts, "refusals": self._refusals}})

    def _decision(self, key: tuple[str, tuple[torch.dtype, ...]], decision: Decision) -> None:
        allowed = isinstance(decision, Accepted) and decision.reason.startswith("allowed by the policy")
        row = {"op": key[0], "dtypes": [dtype_name(d) for d in key[1]], "allowed": allowed, "reason": decision.reason}
        self._write({"decision": {**row, "accepted": isinstance(decision, Accepted), "path": decision.path}})

    def _write(self, line: dict[str, Any]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _leave(account: Account, block: deterministic) -> None:
    """At the end of the process: write the counts, and take the policy out while there is an interpreter to do it."""
    account.close()
    STATE.ledger = RefusedError.heard = None
    block.__exit__(None, None, None)


def enter() -> None:
    """Put the run's policy in force for this process. SystemExit with what is wrong where it cannot be."""
    if _entered:
        return
    folder = Path(os.environ[FOLDER])
    try:
        policy = from_json(json.loads((folder / "policy.json").read_text(encoding="utf-8")))
        account = Account(folder)
        block = deterministic(policy)
        account.active = block.__enter__()
    except (DetinferError, OSError, ValueError) as error:
        print(f"detinfer run: the policy cannot be put in force in process {os.getpid()}: {error}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, DetinferError) else 3)
    _entered.append(block)
    _policy.append(policy)
    serving()
    STATE.ledger, RefusedError.heard = account, account.refused
    atexit.register(_leave, account, block)
    os.register_at_fork(after_in_child=account.forked)
    multiprocessing.util.register_after_fork(account, Account.finish_with_process)


def serving() -> None:
    """uvicorn was imported, or the policy came into force: once both are so, its answers carry the fingerprint."""
    config = sys.modules.get("uvicorn.config")
    if _policy and config is not None and hasattr(config, "Config"):
        served.mark(config, _policy[0])
