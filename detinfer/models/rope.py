"""Rotary position embedding (Su et al. 2021, "RoFormer"), in halves: element i is paired with element i + width / 2.

The tables are made of portable operations, so they are the same bytes on every machine: frequencies by decimal
arithmetic, angles by one fp32 multiplication, sine and cosine by the contract's polynomials.
"""

from __future__ import annotations

from decimal import Context, Decimal

import numpy as np
import torch

from detinfer.reference.elementwise import unary

BASE = 10000
_DIGITS = Context(prec=40)


def tables(positions: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, fp32 [positions, width / 2]: of position * BASE^(-2 i / width), the frequency rounded to fp32."""
    powers = (_DIGITS.divide(Decimal(-2 * i), Decimal(width)) for i in range(width // 2))
    frequencies = np.array([float(_DIGITS.power(Decimal(BASE), power)) for power in powers], np.float32)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    return torch.from_numpy(unary("cos", angles)), torch.from_numpy(unary("sin", angles))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[B, heads, S, width] turned by the tables' rows [S, width / 2]; in fp32, one rounding to the dtype of ``x``."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return turned.to(x.dtype)
