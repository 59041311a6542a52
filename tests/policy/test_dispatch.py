"""The engines' dispatch as tables: boundaries included, and one wrong comparison would change a row."""

from __future__ import annotations

import pytest
import torch

from detinfer.policy.dispatch import (
    STATES,
    FusedCall,
    GatherCall,
    decide_fused,
    decide_gather,
    fused_kernel,
    gate,
    gather_path,
    log_line,
    one_stage_blocks,
    one_stage_supported,
)
from detinfer.policy.policy import Accepted, Proof, Refused

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
MiB = 1024 * 1024
PROOF = Proof("fused", "a reference", 4, "00")

FUSED = [
    # tokens, hidden, dtype, world, switch -> kernel
    (8192, 4096, bf16, 8, None, "fused_2stage"),  # 64 MiB, the boundary itself
    (8193, 4096, bf16, 8, None, "unfused"),
    (4096, 4096, f32, 8, None, "fused_2stage"),  # 64 MiB in float32
    (4097, 4096, f32, 8, None, "unfused"),
    (16, 4096, bf16, 8, None, "fused_1stage"),  # 128 KiB, the boundary itself
    (17, 4096, bf16, 8, None, "fused_2stage"),
    (8, 4096, f32, 8, None, "fused_1stage"),
    (9, 4096, f32, 8, None, "fused_2stage"),
    (1, 2880, bf16, 4, None, "fused_1stage"),  # no list of hidden sizes: 2880 / 8 = 360 packs
    (1, 2884, bf16, 4, None, "fused_2stage"),  # no whole packs
    (1, 8192, bf16, 2, None, "fused_1stage"),  # 1024 packs
    (1, 8200, bf16, 2, None, "fused_2stage"),  # 1025
    (1, 4096, f32, 2, None, "fused_1stage"),  # 1024 packs of 4
    (1, 4100, f32, 2, None, "fused_2stage"),
    (1, 16384, bf16, 2, None, "fused_2stage"),
    (1, 16392, bf16, 2, None, "unfused"),
    (1, 4096, bf16, 6, None, "unfused"),
    (1, 4096, bf16, 1, None, "unfused"),
    (0, 4096, bf16, 8, None, "unfused"),
    (1, 4096, bf16, 8, False, "fused_2stage"),  # the switch wins
    (8192, 4096, bf16, 8, True, "fused_1stage"),
    (1, 8200, bf16, 8, True, "fused_2stage"),  # but not over what the kernel holds
]


@pytest.mark.parametrize(("tokens", "hidden", "dtype", "world", "switch", "kernel"), FUSED)
def test_fused_kernel(tokens: int, hidden: int, dtype: torch.dtype, world: int, switch: bool, kernel: str) -> None:
    """Which kernel a call ends in, and what a policy says of it."""
    call = FusedCall(tokens, hidden, dtype, world)
    assert fused_kernel(call, switch) == kernel
    assert bool(gate(call)) == (kernel == "unfused")
    decision = decide_fused(call, PROOF)
    # One stage is forced for every size, so that only what it cannot hold is refused.
    assert isinstance(decision, Accepted) == (not gate(call) and one_stage_supported(hidden, dtype))
    assert isinstance(decide_fused(call), Refused)
    if isinstance(decision, Refused):
        assert "separate all_reduce and RMSNorm" in decision.reason


def test_one_stage_blocks() -> None:
    """One for each token, 80 at most."""
    assert [one_stage_blocks(tokens) for tokens in (1, 79, 80, 81, 8192)] == [1, 79, 80, 80, 80]


GATHERS = [
    # call -> (eager, capturing, piecewise, warm-up), a part of AITER's reason to decline
    (GatherCall(4096, bf16, 8), ("all_gather_unreg", "all_gather_reg", "all_gather_unreg", "zeros"), ""),
    (GatherCall(64 * MiB, f32, 8), ("all_gather_unreg", "all_gather_reg", "all_gather_unreg", "zeros"), ""),
    (GatherCall(64 * MiB + 16, f32, 8), ("fall_through",) * 4, "more than"),
    (GatherCall(256 * MiB, f16, 2), ("all_gather_unreg", "all_gather_reg", "all_gather_unreg", "zeros"), ""),
    (GatherCall(256 * MiB + 16, f16, 2), ("fall_through",) * 4, "more than"),
    (GatherCall(4104, bf16, 8), ("fall_through",) * 4, "multiple of 16"),
    (GatherCall(4096, torch.int32, 8), ("fall_through",) * 4, "int32"),
    (GatherCall(4096, torch.float64, 8), ("fall_through",) * 4, "float64"),
    (GatherCall(4096, bf16, 8, input_contiguous=False), ("fall_through",) * 4, "contiguous"),
    (GatherCall(4096, bf16, 8, output_contiguous=False), ("fall_through",) * 4, "contiguous"),
]


@pytest.mark.parametrize(("call", "paths", "why"), GATHERS)
def test_all_gather(call: GatherCall, paths: tuple[str, ...], why: str) -> None:
    """The four states; no collective of one state stands for another's: all fall through, or none does."""
    assert tuple(gather_path(call, state) for state in STATES) == paths
    assert len({path == "fall_through" for path in paths}) == 1
    decision = decide_gather(call, frozenset(STATES))
    assert isinstance(decision, Refused) == bool(why)
    assert why in decision.reason


def test_a_gather_is_refused_until_it_is_proved_in_every_state() -> None:
    """One state missing is enough, and is named."""
    call = GatherCall(4096, bf16, 8)
    for missing in STATES:
        decision = decide_gather(call, frozenset(STATES) - {missing})
        assert isinstance(decision, Refused) and decision.reason.endswith(missing)
    assert isinstance(decide_gather(call), Refused)


def test_log_lines_are_sglangs_own() -> None:
    """Word for word, so that existing checks of logs still match."""
    assert log_line("aiter") == "[AR] Using AiterCustomAllreduce (AMD default)"
    assert log_line("sglang") == "[AR] Using sglang CustomAllreduce (1-stage kernel)"
    assert log_line("one_stage", "...") == "[AR] All-reduce: 1-stage kernel (...)"
    assert log_line("default") == "[AR] All-reduce: default"
    assert log_line("refused", "why").startswith("[AR] detinfer: ")
