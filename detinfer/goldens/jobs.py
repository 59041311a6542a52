"""Trials shared out over processes: each holds the whole model, takes the next task and sends back what it found.

The processes are started here (one for each further job, on a GPU of its own) or by torchrun (``--jobs`` under it), on
one host or several. Counting is done in the tasks' order by who started them, so the result is that of one process.
This is no tensor parallelism: no rank waits for another inside a model (``models.ranks``).
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Client, Connection, Listener
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from detinfer import errors
from detinfer import threads as held
from detinfer.errors import DetinferError, Diverged, InfrastructureError, UsageError
from detinfer.goldens import control
from detinfer.goldens.format import Golden
from detinfer.goldens.inputs import Options, check_target, chosen_units, load_inputs, requests_of
from detinfer.goldens.prepare import policy_of, prepare_again
from detinfer.goldens.runner import Request
from detinfer.goldens.sweep import Sweep
from detinfer.goldens.tasks import Done, Part, Task, Tasks, ready, sweep_of
from detinfer.models import targets
from detinfer.models.ranks import ALONE
from detinfer.policy import Policy, deterministic
from detinfer.policy.policy import Reductions

PRELOAD = ("detinfer.goldens.jobs", "detinfer.goldens.verify", "detinfer.models.builtin")
"""What workers import, once for all of them."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to run any task: the golden, the model's target, and the options of the verification."""

    golden: Path
    spec: str
    device: str
    reductions: Reductions
    options: Options
    threads: int
    """Threads of the process that started it: what the axis of threads goes by."""
    own_threads: int
    """Threads of this worker."""


Loaded = tuple[Golden, Any, Sequence[Request], Policy]
"""A golden, the target that it belongs to, its requests and the policy."""


@dataclass
class Worker:
    """One further process; ``name`` says which in an error."""

    name: str
    connection: Connection
    process: BaseProcess | None = None

    def ended(self) -> str:
        """How the process ended, where it was started here."""
        if self.process is None:
            return "its connection broke"
        self.process.join(10)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"process {self.process.pid} was killed by {signal.Signals(-code).name}"
        return f"process {self.process.pid} ended with exit code {code}"


def goes_by_threads(task: Task) -> bool:
    """Whether the number of threads is part of what a task finds: the axis of threads, and anything with no policy."""
    return task.control or task.axis == "threads"


class Pool:
    """Workers and this process, which takes tasks like each of them."""

    def __init__(self, workers: Sequence[Worker], threads: int) -> None:
        """``threads`` are those of the process that was started first, before they were shared out."""
        self.workers, self.threads = workers, threads
        self.alone = ""
        """Digest of what the model gives alone in this process: a worker's must be the same."""

    def run(
        self,
        of: Sequence[Task],
        run: Callable[[Task], Part],
        done: Done,
        fail_fast: bool,
        progress: Callable[[int], None],
    ) -> None:
        """Run the tasks that are not in ``done`` and put what they found there; ``run`` is for those taken here.

        With ``fail_fast`` no task is taken after one that differs was found: those before it have all been taken.
        Raises InfrastructureError, which names the worker and its task, where one dies; a worker's own error as it is.
        """
        left = iter([task for task in of if task.key not in done])
        lock = threading.Lock()
        failed: list[BaseException] = []

        def take() -> Task | None:
            with lock:
                if failed or (fail_fast and any(t.key in done and done[t.key].rows_differing for t in of)):
                    return None
                return next(left, None)

        def drive(worker: Worker) -> None:
            while (task := take()) is not None:
                try:
                    worker.connection.send(task)
                    found = worker.connection.recv()
                except (EOFError, OSError, TypeError):  # TypeError: it was closed here while its answer was waited for
                    failed.append(InfrastructureError(f"{worker.name}: {worker.ended()}, while it ran {task.key}"))
                    return
                if isinstance(found, BaseException):
                    failed.append(found)
                    return
                part, alone = found
                if alone != self.alone:
                    failed.append(
                        Diverged(f"{worker.name}: alone, the model gives other bytes than in the first process")
                    )
                    return
                done[task.key] = part

        threads = [threading.Thread(target=drive, args=(worker,), daemon=True) for worker in self.workers]
        for thread in threads:
            thread.start()
        while (task := take()) is not None:
            progress(sum(one.key in done for one in of))
            with held.threads(self.threads) if goes_by_threads(task) else nullcontext():
                done[task.key] = run(task)
        for thread in threads:
            while thread.is_alive():  # in steps: a join without an end cannot be interrupted
                thread.join(0.2)
                progress(sum(one.key in done for one in of))
        if failed:
            raise failed[0]

    def unshared(self) -> AbstractContextManager[None]:
        """This process with all its threads, as one without workers has them: torch's own bits go by their number."""
        return held.threads(self.threads)

    def close(self) -> None:
        """End the workers: those at work at once."""
        for worker in self.workers:
            worker.connection.close()
        for worker in self.workers:
            if worker.process is not None:
                worker.process.join(0.5)
                if worker.process.is_alive():
                    worker.process.terminate()
                    worker.process.join()


