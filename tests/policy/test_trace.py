"""The tracing pass: everything is seen, decided once, counted, and refused with the name and the place."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from detinfer.errors import RefusedError
from detinfer.policy import Accepted, Call, Operand, Policy, Refused, deterministic

f32, bf16, i64 = torch.float32, torch.bfloat16, torch.int64
X = torch.tensor([[1.0, 4.0], [16.0, 64.0]])


class Inner(nn.Module):
    """Calls an operation that nobody covers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A running sum."""
        return x.cumsum(0)


class Outer(nn.Module):
    """Holds it under a name."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), Inner()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both blocks."""
        for block in self.blocks:
            x = block(x)
        return x


def test_a_refusal_names_operation_dtype_place_and_remedy(fake: Any) -> None:
    """All that is needed to act on it."""
    with deterministic("batch", families=fake.families) as active:
        with pytest.raises(RefusedError) as caught:
            Outer()(X.to(bf16))
        text = str(caught.value)
        for part in ("aten::cumsum", "bfloat16", "Outer.blocks.1", "running sum", "Policy(allow=...)"):
            assert part in text
        # After the exception the stack of modules is empty again.
        with pytest.raises(RefusedError) as caught:
            X.cumsum(0)
        assert " in Outer" not in str(caught.value)
    assert isinstance(active.decisions["aten::cumsum", (bf16,)], Refused)
    assert active.counts.get(("aten::cumsum", (bf16,)), 0) == 0


class Catches(nn.Module):
    """Survives an interruption of its child, then calls an operation that nobody covers."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Interrupts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The child, then a running sum."""
        with contextlib.suppress(KeyboardInterrupt):
            self.child(x)
        return x.cumsum(0)


