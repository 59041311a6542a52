"""torch's own kernels that round once per element: each is proved here, and each proof can fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from detinfer.errors import Diverged, RefusedError, UnsupportedDtype
from detinfer.ops import elementwise, ieee, rows
from detinfer.ops.evidence import from_bits, from_values, to_bits, to_values
from detinfer.reference import ieee as reference
from detinfer.reference.arithmetic import fma

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL = (*ieee.IEEE, *ieee.MOVES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ALL)
def test_proof(op: str, dtype: torch.dtype) -> None:
    """Each operation is proved in each dtype, twice with the same bytes."""
    cases, results = ieee.prove_ieee(op, dtype)
    assert cases >= 168
    assert ieee.prove_ieee(op, dtype) == (cases, results)


@pytest.mark.parametrize("op", ALL)
def test_proof_sees_one_wrong_bit(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bit of the last result."""
    name, _, overload = op.removeprefix("aten::").partition(".")
    packet = getattr(torch.ops.aten, name)
    right = getattr(packet, overload or "default")

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        last = (result[-1] if isinstance(result, tuple) else result).clone(memory_format=torch.contiguous_format)
        if last.is_floating_point():
            bits = to_bits(last).copy()
            bits.reshape(-1)[-1] ^= 1
            last = from_bits(bits, last.dtype)
        elif last.dtype is torch.bool:
            last.view(-1)[-1] ^= True
        else:
            last.view(-1)[-1] += 1
        return (*result[:-1], last) if isinstance(result, tuple) else last

    class Packet:
        pass

    setattr(Packet, overload or "default", staticmethod(wrong))

    class Aten:
        def __getattr__(self, other: str) -> Any:
            return Packet if other == name else getattr(torch.ops.aten, other)

    class Ops:
        aten = Aten()

    class Torch:
        ops = Ops()

        def __getattr__(self, other: str) -> Any:
            return getattr(torch, other)

    monkeypatch.setattr(ieee, "torch", Torch())
    with pytest.raises(Diverged, match=op):
        ieee.prove_ieee(op, torch.float32)


def test_proof_sees_another_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that is not rounded before it is stored as bf16, and a zero of the other sign."""
    monkeypatch.setitem(reference.BINARY, "div", lambda x, y: x * (np.float32(1) / np.asarray(y, np.float32)))
    with pytest.raises(Diverged, match=r"aten::div\.Tensor"):
        ieee.prove_ieee("aten::div.Tensor", torch.float32)
    monkeypatch.setitem(reference.UNARY, "relu", lambda x: np.where(x > 0, x, np.where(np.isnan(x), x, reference.ZERO)))
    with pytest.raises(Diverged, match="aten::relu"):
        ieee.prove_ieee("aten::relu", torch.bfloat16)


def test_names() -> None:
    """torch has every operation; none is also covered by a family; everything else is refused."""
    for op in ALL:
        name, _, overload = op.removeprefix("aten::").partition(".")
        assert getattr(getattr(torch.ops.aten, name), overload or "default") is not None
    assert set(ALL).isdisjoint({**elementwise.COVERED, **rows.COVERED})
    assert len(set(ALL)) == len(ALL)
    for op in ("aten::cumsum", "aten::floor_divide", "aten::maximum", "aten::sqrt", "aten::silu"):
        with pytest.raises(RefusedError, match=op):
            ieee.prove_ieee(op, torch.float32)
    with pytest.raises(UnsupportedDtype):
        ieee.prove_ieee("aten::add.Tensor", torch.float64)


def test_a_scaled_addition_has_two_answers() -> None:
    """Why ``alpha`` other than 1 is outside the proof of ``add``: one rounding or two give different bytes."""
    random = np.random.default_rng(5)
    x, y = (from_values(random.integers(1, 2**23, 1000) / 2**20, torch.float32) for _ in range(2))
    once = fma(to_values(y), np.float32(0.3), to_values(x))
    twice = to_values(elementwise.add_scaled(x, y, 0.3))
    assert (once != twice).any()
    assert np.isin(to_values(torch.add(x, y, alpha=0.3)), (once, twice)).all()
