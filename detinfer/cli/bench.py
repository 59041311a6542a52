"""``detinfer bench``: this machine's speed against torch's default, side by side in one run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from rich.console import Console
from rich.progress import track

from detinfer.cli import options
from detinfer.errors import UsageError

if TYPE_CHECKING:
    from detinfer.bench.model_cuda import Check, Timing
    from detinfer.models.ranks import Ranks


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
@click.argument("target", required=False)
@_dtypes
@_threads
@_repeats
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option(
    "--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="On a GPU: write the result there."
)
@click.option("--tp", type=int, metavar="N", help="On GPUs: ranks to cut the model over, started here [default: 1].")
@click.pass_context
def model(
    context: click.Context,
    target: str | None,
    names: tuple[str, ...],
    threads: int,
    repeats: int,
    device: str,
    path: Path | None,
    tp: int | None,
) -> None:
    """A whole causal language model, the policy on against off.

    On a CPU: TARGET (smollm2 unless given), prefill of 8 x 64 tokens, decode at batch 1 and 8. On a GPU: a Qwen3 in
    bfloat16 with drawn weights, of the shape TARGET (qwen3-8b unless given; qwen3-small), prefill of 8 x 2048 tokens, decode
    in a CUDA graph and eager, and the bytes of rows compared. With --tp over so many GPUs, against NCCL's sums.
    """
    from detinfer.bench import model as benchmark
    from detinfer.cli import ranks
    from detinfer.models import targets

    count = ranks.size(tp)
    on_gpu = targets.checked(device).type == "cuda"
    if count > 1:
        if not on_gpu:
            raise UsageError("bench model --tp is timed on GPUs: give --device cuda")
        ranks.start(context, count)
        with ranks.joined(count) as joined:
            _model_over_ranks(target or "qwen3-8b", repeats, path, joined)
        return
    if on_gpu:
        _model_on_gpu(target or "qwen3-8b", repeats, path)
        return
    target = target or "smollm2"
    dtypes = [dtype for name in names if (dtype := options.dtype(name)) is not None]
    loaded = targets.load(target, dtypes[0])
    timings = benchmark.run(loaded, dtypes, threads, repeats)
    console = Console(stderr=True)
    found = list(track(timings, "timing", total=len(dtypes) * len(benchmark.CASES), console=console, transient=True))
    Console().print(benchmark.table(found))


def _model_on_gpu(shape: str, repeats: int, path: Path | None) -> None:
    from detinfer.bench import model_cuda as benchmark

    with Console(stderr=True).status("building the model") as status:
        built = benchmark.build(shape)
        status.update("proving its linear layers")
        shapes, seconds = benchmark.prove(built)
        found = list(benchmark.checks(built))
        timings = list(benchmark.run(built, repeats=repeats, said=status.update))
    _show_model(f"{shape}: {shapes} shapes of linear layers proved in {seconds:.0f} s", timings, found, path)


def _model_over_ranks(name: str, repeats: int, path: Path | None, ranks: Ranks) -> None:
    from detinfer.bench import model_ranks

    with Console(stderr=True, quiet=ranks.rank > 0).status("starting") as status:
        found = model_ranks.run(name, ranks, repeats, status.update)
    if ranks.rank == 0:
        proved = f"{found.shapes} shapes of a rank's linear layers proved in {found.seconds:.0f} s"
        _show_model(f"{name} over {ranks.size} GPUs: {proved}", found.timings, found.checks, path)


def _show_model(title: str, timings: Sequence[Timing], found: Sequence[Check], path: Path | None) -> None:
    from detinfer.bench import model_cuda as benchmark

    shown = Console()
    shown.width = max(shown.width, 120)
    shown.print(title)
    for table in benchmark.tables(timings, found):
        shown.print(table)
    if path is not None:
        path.write_text(json.dumps(benchmark.to_json(timings, found), indent=1) + "\n")


@bench.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="cuda where there is one, unless given.")
@_dtypes
@_threads
@_repeats
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write the result there too.")
def attention(device: str | None, names: tuple[str, ...], threads: int, repeats: int, path: Path | None) -> None:
    """Attention against torch's: on a GPU against each of its backends, in bf16; on CPU SmolLM2-135M's shapes."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("bench attention --device cuda: torch sees no CUDA device; leave the option out for the CPU")
    console, shown = Console(stderr=True), Console()
    shown.width = max(shown.width, 120)
    if device != "cpu" and torch.cuda.is_available():
        from detinfer.bench import attention_cuda as on_gpu

        total = len(on_gpu.GROUPS) * len(on_gpu.DECODE + on_gpu.PREFILL)
        timed = on_gpu.run(repeats=repeats)
        found = list(track(timed, "timing", total=total, console=console, transient=True))
        shown.print(on_gpu.table(found))
        result = on_gpu.to_json(found)
    else:
        from detinfer.bench import attention as on_cpu

        dtypes = [dtype for name in names if (dtype := options.dtype(name)) is not None]
        total = 2 * len(dtypes) * len(on_cpu.SHAPES)
        timings = on_cpu.run(dtypes, threads, repeats)
        times = list(track(timings, "timing", total=total, console=console, transient=True))
        shown.print(on_cpu.table(times))
        result = on_cpu.to_json(times)
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@bench.command()
@_dtypes
@_threads
@click.option("--repeats", default=60, show_default=True, help="Calls of each side, in turn.")
@click.option("--only", multiple=True, metavar="OPERATION", help="Repeatable; all unless given.")
def elements(names: tuple[str, ...], threads: int, repeats: int, only: tuple[str, ...]) -> None:
    """Elementwise functions, sums, softmax and norms on CPU, 512 x 1536 elements."""
    from detinfer.bench import elements as benchmark

    dtypes = [dtype for name in names if (dtype := options.dtype(name)) is not None]
    known = benchmark.calls(dtypes[0])
    if unknown := sorted(set(only) - set(known)):
        raise UsageError(f"--only {', '.join(unknown)}: choose from {', '.join(known)}")
    total = len(dtypes) * (len(set(only)) or len(known))
    timings = benchmark.run(dtypes, threads, repeats, only)
    found = list(track(timings, "timing", total=total, console=Console(stderr=True), transient=True))
    Console().print(benchmark.table(found))


