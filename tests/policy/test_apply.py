"""The context manager: what it switches on, and that it always switches it off again."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn

from detinfer.errors import RefusedError, UsageError
from detinfer.ops import Covered
from detinfer.policy import Policy, deterministic
from detinfer.policy.families import Families
from detinfer.policy.state import STATE
from detinfer.torch_alone import torch_alone

X = torch.tensor([[1.0, 4.0], [16.0, 64.0]])
SHIFTED = 1000  # the fake family adds 1000 to every result


def shifted(result: torch.Tensor) -> bool:
    """Whether the fake family made the result; reads values without calling an operation."""
    (found,) = {value >= SHIFTED for row in result.tolist() for value in row}
    return bool(found)


def overridden() -> bool:
    """Whether aten::rsqrt is the fake family's, its in-place and out forms included."""
    out = torch.empty_like(X)
    torch.rsqrt(X, out=out)
    found = {shifted(r) for r in (torch.rsqrt(X), X.clone().rsqrt_(), out)}
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("uncovered", ["refuse", "trust"])
def test_overrides_are_in_force_inside_and_gone_after(fake: Any, uncovered: Any) -> None:
    """All three forms of an operation, and a composite operation (linear), run on the family's functions."""
    w = torch.ones(3, 2)
    before = torch.nn.functional.linear(X, w)
    with deterministic("batch", uncovered=uncovered, families=fake.families) as active:
        assert overridden()
        assert shifted(torch.nn.functional.linear(X, w))
        kept = STATE._installed  # nothing waits for the garbage collector
        assert active.policy.uncovered == uncovered
    assert not overridden()
    assert torch.nn.functional.linear(X, w).equal(before)
    assert fake.ran.count("linear") == 1
    assert kept is not None
    assert STATE._installed is None


@pytest.mark.parametrize("inner", ["refuse", "trust"])
@pytest.mark.parametrize("outer", ["refuse", "trust"])
def test_blocks_nest_and_restore_the_one_around(fake: Any, outer: Any, inner: Any) -> None:
    """The inner policy answers inside, the outer one again after; an exception in between changes nothing."""
    lenient = Policy(allow=("aten::cumsum",), uncovered=inner)
    with deterministic("batch", uncovered=outer, families=fake.families) as around:
        with deterministic(lenient, families=fake.families) as within:
            X.cumsum(0)
            assert overridden()
        with pytest.raises(ZeroDivisionError), deterministic(lenient, families=fake.families):
            _ = 1 // 0
        assert overridden()
        if outer == "refuse":
            with pytest.raises(RefusedError, match="aten::cumsum"):
                X.cumsum(0)
        assert not torch.is_grad_enabled()
    assert not overridden()
    assert ("aten::cumsum", (torch.float32,)) in within.decisions or inner == "trust"
    # What ran inside the inner block is not the outer one's to count.
    assert around.counts.get(("aten::cumsum", (torch.float32,)), 0) == 0
    assert STATE._entries == []


def test_an_exception_leaves_nothing_switched_on(fake: Any) -> None:
    """Overrides, tracing, module hooks and gradients are as before."""
    hooks = len(nn.modules.module._global_forward_pre_hooks)
    with pytest.raises(RefusedError), deterministic("batch", families=fake.families):
        X.cumsum(0)
    assert not overridden()
    assert torch.is_grad_enabled()
    assert len(nn.modules.module._global_forward_pre_hooks) == hooks
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_failing_installation_leaves_nothing_switched_on(fake: Any) -> None:
    """One family covers an operation that torch does not have: the others are taken out again."""
    table = {**fake.families.covered, "aten::nope": Covered("aten::nope", "fake", lambda: None, False)}
    broken = Families(table, frozenset(), fake.prove, lambda: b"")
    block = deterministic("batch", uncovered="trust", families=broken)
    with pytest.raises(LookupError, match="aten::nope") as caught, block:
        pass
    assert not overridden(), caught  # though the error still holds what was being built
    assert torch.is_grad_enabled()
    assert STATE._installed is None


