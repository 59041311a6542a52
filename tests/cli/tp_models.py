"""A transformers model that three ranks can share and two cannot, written to a folder, and detinfer run on it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from detinfer import cli

sys.path.append(str(Path(__file__).parents[1] / "models"))
import zoo

SMALL = ("--n-prompts", "2", "--length", "5", "--decode-steps", "2")
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 90}


def write(folder: Path, dtype: torch.dtype = torch.bfloat16) -> str:
    """A Llama of 6 query heads and 3 KV heads; its target."""
    zoo.build("llama", dtype, **HEADS).save_pretrained(folder)
    return f"hf:{folder}"


def write_experts(folder: Path) -> str:
    """A Qwen3-MoE in bfloat16 of as many heads, with experts of 42 inner columns; its target."""
    zoo.build("qwen3_moe", torch.bfloat16, **HEADS, moe_intermediate_size=42).save_pretrained(folder)
    return f"hf:{folder}"


def record(target: str, golden: Path, *options: str) -> Path:
    """A golden of two short prompts."""
    assert cli.run(["record", target, "-o", str(golden), *SMALL, *options]) == 0
    return golden


def verified(golden: Path, report: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and result of a short verification."""
    words = ["verify", str(golden), "--n-trials", "2", "--axes", "batch,chunks", "--json", str(report), *options]
    code = cli.run(words)
    return code, json.loads(report.read_text()) if report.exists() else {}
