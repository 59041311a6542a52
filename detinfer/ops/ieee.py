"""Operations that torch's own CPU kernels compute with one IEEE rounding per element."""

from __future__ import annotations

import torch

from detinfer.errors import RefusedError

IEEE: tuple[str, ...] = ()
"""Names of operations, as torch spells them."""


def prove_ieee(op: str, dtype: torch.dtype) -> tuple[int, bytes]:
    """Compare torch's result with IEEE arithmetic; RefusedError for an operation that is not in ``IEEE``."""
    raise RefusedError(f"{op} is not among the operations that round once per element: {', '.join(IEEE) or 'none'}")