class Interrupts(nn.Module):
    """Ends without its hooks being called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """An interruption."""
        raise KeyboardInterrupt


def test_an_interrupted_module_does_not_stay_in_the_path(fake: Any) -> None:
    """torch calls no hook for a module that ends by an interruption; the next one that ends takes it along."""
    with deterministic("batch", families=fake.families):
        with pytest.raises(RefusedError):
            nn.Sequential(Catches())(X)
        with pytest.raises(RefusedError) as caught:
            Outer()(X)
    assert " in Outer.blocks.1:" in str(caught.value)


def test_a_refused_operation_does_not_run(fake: Any) -> None:
    """In particular one that writes in place."""
    x = X.clone()
    with deterministic("batch", families=fake.families), pytest.raises(RefusedError):
        x.cumsum_(0)
    assert x.tolist() == X.tolist()


def test_decisions_come_in_order_of_first_use_and_are_counted(fake: Any) -> None:
    """One decision per operation and combination of dtypes."""
    with deterministic("batch", families=fake.families) as active:
        for _ in range(3):
            y = X.view(4) * 2.0
        y.to(bf16)
        y.to(bf16)
        torch.ones(2, dtype=i64) + 1
    assert list(active.decisions) == [
        ("aten::view", (f32,)),
        ("aten::mul.Tensor", (f32,)),
        ("aten::_to_copy", (f32, bf16)),
        ("aten::ones", (i64,)),
        ("aten::add.Tensor", (i64,)),
    ]
    assert list(active.counts.values()) == [3, 3, 2, 1, 1]
    rows = active.decisions_json()
    assert [row["op"] for row in rows] == [op for op, _ in active.decisions]
    assert rows[2]["dtypes"] == ["float32", "bfloat16"]
    assert rows[1]["proof"]["cases"] == 3
    assert all(row["accepted"] and row["portable"] for row in rows)
    assert "own order" in active.composed_norms


def test_reducing_calls_are_kept_with_their_arguments(fake: Any) -> None:
    """Enough to make the call again: shapes, strides, dtypes and everything that is no tensor."""
    with deterministic("batch", families=fake.families) as active:
        for _ in range(2):
            X.mean(-1, keepdim=True)
        X.t().mean(0)
        nn.functional.linear(X, torch.ones(3, 2))
        torch.rsqrt(X)
        nn.functional.linear(torch.ones(1, 2, dtype=i64), torch.ones(3, 2, dtype=i64))
    x, t = Operand((2, 2), (2, 1), f32), Operand((2, 2), (1, 2), f32)
    assert active.calls == {
        Call("aten::mean.dim", (x, (-1,), True)): 2,
        Call("aten::mean.dim", (t, (0,))): 1,
        Call("aten::linear", (x, Operand((3, 2), (2, 1), f32))): 1,
    }
    assert list(active.reducing_calls()) == [
        ("aten::mean.dim", f32, ((2, 2),)),
        ("aten::linear", f32, ((2, 2), (3, 2))),
    ]
    assert active.order_free() == ["aten::rsqrt"]


def test_integers_that_become_floating_point_are_decided_by_their_result(fake: Any) -> None:
    """Integer arithmetic is exact; a function that makes floating point of integers is not covered by that."""
    whole = torch.tensor([4, 16])
    with deterministic("batch", families=fake.families) as active:
        assert (whole / 8).tolist() == [0.5, 2.0]
        assert torch.arange(3.0).tolist() == [0.0, 1.0, 2.0]
        for call in (lambda: torch.rsqrt(whole), lambda: whole.mean(-1, dtype=f32), lambda: torch.sin(whole)):
            with pytest.raises(RefusedError, match=r"of integers|no proved path"):
                call()
        with pytest.raises(RefusedError, match="no whole number"):
            torch.arange(0, 1, 0.1)
    decision = active.decisions["aten::div.Tensor", (i64, f32)]
    assert isinstance(decision, Accepted)
    assert decision.proof is not None


def test_values_that_change_the_decision(fake: Any) -> None:
    """index_put moves bytes unless it accumulates."""
    index = (torch.tensor([0, 0]),)
    with deterministic("batch", families=fake.families):
        X.index_put(index, X)
        with pytest.raises(RefusedError, match="adds where its indices point"):
            X.index_put(index, X, accumulate=True)
        X.index_put(index, X)
        torch.add(X, X, alpha=1)
        with pytest.raises(RefusedError, match="multiply first"):
            torch.add(X, X, alpha=2)
        torch.ones(2, 2, dtype=i64).index_put(index, torch.ones(2, 2, dtype=i64), accumulate=True)


def test_other_devices_and_layouts_are_refused_by_name(fake: Any) -> None:
    """The CPU overrides would not be asked."""
    sparse = X.to_sparse()
    with deterministic("batch", families=fake.families), pytest.raises(RefusedError, match="sparse_coo"):
        sparse + sparse
    if torch.cuda.is_available():
        on_device = X.cuda()
        with deterministic("batch", families=fake.families), pytest.raises(RefusedError, match="cuda:0"):
            on_device + on_device


def test_tensors_without_values_pass(fake: Any) -> None:
    """Meta and fake tensors compute shapes only."""
    with deterministic("batch", families=fake.families) as active:
        assert X.to("meta").cumsum(0).shape == X.shape
        with FakeTensorMode() as mode:
            assert mode.from_tensor(X).cumsum(0).shape == X.shape
    assert not any(op == "aten::cumsum" for op, _ in active.decisions)


class Wrapped(torch.Tensor):
    """A subclass with its own dispatch, as quantised or distributed tensors have."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls: Any, inner: torch.Tensor) -> Any:
        """A wrapper of the same shape."""
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Unwrap, call, wrap."""
        plain = [a.inner if isinstance(a, Wrapped) else a for a in args]
        return Wrapped(func(*plain, **(kwargs or {})))


def test_what_a_subclass_calls_is_traced(fake: Any) -> None:
    """Its operations on plain tensors are decided like any others."""
    wrapped = Wrapped(X)
    with deterministic("batch", families=fake.families) as active:
        assert torch.rsqrt(wrapped).inner.tolist()[0][0] >= 1000
        with pytest.raises(RefusedError, match="aten::cumsum"):
            wrapped.cumsum(0)
    assert ("aten::rsqrt", (f32,)) in active.decisions


def test_a_view_of_another_dtype_is_plain(fake: Any) -> None:
    """torch names Tensor itself as the type of its operands there: no subclass, and decided like any other view."""
    with deterministic("batch", families=fake.families) as active:
        assert X.view(torch.int32).tolist()[0][0] == X.numpy().view("int32")[0][0]
    assert ("aten::view.dtype", (f32, torch.int32)) in active.decisions


def test_on_call_sees_each_operation_before_it_runs(fake: Any) -> None:
    """With its arguments and the decision."""
    seen = []
    with deterministic(
        "batch", families=fake.families, on_call=lambda op, args, kwargs, d: seen.append((op, args[0].shape, d.path))
    ):
        torch.rsqrt(X.view(4))
    assert seen == [("aten::view", (2, 2), "torch"), ("aten::rsqrt", (4,), "csrc/fake")]


def test_an_allowed_operation_runs(fake: Any) -> None:
    """Its decision says that the policy allowed it."""
    with deterministic(Policy(allow=("aten::cumsum",)), families=fake.families) as active:
        assert X.cumsum(0).tolist() == [[1.0, 4.0], [17.0, 68.0]]
    assert active.decisions["aten::cumsum", (f32,)].reason.startswith("allowed by the policy")