def test_decorator_enters_for_each_call(fake: Any) -> None:
    """A decorated function runs under the policy, also when it calls itself, and keeps its name."""

    @deterministic("batch", families=fake.families)
    def root(x: torch.Tensor, again: bool = True) -> torch.Tensor:
        """Docstring."""
        if again:
            root(x, again=False)
        return torch.rsqrt(x)

    assert shifted(root(X))
    assert root.__name__ == "root"
    assert fake.ran == ["rsqrt"] * 2
    assert not overridden()


def test_decorator_refuses_functions_that_run_in_pieces() -> None:
    """A generator's body runs after the decorator has left: it would not be under the policy."""
    with pytest.raises(UsageError, match="in pieces"):

        @deterministic("batch")
        def steps() -> Any:
            yield 1


def test_gradients_are_off_inside(fake: Any) -> None:
    """Inference only: nothing inside asks for a gradient, and the setting comes back."""
    w = torch.ones(3, 2, requires_grad=True)
    with deterministic("batch", families=fake.families):
        assert not torch.nn.functional.linear(X, w).requires_grad
    assert torch.is_grad_enabled()
    with torch.no_grad(), deterministic("batch", families=fake.families):
        pass
    with torch.no_grad():
        with deterministic("batch", families=fake.families):
            pass
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_mode(fake: Any, mode: Any) -> None:
    """Composite operations reach the tracing whole: they are taken apart there, and their parts are decided."""
    with mode(), deterministic("batch", families=fake.families) as active:
        assert overridden()
        assert X.reshape(4).to(torch.bfloat16).shape == (4,)
        torch.nn.functional.dropout(X, training=False)
        with pytest.raises(RefusedError, match=r"aten::(mm|matmul)"):
            X @ X
        with pytest.raises(RefusedError, match="random numbers"):
            torch.nn.functional.dropout(X, training=True)
    assert ("aten::_to_copy", (torch.float32, torch.bfloat16)) in active.decisions


def test_integers_go_to_torchs_kernels(fake: Any) -> None:
    """A function that returns NotImplemented hands over to the kernel it stands in front of, composite or not."""
    x, w = torch.tensor([[1, 2]]), torch.tensor([[3, 4], [5, 6]])
    with deterministic("batch", families=fake.families):
        assert torch.nn.functional.linear(x, w).tolist() == [[11, 17]]
    with deterministic("batch", uncovered="trust", families=fake.families):
        assert torch.nn.functional.linear(x, w).tolist() == [[11, 17]]
        torch.rsqrt(X)  # that float32 is proved for the function says nothing about torch's kernel
        with pytest.raises(RefusedError, match="of integers"):
            torch.rsqrt(torch.tensor([4, 16]))
    with deterministic(Policy(allow=("aten::rsqrt",), uncovered="trust"), families=fake.families):
        assert torch.rsqrt(torch.tensor([4, 16])).tolist() == [0.5, 0.25]
    assert fake.ran == ["rsqrt"]


def test_a_function_may_make_floating_point_of_integers(fake: Any) -> None:
    """Then the dtype of its result is what has to be proved."""
    table = {"aten::rsqrt": Covered("aten::rsqrt", "fake", lambda x: fake.rsqrt(x.to(torch.float32)), False)}
    families = Families(table, frozenset(), fake.prove, lambda: b"")
    whole = torch.tensor([[4, 16]])
    for uncovered in ("refuse", "trust"):
        with deterministic("batch", uncovered=uncovered, families=families):
            assert shifted(torch.rsqrt(whole))
    assert set(fake.proved) == {("aten::rsqrt", torch.float32)}
    fake.broken.add("aten::rsqrt")
    families = Families(table, frozenset(), fake.prove, lambda: b"")
    for uncovered in ("refuse", "trust"):
        with deterministic("batch", uncovered=uncovered, families=families), pytest.raises(RefusedError, match="row 0"):
            torch.rsqrt(whole)


def test_proofs_are_made_before_the_first_use_and_not_again(fake: Any) -> None:
    """One proof per dtype at the override, for whatever form is used first there."""
    with deterministic("batch", uncovered="trust", families=fake.families):
        for _ in range(3):
            torch.rsqrt(X)
        assert fake.proved == [("aten::rsqrt", torch.float32)]
        torch.rsqrt(X.to(torch.bfloat16))
        assert fake.proved == [("aten::rsqrt", torch.float32), ("aten::rsqrt", torch.bfloat16)]


