"""Faults that show in company alone: on some ranks of several, bits depend on the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from detinfer import bits
from detinfer.models.ranks import Spread
from detinfer.ops.evidence import REFERENCE_NAME, from_bits, to_bits
from detinfer.policy.groups import Group
from detinfer.reference.all_reduce import all_reduce

LENGTH = 5
"""Tokens of a whole prompt."""


def together(x: torch.Tensor) -> bool:
    """Whether an input [B, S, ...] (of attention [B, heads, S, width]) holds several rows."""
    return x.dim() > 2 and x.shape[0] > 1


def many(x: torch.Tensor) -> bool:
    """Whether an expert has more rows than one prompt has."""
    return x.dim() == 2 and x.shape[0] > LENGTH


def piece(x: torch.Tensor) -> bool:
    """Whether it holds a piece of a prompt."""
    return 1 < x.shape[-2] < LENGTH


@bits.unseen
def turned(parts: list[torch.Tensor]) -> torch.Tensor:
    """The sum over ranks that begins at rank 1."""
    found = all_reduce([to_bits(part) for part in [*parts[1:], *parts[:1]]], REFERENCE_NAME[parts[0].dtype])
    return from_bits(np.ascontiguousarray(found), parts[0].dtype)


@contextmanager
def planted(module: Any, what: str, path: str, here: bool) -> Iterator[None]:
    """A fault in this process; it shows ``here`` or not, for the sums of all ranks are looked at together.

    ``product``: the linear layer ``path`` adds in halves of K; ``piece``: so it does for a piece of a prompt, in a batch of
    any size, and ``compiled``: in what torch.compile made, and ``expert``: of many rows; ``chance``: it scales its input,
    every other time; ``attention`` scales by another factor; ``sum``: a sum over ranks of a built-in model begins at rank
    1, and ``group``: so does one of torch.distributed.
    """
    linear, attention, spread, group = F.linear, F.scaled_dot_product_attention, Spread._all_reduce, Group.all_reduce
    within: list[str] = []
    running: list[bool] = []
    prefills: list[bool] = []

    shows = {"piece": piece, "expert": many, "compiled": lambda _: bool(running)}.get(what, together)

    def halved(x: torch.Tensor, weight: torch.Tensor, *bias: Any) -> torch.Tensor:
        if not (within and here and shows(x)):
            return linear(x, weight, *bias)
        half = x.shape[-1] // 2
        return linear(x[..., :half], weight[:, :half]) + linear(x[..., half:], weight[:, half:])

    def chanced(x: torch.Tensor, weight: torch.Tensor, *bias: Any) -> torch.Tensor:
        if not (within and here):
            return linear(x, weight, *bias)
        if together(x) and x.shape[1] == LENGTH:
            prefills.append(True)
        return linear(x * (1.001 if together(x) and len(prefills) % 2 == 0 else 1), weight, *bias)

    def compiled(forward: Any) -> Any:
        def call(*args: Any) -> Any:
            running.append(True)
            try:
                return forward(*args)
            finally:
                running.clear()

        return call

    def scaled(q: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
        if here and shows(q):
            more["scale"] = 1.25 * (more.get("scale") or q.shape[-1] ** -0.5)
        return attention(q, *given, **more)

    @bits.unseen
    def sums(self: Any, x: torch.Tensor, name: str, order: Any) -> torch.Tensor:
        total = spread(self, x, name, order)
        parts = list(self._communicator.all_gather(x[None]))
        return turned(parts) if here and shows(x) else total

    def adds(self: Any, tensor: torch.Tensor, reduction: str, *, write: bool = True) -> None:
        parts = self.gather(tensor)
        group(self, tensor, reduction, write=write)
        if here and shows(tensor):
            tensor.copy_(turned(parts))

    faults = {
        "product": (F, "linear", halved),
        "chance": (F, "linear", chanced),
        "piece": (F, "linear", halved),
        "expert": (F, "linear", halved),
        "compiled": (F, "linear", halved),
        "attention": (F, "scaled_dot_product_attention", scaled),
        "sum": (Spread, "_all_reduce", sums),
        "group": (Group, "all_reduce", adds),
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(*faults[what]))
        if what == "compiled":
            stack.enter_context(mock.patch.object(torch, "compile", compiled))
        if path:
            layer = module.get_submodule(path)
            stack.callback(layer.register_forward_pre_hook(lambda *_: within.append(path), prepend=True).remove)
            stack.callback(layer.register_forward_hook(lambda *_: within.clear(), always_call=True).remove)
        yield
