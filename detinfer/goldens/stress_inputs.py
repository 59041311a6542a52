"""Stress inputs for every reducing operation that the policy covers, at the shapes that a model called it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from detinfer.goldens.stress import BATCH, Arguments, Stress, cancelling, disorder, numbers, restored

Shapes = tuple[tuple[int, ...], ...]
"""Shapes of an operation's tensor arguments, in order."""

WIDEST = 1024
"""Columns of a stress weight: the order runs along K, so a wider vocabulary adds time and no order."""


def stress(operation: str, dtype: torch.dtype, shapes: Shapes, seed: int) -> Stress | None:
    """Stress inputs for one recorded call of ``aten::name.overload``; None when none are known for it."""
    name = operation.removeprefix("aten::").partition(".")[0]
    builder = _BUILDERS.get(name)
    return None if builder is None else builder(name, dtype, shapes, np.random.default_rng(seed))


def _same(output: torch.Tensor) -> torch.Tensor:
    return output


def _restored(output: torch.Tensor) -> torch.Tensor:
    return restored(output, -1)


def _product(name: str, dtype: torch.dtype, shapes: Shapes, rng: np.random.Generator) -> Stress:
    """linear, addmm, mm, matmul, bmm, mv, dot, ...: rows of K terms against columns of K terms."""
    added = name in ("addmm", "baddbmm", "addmv")
    left, right = shapes[1:3] if added else shapes[:2]
    length = left[-1]
    transposed = name == "linear"
    columns = 1 if len(right) == 1 else min(right[0] if transposed else right[-1], WIDEST)
    batched = name in ("bmm", "baddbmm") or (name == "matmul" and len(right) > 2)
    shifted = added or (transposed and len(shapes) > 2)
    rows = cancelling(rng, (BATCH, 1, length), dtype)
    weight = numbers(rng, (BATCH if batched else 1, columns, length), dtype)
    weight[..., 0] = 1
    weight[..., -1] = 1  # so that the first and the last product cancel in every column
    # Small, like what is left after the cancellation: a larger one would round it away.
    added_to = numbers(rng, (columns,), dtype) / 512 if shifted else None

    def operands(picked: Sequence[int]) -> Arguments:
        x, w = rows[list(picked)], weight[list(picked)] if batched else weight[0]
        return (x, w), {}

    def plant(arguments: Arguments) -> Arguments:
        (x, w), _ = arguments
        return (disorder(x, -1), disorder(w, -1)), {}

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        x, w = args
        shift = None if added_to is None else added_to.to(x.device)
        if name == "linear":
            return F.linear(x, w, shift)
        if batched:
            pair = (x, w.transpose(-1, -2))
            return torch.matmul(*pair) if shift is None else torch.baddbmm(shift, *pair)
        flat, column = x[:, 0], w.t()
        if name == "dot":
            return torch.stack([torch.dot(row, w[0]) for row in flat])[:, None]
        if name == "mv":  # the matrix has the rows here; every one of them meets the same vector
            return torch.mv(flat, w[0])[:, None]
        if shift is None:
            return torch.mm(flat, column) if name == "mm" else torch.matmul(flat, column)
        return torch.addmv(shift, flat, w[0])[:, None] if name == "addmv" else torch.addmm(shift, flat, column)

    return Stress(run, operands, plant, _same, length, f"{length} -> {columns}", product=True)


def _row(name: str, dtype: torch.dtype, shapes: Shapes, rng: np.random.Generator) -> Stress:
    """mean, sum, softmax, norms: one row of n terms each."""
    length = shapes[0][-1] if shapes[0] else 1
    if name in ("mean", "sum"):
        rows = cancelling(rng, (BATCH, 1, length), dtype)
    else:
        # These add terms of one sign: another order moves the last bit of an fp32 sum, which a result in 16 bits shows
        # about once in 2^16 elements. Many rows, then.
        elements = 1 << (18 if dtype == torch.float32 else 21)
        rows = numbers(rng, (BATCH, max(1, elements // (BATCH * length)), length), dtype)
    if name.endswith("log_softmax"):
        # One term leads by far: its result is minus the sum of the others' shares, small, and shows their last bits.
        rows = rows.abs().neg() - 12
        rows[..., length // 2] = 0
    weight = numbers(rng, (length,), dtype)

    def make(picked: Sequence[int]) -> Arguments:
        return (rows[list(picked)], weight), {}

    def plant(arguments: Arguments) -> Arguments:
        (x, w), _ = arguments
        return (disorder(x, -1), disorder(w, -1)), {}

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        x: torch.Tensor = args[0]
        if name == "mean":
            return x.mean(-1, keepdim=True)
        if name == "sum":
            return x.sum(-1, keepdim=True)
        if name.endswith("log_softmax"):
            return torch.log_softmax(x, -1)
        if name.endswith("softmax"):
            return torch.softmax(x, -1)
        if name.endswith("rms_norm"):
            return F.rms_norm(x, (length,), args[1], 1e-6)
        return F.layer_norm(x, (length,), args[1], None, 1e-6)

    restore = _same if name in ("mean", "sum") else _restored
    return Stress(run, make, plant, restore, length, f"{length}")


def _attention(name: str, dtype: torch.dtype, shapes: Shapes, rng: np.random.Generator) -> Stress:
    """scaled_dot_product_attention: V cancels over the keys, the first and the last key being equal."""
    (*_, heads, queries, width), (*_, groups, length, _), (*_, value_width) = shapes[:3]
    q = numbers(rng, (BATCH, heads, queries, width), dtype)
    k = numbers(rng, (BATCH, groups, length, width), dtype) / 16
    v = cancelling(rng, (BATCH, groups, value_width, length), dtype).transpose(-1, -2).contiguous()
    k[..., -1, :] = k[..., 0, :]

    def make(picked: Sequence[int]) -> Arguments:
        chosen = list(picked)
        return (q[chosen], k[chosen], v[chosen]), {}

    def plant(arguments: Arguments) -> Arguments:
        (query, key, value), _ = arguments
        return (query, disorder(key, -2), disorder(value, -2)), {}

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        query, key, value = args
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=heads != groups)

    return Stress(run, make, plant, _same, length, f"{queries} queries, {length} keys, width {width}", product=True)


_BUILDERS: dict[str, Callable[[str, torch.dtype, Shapes, np.random.Generator], Stress]] = {
    **dict.fromkeys(("linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "mv", "addmv", "dot"), _product),
    **dict.fromkeys(("mean", "sum", "softmax", "_softmax", "log_softmax", "_log_softmax"), _row),
    **dict.fromkeys(("rms_norm", "_fused_rms_norm", "layer_norm", "native_layer_norm"), _row),
    "scaled_dot_product_attention": _attention,
}
