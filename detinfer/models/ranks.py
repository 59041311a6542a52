"""The ranks that one model is spread over, as its layers and goldens see them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from detinfer import bits
from detinfer.collectives import cuda
from detinfer.collectives.calls import Order
from detinfer.collectives.communicator import Communicator
from detinfer.collectives.devices import Communicators
from detinfer.errors import Diverged, RefusedError, UsageError
from detinfer.models.exchange import exchange
from detinfer.models.ranks_proof import CPU, FUSED, SUBJECT, prove, prove_fused
from detinfer.policy.collectives import PEER_MEMORY
from detinfer.policy.decide import MOVES
from detinfer.policy.policy import Accepted, Proof
from detinfer.policy.refusals import message

GATHER = "detinfer::all_gather"
_PATH = {"cpu": "csrc/collectives", "cuda": PEER_MEMORY}
"""Who adds and gathers tensors of a kind of device."""

_SUFFIX: dict[Order, str] = {"rank_order": "", "rank_tree": ".rank_tree"}

Watcher = Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]
"""``watcher(operation, call, arguments)`` is to return ``call(*arguments)``, which all ranks make together."""


@dataclass
class Held:
    """Reduced tensors that the ranks were asked to compare, how many of them differ, and the first that does."""

    tensors: int = 0
    differing: int = 0
    first: str = ""


class Ranks:
    """One process: rank 0 of 1. Sums over ranks and gathering are then copies, which keep every byte."""

    rank: int = 0
    size: int = 1
    timeout: float = 600.0
    """Seconds that a rank waits for the others."""

    def __init__(self) -> None:
        self.held = Held()
        self.reduced: dict[tuple[torch.dtype, int], None] = {}
        """Dtype and width (last dimension) of every sum so far."""
        self.watcher: Watcher | None = None
        """Sees the sums and gatherings of a model's layers, which are no operations that torch's dispatcher knows."""

    def all_reduce(self, x: torch.Tensor, name: str, order: Order = "rank_order") -> torch.Tensor:
        """The sum of every rank's ``x`` in rank order, rounded once to its dtype; ``name`` is the caller's, for reports.

        ``rank_tree`` joins neighbours instead: the order of scope ``tp``.
        """
        return x

    def note(self, x: torch.Tensor, name: str, *, summed: bool) -> None:
        """``x`` is what every rank should hold: ``settle`` compares it. ``summed`` says that it is a sum over ranks."""

    def add_by(self, sum_of: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        """The model's own sum over ranks, which ``sum_of`` takes from now on; None: that of these ranks, by a tree."""

    def between_gpus(self, where: torch.device) -> None:
        """Join the ranks between their GPUs too, this one's on ``where``, by torch.distributed's default group."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's ``x``, one after the other along the last dimension."""
        return x

    def reduce_scatter_rows(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """This rank's rows of ``all_reduce``: the first dimension of ``x`` in as many equal parts as there are ranks."""
        own: torch.Tensor = self.all_reduce(x, name).chunk(self.size)[self.rank]
        return own

    def gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's ``x``, one after the other along the first dimension."""
        return x if self.size == 1 else self.all_gather(x.t().contiguous()).t().contiguous()

    def all_reduce_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm, sum): ``all_reduce``, the residual's addition and RMSNorm in one call; where ``fused`` says so."""
        raise UsageError("these ranks have no fused all_reduce + RMSNorm")

    @property
    def fused(self) -> bool:
        """Whether there is ``all_reduce_rms_norm``."""
        return False

    def sum_of(self, x: torch.Tensor) -> torch.Tensor:
        """``all_reduce`` of something that is no part of the model: nothing is noted."""
        return x

    def share(self, value: Any, first: bool = False) -> list[Any]:
        """Every rank's ``value`` (anything that pickles), by rank; all ranks call it together.

        With ``first`` only rank 0 gets them; the others get an empty list.
        """
        return [value]

    def settle(self) -> None:
        """Compare what the ranks hold of every tensor reduced since the last time; the outcome is in ``held``."""

    def decisions(self) -> list[dict[str, Any]]:
        """What was decided about the operations over ranks that ran, as a policy's decisions are."""
        return []

    def any(self, value: bool) -> bool:
        """Whether ``value`` holds on any rank."""
        return any(self.share(value))

    def digest(self, own: str) -> str:
        """One digest of every rank's own."""
        return own if self.size == 1 else joined(self.share(own))


def joined(digests: Sequence[str]) -> str:
    """One digest of those of every rank's share."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


class Pretended(Ranks):
    """A place among ranks that are not there: a model's share can be built, and nothing can be added over ranks."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size

    def all_reduce(self, x: torch.Tensor, name: str, order: Order = "rank_order") -> torch.Tensor:
        raise UsageError(f"{name}: rank {self.rank} of {self.size} has no others")

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        raise UsageError(f"all_gather: rank {self.rank} of {self.size} has no others")


ALONE = Ranks()
"""A model that one process holds whole."""


