"""Bytes of tensors: everything that is not the same byte is a difference."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from detinfer import bits
from detinfer.errors import UnsupportedDtype

WIDTHS = (1, 15, 49, 77, 100, 1000, 2890)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bit pattern at all, NaN payloads and subnormals included."""
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def test_bytes_are_little_endian_and_row_major() -> None:
    assert bits.as_bytes(torch.tensor([1.0, -0.0])) == struct.pack("<ff", 1.0, -0.0)
    assert bits.as_bytes(torch.tensor([1.0], dtype=torch.bfloat16)) == b"\x80\x3f"
    assert bits.as_bytes(torch.tensor([258, 1], dtype=torch.int16)) == b"\x02\x01\x01\x00"
    assert bits.as_bytes(torch.tensor([True, False])) == b"\x01\x00"
    assert bits.as_bytes(torch.tensor(2.0)) == struct.pack("<f", 2.0)
    assert bits.as_bytes(torch.empty(3, 0)) == b""
    assert bits.as_bytes(torch.tensor([1 + 2j]).conj()) == struct.pack("<ff", 1.0, -2.0)


def test_bytes_of_views_are_those_of_their_elements() -> None:
    whole = draw((6, 8), torch.bfloat16)
    assert bits.as_bytes(whole.t()) == bits.as_bytes(whole.t().contiguous())
    assert bits.as_bytes(whole[1:5:2, 3:6]) == bits.as_bytes(whole[1:5:2, 3:6].clone())
    assert bits.as_bytes(whole[2:3].expand(4, 8)) == 4 * bits.as_bytes(whole[2])
    assert bits.as_bytes(whole.t()) != bits.as_bytes(whole)


@pytest.mark.parametrize("bad", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")])
def test_a_tensor_without_dense_bytes_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"dense|no bytes"):
        bits.as_bytes(bad)


def test_digest_is_the_documented_formula() -> None:
    t = draw((2, 3), torch.bfloat16)
    assert bits.digest(t) == hashlib.sha256(b"bfloat16[2,3]\n" + bits.as_bytes(t)).hexdigest()


def test_digest_tells_dtype_shape_and_every_bit_apart() -> None:
    t = draw((4, 6), torch.bfloat16)
    others = [t.view(torch.float16), t.view(torch.int16), t.reshape(6, 4), t.reshape(24), t.t(), t[:, :5]]
    for bit in range(t.numel() * 16):
        flipped = t.clone().view(torch.int16).reshape(-1)
        flipped[bit // 16] ^= -(2**15) if bit % 16 == 15 else 1 << bit % 16
        others.append(flipped.view(torch.bfloat16).reshape(4, 6))
    digests = {bits.digest(x) for x in [t, *others]}
    assert len(digests) == 1 + len(others)
    assert bits.digest(torch.empty(0, 3)) != bits.digest(torch.empty(3, 0))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.bool, torch.float8_e4m3fn], ids=bits.dtype_name)
def test_row_digests_are_each_rows_blake2b(dtype: torch.dtype, width: int) -> None:
    t = draw((2, 3, width), torch.uint8).gt(99) if dtype == torch.bool else draw((2, 3, width), dtype)
    found = bits.row_digests(t)
    assert found.shape == (6, 8)
    assert found.dtype == torch.uint8
    for i, row in enumerate(t.reshape(6, width)):
        wanted = hashlib.blake2b(bits.as_bytes(row), digest_size=8).digest()
        assert bytes(found[i].tolist()) == wanted
    assert len({bytes(row.tolist()) for row in found}) == 6 or width == 1


