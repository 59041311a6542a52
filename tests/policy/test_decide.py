"""Decisions, as a table: each row is an operation, the dtypes of a call, and what has to come out."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch

from detinfer.errors import UsageError
from detinfer.policy.collectives import Ranks
from detinfer.policy.copies import COPIES, casts
from detinfer.policy.decide import Family, Known, decide
from detinfer.policy.policy import Accepted, Guarantee, Policy, Proof, Refused, from_json
from detinfer.policy.variants import SCALED, SUMS, VARIES, WHOLE_STEPS, variant

f32, bf16, f16, f64, i64, boolean = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.bool,
)


def prove(op: str, dtype: torch.dtype) -> Proof | Refused:
    """Every proof works but that of ``aten::gelu`` in bfloat16."""
    if (op, dtype) == ("aten::gelu", bf16):
        return Refused(op, "csrc/elementwise", "its proof failed: row 3 differs")
    return Proof(f"{op} {dtype}", "a reference", 7, hashlib.sha256(op.encode()).hexdigest())


KNOWN = Known(
    covered={
        "aten::mean.dim": Family("aten::mean.dim", "csrc/rows", True),
        "aten::gelu": Family("aten::gelu", "csrc/elementwise", False),
        "aten::gelu_": Family("aten::gelu", "csrc/elementwise", False),
        "aten::scaled_dot_product_attention": Family("aten::scaled_dot_product_attention", "csrc/attention", True),
    },
    ieee={"aten::add.Tensor": "aten::add.Tensor", "aten::_to_copy": "aten::_to_copy"},
    prove=prove,
    random=lambda op: op in ("aten::rand", "aten::randint", "aten::scaled_dot_product_attention"),
)

TABLE = [
    # operation, dtypes, variant, path (or None: refused), a part of the reason, the operation that the proof names
    ("aten::mean.dim", (f32,), "", "csrc/rows", "canonical order", "aten::mean.dim"),
    ("aten::mean.dim", (bf16,), "", "csrc/rows", "canonical order", "aten::mean.dim"),
    ("aten::gelu_", (f16,), "", "csrc/elementwise", "canonical order", "aten::gelu "),
    ("aten::scaled_dot_product_attention", (f32,), "", "csrc/attention", "canonical", "aten::scaled"),
    ("aten::gelu", (bf16,), "", None, "row 3 differs", None),
    ("aten::gelu", (f32, bf16), "", None, "row 3 differs", None),
    ("aten::mean.dim", (f64,), "", None, "float64 has no canonical order", None),
    ("aten::mean.dim", (torch.complex64,), "", None, "complex64 has no canonical order", None),
    ("aten::mean.dim", (i64, f32), "", "csrc/rows", "canonical order", "aten::mean.dim"),
    ("aten::rand", (f32,), "", None, "random numbers", None),
    ("aten::randint", (i64,), "", None, "random numbers", None),
    ("aten::sum", (i64,), "", "torch", "exact in any order", None),
    ("aten::bitwise_and.Tensor", (boolean, boolean), "", "torch", "exact in any order", None),
    ("aten::index_add", (i64,), "", "torch", "exact in any order", None),
    ("aten::cumsum", (i64,), "", "torch", "exact in any order", None),
    ("aten::view", (bf16,), "", "torch", "moves bytes", None),
    ("aten::embedding", (bf16, i64), "", "torch", "moves bytes", None),
    ("aten::clone", (f64,), "", "torch", "moves bytes", None),
    ("aten::index.Tensor", (f32, i64, boolean), "", "torch", "moves bytes", None),
    ("aten::where.self", (boolean, f32), "", "torch", "moves bytes", None),
    ("aten::_to_copy", (f32,), "", "torch", "moves bytes", None),
    ("aten::_to_copy", (f32, bf16), "", "torch", "a cast", "aten::_to_copy"),
    ("aten::_to_copy", (i64, f32), "", "torch", "a cast", "aten::_to_copy"),
    ("aten::copy_", (bf16, f32), "", "torch", "a cast", "aten::_to_copy"),
    ("aten::cat", (bf16, f32), "", "torch", "a cast", "aten::_to_copy"),
    ("aten::_to_copy", (f64, f32), "", None, "float64 has no canonical order", None),
    ("aten::view.dtype", (f32, i64), "", "torch", "moves bytes", None),
    ("aten::add.Tensor", (f32,), "", "torch", "one IEEE rounding", "aten::add.Tensor"),
    ("aten::add.Tensor", (f32,), SCALED, None, "multiply first", None),
    ("aten::add.Tensor", (i64,), SCALED, "torch", "exact in any order", None),
    ("aten::arange", (f32,), WHOLE_STEPS, "torch", "whole numbers", None),
    ("aten::arange", (f32,), "", None, "no whole number", None),
    ("aten::index_put_", (f32, i64), "", "torch", "moves bytes", None),
    ("aten::index_put_", (f32, i64), SUMS, None, "adds where its indices point", None),
    ("aten::index_add", (f32, i64), "", None, "adds where its indices point", None),
    ("aten::index_add_", (bf16, i64), "", None, "adds where its indices point", None),
    ("aten::scatter_add", (f32, i64), "", None, "adds where its indices point", None),
    ("aten::scatter_add_", (f32, i64), "", None, "adds where its indices point", None),
    ("aten::scatter.reduce", (f32, i64), "", None, "adds where its indices point", None),
    ("aten::cumsum", (f32,), "", None, "running sum", None),
    ("aten::argmax", (f32,), "", None, "equal values", None),
    ("aten::nobody_knows", (f32,), "", None, "no proved path", None),
    ("mine::op", (i64,), "", None, "'mine::op' in Policy(allow=...)", None),
    ("aten::add.Tensor", (torch.qint8,), "", None, "qint8 has no canonical order", None),
    ("aten::view", (torch.float8_e4m3fn,), "", "torch", "moves bytes", None),
    ("aten::add.Tensor", (torch.float8_e4m3fn,), "", None, "float8_e4m3fn has no canonical order", None),
    ("mine::op", (f32,), "", None, "'mine::op' in Policy(allow=...)", None),
]


@pytest.mark.parametrize(("op", "dtypes", "how", "path", "reason", "proved"), TABLE)
def test_table(
    op: str, dtypes: tuple[torch.dtype, ...], how: str, path: str | None, reason: str, proved: str | None
) -> None:
    """Each operation of the table is accepted on its path, or refused, for the reason given."""
    decision = decide(Policy(), op, dtypes, KNOWN, variant=how)
    assert reason in decision.reason
    assert decision.op == op
    if path is None:
        assert isinstance(decision, Refused)
        assert decision.to_json()["portable"] is False
        return
    assert isinstance(decision, Accepted)
    assert decision.path == path
    assert decision.portable
    assert (decision.proof is None) == (proved is None)
    if proved is not None:
        assert decision.proof is not None
        assert decision.proof.subject.startswith(proved)


def test_two_dtypes_join_two_proofs() -> None:
    """A cast needs the proof of each dtype, and its digest depends on both."""
    one, both = (decide(Policy(), "aten::_to_copy", dtypes, KNOWN) for dtypes in ((i64, f32), (bf16, f32)))
    assert isinstance(one, Accepted)
    assert isinstance(both, Accepted)
    assert one.proof is not None
    assert both.proof is not None
    assert both.proof.cases == 2 * one.proof.cases
    assert both.proof.digest != one.proof.digest


def test_allowed_operations_run_on_torchs_path_without_a_proof() -> None:
    """What would be refused is accepted when it is listed; the decision says so and is not portable."""
    policy = Policy(allow=("aten::cumsum", "aten::gelu"))
    decision = decide(policy, "aten::cumsum", (f32,), KNOWN)
    assert isinstance(decision, Accepted)
    assert decision.path == "torch"
    assert decision.reason.startswith("allowed by the policy; otherwise: it is a running sum")
    assert decision.proof is None
    assert not decision.portable
    assert isinstance(decide(policy, "aten::cumprod", (f32,), KNOWN), Refused)
    # A listed operation whose proof holds stays on its covered path; one whose proof failed goes to torch's.
    assert decide(policy, "aten::gelu", (f32,), KNOWN).path == "csrc/elementwise"
    assert decide(policy, "aten::gelu", (bf16,), KNOWN).path == "torch"


def test_place_portable_refuses_what_is_not_marked() -> None:
    """An allowed operation has no proof to carry to another machine."""
    policy = Policy(Guarantee("batch", "portable"), allow=("aten::cumsum",))
    assert isinstance(decide(policy, "aten::gelu", (f32,), KNOWN), Accepted)
    assert isinstance(decide(Policy(allow=policy.allow), "aten::cumsum", (f32,), KNOWN), Accepted)
    refused = decide(policy, "aten::cumsum", (f32,), KNOWN)
    assert isinstance(refused, Refused)
    assert "not portable" in refused.reason


def test_one_rounding_of_other_operands_is_not_portable() -> None:
    """Where another device rounds something else than CPU, its bits hold on that device."""
    there = replace(KNOWN, unlike_cpu=frozenset({"aten::add.Tensor"}))
    portable = Policy(Guarantee("batch", "portable"))
    assert isinstance(decide(portable, "aten::add.Tensor", (f32,), KNOWN), Accepted)
    assert isinstance(decide(Policy(), "aten::add.Tensor", (f32,), there), Accepted)
    assert isinstance(decide(portable, "aten::add.Tensor", (f32,), there), Refused)
    assert isinstance(decide(portable, "aten::_to_copy", (i64, f32), there), Accepted)


def test_scope_tp_takes_the_paths_of_batch_on_one_process() -> None:
    """Same decisions, row by row; what differs is how a cut model is added over ranks."""
    for op in ("aten::mean.dim", "aten::add.Tensor", "aten::cumsum"):
        assert decide(Policy(Guarantee("tp")), op, (f32,), KNOWN) == decide(Policy(), op, (f32,), KNOWN)


def test_scope_run_takes_the_paths_of_batch() -> None:
    """Same decisions, row by row."""
    for op, dtypes, how, *_ in TABLE:
        run, batch = (decide(Policy(Guarantee(s)), op, dtypes, KNOWN, variant=how) for s in ("run", "batch"))
        assert run == batch


@pytest.mark.parametrize("op", ["cumsum", "aten::cumsum.default"])
def test_allow_has_one_spelling(op: str) -> None:
    """A name that could never match is refused when the policy is made."""
    with pytest.raises(UsageError, match=r"aten::name\.overload"):
        Policy(allow=(op,))


def test_every_copy_exists_in_torch() -> None:
    """No name of the list is misspelled: a misspelled one would refuse its operation."""
    names = set(torch._C._dispatch_get_all_op_names())
    assert sorted(set(COPIES) - names) == []
    assert sorted(VARIES - names) == []


def test_no_copy_computes() -> None:
    """None of torch's pointwise arithmetic, no reduction and nothing random stands in the list of copies."""
    # torch marks operations that work element by element; of these, copies only choose, compare, write or convert.
    names = "where.self where.self_out _to_copy copy copy_ clone equal"
    chosen = {f"aten::{name}" for name in names.split()}
    starts = ("aten::fill", "aten::masked_fill", "aten::zero", "aten::tril", "aten::triu")
    for op in COPIES:
        name, _, overload = op.partition(".")
        tags = torch._C._get_operation_overload(name, overload)[2]
        assert torch.Tag.nondeterministic_seeded not in tags, op
        if torch.Tag.pointwise in tags:
            assert op in chosen or op.startswith(starts), op
        if torch.Tag.reduction in tags:
            assert op.startswith(("aten::any", "aten::all", "aten::count_nonzero")), op


