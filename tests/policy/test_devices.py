"""Operations on several kinds of device: each has its own families, decisions and overrides. No GPU is needed here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from detinfer import ops
from detinfer.errors import RefusedError
from detinfer.ops import Covered
from detinfer.policy import Accepted, Active, Guarantee, Policy, Refused, deterministic, proofs
from detinfer.policy.decide import Known, decide
from detinfer.policy.families import Families, own
from detinfer.policy.policy import Proof
from detinfer.policy.trace import Trace

BF16, FP32 = torch.bfloat16, torch.float32
ELSEWHERE = 7.0
"""What the functions of the second device give, so that a result says who made it."""


def families(device: str, ieee: tuple[str, ...] = (), broken: tuple[str, ...] = ()) -> Families:
    """Families of ``device`` that cover mm, in fp32 portably; proofs of ``broken`` operations fail."""

    def mm(a: torch.Tensor, b: torch.Tensor) -> Any:
        return torch.empty(a.shape[0], b.shape[1], device=a.device, dtype=a.dtype)

    def prove(op: str, dtype: torch.dtype) -> Proof | Refused:
        return Refused(op, device, "row 3 differs") if op in broken else Proof(f"{op} {device}", "fake", 1, "00")

    covered = {"aten::mm": Covered("aten::mm", f"fake_{device}", mm, True, frozenset({FP32}))}
    values = frozenset({"aten::exp"})
    return Families(covered, frozenset(ieee), prove, lambda: device.encode(), values, device=device)


@pytest.fixture
def known() -> Known:
    """CPU families that cover nothing, and those of CUDA."""
    there = families("cuda", ("aten::add.Tensor",), ("aten::add.Tensor",))
    cpu = Families({}, frozenset({"aten::add.Tensor"}), there.prove, lambda: b"cpu", elsewhere={"cuda": there})
    return cpu.known


CALLS: list[tuple[str, tuple[torch.dtype, ...], Any, str]] = [
    ("aten::mm", (BF16,), Accepted, "cuda/fake"),
    ("aten::mm", (torch.float64,), Refused, "no canonical order on CUDA"),
    ("aten::add.Tensor", (BF16,), Refused, "row 3 differs"),
    ("aten::exp_", (BF16,), Accepted, "torch/cuda"),
    ("aten::view", (BF16,), Accepted, "torch/cuda"),
    ("aten::eq.Tensor", (torch.int64,), Accepted, "torch/cuda"),
    ("aten::cumsum", (BF16,), Refused, "running sum"),
    ("aten::rand", (BF16,), Refused, "random"),
]


@pytest.mark.parametrize(("op", "dtypes", "kind", "part"), CALLS, ids=lambda value: str(value)[:30])
def test_decisions_on_a_gpu(known: Known, op: str, dtypes: Any, kind: Any, part: str) -> None:
    """The same questions, asked of what is known there."""
    found = decide(Policy(), op, dtypes, known.elsewhere["cuda"])
    assert isinstance(found, kind)
    assert part in (found.path if kind is Accepted else found.reason)


def test_what_is_portable_says_its_family(known: Known) -> None:
    """A matrix unit's bits are this machine's; one FMA for each k has the same bits everywhere."""
    there, portable = known.elsewhere["cuda"], Policy(Guarantee("batch", "portable"))
    for dtype, kind in ((BF16, Refused), (FP32, Accepted)):
        here = decide(Policy(), "aten::mm", (dtype,), there)
        assert isinstance(here, Accepted) and here.portable is (dtype is FP32)
        assert isinstance(decide(portable, "aten::mm", (dtype,), there), kind)
    assert isinstance(decide(portable, "aten::exp", (FP32,), there), Refused)


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on a GPU, and holds nothing."""

    @staticmethod
    def __new__(cls, *shape: int, dtype: torch.dtype = BF16) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cuda:0")
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called on a tensor that holds nothing")


class Operation:
    """An operation by name; notes its calls."""

    def __init__(self, name: str) -> None:
        self._name, self.calls = name, 0

    def name(self) -> str:
        """As the dispatcher's."""
        return self._name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1


def call(trace: Trace, op: Operation, *args: Any, **kwargs: Any) -> None:
    """The call as torch's dispatcher would make it."""
    trace.__torch_dispatch__(op, (), args, kwargs)


