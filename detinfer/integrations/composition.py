"""Which batches a request really stood in: token ids as they reach a model, seen from outside."""

from __future__ import annotations

import hashlib
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detinfer import bits

Tokens = NDArray[np.int64]


class Batches:
    """Inside the block, notes the token ids [rows, positions] of every call of ``module``.

    Libraries sort, group and cache requests before they make batches, so that a shuffled list of requests may well
    give the same batches again. What was noted here is what ran.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self.calls: list[Tokens] = []
        self._digests: list[str] = []

    def __enter__(self) -> Batches:
        self._handle = self._module.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()

    def _note(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, torch.Tensor) and ids.dim() == 2 and ids.dtype == torch.int64:
            raw = bits.as_bytes(ids)
            self.calls.append(np.frombuffer(raw, dtype=np.dtype("<i8")).reshape(tuple(ids.shape)))
            self._digests.append(hashlib.sha256(f"{tuple(ids.shape)}".encode() + raw).hexdigest())

    def holding(self, tokens: Tokens) -> set[str]:
        """The calls, by digest, in which a row is ``tokens``, padded or not."""
        return {digest for call, digest in zip(self.calls, self._digests, strict=True) if _holds(call, tokens)}


def _holds(call: Tokens, tokens: Tokens) -> bool:
    length = len(tokens)
    if call.shape[1] < length:
        return False
    for row in call:
        if (row[:length] == tokens).all() and _one_value(row[length:]):
            return True
        if (row[len(row) - length :] == tokens).all() and _one_value(row[: len(row) - length]):
            return True
    return False


def _one_value(padding: Tokens) -> bool:
    return bool((padding == padding[:1]).all())
