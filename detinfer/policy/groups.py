"""A process group under a policy: how its ranks are joined, the proofs made at its size, and its collectives.

Ranks of one host share memory (``collectives.connect``); GPUs of one host that reach each other write into each other's
(``collectives.cuda.connect``). Where they cannot, every collective is the backend's all_gather and the ordered sum on each
rank: slower, the same bytes.
"""

from __future__ import annotations

import datetime
import secrets
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from detinfer import native
from detinfer.collectives import communicator
from detinfer.collectives.calls import ReduceOp
from detinfer.collectives.communicator import Communicator, connect
from detinfer.collectives.cuda import CudaCommunicator
from detinfer.collectives.cuda import connect as connect_gpus
from detinfer.collectives.ordered_gather import reduce_gathered
from detinfer.errors import DetinferError, PeerError, RefusedError, UsageError
from detinfer.policy.collectives import ORDERED_GATHER, PEER_MEMORY, SHARED_MEMORY, Collective, Ranks
from detinfer.policy.policy import Accepted, Policy, Proof, Refused
from detinfer.policy.rank_proofs import compare, gathered, shared_memory, ways
from detinfer.torch_alone import torch_alone

PATIENCE = 1800.0
"""Seconds that a rank waits for the others where the backend does not say: torch.distributed's own default."""


_ROOM = 512
"""Bytes of a rank's name and host."""


