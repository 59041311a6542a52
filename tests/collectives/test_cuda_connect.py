"""Joining GPUs where it cannot be done: every rank is told, in words, and no memory is left behind. Needs no GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from detinfer.collectives import cuda, cuda_paths
from detinfer.errors import InfrastructureError, NativeError, UsageError

SIZE = 3


class Machine:
    """Rank 0 of three, with a driver that notes what it is asked; the others answer what ``others`` makes of rank 0's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: list[int] = []
        self.asked = 0
        self.fails: dict[str, Exception] = {}
        self.others: list[dict[str, Any]] = [{}, {}]
        self.second: list[str | None] = [None, None]
        self.reach = True
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda group: 0)
        monkeypatch.setattr(dist, "get_world_size", lambda group: SIZE)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: SIZE)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"gpu-{_index(i)}"))
        monkeypatch.setattr(cuda, "_told", self._told)
        monkeypatch.setattr(cuda.gpu, "create_buffer", lambda config: self._take("buffer"))
        monkeypatch.setattr(cuda.gpu, "handle_of", lambda address: b"handle")
        monkeypatch.setattr(cuda.gpu, "open_handle", lambda handle: self._take("open"))
        monkeypatch.setattr(cuda.gpu, "create", lambda config, buffers: self._take("create"))
        monkeypatch.setattr(cuda.gpu, "can_reach", lambda device, peer: self.reach)
        monkeypatch.setattr(cuda.gpu, "close_handle", self.held.remove)
        monkeypatch.setattr(cuda.gpu, "free_buffer", self.held.remove)
        monkeypatch.setattr(cuda.gpu, "destroy", self.held.remove)

    def _take(self, what: str) -> int:
        if what in self.fails:
            raise self.fails[what]
        self.held.append(len(self.held) + 1)
        return self.held[-1]

    def _told(self, group: Any, size: int, mine: Any) -> list[Any]:
        self.asked += 1
        if self.asked == 1:
            assert mine["problem"] is None or isinstance(mine["problem"], str)
            given = [{"gpu": f"gpu-{rank}", **change} for rank, change in enumerate(self.others, 1)]
            return [mine, *({**mine, "problem": None, **change} for change in given)]
        return [mine, *self.second]


def _index(device: Any) -> int:
    return device if isinstance(device, int) else int(torch.device(device).index)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine of three GPUs and no table of the user's."""
    monkeypatch.delenv(cuda_paths.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nowhere")
    return Machine(monkeypatch)


def test_another_host(machine: Machine) -> None:
    """Is named."""
    machine.others[1] = {"host": "elsewhere 1234"}
    with pytest.raises(UsageError, match=r"rank 2 is on host elsewhere 1234, rank 0 on"):
        cuda.connect()
    assert (machine.asked, machine.held) == (2, [])


def test_another_table(machine: Machine) -> None:
    """Ranks that would take other paths never meet."""
    machine.others[0] = {"geometry": "another"}
    with pytest.raises(UsageError, match=r"rank 1 has geometry or paths another, rank 0 "):
        cuda.connect()
    assert (machine.asked, machine.held) == (2, [])


def test_no_peer_access(machine: Machine) -> None:
    """Both ranks are named."""
    machine.reach = False
    with pytest.raises(UsageError, match=r"GPU of rank 0 cannot reach that of rank 1 \(no peer access\)"):
        cuda.connect()
    assert (machine.asked, machine.held) == (2, [])


def test_a_peer_whose_gpu_is_not_visible(machine: Machine) -> None:
    """Whether it can be reached shows when its memory is opened: the error names the rank, its GPU and what to do."""
    machine.reach = False
    machine.others = [{"gpu": "gpu-hidden"}, {"gpu": "gpu-0"}]
    machine.fails["open"] = NativeError("opening a peer's IPC handle: invalid device context")
    with pytest.raises(
        UsageError, match=r"rank 0 cannot open the memory of rank 1 on GPU gpu-hidden: opening .*visible to both"
    ):
        cuda.connect()
    assert (machine.asked, machine.held) == (2, [])


@pytest.mark.parametrize("what", ["buffer", "create"])
def test_a_driver_that_refuses(machine: Machine, what: str) -> None:
    """This rank raises what the driver said; the others have been told."""
    machine.fails[what] = NativeError("no memory for that")
    with pytest.raises(NativeError, match="no memory for that"):
        cuda.connect()
    assert machine.asked == (1 if what == "buffer" else 2)
    assert machine.held == []


def test_another_rank_that_fails(machine: Machine) -> None:
    """Before the ranks have exchanged their memory and after: its sentence comes with its rank, and nothing is left."""
    machine.others[1] = {"problem": "no memory for that"}
    with pytest.raises(InfrastructureError, match="connect: rank 2: no memory for that"):
        cuda.connect()
    assert (machine.asked, machine.held) == (1, [])
    machine.asked, machine.others[1], machine.second = 0, {}, ["kernels do not fit", None]
    with pytest.raises(InfrastructureError, match="connect: rank 1: kernels do not fit"):
        cuda.connect()
    assert (machine.asked, machine.held) == (2, [])


def test_too_many_ranks(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is said before anything is allocated."""
    monkeypatch.setattr(dist, "get_world_size", lambda group: 9)
    with pytest.raises(UsageError, match="9 ranks; there can be 2 to 8 GPUs"):
        cuda.connect()
    assert machine.asked == 0
