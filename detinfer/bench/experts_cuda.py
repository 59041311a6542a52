"""Experts of three models on a GPU against transformers' grouped_mm form, in replays of a CUDA graph, both in one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table

from detinfer.bench import graph
from detinfer.bits import first_mismatch
from detinfer.errors import Diverged, UsageError
from detinfer.ops import moe_cuda
from detinfer.ops.moe import Experts


class Shape(NamedTuple):
    """A layer: ``transposed`` weights have their columns contiguous, and biases."""

    experts: int
    places: int
    hidden: int
    inner: int
    transposed: bool


SHAPES = {
    "Mixtral 8x7B": Shape(8, 2, 4096, 14336, False),
    "Qwen3-30B-A3B": Shape(128, 8, 2048, 768, False),
    "gpt-oss-20b": Shape(32, 4, 2880, 2880, True),
}
TOKENS = (1, 8, 64, 512, 4096)
_CALLS = 4
"""Calls of one graph, each with a routing of its own: weights come from memory as they do in a model."""


@dataclass(frozen=True)
class Timing:
    """Median microseconds of one layer's experts on both sides."""

    model: str
    tokens: int
    grouped_mm: float
    detinfer: float

    @property
    def ratio(self) -> float:
        """detinfer's time over that of transformers' grouped_mm form."""
        return self.detinfer / self.grouped_mm


def run(tokens: Sequence[int] = TOKENS, repeats: int = 11, models: Sequence[str] = tuple(SHAPES)) -> Iterator[Timing]:
    """Time every layer in bf16; a token's bytes are compared with those of the token alone first: Diverged."""
    try:
        grouped = import_module("transformers.integrations.moe").grouped_mm_experts_forward
    except ImportError as error:
        raise UsageError(f"bench experts compares with transformers, which cannot be imported: {error}") from error
    with torch.inference_mode():
        for model in models:
            module, layer = _layer(SHAPES[model])
            for count in tokens:
                calls = [_inputs(SHAPES[model], count, seed) for seed in range(_CALLS)]
                x, chosen, weights = calls[0]
                alone = moe_cuda.experts(x[-1:], chosen[-1:], weights[-1:], layer)
                if first := first_mismatch(moe_cuda.experts(x, chosen, weights, layer)[-1:].cpu(), alone.cpu()):
                    raise Diverged(f"the last of {count} tokens of {model} has other bytes than alone: {first}")
                ours = graph.median(partial(moe_cuda.experts, layer=layer), calls, repeats)
                theirs = graph.median(partial(grouped, module), calls, repeats)
                yield Timing(model, count, theirs, ours)


def _gate(both: torch.Tensor) -> torch.Tensor:
    left, right = both.chunk(2, dim=-1)
    return F.silu(left) * right


def _clamped_gate(both: torch.Tensor) -> torch.Tensor:
    left, right = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
    return (right + 1) * (left * torch.sigmoid(left * 1.702))


def _draw(*shape: int) -> torch.Tensor:
    whole = torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda").to(torch.bfloat16)
    return whole.mul_(2.0**-11)


def _layer(shape: Shape) -> tuple[Any, Experts]:
    up, down = (shape.experts, 2 * shape.inner, shape.hidden), (shape.experts, shape.hidden, shape.inner)
    if shape.transposed:
        up, down = (up[0], up[2], up[1]), (down[0], down[2], down[1])
    weights = _draw(*up), _draw(*down)
    up_bias = _draw(shape.experts, 2 * shape.inner) if shape.transposed else None
    down_bias = _draw(shape.experts, shape.hidden) if shape.transposed else None
    gate = _clamped_gate if shape.transposed else _gate
    module = SimpleNamespace(
        num_experts=shape.experts,
        gate_up_proj=weights[0],
        down_proj=weights[1],
        gate_up_proj_bias=up_bias,
        down_proj_bias=down_bias,
        has_gate=True,
        has_bias=shape.transposed,
        is_transposed=shape.transposed,
        has_post_expert_norm=False,
        _is_expert_parallel=False,
        _apply_gate=gate,
        act_fn=F.silu,
    )
    return module, Experts(*weights, gate, up_bias, down_bias, shape.transposed)


def _inputs(shape: Shape, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(shape.experts, generator=generator)[: shape.places] for _ in range(tokens)])
    weights = torch.full(chosen.shape, 1 / shape.places, dtype=torch.bfloat16, device="cuda")
    return _draw(tokens, shape.hidden) * 16, chosen.cuda(), weights


def to_json(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Each timing as plain JSON values."""
    return [asdict(t) | {"ratio": t.ratio} for t in timings]


def table(timings: Sequence[Timing]) -> Table:
    """Microseconds and the ratio, a line for each model and number of tokens."""
    shown = Table(title="experts of a layer in bf16, CUDA graph, microseconds")
    for heading in ("model", "tokens", "grouped_mm", "detinfer", "ratio"):
        shown.add_column(heading, justify="left" if heading == "model" else "right")
    for t in timings:
        shown.add_row(t.model, str(t.tokens), f"{t.grouped_mm:.1f}", f"{t.detinfer:.1f}", f"{t.ratio:.2f}")
    return shown
