"""``detinfer prove``: measure and prove the paths of this GPU's linear layers, and keep the result."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from detinfer.bits import dtype_name
from detinfer.cli import options
from detinfer.errors import UsageError
from detinfer.models.linear_shapes import LinearShape


@dataclass(frozen=True)
class Proved:
    """What became of one shape: ``failed`` are algorithms of cuBLASLt that gave other bytes and are not used."""

    shape: LinearShape
    seconds: float
    compared: int
    paths: tuple[tuple[int, str], ...]
    failed: tuple[str, ...]


@click.command()
@click.argument("target", required=False)
@click.option("--shape", "given", multiple=True, metavar="K,N", help="A layer K -> N, as K,N or K,N,bias. Repeatable.")
@click.option("--dtype", "name", metavar="DTYPE", help="float32, bfloat16 or float16 [default: the target's].")
@click.option("--force", is_flag=True, help="Replace a file of proofs that is damaged or not detinfer's.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the result as JSON.")
def prove(target: str | None, given: tuple[str, ...], name: str | None, force: bool, json_file: Path | None) -> None:
    """Prove the linear layers of TARGET, or the shapes given, on this GPU, and keep the proofs for deterministic().

    For each shape every path is compared with the plain kernel at all numbers of rows, on inputs for which a wrong order
    shows, and the fastest path for each is kept. The proofs hold for this GPU, driver, torch and build of detinfer.
    """
    dtype = options.dtype(name)
    asked = [_shape(text, dtype or torch.bfloat16) for text in given]
    if target is None and not asked:
        raise UsageError("prove: give a target, such as smollm2 or hf:FOLDER, or a --shape")
    if not torch.cuda.is_available():
        raise UsageError("prove needs a CUDA device, and torch sees none: a CPU's proofs are made when they are needed")
    console = Console(stderr=True, highlight=False)
    if target is not None:
        from detinfer.models import linear_shapes

        with console.status("looking at the model"):
            asked += linear_shapes.of_target(target, dtype)
    device = torch.cuda.current_device()
    from detinfer.ops import matmul_store, matmul_table

    found = [_prove(one, device) for one in track(asked, "proving", console=console, transient=True)]
    path, before = matmul_store.keep(matmul_table.tables().values(), device, force=force)
    _show(found, Console(highlight=False))
    console.print(f"kept in {path}" + (f"; {before}" if before else ""), soft_wrap=True)
    if json_file is not None:
        json_file.write_text(
            json.dumps({"path": str(path), "shapes": [_to_json(one) for one in found]}, indent=1) + "\n"
        )


def _shape(text: str, dtype: torch.dtype) -> LinearShape:
    match = re.fullmatch(r"(\d+),(\d+)(,bias)?", text.replace(" ", ""))
    if match is None:
        raise UsageError(f"--shape {text}: K,N such as 4096,1024, or K,N,bias")
    return LinearShape(int(match[1]), int(match[2]), dtype, match[3] is not None)


def _prove(shape: LinearShape, device: int) -> Proved:
    from detinfer.ops.matmul_cuda_proof import prove_shape

    start = time.perf_counter()
    with torch.inference_mode():
        measured = prove_shape(shape.n, shape.k, shape.dtype, torch.device("cuda", device), bias=shape.bias)
    table = measured.table
    paths: list[tuple[int, str]] = []
    for upper, choice in zip(table.uppers, table.choices, strict=True):
        if paths and paths[-1][1] == choice.path:
            paths[-1] = (upper, choice.path)
        else:
            paths.append((upper, choice.path))
    return Proved(shape, time.perf_counter() - start, table.compared, tuple(paths), measured.failed)


def _show(found: list[Proved], console: Console) -> None:
    shown = Table(title="linear layers: the path up to each number of rows")
    for column in ("K -> N", "dtype", "bias", "paths", "elements compared", "seconds"):
        shown.add_column(column, justify="left" if column == "paths" else "right")
    for one in found:
        shape = one.shape
        paths = ", ".join(f"{path} to {upper}" for upper, path in one.paths)
        bias = "yes" if shape.bias else "no"
        row = (
            f"{shape.k} -> {shape.n}",
            dtype_name(shape.dtype),
            bias,
            paths,
            f"{one.compared:,}",
            f"{one.seconds:.1f}",
        )
        shown.add_row(*row)
    console.print(shown)
    for failure in (failure for one in found for failure in one.failed):
        console.print(f"not used: {failure}")


def _to_json(one: Proved) -> dict[str, Any]:
    return {
        "k": one.shape.k,
        "n": one.shape.n,
        "dtype": dtype_name(one.shape.dtype),
        "bias": one.shape.bias,
        "seconds": one.seconds,
        "compared": one.compared,
        "paths": [list(pair) for pair in one.paths],
        "failed": list(one.failed),
    }
