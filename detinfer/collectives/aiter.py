"""AITER's communicator (package amd-aiter) as a path: the calls of it that keep the contract's order, and no others.

AITER picks an all-reduce kernel by size, and has no switch that forces one stage. Its two-stage kernel and its
reduce_scatter begin each sum at the owner of the element, so that a row's bits depend on its batch. The adapter knows the
sizes at which a kernel adds ranks 0 to N-1 (``aiter_versions``), cuts a larger tensor into pieces of such a size (an
element's sum does not know of its neighbours), and declines the rest, naming the reason.

``custom_all_reduce`` and ``custom_all_gather`` are never called: during the warm-up of a graph capture they may return
zeros. The adapter calls the kernels below them, through AITER's staging buffer, in every state alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from detinfer.bits import dtype_name
from detinfer.collectives.aiter_versions import VERSIONS, Version, Window
from detinfer.collectives.ordered_gather import canonical_nan
from detinfer.errors import RefusedError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_PIECES = 16
"""A tensor that needs more pieces is declined: each is a kernel launch and two barriers between the ranks."""

GRAIN = 128
"""Bytes that a piece is a multiple of, but for the last."""


@dataclass(frozen=True)
class Declined:
    """AITER does not do it, or not in the contract's order; ``reason`` says what does."""

    reason: str


@dataclass(frozen=True)
class Way:
    """How a call is made: by which kernel, with which arguments, in pieces of how many bytes."""

    kernel: str
    keywords: tuple[tuple[str, bool], ...] = ()
    piece: int = 0
    pieces: int = 1


def parameters(function: Callable[..., Any]) -> str:
    """A method's parameters as text, without ``self`` and annotations: what versions are told apart by."""
    found = inspect.signature(function).parameters.values()
    return render([(p.name, p.kind, p.default) for p in found if p.name != "self"])


def render(found: list[tuple[str, Any, Any]]) -> str:
    """(name, kind of inspect.Parameter, default) as ``parameters`` writes them."""
    words, bare = [], False
    for name, kind, default in found:
        if kind is inspect.Parameter.KEYWORD_ONLY and not bare:
            words.append("*")
            bare = True
        words.append(name if default is inspect.Parameter.empty else f"{name}={default!r}")
    return ", ".join(words)


def recognise(communicator: Any) -> Version | Declined:
    """The version whose methods ``communicator`` (a ``CustomAllreduce``) has; Declined where no known one has these."""
    kind = type(communicator)
    misses = []
    for version in reversed(VERSIONS):
        wrong = [
            name
            for name, expected in version.signatures.items()
            if not callable(getattr(kind, name, None)) or parameters(getattr(kind, name)) != expected
        ]
        # A method that this version does not have, and another one has: it is that other one, or one in between.
        wrong += [
            name
            for other in VERSIONS
            for name in other.signatures
            if name not in version.signatures and hasattr(kind, name) and name not in wrong
        ]
        if not wrong:
            return version
        misses.append(f"not {version.name} ({', '.join(wrong[:3])})")
    return Declined(
        f"this AITER is no version that has been looked at: {'; '.join(misses)}. Its kernels are not called; the sum over "
        "ranks goes by ordered_gather"
    )


def decide_way(
    version: Version,
    collective: str,
    nbytes: int,
    dtype: torch.dtype,
    world: int,
    *,
    arch: str = "",
    room: int = 64 << 20,
) -> Way | Declined:
    """How ``collective`` of a rank's contiguous tensor of ``nbytes`` is called, or why it is not.

    ``arch`` is the GPU's (``gfx942``), ``room`` the bytes of the communicator's staging buffer (its ``max_size``).
    """
    if collective not in ("all_reduce", "reduce_scatter", "all_gather", "all_reduce_rms_norm"):
        return Declined(f"AITER has no {collective}")
    if arch in version.elsewhere:
        return Declined(
            f"on {arch} AITER {version.name} adds a rank's own term first, so that ranks get different bits"
        )
    if world not in (2, 4, 6, 8):
        return Declined(f"AITER has no kernels for {world} ranks, only for 2, 4, 6 and 8")
    if nbytes == 0 or nbytes % 16:
        return Declined(f"AITER takes multiples of 16 bytes, and a rank's tensor has {nbytes}")
    if collective == "all_gather":
        return _gather(version, nbytes, world, room)
    if dtype not in DTYPES:
        return Declined(f"AITER adds float32, bfloat16 and float16, not {dtype_name(dtype)}")
    if collective == "all_reduce_rms_norm":
        return _fused(version, world)
    return _reduce(version, nbytes, world, arch, room)


def _reduce(version: Version, nbytes: int, world: int, arch: str, room: int) -> Way | Declined:
    best: Way | None = None
    for window in version.windows:
        if world not in window.worlds or (window.archs and arch not in window.archs):
            continue
        if (found := _cut(window, nbytes, room)) is not None and (best is None or found.pieces < best.pieces):
            best = found
    if best is not None:
        return best
    limits = [w.below for w in version.windows if world in w.worlds and not w.archs]
    what = f"up to {MOST_PIECES} pieces of less than {max(one or room for one in limits) // 1024} KiB"
    return Declined(
        f"{nbytes} bytes: between {world} ranks AITER {version.name} adds in rank order {what}; its two-stage kernel "
        f"{version.two_stages}. The sum over ranks goes by ordered_gather"
    )


