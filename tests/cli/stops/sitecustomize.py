"""Plants what a test asks for: on the path of every process that it starts, ranks and their server among them.

Stops a verification at a trial: ``STOP=RANK:TRIAL:HOW`` has that rank, half through that trial, ``kill`` itself, be ``interrupt``\\ed, or ``signal`` with its
SIGTERM; ``STOP=say`` has rank 0 print each trial as it begins. ``ODD=WHAT:PATH:RANKS`` has
the bits of these ranks depend on the batch (``odd_batch.py``), and ``DIES`` is a rank that is gone when the cause of that is
searched for.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any


def odd(find: Any) -> None:
    sys.path.append(str(Path(__file__).parents[2] / "goldens"))
    from odd_batch import planted

    from detinfer.models import targets

    load, locate = targets.load, find.locate
    what, path, on = os.environ["ODD"].split(":")

    def loaded(*given: Any, **more: Any) -> Any:
        target = load(*given, **more)
        _kept.enter_context(planted(target.module, what, path, os.environ.get("RANK") in on.split(",")))
        return target

    def dies(*given: Any, **more: Any) -> Any:
        if os.environ["RANK"] == os.environ.get("DIES"):
            os.kill(os.getpid(), signal.SIGKILL)
        return locate(*given, **more)

    targets.load, find.locate = loaded, dies


_kept = ExitStack()


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

    def __init__(self, module: str, plants: Callable[[Any], None]) -> None:
        self._module, self._plants = module, plants

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self._module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            self._plants(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "STOP" in os.environ:
    sys.meta_path.insert(0, Finder("detinfer.goldens.sweep", plant))
if "ODD" in os.environ:
    sys.meta_path.insert(0, Finder("detinfer.goldens.cause.find", odd))
