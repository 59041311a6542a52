"""Faults that real systems have had, each put in by a script of its own, each located: module and operation."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from detinfer import cli

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
import tiny

PLANTS = Path(__file__).parent / "plants"

# Plant, the model, the axes to walk, and where the cause is: a module and some of the operations that may carry it.
CASES = [
    ("expert_order_by_place", "builtin:moe", "batch", r"\.experts$", {"aten::add.Tensor", "aten::where.self"}),
    ("atomics", "builtin:dense", "batch", r"\.(down|o)_proj$", {"aten::add.Tensor", "aten::linear"}),
    ("split_k_by_rows", "builtin:dense", "batch", r"\.[qkv]_proj$|gate_proj$|up_proj$|head$", {"aten::linear"}),
    (
        "row_sum_by_tile",
        "builtin:dense",
        "batch",
        r"\.self_attn\.attention$",
        {"aten::sum.dim_IntList", "aten::div.Tensor"},
    ),
    ("rms_norm_by_tokens", "builtin:dense", "batch", r"norm$", {"aten::sum.dim_IntList", "aten::div.Tensor"}),
    ("padding_leak", "llama", "left-padding", r"\.self_attn$", {"aten::scaled_dot_product_attention"}),
    ("stale_kv", "builtin:dense", "prefix", r"\.layers\.0\.self_attn$", {"aten::index.Tensor"}),
    ("scale_by_batch", "builtin:dense", "batch", r"\.(down|o)_proj$", {"aten::amax"}),
    ("top_k_tie", "builtin:moe", "batch", r"\.top_k$", {"aten::argmax", "aten::round"}),
    ("rope_by_chunk", "builtin:dense", "chunks", r"\.layers\.0\.self_attn$", {"aten::mul.Tensor"}),
    ("scale_by_pages", "llama", "paged", r"\.layers\.0\.self_attn$", {"aten::scaled_dot_product_attention"}),
    ("compiled_norm", "llama", "compiled", r"\.layers\.0\.\w+_layernorm$", {"LlamaRMSNorm"}),
]

AGAIN = ("split_k_by_rows", "padding_leak", "rope_by_chunk", "scale_by_pages")
"""Located a second time, from the saved result: a unit of a batch, an axis of transformers' model, one of ours."""


@pytest.fixture(scope="module")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A golden of each sound model."""
    folder = tmp_path_factory.mktemp("plants")
    model = tiny.language_model()
    model.save_pretrained(folder / "model")
    found = {}
    for name, spec in (("builtin:dense", None), ("builtin:moe", None), ("llama", f"hf:{folder / 'model'}")):
        found[name] = folder / name.replace(":", "-")
        assert cli.run(["record", spec or name, "-o", str(found[name]), "--n-prompts", "3"]) == 0
    return found


def run(plant: str, *arguments: str) -> tuple[int, str]:
    """The command line in a process that a plant has got at; its exit code and all that it printed."""
    command = [sys.executable, str(PLANTS / f"{plant}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("plant", "model", "axes", "path", "operations"), CASES, ids=[case[0] for case in CASES])
def test_a_plant_is_located(
    plant: str, model: str, axes: str, path: str, operations: set[str], goldens: dict[str, Path], tmp_path: Path
) -> None:
    """verify exits with 1 and names the module and the operation; locate finds the same from the saved result."""
    report = tmp_path / "result.json"
    code, out = run(plant, "verify", str(goldens[model]), "--n-trials", "10", "--axes", axes, "--json", str(report))
    assert code == 1, out
    result: dict[str, Any] = json.loads(report.read_text())
    cause = result["invariance"]["cause"]
    assert cause is not None, out
    assert re.search(path, cause["path"]), (cause, out)
    assert cause["operation"] in operations, cause
    assert cause["operation"] in out
    if plant in AGAIN:
        code, out = run(plant, "locate", str(report), "--script", str(tmp_path / "show"))
        assert (code, cause["operation"] in out) == (1, True), out
        assert len((tmp_path / "show" / "show.py").read_text().splitlines()) < 50


@pytest.mark.parametrize(
    ("model", "axes"),
    [
        ("builtin:dense", "batch"),
        ("builtin:moe", "batch"),
        ("builtin:dense", "chunks,prefix,speculative"),
        ("builtin:moe", "chunks,prefix,speculative"),
        ("llama", "paged,compiled"),
    ],
)
def test_nothing_is_planted(model: str, axes: str, goldens: dict[str, Path], tmp_path: Path) -> None:
    """The sound models diverge nowhere, and there is nothing to locate."""
    report = tmp_path / "result.json"
    options = ("--n-trials", "10", "--axes", axes, "--json", str(report))
    assert cli.run(["verify", str(goldens[model]), *options]) == 0
    assert cli.run(["locate", str(report)]) == 2
