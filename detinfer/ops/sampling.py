"""Sampling of tokens from logits: seeded per request and position, the same draw wherever a row lies in a batch.

The draw is that of ``detinfer/reference/sampling.py``: canonical log_softmax, top-k, top-p, min-p, then the argmax of
log-probability plus noise that follows from the request's seed, the position and the token's number alone. CPU and CUDA
give the same token for the same logits.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch

from detinfer import native
from detinfer.errors import NativeError, UsageError
from detinfer.ops import rows, rows_cuda

_args = struct.Struct("@2q5P")  # SamplingArgs of csrc/sampling.h
_SPLITS = 16  # kSamplingSplits
_UNIT = 2.0**40

PerRow = int | float | Sequence[int] | Sequence[float] | torch.Tensor
"""One number for all rows, or one for each."""


def sample(
    logits: torch.Tensor,
    seeds: int | Sequence[int] | torch.Tensor,
    positions: int | Sequence[int] | torch.Tensor,
    *,
    temperature: PerRow = 1.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    min_p: PerRow = 0.0,
) -> torch.Tensor:
    """Draw one token for each row of ``logits`` [rows, vocabulary] (fp32, bf16, fp16; CPU or CUDA): int64 [rows].

    ``seeds`` names the request, ``positions`` the token in it (64-bit integers); all parameters are one number or one for
    each row. Logits are divided by ``temperature`` (0: the first of the greatest logits), then ``top_k`` tokens are kept
    (0: all), of these the fewest that hold ``top_p`` of their probability, of these those at least ``min_p`` times as
    likely as the likeliest; ties go to the lower number. A row with NaN, or all of -Inf, gives -1.

    Raises UsageError for shapes that do not fit and parameters out of range (checked where they are given as numbers),
    UnsupportedDtype for other dtypes, NativeError where the native library is missing.
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise UsageError(f"sample: logits are {list(logits.shape)}; give [rows, vocabulary]")
    native.dtype_code(logits.dtype, "sample")
    count, device = logits.shape[0], logits.device
    with torch.no_grad(), torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        which = [
            _per_row(v, count, torch.int64, device, name) for v, name in ((seeds, "seeds"), (positions, "positions"))
        ]
        heat = _per_row(_checked(temperature, "temperature", 0), count, torch.float32, device, "temperature")
        greedy = heat <= 0
        scaled = logits.float() / torch.where(greedy, 1.0, heat)[:, None]
        on_gpu = device.type == "cuda"
        family: Any = rows_cuda if on_gpu else rows
        log_probabilities = family.log_softmax(scaled)
        limits = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        given = {name: _checked(v, name, 0, None if name == "top_k" else 1) for name, v in limits.items()}
        wanted = {name: v for name, v in given.items() if not (isinstance(v, int | float) and v == _OFF[name])}
        drawn_from = log_probabilities
        if wanted:
            tensors = {name: _per_row(v, count, _KINDS[name], device, name) for name, v in wanted.items()}
            may = _kept(log_probabilities, family.softmax(scaled), **tensors)
            drawn_from = log_probabilities.masked_fill(~may, -torch.inf)
        tokens = _draw(drawn_from, *which)
        # A temperature of 0: argmax takes the first; NaN has given -1 above.
        return torch.where(greedy & (tokens >= 0), logits.argmax(-1), tokens)


_OFF = {"top_k": 0, "top_p": 1, "min_p": 0}
_KINDS = {"top_k": torch.int64, "top_p": torch.float64, "min_p": torch.float32}


def _checked(value: PerRow, name: str, least: float, most: float | None = None) -> PerRow:
    numbers = [value] if isinstance(value, int | float) else [] if isinstance(value, torch.Tensor) else value
    for v in numbers:
        if not v >= least or (most is not None and v > most):
            bounds = f"at least {least}" if most is None else f"from {least} to {most}"
            raise UsageError(f"sample: {name} is {v}; it has to be {bounds}")
    return value