@pytest.mark.parametrize(
    ("op", "dtypes", "cast"),
    [
        ("aten::gather", (f32, i64), False),
        ("aten::index_put", (f32, i64, boolean), False),
        ("aten::masked_fill.Scalar", (f32, boolean), False),
        ("aten::where.self", (boolean, f32), False),
        ("aten::where.self", (boolean, f32, bf16), True),
        ("aten::copy_", (f32, i64), True),
        ("aten::copy_", (boolean, f32), True),
        ("aten::masked_fill.Tensor", (f32, boolean, bf16), True),
        ("aten::equal", (f32, bf16), False),
    ],
)
def test_casts(op: str, dtypes: tuple[torch.dtype, ...], cast: bool) -> None:
    """An index or a mask is not data; a converting copy casts integers too."""
    assert casts(op, dtypes) is cast


def test_variants_read_the_arguments() -> None:
    """``accumulate`` wherever it is passed; whole steps as far as the dtype holds them exactly."""
    assert variant("aten::index_put", (0, [1], 2), {}) == ""
    assert variant("aten::index_put", (0, [1], 2, True), {}) == SUMS
    assert variant("aten::index_put_", (0, [1], 2), {"accumulate": True}) == SUMS
    assert variant("aten::index_put_", (0, [1], 2, False), {}) == ""
    assert variant("aten::add.Tensor", (0, 1), {}) == ""
    assert variant("aten::add.Tensor", (0, 1), {"alpha": 1}) == ""
    assert variant("aten::add_.Tensor", (0, 1), {"alpha": 2}) == SCALED
    assert variant("aten::sub.Scalar", (0, 1, 0.5), {}) == SCALED
    assert variant("aten::arange", (5.0,), {}) == WHOLE_STEPS
    assert variant("aten::arange.start_step", (0, 1, 0.1), {}) == ""
    assert variant("aten::arange", (257,), {"dtype": bf16}) == ""
    assert variant("aten::arange", (256,), {"dtype": bf16}) == WHOLE_STEPS
    assert variant("aten::arange", (2**24 + 1,), {"dtype": f32}) == ""
    assert variant("aten::arange", (float("inf"),), {"dtype": f32}) == ""
    assert variant("aten::view", (0, [3]), {}) == ""


