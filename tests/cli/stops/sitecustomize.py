"""Stops a verification at a trial: on the path of every process that a test starts, ranks and their server among them.

``STOP=RANK:TRIAL:HOW`` has that rank, half through that trial, ``kill`` itself, be ``interrupt``\\ed, or ``signal`` with its
SIGTERM; ``STOP=say`` has rank 0 print each trial as it begins.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from typing import Any

MODULE = "detinfer.goldens.sweep"


def plant(sweep: Any) -> None:
    rank, _, how = os.environ["STOP"].partition(":")
    trial, _, how = how.partition(":")
    real, half = sweep.Sweep.trial, sweep.Sweep._judge

    def begins(self: Any, one: Any) -> Any:
        if rank == "say" and os.environ.get("RANK") == "0":
            print(f"trial {one.number}", flush=True)
            time.sleep(0.02)
        return real(self, one)

    def judge(self: Any, part: Any, one: Any, *rest: Any) -> None:
        half(self, part, one, *rest)
        if rank == os.environ.get("RANK") and one.number == int(trial) and len(part.tallies) == 3:
            if how == "interrupt":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGTERM)

    sweep.Sweep.trial, sweep.Sweep._judge = begins, judge


class Finder(importlib.abc.MetaPathFinder):
    """Finds the module as Python would, and plants once it has run."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            plant(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "STOP" in os.environ:
    sys.meta_path.insert(0, Finder())
