"""``--tp``: start this command line again as so many ranks, or take part as one of them."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import click

from detinfer.errors import UsageError

if TYPE_CHECKING:
    from detinfer.models.ranks import Ranks

HEARD = 3.0
"""Seconds that another rank than 0 waits before it prints an error: where rank 0 has the same one, it is ended."""

PRELOAD = ("detinfer.cli", "detinfer.goldens.record", "detinfer.goldens.verify", "detinfer.models.builtin")
"""What ranks import, once for all of them."""


def number() -> int:
    """This process's rank; 0 where nobody started it as one."""
    return int(os.environ["RANK"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 0


def size(tp: int | None, otherwise: int = 1) -> int:
    """How many ranks: ``--tp``, else the launcher's number, else ``otherwise``; UsageError where they disagree."""
    from detinfer.collectives.launch import place

    if tp is not None and tp < 1:
        raise UsageError(f"--tp {tp}: at least 1")
    mine = place()
    if mine is None:
        return otherwise if tp is None else tp
    if tp is not None and tp != mine.size:
        raise UsageError(f"--tp {tp}: the launcher started {mine.size} ranks; leave --tp out or give the same number")
    return mine.size


def start(context: click.Context, count: int) -> None:
    """Run this command line as ``count`` ranks and leave with their exit code, unless this process is one of them."""
    from detinfer.collectives.launch import Left, launch, place

    if count == 1 or place() is not None:
        return
    arguments = context.find_root().obj
    found = launch(_rank, count, arguments, preload=PRELOAD)
    # Ranks that finish have all the same verdict; one that met an error has said so.
    context.exit(found.code if isinstance(found, Left) else max(found.values()))


@contextmanager
def joined(count: int, timeout: float | None = None) -> Iterator[Ranks]:
    """This process among its ranks; on its own where ``count`` is 1. ``timeout``: seconds that one waits for another."""
    import torch
    import torch.distributed

    from detinfer.collectives.launch import WAIT, join, place
    from detinfer.models.ranks import ALONE, Spread

    mine = place()
    if count == 1 or mine is None:
        yield ALONE
        return
    patience = timeout or WAIT
    with join(mine, patience) as communicator:
        try:
            yield Spread(communicator, patience)
        except torch.AcceleratorError as error:
            _leave(error)
        finally:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def _leave(error: Exception) -> NoReturn:
    """End this rank at once: its GPU answers this process no more, and whatever would close NCCL or a graph waits for it.

    NCCL's own thread ends the process where it sees the error first: nothing waits here.
    """
    from detinfer.errors import EXIT_INFRASTRUCTURE

    text = "".join(traceback.format_exception(error))
    click.echo(
        f"{text}\nerror: rank {number()}: the GPU gave up in the middle of a kernel, as it does for an index that is out of "
        "range: what it printed is above",
        err=True,
    )
    sys.stdout.flush()
    os._exit(EXIT_INFRASTRUCTURE)


def complain(message: str) -> None:
    """Print an error to stderr; another rank than 0 names itself, and only where rank 0 has not said the same."""
    if rank := number():
        time.sleep(HEARD)
        message = f"rank {rank}: {message}"
    click.echo(message, err=True)


def _rank(arguments: list[str]) -> int:
    from detinfer.cli import attempt

    code, failed = attempt(arguments)
    if failed:
        sys.exit(code)  # so that the launcher ends the other ranks at once
    return code
