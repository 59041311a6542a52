"""aten's sums, means, extremes and softmaxes over one device's way of computing them: names, arguments, defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Reduce = Callable[[str, torch.Tensor, "int | Sequence[int] | None", bool, "torch.dtype | None"], Any]
"""(operation, input, dimensions or None for all, whether they stay as 1, dtype asked for)."""
Softmax = Callable[[str, torch.Tensor, int, "torch.dtype | None"], Any]
"""(operation, input, dimension, dtype asked for)."""


class Forms:
    """The operations, each with its schema's own signature."""

    def __init__(self, reduce: Reduce, softmax: Softmax) -> None:
        self._reduce, self._softmax = reduce, softmax

    def sum_all(self, input: torch.Tensor, *, dtype: torch.dtype | None = None) -> Any:
        """aten::sum: all elements as one row; a tensor of no dimensions."""
        return self._reduce("sum", input, None, False, dtype)

    def sum_dims(
        self,
        input: torch.Tensor,
        dim: int | Sequence[int] | None,
        keepdim: bool = False,
        *,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """aten::sum.dim_IntList: over one or several dimensions; +0 over no elements."""
        return self._reduce("sum", input, dim, keepdim, dtype)

    def mean_all(self, input: torch.Tensor, *, dtype: torch.dtype | None = None) -> Any:
        """aten::mean: the sum of all elements divided by their number."""
        return self._reduce("mean", input, None, False, dtype)

    def mean_dims(
        self,
        input: torch.Tensor,
        dim: int | Sequence[int] | None,
        keepdim: bool = False,
        *,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """aten::mean.dim: over one or several dimensions; NaN over no elements."""
        return self._reduce("mean", input, dim, keepdim, dtype)

    def amax(self, input: torch.Tensor, dim: int | Sequence[int] = (), keepdim: bool = False) -> Any:
        """aten::amax: NaN wins, and +0 is greater than -0 (torch's own answer depends on where the zeros lie)."""
        return self._reduce("max", input, dim, keepdim, None)

    def amin(self, input: torch.Tensor, dim: int | Sequence[int] = (), keepdim: bool = False) -> Any:
        """aten::amin: NaN wins, and -0 is less than +0."""
        return self._reduce("min", input, dim, keepdim, None)

    def max_all(self, input: torch.Tensor) -> Any:
        """aten::max: of all elements, as ``amax``."""
        return self._reduce("max", input, None, False, None)

    def min_all(self, input: torch.Tensor) -> Any:
        """aten::min: of all elements, as ``amin``."""
        return self._reduce("min", input, None, False, None)

    def softmax(self, input: torch.Tensor, dim: int = -1, *, dtype: torch.dtype | None = None) -> Any:
        """e^(x - max) / sum over ``dim``; a row of -Inf, or with NaN or +Inf in it, is NaN throughout, as in torch."""
        return self._softmax("softmax", input, dim, dtype)

    def log_softmax(self, input: torch.Tensor, dim: int = -1, *, dtype: torch.dtype | None = None) -> Any:
        """(x - max) - log(sum of e^(x - max)) over ``dim``."""
        return self._softmax("log_softmax", input, dim, dtype)

    def softmax_core(self, input: torch.Tensor, dim: int, half_to_float: bool) -> Any:
        """aten::_softmax; ``half_to_float`` gives fp32."""
        return self._softmax("softmax", input, dim, torch.float32 if half_to_float else None)

    def log_softmax_core(self, input: torch.Tensor, dim: int, half_to_float: bool) -> Any:
        """aten::_log_softmax; ``half_to_float`` gives fp32."""
        return self._softmax("log_softmax", input, dim, torch.float32 if half_to_float else None)

    def covered(self) -> dict[str, Callable[..., Any]]:
        """``aten::name``: the function that computes it."""
        return {
            "aten::sum": self.sum_all,
            "aten::sum.dim_IntList": self.sum_dims,
            "aten::mean": self.mean_all,
            "aten::mean.dim": self.mean_dims,
            "aten::amax": self.amax,
            "aten::amin": self.amin,
            "aten::max": self.max_all,
            "aten::min": self.min_all,
            "aten::_softmax": self.softmax_core,
            "aten::_log_softmax": self.log_softmax_core,
        }
