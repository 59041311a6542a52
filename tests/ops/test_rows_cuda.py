"""Rows on a GPU: the reference's bytes and the CPU's, in every row, at every length, from every shape of threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from detinfer import native
from detinfer.bits import first_mismatch
from detinfer.errors import Diverged, NativeError, UnsupportedDtype, UsageError
from detinfer.ops import rows, rows_cuda, rows_proof
from detinfer.ops.evidence import from_values, to_values
from detinfer.reference import rows as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 15, 49, 77, 100, 1000, 2890, 4096, 152064)
ANY = 1 << 40
SHORT = ("part_of_warp", "few_threads")
LIMITS = dict.fromkeys(SHORT, 128) | dict.fromkeys(("any_warp", "warp", "block_1024"), 1024)
LIMITS |= {"block_2048": 2048, "block_4096": 4096, "block_8192": 8192, "many_threads": 8192, "block_16384": 16384}
LIMITS |= dict.fromkeys(("any_block", "stream", "stream_wide"), ANY) | {"cluster": 262144}
"""Elements of a row that a shape takes."""

pytestmark = pytest.mark.gpu


def both(function: str, *args: Any, **kwargs: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The results on the GPU, copied back, and on CPU."""
    moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
    named = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in kwargs.items()}
    found = getattr(rows_cuda, function)(*moved, **named)
    expected = getattr(rows, function)(*args, **kwargs)
    if not isinstance(found, tuple):
        found, expected = (found,), (expected,)
    return [one.cpu() for one in found], list(expected)


def agree(function: str, *args: Any, **kwargs: Any) -> None:
    """Every byte of every result; statistics that CPU rounds to the rows' dtype are fp32 on a GPU, so they are not."""
    for got, wanted in zip(*both(function, *args, **kwargs), strict=True):
        if got.dtype == wanted.dtype:
            assert first_mismatch(got, wanted) is None, (function, first_mismatch(got, wanted))


