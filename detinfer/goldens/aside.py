"""The engine's own tensor work, kept out of what is traced as the model's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
T = TypeVar("T")


def aside(function: Callable[P, T]) -> Callable[P, T]:
    """Run ``function`` where no dispatch mode sees its operations: comparing bytes is no operation of the model."""

    @functools.wraps(function)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> T:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return quiet