def _bytes(text: str) -> int:
    """``65536``, ``64KiB`` or ``16MiB`` as a number."""
    found = re.fullmatch(r"(\d+) ?(KiB|MiB|B|)", text.strip())
    if found is not None:
        return int(found[1]) * {"KiB": 1 << 10, "MiB": 1 << 20}.get(found[2], 1)
    raise UsageError(f"--sizes {text}: numbers of bytes such as 1024, 64KiB or 16MiB, with commas between them")


@bench.command()
@click.option("--ranks", default="2,4", show_default=True, help="Numbers of ranks, with commas between them.")
@click.option(
    "--sizes",
    default="1KiB,4KiB,16KiB,64KiB,256KiB,1MiB,16MiB",
    show_default=True,
    help="Bytes of a tensor, with commas between them.",
)
@click.option("--dtype", "names", multiple=True, default=("float32",), help="Repeatable.", show_default=True)
@click.option("--seconds", default=0.5, show_default=True, help="About how long each side of each timing takes.")
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write the result there too.")
def collectives(ranks: str, sizes: str, names: tuple[str, ...], seconds: float, path: Path | None) -> None:
    """all_reduce between processes against gloo's: percentiles per call and bandwidth, bytes checked before."""
    from detinfer import bits
    from detinfer.bench import collectives as benchmark

    dtypes = [bits.dtype_name(dtype) for name in names if (dtype := options.dtype(name)) is not None]
    counts, lengths = [int(count) for count in ranks.split(",")], [_bytes(size) for size in sizes.split(",")]
    timings = benchmark.run(counts, lengths, dtypes, seconds)
    total = len(dtypes) * len(counts) * len(lengths)
    console = Console(stderr=True)
    found = list(track(timings, "timing", total=total, console=console, transient=True))
    shown = Console()
    shown.width = max(shown.width, 120)
    shown.print(benchmark.table(found))
    if path is not None:
        path.write_text(json.dumps(benchmark.to_json(found), indent=1) + "\n")


@bench.command("collectives-cuda")
@click.option("--ranks", default=2, show_default=True, help="GPUs, one process each.")
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write the result there too.")
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw it too: .svg, .png; needs matplotlib."
)
@click.option("--tune", is_flag=True, help="Time detinfer's paths alone and write the table that connect reads.")
@click.option("--table", type=click.Path(path_type=Path), metavar="FILE", help="With --tune: where, if not the user's.")
def collectives_cuda(ranks: int, path: Path | None, plot: Path | None, tune: bool, table: Path | None) -> None:
    """Collectives between this machine's GPUs against NCCL and torch's symmetric memory, in CUDA graphs and eager."""
    from detinfer.bench import collectives_cuda as benchmark

    if tune:
        _tune(ranks, path, table)
        return
    if table is not None:
        raise UsageError("--table says where --tune writes: give --tune as well")
    found = benchmark.run(ranks)
    shown = Console()
    shown.width = max(shown.width, 140)
    for each in benchmark.tables(found):
        shown.print(each)
    if path is not None:
        benchmark.write(found, path)
    if plot is not None:
        from detinfer.bench import collectives_plot

        collectives_plot.plot(found, ranks, plot)


def _tune(ranks: int, path: Path | None, table: Path | None) -> None:
    from detinfer.bench import collectives_tune as benchmark
    from detinfer.collectives import cuda_paths

    tuned, lines = benchmark.run(ranks)
    shown = Console()
    for each in benchmark.tables(tuned, lines):
        shown.print(each)
    environment = benchmark.environment(ranks)
    where = table or cuda_paths.user_file(str(environment["gpu"]), ranks)
    cuda_paths.write(where, environment, tuned, benchmark.measured(lines))
    shown.print(f"written: {where}", soft_wrap=True)
    if path is not None:
        path.write_text(json.dumps([vars(line) for line in lines], indent=1) + "\n", encoding="utf-8")