def test_rows_of_odd_shapes() -> None:
    assert bits.row_digests(torch.tensor(1.0)).shape == (1, 8)
    assert bits.row_digests(torch.ones(5)).shape == (1, 8)
    assert bits.row_digests(torch.ones(5, 0)).shape == (5, 8)
    assert bits.row_digests(torch.ones(0, 5)).shape == (0, 8)
    assert bits.row_digests(torch.ones(4, 3, 2), 2).shape == (4, 8)
    assert bits.rows_equal(torch.tensor(1.0), torch.tensor(1.0)).tolist() == [True]
    assert bits.rows_equal(torch.ones(0, 5), torch.ones(0, 5)).shape == (0,)
    assert bits.rows_equal(torch.ones(3, 0), torch.ones(3, 0)).tolist() == [True] * 3


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=bits.dtype_name)
def test_one_flipped_bit_shows_in_its_row_and_in_no_other(dtype: torch.dtype, width: int) -> None:
    a = draw((3, 7, width), dtype)
    assert bits.rows_equal(a, a.clone()).all()
    assert bits.count_mismatches(a, a.clone()) == 0
    assert bits.first_mismatch(a, a.clone()) is None
    for flat in {0, width - 1, 5 * width, 21 * width - 1, 13 * width + width // 2}:
        raw = bits.as_bytes(a)
        place = flat * dtype.itemsize
        changed = bytearray(raw)
        changed[place] ^= 1
        b = torch.frombuffer(changed, dtype=dtype).reshape(a.shape)
        row = flat // width
        assert bits.rows_equal(a, b).tolist() == [i != row for i in range(21)]
        assert bits.count_mismatches(a, b) == 1
        found = bits.first_mismatch(a, b)
        assert found is not None
        assert (found.flat, found.row, found.element) == (flat, row, flat % width)
        assert found.index == (row // 7, row % 7, flat % width)
        assert found.got == "0x" + raw[place : place + dtype.itemsize][::-1].hex()
        assert found.expected == "0x" + bytes(changed[place : place + dtype.itemsize])[::-1].hex()


def test_zeros_of_both_signs_and_nan_payloads_differ() -> None:
    # torch.equal calls the zeros equal and a NaN different from itself: both would be wrong here.
    plus, minus = torch.tensor([[0.0], [1.0]]), torch.tensor([[-0.0], [1.0]])
    assert torch.equal(plus, minus)
    assert bits.rows_equal(plus, minus).tolist() == [False, True]
    found = bits.first_mismatch(plus, minus)
    assert found is not None
    assert (found.got, found.expected, found.ulp) == ("0x00000000", "0x80000000", 0)
    nan = torch.tensor([0x7FC0, 0x7FFF, 0x7FC0], dtype=torch.int16).view(torch.bfloat16)
    assert not torch.equal(nan, nan)
    assert bits.first_mismatch(nan, nan.clone()) is None
    found = bits.first_mismatch(nan[:2], nan[1:])
    assert found is not None
    assert (found.got, found.expected, found.ulp) == ("0x7fc0", "0x7fff", None)


def test_views_at_odd_offsets_compare_as_their_copies_do() -> None:
    base = draw((1 + 3 * 100,), torch.bfloat16)
    a = base[1:].reshape(3, 100)  # its first byte is at no multiple of 8
    assert bits.rows_equal(a, a.clone()).all()
    assert bits.rows_equal(draw((100, 3), torch.float32).t(), draw((100, 3), torch.float32).t().contiguous()).all()


def test_rows_of_several_dimensions() -> None:
    a = draw((4, 3, 2), torch.float32)
    b = a.clone()
    b[2, 1, 0] = 7.0
    assert bits.rows_equal(a, b, ndim_rows=2).tolist() == [True, True, False, True]
    assert (bits.row_digests(a, 2) == bits.row_digests(b, 2)).all(1).tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("other", "word"),
    [(torch.ones(2, 3, dtype=torch.float16), "dtypes"), (torch.ones(3, 2), "shapes"), (torch.ones(6), "shapes")],
)
def test_other_shapes_and_dtypes_are_an_error_not_a_difference(other: torch.Tensor, word: str) -> None:
    for function in (bits.rows_equal, bits.first_mismatch, bits.count_mismatches):
        with pytest.raises(ValueError, match=word):
            function(torch.ones(2, 3), other)


@pytest.mark.parametrize("dtype", FLOATS, ids=bits.dtype_name)
def test_ulp_distance_counts_representable_values(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    one = torch.tensor(1.0, dtype=dtype)
    after = torch.tensor(1.0 + info.eps, dtype=dtype)
    smallest = torch.tensor(info.smallest_normal * info.eps, dtype=dtype)
    inf, nan, zero = (torch.tensor(v, dtype=dtype) for v in (float("inf"), float("nan"), 0.0))
    far = torch.tensor(info.max, dtype=dtype)

    def distance(a: torch.Tensor, b: torch.Tensor) -> int:
        assert int(bits.ulp_distance(a, b)) == int(bits.ulp_distance(b, a))
        return int(bits.ulp_distance(a, b))

    assert distance(one, after) == 1
    assert distance(zero, -zero) == 0
    assert distance(smallest, -smallest) == 2
    assert distance(far, inf) == 1
    assert distance(one, nan) == -1
    assert distance(nan, nan) == -1
    assert distance(inf, -inf) == 2 * (distance(zero, far) + 1)


def test_ulp_distance_of_tensors_and_other_dtypes() -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, float("nan")]])
    b = torch.tensor([[1.0, 2.0000002], [-3.0, 1.0]])
    assert bits.ulp_distance(a, b).tolist() == [[0, 1], [2 * 0x40400000, -1]]
    with pytest.raises(UnsupportedDtype, match="float64"):
        bits.ulp_distance(a.double(), b.double())
    found = bits.first_mismatch(torch.tensor([1, 2]), torch.tensor([1, 3]))
    assert found is not None
    assert (found.got_value, found.expected_value, found.ulp) == (2, 3, None)


