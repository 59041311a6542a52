"""Ranks of one host that share memory: connect, and the collectives as methods."""

from __future__ import annotations

import ctypes
import functools
import os
import secrets
import socket
import threading
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from detinfer import native
from detinfer.collectives import all_gather as _all_gather
from detinfer.collectives import all_reduce as _all_reduce
from detinfer.collectives import all_reduce_rms_norm as _all_reduce_rms_norm
from detinfer.collectives import reduce_scatter as _reduce_scatter
from detinfer.collectives import rendezvous, torch_ops
from detinfer.collectives.calls import COLLECTIVES, PATHS, Args, Call, Order, Path, ReduceOp, describe
from detinfer.errors import NativeError, PeerError, RankMismatch, UsageError
from detinfer.reference.rows import ResidualMode, WeightMode

__all__ = ["PATHS", "Communicator", "connect"]

is_compiling = torch.compiler.is_compiling

MOST_RANKS = 8
STAGING = 1 << 18
"""Default bytes of a rank's staging area; larger tensors go in pieces of it. There are four areas a rank."""

MOST_KNOWN = 256
"""Calls whose arguments are kept; past these, all are forgotten."""

_PEER_LOST, _MISMATCH = 4, 5


@functools.cache
def _library() -> Any:
    library = native.library()
    if (found := library.detinfer_communicator_call_size()) != ctypes.sizeof(Args):
        raise NativeError(
            f"the arguments of a collective have {found} bytes in the native library, {ctypes.sizeof(Args)} in this "
            "detinfer: reinstall detinfer"
        )
    library.detinfer_communicator_bytes.argtypes = (ctypes.c_int, ctypes.c_int64)
    library.detinfer_communicator_bytes.restype = ctypes.c_int64
    library.detinfer_communicator_open.argtypes = (
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
        *(ctypes.c_int64, ctypes.c_double),
    )
    library.detinfer_communicator_open.restype = ctypes.c_void_p
    library.detinfer_communicator_call.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    library.detinfer_communicator_seen.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    library.detinfer_communicator_seen.restype = None
    library.detinfer_communicator_calls.argtypes = (ctypes.c_void_p,)
    library.detinfer_communicator_calls.restype = ctypes.c_uint32
    library.detinfer_communicator_close.argtypes = (ctypes.c_void_p,)
    library.detinfer_communicator_close.restype = None
    return library


