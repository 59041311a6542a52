"""Every architecture of the zoo that transformers has a tensor-parallel plan for, cut over two ranks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from detinfer.collectives.launch import launch
from detinfer.models import targets

HERE = Path(__file__).parent
sys.path.append(str(HERE))
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
NAMES = ["qwen3", "gemma3", "gemma2", "mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "deepseek_v3"]
"""Llama is in tests/cli/test_tp_transformers.py; GPT-2 and gpt-oss have no such plan."""


def test_rows_do_not_see_their_batch_and_ranks_agree(tmp_path: Path) -> None:
    """Five rows alone and together, byte for byte; each rank holds the same sums, layers and logits, of the same weights."""
    import tp_ranks
    import zoo

    for name in NAMES:
        zoo.build(name, torch.float32).save_pretrained(tmp_path / name)
    found = launch(tp_ranks.run, 2, str(tmp_path), NAMES, preload=("transformers", "detinfer.models.tensor_parallel"))
    assert isinstance(found, dict), "no rank left early"
    first, second = found[0], found[1]
    assert {name: one["policy"] for name, one in first.items()} == dict.fromkeys(NAMES, 0)
    assert all(one["held"][0] > 6 * 4 and one["held"][1] == 0 for one in first.values()), first
    assert {name: one["logits"] for name, one in first.items()} == {name: one["logits"] for name, one in second.items()}
    whole = {name: targets.load(f"hf:{tmp_path / name}").weights_digest for name in NAMES}
    assert {name: one["weights"] for name, one in first.items()} == whole
    assert sum(one["off"] > 0 for one in first.values()) >= 6, "torch's own kernels see the batch"


def test_models_without_a_plan_are_told() -> None:
    """gpt-oss has a plan for its experts alone."""
    import zoo

    from detinfer.errors import TargetError
    from detinfer.models import tensor_parallel

    for name in ("gpt2", "gpt_oss"):
        with pytest.raises(TargetError, match="no tensor-parallel plan"):
            tensor_parallel.check(name, zoo.build(name, torch.float32).config, 2)