@pytest.mark.parametrize("uncovered", ["refuse", "trust"])
def test_a_failed_proof_refuses_the_operation(fake: Any, uncovered: Any) -> None:
    """Also without tracing: no silent fall to torch's path, unless the policy lists the operation."""
    fake.broken.add("aten::rsqrt")
    with (
        deterministic("batch", uncovered=uncovered, families=fake.families),
        pytest.raises(RefusedError, match="row 0 differs"),
    ):
        torch.rsqrt(X)
    policy = Policy(allow=("aten::rsqrt",), uncovered=uncovered)
    with deterministic(policy, families=fake.families):
        assert not shifted(torch.rsqrt(X))
    assert "rsqrt" not in fake.ran


@pytest.mark.parametrize("uncovered", ["refuse", "trust"])
def test_a_proof_reaches_torchs_own_kernels(fake: Any, uncovered: Any) -> None:
    """Inside a proof nothing is overridden or traced, and a default device or dtype does not reach it."""
    seen = []

    def during(op: str) -> None:
        with torch_alone():
            made = torch.ones(2) * 4
            made.cumsum(0)
            seen.append((torch.rsqrt(made).tolist(), made.device.type, made.dtype, torch.is_grad_enabled()))

    fake.during = during
    torch.set_default_dtype(torch.bfloat16)
    try:
        with deterministic("batch", uncovered=uncovered, families=fake.families), torch.device("meta"):
            torch.rsqrt(X)
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen
    assert all(s == ([0.5, 0.5], "cpu", torch.float32, False) for s in seen)


def test_entering_is_not_seen_by_the_block_around(fake: Any) -> None:
    """The check for flushed subnormals runs on torch alone, whatever is in force."""
    with (
        deterministic("batch", families=fake.families) as around,
        torch.device("meta"),
        deterministic("batch", families=fake.families) as within,
    ):
        pass
    assert not around.counts
    assert not within.counts
    with torch.device("meta"), torch_alone():
        assert torch.ones(2).device.type == "cpu"


def test_each_thread_has_its_own_policy(fake: Any) -> None:
    """An override asks the policy of the thread that calls it, not the one entered last."""
    fake.broken.add("aten::rsqrt")
    entered, leave = threading.Event(), threading.Event()
    refused = []

    def other() -> None:
        with deterministic("batch", uncovered="trust", families=fake.families):
            try:
                torch.rsqrt(X)
            except RefusedError as error:
                refused.append(error)
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with deterministic(Policy(allow=("aten::rsqrt",), uncovered="trust"), families=fake.families):
        thread.start()
        assert entered.wait(30)
        assert not shifted(torch.rsqrt(X))
        leave.set()
        thread.join()
    assert len(refused) == 1


def test_overrides_hold_on_every_thread_and_tracing_on_its_own(fake: Any) -> None:
    """What the docstring says about threads."""
    found: dict[str, Any] = {}

    def other() -> None:
        found["rsqrt"] = torch.rsqrt(X)
        found["cumsum"] = X.cumsum(0)  # uncovered: not refused here, since this thread is not traced
        with deterministic(Policy(allow=("aten::cumprod",)), families=fake.families) as active:
            found["cumprod"] = X.cumprod(0)
            found["decided"] = [op for op, _ in active.decisions]

    with deterministic("batch", families=fake.families) as active:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert overridden()
        with pytest.raises(RefusedError):
            X.cumprod(0)
    assert shifted(found["rsqrt"])
    assert found["decided"] == ["aten::cumprod"]
    assert ("aten::cumsum", (torch.float32,)) not in active.decisions
    assert not overridden()


def test_two_threads_may_leave_in_the_order_they_came(fake: Any) -> None:
    """The overrides stay until the last one has left, whoever that is."""
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with deterministic("batch", families=fake.families):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with deterministic("batch", families=fake.families):
        thread.start()
        assert entered.wait(30)
    assert overridden()
    leave.set()
    thread.join()
    assert not overridden()


