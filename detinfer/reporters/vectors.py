"""A replay of vectors as text: a table of path, dtype and number of ranks, and the first differences."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from detinfer.goldens.vectors.result import Cell, VectorResult

_STYLES = {"same": "green", "diverged": "bold red", "vacuous": "yellow"}
SHOWN = 5
"""Differences printed; the JSON has more."""


def show(result: VectorResult, console: Console) -> None:
    """Print what was replayed through which path (elements compared, or how many differ) and the verdict."""
    console.print(f"vectors  {result.path}: {result.operation}, {result.vectors} vectors")
    console.print(f"reason   {result.reason}", soft_wrap=True, markup=False)
    console.print(_table(result))
    for refused in sorted({f"{cell.path}: {cell.refused}" for cell in result.cells if cell.refused}):
        console.print(f"refused  {refused}", soft_wrap=True, markup=False)
    for found in result.mismatches[:SHOWN]:
        console.print(f"\n[bold red]differs[/] {found.path}, rank {found.rank}: {found.case}", soft_wrap=True)
        console.print(f"  {found.output}: {found.place}", soft_wrap=True, markup=False)
    compared = sum(cell.compared for cell in result.cells)
    differing = sum(cell.differing for cell in result.cells)
    style = _STYLES[result.verdict]
    console.print(f"vectors  [{style}]{result.verdict.upper()}[/]  {differing:,} of {compared:,} elements differ")
    for reason in result.reasons:
        console.print(f"         {reason}", soft_wrap=True, markup=False)


def _table(result: VectorResult) -> Table:
    sizes = sorted({cell.ranks for cell in result.cells})
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("path", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    for size in sizes:
        table.add_column(f"N={size}" if size > 1 else "elements", justify="right", no_wrap=True)
    cells = {(cell.path, cell.dtype, cell.ranks): cell for cell in result.cells}
    for path, dtype in dict.fromkeys((cell.path, cell.dtype) for cell in result.cells):
        table.add_row(path, dtype, *(_cell(cells.get((path, dtype, size))) for size in sizes))
    return table


def _cell(cell: Cell | None) -> str:
    if cell is None or not (cell.vectors or cell.refused):
        return "-"
    if cell.refused:
        return "refused"
    return f"[bold red]{cell.differing:,} ≠[/]" if cell.differing else f"{cell.compared:,}"
