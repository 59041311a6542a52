"""The products of many experts in Triton's interpreter, on integers small enough that every sum is exact: prints what differs.

A program of its own (``test_matmul_triton``), since Triton chooses the interpreter when it is imported. It shows which rows meet
which weights and where results go, whatever the order; bits of inexact sums are a GPU's matter.
"""

from __future__ import annotations

import itertools
import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from detinfer.ops import matmul_wide

matmul_wide.BAND = 2  # of fewer tiles than these products have


def cut(chosen: torch.Tensor, experts: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """What ``Groups`` makes on a GPU: (assignments by expert, the tiles, how many there are room for)."""
    order, tiles = [], []
    for expert in range(experts):
        own = [a for a, e in enumerate(chosen.flatten().tolist()) if e == expert]
        own = own[1::2] + own[::2]  # in any order
        at = len(order)
        tiles += [(expert, at + start, at + min(start + rows, len(own))) for start in range(0, len(own), rows)]
        order += own
    most = min(chosen.numel(), experts) + chosen.numel() // rows
    flat = [len(tiles), *itertools.chain(*tiles)]
    assert len(tiles) <= most
    order += [-(10**6)] * (chosen.numel() - len(order))  # of no expert: never read
    return (
        torch.tensor(order, dtype=torch.int32),
        torch.tensor(flat + [-(10**6)] * (1 + 3 * most - len(flat)), dtype=torch.int32),
        most,
    )


found = {}
draw = torch.Generator().manual_seed(3)
for tokens, experts, k, n, across, rows in (
    (90, 3, 128, 70, False, 64), (90, 3, 100, 300, False, 128), (9, 5, 64, 24, True, 64), (150, 2, 72, 264, True, 64),
):  # fmt: skip
    for biased in (False, True):
        for grouped in (False, True):
            x = torch.randint(-4, 5, (tokens, k + 3), generator=draw)[:, :k].half()
            w = torch.randint(-4, 5, (experts, n, k), generator=draw).half()
            w = w.mT.contiguous().mT if across else w
            bias = torch.randint(-9, 10, (experts, n), generator=draw).half() if biased else None
            places = 2 if grouped else 1
            chosen = torch.randint(0, experts + 1, (tokens, places), generator=draw)  # ``experts``: none of them
            chosen[: tokens // 2] = 0
            if not grouped:
                chosen.zero_()
            order, tiles, most = cut(chosen, experts, rows)
            out = torch.full((tokens * places, n), float("nan"))
            matmul_wide.held(
                x,
                w,
                bias,
                order if grouped else None,
                tiles if grouped else None,
                out,
                places,
                (rows, 256 if grouped else 128),
                most,
            )
            name = f"{tokens} tokens, {experts} experts, {k} -> {n}, tiles of {rows}, {across=}, {biased=}, {grouped=}"
            wrong = 0
            for a, expert in enumerate(chosen.flatten().tolist()):
                if expert == experts:
                    wrong += int(not out[a].isnan().all())
                    continue
                exact = w[expert].double() @ x[a // places].double() + (0 if bias is None else bias[expert].double())
                wrong += int((out[a].double() != exact).any())
            found[name] = wrong
print(json.dumps(found))
