"""A small family for the tests of the mechanism: it computes in numpy and notes every call and every proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from detinfer.ops import Covered
from detinfer.policy.families import Families
from detinfer.policy.policy import Proof, Refused

SHIFT = 1000.0
"""Added by the fake functions to every result, so that a result says which path made it."""


def floats(x: Any) -> bool:
    """Whether x is a floating-point tensor."""
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def values(x: torch.Tensor) -> np.ndarray:
    """The tensor as a numpy array of float32."""
    out: np.ndarray = x.detach().to(torch.float32).numpy()
    return out


@dataclass
class Fake:
    """The family's notes: ``ran`` names of calls, ``proved`` what was proved; ``broken`` operations fail proofs."""

    ran: list[str] = field(default_factory=list)
    proved: list[tuple[str, torch.dtype]] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    during: Callable[[str], None] = lambda op: None
    families: Any = None

    def rsqrt(self, x: torch.Tensor) -> Any:
        """1 / sqrt(x) + SHIFT."""
        if not floats(x):
            return NotImplemented
        self.ran.append("rsqrt")
        return torch.from_numpy(np.float32(1) / np.sqrt(values(x)) + np.float32(SHIFT)).to(x.dtype)

    def mean(self, x: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
        """The mean over one dimension + SHIFT, terms ascending."""
        if not floats(x):
            return NotImplemented
        self.ran.append("mean")
        (d,) = dim
        terms = np.moveaxis(values(x), d, 0)
        total = terms[0].copy()
        for term in terms[1:]:
            total = total + term
        result = torch.from_numpy(np.asarray(total / np.float32(len(terms)) + np.float32(SHIFT)))
        return (result.unsqueeze(d) if keepdim else result).to(dtype or x.dtype)

    def linear(self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        """x @ w.T + SHIFT, in float64 and without a bias."""
        if not floats(x):
            return NotImplemented
        self.ran.append("linear")
        return torch.from_numpy(values(x) @ values(w).T + np.float32(SHIFT)).to(x.dtype)

    def prove(self, op: str, dtype: torch.dtype) -> Proof | Refused:
        """Note the proof; refuse the broken ones."""
        self.proved.append((op, dtype))
        self.during(op)
        if op in self.broken:
            return Refused(op, "csrc/fake", "its proof failed: row 0 differs")
        return Proof(f"{op} {dtype}", "fake", 3, "00")


@pytest.fixture
def fake() -> Fake:
    """A fresh fake with families that cover rsqrt, mean.dim and linear."""
    fake = Fake()
    functions = {"aten::rsqrt": fake.rsqrt, "aten::mean.dim": fake.mean, "aten::linear": fake.linear}
    fake.families = Families(
        covered={op: Covered(op, "fake", f, op != "aten::rsqrt") for op, f in functions.items()},
        ieee=frozenset({"aten::add.Tensor", "aten::mul.Tensor", "aten::div.Tensor", "aten::_to_copy"}),
        prove=fake.prove,
        level=lambda: b"fake",
    )
    return fake
