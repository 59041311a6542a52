"""``--jobs`` and ``--resume``: who runs the trials of a verification, and how it stops and goes on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from click.core import ParameterSource

from detinfer.errors import UsageError

if TYPE_CHECKING:
    from detinfer.cli.opened import Opened
    from detinfer.goldens.inputs import Options
    from detinfer.goldens.jobs import Pool
    from detinfer.reporters.json import Saved

SWEEP = ("n_trials", "seed", "layers", "batch_sizes", "control", "fail_fast", "only_trial", "axis_names")
"""Options that a run has from its beginning to its end."""


def check(jobs: int | None, tp: int | None) -> None:
    """UsageError for a number of jobs that cannot be."""
    from detinfer.collectives.launch import launched_size

    if jobs is None:
        return
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}: at least 1")
    if tp is not None and tp > 1:
        raise UsageError(
            f"--jobs {jobs} --tp {tp}: jobs hold a whole model each, ranks one together; give one of the two"
        )
    size = launched_size()
    if size > 1 and jobs != size:
        raise UsageError(f"--jobs {jobs}: the launcher started {size} processes; give --jobs {size}, or --tp for ranks")


def interrupted(context: click.Context, file: Path) -> Saved:
    """The run to go on with; UsageError where an option of it is given again."""
    from detinfer.reporters import json as json_reporter

    for name in SWEEP:
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            option = {"axis_names": "axes"}.get(name, name).replace("_", "-")
            raise UsageError(f"--{option} with --resume: a run is gone on with as it was begun; leave it out")
    return json_reporter.read_unfinished(file)


def check_saved(saved: dict[str, Any], file: Path, held: Opened) -> None:
    """GoldenError where an interrupted run belongs to another golden, number of ranks, policy or environment."""
    from detinfer import environment, native
    from detinfer.goldens import resume
    from detinfer.models.targets import device_of

    here = environment.capture(native.isa(), held.target.libraries, device_of(held.target.module))
    resume.check(saved, file, held.golden, held.policy.to_json(), here, held.ranks.size)


@contextmanager
def pool(jobs: int | None, held: Opened, options: Options) -> Iterator[Pool | None]:
    """The processes to share trials with; None where there are none, and in those themselves once they are done."""
    from detinfer.collectives.launch import launched_size
    from detinfer.goldens.jobs import Job, launched, started

    if jobs is None:
        yield None
        return
    threads = torch.get_num_threads()
    where = str(held.target.device)
    job = Job(held.golden.path.absolute(), held.target.spec, where, held.policy.reductions, options, threads, threads)
    loaded = held.golden, held.target, held.requests, held.policy
    with launched(job, loaded) if launched_size() > 1 else started(job, jobs) as found:
        yield found


@contextmanager
def stopping(jobs: int | None) -> Iterator[None]:
    """SIGTERM interrupts, as Ctrl-C does: schedulers and launchers send it before they kill.

    Not in ranks of one model: there ``kept`` does it, and the others than rank 0 have nothing to keep.
    """
    from detinfer.collectives.launch import launched_size

    ranks = jobs is None and launched_size() > 1
    if ranks or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
