"""What a policy says of AITER's kernels, and the proof that it asks for, over communicators that behave as AITER's."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer.collectives import connect
from detinfer.collectives.aiter import Aiter
from detinfer.collectives.aiter_versions import AUGUST_2026, WHEEL
from detinfer.policy.aiter import decide_aiter, explain_aiter, prove_aiter
from detinfer.policy.policy import Accepted, Proof, Refused

sys.path.append(str(Path(__file__).parents[1] / "collectives"))
import aiter_standin

PROOF = Proof("all_reduce", "a reference", 4, "00")
bf16 = torch.bfloat16


def test_decisions() -> None:
    """Refused without a proof, for a failed one, and for a kernel of another order in spite of one."""
    assert "not been proved" in decide_aiter(WHEEL, "all_reduce", 4096, bf16, 8).reason
    accepted = decide_aiter(WHEEL, "all_reduce", 160 * 1024, bf16, 8, proof=PROOF)
    assert isinstance(accepted, Accepted) and accepted.path == "aiter_1stage" and "3 pieces" in accepted.reason
    large = decide_aiter(WHEEL, "all_reduce", 1 << 24, bf16, 8, proof=PROOF)
    assert isinstance(large, Refused) and "owner" in large.reason
    assert isinstance(decide_aiter(WHEEL, "all_reduce_rms_norm", 4096, bf16, 8, proof=PROOF), Refused)
    failed = decide_aiter(AUGUST_2026, "all_gather", 4096, bf16, 8, proof=Refused("all_gather", "aiter", "byte 3"))
    assert isinstance(failed, Refused) and failed.reason == "byte 3"
    assert all(isinstance(decision, Refused) for decision in explain_aiter())


def together(standin: Any, size: int, work: Any) -> list[Any]:
    """``work(adapter)`` on ``size`` threads that are ranks."""
    name = f"aiter-proof-{os.getpid()}-{standin.__name__}-{size}-{id(work)}"

    def rank(number: int) -> Any:
        with connect(name=name, rank=number, size=size) as ranks:
            return work(Aiter(standin(ranks), ""))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


@pytest.mark.parametrize("standin", [aiter_standin.Wheel, aiter_standin.August])
@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter", "all_gather"])
def test_proofs(standin: Any, collective: Any) -> None:
    """Each collective is proved between 4 ranks; one kernel that rotates its order, or copies wrongly, is found out."""
    for dtype in (torch.float32, bf16):
        found = together(standin, 4, lambda aiter, dtype=dtype: prove_aiter(aiter, collective, dtype, "cpu"))
        assert all(isinstance(proof, Proof) for proof in found), found
        assert len({proof.digest for proof in found}) == 1

    class Wrong(standin):  # type: ignore[misc]
        def _kernel(self, nbytes: int, limits: Any) -> str:
            return "2stage" if nbytes > 64 * 1024 else "1stage"  # gives way earlier than the table says

        def _gather(self, inp: Any, out: Any) -> Any:
            super()._gather(inp, out)
            out[1] = 0
            return out

    found = together(Wrong, 4, lambda aiter: prove_aiter(aiter, collective, torch.float32, "cpu"))
    assert any(isinstance(proof, Refused) and "its proof failed on this machine" in proof.reason for proof in found)
