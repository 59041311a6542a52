"""Printing a tensor is no operation of a program: under a policy too, torch looks at the values as it always does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import _tensor_str

from detinfer.torch_alone import torch_alone


class Printing:
    """``repr`` of plain tensors reaches torch's own kernels (it takes the least of their values in float64), until ``remove``."""

    def __init__(self) -> None:
        self._original: Any = _tensor_str._str
        original: Callable[..., str] = self._original

        @functools.wraps(original)
        def alone(self: torch.Tensor, **options: Any) -> Any:
            # A subclass prints itself, by the dispatch that would be switched off here.
            if type(self) not in (torch.Tensor, torch.nn.Parameter):
                return original(self, **options)
            with torch_alone():
                return original(self, **options)

        _tensor_str._str = alone

    def remove(self) -> None:
        """Give torch its own function back."""
        _tensor_str._str = self._original
