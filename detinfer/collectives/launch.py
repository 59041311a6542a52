"""Start ranks on this host with torch's own launcher (torch.distributed.elastic), and tell how they ended.

A rank inherits this process's standard output and error. It may end in three ways: it returns a value; it leaves with an
exit code, having said why; or it dies. In the last two cases the launcher ends the other ranks at once.
"""

from __future__ import annotations

import inspect
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from detinfer.collectives.communicator import MOST_RANKS, Communicator, connect
from detinfer.errors import EXIT_INFRASTRUCTURE, InfrastructureError, UsageError

WAIT = 600.0
"""Seconds that a launched rank waits for the others: the launcher notices a dead one much sooner."""

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""The launcher takes these over while it runs, to end its ranks."""

_ENDING = 10
"""Seconds that ranks get to end once the launcher is told to end, before they are killed; after a rank's failure, torch's 30."""


@dataclass(frozen=True)
class Place:
    """Where a process stands among the ranks of one host: what the launcher put into its environment."""

    rank: int
    size: int
    name: str


@dataclass(frozen=True)
class Left:
    """A rank ended early with an exit code; what it had to say it has said."""

    rank: int
    code: int


def place() -> Place | None:
    """This process's place, or None where no launcher started it; UsageError for ranks on several hosts."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size:
        raise UsageError(f"{size} ranks on several hosts: they share memory, so all have to be on one")
    # torchrun without a rendezvous of its own leaves the run's id "none": the port tells two such runs apart.
    name = "-".join(os.environ.get(key, "") for key in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"))
    return Place(rank, size, name)


def launched_size() -> int:
    """How many processes a launcher started, on all hosts; 1 where none did."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 1


def join(mine: Place, timeout: float = WAIT) -> Communicator:
    """Connect the ranks of one launch."""
    return connect(name=mine.name, rank=mine.rank, size=mine.size, timeout=timeout)


def _known(made: type, **given: Any) -> dict[str, Any]:
    """Those of the keywords that ``made`` takes: torch 2.11's launcher knows no ``shutdown_timeout`` and waits 30 s."""
    takes = inspect.signature(made).parameters
    return {name: value for name, value in given.items() if name in takes}


def launch(work: Callable[..., Any], size: int, *arguments: Any, preload: Sequence[str] = ()) -> dict[int, Any] | Left:
    """Call ``work(*arguments)`` in ``size`` processes; what each returned, by rank, or who left early.

    ``work`` is a function of a module, not of a script; ``arguments`` and results are pickled. ``preload`` names modules
    that are imported once for all ranks. Raises UsageError for a number of ranks that cannot be, InfrastructureError
    when a rank is killed or dies, KeyboardInterrupt when this process is interrupted.
    """
    if not 1 <= size <= MOST_RANKS:
        raise UsageError(f"{size} ranks: 1 to {MOST_RANKS} can share a host's memory")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Their warnings tell how the other ranks are ended, at length; what matters is raised here.
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # One process imports torch; ranks are forked from it, before it has any threads.
    multiprocessing.set_forkserver_preload(["torch", *preload])
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.05,
        start_method="forkserver",
        **_known(LaunchConfig, shutdown_timeout=_ENDING),
    )
    # The ranks hold the other end: it closes when this process ends, however it does.
    alive, held = multiprocessing.get_context("forkserver").Pipe(duplex=False)
    before = {number: signal.getsignal(number) for number in _HANDLED}
    try:
        found: dict[int, Any] = elastic_launch(config, _rank)(work, arguments, alive)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return Left(rank, failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        raise InfrastructureError(
            f"rank {rank} of {size} was killed by {name} (process {failure.pid}); the other ranks were ended"
        ) from None
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise InfrastructureError(f"ended by {error.sigval.name}, and the ranks with it") from None
    finally:
        held.close()
        alive.close()
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
    return found


def _rank(work: Callable[..., Any], arguments: tuple[Any, ...], alive: Connection) -> Any:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # the launcher decides how the ranks end
    threading.Thread(target=_end_with_launcher, args=(alive,), daemon=True).start()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    try:
        return work(*arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _end_with_launcher(alive: Connection) -> None:
    """A launcher that is killed cannot end its ranks, and they would wait for it to fetch their results."""
    alive.poll(None)  # nothing is ever sent
    os.kill(os.getpid(), signal.SIGTERM)  # what a rank does when it is told to end, it does now
    time.sleep(_ENDING)
    os._exit(EXIT_INFRASTRUCTURE)