class Group:
    """One process group on one kind of device. All its ranks call each method together, in the same order."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Join the ranks. Raises PeerError where one dies or does not come."""
        self._group = weakref.ref(group)
        self.rank, self.size = group.rank(), group.size()
        self._device = device
        self.policy: Policy | None = None
        self.settled: dict[Any, Any] = {}
        """What ``policy`` has decided: the overrides' memo."""
        self.fast: dict[Any, tuple[ReduceOp, Any, Accepted]] = {}
        """all_reduce calls that it sends to the ranks' own memory, by (ReduceOp, dtype): ``front``'s memo."""
        self._proofs: dict[tuple[Collective, str, torch.dtype], Proof | Refused] = {}
        self.communicator: Communicator | CudaCommunicator | None = None
        self.why = ""
        """Why the ranks share no memory; empty where they do."""
        _outside_of_capture(device)
        with torch_alone():
            self._join(group)

    def _join(self, group: dist.ProcessGroup) -> None:
        joins: dict[str, Callable[[dist.ProcessGroup], Communicator | CudaCommunicator]] = {
            "cpu": self._share_memory,
            "cuda": self._reach_each_other,
        }
        join = joins.get(self._device.type)
        if join is None:
            self.why = f"its tensors are on {self._device.type}"
            return
        try:
            self.communicator = join(group)
        except PeerError:
            raise
        except (DetinferError, OSError) as error:
            self.why = str(error)
        # One rank that has no shared memory sends all of them the other way.
        if not self._all_agree(self.communicator is not None) and self.communicator is not None:
            self.communicator.close()
            self.communicator, self.why = None, "another rank has no shared memory"

    def _share_memory(self, group: dist.ProcessGroup) -> Communicator:
        name, others = self._agree(f"{secrets.token_hex(16)} {communicator.host()}")
        if others:
            raise UsageError(f"ranks are on several hosts: {', '.join(others)}")
        return connect(name=name, rank=self.rank, size=self.size, timeout=self._patience(group))

    def _reach_each_other(self, group: dist.ProcessGroup) -> CudaCommunicator:
        # What one rank alone may lack is agreed on first: connecting is done by all ranks or by none.
        state = native.load_gpu()
        if not self._all_agree(isinstance(state, native.Loaded)):
            raise UsageError(state.reason if isinstance(state, native.NotLoaded) else "another rank has no GPU library")
        return connect_gpus(group, device=self._device, timeout=self._patience(group))

    def takes(self, collective: Collective, dtype: torch.dtype) -> bool:
        """Whether the ranks' own kernels do it: between GPUs they reduce float32, bfloat16 and float16 and copy all."""
        if self.communicator is None:
            return False
        return self._device.type == "cpu" or collective == "all_gather" or dtype in native.DTYPES

    def ranks(self, collective: Collective, dtype: torch.dtype) -> Ranks:
        """The group as a decision about ``collective`` of ``dtype`` sees it."""
        own = SHARED_MEMORY if self._device.type == "cpu" else PEER_MEMORY
        return Ranks(self.size, own if self.takes(collective, dtype) else ORDERED_GATHER, self.prove)

    def _agree(self, mine: str) -> tuple[str, list[str]]:
        """(a name that all ranks have, the hosts where they are not the same) of each rank's name and host."""
        # Not by all_gather_object: its operators are overridden.
        letters = torch.tensor(list(mine.encode().ljust(_ROOM)[:_ROOM]), dtype=torch.uint8, device=self._device)
        names, hosts = zip(*(bytes(part.tolist()).split(b" ", 1) for part in self.gather(letters)), strict=True)
        found = sorted({one.decode(errors="replace").strip() for one in hosts})
        return names[0].decode(), found if len(found) > 1 else []

    def _patience(self, group: Any) -> float:
        options = getattr(group._get_backend(self._device), "options", None)
        timeout = getattr(options, "_timeout", None)
        return timeout.total_seconds() if isinstance(timeout, datetime.timedelta) else PATIENCE

    def _all_agree(self, yes: bool) -> bool:
        flags = self.gather(torch.tensor([int(yes)], dtype=torch.int32, device=self._device))
        return all(int(flag) for flag in flags)

    def prove(self, collective: Collective, reduction: str, dtype: torch.dtype) -> Proof | Refused:
        """The proof at this group's size, or why there is none; made once, by all ranks together.

        Raises RankMismatch where the ranks want different proofs, PeerError where one is lost.
        """
        subject = (collective, reduction, dtype)
        if subject not in self._proofs:
            _outside_of_capture(self._device)
            with torch_alone():
                self._proofs[subject] = self._prove(subject)
        return self._proofs[subject]

    def _prove(self, subject: tuple[Collective, str, torch.dtype]) -> Proof | Refused:
        collective, reduction, dtype = subject
        op, path = f"{collective}({reduction})", self.ranks(collective, dtype).path
        if self.communicator is not None and self.takes(collective, dtype):
            run = shared_memory(self.communicator, collective, reduction)
        else:

            def run(own: torch.Tensor, way: str | None) -> torch.Tensor:
                return gathered(collective, reduction, self.gather(own), self.rank)

        found: Proof | Refused
        try:
            found = compare(run, ways(path, collective), subject, self.rank, self.size, self._device)
        except (PeerError, dist.DistError):
            raise
        except DetinferError as error:
            found = Refused(op, path, f"its proof failed on this machine: {error}")
        if not self._all_agree(isinstance(found, Proof)) and isinstance(found, Proof):
            found = Refused(op, path, "its proof failed on another rank of the group")
        return found

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's ``tensor`` by the backend's own all_gather; nothing overridden is called."""
        group: Any = self._group()
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        own = plain.reshape(-1).view(torch.uint8)
        if not own.numel():
            return [plain] * self.size
        outs = [torch.empty_like(own) for _ in range(self.size)]
        # The backend itself and not an operator's kernel, which would wait with Python's lock held.
        group._get_backend(self._device).allgather([outs], [own]).wait()
        return [out.view(tensor.dtype).view(plain.shape) for out in outs]

    def all_reduce(self, tensor: torch.Tensor, reduction: str, *, write: bool = True) -> None:
        """Reduce ``tensor`` over the ranks, in place; a rank that does not ``write`` only takes part."""
        if self.communicator is not None and self.takes("all_reduce", tensor.dtype):
            self.communicator.all_reduce(
                tensor,
                op=reduction,  # type: ignore[arg-type]
                out=tensor if write else None,
            )
            return
        parts = self.gather(tensor)
        if write:
            tensor.detach().copy_(reduce_gathered(parts, reduction))

    def reduce_scatter(self, output: torch.Tensor, whole: torch.Tensor, reduction: str) -> None:
        """Write this rank's slice of the reduced ``whole``, along its first dimension, into ``output``."""
        flat = whole.reshape(self.size, -1)
        if self.communicator is not None and self.takes("reduce_scatter", whole.dtype):
            mine = self.communicator.reduce_scatter(flat, op=reduction)  # type: ignore[arg-type]
        else:
            mine = reduce_gathered([part[self.rank] for part in self.gather(flat)], reduction)
        output.detach().copy_(mine.view(output.shape))

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's ``tensor``."""
        if self.communicator is not None:  # it takes every dtype
            return list(self.communicator.all_gather(tensor.reshape(1, *tensor.shape)).unbind(0))
        return self.gather(tensor)

    def gather_into(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        """Write every rank's ``tensor``, one after the other, into ``output``."""
        if isinstance(self.communicator, CudaCommunicator) and output.is_contiguous() and tensor.numel():
            self.communicator.all_gather(tensor.reshape(1, -1), out=output.detach().view(self.size, -1))
        else:
            output.detach().copy_(torch.stack(self.all_gather(tensor)).view(output.shape))

    def close(self) -> None:
        """Leave the others."""
        if self.communicator is not None:
            self.communicator.close()


def _outside_of_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RefusedError(
            "a group's first collective of a kind joins its ranks and proves the path, which a CUDA graph cannot hold: "
            "make the call once before the capture"
        )


_of_gpus: weakref.WeakKeyDictionary[Any, Group] = weakref.WeakKeyDictionary()
"""Groups of GPUs, for the life of the process: a CUDA graph that was captured inside a policy may be replayed after it, and
a rank that frees its buffers while another still writes into them would bring both down."""


class Groups:
    """The groups met under the policies in force, each from its first collective on."""

    def known_to(self, group: dist.ProcessGroup | None, tensor: torch.Tensor) -> Group | None:
        """The group's state for tensors on the CPU or on the GPU, as this one is, if it was met before."""
        if group is None:
            return None
        if tensor.is_cuda:
            return _of_gpus.get(group)
        by_device = self._found.get(group) if tensor.is_cpu else None
        return None if by_device is None else by_device.get("cpu")

    def __init__(self) -> None:
        self._found: weakref.WeakKeyDictionary[Any, dict[str, Group]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def of(self, group: dist.ProcessGroup, device: torch.device) -> Group:
        """The group's state for ``device``; the first call of a group is made by all its ranks together."""
        if device.type == "cuda":
            return self._of_gpus(group, device)
        by_device = self._found.get(group)
        found = None if by_device is None else by_device.get(device.type)
        if found is None:
            found = Group(group, device)
            with self._lock:
                self._found.setdefault(group, {})[device.type] = found
        return found

    def _of_gpus(self, group: dist.ProcessGroup, device: torch.device) -> Group:
        found = _of_gpus.get(group)
        if found is None:
            found = Group(group, device)
            with self._lock:
                _of_gpus[group] = found
        return found

    def close(self) -> None:
        """Leave them all, but for groups of GPUs."""
        for by_device in list(self._found.values()):
            for found in by_device.values():
                found.close()
        self._found.clear()