@contextmanager
def started(job: Job, jobs: int) -> Iterator[Pool]:
    """This process and ``jobs`` - 1 further ones, which load the model meanwhile; UsageError for too many of a GPU's."""
    devices = _devices(job.device, jobs)
    # Not forked from this process: its threads, and a GPU that it uses, do not survive that.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    workers: list[Worker] = []
    # The threads of this machine are shared out; under the policy their number changes no bit.
    threads = torch.get_num_threads()
    own = max(1, threads // jobs)
    with ExitStack() as stack:
        pool = Pool(workers, threads)
        stack.callback(pool.close)
        for number in range(1, jobs):
            here, there = context.Pipe()
            mine = replace(job, device=devices[number], own_threads=own)
            process = context.Process(target=_start, args=(there, mine), daemon=True, name=f"detinfer-job-{number}")
            process.start()
            there.close()
            workers.append(Worker(f"job {number} of {jobs}", here, process))
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(own)
        yield pool


def _devices(device: str, jobs: int) -> list[str]:
    if torch.device(device).type != "cuda":
        return [device] * jobs
    count = torch.cuda.device_count()
    if jobs > count:
        raise UsageError(f"--jobs {jobs}: torch sees {count} GPUs, and each job has one of its own")
    first = torch.device(device).index or 0
    return [f"cuda:{(first + number) % count}" for number in range(jobs)]


@contextmanager
def launched(job: Job, loaded: Loaded) -> Iterator[Pool | None]:
    """The processes of torchrun: rank 0 gets a pool of the others, each of which works until rank 0 is done, gets None."""
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    if rank:
        store.wait([_ADDRESS])
        host, port, key = store.get(_ADDRESS).decode().split()
        with Client((host, int(port)), authkey=bytes.fromhex(key)) as connection:
            connection.send((rank, socket.gethostname(), os.getpid()))
            work(connection, job, loaded)
        yield None
        return
    key = secrets.token_hex(32)
    with Listener((os.environ["MASTER_ADDR"], 0), backlog=size, authkey=bytes.fromhex(key)) as listener:
        host, port = listener.address
        store.set(_ADDRESS, f"{host} {port} {key}")
        workers = []
        for _ in range(1, size):
            connection = listener.accept()
            number, where, process = connection.recv()
            workers.append(Worker(f"rank {number} (process {process} on {where})", connection))
        pool = Pool(workers, job.threads)
        try:
            yield pool
        finally:
            pool.close()


_ADDRESS = "detinfer/jobs"


def _start(connection: Connection, job: Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process ends it
    torch.set_num_threads(job.own_threads)
    if torch.device(job.device).type == "cuda":
        torch.cuda.set_device(job.device)
    work(connection, job)


def work(connection: Connection, job: Job, loaded: Loaded | None = None) -> None:
    """Run the tasks that come, until the other end is closed; an error is sent and ends it."""
    try:
        own = _Own(job, loaded or _load(job))
        while True:
            task = connection.recv()
            connection.send((own.run(task), own.alone))
    except (EOFError, ConnectionError):  # closed, or closed while something was on its way
        return
    except DetinferError as error:
        _send(connection, error)
    except Exception as error:
        _send(connection, DetinferError(f"{type(error).__name__} in a job: {error}"))


def _send(connection: Connection, error: DetinferError) -> None:
    known = type(error) if getattr(errors, type(error).__name__, None) is type(error) else DetinferError
    try:
        connection.send(known(str(error)))
    except OSError:  # nobody is there to hear it
        print(f"error: {error}", file=sys.stderr)


def _load(job: Job) -> Loaded:
    golden = Golden.read(job.golden)
    recorded = golden.manifest
    policy = replace(policy_of(golden), reductions=job.reductions)
    dtype = getattr(torch, recorded.target["dtype"])
    target = targets.load(job.spec, dtype, recorded.inputs["seed"], ALONE, job.device, job.reductions)
    check_target(golden, target, policy)
    return golden, target, requests_of(golden, target, prepare_again(target)), policy


class _Own:
    """A worker's model and references; those of the control are made when its first task comes."""

    def __init__(self, job: Job, loaded: Loaded) -> None:
        self._job = job
        golden, target, requests, policy = loaded
        units, chosen, whole = chosen_units(golden, target, policy, job.options, ALONE)
        self._policy: Callable[[], AbstractContextManager[Any]] = lambda: deterministic(
            replace(policy, uncovered="trust")
        )
        with self._policy():
            load_inputs(golden, target, requests, units, chosen, ALONE)
            sweep = sweep_of(golden, target, requests, units, whole, job.options)
            for _ in sweep.alone():
                pass
            self._held = ready(golden, sweep, job.options)
            self.alone = sweep.digest()
        self._control_sweep: Callable[[], Sweep] = lambda: sweep_of(golden, target, requests, units, whole, job.options)
        self._control: Tasks | None = None

    def run(self, task: Task) -> Part:
        """What one task finds, under the policy or without one, as its name says."""
        with held.threads(self._job.threads) if goes_by_threads(task) else nullcontext():
            if not task.control:
                with self._policy():
                    return self._held.run(task)
            with torch.no_grad():
                return self._of_control().run(task)

    def _of_control(self) -> Tasks:
        if self._control is None:
            held = self._held
            trials, axes = list(held.trials.values()), list(held.axes.values())
            self._control = control.prepare(self._control_sweep(), trials, axes, self._job.options.seed)
        return self._control
