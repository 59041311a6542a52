"""A group of GPUs under a policy: how it is joined, which path it takes, how long it lives. No GPU is needed here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from detinfer import native
from detinfer.collectives.cuda import CudaCommunicator
from detinfer.errors import NativeError, PeerError, UsageError
from detinfer.policy import groups
from detinfer.policy.collectives import ORDERED_GATHER, PEER_MEMORY
from detinfer.policy.groups import Group, Groups
from detinfer.policy.rank_proofs import ways

BF16 = torch.bfloat16


class Joined(CudaCommunicator):
    """What connecting gives: notes what it is asked for."""

    def __init__(self) -> None:
        self.closed = False
        self.gathered: list[tuple[Any, Any]] = []

    def all_gather(self, tensor: Any, *, dim: int = 0, path: str | None = None, out: Any = None) -> Any:
        self.gathered.append((tuple(tensor.shape), None if out is None else tuple(out.shape)))
        return torch.cat([tensor, tensor + 1]) if out is None else out.copy_(torch.cat([tensor, tensor + 1]))

    def close(self) -> None:
        self.closed = True


class Process:
    """A process group of two, of which only rank and size are asked."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2

    def _get_backend(self, device: Any) -> Any:
        return self


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the rest of the world does: ``agree`` are the other ranks' answers, ``connect`` is given or raised."""
    world: dict[str, Any] = {"agree": [True, True], "connect": Joined(), "library": native.Loaded, "calls": 0}

    def connect(group: Any, *, device: Any, timeout: float) -> Any:
        world["calls"] += 1
        if isinstance(world["connect"], Exception):
            raise world["connect"]
        return world["connect"]

    def load() -> Any:
        made = {native.Loaded: (None, ("cuda",)), native.NotLoaded: ("libdetinfer_gpu.so is nowhere",)}
        return world["library"](*made[world["library"]])

    monkeypatch.setattr(groups, "connect_gpus", connect)
    monkeypatch.setattr(native, "load_gpu", load)
    monkeypatch.setattr(groups, "_outside_of_capture", lambda device: None)
    monkeypatch.setattr(groups, "_of_gpus", type(groups._of_gpus)())
    monkeypatch.setattr(Group, "_all_agree", lambda self, yes: yes and world["agree"].pop(0))
    return world


def joined() -> Group:
    """The group, seen from rank 0."""
    return Group(Process(), torch.device("cuda", 0))  # type: ignore[arg-type]


def test_gpus_that_reach_each_other(others: dict[str, Any]) -> None:
    """Their own kernels reduce three dtypes and copy all; the rest is gathered and added in order."""
    group = joined()
    assert group.communicator is others["connect"]
    for collective, dtype, path in (
        *((c, d, PEER_MEMORY) for c in ("all_reduce", "reduce_scatter") for d in (torch.float32, BF16, torch.float16)),
        *((c, d, ORDERED_GATHER) for c in ("all_reduce", "reduce_scatter") for d in (torch.float64, torch.int32)),
        *(("all_gather", d, PEER_MEMORY) for d in (BF16, torch.int64, torch.float64, torch.bool)),
    ):
        assert group.ranks(collective, dtype).path == path, (collective, dtype)
    assert ways(PEER_MEMORY, "all_reduce") == ("push", "push_tiles", "pull", "two_shot")
    assert ways(PEER_MEMORY, "all_gather") == ("push", "push_tiles")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"library": native.NotLoaded}, "libdetinfer_gpu.so is nowhere"),
        ({"agree": [False, True]}, "another rank has no GPU library"),
        ({"connect": UsageError("the GPU of rank 0 cannot reach that of rank 1")}, "cannot reach"),
        ({"connect": NativeError("out of memory")}, "out of memory"),
        ({"agree": [True, False]}, "another rank has no shared memory"),
    ],
    ids=["no library", "no library there", "no peer access", "a CUDA error", "a rank that failed later"],
)
def test_all_ranks_gather_where_one_cannot_join(others: dict[str, Any], change: dict[str, Any], why: str) -> None:
    """The reason is kept; what was connected is closed; connecting is not begun by a part of the ranks."""
    others.update(change)
    group = joined()
    assert group.communicator is None and why in group.why
    assert group.ranks("all_reduce", BF16).path == group.ranks("all_gather", BF16).path == ORDERED_GATHER
    assert others["calls"] == (0 if "library" in why or "nowhere" in why else 1)
    if "later" in why or "shared memory" in why:
        assert others["connect"].closed


def test_a_lost_rank_is_an_error(others: dict[str, Any]) -> None:
    others["connect"] = PeerError("rank 1 died")
    with pytest.raises(PeerError, match="rank 1 died"):
        joined()


def test_a_gather_is_written_where_it_belongs(others: dict[str, Any]) -> None:
    """Into the caller's tensor where that is contiguous; else by a copy."""
    group = joined()
    own, whole = torch.arange(6).view(2, 3), torch.empty(4, 3, dtype=torch.int64)
    group.gather_into(whole, own)
    assert whole.tolist() == [*own.tolist(), *(own + 1).tolist()]
    assert others["connect"].gathered == [((1, 6), (2, 6))]
    apart = torch.empty(3, 4, dtype=torch.int64).t()
    group.gather_into(apart, own)
    assert apart.tolist() == whole.tolist()
    assert others["connect"].gathered[1] == ((1, 2, 3), None)


def test_a_group_of_gpus_is_joined_once_for_all_policies(others: dict[str, Any]) -> None:
    """A graph captured inside a policy may be replayed after it: leaving does not free what its kernels use."""
    process, device = Process(), torch.device("cuda", 0)
    first, second = Groups(), Groups()
    group = first.of(process, device)  # type: ignore[arg-type]
    first.close()
    assert second.of(process, device) is group and others["calls"] == 1  # type: ignore[arg-type]
    assert not others["connect"].closed
