"""One vector: an operation's inputs, how it is called, and the bytes that come out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from detinfer.ops.evidence import from_bits
from detinfer.reference.arithmetic import Bits, DType

TORCH: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

OPERATIONS = ("all_reduce", "reduce_scatter", "all_reduce_rms_norm", "rms_norm")
"""What there are vectors for."""


@dataclass(frozen=True)
class Case:
    """``parts`` are the ranks' inputs (one of an operation of one process), ``inputs`` those that all ranks share.

    ``arguments`` are the call's, JSON values, floats as hex. ``outputs`` are by rank where ranks get different ones
    (``rank0``, ``rank1``, ...), else by name.
    """

    name: str
    dtype: str
    ranks: int
    arguments: dict[str, Any]
    parts: list[torch.Tensor]
    outputs: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def label(self) -> str:
        """``cancellation, 3 ranks, bfloat16, op=sum``: for reports."""
        ranks = f", {self.ranks} ranks" if self.ranks > 1 else ""
        how = "".join(f", {name}={value}" for name, value in sorted(self.arguments.items()))
        return f"{self.name}{ranks}, {self.dtype}{how}"


def tensor(bits: Bits, dtype: DType) -> torch.Tensor:
    """Stored bits as a tensor."""
    if not bits.size:  # numpy may give it strides of 0, which torch cannot view as bytes
        return torch.empty(bits.shape, dtype=TORCH[dtype])
    return from_bits(np.ascontiguousarray(bits), TORCH[dtype])


def number(value: str) -> float:
    """A float argument."""
    return float.fromhex(value)
