"""A rank's part of a sum over ranks, typed as what it is: not a tensor, until it has been reduced once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from detinfer.errors import DoubleReduceError, UnreducedError


class PartialSum:
    """What ``layer`` adds to a sum over ranks, [..., hidden] on this rank; ``take`` gives it up to be reduced, once.

    Every use of it as a tensor (an operator, a torch function, a method) raises UnreducedError naming the layer.
    """

    __slots__ = ("_taken", "_value", "layer")

    def __init__(self, value: torch.Tensor, layer: str) -> None:
        self._value, self.layer, self._taken = value, layer, False

    def take(self, by: str) -> torch.Tensor:
        """The part itself, for ``by`` to add over ranks. DoubleReduceError where it was taken before."""
        if self._taken:
            raise DoubleReduceError(
                f"{self.layer}: {by} reduces its sum over ranks, which has been reduced already: each rank's part would "
                "count twice. Reduce it in one place"
            )
        self._taken = True
        return self._value

    @property
    def shape(self) -> torch.Size:
        """Of the part, and of the sum."""
        return self._value.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the part, and of the sum."""
        return self._value.dtype

    def __repr__(self) -> str:
        return f"PartialSum({self.layer}, {list(self.shape)}{', reduced' if self._taken else ''})"

    def _misused(self, how: str) -> NoReturn:
        raise UnreducedError(
            f"{self.layer}: {how} takes its output as if it were summed over ranks, and it is this rank's part alone: "
            "hand it to the layer communicator, or build the layer with reduce_results=True"
        )

    def __getattr__(self, name: str) -> Any:
        self._misused(f".{name}")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> NoReturn:
        values = [*args, *(kwargs or {}).values()]
        values += [item for value in values if isinstance(value, list | tuple) for item in value]
        found = next(value for value in values if isinstance(value, PartialSum))
        found._misused(getattr(func, "__name__", str(func)))


def _forbidden(name: str) -> Callable[..., Any]:
    def method(self: PartialSum, *_: Any) -> Any:
        self._misused(name.strip("_"))

    return method


for _name in (
    *("add", "radd", "iadd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "rmatmul", "neg", "pow"),
    *("getitem", "setitem", "len", "iter", "float", "int", "bool", "array"),
):
    setattr(PartialSum, f"__{_name}__", _forbidden(f"__{_name}__"))


def whole(value: Any, layer: str, by: str) -> torch.Tensor:
    """``value`` as a tensor that is summed already; UnreducedError where it is a part."""
    if isinstance(value, PartialSum):
        value._misused(by)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{layer}: {type(value).__name__} is no tensor")
    return value


def part(value: Any, layer: str, by: str) -> torch.Tensor:
    """A part taken to be reduced; DoubleReduceError where it is a tensor, and so summed already."""
    if isinstance(value, PartialSum):
        return value.take(by)
    raise DoubleReduceError(
        f"{layer}: its output is summed over ranks already (reduce_results=True), and {by} would sum it once more: build "
        "it with reduce_results=False"
    )