def _ranks(path: str = "csrc/all_reduce", broken: bool = False) -> Ranks:
    def prove(collective: str, reduction: str, dtype: torch.dtype) -> Proof | Refused:
        if broken:
            return Refused(collective, path, "its proof failed: byte 3 of 8")
        return Proof(f"{collective} {reduction} {dtype}", "a reference", 5, "00")

    return Ranks(3, path, prove)


COLLECTIVES = [
    # operator, reduction, dtype, path (or None: refused), a part of the reason
    ("c10d::allreduce_", "sum", f32, "csrc/all_reduce", "sum over 3 ranks, in rank order"),
    ("c10d::allreduce_", "avg", bf16, "csrc/all_reduce", "in rank order"),
    ("c10d::allreduce_", "max", f16, "csrc/all_reduce", "which no order changes"),
    ("c10d::allreduce_", "min", f64, "csrc/all_reduce", "which no order changes"),
    ("c10d::allreduce_", "sum", i64, "csrc/all_reduce", "sum over 3 ranks"),
    ("c10d::allreduce_", "sum", boolean, "torch", "exact in any order"),
    ("c10d::allreduce_", "product", f32, None, "all_gather its terms"),
    ("c10d::allreduce_", "product", i64, "torch", "exact in any order"),
    ("c10d::allreduce_", "band", i64, "torch", "exact in any order"),
    ("c10d::allreduce_", "premul_sum", f32, None, "no canonical order"),
    ("c10d::allreduce_", "premul_sum", i64, None, "no canonical order"),
    ("c10d::allreduce_", "unknown", i64, None, "no canonical order"),
    ("c10d::allreduce_", "avg", i64, None, "average of integers"),
    ("c10d::allreduce_", "sum", torch.complex64, None, "complex64 has no canonical order"),
    ("c10d::allreduce_", "sum", torch.float8_e4m3fn, None, "convert to float32"),
    ("c10d::reduce_", "sum", f32, "csrc/all_reduce", "in rank order"),
    ("c10d::_reduce_scatter_base_", "sum", bf16, "csrc/all_reduce", "in rank order"),
    ("c10d::_allgather_base_", "", torch.float8_e4m3fn, "csrc/all_reduce", "copy of bytes"),
    ("c10d::broadcast_", "", f32, "torch", "moves bytes"),
    ("_c10d_functional::wait_tensor", "", f64, "torch", "moves bytes"),
]


