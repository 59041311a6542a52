"""aten's operations of the matmul family, over one device's way of computing a product: names, arguments, defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from detinfer.ops.matmul_views import Views, dot_views, linear_views, matmul_views, three, two, vector_views


class Compute(Protocol):
    """alpha * a @ b + beta * c of what ``views`` makes of the operands; NotImplemented where all are integers."""

    def __call__(
        self,
        views: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Views],
        name: str,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        /,
    ) -> Any:
        """``name`` is the operation's, for errors."""


class Forms:
    """The operations, each with its schema's own signature; what is computed, and where, is ``compute``'s."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        """aten::linear: x [..., K] or [K], weight [N, K] or [K], bias [N], [1] or none -> [..., N] or [...].

        Raises UnsupportedDtype for float64 and complex, UsageError for operands that do not fit, like all of them.
        """
        return self._compute(linear_views, "aten::linear", x, weight, bias)

    def matmul(self, a: torch.Tensor, b: torch.Tensor) -> Any:
        """aten::matmul: torch's rules for vectors; leading dimensions broadcast."""
        return self._compute(matmul_views, "aten::matmul", a, b)

    def mm(self, a: torch.Tensor, b: torch.Tensor) -> Any:
        """aten::mm: [M, K] times [K, N]."""
        return self._compute(two, "aten::mm", a, b)

    def addmm(self, c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
        """aten::addmm: beta * c + alpha * a @ b, c broadcast to [M, N]; c is not read when beta is 0."""
        return self._compute(two, "aten::addmm", a, b, c if beta != 0 else None, alpha, beta)

    def bmm(self, a: torch.Tensor, b: torch.Tensor) -> Any:
        """aten::bmm: [B, M, K] times [B, K, N]."""
        return self._compute(three, "aten::bmm", a, b)

    def baddbmm(self, c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
        """aten::baddbmm: beta * c + alpha * a @ b in batches, c broadcast to [B, M, N]; not read when beta is 0."""
        return self._compute(three, "aten::baddbmm", a, b, c if beta != 0 else None, alpha, beta)

    def mv(self, a: torch.Tensor, x: torch.Tensor) -> Any:
        """aten::mv: [M, K] times [K] -> [M]."""
        return self._compute(vector_views, "aten::mv", a, x)

    def addmv(self, c: torch.Tensor, a: torch.Tensor, x: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
        """aten::addmv: beta * c + alpha * a @ x, [M, K] times [K] -> [M]; c is not read when beta is 0."""
        return self._compute(vector_views, "aten::addmv", a, x, c if beta != 0 else None, alpha, beta)

    def dot(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        """aten::dot: [K] times [K] -> a scalar."""
        return self._compute(dot_views, "aten::dot", x, y)

    def covered(self) -> dict[str, Callable[..., Any]]:
        """``aten::name``: the function that computes it."""
        names = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")
        return {f"aten::{name}": getattr(self, name) for name in names}
