"""linear on a GPU: a row's bytes are those of the row alone by the plain kernel, by every path and at every number of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from detinfer.bits import first_mismatch
from detinfer.errors import Diverged, UnsupportedDtype, UsageError
from detinfer.ops import matmul_cuda
from detinfer.ops.matmul_cuda import adversarial, linear, no_split, pieces, prove

DTYPES = (torch.bfloat16, torch.float16)
SHAPES = ((16, 16), (49, 64), (100, 1000), (1280, 8192), (2890, 2880), (576, 1536), (7168, 512), (24576, 256))
"""(N, K): of few and of many blocks, of widths that are no multiple of a block, of a k that ends inside a chunk."""


def operands(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x and weight in whose products an order shows."""
    device = torch.device("cuda", torch.cuda.current_device())
    x, w = adversarial(rows, k, dtype, device, rows), adversarial(n, k, dtype, device, n)
    if k >= 16:
        x[:, 1] = x[:, k - k // 7 - 1] = 900.0
    return x, w


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    matmul_cuda._proofs.clear()
    yield
    matmul_cuda._proofs.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_rows_do_not_depend_on_their_number(n: int, k: int, dtype: torch.dtype) -> None:
    x, w = operands(130, n, k, dtype)
    expected = linear(x, w, path="reference")
    reversed_k = linear(x.flip(1), w.flip(1), path="reference")
    if k >= 64:
        assert first_mismatch(reversed_k, expected) is not None, "these inputs would not show a wrong order"
    exact = x.double() @ w.double().t()
    bound = (x.double().abs() @ w.double().abs().t()) * (k * 2.0**-23) + exact.abs() * torch.finfo(dtype).eps
    assert bool(((expected.double() - exact).abs() <= bound).all()), "invariant, but wrong"
    for rows in range(1, 131):
        start = (7 * rows) % (131 - rows)
        assert first_mismatch(linear(x[start : start + rows], w), expected[start : start + rows]) is None, rows


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_and_a_bias(dtype: torch.dtype) -> None:
    x, w = operands(40, 300, 640, dtype)
    bias = adversarial(1, 300, dtype, x.device, 5)[0]
    expected = linear(x, w, bias, path="reference")
    assert first_mismatch(expected, linear(x, w, path="reference")) is not None
    wide = torch.zeros(40, 1300, dtype=dtype, device=x.device)
    wide[:, 1:1281:2] = x
    shifted = torch.zeros(40 * 640 + 1, dtype=dtype, device=x.device)[1:].view(40, 640).copy_(x)
    column = w.t().contiguous().t()
    for given, weight in (
        (x, w),
        (wide[:, 1:1281:2], w),
        (shifted, w),
        (x, column),
        (x[:, None].expand(40, 1, 640), w),
    ):
        found = linear(given, weight, bias.repeat_interleave(2)[::2])
        assert first_mismatch(found.reshape(40, 300), expected) is None
    odd = linear(x[:, :77], w[:, :77].contiguous())
    assert first_mismatch(odd, linear(x[:, :77].contiguous(), w[:, :77].contiguous(), path="reference")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(576, 576), (1280, 8192), (4096, 2880)])
def test_a_proof_lets_cublaslt_run_and_changes_no_bit(n: int, k: int, dtype: torch.dtype) -> None:
    x, w = operands(1500, n, k, dtype)
    before = linear(x, w)
    proof = prove(w, rows=(65, 128, 256, 777, 1024))
    assert proof.compared == sum(proof.rows) * n
    assert first_mismatch(linear(x, w), before) is None
    assert first_mismatch(before, linear(x, w, path="reference")) is None


@pytest.mark.gpu
def test_a_split_sum_is_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's default splits k here: with the switch out of order the proof says so, and torch's default is no path."""
    _, w = operands(1, 4096, 12288, torch.bfloat16)
    monkeypatch.setattr(matmul_cuda, "no_split", nullcontext)
    with pytest.raises(Diverged, match="cuBLASLt without split-K at 16 x 12288 x 4096"):
        prove(w, rows=(16,))


@pytest.mark.gpu
def test_settings_are_put_back() -> None:
    flags = torch.backends.cuda.matmul
    before = (torch.backends.cuda.preferred_blas_library(), flags.allow_bf16_reduced_precision_reduction)
    with pytest.raises(ZeroDivisionError), no_split():
        raise ZeroDivisionError
    assert (torch.backends.cuda.preferred_blas_library(), flags.allow_bf16_reduced_precision_reduction) == before


@pytest.mark.gpu
def test_what_does_not_fit_is_refused() -> None:
    x, w = operands(4, 16, 32, torch.bfloat16)
    with pytest.raises(UsageError, match=r"operands of shapes \[4, 32\], \[16, 16\] do not fit"):
        linear(x, w[:, :16])
    with pytest.raises(UnsupportedDtype, match=r"torch\.float32"):
        linear(x.float(), w.float())
    with pytest.raises(UsageError, match="one dtype"):
        linear(x, w.half())
    with pytest.raises(UsageError, match="no path 'fast'"):
        linear(x, w, path="fast")
    assert linear(x[:0], w).shape == (0, 16)


def test_rows_are_cut_into_proved_sizes_then_64() -> None:
    assert list(pieces(777, (128, 512))) == [
        (0, 512, "cublaslt_no_split"),
        (512, 128, "cublaslt_no_split"),
        (640, 128, "cublaslt_no_split"),
        (768, 9, "skinny"),
    ]
    assert list(pieces(130, ())) == [(0, 64, "skinny"), (64, 64, "skinny"), (128, 2, "skinny")]
    assert list(pieces(0, (128,))) == []
