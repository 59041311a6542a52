"""matmul: one chain of FMAs for each output, whatever stands around it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from detinfer import bits, native
from detinfer.errors import UnsupportedDtype, UsageError
from detinfer.ops import matmul
from detinfer.ops.evidence import from_values, to_values
from detinfer.reference import matmul as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = native.load().levels if isinstance(native.load(), native.Loaded) else ()  # type: ignore[union-attr]
SHAPES = ((1, 1), (15, 49), (49, 15), (77, 100), (100, 33), (1000, 77), (77, 1000))
"""(K, N)"""


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bits.as_bytes(a) == bits.as_bytes(b)


def operands(
    rows: int, terms: int, columns: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [rows, K], weight [N, K], bias [N]: spread exponents; the first and the last product nearly cancel."""
    rng = np.random.default_rng(seed + terms)

    def values(*shape: int) -> np.ndarray:
        mantissa = rng.integers(128, 256, size=shape) * (rng.integers(0, 2, size=shape) * 2 - 1) / 128.0
        return np.ldexp(mantissa, rng.integers(-6, 3, size=shape)).astype(np.float32)

    x, weight = values(rows, terms), values(columns, terms)
    if terms > 2:
        x /= 64
        x[:, 0] = 2.0**12 * (1 + np.arange(rows) % 64 / 128)
        x[:, -1] = -x[:, 0]
        weight[:, 0] = weight[:, -1] = 1
    return from_values(x, dtype), from_values(weight, dtype), from_values(values(columns), dtype)


def expected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    chain = reference.matmul(to_values(x), to_values(weight).T, None if bias is None else to_values(bias))
    return from_values(chain, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=bits.dtype_name)
@pytest.mark.parametrize(("terms", "columns"), SHAPES, ids=str)
def test_reference_bytes_at_every_instruction_set(terms: int, columns: int, dtype: torch.dtype) -> None:
    """Every level gives the written chain's bytes at rows 1, 2, 5 and 13; a chain read backwards gives others."""
    x, weight, bias = operands(13, terms, columns, dtype)
    wanted = expected(x, weight, bias)
    if terms >= 15:
        assert not same(expected(x.flip(-1), weight.flip(-1), bias), wanted), (
            "these inputs would not show a wrong order"
        )
    for level in LEVELS:
        with native.hold_isa(level):
            for rows in (1, 2, 5, 13):
                assert same(matmul.linear(x[:rows], weight, bias), wanted[:rows]), (level, rows)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=bits.dtype_name)