def test_the_device_of_the_tensors_decides(known: Known) -> None:
    """One operation, decided for each device; scalars and indices on CPU do not move it; the key tells them apart."""
    trace = Trace(Policy(), known, lambda: "model.layer")
    there, here = Elsewhere(2, 2), torch.zeros(2, 2, dtype=BF16)
    mm, cat = Operation("aten::mm"), Operation("aten::cat")
    call(trace, mm, there, there)
    call(trace, mm, there, there)
    call(trace, Operation("aten::index.Tensor"), there, [None, torch.tensor([1])])
    call(
        trace,
        Operation("aten::masked_fill.Tensor"),
        there,
        Elsewhere(2, 2, dtype=torch.bool),
        torch.tensor(0.0).bfloat16(),
    )
    call(trace, cat, [here, here])
    call(trace, cat, [there, there])
    assert (mm.calls, cat.calls) == (2, 2)
    assert trace.counts == {
        ("aten::mm on cuda", (BF16,)): 2,
        ("aten::index.Tensor on cuda", (BF16, torch.int64)): 1,
        ("aten::masked_fill.Tensor on cuda", (BF16, torch.bool)): 1,
        ("aten::cat", (BF16,)): 1,
        ("aten::cat on cuda", (BF16,)): 1,
    }
    assert trace.decisions["aten::mm on cuda", (BF16,)].path == "cuda/fake"
    assert trace.decisions["aten::cat", (BF16,)].path == "torch"
    assert [c.op for c in trace.calls] == ["aten::mm"]
    call(trace, Operation("aten::exp"), there)
    assert Active(Policy(), known, trace).order_free() == [
        "aten::exp on cuda"
    ]  # a product has an order, wherever it runs
    with pytest.raises(RefusedError, match=r"aten::mm on bfloat16 is refused in model.layer: no proved path"):
        call(trace, mm, here, here)
    with pytest.raises(RefusedError, match=r"aten::add.Tensor on cuda, bfloat16 is refused .* row 3 differs"):
        call(trace, Operation("aten::add.Tensor"), there, 1.0)


def test_a_device_without_families_is_refused(known: Known) -> None:
    """By name, with what to do: also where only one tensor of a list is there."""
    trace = Trace(Policy(), replace(known, elsewhere={}), lambda: "")
    with pytest.raises(RefusedError, match=r"a tensor is on cuda:0, .* on CPU and on CUDA devices only"):
        call(trace, Operation("aten::cat"), [torch.zeros(2), Elsewhere(2)])


def test_each_device_has_its_own_overrides() -> None:
    """Shown on torch's meta device, whose kernels compute shapes alone: CPU's products stay CPU's."""

    def mm(a: torch.Tensor, b: torch.Tensor) -> Any:
        return NotImplemented if not a.is_floating_point() else torch.empty(1, 77, device="meta", dtype=a.dtype)

    meta = replace(families("meta"), covered={"aten::mm": Covered("aten::mm", "fake_meta", mm, True, frozenset())})
    both = replace(own(), elsewhere={"meta": meta})
    a, there = torch.ones(3, 3), torch.ones(3, 3, device="meta")
    for uncovered in ("trust", "refuse"):
        with deterministic("batch", uncovered=uncovered, families=both):  # type: ignore[arg-type]
            assert torch.mm(there, there).shape == (1, 77)
            assert torch.mm(there.int(), there.int()).shape == (3, 3)  # handed on to torch's own
            assert torch.mm(a, a).tolist() == [[3.0] * 3] * 3
            assert there.bfloat16().mm(there.bfloat16()).shape == (1, 77)
        assert torch.mm(there, there).shape == (3, 3)


def test_a_proof_that_fails_there_is_a_refusal_there_alone() -> None:
    meta = families("meta", broken=("aten::mm",))
    both = replace(own(), elsewhere={"meta": meta})
    there = torch.ones(3, 3, device="meta")
    with deterministic("batch", uncovered="trust", families=both):
        with pytest.raises(RefusedError, match=r"aten::mm on torch\.float32 is refused: row 3 differs"):
            torch.mm(there, there)
        assert torch.mm(torch.ones(1, 2), torch.ones(2, 1)).item() == 2


