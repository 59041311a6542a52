"""Run vectors through every path that this machine accepts, and compare every element of every output.

Operations over ranks run between real processes, 1 to 8 of them at once; those of one process at every instruction set
that this CPU has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from detinfer import bits, native
from detinfer.collectives.communicator import PATHS, STAGING, Communicator, connect
from detinfer.collectives.launch import WAIT, Left, Place, launch, place
from detinfer.errors import DetinferError, InfrastructureError, UnsupportedDtype, UsageError
from detinfer.goldens.vectors import file
from detinfer.goldens.vectors.case import Case, number
from detinfer.goldens.vectors.make import make
from detinfer.goldens.vectors.result import KEPT, Cell, Mismatch, VectorResult, merge
from detinfer.ops import rows

PIECES = 512
"""Bytes of staging, the least there can be: nearly every tensor then goes in several pieces."""

Outputs = dict[str, torch.Tensor]
Found = tuple[list[Cell], list[Mismatch]]


def replay(folder: Path, only: int | None = None) -> VectorResult:
    """Replay the vectors of a folder, of ``only`` so many ranks where that is given.

    Raises GoldenError for a folder that is damaged, UsageError when ``only`` picks nothing or the command already runs
    as a rank, InfrastructureError when a rank dies.
    """
    data, cases = file.read(folder)
    chosen = [case for case in cases if only is None or case.ranks == only]
    if not chosen:
        raise UsageError(f"{folder}: none of its {len(cases)} vectors is of {only} ranks")
    operation = data["operation"]
    result = VectorResult(str(folder), operation, data["reason"], vectors=len(chosen))
    if operation in PATHS:
        if place() is not None:
            raise UsageError(f"{folder}: vectors start the ranks that they need; run this without torchrun")
        found = launch(_ranks, max(case.ranks for case in chosen), folder, only, preload=[__name__])
        if isinstance(found, Left):
            raise InfrastructureError(f"rank {found.rank} left with exit code {found.code}")
        if failed := [f"rank {rank}: {one}" for rank, one in found.items() if isinstance(one, str)]:
            raise InfrastructureError(f"{folder}: {'; '.join(failed)}")
        result.cells, result.mismatches = merge([found[rank] for rank in sorted(found)])
    else:
        result.cells, result.mismatches = merge([_levels(chosen)])
    _judge(result, operation, chosen)
    return result


def _judge(result: VectorResult, operation: str, cases: Sequence[Case]) -> None:
    if any(cell.differing for cell in result.cells):
        result.verdict = "diverged"
        return
    made = {_key(case): case for case in make(operation)}
    if changed := [case.label() for case in cases if not _same(case, made.get(_key(case)))]:
        # The paths agree with the file and the reference does not: one of the two has changed.
        result.verdict = "diverged"
        result.reasons.append(
            f"the reference gives other vectors than the file's: {changed[0]} ({len(changed)} in all)"
        )
        return
    if idle := [cell.path for cell in result.cells if not cell.vectors and not cell.refused]:
        result.reasons.append(f"nothing was replayed through {', '.join(sorted(set(idle)))}")
    if not any(cell.compared for cell in result.cells):
        result.reasons.append("no element was compared")
    if operation in PATHS and all(case.ranks < 3 for case in cases):
        result.reasons.append("two ranks commute: no order could have differed")
    result.verdict = "vacuous" if result.reasons else "same"


def _key(case: Case) -> str:
    return f"{case.label()} {sorted(case.inputs)}"


def _same(case: Case, made: Case | None) -> bool:
    def digests(one: Case) -> dict[str, str]:
        named = {f"rank {rank}": part for rank, part in enumerate(one.parts)} | one.inputs
        named |= {f"output {name}": tensor for name, tensor in one.outputs.items()}
        return {name: bits.digest(tensor) for name, tensor in named.items()}

    return made is not None and digests(case) == digests(made)


# --- between processes


def _ranks(folder: Path, only: int | None) -> Found | str:
    """What one rank finds, or the sentence of an error: returned, for an exit code would end the others unheard."""
    mine = place()
    assert mine is not None
    _, cases = file.read(folder)
    cases = [case for case in cases if only is None or case.ranks == only]
    try:
        return merge([found for size in sorted({c.ranks for c in cases}) for found in _group(mine, size, cases)])
    except DetinferError as error:
        return str(error)


def _group(mine: Place, size: int, cases: Sequence[Case]) -> Iterator[Found]:
    if mine.rank >= size:
        return
    chosen = [case for case in cases if case.ranks == size]
    for staging, suffix in ((STAGING, ""), (PIECES, ", in pieces")):
        name = f"{mine.name}-{size}{suffix}"
        with connect(name=name, rank=mine.rank, size=size, timeout=WAIT, staging=staging) as ranks:
            for path in PATHS[_operation(chosen[0])]:
                yield _compare(path + suffix, chosen, partial(_call, ranks, path), mine.rank)


def _operation(case: Case) -> str:
    if "weight_mode" in case.arguments:
        return "all_reduce_rms_norm"
    return "reduce_scatter" if "dim" in case.arguments else "all_reduce"


def _call(ranks: Communicator, path: Any, case: Case) -> Outputs:
    part, how = case.parts[ranks.rank], case.arguments
    operation = _operation(case)
    if operation == "all_reduce":
        return {"out": ranks.all_reduce(part, op=how["op"], order=how["order"], path=path)}
    if operation == "reduce_scatter":
        return {f"rank{ranks.rank}": ranks.reduce_scatter(part, dim=how["dim"], path=path)}
    norm, total = ranks.all_reduce_rms_norm(
        part,
        case.inputs["residual"],
        case.inputs["weight"],
        number(how["eps"]),
        mode=how["mode"],
        weight_mode=how["weight_mode"],
        path=path,
    )
    return {"norm": norm, "residual_out": total}


# --- in one process


def _levels(cases: Sequence[Case]) -> Found:
    state = native.load()
    if not isinstance(state, native.Loaded):
        native.library()  # raises, with the reason
        raise AssertionError("unreachable")
    found = []
    for level in state.levels:
        with native.hold_isa(level):
            found.append(_compare(level, cases, _rms_norm, 0))
    return merge(found)


def _rms_norm(case: Case) -> Outputs:
    how = case.arguments
    residual = case.inputs.get("residual")
    options: dict[str, Any] = {"mode": how["mode"]}
    if residual is not None:
        options |= {"residual": residual, "residual_mode": how["residual_mode"]}
    got = rows.rms_norm(case.parts[0], case.inputs.get("weight"), number(how["eps"]), **options)
    return {"norm": got} if residual is None else {"norm": got[0], "residual_out": got[1]}


# --- comparison


def _compare(path: str, cases: Iterable[Case], call: Callable[[Case], Outputs], rank: int) -> Found:
    cells: dict[str, Cell] = {}
    mismatches: list[Mismatch] = []
    for case in cases:
        cell = cells.setdefault(case.dtype, Cell(path, case.ranks, case.dtype))
        try:
            outputs = call(case)
        except UnsupportedDtype as error:
            cell.refused = str(error)
            continue
        cell.vectors += 1
        for name, got in outputs.items():
            wanted = case.outputs[name]
            cell.compared += wanted.numel()
            if got.shape != wanted.shape or got.dtype != wanted.dtype:
                differing, where = max(1, wanted.numel()), f"{got.dtype} {list(got.shape)}: another dtype or shape"
            else:
                differing = bits.count_mismatches(got, wanted)
                where = str(bits.first_mismatch(got, wanted)) if differing else ""
            cell.differing += differing
            if differing and len(mismatches) < KEPT:
                mismatches.append(Mismatch(case.label(), path, rank, name, where))
    return list(cells.values()), mismatches
