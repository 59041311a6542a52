"""The collectives as operators of torch: their schemas, what a compiler is told, and their bytes in compiled functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ranks as _ranks
import torch
from ranks import Call, Tensor

from detinfer.collectives import Communicator
from detinfer.collectives.communicator import connect
from detinfer.collectives.patterns import cancellation, stored_each_step
from detinfer.errors import UsageError
from detinfer.reference import all_gather as gather_reference
from detinfer.reference import all_reduce as reference
from detinfer.reference import reduce_scatter as scatter_reference
from detinfer.reference.all_reduce_rms_norm import all_reduce_rms_norm
from detinfer.reference.arithmetic import DType, load

SIZE = 3
NAMES = ("all_reduce", "reduce_scatter", "all_gather", "all_reduce_rms_norm")


@pytest.fixture
def alone() -> Iterator[Communicator]:
    """One rank."""
    with connect(name="alone", rank=0, size=1) as found:
        yield found


@pytest.fixture(scope="module")
def three() -> Iterator[_ranks.Ranks]:
    """Three ranks in processes."""
    found = _ranks.Ranks(SIZE)
    try:
        assert found.connect(SIZE, "main", timeout=100.0, staging=4096) == [None] * SIZE
        yield found
    finally:
        found.close()


def arguments(name: str, key: int) -> tuple[Any, ...]:
    """What the operator takes, with a tensor that is not contiguous."""
    x = torch.arange(24.0).reshape(4, 6).t()
    return {
        "all_reduce": (x, key, "sum", "rank_order", "2stage"),
        "reduce_scatter": (x, key, 1, "sum", "rank_tree", ""),
        "all_gather": (x, key, -1, ""),
        "all_reduce_rms_norm": (x, x + 1, torch.ones(4), key, 1e-6, "U", "gemma", "rank_order", ""),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_what_they_say(name: str, alone: Communicator) -> None:
    """Nothing is written or aliased that the schema does not say; shapes and strides that the compiler is told are true."""
    operator = getattr(torch.ops.detinfer, name).default
    given = arguments(name, alone.key)
    assert set(torch.library.opcheck(operator, given).values()) == {"SUCCESS"}
    real, told = (
        operator(*given),
        operator(*(torch.empty_like(a, device="meta") if torch.is_tensor(a) else a for a in given)),
    )
    for one, other in zip(*((v if isinstance(v, tuple) else (v,)) for v in (real, told)), strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_a_communicator_that_is_gone() -> None:
    """The operator does not keep it alive, and says that it is gone."""
    found = connect(name="gone", rank=0, size=1)
    key = found.key
    found.close()
    with pytest.raises(UsageError, match="is closed"):
        torch.ops.detinfer.all_gather(torch.ones(2), key, 0, "")
    del found
    with pytest.raises(UsageError, match=f"no communicator {key} any more"):
        torch.ops.detinfer.all_gather(torch.ones(2), key, 0, "")


def test_out_has_to_fit(alone: Communicator) -> None:
    """Wrong shapes and dtypes are refused, as methods and compiled."""
    x = torch.ones(4, 2)
    for out in (torch.ones(4), torch.ones(4, 2, dtype=torch.float64)):
        for method in (alone.reduce_scatter, alone.all_gather):
            with pytest.raises(UsageError, match="they have to agree"):
                method(x, out=out)


def _run(three: _ranks.Ranks, method: str, parts: list[Any], dtype: str, *more: Any, **options: Any) -> list[Any]:
    calls = [[Call(f"compiled {method}", (Tensor(part, dtype), *more), options)] for part in parts]
    return [results[0] for results in three.run(calls)]


def test_compiled_bytes(three: _ranks.Ranks) -> None:
    """In one graph without a break each gives the reference's bytes; a rotated or stepwise rounded sum would not."""
    dtype: DType = "bfloat16"
    rng = np.random.default_rng(5)
    parts = [part.reshape(6, 128) for part in cancellation(rng, SIZE, (6 * 128,), dtype)]
    right = reference.all_reduce(parts, dtype)
    assert reference.all_reduce(parts[1:] + parts[:1], dtype).tobytes() != right.tobytes()
    assert stored_each_step(parts, dtype).tobytes() != right.tobytes()
    for options in ({}, {"out": "same", "path": "2stage"}):
        assert all(same(got, right) for got in _run(three, "all_reduce", parts, dtype, **options))
    for rank, got in enumerate(_run(three, "reduce_scatter", parts, dtype)):
        assert same(got, scatter_reference.reduce_scatter(parts, rank, dtype))
    assert all(
        same(got, gather_reference.all_gather(parts, 1)) for got in _run(three, "all_gather", parts, dtype, dim=1)
    )
    residual, weight = cancellation(rng, 2, (6 * 128,), dtype)[1].reshape(6, 128), parts[1][0]
    expected = all_reduce_rms_norm(parts, residual, load(weight, dtype), 1e-6, dtype, "R", "llama")
    shared = (Tensor(residual, dtype), Tensor(weight, dtype), 1e-6)
    for norm, total in _run(three, "all_reduce_rms_norm", parts, dtype, *shared):
        assert same(norm, expected[0])
        assert same(total, expected[1])


def same(got: Any, expected: Any) -> bool:
    """Whether both arrays have the same bytes."""
    return isinstance(got, np.ndarray) and got.shape == expected.shape and got.tobytes() == expected.tobytes()
