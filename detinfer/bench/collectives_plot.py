"""A plot of ``bench collectives-cuda``: a panel for each collective, a line for each side, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detinfer.bench.collectives_cuda import Timing
from detinfer.errors import UsageError

PANELS = ("all_reduce", "reduce_scatter", "all_gather")


def plot(timings: Sequence[Timing], ranks: int, path: Path) -> None:
    """Write SVG, PNG or PDF, by the file's suffix: p50 of each side, and detinfer's p50 to p99 as a band.

    Raises UsageError where matplotlib (the extra ``plot``) is missing or does not know the suffix.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install matplotlib, or detinfer's extra plot") from None
    figure = Figure(figsize=(5.2 * len(PANELS), 4.8), layout="constrained")
    if path.suffix.removeprefix(".").lower() not in figure.canvas.get_supported_filetypes():
        raise UsageError(f"--plot {path}: the suffix says the format, such as .svg or .png")
    for place, collective in enumerate(PANELS):
        axes = figure.add_subplot(1, len(PANELS), place + 1)
        chosen = [timing for timing in timings if timing.collective == collective]
        for side in dict.fromkeys(timing.side for timing in chosen if timing.side != "detinfer again"):
            line = sorted((timing for timing in chosen if timing.side == side), key=lambda timing: timing.bytes)
            sizes = [timing.bytes for timing in line]
            ours = side == "detinfer"
            axes.plot(
                sizes,
                [timing.p50 for timing in line],
                label=side,
                linewidth=2.2 if ours else 1.1,
                zorder=3 if ours else 2,
            )
            if ours:
                axes.fill_between(sizes, [t.p50 for t in line], [t.p99 for t in line], alpha=0.2, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(collective)
        axes.set_xlabel("bytes of a rank's tensor" if collective == "all_reduce" else "bytes of a rank's slice")
        axes.grid(visible=True, which="both", alpha=0.2)
        axes.legend(fontsize="small")
        if place == 0:
            axes.set_ylabel("microseconds a call (p50; band: to p99)")
    figure.suptitle(f"{ranks} GPUs, CUDA-graph replay, NVLink multicast off")
    # No date and fixed ids: the same numbers give the same file. Text stays text.
    plain: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix.lower() == ".svg" else {}
    with rc_context({"svg.hashsalt": "detinfer", "svg.fonttype": "none"}):
        figure.savefig(path, **plain)