def other_orders(x: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    """fp32 sums of the rows one element after another, and in 512 lanes in place of 1024."""
    values = to_values(x)
    one_by_one = values[:, 0].copy()
    for i in range(1, values.shape[1]):
        one_by_one = one_by_one + values[:, i]
    rest = values.shape[1] % 512
    padded = np.pad(values, ((0, 0), (0, (512 - rest) % 512)), constant_values=np.float32(-0.0))
    halves = padded.reshape(len(values), -1, 512)
    lanes = halves[:, 0].copy()
    for block in range(1, halves.shape[1]):
        lanes = lanes + halves[:, block]
    half = 256
    while half:
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
        half //= 2
    return [one_by_one, lanes[:, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", rows_cuda.COVERED)
def test_proof(op: str, dtype: torch.dtype) -> None:
    """Each operation is proved in each dtype, twice with the same bytes."""
    cases, results = rows_cuda.prove(op, dtype)
    assert cases > 10
    assert rows_cuda.prove(op, dtype) == (cases, results)


@pytest.mark.parametrize("op", rows_cuda.COVERED)
def test_proof_sees_one_wrong_bit(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bit of the last result."""
    right = rows_cuda.COVERED[op]

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        first.view(-1)[-1:].view(torch.int32 if first.dtype is torch.float32 else torch.int16).bitwise_xor_(1)
        return result

    monkeypatch.setitem(rows_cuda.COVERED, op, wrong)
    with pytest.raises(Diverged, match=op):
        rows_cuda.prove(op, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", WIDTHS)
def test_sums_are_the_references_and_an_other_order_shows(n: int, dtype: torch.dtype) -> None:
    """Rows, columns and all elements; summed one after another, or in half as many lanes, the same rows give other bytes."""
    x = rows_proof.cancelling(n, dtype)
    truth = from_values(reference.row_sum(to_values(x)), torch.float32)
    got = rows_cuda.sum_dims(x.cuda(), [-1], dtype=torch.float32).cpu()
    assert first_mismatch(got, truth) is None
    for wrong, shows_from in zip(other_orders(x), (49, 2890), strict=True):
        if n >= shows_from:
            assert first_mismatch(from_values(wrong, torch.float32), truth) is not None, "another order would not show"
    for function, dims in (("sum_dims", [-1]), ("mean_dims", [1]), ("amax", [1]), ("amin", [-1]), ("sum_dims", [0])):
        agree(function, x, dims)
        agree(function, x, dims, True)
    for function in ("sum_all", "mean_all", "max_all", "min_all"):
        agree(function, x)
    cube = rows_proof.cancelling(n, dtype, 6).reshape(2, 3, n)
    for dims in ([0], [1], [0, 1], [0, 2], [2, 1]):
        agree("sum_dims", cube, dims)
        agree("amax", cube, dims)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", WIDTHS)
def test_softmax_and_norms_are_the_cpus(n: int, dtype: torch.dtype) -> None:
    """Every weight mode, both residual modes, weights of another dtype, bias, results in fp32."""
    x, y, z = rows_proof.logits(n, dtype), rows_proof.spread(n, dtype), rows_proof.cancelling(n, dtype)
    w, b = rows_proof.vector(n, dtype, n), rows_proof.vector(n, dtype, n + 1)
    other = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16
    for function in ("softmax", "log_softmax"):
        agree(function, x)
        agree(function, x, dtype=torch.float32)
        agree(function, x, 0)
    for mode in rows.WEIGHT_MODES:
        for weight in (w, w.float(), w.to(other), None):
            agree("rms_norm", y, weight, 1e-6, mode=mode)
            for residual_mode in rows.RESIDUAL_MODES:
                agree("rms_norm", y, weight, 1e-6, mode=mode, residual=z, residual_mode=residual_mode)
    for weight, bias in ((w, b), (w, None), (None, None), (w.float(), b.float())):
        agree("native_layer_norm", z, [n], weight, bias, 1e-5)
    agree("fused_rms_norm", y, [n], w, None)


def calls_at(n: int, count: int, dtype: torch.dtype, softmax_only: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """Calls of each kind of kernel on ``count`` rows of ``n`` elements."""
    w = rows_proof.vector(n, dtype, n).cuda()
    x = rows_proof.logits(n, dtype, count).cuda()
    y, z = rows_proof.spread(n, dtype, count).cuda(), rows_proof.cancelling(n, dtype, count).cuda()
    softmaxes: dict[str, Callable[[], torch.Tensor]] = {
        "softmax": lambda: rows_cuda.softmax(x),
        "log_softmax": lambda: rows_cuda.log_softmax(x),
        "to fp32": lambda: rows_cuda.softmax(x, dtype=torch.float32),
    }
    if softmax_only:
        return softmaxes
    return softmaxes | {
        "rms_norm": lambda: rows_cuda.rms_norm(y, w, 1e-6, mode="llama"),
        "add + rms_norm": lambda: rows_cuda.rms_norm(y, w, 1e-6, mode="gemma", residual=z)[0],
        "layer_norm": lambda: rows_cuda.native_layer_norm(z, [n], w, w, 1e-5)[0],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LIMITS)
def test_every_shape_of_threads_gives_the_same_bytes(shape: str, dtype: torch.dtype) -> None:
    """Of norms and softmax, at lengths up to its greatest, with few rows and many; longer rows it refuses."""
    ran = 0
    for n in (8, 128, 136, 1024, 1032, 2048, 4096, 5128, 8192, 16384, 20480, 65536, 163840, 262144):
        for count in (1, 5):
            for name, call in calls_at(n, count, dtype, softmax_only=shape in ("cluster", "many_threads")).items():
                expected = call()
                with rows_cuda.hold_shape(shape):
                    if n > LIMITS[shape]:
                        with pytest.raises(NativeError, match="rows: "):
                            call()
                    else:
                        assert first_mismatch(call().cpu(), expected.cpu()) is None, (name, n, count)
                        ran += 1
    assert ran >= 12


@pytest.mark.parametrize("n", [100, 1024, 4096, 152064])
def test_a_row_does_not_see_its_batch(n: int) -> None:
    """At any place among any number of rows, apart, unaligned, backwards; one row is unlike the next."""
    count = 300 if n <= 4096 else 20
    x = rows_proof.spread(n, torch.bfloat16, count).cuda()
    w = rows_proof.vector(n, torch.bfloat16, n).cuda()
    calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "rms_norm": lambda t: rows_cuda.rms_norm(t, w, 1e-6),
        "layer_norm": lambda t: rows_cuda.native_layer_norm(t, [n], w, None, 1e-5)[0],
        "softmax": rows_cuda.softmax,
        "log_softmax": rows_cuda.log_softmax,
        "sum": lambda t: rows_cuda.sum_dims(t, [-1], True),
    }
    wide = torch.zeros(count, n + 5, dtype=x.dtype, device="cuda")[:, 3 : n + 3].copy_(x)
    for name, call in calls.items():
        together = call(x).cpu()
        assert first_mismatch(together[:1], together[1:2]) is not None
        for rows_of in (1, 2, 3, 7, 19, count):
            for start in range(0, count - rows_of + 1, max(rows_of, 17)):
                part = slice(start, start + rows_of)
                assert first_mismatch(call(x[part]).cpu(), together[part]) is None, (name, rows_of, start)
        assert first_mismatch(call(wide).cpu(), together) is None, name
        assert first_mismatch(call(x.flip(0)).cpu(), together.flip(0)) is None, name
        assert first_mismatch(call(x[::2]).cpu(), together[::2]) is None, name
        assert first_mismatch(call(x[:, None].expand(count, 2, n)).cpu()[:, 1], together) is None, name


def test_trailing_zeros_move_nothing() -> None:
    """A sum over a row that is padded by zeros to another length and another kernel."""
    x = rows_proof.cancelling(1000, torch.float32, 5)
    expected = rows.sum_dims(x, [-1])
    for n in (1001, 1024, 1030, 5000, 20000):
        padded = torch.nn.functional.pad(x, (0, n - 1000))
        assert first_mismatch(rows_cuda.sum_dims(padded.cuda(), [-1]).cpu(), expected) is None, n


def test_in_a_cuda_graph() -> None:
    """Captured once and replayed on other values, on a stream of its own."""
    x, other = (rows_proof.spread(n, torch.bfloat16, 9).cuda()[:, :4096] for n in (4096, 4097))
    w = rows_proof.vector(4096, torch.bfloat16, 1).cuda()
    static = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rows_cuda.softmax(rows_cuda.rms_norm(static, w, 1e-6)), rows_cuda.mean_dims(static, [-1])
    static.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    expected = rows_cuda.softmax(rows_cuda.rms_norm(other, w, 1e-6)), rows_cuda.mean_dims(other, [-1])
    assert all(first_mismatch(a.cpu(), b.cpu()) is None for a, b in zip(out, expected, strict=True))


def test_no_elements_and_bad_input() -> None:
    """Empty tensors as torch has them; what does not fit is refused."""
    empty = torch.empty(3, 0, device="cuda")
    assert rows_cuda.sum_dims(empty, [1]).tolist() == [0, 0, 0]
    assert rows_cuda.mean_dims(empty, [1]).isnan().all()
    assert rows_cuda.softmax(empty).shape == (3, 0)
    assert rows_cuda.sum_dims(empty, [0]).shape == (0,)
    with pytest.raises(IndexError, match="no elements"):
        rows_cuda.amax(empty, [1])
    x = torch.zeros(2, 8, device="cuda")
    with pytest.raises(UsageError, match="weight has 7 elements"):
        rows_cuda.rms_norm(x, x[0, :7])
    with pytest.raises(UsageError, match="put both on one device"):
        rows_cuda.rms_norm(x, torch.ones(8))
    with pytest.raises(UsageError, match="have to agree"):
        rows_cuda.rms_norm(x, residual=x[:1])
    with pytest.raises(UnsupportedDtype):
        rows_cuda.softmax(x.double())
    assert isinstance(native.load_gpu(), native.Loaded)
