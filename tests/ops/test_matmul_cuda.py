"""matmul on a GPU: a row's bytes are those of the row alone by the plain kernel, by every path and at every number of rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer.bits import dtype_name, first_mismatch
from detinfer.errors import Diverged, NativeError, UnsupportedDtype, UsageError
from detinfer.ops import matmul_cuda, matmul_cuda_proof, matmul_store, matmul_table, matmul_wide
from detinfer.ops.evidence import from_values, to_values
from detinfer.ops.matmul_cuda import COVERED, linear, product, prove
from detinfer.ops.matmul_cuda_proof import adversarial, operands, prove_shape
from detinfer.reference import matmul as reference

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)
SHAPES = ((16, 16), (49, 64), (100, 1000), (1280, 8192), (2890, 2880), (576, 1536), (7168, 512), (24576, 256))
"""(N, K): of few and of many blocks, of widths that are no multiple of a block, of a k that ends inside a chunk."""


def _kernels() -> Iterator[tuple[torch.dtype, str, int]]:
    for dtype in DTYPES:
        single = dtype is torch.float32
        for path, more in (("tile", int(single)), ("stream" if single else "skinny", 0)):
            yield from ((dtype, path, variant) for variant in range(matmul_cuda_proof.VARIANTS[path] + more))


KERNELS = list(_kernels())
"""Every kernel of csrc but the plain one, by dtype, path and variant."""


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def _forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No table, and none on disk."""
    monkeypatch.setenv("DETINFER_CACHE", str(tmp_path))
    matmul_store.state.cache_clear()
    matmul_table.forget()
    yield
    matmul_store.state.cache_clear()
    matmul_table.forget()


def expect(found: torch.Tensor, expected: torch.Tensor, where: object = None) -> None:
    assert first_mismatch(found, expected) is None, (where, first_mismatch(found, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_rows_do_not_depend_on_their_number(n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    x, w = operands(130, n, k, dtype, device)
    expected = linear(x, w, path="reference")
    if k >= 64:
        turned = linear(x.flip(1), w.flip(1), path="reference")
        assert first_mismatch(turned, expected) is not None, "these inputs would not show a wrong order"
    exact = x.double() @ w.double().t()
    bound = (x.double().abs() @ w.double().abs().t()) * (k * 2.0**-23) + exact.abs() * torch.finfo(dtype).eps
    assert bool(((expected.double() - exact).abs() <= bound).all()), "invariant, but wrong"
    shifted = torch.empty(130 * k + 1, dtype=dtype, device=device)[1:].view(130, k).copy_(x)
    for rows in range(1, 131):
        start = (7 * rows) % (131 - rows)
        expect(linear(x[start : start + rows], w), expected[start : start + rows], rows)
        expect(linear(shifted[start : start + rows], w), expected[start : start + rows], ("shifted", rows))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "path", "variant"), KERNELS, ids=lambda value: str(value).removeprefix("torch."))
def test_every_kernel_gives_the_same_bytes(dtype: torch.dtype, path: str, variant: int, device: torch.device) -> None:
    for n, k in ((1280, 8192), (300, 5000), (130, 1416), (576, 576)):
        x, w = operands(515, n, k, dtype, device)
        c = adversarial(515, n, dtype, device, 3)
        expected = product(x, w, c, 0.75, -1.5, path="reference")
        turned = product(x.flip(1), w.flip(1), c, 0.75, -1.5, path="reference")
        assert first_mismatch(turned, expected) is not None, "these inputs would not show a wrong order"
        for rows in (1, 2, 7, 8, 15, 33, 64, 65, 100, 129, 511, 512, 515):
            if path == "skinny" and rows > matmul_cuda.SKINNY_ROWS:
                continue
            found = product(x[:rows], w, c[:rows], 0.75, -1.5, path=path, variant=variant)
            expect(found, expected[:rows], (n, k, rows))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 3, 77, 640])
