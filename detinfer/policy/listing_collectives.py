"""Every decision that a policy makes about collectives on this machine, path by path, without any process group.

The proofs are made between three threads of this process, those of the GPU's path between three streams of one GPU: from
three ranks on an order shows.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from detinfer.collectives.calls import OPS
from detinfer.collectives.communicator import Communicator, connect
from detinfer.collectives.cuda import CudaCommunicator, connect_here
from detinfer.errors import DetinferError, PeerError, RankMismatch
from detinfer.policy import refusals
from detinfer.policy.collectives import BACKEND, COVERED, ORDERED_GATHER, PEER_MEMORY, SHARED_MEMORY, Collective, Ranks
from detinfer.policy.decide import decide
from detinfer.policy.families import own
from detinfer.policy.policy import Decision, Policy, Proof, Refused
from detinfer.policy.rank_proofs import compare, gathered, inputs, shared_memory, tensor, ways

SIZE = 3
"""Ranks between which the proofs are made."""

UNORDERED = (
    "gloo, NCCL and RCCL add in an order that depends on the tensor's size and the number of ranks: it is used for exact "
    "reductions and copies only"
)

Prove = Callable[[Collective, str, torch.dtype], Proof | Refused]


def explain_collectives(policy: Policy, dtypes: Sequence[torch.dtype] = refusals.DTYPES) -> list[Decision]:
    """What ``policy`` decides for every covered operator, canonical reduction, path and dtype; each decision once."""
    with ThreadPoolExecutor(SIZE) as pool:
        found: dict[Decision, None] = {}
        shared, gpus = _shared(pool), _on_one_gpu()
        try:
            paths: list[tuple[str, Prove]] = [(SHARED_MEMORY, _among(pool, shared)), (ORDERED_GATHER, _here)]
            if torch.cuda.is_available():
                paths.insert(1, (PEER_MEMORY, _among_streams(pool, gpus)))
            for path, prove in paths:
                ranks = Ranks(SIZE, path, prove)
                for op, collective in COVERED.items():
                    for reduction in ("",) if collective == "all_gather" else OPS:
                        for dtype in dtypes:
                            found[decide(policy, op, (dtype,), own().known, variant=reduction, ranks=ranks)] = None
        finally:
            for communicators in (shared, gpus):
                for one in communicators if isinstance(communicators, list) else ():
                    one.close()
    reducing = [op for op, collective in COVERED.items() if collective != "all_gather"]
    ranks = Ranks(SIZE, BACKEND, lambda *subject: Refused(subject[0], BACKEND, UNORDERED))
    for op in reducing:
        found[decide(policy, op, (torch.float32,), own().known, variant="sum", ranks=ranks)] = None
        found[decide(policy, op, (torch.float32,), own().known, variant="product", ranks=ranks)] = None
        if not torch.cuda.is_available():
            found[Refused(op, PEER_MEMORY, "there is no CUDA device on this machine")] = None
    return list(found)


def _on_one_gpu() -> list[CudaCommunicator] | str:
    if not torch.cuda.is_available():
        return "there is no CUDA device on this machine"
    try:
        return connect_here(SIZE, torch.device("cuda", torch.cuda.current_device()), timeout=20.0)
    except (DetinferError, OSError) as error:
        return str(error)


def _among_streams(pool: ThreadPoolExecutor, ranks: list[CudaCommunicator] | str) -> Prove:
    if isinstance(ranks, str):
        return lambda *subject: Refused(subject[0], PEER_MEMORY, ranks)
    lost: list[str] = []  # a rank that was waited for in vain: the communicators are of no further use
    streams = {one.rank: torch.cuda.Stream(one.device) for one in ranks}  # type: ignore[no-untyped-call]

    def prove(collective: Collective, reduction: str, dtype: torch.dtype) -> Proof | Refused:
        subject = (collective, reduction, dtype)

        def one(rank: CudaCommunicator) -> Proof:
            run = shared_memory(rank, collective, reduction)
            with torch.cuda.device(rank.device), torch.cuda.stream(streams[rank.rank]):
                return compare(run, ways(PEER_MEMORY, collective), subject, rank.rank, SIZE, rank.device)

        def everyone() -> list[Proof]:
            try:
                return list(pool.map(one, ranks))
            except (PeerError, RankMismatch) as error:
                lost.append(str(error))
                raise

        if lost:
            return Refused(collective, PEER_MEMORY, f"its proof did not run: {lost[0]}")
        return _first(PEER_MEMORY, collective, everyone)

    return _once(prove)


def _once(prove: Prove) -> Prove:
    known: dict[tuple[Collective, str, torch.dtype], Proof | Refused] = {}

    def remembered(collective: Collective, reduction: str, dtype: torch.dtype) -> Proof | Refused:
        subject = (collective, reduction, dtype)
        if subject not in known:
            known[subject] = prove(*subject)
        return known[subject]

    return remembered


def _shared(pool: ThreadPoolExecutor) -> list[Communicator] | str:
    name = f"explain-{secrets.token_hex(8)}"
    try:
        return list(pool.map(lambda rank: connect(name=name, rank=rank, size=SIZE), range(SIZE)))
    except (DetinferError, OSError) as error:
        return str(error)


def _among(pool: ThreadPoolExecutor, shared: list[Communicator] | str) -> Prove:
    if isinstance(shared, str):
        return lambda *subject: Refused(subject[0], SHARED_MEMORY, shared)

    def prove(collective: Collective, reduction: str, dtype: torch.dtype) -> Proof | Refused:
        subject = (collective, reduction, dtype)

        def one(ranks: Communicator) -> Proof:
            run = shared_memory(ranks, collective, reduction)
            return compare(run, ways(SHARED_MEMORY, collective), subject, ranks.rank, SIZE)

        return _first(SHARED_MEMORY, collective, lambda: list(pool.map(one, shared)))

    return _once(prove)


def _here(collective: Collective, reduction: str, dtype: torch.dtype) -> Proof | Refused:
    """The ordered sum of parts that are here already: the backend's part is a copy."""

    def all_ranks() -> list[Proof]:
        subject = (collective, reduction, dtype)
        parts = [tensor(part, dtype) for part in inputs(collective, reduction, dtype, SIZE)[0]]
        return [
            compare(lambda own, way, r=rank: gathered(collective, reduction, parts, r), (None,), subject, rank, SIZE)  # type: ignore[misc]
            for rank in range(SIZE)
        ]

    return _first(ORDERED_GATHER, collective, all_ranks)


def _first(path: str, collective: str, prove: Callable[[], list[Proof]]) -> Proof | Refused:
    try:
        return prove()[0]
    except DetinferError as error:
        return Refused(collective, path, f"its proof failed on this machine: {error}")
