"""Where the programs of decode leave the splits of their rows, and how they count each other."""

from __future__ import annotations

import functools
import threading

import torch


class Counters:
    """Integers that are zero whenever no launch is running: the last program of its rows puts its own back.

    Launches of one stream follow each other and share theirs. A captured launch may be replayed beside anything, so it
    keeps its own for good: from a reserve made before, or zeroed inside the graph.
    """

    def __init__(self) -> None:
        self._of_stream: dict[tuple[int, int], torch.Tensor] = {}
        self._reserve: dict[int, tuple[torch.Tensor, int]] = {}
        self._kept: list[torch.Tensor] = []  # captured launches hold on to their reserve, and nobody knows how long
        self._low = False  # whether more than half of a reserve is gone: the next call outside a capture makes another
        self._lock = threading.Lock()

    def take(self, count: int, device: torch.device) -> torch.Tensor:
        """``count`` zeros on ``device``, the current one."""
        index = torch._C._cuda_getDevice()
        capturing = torch.cuda.is_current_stream_capturing()
        key = (index, torch._C._cuda_getCurrentRawStream(index))
        own = self._of_stream.get(key)
        if own is not None and own.numel() >= count and not capturing and not self._low:
            return own
        with self._lock:
            reserve, used = self._reserve.get(index, (None, 0))
            if capturing:
                self._low = reserve is None or (used + count) * 2 > reserve.numel()
                if reserve is None or used + count > reserve.numel():
                    return torch.zeros(count, dtype=torch.int32, device=device)
                self._reserve[index] = (reserve, used + count)
                return reserve[used : used + count]
            if reserve is None or used * 2 > reserve.numel():
                reserve = torch.zeros(1 << 20, dtype=torch.int32, device=device)
                torch.cuda.current_stream().synchronize()  # a graph of another stream may be the first to use it
                self._kept.append(reserve)
                self._reserve[index] = (reserve, 0)
            self._low = False
            own = self._of_stream.get(key)
            if own is None or own.numel() < count:
                own = self._of_stream[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
            return own


_counters = Counters()


def workspace(out: torch.Tensor, programs: int, splits: int, rows: int, width: int) -> tuple[torch.Tensor, ...]:
    """Where the splits of a launch leave (maximum, sum, values), and the counts of those that did."""
    device = out.device
    if splits == 1:
        return _nowhere(device.index)  # a row's one split is its result
    count = programs * splits * rows
    space = torch.empty(count * (width + 2), dtype=torch.float32, device=device)
    outs, tops, totals = torch.split(space, [count * width, count, count])
    return tops, totals, outs, _counters.take(programs, device)


@functools.cache
def _nowhere(index: int) -> tuple[torch.Tensor, ...]:
    parts, counts = (torch.zeros(4, dtype=dtype, device=f"cuda:{index}") for dtype in (torch.float32, torch.int32))
    return parts, parts, parts, counts