def test_fp32_is_one_chain_of_fmas(k: int, device: torch.device) -> None:
    """The bits of the CPU's reference, written in numpy."""
    x, w = operands(9, 33, k, torch.float32, device)
    values = to_values(x.cpu()), to_values(w.t().cpu())
    expected = from_values(reference.matmul(*values), torch.float32)
    if k >= 16:
        turned = from_values(reference.matmul(values[0][:, ::-1], values[1][::-1]), torch.float32)
        assert first_mismatch(turned, expected) is not None
    expect(linear(x, w).cpu(), expected)
    expect(linear(x, w, path="reference").cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("rows", [40, 200])
def test_any_strides_and_a_bias(dtype: torch.dtype, rows: int, device: torch.device) -> None:
    x, w = operands(rows, 300, 640, dtype, device)
    bias = adversarial(1, 300, dtype, device, 5)[0]
    expected = linear(x, w, bias, path="reference")
    assert first_mismatch(expected, linear(x, w, path="reference")) is not None
    wide = torch.zeros(rows, 1300, dtype=dtype, device=device)
    wide[:, 1:1281:2] = x
    shifted = torch.zeros(rows * 640 + 1, dtype=dtype, device=device)[1:].view(rows, 640).copy_(x)
    column = w.t().contiguous().t()
    for given, weight in (
        (x, w),
        (wide[:, 1:1281:2], w),
        (shifted, w),
        (x, column),
        (x.t().contiguous().t(), column),
        (x[:, None].expand(rows, 1, 640), w),
    ):
        found = linear(given, weight, bias.repeat_interleave(2)[::2])
        expect(found.reshape(rows, 300), expected)
    odd = linear(x[:, :77], w[:, :77].contiguous())
    expect(odd, linear(x[:, :77].contiguous(), w[:, :77].contiguous(), path="reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_batches_are_products_of_their_own(dtype: torch.dtype, device: torch.device) -> None:
    a, _ = operands(5 * 37, 8, 2100, dtype, device)
    _, b = operands(8, 5 * 60, 2100, dtype, device)
    a, b = a.view(5, 37, 2100), b.view(5, 60, 2100).transpose(1, 2)
    c = adversarial(5 * 37, 60, dtype, device, 2).view(5, 37, 60)
    for i in range(5):
        weight = b[i].t()
        plain = product(a[i], weight, path="reference")
        assert first_mismatch(product(a[i].flip(1), weight.flip(1), path="reference"), plain) is not None
        for mine in (b, b.contiguous()):
            expect(COVERED["aten::bmm"](a, mine)[i], plain)
        expect(COVERED["aten::matmul"](a[None, :, :3], b)[0, i], plain[:3])
        added = product(a[i], weight, c[i], 2.0, 0.5, path="reference")
        expect(COVERED["aten::baddbmm"](c, a, b, beta=0.5, alpha=2)[i], added)
        expect(COVERED["aten::addmm"](c[i], a[i], b[i], beta=0.5, alpha=2), added)
        expect(COVERED["aten::mm"](a[i].t().contiguous().t(), b[i].contiguous()), plain)
        expect(COVERED["aten::addmm"](c[i, 0] * torch.nan, a[i], b[i], beta=0), plain)
        expect(COVERED["aten::mv"](a[i], b[i][:, 0]), product(a[i], weight[:1], path="reference")[:, 0])
        expect(COVERED["aten::dot"](a[i, 0], b[i][:, 0]), product(a[i, :1], weight[:1], path="reference")[0, 0])
    assert COVERED["aten::bmm"](a[:0], b[:0]).shape == (0, 37, 60)
    empty = COVERED["aten::addmm"](c[0], a[0, :, :0], b[0, :0])
    expect(empty, c[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("op", list(COVERED))
def test_each_operation_has_a_proof(op: str, dtype: torch.dtype) -> None:
    cases, results = prove(op, dtype)
    assert cases > 0 and len(results) == cases * dtype.itemsize


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
@pytest.mark.parametrize(("n", "k", "bias"), [(576, 576, True), (1280, 8192, True), (4096, 4096, False)])
def test_a_shape_is_proved_at_every_number_of_rows(
    n: int, k: int, bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    x, w = operands(1500, n, k, dtype, device)
    c = adversarial(1, n, dtype, device, 5)[0] if bias else None
    before = linear(x, w, c)
    expect(linear(x[:300], w, c), linear(x[:300], w, c, path="reference"))
    measured = prove_shape(n, k, dtype, device, bias=bias)
    assert measured.table.compared >= 1024 * 1025 // 2 * n
    default_differs = False
    for rows in (*range(1, 140), 511, 777, 1024, 1025, 1499, 1500):
        expect(linear(x[:rows], w, c), before[:rows], rows)
        plain = torch.nn.functional.linear(x[:rows], w, c)
        default_differs |= first_mismatch(plain, before[:rows]) is not None
    if k >= 4096:
        assert default_differs, "torch's default splits k here: a sweep in which it does not show proves little"


@pytest.mark.gpu
def test_a_kernel_with_another_order_is_not_proved(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """cuBLASLt with other bytes is left out, and csrc's kernels with other bytes end the proof."""

    def turned(_: bytes, x: torch.Tensor, w: torch.Tensor, c: torch.Tensor | None) -> matmul_cuda.Step:
        return flipped("tile", x, w, c)

    def flipped(path: str, x: torch.Tensor, w: torch.Tensor, *more: Any, **named: Any) -> matmul_cuda.Step:
        x, w = x.flip(1), w.flip(1)
        step = whole(path, x, w, *more, **named)
        return lambda _, __, c_at, out_at, stream: step(x.data_ptr(), w.data_ptr(), c_at, out_at, stream)

    whole = matmul_cuda.kernel
    monkeypatch.setattr(matmul_cuda, "cublaslt_kernel", turned)
    monkeypatch.setattr(matmul_cuda_proof, "_graph_time", lambda choice, *_: 1.0 + (choice.path != "cublaslt_no_split"))
    measured = prove_shape(1024, 512, torch.bfloat16, device)
    assert measured.failed and "cuBLASLt gives other bytes at" in measured.failed[0]
    assert all(choice.path != "cublaslt_no_split" for choice in measured.table.choices)

    def wrong(path: str, x: torch.Tensor, *more: Any, **named: Any) -> matmul_cuda.Step:
        return (flipped if path == "skinny" and len(x) == 7 else whole)(path, x, *more, **named)

    monkeypatch.setattr(matmul_cuda, "kernel", wrong)
    monkeypatch.setattr(matmul_cuda_proof, "_graph_time", lambda choice, *_: 1.0 + (choice.path != "skinny"))
    with pytest.raises(Diverged, match=r"skinny .* at 7 x 512 x 1024"):
        prove_shape(1024, 512, torch.bfloat16, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_it_runs_inside_a_graph(dtype: torch.dtype, device: torch.device) -> None:
    x, w = operands(200, 512, 2560, dtype, device)
    expected = linear(x, w)
    prove_shape(512, 2560, dtype, device, rows=(1, 200))
    linear(x, w)
    static = torch.zeros_like(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [linear(static, w), linear(static[:3], w), COVERED["aten::mm"](static, w.t())]
    static.copy_(x)
    graph.replay()
    for one in found:
        expect(one, expected[: len(one)])


@pytest.mark.gpu
def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x, w = operands(4, 16, 32, torch.bfloat16, device)
    with pytest.raises(UsageError, match=r"operands of shapes \[4, 32\], \[16, 16\] do not fit"):
        linear(x, w[:, :16])
    with pytest.raises(UnsupportedDtype, match=r"torch\.float64"):
        linear(x.double(), w.double())
    with pytest.raises(UsageError, match="one dtype"):
        linear(x, w.half())
    with pytest.raises(UsageError, match="one GPU"):
        linear(x, w.cpu())
    with pytest.raises(UsageError, match="no path 'fast'"):
        linear(x, w, path="fast")
    with pytest.raises(NativeError, match="at most 512 rows"):
        linear(x.repeat(200, 1), w, path="skinny")
    assert linear(x[:0], w).shape == (0, 16)
    assert matmul_cuda.mm(x.long(), w.t().long()) is NotImplemented


def test_a_table_chooses_by_rows() -> None:
    key = matmul_table.Key(8, 16, torch.bfloat16, 16, False, 0)
    choices = (matmul_table.Choice("skinny", 3), matmul_table.Choice("cublaslt_no_split", -1, b"a"))
    table = matmul_table.Table(key, (64, 16384), choices, 1024, (1024, 2048, 4096), 1)
    assert [table.choose(rows).path for rows in (1, 64, 65, 20000)] == ["skinny"] * 2 + ["cublaslt_no_split"] * 2
    assert [table.piece(rows) for rows in (1, 1024, 1025, 2047, 2048, 4095, 9999)] == [
        1,
        1024,
        1024,
        1024,
        2048,
        2048,
        4096,
    ]
    matmul_table.use([table])
    assert matmul_table.table(key) is table and matmul_table.table(key._replace(added=True)) is None


class Recorded:
    """Stands for the kernels on a machine without a GPU: which of them a plan asks for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, int]] = []
        monkeypatch.setattr(matmul_cuda, "kernel", lambda path, x, *_: self.asked.append((path, len(x))) or print)
        monkeypatch.setattr(
            matmul_cuda, "cublaslt_kernel", lambda algorithm, x, *_: self.asked.append(("cublaslt_no_split", len(x)))
        )
        monkeypatch.setattr(matmul_cuda, "_accelerates", lambda device: True)
        monkeypatch.setattr(matmul_cuda, "processors", lambda device: 132)
        monkeypatch.setattr(matmul_cuda, "wide_kernel", self._wide)
        monkeypatch.setattr(matmul_cuda.matmul_wide, "available", lambda device: True)
        self.proved = True
        monkeypatch.setattr(matmul_cuda.cublaslt, "ready", lambda device: True)

    def _wide(self, x: torch.Tensor, *_: Any) -> Any:
        if not self.proved:
            return None
        self.asked.append(("wide", len(x)))
        return print

    def plan(
        self, x: torch.Tensor, w: torch.Tensor, c: torch.Tensor | None = None, alpha: float = 1, vector: bool = True
    ) -> list[tuple[str, int]]:
        self.asked.clear()
        steps = matmul_cuda.plan(x, w, c, alpha, 1.0, vector)
        assert [row * x.shape[1] * x.element_size() for row, _, _ in steps] == [offset for _, offset, _ in steps]
        return list(self.asked)


def test_where_cublaslt_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only in the form that was proved, in pieces that were proved; all else is right by construction."""
    seen = Recorded(monkeypatch)
    x, w = torch.zeros(5000, 64, dtype=torch.bfloat16), torch.zeros(96, 64, dtype=torch.bfloat16)
    bias = torch.zeros(128, dtype=torch.bfloat16)
    assert seen.plan(x[:7], w) == [("skinny", 7)], "nothing was measured"
    choices = (matmul_table.Choice("skinny", 1), matmul_table.Choice("cublaslt_no_split", -1, b"a"))
    for added in (False, True):
        key = matmul_table.Key(96, 64, torch.bfloat16, 64, added, None)  # type: ignore[arg-type]
        matmul_table.use([matmul_table.Table(key, (8, 16384), choices, 1024, (1024, 2048, 3072, 4096), 1)])
    lt = "cublaslt_no_split"
    assert seen.plan(x[:7], w) == [("skinny", 7)]
    assert seen.plan(x, w) == [(lt, 4096), (lt, 904)]
    assert seen.plan(x[:1028], w) == [(lt, 1024), ("skinny", 4)]
    assert seen.plan(x.repeat(8, 1), w)[0] == (lt, 4096)
    assert seen.plan(x[:9], w, bias[:96].expand(9, 96)) == [(lt, 9)]
    others: list[tuple[torch.Tensor | None, float, bool]] = [
        (bias[:96].expand(9, 96), 2.0, True),  # alpha
        (bias[1:97].expand(9, 96), 1.0, True),  # not on 16 bytes
        (bias[:96].expand(9, 96), 1.0, False),  # an address that the call does not know
        (torch.zeros(9, 96, dtype=torch.bfloat16), 1.0, False),  # a matrix
    ]
    for c, alpha, vector in others:
        assert seen.plan(x[:9], w, c, alpha, vector) == [("skinny", 9)], (alpha, vector)
    gaps = torch.zeros(9, 128, dtype=torch.bfloat16)[:, :64]
    assert seen.plan(gaps, w) == [("skinny", 9)], "a proof holds for rows without gaps"
    shifted = torch.zeros(9 * 64 + 1, dtype=torch.bfloat16)[1:].view(9, 64)
    assert seen.plan(shifted, w) == [("tile", 9)]
    assert seen.plan(x[:0], w) == [("tile", 0)]
    monkeypatch.setattr(matmul_cuda.cublaslt, "ready", lambda device: False)
    assert seen.plan(x[:9], w) == [("skinny", 9)], "a handle is not made while a graph is captured"
    monkeypatch.setattr(matmul_cuda, "_accelerates", lambda device: False)
    assert seen.plan(gaps, w) == [("tile", 9)]


def test_where_wide_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing was measured, above what ``skinny`` takes and where that has too many columns, in the one form of its
    epilogue; csrc's kernels where it cannot."""
    seen = Recorded(monkeypatch)
    x, w = torch.zeros(5000, 64, dtype=torch.bfloat16), torch.zeros(96, 64, dtype=torch.bfloat16)
    bias = torch.zeros(128, dtype=torch.bfloat16)
    assert seen.plan(x[:512], w) == [("skinny", 512)]
    assert seen.plan(x[:513], w) == [("wide", 513)] and seen.plan(x, w) == [("wide", 5000)]
    assert seen.plan(x, w, bias[:96].expand(5000, 96)) == [("wide", 5000)]
    assert seen.plan(x, w, bias[:96].expand(5000, 96), 2.0) == [("tile", 5000)], "alpha"
    assert seen.plan(x, w, bias[:96].expand(5000, 96), vector=False) == [("tile", 5000)], "an address it does not know"
    assert seen.plan(x, w, torch.zeros(5000, 96, dtype=torch.bfloat16), vector=False) == [("tile", 5000)], "a matrix"
    assert seen.plan(x.float(), w.float()) == [("stream", 5000)]
    many = torch.zeros(12288, 64, dtype=torch.bfloat16)
    assert [seen.plan(x[:m], many)[0][0] for m in (64, 65, 512)] == ["skinny", "wide", "wide"]
    assert seen.plan(x[:65], many, alpha=2.0) == [("skinny", 65)]
    seen.proved = False
    assert seen.plan(x[:65], many) == [("skinny", 65)]
    assert seen.plan(x, w) == [("tile", 5000)], "inside a capture, before its code was proved"
    choices = (matmul_table.Choice("wide"),)
    key = matmul_table.Key(96, 64, torch.bfloat16, 64, False, None)  # type: ignore[arg-type]
    matmul_table.use([matmul_table.Table(key, (16384,), choices, 1024, (1024, 2048), 1)])
    assert seen.plan(x[:7], w) == [("skinny", 7)]
    seen.proved = True
    assert seen.plan(x[:7], w) == [("wide", 7)] and seen.plan(x[:1500], w) == [("wide", 1024), ("wide", 476)]


@pytest.mark.gpu
@pytest.mark.usefixtures("capability_9")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "k"), [(288, 720), (1280, 2048), (4096, 576)])
def test_many_rows_run_wide(
    n: int, k: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row has the plain kernel's bytes, in each of the tiles, in rows with gaps, with a bias; alone it has them too."""
    most = 4500
    x, w = operands(most, n, k, dtype, device)
    bias = adversarial(1, n, dtype, device, 5)[0]
    gaps = torch.zeros(most, k + 16, dtype=dtype, device=device)[:, :k].copy_(x)
    started: list[tuple[int, int]] = []
    start = matmul_wide.Code.start
    monkeypatch.setattr(
        matmul_wide.Code, "start", lambda code, *args: (started.append(code.kind.tile), start(code, *args))
    )
    seen = set()
    for added in (None, bias):
        expected = linear(x, w, added, path="reference")
        turned = linear(x[:64].flip(1), w.flip(1), added, path="reference")
        assert first_mismatch(turned, expected[:64]) is not None, "these inputs would not show a wrong order"
        for rows in (1, 512, 513, 640, 777, 1025, 2048, most):
            for given in (x, gaps):
                started.clear()
                expect(linear(given[most - rows :], w, added), expected[most - rows :], rows)
                assert bool(started) == (matmul_cuda.by_rule(rows, n, dtype, 0).path == "wide"), rows
                seen |= set(started)
        expect(COVERED["aten::addmm"](bias, x, w.t(), alpha=2), linear(x + x, w, bias, path="reference"))
        expect(linear(x[7:107], w, added, path="wide"), expected[7:107])
    assert len(seen) > 1, "other tiles for other numbers of rows"


@pytest.mark.gpu
@pytest.mark.usefixtures("capability_9")
def test_wide_is_not_proved_inside_a_capture(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """There ``tile`` runs, and is not kept for the calls that come after."""
    x, w = operands(600, 512, 320, torch.bfloat16, device)
    want = linear(x, w, path="reference")
    monkeypatch.setattr(matmul_wide, "_codes", {})
    linear(x, w, path="tile")  # loads the kernel
    torch.cuda.synchronize()
    for proved in (False, True):
        if proved:
            expect(linear(x, w), want)
        assert bool(matmul_wide._codes) == proved
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = linear(x, w)
        assert bool(matmul_wide._codes) == proved
        found.zero_()
        graph.replay()
        expect(found, want, proved)


@pytest.mark.gpu
@pytest.mark.usefixtures("capability_9")
def test_what_wide_does_not_take(device: torch.device) -> None:
    """Held to it, it is refused; left to the rule, another path has the bytes."""
    x, w = operands(600, 512, 320, torch.bfloat16, device)
    for k, n in ((312, 512), (320, 250), (320, 264)):
        given, weight = x[:, :k].contiguous(), w[:n, :k].contiguous()
        with pytest.raises(NativeError, match="wide needs compute capability 9"):
            linear(given, weight, path="wide")
        expect(linear(given, weight), linear(given, weight, path="reference"))


def test_fp32_streams_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Recorded(monkeypatch)
    x, w = torch.zeros(3000, 20), torch.zeros(7, 20)
    assert seen.plan(x, w) == [("stream", 3000)]
    assert seen.plan(x[:, :18], w[:, :18]) == [("tile", 3000)]
    key = matmul_table.Key(7, 20, torch.float32, 20, False, None)  # type: ignore[arg-type]
    matmul_table.use([matmul_table.Table(key, (4096,), (matmul_table.Choice("stream", 3),), 0, (128,), 1)])
    assert seen.plan(x, w) == [("stream", 3000)]


def test_what_lies_badly_is_copied_where_that_pays() -> None:
    x, w = torch.ones(300, 64, dtype=torch.bfloat16), torch.ones(96, 64, dtype=torch.bfloat16)
    column = w.t().contiguous().t()
    assert matmul_cuda._placed(x, w) == (x, w)
    few = matmul_cuda._placed(x[:5], column)
    assert few[1] is column, "a weight is not copied for few rows"
    moved = matmul_cuda._placed(x, column)[1]
    assert moved.stride() == (64, 1) and first_mismatch(moved, w) is None
    shifted = torch.ones(300 * 64 + 1, dtype=torch.bfloat16)[1:].view(300, 64)
    copied = matmul_cuda._placed(shifted, w)[0]
    assert copied.data_ptr() % 16 == 0 and copied.data_ptr() != shifted.data_ptr()
    one_row = x[:1].expand(300, 64)
    assert matmul_cuda._placed(one_row, w)[0].stride() == (64, 1), "rows that lie on one another are copied"
    odd = torch.ones(300, 63, dtype=torch.bfloat16)
    assert matmul_cuda._placed(odd, torch.ones(96, 63, dtype=torch.bfloat16))[0] is odd