def test_other_families_cannot_mix(fake: Any) -> None:
    """One set of overrides at a time: a block with other families is refused and changes nothing."""
    others = Families(fake.families.covered, frozenset(), fake.prove, lambda: b"")
    with deterministic("batch", families=fake.families):
        with pytest.raises(UsageError, match="other families"), deterministic("batch", families=others):
            pass
        assert overridden()


def test_one_manager_may_be_used_again_and_inside_itself(fake: Any) -> None:
    """A manager holds no state of a block but its own stack of open ones."""
    manager = deterministic("batch", families=fake.families)
    with manager as first, manager as second:
        assert first is not second
        assert overridden()
    with manager:
        assert overridden()
    assert not overridden()


@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        (("batches",), UsageError, "one of run, batch, tp"),
        ((None,), UsageError, "a Policy, or a scope"),
    ],
)
def test_what_cannot_be_kept_is_refused_at_entry(arguments: Any, error: type[Exception], part: str) -> None:
    """Before anything is switched on."""
    with pytest.raises(error, match=part), deterministic(*arguments):
        pass
    assert STATE._installed is None


def test_on_call_needs_tracing() -> None:
    """Nothing would ever call it."""
    with pytest.raises(UsageError, match="on_call"):
        deterministic("batch", uncovered="trust", on_call=lambda *_: None)


def test_flushed_subnormals_are_refused_at_entry(fake: Any) -> None:
    """On the entering thread, whose flag can be changed at any time."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers to zero")
    try:
        with pytest.raises(RefusedError, match="subnormal"), deterministic("batch", families=fake.families):
            pass
    finally:
        torch.set_flush_denormal(False)
    with deterministic("batch", families=fake.families):
        assert overridden()


def test_flushed_subnormals_on_a_worker_are_refused() -> None:
    """A worker thread inherits the flag from the thread that starts it and keeps it."""
    code = """
import torch
from detinfer.errors import RefusedError
from detinfer.policy import deterministic, apply
torch.set_num_threads(2)
if not torch.set_flush_denormal(True):
    print("cannot")
    raise SystemExit
torch.ones(1 << 20).mul_(2.0)  # starts the worker
torch.set_flush_denormal(False)
try:
    apply._check_subnormals()
    print("kept" if apply._workers_keep(2) else "flushed")
except RefusedError:
    print("refused")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    if found == "cannot":
        pytest.skip("this CPU cannot flush subnormal numbers to zero")
    assert found == "refused"


def test_compiled_functions_run_as_written(fake: Any) -> None:
    """A compiled kernel would pass by the overrides: the function's own code runs instead, and compiled code after."""
    compiled = torch.compile(lambda x: torch.rsqrt(x) * 2, backend="eager")
    compiled(X)
    for uncovered in ("refuse", "trust"):
        with deterministic("batch", uncovered=uncovered, families=fake.families):
            assert shifted(compiled(X))
    assert not shifted(compiled(X))


def test_what_is_compiled_first_inside_a_block_runs_as_written() -> None:
    """In a process where nothing was compiled before: in nested blocks too, and compiled code runs after them."""
    code = """
import sys, torch
from detinfer.policy import deterministic
assert "torch._dynamo" not in sys.modules
before, graphs, x = torch.compile, [], torch.arange(1.0, 6.0)
twice = lambda x: torch.rsqrt(x) * 2
def backend(graph, inputs):
    graphs.append(graph)
    return graph
with deterministic("batch", uncovered="trust"):
    assert "torch._dynamo" not in sys.modules
    with deterministic("batch", uncovered="trust"):
        compiled = torch.compile(twice, backend=backend)
        inner = compiled(x)
    for got in (inner, compiled(x), torch.compile(twice, backend=backend)(x)):
        assert got.view(torch.int32).tolist() == twice(x).view(torch.int32).tolist()
assert torch.compile is before and not graphs
compiled(x)
assert len(graphs) == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_detinfer_does_not_import_torch() -> None:
    """The names load what they need when they are used."""
    code = """
import sys, detinfer
assert "torch" not in sys.modules
assert all(getattr(detinfer, name) for name in detinfer.__all__)
assert "torch" in sys.modules and "Policy" in dir(detinfer) and not hasattr(detinfer, "nope")
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
