"""Ranks that are GPUs of one host: connect, and the collectives as methods.

Each rank has a shared buffer that the others map. A collective is one kernel on the current stream (all_reduce_rms_norm
of many rows: two): it allocates nothing but its result and never waits on the host, so it may be captured in a CUDA
graph and replayed. What is released and acquired is in docs/concepts/memory_ordering.md.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from detinfer import native
from detinfer.collectives import cuda_native as gpu
from detinfer.collectives import torch_ops
from detinfer.collectives.calls import MODES, OPS, ORDERS, WEIGHT_MODES, Order, ReduceOp
from detinfer.collectives.cuda_paths import Paths, chosen, cut, shipped
from detinfer.errors import InfrastructureError, NativeError, PeerError, RankMismatch, UsageError
from detinfer.reference.rows import ResidualMode, WeightMode

MOST_RANKS = 8
is_compiling = torch.compiler.is_compiling

MOST_PLANS = 4096
"""Kinds of calls that a communicator remembers."""

_Plan = tuple[gpu.Call, Any]
"""A call, all but its addresses, and the pointer to it."""


class CudaCommunicator:
    """One rank's side of a group of GPUs. Every collective is called by all ranks, in one order, with one set of arguments.

    A collective returns at once with a tensor that the current stream will have written; ``out`` may be given, and may
    be the input. Bits are those of ``detinfer/reference`` on every rank and every path. Calls on one communicator
    follow one another on one stream, or on several that wait for each other; communicators are independent.

    What goes wrong on the device shows on the host at the next call, or in ``check()``: PeerError where a rank did not
    arrive within ``timeout`` seconds, RankMismatch where it made another call. Outputs that would have held such data
    hold NaN (bytes of ones), and the communicator is of no further use: close it on all ranks and connect again.
    """

    def __init__(
        self, comm: int, config: gpu.Config, device: torch.device, paths: Paths, opened: Sequence[int], own: int
    ):
        """``connect`` makes communicators."""
        self.rank, self.size, self.device = config.rank, config.ranks, device
        self.timeout = config.time_limit_s
        self.paths = paths
        self._comm, self._opened, self._own = comm, tuple(opened), own
        self._pid = os.getpid()
        self.key = torch_ops.register(self)
        self._lock = threading.Lock()
        self._index = device.index
        self._plans: dict[tuple[object, ...], _Plan] = {}
        self._launch = gpu.launcher()
        self._stream = gpu.current_stream
        self._handle = ctypes.c_void_p(comm)
        self.push_room: tuple[int, int] = config.push_channels, config.push_bytes

    def all_reduce(
        self,
        tensor: torch.Tensor,
        *,
        op: ReduceOp = "sum",
        order: Order = "rank_order",
        path: str | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The ranks' tensors reduced element by element; see ``Communicator.all_reduce``.

        float32, bfloat16 and float16, any shape. A tensor that is not contiguous is copied first. ``path`` is one of
        push, push_tiles, pull and two_shot; None: the fastest for the size. ``two_shot@66x8192`` takes at most 66 blocks
        and tiles of at most 8192 bytes of a rank, push_tiles and pull likewise.
        """
        if is_compiling():
            return torch_ops.into(out, torch.ops.detinfer.all_reduce(tensor, self.key, op, order, path or ""))
        key = ("all_reduce", tensor.dtype, tensor.numel(), op, order, path)
        plan = self._plans.get(key) or self._keep(
            key, "all_reduce", tensor.dtype, path, tensor.nbytes, op, order, tensor.numel()
        )
        if tensor.get_device() != self._index:
            self._here("all_reduce", tensor)
        given = tensor if tensor.is_contiguous() else tensor.contiguous()
        if out is None:
            written = torch.empty_like(given)
        elif out is tensor and out is given:
            written = out
        else:
            written = self._result("all_reduce", given, out)
        self._run(plan, given.data_ptr(), written.data_ptr())
        if out is not None and written is not out:
            out.copy_(written)
        return written if out is None else out

    def reduce_scatter(
        self,
        tensor: torch.Tensor,
        *,
        dim: int = 0,
        op: ReduceOp = "sum",
        order: Order = "rank_order",
        path: str | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This rank's slice of ``all_reduce``: slice ``rank`` of N equal ones along ``dim``. Paths: push, two_shot."""
        where = "reduce_scatter"
        if is_compiling():
            found = torch.ops.detinfer.reduce_scatter(tensor, self.key, dim, op, order, path or "")
            return torch_ops.into(out, found)
        self._here(where, tensor)
        dim = _dimension(where, tensor, dim)
        if tensor.shape[dim] % self.size:
            raise UsageError(f"{where}: dimension {dim} of size {tensor.shape[dim]} has no {self.size} equal slices")
        given = tensor.movedim(dim, 0).contiguous()
        shape = [given.shape[0] // self.size, *given.shape[1:]]
        direct = out is not None and dim == 0 and out.is_contiguous() and list(out.shape) == shape
        written = out if direct and out is not None else torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        if written.dtype != tensor.dtype or written.device != tensor.device:
            raise UsageError(f"{where}: out is {written.dtype} on {written.device}, the tensor {tensor.dtype}")
        count = written.numel()
        nbytes = count * given.element_size()
        key = (where, given.dtype, count, op, order, path)
        plan = self._plans.get(key) or self._keep(key, where, given.dtype, path, nbytes, op, order, count)
        self._run(plan, given.data_ptr(), written.data_ptr())
        if direct:
            return written
        result = written.movedim(0, dim)
        return result.contiguous() if out is None else out.copy_(result)

    def all_gather(
        self, tensor: torch.Tensor, *, dim: int = 0, path: str | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The ranks' tensors one after the other along ``dim``: a copy of bytes, of any dtype. Paths: push, push_tiles."""
        where = "all_gather"
        if is_compiling():
            return torch_ops.into(out, torch.ops.detinfer.all_gather(tensor, self.key, dim, path or ""))
        self._here(where, tensor, out)
        dim = _dimension(where, tensor, dim)
        given = tensor.resolve_conj().resolve_neg().contiguous()
        shape = list(given.shape)
        shape[dim] *= self.size
        if out is None:
            out = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        elif list(out.shape) != shape or out.dtype != tensor.dtype or not out.is_contiguous():
            raise UsageError(
                f"{where}: out is {out.dtype} {list(out.shape)}; it has to be contiguous {tensor.dtype} {shape}"
            )
        nbytes = given.numel() * given.element_size()
        inner = nbytes
        for size in given.shape[:dim]:
            inner = inner // size if size else 0
        key = (where, nbytes, inner, path)
        plan = self._plans.get(key) or self._keep(key, where, None, path, nbytes, "sum", "rank_order", nbytes, inner)
        self._run(plan, given.data_ptr(), out.data_ptr())
        return out

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
        path: str | None = None,
        out: torch.Tensor | None = None,
        residual_out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm, residual_out): ``all_reduce(x)``, then add + RMSNorm over the last dimension, bit for bit.

        See ``Communicator.all_reduce_rms_norm`` for the modes. The last dimension is at most 16384; where it is no
        multiple of 8, rows are copied into longer ones first.
        ``residual_out`` may be ``residual``, ``out`` may be ``x``. Path push is one kernel; any other path of
        ``all_reduce`` is followed by a kernel for the norm.
        """
        if is_compiling():
            norm, total = torch.ops.detinfer.all_reduce_rms_norm(
                x, residual, weight, self.key, eps, mode, weight_mode, order, path or ""
            )
            return torch_ops.into(out, norm), torch_ops.into(residual_out, total)
        shape, dtype = x.shape, x.dtype
        width = None if weight is None else (weight.numel(), weight.dtype)
        key = (shape, dtype, residual.shape, residual.dtype, width, eps, mode, weight_mode, order, path)
        plan = self._plans.get(key)
        if plan is None:
            if x.dim() and shape[-1] % 8:
                return self._odd_rows(x, residual, weight, eps, mode, weight_mode, order, path, out, residual_out)
            plan = self._plan_rows(key, x, residual, weight, eps, mode, weight_mode, order, path)
        index = self._index
        if (
            x.get_device() != index
            or residual.get_device() != index
            or (weight is not None and weight.get_device() != index)
        ):
            self._here("all_reduce_rms_norm", x, residual, weight)
        given, added = _aligned(x), _aligned(residual)
        factor = None if weight is None else _aligned(weight)
        if out is None:
            norm = torch.empty_like(given)
        else:
            norm = out if out is given else self._result("all_reduce_rms_norm", given, out, 16)
        if residual_out is None:
            total = torch.empty_like(given)
        else:
            total = (
                residual_out if residual_out is added else self._result("all_reduce_rms_norm", added, residual_out, 16)
            )
        rows = (added.data_ptr(), total.data_ptr(), None if factor is None else factor.data_ptr())
        self._run(plan, given.data_ptr(), norm.data_ptr(), rows)
        if out is not None and norm is not out:
            norm = out.copy_(norm)
        if residual_out is not None and total is not residual_out:
            total = residual_out.copy_(total)
        return norm, total

    def _odd_rows(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        mode: str,
        weight_mode: str,
        order: str,
        path: str | None,
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of a width that is no multiple of 8, with zeros behind them, which no sum of squares notices."""
        where = "all_reduce_rms_norm"
        n = x.shape[-1]
        self._here(where, x, residual, weight)
        if residual.shape != x.shape or (weight is not None and weight.numel() != n):
            weights = "no" if weight is None else weight.numel()
            raise UsageError(f"{where}: residual is {list(residual.shape)}, x {list(x.shape)}, with {weights} weights")
        given, added = _wider(x), _wider(residual)
        factor = None if weight is None else _wider(weight.reshape(-1))
        kinds = (given.shape, x.dtype, residual.dtype, None if factor is None else factor.dtype)
        key = ("odd rows", n, *kinds, eps, mode, weight_mode, order, path)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plan_rows(key, given, added, factor, eps, mode, weight_mode, order, path)
            plan[0].width = n
        norm, total = torch.empty_like(given), torch.empty_like(given)
        rows = (added.data_ptr(), total.data_ptr(), None if factor is None else factor.data_ptr())
        self._run(plan, given.data_ptr(), norm.data_ptr(), rows)
        narrow = norm[..., :n].contiguous(), total[..., :n].contiguous()
        return torch_ops.into(out, narrow[0]), torch_ops.into(residual_out, narrow[1])

    def _here(self, where: str, *tensors: torch.Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None and tensor.device != self.device:
                raise UsageError(
                    f"{where}: a tensor is on {tensor.device}; the communicator of rank {self.rank} on {self.device}"
                )

    def _result(self, where: str, given: torch.Tensor, out: torch.Tensor, alignment: int = 1) -> torch.Tensor:
        """``out``, or where a kernel cannot write it a new tensor; ``given`` is contiguous."""
        if out.dtype != given.dtype or out.get_device() != self._index or out.shape != given.shape:
            raise UsageError(
                f"{where}: out is {out.dtype} {list(out.shape)} on {out.device}; it has to be {given.dtype} "
                f"{list(given.shape)} on {self.device}"
            )
        at = out.data_ptr()
        if not out.is_contiguous() or at % alignment or 0 < abs(given.data_ptr() - at) < given.nbytes:
            return torch.empty_like(given)
        return out

    def _run(self, plan: _Plan, given: int, out: int, rows: tuple[int, int, int | None] | None = None) -> None:
        call, pointer = plan
        with self._lock:
            if not self._comm:
                raise UsageError(f"the communicator of rank {self.rank} is closed; connect again")
            call.in_, call.out, call.stream = given, out, self._stream(self._index)
            if rows is not None:
                call.residual, call.residual_out, call.weight = rows
            if self._launch(self._handle, pointer) != 0:
                self._raise_fault()
                gpu.check(1)

    def _keep(self, key: tuple[object, ...], *arguments: Any) -> _Plan:
        plan = self._plans[key] = self._plan(*arguments)
        return plan

    def _plan(
        self,
        where: str,
        dtype: torch.dtype | None,
        path: str | None,
        nbytes: int,
        op: str,
        order: str,
        count: int,
        inner: int = 0,
    ) -> _Plan:
        """A call, all but its addresses: checked and made once, then kept."""
        path = path or self.paths.of(where, nbytes)
        if op not in OPS or order not in ORDERS:
            raise UsageError(
                f"{where}: op {op!r} is one of {', '.join(OPS)}, order {order!r} one of {', '.join(ORDERS)}"
            )
        name, blocks, tile_bytes = cut(where, path)
        call = gpu.Call(collective=gpu.COLLECTIVES[where], path=gpu.PATHS[name], op=OPS[op], order=ORDERS[order])
        call.blocks, call.tile_bytes = blocks, tile_bytes
        call.dtype = 0 if dtype is None else native.dtype_code(dtype, where)
        call.count, call.inner = count, inner
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
        return call, ctypes.byref(call)

    def _plan_rows(
        self,
        key: tuple[object, ...],
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        mode: str,
        weight_mode: str,
        order: str,
        path: str | None,
    ) -> _Plan:
        where = "all_reduce_rms_norm"
        self._here(where, x, residual, weight)
        if mode not in MODES or weight_mode not in WEIGHT_MODES:
            raise UsageError(
                f"{where}: mode {mode!r} is R or U, weight_mode {weight_mode!r} one of {list(WEIGHT_MODES)}"
            )
        if residual.shape != x.shape or residual.dtype != x.dtype or x.dim() == 0:
            raise UsageError(
                f"{where}: residual is {residual.dtype} {list(residual.shape)}, x {x.dtype} {list(x.shape)}"
            )
        n = x.shape[-1]
        if n % 8 or not 8 <= n <= 16384:
            raise UsageError(f"{where}: rows of {n} elements; a multiple of 8 up to 16384 is supported")
        if weight is not None and (weight.numel() != n or weight.dtype not in (x.dtype, torch.float32)):
            raise UsageError(
                f"{where}: weight is {weight.dtype} of {weight.numel()} elements; it has to be {x.dtype} or float32 of {n}"
            )
        plan = self._plan(where, x.dtype, path, x.nbytes, "sum", order, x.numel(), n)
        call = plan[0]
        call.residual_mode, call.weight_mode, call.eps = MODES[mode], WEIGHT_MODES[weight_mode], float(eps)
        call.weight_dtype = -1 if weight is None else native.DTYPES[weight.dtype]
        with self._lock:
            if (
                path is None
                and call.path == gpu.PATHS["push"]
                and self._comm
                and not gpu.push_holds_rows(self._comm, call)
            ):
                call.path = gpu.PATHS["push_tiles"]
        self._plans[key] = plan
        return plan

    def barrier(self) -> None:
        """What follows on the current stream runs once all ranks' streams have come this far; the host does not wait."""
        self.all_gather(torch.empty(1, dtype=torch.uint8, device=self.device))

    def check(self) -> None:
        """Raise what has failed on the device so far; does not wait for what is still running."""
        with self._lock:
            if self._comm:
                self._raise_fault()

    def _raise_fault(self) -> None:
        fault = gpu.fault_of(self._comm)
        if fault.code == 0:
            return
        call = f"{gpu.describe(fault.call)} (exchange {fault.sequence} of channel {fault.channel})"
        after = "its outputs hold NaN; close the communicator on all ranks and connect again"
        if gpu.FAULTS[fault.code] == "timeout":
            raise PeerError(
                f"rank {self.rank} waited {self.timeout:g} s for rank {fault.peer} in {call}: that rank died, is stuck "
                f"or has made no call; {after}"
            )
        theirs = ""
        if fault.theirs:
            same = " too, with other options" if fault.theirs == fault.call else ""
            theirs = f"; rank {fault.peer} was in {gpu.describe(fault.theirs)}{same}"
        raise RankMismatch(
            f"rank {fault.peer} made another call than rank {self.rank}, which was in {call}{theirs}; {after}"
        )

    def close(self) -> None:
        """Wait for this rank's kernels and free its memory; on all ranks. May be called twice."""
        with self._lock:
            if not self._comm or os.getpid() != self._pid:
                return
            comm, self._comm = self._comm, 0
            self._plans.clear()
            with torch.cuda.device(self.device):
                torch.cuda.synchronize()
                gpu.destroy(comm)
                for address in self._opened:
                    gpu.close_handle(address)
                if self._own:
                    gpu.free_buffer(self._own)

    def __enter__(self) -> CudaCommunicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, from a multiple of 16 bytes on: the tensor itself, or a copy."""
    if not tensor.is_contiguous():
        return tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _wider(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last dimension is the next multiple of 8, with zeros at the end."""
    return torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % 8))


def _dimension(where: str, tensor: torch.Tensor, dim: int) -> int:
    if not -tensor.dim() <= dim < tensor.dim():
        raise UsageError(f"{where}: there is no dimension {dim} in a tensor of shape {list(tensor.shape)}")
    return dim % tensor.dim()


def connect(
    group: dist.ProcessGroup | None = None,
    *,
    device: torch.device | str | int | None = None,
    timeout: float = 60.0,
    geometry: gpu.Geometry | None = None,
    paths: Paths | None = None,
) -> CudaCommunicator:
    """Join the ranks of ``group`` (None: torch.distributed's default group), one GPU each, which all call this together.

    ``device`` is this rank's GPU (None: the current one). ``timeout``, in seconds, bounds every wait on the device.
    ``geometry`` and ``paths``, the same on all ranks, say how the work is cut and which path runs: speed, never bits
    (None: the table that ``cuda_paths.chosen`` finds).
    Kernels are loaded before this returns, on all ranks. Raises UsageError where the ranks are not 2 to 8 processes of
    one host with GPUs that reach each other, NativeError where the GPU library or a CUDA call fails.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise UsageError("connect: torch.distributed is not initialized; do that first")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if not 2 <= size <= MOST_RANKS:
        raise UsageError(f"connect: {size} ranks; there can be 2 to {MOST_RANKS} GPUs")
    where = torch.device("cuda", torch.cuda.current_device()) if device is None else _device(device)
    with torch.cuda.device(where):
        # A rank that cannot go on says so in what it sends: the others would wait for it.
        mine: dict[str, Any] = {"host": _host()}
        own, comm, problem, opened = 0, 0, None, []
        try:
            if geometry is None or paths is None:
                tuned = chosen(torch.cuda.get_device_name(where), size)
                geometry, paths = geometry or tuned.geometry, paths or tuned.paths
            paths = paths.within(geometry)
            config = geometry.config(rank, size, timeout)
            own = gpu.create_buffer(config)
            mine["gpu"] = str(torch.cuda.get_device_properties(where).uuid)
            mine |= {"geometry": repr((geometry, paths)), "handle": gpu.handle_of(own)}
        except Exception as error:
            problem = error
        everyone: list[Any] = _told(group, size, {**mine, "problem": problem and str(problem)})
        wrong = {peer: theirs["problem"] for peer, theirs in enumerate(everyone) if theirs["problem"]}
        if not wrong:
            try:
                _agree(rank, where.index, everyone)
                buffers = [own] * size
                for peer in range(size):
                    if peer != rank:
                        buffers[peer] = _opened(rank, peer, everyone[peer])
                        opened.append(buffers[peer])
                comm = gpu.create(config, buffers)
            except Exception as error:
                problem = error
            # Also: nobody calls before all have loaded their kernels.
            answers = _told(group, size, problem and str(problem))
            wrong = {peer: text for peer, text in enumerate(answers) if text}
        if wrong:
            if comm:
                gpu.destroy(comm)
            for address in opened:
                gpu.close_handle(address)
            if own:
                gpu.free_buffer(own)
            if problem is not None:
                raise problem
            raise InfrastructureError("connect: " + "; ".join(f"rank {peer}: {text}" for peer, text in wrong.items()))
    assert paths is not None
    return CudaCommunicator(comm, config, where, paths, opened, own)


def _told(group: dist.ProcessGroup | None, size: int, mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def _opened(rank: int, peer: int, theirs: dict[str, Any]) -> int:
    try:
        return gpu.open_handle(theirs["handle"])
    except NativeError as error:
        raise UsageError(
            f"connect: rank {rank} cannot open the memory of rank {peer} on GPU {theirs['gpu']}: {error}. Both GPUs have to "
            "be visible to both processes and reach each other (peer access)"
        ) from None


def connect_here(
    size: int,
    device: torch.device | str | int,
    *,
    timeout: float = 60.0,
    geometry: gpu.Geometry | None = None,
    paths: Paths | None = None,
    first_sequence: int = 0,
) -> list[CudaCommunicator]:
    """``size`` ranks on one GPU in this process, for tests and for trying things out: call each on a stream of its own.

    The ranks' kernels wait for each other, so all of their blocks have to fit on the GPU together: give a small
    ``geometry``; and set ``CUDA_DEVICE_MAX_CONNECTIONS`` to ``size`` or more before CUDA starts.
    """
    if not 2 <= size <= MOST_RANKS:
        raise UsageError(f"connect_here: {size} ranks; there can be 2 to {MOST_RANKS}")
    where = _device(device)
    geometry = geometry or gpu.Geometry(push_channels=16, tile_channels=8, overlap=False)
    with torch.cuda.device(where):
        configs = [geometry.config(rank, size, timeout, first_sequence) for rank in range(size)]
        buffers = [gpu.create_buffer(config) for config in configs]
        comms = [gpu.create(config, buffers) for config in configs]
    taken = (paths or shipped(size).paths).within(geometry)
    return [
        CudaCommunicator(comm, config, where, taken, (), own)
        for comm, config, own in zip(comms, configs, buffers, strict=True)
    ]


def _device(device: torch.device | str | int) -> torch.device:
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type != "cuda":
        raise UsageError(f"connect: {found} is no GPU")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def _agree(rank: int, device: int, everyone: Sequence[dict[str, Any]]) -> None:
    mine = everyone[rank]
    visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    for peer, theirs in enumerate(everyone):
        if theirs["host"] != mine["host"]:
            raise UsageError(
                f"connect: rank {peer} is on host {theirs['host']}, rank {rank} on {mine['host']}; one host is needed"
            )
        if theirs["geometry"] != mine["geometry"]:
            raise UsageError(
                f"connect: rank {peer} has geometry or paths {theirs['geometry']}, rank {rank} {mine['geometry']}"
            )
        index = visible.get(theirs["gpu"])
        if peer != rank and index is not None and index != device and not gpu.can_reach(device, index):
            raise UsageError(f"connect: the GPU of rank {rank} cannot reach that of rank {peer} (no peer access)")


def _host() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{socket.gethostname()} {file.read().strip()}"
