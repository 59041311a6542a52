"""``random:NAME``: the same weights from the same seed, told apart from others, and recorded and verified like any model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from detinfer import bits, cli
from detinfer.errors import TargetError
from detinfer.models import random_weights, targets

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def test_a_seed_gives_its_weights() -> None:
    """Byte for byte; another seed and another dtype give others, and all have digests of their own."""
    first, again, other = (targets.load("random:qwen3-small", seed=seed) for seed in (0, 0, 1))
    wide = targets.load("random:qwen3-small", torch.float32)
    held = [{name: bits.as_bytes(p) for name, p in one.module.named_parameters()} for one in (first, again, other)]
    assert held[0] == held[1]
    assert all(held[0][name] != held[2][name] for name in held[0])
    assert len({one.weights_digest for one in (first, again, other, wide)}) == 3
    assert first.dtype is torch.bfloat16 and wide.dtype is torch.float32


def test_the_checksum_sees_a_bit_and_an_exchange() -> None:
    """One bit of one weight, two weights exchanged, and another text."""
    layer = torch.nn.Linear(5, 3, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.copy_(torch.arange(15).view(3, 5) / 8)
    digests = {random_weights.checksum(layer, "a"), random_weights.checksum(layer, "b")}
    layer.weight.view(torch.int16)[2, 4] ^= 1
    digests.add(random_weights.checksum(layer, "a"))
    layer.weight.view(torch.int16)[2, 4] ^= 1
    layer.weight[0, [0, 1]] = layer.weight[0, [1, 0]]
    digests.add(random_weights.checksum(layer, "a"))
    assert len(digests) == 4


def test_pieces_do_not_change_the_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight larger than a piece: places go on."""
    layer = torch.nn.Linear(7, 5).requires_grad_(False)
    whole = random_weights.checksum(layer, "")
    monkeypatch.setattr(random_weights, "_PIECE", 4)
    assert random_weights.checksum(layer, "") == whole


def test_record_and_verify(tmp_path: Path) -> None:
    """A small mixture of experts, whole; what is not stored is drawn again."""
    golden, report = tmp_path / "golden", tmp_path / "result.json"
    size = ("--n-prompts", "2", "--length", "7", "--decode-steps", "3", "--tensors", "none")
    assert cli.run(["record", "random:qwen3-moe-small", "-o", str(golden), *size]) == 0
    words = ["--n-trials", "2", "--axes", "batch,chunks,paged", "--json", str(report)]
    assert cli.run(["verify", str(golden), *words]) == 0
    result = json.loads(report.read_text())
    assert {axis["verdict"] for axis in result["invariance"]["axes"]} == {"same"}
    assert cli.run(["verify", str(golden), "--target", "random:qwen3-small"]) == 4


def test_over_two_ranks(tmp_path: Path) -> None:
    """Cut by transformers' plan: the same weights as whole, the same rows in every batch, and the same on both ranks."""
    golden, report = tmp_path / "golden", tmp_path / "result.json"
    size = ("--n-prompts", "2", "--length", "5", "--decode-steps", "2", "--tensors", "none")
    assert cli.run(["record", "random:qwen3-small", "-o", str(golden), *size]) == 0
    words = ["--tp", "2", "--n-trials", "2", "--axes", "batch,chunks", "--json", str(report)]
    assert cli.run(["verify", str(golden), *words]) == 0
    result = json.loads(report.read_text())
    assert result["invariance"]["verdict"] == result["consistency"]["verdict"] == "same"
    assert result["golden"]["verdict"] == "not_promised"
    assert cli.run(["verify", str(golden), *words, "--target", "random:qwen3-moe-small"]) == 4


def test_what_there_is_not() -> None:
    """The names that there are."""
    with pytest.raises(TargetError, match=r"random:gpt: one of qwen3-8b"):
        targets.load("random:gpt")