class Communicator:
    """One rank's side of a group. Every collective is called by all ranks, in the same order, with the same arguments.

    A collective waits for all ranks and returns a new tensor, or writes ``out`` where it takes one. It raises

    - RankMismatch on every rank where the ranks' calls differ (collective, dtype, number of elements, or an option):
      no data has been exchanged, ``out`` is as it was, and the communicator can be used further;
    - PeerError on every rank that waits where a rank died, closed its communicator or did not arrive within
      ``timeout`` seconds, naming the rank and the call; every later call raises it too;
    - UsageError or UnsupportedDtype for arguments that cannot be right on any rank, before the others are met.

    Sums are those of ``detinfer/reference/all_reduce.py``, byte for byte, on every rank and every path. There is no
    autograd; torch.compile keeps the calls in its graphs. One thread at a time may call; a forked child may not.
    """

    def __init__(self, handle: int, rank: int, size: int) -> None:
        """``connect`` makes communicators."""
        self.rank, self.size = rank, size
        self._handle = handle
        self._open = True
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._known: dict[tuple[Hashable, ...], Args] = {}
        self.key = torch_ops.register(self)
        self._run: Callable[[int, int], int] = _library().detinfer_communicator_call

    def all_reduce(
        self,
        tensor: torch.Tensor,
        *,
        op: ReduceOp = "sum",
        order: Order = "rank_order",
        path: Path | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The ranks' tensors reduced element by element: a contiguous tensor of the same shape and dtype.

        ``tensor`` may have any shape and strides. ``order`` is ``rank_order`` (ranks 0, 1, ..., N-1, one after the
        other) or ``rank_tree`` (neighbours joined, the odd last one moves up). float32, bfloat16 and float16 are added
        in float32 and rounded once; float64 in itself; int8 to int64 and uint8 wrap. ``avg`` divides the sum once; for
        ``max`` and ``min`` NaN wins and +0 > -0. ``out``, of the same shape and dtype, may be ``tensor`` itself.
        """
        if is_compiling():
            return torch_ops.into(out, torch.ops.detinfer.all_reduce(tensor, self.key, op, order, path or ""))
        return _all_reduce.all_reduce(self, tensor, op, order, path, out)

    def reduce_scatter(
        self,
        tensor: torch.Tensor,
        *,
        dim: int = 0,
        op: ReduceOp = "sum",
        order: Order = "rank_order",
        path: Path | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This rank's slice of ``all_reduce``: slice ``rank`` of N equal ones along ``dim``."""
        if is_compiling():
            found = torch.ops.detinfer.reduce_scatter(tensor, self.key, dim, op, order, path or "")
        else:
            found = _reduce_scatter.reduce_scatter(self, tensor, dim, op, order, path)
        return torch_ops.into(out, found)

    def all_gather(self, tensor: torch.Tensor, *, dim: int = 0, out: torch.Tensor | None = None) -> torch.Tensor:
        """The ranks' tensors one after the other along ``dim``: a copy of bytes, of any dtype."""
        if is_compiling():
            return torch_ops.into(out, torch.ops.detinfer.all_gather(tensor, self.key, dim, ""))
        return torch_ops.into(out, _all_gather.all_gather(self, tensor, dim))

    def all_reduce_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        *,
        mode: ResidualMode = "R",
        weight_mode: WeightMode = "llama",
        order: Order = "rank_order",
        path: Path | None = None,
        out: torch.Tensor | None = None,
        residual_out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm, residual_out): ``all_reduce(x)``, then add + RMSNorm over the last dimension, bit for bit.

        residual_out is all_reduce(x) + residual, rounded to the dtype. Mode ``R`` normalises it, mode ``U`` the
        unrounded sum. Weight modes as in ``ops.rows.rms_norm``. ``residual`` (shape and dtype of x) and ``weight`` (the
        last dimension's size; float32, bfloat16 or float16) are to be the same on all ranks, which is not checked.
        """
        if is_compiling():
            norm, total = torch.ops.detinfer.all_reduce_rms_norm(
                x, residual, weight, self.key, eps, mode, weight_mode, order, path or ""
            )
        else:
            norm, total = _all_reduce_rms_norm.all_reduce_rms_norm(
                self, x, residual, weight, eps, mode, weight_mode, order, path
            )
        return torch_ops.into(out, norm), torch_ops.into(residual_out, total)

    def barrier(self) -> None:
        """Wait for all ranks."""
        with self._lock:
            self.finish(self.prepare(("barrier",), lambda call: setattr(call, "item", 1)))

    def prepare(self, key: tuple[Hashable, ...], fill: Callable[[Call], None]) -> Args:
        """The arguments of the call ``key``, whose first word is the collective; ``fill`` makes those not seen before.

        Filling them anew each time would take as long as a small all_reduce. Under the lock until ``finish``.
        """
        args = self._known.get(key)
        if args is None:
            args = Args()
            args.call.collective = COLLECTIVES[str(key[0])]
            fill(args.call)
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key] = args
        return args

    def finish(self, args: Args) -> None:
        """Run the call; raise what it came to."""
        if not self._open or os.getpid() != self._pid:
            why = "is closed" if not self._open else "belongs to the process that this one was forked from"
            raise UsageError(f"{describe(args.call)}: the communicator of rank {self.rank} {why}; connect again")
        status = self._run(self._handle, ctypes.addressof(args))
        if status == 0:
            return
        library = _library()
        if status == _MISMATCH:
            raise RankMismatch(self._difference(args.call))
        if status == _PEER_LOST:
            raise PeerError((library.detinfer_error() or b"").decode())
        native.check(status)

    def _difference(self, own: Call) -> str:
        seen: dict[str, list[int]] = {}
        for rank in range(self.size):
            call = Call()
            _library().detinfer_communicator_seen(self._handle, rank, ctypes.byref(call))
            seen.setdefault(describe(call), []).append(rank)
        number = _library().detinfer_communicator_calls(self._handle)
        calls = "; ".join(
            f"rank{'s'[: len(ranks) - 1]} {', '.join(map(str, ranks))}: {what}" for what, ranks in seen.items()
        )
        return f"call {number} of this communicator differs between ranks, and nothing was exchanged: {calls}"

    def close(self) -> None:
        """Leave the group and free its memory. Ranks that call later are told. May be called twice."""
        with self._lock:
            if self._open and os.getpid() == self._pid:
                _library().detinfer_communicator_close(self._handle)
            self._open = False

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self.close()


def connect(
    group: dist.ProcessGroup | None = None,
    *,
    name: str | None = None,
    rank: int | None = None,
    size: int | None = None,
    timeout: float = 30.0,
    staging: int = STAGING,
) -> Communicator:
    """Join the ranks of ``group`` (None: torch.distributed's default group), which all call this at the same time.

    Without torch.distributed, give all three of ``name`` (the same on all ranks, and of this group alone on the host),
    ``rank`` and ``size``. ``timeout``, in seconds, bounds this and every later wait for a peer. ``staging`` is the
    bytes of a piece, the same on all ranks: larger tensors go in several.

    All ranks are processes of one user on one Linux host, 1 to 8 of them. Raises UsageError where they are not, and
    PeerError where one does not arrive or dies.
    """
    alone = (name, rank, size)
    if any(value is not None for value in alone):
        if None in alone or group is not None:
            raise UsageError("connect: give a group, or all three of name, rank and size")
        assert name is not None and rank is not None and size is not None
    else:
        name, rank, size = _agree(group)
    if not 1 <= size <= MOST_RANKS or not 0 <= rank < size:
        raise UsageError(f"connect: rank {rank} of {size}; there can be 1 to {MOST_RANKS} ranks")
    if staging < 512 or staging % 64:
        raise UsageError(f"connect: staging of {staging} bytes; it is a multiple of 64, at least 512")
    library = _library()
    handle: list[int] = []

    def use(fd: int) -> None:
        opened = library.detinfer_communicator_open(fd, None, rank, size, staging, timeout)
        if not opened:
            if fd >= 0:
                os.close(fd)
            raise UsageError((library.detinfer_error() or b"").decode())
        handle.append(opened)

    bytes_ = library.detinfer_communicator_bytes(size, staging)
    if size == 1:
        use(-1)
        return Communicator(handle[0], rank, size)
    try:
        rendezvous.share(name, rank, size, bytes_, native.ABI, timeout, use)
    except BaseException:
        for opened in handle:
            library.detinfer_communicator_close(opened)
        raise
    return Communicator(handle[0], rank, size)


def _agree(group: dist.ProcessGroup | None) -> tuple[str, int, int]:
    """A name that all ranks of ``group`` have, this rank, the number of ranks."""
    if not dist.is_available() or not dist.is_initialized():
        raise UsageError("connect: torch.distributed is not initialized; do that first, or give name, rank and size")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise UsageError("connect: this process is not in the group")
    if size == 1:
        return "", rank, size
    mine = (secrets.token_hex(16), host())
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, mine, group=group)
    if hosts := sorted({host for _, host in everyone} - {mine[1]}):
        raise UsageError(f"connect: ranks on several hosts ({mine[1]}, {', '.join(hosts)}); they share memory on one")
    return everyone[0][0], rank, size


def host() -> str:
    """This host, as far as sharing memory goes: processes that see the same one can be ranks of a communicator."""
    # A machine's name and its boot, and the network namespace, in which the sockets' names live.
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/net')}"
