"""Stress inputs show a wrong order for every operation, dtype and length that a plant can be judged on."""

from __future__ import annotations

import pytest
import torch

from detinfer import deterministic, ops
from detinfer.goldens.stress import probe
from detinfer.goldens.stress_inputs import stress

CASES = {
    "aten::linear": lambda n: ((1, 16, n), (19, n)),
    "aten::addmm": lambda n: ((19,), (16, n), (n, 19)),
    "aten::mm": lambda n: ((16, n), (n, 19)),
    "aten::matmul": lambda n: ((1, 16, n), (n, 19)),
    "aten::mv": lambda n: ((16, n), (n,)),
    "aten::addmv": lambda n: ((16,), (16, n), (n,)),
    "aten::dot": lambda n: ((n,), (n,)),
    "aten::baddbmm": lambda n: ((9, 16, 19), (9, 16, n), (9, n, 19)),
    "aten::bmm": lambda n: ((9, 16, n), (9, n, 19)),
    "aten::mean.dim": lambda n: ((1, 16, n),),
    "aten::sum.dim_IntList": lambda n: ((1, 16, n),),
    "aten::_softmax": lambda n: ((1, 9, 16, n),),
    "aten::_log_softmax": lambda n: ((1, 9, 16, n),),
    "aten::rms_norm": lambda n: ((1, 16, n),),
    "aten::_fused_rms_norm": lambda n: ((1, 16, n),),
    "aten::native_layer_norm": lambda n: ((1, 16, n),),
    "aten::scaled_dot_product_attention": lambda n: ((1, 6, 4, 16), (1, 2, n, 16), (1, 2, n, 16)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("operation", CASES)
def test_a_planted_order_is_seen_and_rows_are_invariant(operation: str, dtype: torch.dtype) -> None:
    """Under the policy rows agree on stress inputs; with operands in another order they do not."""
    for length in (16, 17, 64, 77, 576, 1000, 1024):
        shapes = CASES[operation](length)
        inputs = stress(operation, dtype, shapes, seed=length)
        assert inputs is not None
        with deterministic("batch", uncovered="trust"):
            found = probe(inputs, operation, dtype)
        assert found.invariant, f"{operation} {dtype} {length}: rows differ in a batch"
        assert found.seen, f"{operation} {dtype} {length}: the planted order was not seen"
        assert found.rows >= 5


def test_every_reducing_operation_has_stress_inputs() -> None:
    """An operation that the policy covers and that reduces cannot be left without a plant."""
    reducing = {name for name, found in ops.covered().items() if found.reduces}
    assert {name.partition(".")[0] for name in reducing} <= {name.partition(".")[0] for name in CASES}


def test_one_or_two_terms_have_no_order() -> None:
    """A sum of two terms commutes: it is listed as free of order, not as seen."""
    inputs = stress("aten::mean.dim", torch.float32, ((1, 2),), 0)
    assert inputs is not None
    with deterministic("batch", uncovered="trust"):
        assert probe(inputs, "aten::mean.dim", torch.float32).seen is None
