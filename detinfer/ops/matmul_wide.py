"""``wide``: products of many rows by Triton's ``matmul_triton``, for ``linear`` and for experts, in bf16 and fp16.

Machine code is started only after it was proved: ``code`` has one for a ``Kind``, made and compared with the plain kernel the
first time that the kind is asked for (``matmul_wide_proof``). Inside the capture of a CUDA graph, which runs nothing, there
is none for a kind that was never met, and the caller runs ``tile``: the same bytes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from detinfer.errors import UsageError

DTYPES = (torch.bfloat16, torch.float16)
ROWS = (64, 128)
"""Rows of a tile. No choice changes a bit."""

COLUMNS = 256
"""Columns of a tile of many experts: of 128 and 256 the faster one, or within 6 % of it, in what was measured."""

BAND = 16
"""Tiles of rows that programs go down before the next columns: 16 of 128 rows are as long as 8 of 256 columns are wide, and
an H200 runs 132 programs at once."""

LEAST_ROWS = 128
"""Rows of a product below which ``wide`` was not measured."""

_STAGES = 3
_UNIT = 16  # what Triton asks of a number: whether it is a multiple of this
_MOST = 2**31  # beyond, numbers have another type in Triton


class Kind(NamedTuple):
    """All that machine code depends on, of products whose operands ``takes`` and ``lies`` let in: of them every pointer is
    on 16 bytes, and every size and stride that Triton looks at a multiple of 16 or the 1 of the contiguous dimension."""

    device: int
    dtype: torch.dtype
    out: torch.dtype
    tile: tuple[int, int]
    """Its rows and columns."""
    grouped: bool
    biased: bool
    even: bool
    """K is a multiple of 64."""
    across: bool
    """The weights' columns are contiguous, not their k."""


class Code:
    """Machine code for a kind. ``made`` is what Triton made of the kernel."""

    def __init__(self, kind: Kind, made: Any) -> None:
        self.kind, self.made = kind, made
        self._constants = tuple(constants(kind).values())

    def start(self, pointers: tuple[int, ...], numbers: tuple[int, ...], stream: int, most_tiles: int = 0) -> None:
        """``pointers``: the addresses of x, weights, bias, order, tiles and out, any where the kind has none. ``numbers``:
        assignments, places, N, K, the strides of x's rows, of experts, of the weights' columns and of their k.

        The current device must be the kind's. ``most_tiles`` of grouped assignments come from ``moe_cuda.Groups``.
        """
        grid = (_programs(self.kind.tile, numbers[0], numbers[2], most_tiles), 1, 1)
        self.made[grid](*pointers, *numbers, *self._constants, stream=stream)


def constants(kind: Kind) -> dict[str, Any]:
    """The kernel's constants in its own order of them."""
    return {
        "BM": kind.tile[0], "BN": kind.tile[1], "BAND": BAND, "GROUPED": kind.grouped, "BIASED": kind.biased,
        "EVEN": kind.even, "ACROSS": kind.across,
    }  # fmt: skip


def _programs(tile: tuple[int, int], rows: int, n: int, most_tiles: int = 0) -> int:
    return (most_tiles or -(-rows // tile[0])) * -(-n // tile[1])


@functools.cache
def available(device: int) -> bool:
    """Whether ``wide`` is for this GPU: compute capability 9, where it was measured, and a Triton that can be imported."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        from detinfer.ops import matmul_triton  # noqa: F401
    except ImportError:
        return False
    return True


def takes(weight: torch.Tensor) -> bool:
    """Whether a weight [(experts,) N, K] is of the one kind that was measured: a full tile of columns, what is not
    contiguous in multiples of 16 elements, on 16 bytes."""
    *lead, n, k = weight.shape
    *_, w_n, w_k = weight.stride()
    apart = (n, k, w_n if w_k == 1 else w_k, *(weight.stride()[:1] if lead else ()))
    return (
        weight.dtype in DTYPES
        and 1 in (w_n, w_k)
        and n >= COLUMNS
        and k > 0
        and all(number % _UNIT == 0 and number < _MOST for number in apart)
        and weight.data_ptr() % 16 == 0
    )


def lies(x: torch.Tensor) -> bool:
    """The same of the other operand, [rows, K]."""
    (rows, _), (step, unit) = x.shape, x.stride()
    return unit == 1 and step % _UNIT == 0 and step < _MOST and rows < _MOST and x.data_ptr() % 16 == 0


_codes: dict[Kind, Code | None] = {}


def code(kind: Kind) -> Code | None:
    """Proved machine code, or None: where Triton has made none, and inside a capture for a kind not met before.

    Takes as long as Triton takes to compile the kernel and some tens of milliseconds, once. Raises Diverged with the first
    byte that is another than the plain kernel's.
    """
    if kind in _codes:
        return _codes[kind]
    if not available(kind.device) or torch.cuda.is_current_stream_capturing():
        return None
    from detinfer.ops import matmul_wide_proof

    found = _codes[kind] = matmul_wide_proof.made_and_proved(kind)
    return found


def find(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.dtype,
    tile: tuple[int, int],
    grouped: bool,
) -> Code | None:
    """Code for x [tokens, K] times ``weight`` [(experts,) N, K] and a contiguous bias; None where ``tile`` has to run."""
    if not takes(weight) or not lies(x) or (bias is not None and bias.data_ptr() % 16):
        return None
    return code(kind_of(x, weight, bias is not None, out, tile, grouped))


def kind_of(
    x: torch.Tensor, weight: torch.Tensor, biased: bool, out: torch.dtype, tile: tuple[int, int], grouped: bool
) -> Kind:
    """The kind of a product."""
    *_, w_n, w_k = weight.stride()
    device = -1 if x.device.index is None else x.device.index  # -1: Triton's interpreter
    return Kind(device, x.dtype, out, tile, grouped, biased, x.shape[1] % 64 == 0, w_n == 1 and w_k != 1)


def held(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    order: torch.Tensor | None,
    tiles: torch.Tensor | None,
    out: torch.Tensor,
    places: int,
    tile: tuple[int, int],
    most_tiles: int = 0,
) -> Any:
    """``moe_cuda.product`` into ``out``, proved or not, of any strides, from assignments as ``moe_cuda.Groups`` sorts and cuts
    them: for proofs and tests. Returns what Triton made of the kernel. Raises UsageError for other tiles than ``ROWS``."""
    from detinfer.ops import matmul_triton

    if tile[0] not in ROWS:
        raise UsageError(f"wide takes tiles of {' or '.join(map(str, ROWS))} rows, not {tile[0]}")
    rows, n = out.shape
    programs = _programs(tile, rows, n, most_tiles)
    if not programs:
        return None
    kind = kind_of(x, weight, bias is not None, out.dtype, tile, tiles is not None)
    expert = weight.stride(0) if weight.dim() == 3 else 0
    return matmul_triton.wide[(programs,)](
        x, weight, *(x if t is None else t for t in (bias, order, tiles)), out,
        rows, places, n, x.shape[1], x.stride(0), expert, *weight.stride()[-2:],
        **constants(kind), enable_fp_fusion=False, num_warps=tile[0] // 16, num_stages=_STAGES,
    )  # fmt: skip
