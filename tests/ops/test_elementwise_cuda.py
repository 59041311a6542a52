"""torch's own elementwise kernels on CUDA: each is proved, and each proof can fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from detinfer.errors import Diverged, RefusedError, UnsupportedDtype
from detinfer.ops import elementwise, elementwise_cuda, ieee

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [*elementwise_cuda.IEEE, *elementwise_cuda.MOVES])
def test_one_rounding(op: str, dtype: torch.dtype) -> None:
    """Compared with IEEE arithmetic, at odd widths, strided and broadcast."""
    cases, results = elementwise_cuda.prove_ieee(op, dtype)
    assert cases >= 168
    assert elementwise_cuda.prove_ieee(op, dtype) == (cases, results)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", elementwise_cuda.VALUES)
def test_values_decide(op: str, dtype: torch.dtype) -> None:
    """Compared with itself elsewhere: every place, alignment, stride, size."""
    cases, results = elementwise_cuda.prove_values(op, dtype)
    assert cases > 65536 * 20
    assert elementwise_cuda.prove_values(op, dtype) == (cases, results)


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["tail", "unaligned", "large"])
def test_a_kernel_that_looks_at_more_is_seen(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One element off by one bit: the last of an odd width, of an unaligned tensor, of a large one."""

    def wrong(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        result = torch.sin(x)
        odd = {"tail": x.numel() % 2 == 1, "unaligned": x.data_ptr() % 16 != 0, "large": x.numel() > 1 << 20}
        if odd[place]:
            result.view(-1)[-1:].view(torch.int16).bitwise_xor_(1)
        return result

    monkeypatch.setattr(elementwise_cuda, "calls", lambda op: (wrong,))
    with pytest.raises(Diverged, match="looks at more than the values"):
        elementwise_cuda.prove_values("aten::sin", torch.bfloat16)


@pytest.mark.gpu
def test_another_function_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is invariant and wrong."""
    monkeypatch.setattr(elementwise_cuda, "calls", lambda op: (lambda x, _: torch.sin(x) * 1.01,))
    with pytest.raises(Diverged, match="report this kernel"):
        elementwise_cuda.prove_values("aten::sin", torch.float32)


@pytest.mark.gpu
def test_numbers_beside_16_bits_differ_from_cpu() -> None:
    """What ``UNLIKE_CPU`` says: relu of -0, a number beside bf16, division by a number."""
    zero = torch.tensor([-0.0])
    assert torch.signbit(torch.relu(zero)).tolist() != torch.signbit(torch.relu(zero.cuda())).tolist()
    x = (torch.arange(1, 2000) / 4096).to(torch.bfloat16)
    assert (x + 0.1).view(torch.int16).tolist() != (x.cuda() + 0.1).cpu().view(torch.int16).tolist()
    y = torch.arange(1, 2000).float()
    assert (y / 0.3).view(torch.int32).tolist() != (y.cuda() / 0.3).cpu().view(torch.int32).tolist()


def test_tables() -> None:
    """No operation stands in two tables; what CPU computes itself is proved here; each name is one of torch's."""
    assert not set(elementwise_cuda.IEEE) & set(elementwise_cuda.VALUES)
    assert set(elementwise.COVERED) <= set(elementwise_cuda.VALUES)
    assert set(ieee.UNLIKE_CPU) <= set(elementwise_cuda.IEEE)
    for op in elementwise_cuda.VALUES:
        name, _, overload = op.removeprefix("aten::").partition(".")
        assert getattr(torch.ops.aten, name) is not None
        assert (overload or "default") in getattr(torch.ops.aten, name).overloads(), op


def test_calls_are_elementwise() -> None:
    """Every way of calling an operation gives one result for each element; on CPU, where it is torch's own as well."""
    x = torch.linspace(0.1, 0.9, 24).reshape(4, 6)
    for op in elementwise_cuda.VALUES:
        for call in elementwise_cuda.calls(op):
            assert call(x, x.flip(0)).shape == x.shape, op


def test_what_is_not_listed_is_refused() -> None:
    """Unknown operations and dtypes."""
    with pytest.raises(RefusedError, match="cumsum"):
        elementwise_cuda.prove_values("aten::cumsum", torch.float32)
    with pytest.raises(UnsupportedDtype):
        elementwise_cuda.prove_values("aten::sin", torch.float64)
    any_dtype: Any = torch.float64
    with pytest.raises(UnsupportedDtype):
        elementwise_cuda.prove_ieee("aten::add.Tensor", any_dtype)
