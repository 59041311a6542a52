"""The in-place and ``out`` forms that are made from a functional operation."""

from __future__ import annotations

import pytest
import torch

from detinfer.policy.overloads import adapt, forms

NAMES = {
    "aten::silu": {"aten::silu", "aten::silu_", "aten::silu.out"},
    "aten::mean": {"aten::mean", "aten::mean.dtype_out"},
    "aten::mean.dim": {"aten::mean.dim", "aten::mean.out"},
    "aten::sum.dim_IntList": {"aten::sum.dim_IntList", "aten::sum.IntList_out"},
    "aten::add.Tensor": {"aten::add.Tensor", "aten::add_.Tensor", "aten::add.out"},
    "aten::pow.Tensor_Scalar": {"aten::pow.Tensor_Scalar", "aten::pow_.Scalar", "aten::pow.Tensor_Scalar_out"},
    "aten::linear": {"aten::linear", "aten::linear.out"},
    "aten::baddbmm": {"aten::baddbmm", "aten::baddbmm_", "aten::baddbmm.out"},
    "aten::native_layer_norm": {"aten::native_layer_norm", "aten::native_layer_norm.out"},
    "aten::scaled_dot_product_attention": {"aten::scaled_dot_product_attention"},
}


@pytest.mark.parametrize("op", NAMES)
def test_forms(op: str) -> None:
    """Exactly the forms that torch has for the same arguments."""
    assert {form.name for form in forms(op)} == NAMES[op]
    assert forms(op)[0].name == op


def test_an_unknown_operation_is_named() -> None:
    """A family that covers an operation that torch does not have is told so."""
    with pytest.raises(LookupError, match="aten::nope"):
        forms("aten::nope")


def form(op: str, kind: str, function: object) -> object:
    """``function`` adapted to the form of ``op`` that is of this kind."""
    return adapt(function, next(f for f in forms(op) if f.form == kind))  # type: ignore[arg-type]


def test_in_place_writes_the_tensor_and_returns_it() -> None:
    """The tensor keeps its identity and its dtype."""
    double = form("aten::silu", "inplace", lambda x: x.float() * 2)
    x = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert double(x) is x
    assert x.tolist() == [2.0, 4.0]
    assert x.dtype is torch.bfloat16


def test_in_place_refuses_what_torch_refuses() -> None:
    """A result of another shape, or one that an integer tensor cannot hold."""
    add = form("aten::add.Tensor", "inplace", lambda x, y: torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="broadcast shape"):
        add(torch.zeros(3), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="can't be cast"):
        add(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3))


def test_out_resizes_and_returns_its_target() -> None:
    """An empty target grows; the result lands in it."""
    silu = form("aten::silu", "out", lambda x: x * 2)
    out = torch.empty(0)
    assert silu(torch.ones(3), out=out) is out
    assert out.tolist() == [2.0, 2.0, 2.0]


def test_out_of_another_dtype_asks_a_reduction_for_it() -> None:
    """As torch does: the sum is made in the dtype that it is stored in, not rounded twice."""
    asked = []

    def mean(x: torch.Tensor, dim: object, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        asked.append(dtype)
        return torch.zeros(2, dtype=dtype)

    out = torch.empty(2, dtype=torch.float32)
    form("aten::mean.dim", "out", mean)(torch.zeros(2, 3, dtype=torch.bfloat16), [-1], out=out)
    form("aten::mean.dim", "out", mean)(torch.zeros(2, 3), [-1], dtype=torch.bfloat16, out=out)
    assert asked == [torch.float32, torch.bfloat16]


def test_several_outs() -> None:
    """A tuple of results goes to the targets in the schema's order."""
    results = (torch.full((2,), 1.0), torch.full((2,), 2.0), torch.full((2,), 3.0))
    norm = form("aten::native_layer_norm", "out", lambda *args: results)
    outs = [torch.zeros(2) for _ in range(3)]
    got = norm(torch.zeros(2), [2], None, None, 1e-5, out0=outs[0], out1=outs[1], out2=outs[2])
    assert [t.tolist() for t in outs] == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    assert all(a is b for a, b in zip(got, outs, strict=True))


@pytest.mark.parametrize("kind", ["inplace", "out"])
def test_not_implemented_passes_through(kind: str) -> None:
    """The caller is told that torch's own kernel has to run; nothing is written."""
    x = torch.ones(2, dtype=torch.int64)
    kwargs = {"out": x} if kind == "out" else {}
    assert form("aten::silu", kind, lambda x: NotImplemented)(x, **kwargs) is NotImplemented
    assert x.tolist() == [1, 1]
