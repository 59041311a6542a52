"""Modules whose rows depend on their batch, each in a way that real kernels have had; and sound twins of them.

Every factory returns ``(module, requests)`` for ``package.module:factory``. Inputs are those on which order shows.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from detinfer.goldens.stress import cancelling, disorder, numbers

WIDTH = 77
REQUESTS = 6


def _requests(width: int = WIDTH, dtype: torch.dtype = torch.float32, tokens: int = 3) -> list[torch.Tensor]:
    rng = np.random.default_rng(11)
    return [cancelling(rng, (1, tokens, width), dtype) for _ in range(REQUESTS)]


class Sound(nn.Module):
    """A linear layer, an activation and a sum: nothing here knows its batch."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 33, dtype=dtype)
        self.act = nn.SiLU()
        rng = np.random.default_rng(5)
        with torch.no_grad():
            self.up.weight.copy_(numbers(rng, (33, WIDTH), dtype))
            self.up.bias.copy_(numbers(rng, (33,), dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.up(x)).sum(-1, keepdim=True)


class TailSum(nn.Module):
    """Sums rows four at a time; what is left over is summed in another order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        full = rows.shape[0] // 4 * 4
        body, tail = rows[:full].sum(-1), disorder(rows[full:], -1).sum(-1)
        return torch.cat([body, tail]).reshape(*x.shape[:-1], 1)


class ScalarTailSilu(nn.Module):
    """Sixteen elements at a time by one formula, the last few by another: equal in exact arithmetic."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1)
        full = flat.numel() // 16 * 16
        body, tail = flat[:full], flat[full:]
        return torch.cat([body * torch.sigmoid(body), tail / (torch.exp(-tail) + 1)]).reshape(x.shape)


class LinearByRows(nn.Module):
    """Walks K in one order up to 8 rows and in another above, as a split-K heuristic does."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(3)
        self.register_buffer("weight", numbers(rng, (33, WIDTH), torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() // x.shape[-1] <= 8:
            return F.linear(x, self.weight)
        return F.linear(disorder(x, -1), disorder(self.weight, -1))


class AttentionByTile(nn.Module):
    """Reads its keys in an order that depends on how many queries stand in the tile."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.shape[0] * q.shape[1] > 4:
            k, v = disorder(k, -2), disorder(v, -2)
        return F.scaled_dot_product_attention(q, k, v)


class Holder(nn.Module):
    """Gives a faulty layer a name of its own inside a model with a sound one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.sound = nn.Identity()
        self.layer = layer

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.layer(*(self.sound(x) for x in args))


def sound() -> object:
    return Sound(), _requests()


def sound_bfloat16() -> object:
    return Sound(torch.bfloat16), _requests(dtype=torch.bfloat16)


def tail_sum() -> object:
    return Holder(TailSum()), _requests()


def scalar_tail_silu() -> object:
    rng = np.random.default_rng(7)
    return Holder(ScalarTailSilu()), [numbers(rng, (1, 1, 49), torch.float32) for _ in range(REQUESTS)]


def linear_by_rows() -> object:
    return Holder(LinearByRows()), _requests()


def attention_by_tile() -> object:
    rng = np.random.default_rng(9)

    def request() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k = numbers(rng, (1, 2, 3, 16), torch.float32), numbers(rng, (1, 2, 21, 16), torch.float32) / 16
        v = cancelling(rng, (1, 2, 16, 21), torch.float32).transpose(-1, -2).contiguous()
        k[..., -1, :] = k[..., 0, :]
        return q, k, v

    return Holder(AttentionByTile()), [request() for _ in range(REQUESTS)]


class Random(nn.Module):
    """Draws random numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(())


class Hidden(nn.Module):
    """Draws random numbers and does not use them: its output repeats, the generator moves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.rand(())
        return x + 1


class Counting(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + 1


class Infinite(nn.Module):
    """Gives an infinity."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 0.0


def random() -> object:
    return Holder(Random()), _requests()


def hidden() -> object:
    return Holder(Hidden()), _requests()


def counting() -> object:
    return Holder(Counting()), _requests()


def infinite() -> object:
    return Holder(Infinite()), _requests()


def only_copies() -> object:
    """Nothing that could differ: an identity."""
    return Holder(nn.Identity()), _requests()


def raising() -> object:
    raise RuntimeError("no weights here")


def half_a_result() -> object:
    return Sound()


class Cumulative(nn.Module):
    """Uses an operation that nothing covers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(-1)


def uncovered() -> object:
    return Holder(Cumulative()), _requests()