def test_no_proof_is_made_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof waits for the device, which a CUDA graph cannot hold: refused, and made when it is asked for later."""
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(proofs, "gpu_level", lambda: b"a GPU")
    monkeypatch.setattr(proofs, "_gpus", lambda: {"a GPU": 0})
    monkeypatch.setattr(proofs, "_made", {})
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    monkeypatch.setattr(ops, "prove", lambda op, dtype, device: (5, device.encode()))
    with pytest.raises(RefusedError, match=r"aten::mm on bfloat16 is refused: .* before the capture"):
        proofs.prove("aten::mm", BF16, "cuda")
    capturing[0] = False
    made = proofs.prove("aten::mm", BF16, "cuda")
    assert isinstance(made, Proof) and made.cases == 5 and made.subject == "aten::mm bfloat16 cuda"
    capturing[0] = True
    assert proofs.prove("aten::mm", BF16, "cuda") is made


def test_the_tables_of_every_device_fit_torch() -> None:
    """Every family of a GPU can be imported without one, and names operations that torch has."""
    for device, names in ops.FAMILIES_ON.items():
        table = ops.covered(device)
        assert {found.family for found in table.values()} <= set(names)
        ieee, values = ops.ieee_operations(device), ops.value_operations(device)
        assert len(ieee | values | set(table)) == len(ieee) + len(values) + len(table)
        there = replace(own(), covered=table, ieee=ieee, values=values, device=device, elsewhere={})
        assert set(table) <= set(there.known.covered)


class Redispatched(Elsewhere):
    """A tensor that says that it is on a GPU, and sends every call to what is registered for CUDA."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keys = torch._C.DispatchKey
        with torch._C._ExcludeDispatchKeyGuard(
            torch._C.DispatchKeySet(keys.Python) | torch._C.DispatchKeySet(keys.PythonTLSSnapshot)
        ):
            return func(*args, **(kwargs or {}))


REACHED: list[tuple[str, Callable[[], Any]]] = [
    ("aten::linear", lambda: F.linear(there(4, 8), there(3, 8))),
    ("aten::linear", lambda: F.linear(there(4, 8), there(3, 8), there(3))),
    ("aten::matmul", lambda: there(2, 4, 8) @ there(8, 3)),
    ("aten::mm", lambda: torch.mm(there(4, 8), there(8, 3))),
    ("aten::addmm", lambda: there(4, 3).addmm(there(4, 8), there(8, 3))),
    ("aten::bmm", lambda: torch.bmm(there(2, 4, 8), there(2, 8, 3))),
    ("aten::scaled_dot_product_attention", lambda: F.scaled_dot_product_attention(*(there(1, 2, 4, 8),) * 3)),
    ("aten::_softmax", lambda: torch.softmax(there(4, 8), -1)),
    ("aten::mean.dim", lambda: there(4, 8).mean(-1)),
    ("aten::rms_norm", lambda: F.rms_norm(there(4, 8), (8,))),
    ("aten::native_layer_norm", lambda: torch.native_layer_norm(there(4, 8), (8,), None, None, 1e-5)),
]


def there(*shape: int) -> torch.Tensor:
    """A tensor on the GPU that is not there."""
    return Redispatched(*shape)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_the_gpus_own_table_is_reached(mode: Any) -> None:
    """torch's dispatcher brings calls on CUDA tensors to our functions, those that torch composes of others included."""
    seen: list[str] = []

    def noting(op: str) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            seen.append(op)
            return (args[0],) * 3 if op == "aten::native_layer_norm" else args[0]

        return function

    covered = {op: replace(found, function=noting(op)) for op, found in ops.covered("cuda").items()}
    gpu = replace(families("cuda"), covered=covered)
    with mode(), deterministic("batch", uncovered="trust", families=replace(own(), elsewhere={"cuda": gpu})):
        for op, call in REACHED:
            seen.clear()
            call()
            assert seen == [op]
        with pytest.raises(
            RefusedError, match=r"aten::mm on torch\.float64 is refused: float64 has no canonical order"
        ):
            torch.mm(Redispatched(4, 8, dtype=torch.float64), Redispatched(8, 3, dtype=torch.float64))
