"""The GPU kernels behind an operation, and the one of the other run forced on the request alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from detinfer import bits
from detinfer.goldens.cause.align import Pair
from detinfer.goldens.cause.first import Differs, floating
from detinfer.goldens.cause.operations import Operation, local
from detinfer.models.targets import tensors


def operands(run: Operation) -> list[torch.Tensor]:
    """The tensors among an operation's arguments, in order; of those that are spread over ranks, this rank's part."""
    return [local(t) for t in tensors([*run.args, *run.kwargs.values()])]


def kernels(run: Operation) -> list[str]:
    """The GPU kernels that an operation launches, each with its grid and block; none on CPU."""
    if not any(t.is_cuda for t in operands(run)):
        return []
    from torch.profiler import ProfilerActivity, profile

    run()
    # acc_events: without it torch warns of cycles that there are none of here.
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as seen:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(file))  # the events themselves do not hold grids
        return launched(json.loads(file.read_text(errors="replace"))["traceEvents"])


def launched(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a trace of torch's profiler says ran on a GPU, in order: ``name <<<8x1x1, 384x1x1>>>``; copies have no grid."""
    ran = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    found = []
    for event in sorted(ran, key=lambda event: float(event["ts"])):
        sizes = [event.get("args", {}).get(what) for what in ("grid", "block")]
        shape = ", ".join("x".join(map(str, size)) for size in sizes if size)
        found.append(f"{event['name']} <<<{shape}>>>" if shape else str(event["name"]))
    return found


def confirmed(one: Operation, many: Operation, differs: Differs, parts: Callable[..., Iterator[Pair]]) -> str:
    """What the operation of the other run gives the request with zeros in the place of all others, in words.

    Its shapes, and with them the kernel that a library chooses for them, are those of the other run; what it computes on is
    the request alone. Empty where it cannot be told what belongs to the request.
    """
    given = operands(many)
    shares = [list(parts(a, b)) for a, b in zip(operands(one), given, strict=False)]
    if many.key.joint or len(shares) < len(given) or len(tensors([*many.args, *many.kwargs.values()])) > len(given):
        return ""
    if any(floating(t) and not share for t, share in zip(given, shares, strict=True)):
        return ""
    rest = iter(shares)
    args, names = _alone(many.args, rest), {name: _alone(value, rest) for name, value in many.kwargs.items()}
    forced = replace(many, args=args, kwargs=names)
    if (ran := kernels(forced)) != kernels(many):
        return f"with zeros in the others' place other kernels run ({'; '.join(ran)}): not confirmed"
    place, (left, right) = differs.place, differs.pair
    again = forced()
    if [t.shape for t in again] != [t.shape for t in many.results]:
        return "with zeros in the others' place it gives a result of another shape: what the others hold decides"
    got = again[place][right]
    if bits.count_mismatches(got, many.results[place][right]) == 0:
        return "with zeros in the others' place the request gets the same bytes as here: the shapes decide, and the kernel for them"
    if bits.count_mismatches(got, one.results[place][left]) == 0:
        return "with zeros in the others' place the request gets its bytes alone: what the others hold decides"
    return (
        "with zeros in the others' place the request gets other bytes than on either side: what the others hold decides"
    )


def _alone(value: Any, shares: Iterator[Sequence[Pair]]) -> Any:
    """Tensors in nested tuples and lists as copies that are zero but for the request's part, if floating point."""
    if isinstance(value, torch.Tensor):
        mine = next(shares)
        if not floating(value):
            return value.clone()
        others = torch.ones(value.shape, dtype=torch.bool, device=value.device)
        for _, part in mine:
            others[part] = False
        return value.detach().clone().masked_fill_(others, 0)
    if isinstance(value, list | tuple):
        return type(value)(_alone(item, shares) for item in value)
    return value
