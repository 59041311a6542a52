"""Every machine code of ``wide`` is compared with the plain kernel before its first result is handed out.

Triton makes other machine code for each ``matmul_wide.Kind``, and a compiler can get one of them wrong while the rest are
right. The code that was compared is the one that runs from then on: nothing asks Triton again.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch

from detinfer.bits import dtype_name, first_mismatch
from detinfer.errors import Diverged, Vacuous
from detinfer.ops import matmul_wide, moe_cuda
from detinfer.ops.matmul_cuda_proof import adversarial
from detinfer.ops.matmul_wide import BAND, COLUMNS, Code, Kind
from detinfer.torch_alone import torch_alone

EXPERTS = 5
"""Of the proof's inputs: one with most of the assignments, one with a single one, one with none."""

_N = COLUMNS + 16
_K = {True: 704, False: 720}  # whole stages, and a stage of 16
_proved: dict[str, int] = {}


class Inputs(NamedTuple):
    """A product of a kind: more tiles than a band, the last ones not full, two tiles of columns or more, the last not full."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    groups: moe_cuda.Groups | None
    places: int


def proved() -> dict[str, int]:
    """The machine codes that this process has proved, by Triton's hash, and how many results of each were compared."""
    return dict(_proved)


def made_and_proved(kind: Kind) -> Code | None:
    """Machine code for a kind that gives the plain kernel's bytes; None, with a warning, where Triton can make none.

    Raises Diverged with the first byte that is another, Vacuous where k reversed would not show.
    """
    # The plain kernel's inputs are made by torch's own operations, also under a policy that puts others in their place.
    with torch_alone(), torch.cuda.device(kind.device):
        given = inputs(kind)
        try:
            made = _make(kind, given)
        except Exception as error:  # of a compiler, of what it starts, of a driver: `tile` needs none of them
            logging.getLogger("detinfer").warning(
                "Triton made no machine code of %s: %s: %s; csrc's tiles run in its place, slower, with the same bytes",
                where(kind), type(error).__name__, error,
            )  # fmt: skip
            return None
        if made is None:
            return None  # Triton's interpreter
        found = Code(kind, made)
        _proved[str(made.hash)] = compare(found, given)
        return found


def where(kind: Kind) -> str:
    """A kind in words, for errors."""
    named = ", ".join(f"{name}={value}" for name, value in matmul_wide.constants(kind).items())
    return f"matmul on {dtype_name(kind.dtype)}, wide of {named}, to {dtype_name(kind.out)}"


def inputs(kind: Kind) -> Inputs:
    """Stress inputs that get the machine code of the kind."""
    device, dtype, k = torch.device("cuda", kind.device), kind.dtype, _K[kind.even]
    experts, places = (EXPERTS, 2) if kind.grouped else (1, 1)
    rows = ((BAND + 1) * kind.tile[0] + 5) // places
    x = adversarial(rows, k, dtype, device, 7)
    x[:, 1] = x[:, k - k // 7 - 1] = 900.0
    weight = adversarial(experts * _N, k, dtype, device, 11).view(experts, _N, k)
    if kind.across:
        weight = weight.mT.contiguous().mT
    bias = adversarial(experts, _N, dtype, device, 5) if kind.biased else None
    if not kind.grouped:
        return Inputs(x, weight, bias, None, 1)
    token = torch.arange(rows, device=device)
    chosen = torch.stack([torch.where(token % 9 == 0, 3, 0), torch.where(token % 5 == 0, 4, 0)], 1)
    chosen[7, 1] = 1  # and nobody has expert 2
    return Inputs(x, weight, bias, moe_cuda.Groups(chosen, experts, kind.tile[0]), places)


def expected(kind: Kind, given: Inputs, *, turned: bool = False) -> torch.Tensor:
    """The plain kernel's results for the inputs, with k reversed if ``turned``."""
    x, weight = (given.x.flip(1), given.weight.flip(2)) if turned else (given.x, given.weight)
    unrounded = kind.out is torch.float32
    return moe_cuda.product(
        x, weight, given.bias, given.groups, unrounded=unrounded, places=given.places, path="reference"
    )


def compare(code: Code, given: Inputs) -> int:
    """How many results of ``code`` were compared with the plain kernel's."""
    kind, (x, weight, bias, groups, places) = code.kind, given
    n, rows = weight.shape[1], len(x) * places
    out = _room(kind, given)
    as_int = {2: torch.int16, 4: torch.int32}[out.element_size()]
    out.view(as_int).fill_(-1)
    order, tiles, most = (x, x, 0) if groups is None else (groups.order, groups.tiles, groups.most_tiles)
    pointers = tuple(t.data_ptr() for t in (x, weight, x if bias is None else bias, order, tiles, out))
    stream = torch._C._cuda_getCurrentRawStream(kind.device)
    code.start(pointers, (rows, places, n, x.shape[1], x.stride(0), *weight.stride()), stream, most)
    want, other = expected(kind, given).cpu(), expected(kind, given, turned=True).cpu()
    got = out.cpu()
    if first_mismatch(other, want) is None:
        raise Vacuous(f"{where(kind)}: the inputs do not show a reversed order, nothing was proved: report it")
    if (found := first_mismatch(got[:rows], want)) is not None or bool((got[rows:].view(as_int) != -1).any()):
        raise Diverged(
            f"{where(kind)}: {found or 'it writes behind the last row'}: the machine code that Triton and ptxas made here does "
            "not keep the order, or is wrong. Do not use it: report it with the versions of Triton and of the driver"
        )
    return want.numel()


def _room(kind: Kind, given: Inputs) -> torch.Tensor:
    """For the results, and a tile behind them that nothing may write to."""
    rows = len(given.x) * given.places + kind.tile[0]
    return torch.empty((rows, given.weight.shape[1]), dtype=kind.out, device=given.x.device)


def _make(kind: Kind, given: Inputs) -> Any:
    """What Triton makes of the kernel for the inputs' kind, started once."""
    x, weight, bias, groups, places = given
    out = _room(kind, given)[: len(x) * places]
    order, tiles, most = (None, None, 0) if groups is None else (groups.order, groups.tiles, groups.most_tiles)
    return matmul_wide.held(x, weight, bias, order, tiles, out, places, kind.tile, most)