@pytest.mark.parametrize(("op", "reduction", "dtype", "path", "why"), COLLECTIVES)
def test_collectives(op: str, reduction: str, dtype: torch.dtype, path: str | None, why: str) -> None:
    """Each row of the table of collectives."""
    decision = decide(Policy(), op, (dtype,), KNOWN, variant=reduction, ranks=_ranks())
    assert why in decision.reason
    assert (decision.path if isinstance(decision, Accepted) else None) == path
    if isinstance(decision, Accepted):
        assert decision.portable
        assert (decision.proof is not None) == path.startswith("csrc/")


def test_a_collective_needs_its_proof_and_its_group() -> None:
    """A proof that fails refuses, and so does a decision for no group; allow sends the call to the backend."""
    for ranks in (_ranks(broken=True), _ranks("ordered_gather", broken=True)):
        found = decide(Policy(), "c10d::allreduce_", (f32,), KNOWN, variant="sum", ranks=ranks)
        assert isinstance(found, Refused) and found.path == ranks.path and "byte 3 of 8" in found.reason
    assert isinstance(decide(Policy(), "c10d::allreduce_", (f32,), KNOWN, variant="sum"), Refused)
    allowed = Policy(allow=("c10d::allreduce_",))
    found = decide(allowed, "c10d::allreduce_", (f32,), KNOWN, variant="product", ranks=_ranks())
    assert isinstance(found, Accepted) and (found.path, found.proof) == ("torch", None)
    assert decide(allowed, "c10d::allreduce_", (f32,), KNOWN, variant="sum", ranks=_ranks()).path == "csrc/all_reduce"


def test_scope_tp_refuses_rounded_parts_in_rank_order() -> None:
    """A floating-point sum of torch.distributed; what no order changes stays."""
    scoped = Policy(Guarantee("tp"))
    for added in ("sum", "avg"):
        found = decide(scoped, "c10d::allreduce_", (f32,), KNOWN, variant=added, ranks=_ranks())
        assert isinstance(found, Refused) and "joined by a tree" in found.reason
    for exact, dtype in (("max", f32), ("sum", i64)):
        found = decide(scoped, "c10d::allreduce_", (dtype,), KNOWN, variant=exact, ranks=_ranks())
        assert isinstance(found, Accepted)


def test_groups_belong_to_scope_tp() -> None:
    """They travel with the policy, and no other scope has them."""
    policy = Policy(Guarantee("tp"), groups=3)
    assert from_json(policy.to_json()) == policy
    assert "groups" not in Policy(Guarantee("tp")).to_json()
    for wrong in (lambda: Policy(groups=2), lambda: Policy(Guarantee("tp"), groups=0)):
        with pytest.raises(UsageError, match="groups"):
            wrong()
