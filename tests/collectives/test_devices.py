"""``connect``: which device a group's collectives are for, and ranks that have both."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from detinfer.collectives import Communicator, Communicators, connect, devices
from detinfer.errors import NativeError, UsageError


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("cpu:gloo,cuda:gloo", "cpu"),
        ("cpu:gloo", "cpu"),
        ("cuda:nccl", "cuda"),
        ("cpu:gloo,cuda:nccl", "both"),
        ("cpu:own,cuda:own", "cpu"),
    ],
)
def test_what_a_group_is_for(config: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its backends."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    assert devices.group_kind(None) == kind
    called: list[Any] = []
    monkeypatch.setattr(devices.cuda, "connect", lambda group, **options: called.append(("cuda", options)))
    monkeypatch.setattr(devices.communicator, "connect", lambda group, **options: pytest.fail("joined on CPU"))
    if kind == "cuda":
        connect(timeout=7.0)
        assert called == [("cuda", {"device": None, "timeout": 7.0})]
    connect(device="cuda:1")
    assert called[-1] == ("cuda", {"device": "cuda:1", "timeout": 30.0})


def test_gloo(tmp_path: Path) -> None:
    """A group of gloo is joined on CPU, and cpu may be asked for."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for device in (None, "cpu", torch.device("cpu")):
            with connect(device=device) as ranks:
                assert isinstance(ranks, Communicator)
                assert ranks.all_reduce(torch.ones(3)).tolist() == [1.0] * 3
    finally:
        dist.destroy_process_group()


def test_what_cannot_be() -> None:
    """Unknown devices, GPUs without a group, and no group at all."""
    with pytest.raises(UsageError, match="device meta"):
        connect(device="meta")
    with pytest.raises(UsageError, match="not by name, rank and size"):
        connect(device="cuda", name="n", rank=0, size=2)
    for device in (None, "cuda"):
        with pytest.raises(UsageError, match=r"torch\.distributed is not initialized"):
            connect(device=device)


def _both(monkeypatch: pytest.MonkeyPatch, answers: list[Any]) -> list[Any]:
    """Two ranks in threads, of a group that says that it is for both; what each got."""
    monkeypatch.setattr(devices, "group_kind", lambda group: "both")
    plain = devices.communicator.connect
    place = threading.local()
    monkeypatch.setattr(
        devices.communicator,
        "connect",
        lambda group, **options: plain(name=f"both-{id(answers)}", rank=place.rank, size=2, timeout=20.0),
    )
    monkeypatch.setattr(devices.native, "load_gpu", lambda: answers[place.rank])
    found: list[Any] = [None, None]

    def run(rank: int) -> None:
        place.rank = rank
        found[rank] = connect()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call goes where its tensor is; close closes both."""
    told: list[Any] = []

    class Gpu:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments, **options: told.append((name, options))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.cuda, "connect", lambda group, **options: Gpu())
    first, second = _both(monkeypatch, ["loaded", "loaded"])
    assert isinstance(first, Communicators)
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda r=ranks: results.append(r.all_reduce(torch.ones(2), op="sum")))
        for ranks in (first, second)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [each.tolist() for each in results] == [[2.0, 2.0]] * 2

    class OnGpu:
        is_cuda, device = True, "cuda:0"

    here: Any = OnGpu()
    first.all_gather(here, dim=1)
    first.all_reduce_rms_norm(here, here, None, 1e-6, mode="U")
    first.reduce_scatter(here)
    first.close()
    second.close()
    assert told == [
        ("all_gather", {"dim": 1}),
        ("all_reduce_rms_norm", {"mode": "U"}),
        ("reduce_scatter", {}),
        *[("close", {})] * 2,
    ]


def test_one_rank_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then none is joined between GPUs, all of them know why, and CPU tensors still go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.cuda, "connect", lambda group, **options: pytest.fail("joined between GPUs"))
    first, second = _both(monkeypatch, ["loaded", devices.native.NotLoaded("no libdetinfer_gpu.so")])

    class OnGpu:
        is_cuda, device = True, "cuda:0"

    here: Any = OnGpu()
    with pytest.raises(NativeError, match=r"cuda:0.*rank 1 has no GPU or no GPU library"):
        first.all_reduce(here)
    with pytest.raises(NativeError, match=r"no libdetinfer_gpu\.so"):
        second.all_reduce(here)
    first.close()
    second.close()
