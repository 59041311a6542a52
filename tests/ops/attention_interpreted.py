"""Attention's Triton kernels run by Triton's interpreter on the CPU, each kind of call against fp64: prints what it finds.

A program of its own (``test_attention_triton``), since Triton chooses the interpreter when it is imported. It shows that the
kernels read the right keys and merge the right splits; bits are another matter, since numpy multiplies matrices here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from detinfer.errors import Diverged
from detinfer.ops import attention_cuda_launch as launch
from detinfer.ops import attention_cuda_variants as variants
from detinfer.ops.attention_cuda_launch import Keys, plan
from detinfer.ops.attention_deal import Chip

DEPTH, VALUE_DEPTH, KEYS, PAGE = 24, 16, 420, 16


def drawn(seed: int, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=draw).float() / 64


def on_the_cpu() -> None:
    """What a launch asks of CUDA."""
    torch._C._cuda_getDevice = lambda: None  # type: ignore[attr-defined]
    torch.cuda.is_current_stream_capturing = lambda: False
    launch._check_devices = lambda *_: None  # type: ignore[assignment]
    launch.chip = lambda _: Chip(1, 0)  # type: ignore[assignment]

    def workspace(out: torch.Tensor, programs: int, splits: int, rows: int, width: int) -> tuple[torch.Tensor, ...]:
        count = programs * splits * rows
        parts = (torch.full((n,), math.nan) for n in (count, count, count * width))
        return (*parts, torch.zeros(programs, dtype=torch.int32))

    launch.workspace = workspace  # type: ignore[assignment]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, added: torch.Tensor, sinks: Any = None) -> torch.Tensor:
    """fp64, with a mask of [.., Lq, Lk]; a row that sees nothing is 0."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1).nan_to_num(0.0) for t in (k, v))
    scores = q.double() @ k.mT / math.sqrt(q.shape[3]) + added.double()
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
        v = torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
    return scores.softmax(-1).nan_to_num(0.0) @ v


def hidden(seen: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, -math.inf)


def causal(queries: int, window: int = 0) -> torch.Tensor:
    at, end = torch.arange(KEYS), torch.arange(KEYS - queries + 1, KEYS + 1)[:, None]
    return (at < end) & (at >= (end - window if window else 0))


def cases() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, result, what it should be)."""
    k, v = drawn(1, 2, 2, KEYS, DEPTH), drawn(2, 2, 2, KEYS, VALUE_DEPTH)
    sinks = torch.tensor([-3.0, 0.5, 4.0, 20.0])

    def call(path: str, queries: int, keys: Keys, key: torch.Tensor = k, value: torch.Tensor = v) -> Any:
        q = drawn(3, 2, 4, 100, DEPTH)[:, :, -queries:]
        made = plan(q, key, value, keys, 1 / math.sqrt(DEPTH), None, False, path)
        assert made.kernel == path
        return made.start(q, key, value, keys)[0], q

    for path, queries in (("decode", 1), ("tiles", 20), ("decode", 3), ("prefill", 20), ("prefill", 100)):
        got, q = call(path, queries, Keys(None, True, KEYS - queries))
        yield f"{path}, {queries} rows", got, exact(q, k, v, hidden(causal(queries)))
    seen = torch.ones(2, 1, 1, KEYS, dtype=torch.bool)
    seen[0, ..., :30], seen[0, ..., 390:], seen[1, ..., 100:103] = False, False, False
    for limit in (launch._SCANNED, 64):
        launch._SCANNED = limit  # a shorter one: what a row sees is found by a kernel of its own
        for mask in (seen, hidden(seen) + torch.arange(KEYS) % 7 / 4):
            added = hidden(mask) if mask.dtype is torch.bool else mask
            for path, queries in (("decode", 1), ("tiles", 5))[: 1 if limit > 64 else 2]:
                got, q = call(path, queries, Keys(mask.expand(2, 4, queries, KEYS)))
                yield f"{path}, {mask.dtype}, masks to {limit} scanned", got, exact(q, k, v, added)
    for path, queries in (("decode", 1), ("tiles", 5)):
        got, q = call(path, queries, Keys(None, True, KEYS - queries, 100, sinks=sinks))
        yield f"{path}, a window and sinks", got, exact(q, k, v, hidden(causal(queries, 100)), sinks)
        starts, lengths = torch.tensor([10, 170], dtype=torch.int32), torch.tensor([KEYS, 333], dtype=torch.int32)
        got, q = call(path, queries, Keys(None, True, 0, 0, starts, lengths))
        at = torch.arange(KEYS)
        end = lengths[:, None] - queries + 1 + torch.arange(queries)
        rows = (at >= starts[:, None, None]) & (at < end[..., None])
        yield f"{path}, starts and lengths", got, exact(q, k, v, hidden(rows)[:, None])
        pages = torch.randperm(54, generator=torch.Generator().manual_seed(4)).to(torch.int32).view(2, 27)
        caches = [torch.full((54, PAGE, 2, t.shape[3]), math.nan) for t in (k, v)]
        for cache, t in zip(caches, (k, v), strict=True):
            for sequence in range(2):
                for n in range(int(lengths[sequence])):
                    cache[pages[sequence, n // PAGE], n % PAGE] = t[sequence, :, n]
        paged = [cache.transpose(1, 2) for cache in caches]
        got, q = call(path, queries, Keys(None, True, 0, 0, None, lengths, pages), *paged)
        yield f"{path}, pages", got, exact(q, k, v, hidden(at < end[..., None])[:, None])


def proofs() -> Iterator[tuple[str, Any]]:
    """(name, results compared or what was refused): the proof of a launch on 700 keys, then against a wrong order."""
    q, k, v = drawn(1, 2, 2, 1, DEPTH), drawn(2, 2, 1, KEYS, DEPTH), drawn(3, 2, 1, KEYS, DEPTH)
    counts = torch.tensor([KEYS, 333], dtype=torch.int32)
    seen = torch.ones(2, 1, 1, KEYS, dtype=torch.bool).expand(2, 2, 1, KEYS)
    variants.LENGTHS = variants.LENGTHS[:1]  # type: ignore[assignment]
    for name, keys in (("starts", Keys(None, True, 0, 0, counts // 9, counts)), ("a mask", Keys(seen))):
        made = plan(q, k, v, keys, 1.0, None, False)
        variants._proved.clear()
        variants.check(made, "", q, k, v, keys)
        yield f"proof, {name}", variants.proved()[""]
    variants._proved.clear()
    right = variants.reference
    variants.reference = lambda *args, **given: right(*args, **{**given, "split": given.get("split", 128)})
    variants.check_close = lambda *_: None
    try:
        variants.check(made, "", q, k, v, keys)
    except Diverged as refused:
        yield "proof, a wrong order", str(refused)
    variants.reference = right


def main() -> None:
    on_the_cpu()
    found: dict[str, Any] = dict(proofs())
    for name, got, want in cases():
        found[name] = float((got.double() - want).abs().max())
        found[f"{name}, rows turned"] = float((got.double().roll(1, 1) - want).abs().max())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
