"""What several ranks have found is kept when they are stopped: rank 0 writes it from a thread of its own.

Rank 0 may be waiting, in native code, for a rank that is gone, where no handler of Python's would run. So the signal's
number goes through a pipe to a thread that waits for it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from detinfer.errors import EXIT_INTERRUPTED
from detinfer.models.ranks import Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PARKED = 0.05
"""Seconds until the main thread waits in its handler, unless it is in native code: it changes nothing in either."""
_SHOW_CURSOR = "\x1b[?25h"


@contextmanager
def on_signals(ranks: Ranks, write: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end rank 0 of several with exit code 130, after ``write``, whose words go to stderr.

    The other ranks end as they did: they have nothing to write.
    """
    if ranks.size == 1 or ranks.rank > 0 or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wait() -> None:
        number = os.read(reader, 1)
        os.close(reader)
        if number and number[0] in SIGNALS:
            _end(write)

    before = {number: signal.signal(number, _park) for number in SIGNALS}
    wakes = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakes)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)  # the thread reads the end, and ends


def _park(_: int, __: FrameType | None) -> None:
    while True:  # the thread ends the process
        time.sleep(1)


def _end(write: Callable[[], str]) -> None:
    try:
        time.sleep(_PARKED)
        try:
            said = write()
        except Exception as error:  # nothing is above that could say it
            said = f"error: what was found could not be kept: {error}"
        # Not through the console: the main thread may hold its lock.
        if said:
            os.write(2, f"{_SHOW_CURSOR if os.isatty(2) else ''}{said}\n".encode())
    finally:
        os._exit(EXIT_INTERRUPTED)