def _cut(window: Window, nbytes: int, room: int) -> Way | None:
    most = room if window.below is None else min(window.below - 1, room)
    if nbytes <= most and nbytes > window.over:
        return Way(window.kernel, window.keywords, nbytes, 1)
    if window.over:  # a kernel for large tensors: pieces would be small again
        return None
    piece = most // GRAIN * GRAIN
    pieces = -(-nbytes // piece) if piece else MOST_PIECES + 1
    return Way(window.kernel, window.keywords, piece, pieces) if pieces <= MOST_PIECES else None


def _gather(version: Version, nbytes: int, world: int, room: int) -> Way | Declined:
    if world == 6:
        return Declined("AITER's all_gather between 6 ranks prints an error and leaves the result as it was")
    limit = room // (2 * world) if version.gather_halved_by_ranks else room
    if nbytes > limit:
        return Declined(f"{nbytes} bytes are more than the {limit} that AITER {version.name} gathers of a rank")
    return Way("all_gather_unreg", (), nbytes, 1)


def _fused(version: Version, world: int) -> Way | Declined:
    if "use_1stage" not in version.signatures["fused_ar_rms"]:
        return Declined(
            f"AITER {version.name} has no use_1stage: its fused kernel has two stages always. Use all_reduce, then add + "
            "RMSNorm"
        )
    if world == 6:
        return Declined("AITER's fused all-reduce + RMSNorm has no kernel for 6 ranks")
    return Way("fused_1stage", (("use_1stage", True),))


class Aiter:
    """A rank's AITER communicator, called by all ranks together as ``Communicator`` is.

    Raises RefusedError at construction for a version that has not been looked at and for a disabled communicator, and in
    a call for what ``way`` declines: on every rank alike, since it looks at nothing but sizes, dtypes and the environment.
    """

    def __init__(self, communicator: Any, arch: str | None = None) -> None:
        version = recognise(communicator)
        if isinstance(version, Declined):
            raise RefusedError(version.reason)
        if communicator.disabled:
            raise RefusedError("AITER's communicator is disabled (one host, 2, 4, 6 or 8 ranks, a ROCm device)")
        self.communicator, self.version = communicator, version
        self.rank, self.size = int(communicator.rank), int(communicator.world_size)
        self.arch = _arch() if arch is None else arch

    def way(self, collective: str, tensor: torch.Tensor) -> Way | Declined:
        """How ``collective`` of ``tensor`` would be called, or why not."""
        room = int(self.communicator.max_size)
        return decide_way(self.version, collective, tensor.nbytes, tensor.dtype, self.size, arch=self.arch, room=room)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors added in ``rank_order``: a new contiguous tensor of the same shape and dtype."""
        way = self._way("all_reduce", tensor)
        flat = tensor.detach().contiguous().reshape(-1)
        out = torch.empty_like(flat)
        step = way.piece // flat.element_size()
        options = {**dict(way.keywords), self.version.registered: False, "open_fp8_quant": False}
        parts = [(flat[at : at + step], out[at : at + step]) for at in range(0, flat.numel(), step)]
        for own, _ in parts:
            if not self.communicator.should_custom_ar(own):
                raise RefusedError(
                    f"AITER declines a piece of {own.nbytes} bytes: AITER_CUSTOM_AR_MIN_SIZE or AITER_CUSTOM_AR_MAX_SIZE "
                    "does not admit it; unset them, or let the sum over ranks go by ordered_gather"
                )
        for own, result in parts:
            self.communicator.all_reduce(own, out=result, **options)
        return canonical_nan(out).reshape(tensor.shape)

    def reduce_scatter(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's slice of ``all_reduce`` along ``dim``: AITER's own reduce_scatter has the owner's order."""
        if tensor.shape[dim] % self.size:
            raise RefusedError(f"reduce_scatter: {list(tensor.shape)} is not {self.size} equal slices along {dim}")
        return self.all_reduce(tensor).chunk(self.size, dim)[self.rank].contiguous()

    def all_gather(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The ranks' tensors one after the other along ``dim``: a copy of bytes, of any dtype."""
        self._way("all_gather", tensor)
        own = tensor.detach().contiguous().reshape(-1).view(torch.uint8).view(torch.float32)
        if hasattr(self.communicator, "should_custom_ag") and not self.communicator.should_custom_ag(own):
            raise RefusedError(f"AITER declines to gather {own.nbytes} bytes of a rank; use ordered_gather")
        out = torch.empty(own.numel() * self.size, dtype=own.dtype, device=own.device)
        self.communicator.all_gather_unreg(own, out=out)
        parts = out.view(torch.uint8).view(tensor.dtype).view(self.size, *tensor.shape)
        return torch.cat(parts.unbind(0), dim)

    def all_reduce_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm, residual_out) by AITER's fused kernel in one stage, at every size.

        residual_out has the contract's bits. The norm is that of the unrounded sum (mode ``U``), and its sum of squares
        has AITER's own tree: it may run where a proof finds the bytes equal, or where the tree does not matter.
        """
        way = self._way("all_reduce_rms_norm", x)
        results = self.communicator.fused_ar_rms(
            x.contiguous(), residual.contiguous(), w=weight, eps=eps, registered=False, **dict(way.keywords)
        )
        named = dict(zip(self.version.fused_returns, results, strict=True))
        return named["norm"], named["residual"]

    def _way(self, collective: str, tensor: torch.Tensor) -> Way:
        found = self.way(collective, tensor)
        if isinstance(found, Declined):
            raise RefusedError(f"{collective} by AITER is refused: {found.reason}")
        return found


def _arch() -> str:
    if not torch.cuda.is_available() or torch.version.hip is None:
        return ""
    name: str = torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName
    return name.partition(":")[0]
