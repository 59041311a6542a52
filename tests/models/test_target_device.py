"""Where a target runs: moved as a whole, its digests kept; a device that is not there is said at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from detinfer.cli import run
from detinfer.errors import EXIT_USAGE, TargetError
from detinfer.models import targets
from detinfer.models.targets import Loaded, checked, device_of, finish, on


def target() -> Any:
    """One layer, and a request that holds tensors at several depths."""
    x, layer = torch.arange(4.0).view(1, 4), nn.Linear(4, 3)
    with torch.no_grad():
        for place, weight in enumerate(layer.parameters()):
            weight.copy_(torch.arange(weight.numel()).view(weight.shape) / 8 - place)
    return finish("here", Loaded("module", layer, inputs=[((x, [x, (x,)]), {"other": {"deep": x}, "n": 3})]))


@pytest.mark.parametrize(
    ("device", "words"),
    [("meta", "runs models on cpu and cuda"), ("nonsense", "cpu, cuda or cuda:N"), ("cuda:77", "CUDA devices")],
)
def test_a_device_that_cannot_be_used(device: str, words: str, tmp_path: Path, capfd: Any) -> None:
    """Named, with what there is; by the command line before anything is loaded."""
    with pytest.raises(TargetError, match=words):
        checked(device)
    with pytest.raises(TargetError, match=words):
        targets.load("builtin:dense", device=device)
    assert run(["record", "builtin:dense", "-o", str(tmp_path / "golden"), "--device", device]) == EXIT_USAGE
    assert words in capfd.readouterr().err
    assert not (tmp_path / "golden").exists()


def test_everything_moves() -> None:
    """Parameters and every tensor of the requests; what is no tensor stays, and so do lists and tuples."""
    request = target().inputs[0]
    moved = on(torch.device("meta"), request)
    found = targets.tensors(moved)
    assert len(found) == len(targets.tensors(request)) == 4
    assert {t.device.type for t in found} == {"meta"}
    assert moved[1]["n"] == 3 and isinstance(moved[0][1], list) and isinstance(moved[0][1][1], tuple)


def test_a_module_says_where_it_is() -> None:
    with torch.device("meta"):
        assert device_of(nn.Linear(2, 2)).type == "meta"
        assert device_of(nn.BatchNorm1d(2, affine=False)).type == "meta"  # buffers alone
    assert device_of(nn.SiLU()).type == "cpu"
    assert target().device.type == "cpu"


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """The digests are those of the CPU."""
    before = target()
    after = target().to("cuda")
    assert after.device == torch.device("cuda", 0) and after.weights_digest == before.weights_digest
    assert {t.device for t in targets.tensors(after.inputs)} == {after.device}
    assert after.module(after.inputs[0][0][0]).device == after.device
