"""``detinfer bench``: this machine's speed against torch's default, side by side in one run."""

from __future__ import annotations

import click
from rich.console import Console
from rich.progress import track

from detinfer.cli import options


@click.group()
def bench() -> None:
    """Time the canonical kernels against torch's default, as ratios of one run. Wants an idle machine."""


_dtypes = click.option(
    "--dtype", "names", multiple=True, default=("bfloat16", "float32", "float16"), help="Repeatable.", show_default=True
)
_threads = click.option("--threads", default=2, show_default=True, help="Threads of both sides.")
_repeats = click.option("--repeats", default=7, show_default=True, help="Passes of each side, in turn.")


@bench.command()
@_dtypes
@click.option("--rows", default="1,8,64,512", show_default=True, help="Rows of the input, with commas between them.")
@_threads
@_repeats
def linear(names: tuple[str, ...], rows: str, threads: int, repeats: int) -> None:
    """All linear layers of SmolLM2-135M, weights streamed from memory."""
    from detinfer.bench import linear as benchmark

    dtypes = [dtype for name in names if (dtype := options.dtype(name)) is not None]
    counts = [int(count) for count in rows.split(",")]
    timings = benchmark.run(dtypes, counts, threads, repeats)
    total = len(dtypes) * len(counts)
    console = Console(stderr=True)
    found = list(track(timings, "timing", total=total, console=console, transient=True))
    Console().print(benchmark.table(found))


@bench.command()
@click.argument("target", default="smollm2")
@_dtypes
@_threads
@_repeats
def model(target: str, names: tuple[str, ...], threads: int, repeats: int) -> None:
    """A whole causal language model: prefill of 8 x 64 tokens, decode at batch 1 and 8."""
    from detinfer.bench import model as benchmark
    from detinfer.models import targets

    dtypes = [dtype for name in names if (dtype := options.dtype(name)) is not None]
    loaded = targets.load(target, dtypes[0])
    timings = benchmark.run(loaded, dtypes, threads, repeats)
    console = Console(stderr=True)
    found = list(track(timings, "timing", total=len(dtypes) * len(benchmark.CASES), console=console, transient=True))
    Console().print(benchmark.table(found))