@bench.command()
@click.option(
    "--tokens", default="", help="Tokens of the layer's input, with commas between them; 1 to 4096 unless given."
)
@click.option("--repeats", default=11, show_default=True, help="Replays of each graph.")
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write the result there too.")
def experts(tokens: str, repeats: int, path: Path | None) -> None:
    """Experts of three models' layers on this GPU against transformers' grouped_mm form, bytes checked before."""
    from detinfer.bench import experts_cuda as benchmark
    from detinfer.bench.graph import geometric_mean

    if not torch.cuda.is_available():
        raise UsageError("bench experts needs a CUDA device, and torch sees none")
    counts = [int(count) for count in tokens.split(",")] if tokens else list(benchmark.TOKENS)
    total = len(benchmark.SHAPES) * len(counts)
    console = Console(stderr=True)
    found = list(track(benchmark.run(counts, repeats), "timing", total=total, console=console, transient=True))
    shown = Console()
    shown.print(benchmark.table(found))
    shown.print(f"geometric mean {geometric_mean([timing.ratio for timing in found]):.2f}")
    if path is not None:
        path.write_text(json.dumps(benchmark.to_json(found), indent=1) + "\n")


@bench.command()
@click.option("--ranks", default=2, show_default=True, help="Processes of this host.")
@click.option("--rows", default=8, show_default=True, help="Prompts of 128 tokens in a prefill.")
@click.option("--repeats", default=9, show_default=True, help="Passes of each way, in turn.")
def moe(ranks: int, rows: int, repeats: int) -> None:
    """builtin:moe's sums over ranks, separate, merged, carried into the next norm, scattered: calls and prefill time."""
    from detinfer.bench import moe as benchmark

    Console().print(benchmark.table(benchmark.run(ranks, rows, repeats)))


@bench.command()
@click.option("--rows", default="", help="Rows of the input, with commas between them; 1 to 8192 unless given.")
@click.option("--dtype", "name", default="bfloat16", show_default=True, help="bfloat16, float16 or float32 (TF32 off).")
@click.option("--repeats", default=9, show_default=True, help="Replays of each graph.")
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write the result there too.")
def compute(rows: str, name: str, repeats: int, path: Path | None) -> None:
    """Linear layers of three models on this GPU against torch, in replays of a CUDA graph, bytes checked before."""
    from detinfer.bench import linear_cuda as benchmark

    if not torch.cuda.is_available():
        raise UsageError("bench compute needs a CUDA device, and torch sees none; bench linear times the CPU")
    counts = _counts(rows) if rows else list(benchmark.ROWS)
    total = sum(len(shapes) for shapes in benchmark.SHAPES.values()) * len(counts)
    timings = benchmark.run(counts, repeats, options.dtype(name) or torch.bfloat16)
    found = list(track(timings, "timing", total=total, console=Console(stderr=True), transient=True))
    shown = Console()
    shown.width = max(shown.width, 140)
    shown.print(benchmark.table(found))
    shown.print(benchmark.summary(found))
    if path is not None:
        path.write_text(json.dumps(benchmark.to_json(found), indent=1) + "\n")


def _counts(text: str) -> list[int]:
    """``1,8,64`` as numbers."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UsageError(f"--rows {text}: whole numbers above 0 with commas between them")
    return [int(word) for word in words]


@bench.command()
@click.option("--dtype", "names", multiple=True, default=("bfloat16", "float32"), help="Repeatable.", show_default=True)
@click.option("--repeats", default=9, show_default=True, help="Replays of each graph.")
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write the result there too.")
def rows(names: tuple[str, ...], repeats: int, path: Path | None) -> None:
    """Norms and softmax on this GPU, in replays of a CUDA graph, bytes checked before."""
    from detinfer.bench import rows_cuda as benchmark
    from detinfer.bench.graph import geometric_mean

    if not torch.cuda.is_available():
        raise UsageError("bench rows needs a CUDA device, and torch sees none")
    dtypes = [dtype for name in names if (dtype := options.dtype(name)) is not None]
    total = len(dtypes) * len(benchmark.SHAPES) * len(benchmark.OPS)
    console = Console(stderr=True)
    timings = benchmark.run(dtypes, repeats=repeats)
    found = list(track(timings, "timing", total=total, console=console, transient=True))
    shown = Console()
    shown.width = max(shown.width, 100)
    shown.print(benchmark.table(found))
    for op in benchmark.OPS:
        of = [timing for timing in found if timing.op == op]
        worst = max(of, key=lambda timing: timing.ratio)
        shown.print(
            f"{op}: geometric mean {geometric_mean([timing.ratio for timing in of]):.2f}; worst {worst.ratio:.2f}, "
            f"{worst.rows} x {worst.n} ({worst.detinfer:.1f} against {worst.torch:.1f} us)"
        )
    if path is not None:
        path.write_text(json.dumps(benchmark.to_json(found), indent=1) + "\n")