class Spread(Ranks):
    """One rank of several, joined by a communicator. Every dtype is proved before its first sum.

    Tensors on GPUs go between those, once ``between_gpus`` has joined them; everything else through the hosts' memory.
    """

    def __init__(self, communicator: Communicator, timeout: float = Ranks.timeout) -> None:
        super().__init__()
        self.rank, self.size, self.timeout = communicator.rank, communicator.size, timeout
        self._communicator: Communicator | Communicators = communicator
        self._host, self._where = communicator, CPU
        self._decisions: dict[tuple[str, torch.dtype, str], Accepted] = {}
        self._pending: list[tuple[str, str]] = []
        self._sum: Callable[[torch.Tensor], torch.Tensor] = self._added

    def between_gpus(self, where: torch.device) -> None:
        self._communicator = Communicators(self._host, cuda.connect(device=where, timeout=self.timeout))
        self._where, self._sum = where, self._added

    def _added(self, x: torch.Tensor, order: Order = "rank_order") -> torch.Tensor:
        """The sum over ranks where the model's are made."""
        return self._communicator.all_reduce(x.to(self._where), order=order).to(x.device)

    def _watched(self, operation: str, call: Callable[..., Any], *args: Any) -> Any:
        return call(*args) if self.watcher is None else self.watcher(operation, call, args)

    def all_reduce(self, x: torch.Tensor, name: str, order: Order = "rank_order") -> torch.Tensor:
        """Raises RefusedError when the path's proof fails here, PeerError when a rank is lost."""
        total: torch.Tensor = self._watched(SUBJECT + _SUFFIX[order], self._all_reduce, x, name, order)
        return total

    @bits.unseen
    def _all_reduce(self, x: torch.Tensor, name: str, order: Order) -> torch.Tensor:
        if (SUBJECT + _SUFFIX[order], x.dtype, x.device.type) not in self._decisions:
            self._prove(x, order)
        total = self._communicator.all_reduce(x, order=order)
        self.note(total, name, summed=True)
        return total

    @bits.unseen
    def note(self, x: torch.Tensor, name: str, *, summed: bool) -> None:
        if summed:
            self.reduced[x.dtype, x.shape[-1]] = None
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # nothing is computed yet; what the graph's replay gives is compared with the file's bytes on every rank
        self._pending.append((name, bits.digest(x)))

    def add_by(self, sum_of: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        self._sum = sum_of or functools.partial(self._added, order="rank_tree")

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        whole: torch.Tensor = self._watched(GATHER, self._gather, x, -1)
        return whole

    @bits.unseen
    def gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        return self._gather(x, 0)

    @bits.unseen
    def _gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        by = Accepted(GATHER, _PATH[x.device.type], MOVES, portable=True)
        self._decisions.setdefault((GATHER, x.dtype, x.device.type), by)
        return self._communicator.all_gather(x, dim=dim)

    @bits.unseen
    def reduce_scatter_rows(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """By the kernel of all_reduce, whose proof stands for it: a slice of the same sum."""
        if (SUBJECT, x.dtype, x.device.type) not in self._decisions:
            self._prove(x)
        self.reduced[x.dtype, x.shape[-1]] = None
        return self._communicator.reduce_scatter(x)

    @property
    def fused(self) -> bool:
        return True

    def all_reduce_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        both: tuple[torch.Tensor, torch.Tensor] = self._watched(
            FUSED, self._all_reduce_rms_norm, x, residual, weight, eps
        )
        return both

    @bits.unseen
    def _all_reduce_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if (FUSED, x.dtype, x.device.type) not in self._decisions:
            self._prove_fused(x)
        self.reduced[x.dtype, x.shape[-1]] = None
        return self._communicator.all_reduce_rms_norm(x, residual, weight, eps, weight_mode="fp32")

    def sum_of(self, x: torch.Tensor) -> torch.Tensor:
        return self._sum(x)

    def _prove(self, x: torch.Tensor, order: Order = "rank_order") -> None:
        dtype = x.dtype
        try:
            cases, results = prove(self._communicator, dtype, order, x.device)
        except Diverged as error:
            raise RefusedError(message(SUBJECT, f"its proof failed on this machine: {error}")) from error
        proof = Proof(
            f"{SUBJECT} {bits.dtype_name(dtype)}",
            "detinfer.reference.all_reduce",
            cases,
            hashlib.sha256(results).hexdigest(),
        )
        why, op = f"canonical order over {self.size} ranks: {order}", SUBJECT + _SUFFIX[order]
        self._decisions[op, dtype, x.device.type] = Accepted(op, _PATH[x.device.type], why, proof, portable=True)

    def _prove_fused(self, x: torch.Tensor) -> None:
        dtype = x.dtype
        try:
            cases, results = prove_fused(self._communicator, dtype, x.device)
        except Diverged as error:
            raise RefusedError(message(FUSED, f"its proof failed on this machine: {error}")) from error
        against = "detinfer.reference.all_reduce_rms_norm"
        proof = Proof(f"{FUSED} {bits.dtype_name(dtype)}", against, cases, hashlib.sha256(results).hexdigest())
        why = f"all_reduce over {self.size} ranks in rank order, then add + RMSNorm"
        self._decisions[FUSED, dtype, x.device.type] = Accepted(FUSED, _PATH[x.device.type], why, proof, portable=True)

    def decisions(self) -> list[dict[str, Any]]:
        return [
            {"op": op, "dtypes": [bits.dtype_name(dtype)]} | decision.to_json()
            for (op, dtype, _), decision in self._decisions.items()
        ]

    @bits.unseen
    def share(self, value: Any, first: bool = False) -> list[Any]:
        return exchange(self._host, value, first)

    @bits.unseen
    def settle(self) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        self.held.tensors += len(pending)
        # One digest of all is enough where the ranks agree.
        mine = hashlib.sha256(repr(pending).encode()).digest()
        everyone = self._host.all_gather(torch.frombuffer(bytearray(mine), dtype=torch.uint8)[None])
        if len({bytes(row.tolist()) for row in everyone}) == 1:
            return
        lists = self.share(pending)
        for place, row in enumerate(zip(*lists, strict=False)):
            if len(set(row)) > 1:
                self.held.differing += 1
                odd = [rank for rank, item in enumerate(row) if item != row[0]]
                ranks = f"ranks {', '.join(map(str, odd))} hold" if len(odd) > 1 else f"rank {odd[0]} holds"
                self.held.first = self.held.first or f"{row[0][0]}: {ranks} other bytes than rank 0 (sum {place})"