def _per_row(value: Any, count: int, dtype: torch.dtype, device: torch.device, name: str) -> torch.Tensor:
    if isinstance(value, int) and dtype is torch.int64 and not -(2**63) <= value < 2**63:
        raise UsageError(f"sample: {name} is {value}; it has to be a 64-bit integer")
    if isinstance(value, int | float):
        return torch.full((count,), value, dtype=dtype, device=device)
    found = torch.as_tensor(value, device=device).to(dtype)
    if found.shape != (count,):
        raise UsageError(f"sample: {name} is {list(found.shape)} for {count} rows of logits; give one for each row")
    return found.contiguous()


def _kept(
    log_probabilities: torch.Tensor,
    probabilities: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which tokens may be drawn, bool [rows, vocabulary]: a stable sort, and sums of integers, which have no order."""
    n = log_probabilities.shape[1]
    may = torch.ones_like(log_probabilities, dtype=torch.bool)
    if top_k is not None or top_p is not None:
        ids = torch.sort(log_probabilities, dim=-1, descending=True, stable=True).indices
        rank = torch.arange(n, device=ids.device)
        stays = torch.ones_like(may)
        if top_k is not None:
            stays = rank < torch.where(top_k > 0, top_k, n)[:, None]
        if top_p is not None:
            weights = (probabilities.double() * _UNIT).to(torch.int64).gather(1, ids)
            weights = torch.where(stays, weights, 0)
            before = weights.cumsum(1) - weights
            held = before.double() < weights.sum(1).double()[:, None] * top_p[:, None]
            stays = stays & (held | (rank == 0) | (top_p >= 1)[:, None])
        may = torch.zeros_like(may).scatter_(1, ids, stays)
    if min_p is not None:
        likeliest = probabilities.gather(1, log_probabilities.argmax(1, keepdim=True))
        may &= (probabilities >= min_p[:, None] * likeliest) | (min_p <= 0)[:, None]
    return may


def _draw(log_probabilities: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    count, n = log_probabilities.shape
    x, device = log_probabilities.contiguous(), log_probabilities.device
    out = torch.empty(count, dtype=torch.int64, device=device)
    pointers = (x.data_ptr(), seeds.data_ptr(), positions.data_ptr(), out.data_ptr())
    if device.type != "cuda":
        if status := native.entry("sampling", _args.size)(_args.pack(count, n, *pointers, 0)):
            native.check(status)
        return out
    workspace = torch.empty(count * _SPLITS * 2, dtype=torch.int64, device=device)
    run, error = _function()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        if run(_args.pack(count, n, *pointers, workspace.data_ptr()), stream):
            raise NativeError((error() or b"").decode())
    return out


@functools.cache
def _function() -> tuple[Callable[[bytes, int], int], Any]:
    handle = native.gpu_library()
    if (found := handle.detinfer_gpu_sampling_size()) != _args.size:
        raise NativeError(
            f"the GPU library's sampling takes {found} bytes, this detinfer gives {_args.size}: reinstall it"
        )
    handle.detinfer_gpu_sampling_error.restype = ctypes.c_char_p
    handle.detinfer_gpu_sampling.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
    return handle.detinfer_gpu_sampling, handle.detinfer_gpu_sampling_error


class SeededSampler:
    """A logits processor for transformers' ``generate``: it draws each token itself and leaves no choice to others.

    Give it in ``logits_processor`` with ``do_sample=False``. Row i of the batch is request ``seeds[i]``; its first new
    token has position 0, or ``start`` (one number or one for each row) where an earlier generation is continued. Padding
    to the left changes nothing. The parameters are those of ``sample``.
    """

    def __init__(
        self,
        seeds: int | Sequence[int] | torch.Tensor,
        *,
        temperature: PerRow = 1.0,
        top_k: PerRow = 0,
        top_p: PerRow = 1.0,
        min_p: PerRow = 0.0,
        start: int | Sequence[int] = 0,
    ) -> None:
        self._seeds = seeds
        self._limits = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        self._start = start
        self._width: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` [rows, vocabulary] with 0 for the token that was drawn and -Inf for all others."""
        width = input_ids.shape[1]
        if self._width is None or width < self._width:
            self._width = width  # a new generation
        step = width - self._width
        position = self._start + step if isinstance(self._start, int) else [s + step for s in self._start]
        tokens = sample(scores, self._seeds, position, **self._limits)
        if bool((tokens < 0).any()):
            raise UsageError("SeededSampler: a row of scores has NaN, or no token above -Inf: nothing can be drawn")
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
