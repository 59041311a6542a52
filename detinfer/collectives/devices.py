"""One ``connect`` for tensors on CPU and on GPUs, and ranks that have both."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from detinfer import native
from detinfer.collectives import communicator, cuda
from detinfer.collectives.communicator import STAGING, Communicator
from detinfer.collectives.cuda import CudaCommunicator
from detinfer.errors import NativeError, UsageError


class Communicators:
    """Ranks whose tensors are on CPU and on GPUs: a call goes where its tensor is. See ``Communicator`` for the methods.

    ``cuda`` is the reason where there is no communicator between the GPUs: a call with a GPU's tensor raises it.
    """

    def __init__(self, cpu: Communicator, cuda: CudaCommunicator | str) -> None:
        """``connect`` makes communicators."""
        self.rank, self.size, self.cpu, self.cuda = cpu.rank, cpu.size, cpu, cuda

    def on(self, tensor: torch.Tensor) -> Any:
        """The communicator of the tensor's device."""
        if not tensor.is_cuda:
            return self.cpu
        if isinstance(self.cuda, str):
            raise NativeError(f"a tensor is on {tensor.device}, and the ranks are not joined between GPUs: {self.cuda}")
        return self.cuda

    def all_reduce(self, tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        """The ranks' tensors reduced element by element: ``op``, ``order``, ``path``, ``out``."""
        found: torch.Tensor = self.on(tensor).all_reduce(tensor, **options)
        return found

    def reduce_scatter(self, tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        """This rank's slice of ``all_reduce``: ``dim``, ``op``, ``order``, ``path``, ``out``."""
        found: torch.Tensor = self.on(tensor).reduce_scatter(tensor, **options)
        return found

    def all_gather(self, tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        """The ranks' tensors one after the other: ``dim``, ``out``."""
        found: torch.Tensor = self.on(tensor).all_gather(tensor, **options)
        return found

    def all_reduce_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm, residual_out): ``mode``, ``weight_mode``, ``order``, ``path``, ``out``, ``residual_out``."""
        ranks = self.on(x)
        found: tuple[torch.Tensor, torch.Tensor] = ranks.all_reduce_rms_norm(x, residual, weight, eps, **options)
        return found

    def barrier(self) -> None:
        """Wait for all ranks, on the host."""
        self.cpu.barrier()

    def close(self) -> None:
        """Close both; on all ranks. May be called twice."""
        self.cpu.close()
        if not isinstance(self.cuda, str):
            self.cuda.close()

    def __enter__(self) -> Communicators:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(
    group: dist.ProcessGroup | None = None,
    *,
    device: torch.device | str | int | None = None,
    name: str | None = None,
    rank: int | None = None,
    size: int | None = None,
    timeout: float = 30.0,
    staging: int = STAGING,
) -> Communicator | CudaCommunicator | Communicators:
    """Join the ranks of ``group`` (None: torch.distributed's default group), which all call this at the same time.

    What the collectives take is on ``device``: ``"cpu"`` gives a ``Communicator``, a GPU (``"cuda"``: the current one) a
    ``CudaCommunicator``. None goes by the group: gloo reduces on CPU, nccl between GPUs, and a group with both
    (``cpu:gloo,cuda:nccl``) gives ``Communicators``, which take either. ``name``, ``rank`` and ``size`` stand for a group
    without torch.distributed, on CPU; ``staging`` is the CPU's (``communicator.connect``). ``timeout``, in seconds, bounds
    every wait for a peer.

    Raises UsageError where the ranks cannot be joined, PeerError where one does not arrive or dies, NativeError where the
    native library is missing or refuses.
    """
    wanted = _kind(device)
    alone = any(value is not None for value in (name, rank, size))
    if alone and wanted == "cuda":
        raise UsageError("connect: GPUs are joined by a group of torch.distributed, not by name, rank and size")
    if wanted is None and not alone and group_kind(group) != "cpu":
        wanted = group_kind(group)
    if wanted == "cuda":
        return cuda.connect(group, device=device, timeout=timeout)
    cpu = communicator.connect(group, name=name, rank=rank, size=size, timeout=timeout, staging=staging)
    if wanted != "both" or cpu.size == 1:
        return cpu
    try:
        return Communicators(cpu, _between_gpus(group, cpu, timeout))
    except BaseException:
        cpu.close()
        raise


def _kind(device: torch.device | str | int | None) -> str | None:
    if device is None:
        return None
    kind = "cuda" if isinstance(device, int) else torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"connect: device {device}; there are collectives on cpu and cuda")
    return kind


def group_kind(group: dist.ProcessGroup | None) -> str:
    """``cpu``, ``cuda`` or ``both``: where the group's backends suggest that its tensors are."""
    if not dist.is_available() or not dist.is_initialized():
        return "cpu"
    config = dict(part.split(":") for part in str(dist.get_backend_config(group)).split(",") if ":" in part)
    if config.get("cuda") != "nccl":  # RCCL has this name too; gloo reduces GPUs' tensors in the host's memory
        return "cpu"
    return "both" if config.get("cpu", "nccl") != "nccl" else "cuda"


def _between_gpus(group: dist.ProcessGroup | None, cpu: Communicator, timeout: float) -> CudaCommunicator | str:
    # What one rank alone may lack is agreed on first: connecting is done by all ranks or by none.
    state = native.load_gpu()
    why = (
        state.reason
        if isinstance(state, native.NotLoaded)
        else ""
        if torch.cuda.is_available()
        else "torch sees no GPU"
    )
    everyone = cpu.all_gather(torch.tensor([bool(why)])).tolist()
    if any(everyone):
        return why or f"rank {everyone.index(True)} has no GPU or no GPU library"
    return cuda.connect(group, timeout=timeout)