class Refuse(TorchDispatchMode):
    """Refuses every operation, as a policy refuses those that nobody covers."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"seen: {op}")


def test_looking_is_no_operation_of_the_model() -> None:
    a, b = draw((3, 5), torch.bfloat16, 1), draw((3, 5), torch.bfloat16, 2)
    functions: list[Callable[[], Any]] = [
        lambda: bits.as_bytes(a),
        lambda: bits.digest(a),
        lambda: bits.row_digests(a),
        lambda: bits.rows_equal(a, b),
        lambda: bits.count_mismatches(a, b),
        lambda: bits.first_mismatch(a, b),
        lambda: bits.ulp_distance(a, b),
    ]
    wanted = [repr(function()) for function in functions]
    with Refuse():
        found = [function() for function in functions]
        with pytest.raises(AssertionError, match="seen"):
            a.t()
    assert [repr(value) for value in found] == wanted


def test_a_mismatch_reads_as_a_sentence() -> None:
    a, b = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16)
    b[1, 2] = 1.0078125
    assert str(bits.first_mismatch(a, b)) == "row 1, element 2: 0x3f80 (1.0), expected 0x3f81 (1.0078125), 1 ULP"


def test_one_element_of_a_strided_tensor_has_bytes() -> None:
    column = torch.arange(8.0)[::3][:1]
    assert column.stride() == (3,) and column.is_contiguous()
    assert bits.as_bytes(column) == b"\0" * 4
    found = bits.first_mismatch(torch.arange(8.0).reshape(2, 4)[1:, 1:2], torch.ones(1, 1))
    assert found is not None and (found.index, found.got, found.expected) == ((0, 0), "0x40a00000", "0x3f800000")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(7, 33), (5, 1), (3, 4, 8), (9,), (), (0, 3), (3, 0)], ids=str)
def test_comparing_where_a_tensor_lies_says_what_the_host_says(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The path of two tensors on a GPU, run on this machine's CPU: row by row the answer of numpy's views."""
    rng = np.random.default_rng(len(shape))
    size = (*shape, dtype.itemsize)
    raw = rng.integers(0, 2 if dtype is torch.bool else 256, size, dtype=np.uint8)
    other = raw.copy()
    flat = other.reshape(-1)
    flat[rng.integers(0, 3, flat.size) == 0] ^= 1
    a, b = (torch.from_numpy(one).reshape(-1).view(dtype).reshape(shape) for one in (raw, other))
    rows, elements = bits.rows_of(a.shape)
    for count, width in ((rows, elements), (a.numel(), 1)):
        for x, y in ((a, b), (a, a.clone()), (a.mT, b.mT) if a.dim() > 1 else (a, b)):
            wanted = bits._equal(x, y, count, width)
            assert bits.as_bytes(bits._equal_there(x, y, count, width)) == wanted.tobytes()


def test_zeros_and_nan_are_compared_by_their_bits_where_they_lie() -> None:
    """-0 is not +0, a NaN equals itself and no NaN of another payload."""
    codes = torch.tensor([[0, 0], [0x7FC0, 0x7FC0], [0x7FC0, 0x7FC1]], dtype=torch.int32).to(torch.int16)
    a = codes.view(torch.bfloat16)
    b = torch.tensor([[0, -32768], [0x7FC0, 0x7FC0], [0x7FC0, 0x7FC0]], dtype=torch.int16).view(torch.bfloat16)
    assert bits._equal_there(a, b, 3, 2).tolist() == [False, True, False]


def test_tensors_are_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, the first mismatch and the histogram of a tensor of several pieces are those of the whole."""
    rng = np.random.default_rng(2)
    a = torch.from_numpy(rng.integers(-1000, 1000, (7, 13))).float()
    b = a.clone()
    b.view(torch.int32)[[3, 6, 6], [5, 0, 12]] += torch.tensor([1, 7, 2], dtype=torch.int32)
    whole = bits.count_mismatches(a, b), bits.first_mismatch(a, b), bits.ulp_histogram(a, b)
    assert (whole[0], whole[2]) == (3, {"1": 1, "2": 1, "5-8": 1})
    monkeypatch.setattr(bits, "PIECE", 10)
    assert (bits.count_mismatches(a, b), bits.first_mismatch(a, b), bits.ulp_histogram(a, b)) == whole
    assert bits.first_mismatch(a, a.clone()) is None


@pytest.mark.gpu
def test_tensors_of_one_gpu_are_compared_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor travels to the host, and the answers are the host's."""
    rng = np.random.default_rng(4)
    a = torch.from_numpy(rng.integers(-9, 9, (40, 65))).bfloat16()
    b = a.clone()
    b.view(torch.int16)[17, 3] ^= 1
    x, y = a.cuda(), b.cuda()
    wanted = bits.rows_equal(a, b), bits.count_mismatches(a, b), bits.first_mismatch(a, b), bits.ulp_histogram(a, b)
    monkeypatch.setattr(bits, "_flat_bytes", lambda t: pytest.fail("copied to the host"))
    assert bits.rows_equal(x, y).tolist() == wanted[0].tolist()
    assert (bits.count_mismatches(x, y), bits.ulp_histogram(x, y)) == (wanted[1], wanted[3])
    monkeypatch.undo()
    assert bits.first_mismatch(x, y) == wanted[2]
