"""Decode with several splits to a program, run by Triton's interpreter, against one split to a program: prints what differs.

A program of its own, as ``attention_interpreted`` is. Numpy multiplies matrices here, the same way for any deal, so bytes
can be compared. Splits are 128 keys, so that short rows have many.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import attention_interpreted as interpreted  # chooses the interpreter
import numpy as np
import torch
import triton.language as tl

from detinfer.bits import as_bytes
from detinfer.ops import attention_cuda_launch as launch
from detinfer.ops import attention_triton
from detinfer.ops.attention_cuda_launch import Keys, plan
from detinfer.ops.attention_deal import Deal

DEPTH, SPLIT, PAGE = 16, 128, 16
SPACES: list[tuple[torch.Tensor, ...]] = []
"""What the launches left: maxima, sums, values."""


def keep_spaces() -> None:
    made = launch.workspace

    def kept(*work: Any) -> tuple[torch.Tensor, ...]:
        SPACES.append(made(*work))
        return SPACES[-1]

    launch.workspace = kept  # type: ignore[assignment]


def calls() -> Iterator[tuple[str, tuple[torch.Tensor, ...], Keys]]:
    """(name, query, key and value, what is seen)."""

    def given(group: int, keys: int, queries: int = 1, batch: int = 2) -> tuple[torch.Tensor, ...]:
        sizes = ((batch, group, queries, DEPTH), (batch, 1, keys, DEPTH), (batch, 1, keys, DEPTH))
        return tuple(interpreted.drawn(keys + place, *size) for place, size in enumerate(sizes))

    # Both sides of a block's end and of a split's.
    for group, lengths in ((1, (1, 512, 575)), (4, (128, 129, 511, 513)), (8, (641,))):
        for keys in lengths:
            yield f"group {group}, {keys} keys", given(group, keys, batch=1), Keys()
    yield "three rows", given(4, 514, 3, 1), Keys(None, True, 511)
    starts, counts = torch.tensor([3, 130], dtype=torch.int32), torch.tensor([515, 514], dtype=torch.int32)
    yield "padding", given(4, 520), Keys(None, True, 0, 0, starts, counts)
    empty = torch.tensor([520, 0], dtype=torch.int32)
    yield "an empty row", given(4, 520), Keys(None, True, 0, 0, None, empty)
    for window in (1, 64, 200, 300):
        yield f"a window of {window}", given(4, 520), Keys(None, True, 519, window)
    sinks = torch.tensor([-3.0, 0.5, 4.0, 20.0])
    yield "sinks", given(4, 520), Keys(None, True, 519, sinks=sinks)
    seen = torch.ones(2, 1, 1, 520, dtype=torch.bool)
    seen[0, ..., :70], seen[0, ..., 100:300], seen[1] = False, False, False
    for mask in (seen, interpreted.hidden(seen) + torch.arange(520) % 7 / 4):
        for limit in (16384, 64):
            launch._SCANNED = limit  # a shorter one: what a row sees is found by a kernel of its own
            yield f"{mask.dtype}, masks to {limit} scanned", given(4, 520), Keys(mask.expand(2, 4, 1, 520))
    query, key, value = given(4, 520)
    table = torch.randperm(70, generator=torch.Generator().manual_seed(4)).to(torch.int32).view(2, 35)
    caches = [torch.full((70, PAGE, 1, DEPTH), math.nan) for _ in range(2)]
    for cache, t in zip(caches, (key, value), strict=True):
        for sequence in range(2):
            for n in range(int(counts[sequence])):
                cache[table[sequence, n // PAGE], n % PAGE] = t[sequence, :, n]
    paged = [cache.transpose(1, 2) for cache in caches]
    yield "pages", (query, *paged), Keys(None, True, 0, 0, None, counts, table)


def run(tensors: tuple[torch.Tensor, ...], keys: Keys, deal: Deal) -> tuple[bytes, Any]:
    """(the bytes of the result, heads inside of rows, and of its log-sum-exp; the launch)."""
    query, key, value = tensors
    made = plan(query, key, value, keys, 0.25, None, True, "decode", deal)
    out, lse = made.start(query, key, value, keys)
    assert lse is not None
    return as_bytes(out.transpose(1, 2).contiguous()) + as_bytes(lse), made


Split = tuple[Any, Any, Any]


def merge(left: Split, right: Split) -> Split:
    """Two of (maximum, sum, values) as the kernel merges them."""
    top = np.maximum(left[0], right[0])
    base = np.where(np.isneginf(top), np.float32(0), top)
    a, c = np.exp2(left[0] - base), np.exp2(right[0] - base)
    return top, left[1] * a + right[1] * c, left[2] * a[:, None] + right[2] * c[:, None]


def merged(splits: list[Split], each: int, sinks: torch.Tensor | None) -> bytes:
    """The result of a row's splits, of which every ``each`` are merged first, then these, a sink at last."""
    programs = [functools.reduce(merge, splits[first : first + each]) for first in range(0, len(splits), each)]
    if sinks is not None:
        programs.append((sinks.numpy() * np.float32(math.log2(math.e)), np.float32(1), np.zeros((4, 64), np.float32)))
    _, total, out = functools.reduce(merge, programs)
    return bytes((out * (np.float32(1) / total)[:, None] + np.float32(0))[:, :DEPTH].tobytes())


def left(made: Any) -> list[list[Split]]:
    """The splits that the last launch left, of each row that has several."""
    programs, splits, rows, width = made.work
    parts = [t.numpy().reshape(programs, splits, rows, -1) for t in SPACES[-1][:3]]
    found = []
    for row in range(programs):
        there = [s for s in range(splits) if not np.isnan(parts[1][row, s]).any()]
        if len(there) > 1:
            found.append([(parts[0][row, s, :, 0], parts[1][row, s, :, 0], parts[2][row, s]) for s in there])
    assert width == 64
    return found


def main() -> None:
    interpreted.on_the_cpu()
    keep_spaces()
    attention_triton.LEAST = tl.constexpr(SPLIT)
    cases: dict[str, dict[str, Any]] = {}
    for name, tensors, keys in calls():
        want, made = run(tensors, keys, Deal(1))
        rows = left(made)
        case = cases[name] = {
            "splits": max((len(splits) for splits in rows), default=1),
            "in order": all(merged(splits, 16, keys.sinks) in want for splits in rows),
            "two first": all(merged(splits, 2, keys.sinks) in want for splits in rows),
            "other bytes": [],
        }
        for each in (2, 3, 8) if name.startswith("group") else (2, 8):
            got, several = run(tensors, keys, Deal(each))
            assert several.constants["SEVERAL"] and several.grid[0] == -(-made.grid[0] // each)
            if got != want:
                case["other bytes"].append(each)
        got, whole = run(tensors, keys, Deal(1, whole=True))
        assert whole.constants["WHOLE"] and whole.grid[0] == 1
        if got != want:
            case["other bytes"].append("all")
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