def test_every_row_at_every_batch_equals_the_row_alone(dtype: torch.dtype, threads: int) -> None:
    """M = 1 to 130 and some to 601 on one and two threads: every row, not the first alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for terms, columns in ((77, 33), (576, 192), (100, 577)):
            x, weight, _ = operands(130, terms, columns, dtype)
            alone = torch.cat([matmul.linear(x[i : i + 1], weight) for i in range(130)])
            turned = matmul.linear(x.flip(-1), weight.flip(-1))
            assert bits.rows_equal(turned, alone).sum() < 65, "a reversed order would pass in most rows"
            # From 128 rows for each thread on, threads that hold 16-bit rows copy their own.
            x, alone = x.repeat(5, 1)[:601], alone.repeat(5, 1)[:601]
            for rows in (*range(1, 131), 255, 256, 257, 384, 601):
                assert bits.rows_equal(matmul.linear(x[:rows], weight), alone[:rows]).all(), rows
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=bits.dtype_name)
def test_strides_and_offsets_do_not_matter(dtype: torch.dtype) -> None:
    """A transposed weight, every second column, a start off by one element, a broadcast row: the same bytes."""
    x, weight, _ = operands(9, 77, 33, dtype)
    wanted = matmul.mm(x, weight.t())
    shifted = torch.empty(9 * 77 + 1, dtype=dtype)[1:].view(9, 77).copy_(x)
    spread = torch.empty(9, 154, dtype=dtype)[:, ::2].copy_(x)
    for a in (x, shifted, spread, x.t().contiguous().t()):
        for b in (weight.t(), weight.t().contiguous(), torch.empty(77, 66, dtype=dtype)[:, ::2].copy_(weight.t())):
            assert same(matmul.mm(a, b), wanted)
    assert same(matmul.mm(x[:1].expand(4, 77), weight.t())[3:], wanted[:1])


Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.mark.parametrize("dtype", DTYPES, ids=bits.dtype_name)
def test_every_form_gives_the_same_chain(dtype: torch.dtype) -> None:
    """mm, matmul, bmm, mv, dot and linear in any number of dimensions agree byte for byte."""
    x, weight, bias = operands(6, 77, 33, dtype)
    wanted, biased = expected(x, weight), expected(x, weight, bias)
    column = weight.t()
    forms: dict[str, torch.Tensor] = {
        "mm": matmul.mm(x, column),
        "matmul": matmul.matmul(x, column),
        "matmul, three dimensions": matmul.matmul(x.view(2, 3, 77), column).view(6, 33),
        "matmul, batches": matmul.matmul(x.view(2, 1, 3, 77), column.expand(2, 4, 77, 33))[:, 3].reshape(6, 33),
        "bmm": matmul.bmm(x.view(3, 2, 77), column.expand(3, 77, 33)).view(6, 33),
        "mv": torch.stack([matmul.mv(x, w) for w in weight], 1),
        "dot": torch.stack([torch.stack([matmul.dot(row, w) for w in weight]) for row in x]),
        "matmul, vectors": torch.stack([matmul.matmul(row, column) for row in x]),
    }
    for form, got in forms.items():
        assert same(got, wanted), form
    for form, got in {
        "linear": matmul.linear(x.view(3, 1, 2, 77), weight, bias).view(6, 33),
        "linear, one dimension": torch.stack([matmul.linear(row, weight, bias) for row in x]),
        "addmm": matmul.addmm(bias, x, column),
        "baddbmm": matmul.baddbmm(bias, x.view(3, 2, 77), column.expand(3, 77, 33)).view(6, 33),
        "addmv": torch.stack([matmul.addmv(bias[i], x, w) for i, w in enumerate(weight)], 1),
    }.items():
        assert same(got, biased), form


@pytest.mark.parametrize("dtype", DTYPES, ids=bits.dtype_name)
def test_alpha_and_beta(dtype: torch.dtype) -> None:
    """alpha times the chain, plus beta times c: each product rounded to fp32, then the sum, then the dtype."""
    x, weight, bias = operands(5, 49, 15, dtype)
    got = matmul.addmm(bias, x, weight.t(), alpha=0.3, beta=-1.7)
    chain = reference.matmul(to_values(x), to_values(weight).T, to_values(bias), alpha=0.3, beta=-1.7)
    assert same(got, from_values(chain, dtype))
    nothing = torch.full_like(bias, float("nan"))
    assert same(matmul.addmm(nothing, x, weight.t(), beta=0), matmul.mm(x, weight.t())), "c is not read when beta is 0"


def test_nan_and_signed_zero() -> None:
    """A NaN is stored as 0x7fffffff; a chain starts at +0, so that products of -0 give +0."""
    x = torch.tensor([[float("inf"), 1.0], [-0.0, 0.0], [float("nan"), 2.0]])
    weight = torch.tensor([[1.0, 1.0], [-0.0, 5.0], [-1.0, -1.0]])
    got = matmul.linear(x, weight).view(torch.int32)
    assert got[0, 1] == got[2, 0] == 0x7FFFFFFF  # inf * -0, and a NaN operand
    assert bits.as_bytes(got[1]) == bytes(12), "+0 everywhere"


@pytest.mark.parametrize("path", [matmul.AUTO, matmul.FMA, matmul.DOT], ids=["auto", "fma", "dot"])
@pytest.mark.parametrize("exponent", [-20, -56, -57, -70, -120])
def test_both_sides_of_the_subnormal_guard(exponent: int, path: int) -> None:
    """bf16 products down to the subnormals, where vdpbf16ps flushes: every path gives the chain's bytes."""
    rng = np.random.default_rng(3)
    shape = (40, 75)
    low = exponent + rng.integers(0, 4, size=shape)
    values = np.ldexp(rng.integers(128, 256, size=shape) / 128.0, low).astype(np.float32)
    values[:, 1::2] *= -1
    x, weight = from_values(values[:7], torch.bfloat16), from_values(values, torch.bfloat16)
    wanted = expected(x, weight)
    product = matmul.product(x, weight.t(), path=path)
    assert same(product, wanted)
    if exponent == -57:
        chain = reference.matmul(to_values(x), to_values(weight).T)
        assert (np.abs(to_values(x)[:, :1] * to_values(weight)[:, 0]) < 2.0**-110).any(), chain.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=bits.dtype_name)
def test_empty_sizes(dtype: torch.dtype) -> None:
    """No rows, no columns; no terms gives +0, or the bias."""
    assert matmul.mm(torch.empty(0, 5, dtype=dtype), torch.empty(5, 3, dtype=dtype)).shape == (0, 3)
    assert matmul.mm(torch.empty(2, 5, dtype=dtype), torch.empty(5, 0, dtype=dtype)).shape == (2, 0)
    none = matmul.mm(torch.empty(2, 0, dtype=dtype), torch.empty(0, 3, dtype=dtype))
    assert bits.as_bytes(none) == bytes(none.numel() * none.element_size())


def test_what_is_not_covered_says_so() -> None:
    """Integers go to torch's own kernel; float64 and mixed dtypes are errors that name the operation."""
    whole = torch.ones(2, 2, dtype=torch.int64)
    assert matmul.mm(whole, whole) is NotImplemented
    with pytest.raises(UnsupportedDtype, match="mm"):
        matmul.mm(whole.double(), whole.double())
    with pytest.raises((UsageError, RuntimeError)):
        matmul.mm(whole.float(), whole.to(torch.bfloat16))


def test_a_weight_changed_in_place_is_seen() -> None:
    """Nothing is kept between calls."""
    x, weight, _ = operands(4, 77, 33, torch.float32)
    before = matmul.linear(x, weight)
    weight.data[5] += 1
    after = matmul.linear(x, weight)
    assert not same(before, after)
    assert same(after, expected(x, weight))
