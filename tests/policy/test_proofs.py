"""Proofs: made once, kept, and turned into a refusal when they fail."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import pytest
import torch

from detinfer import ops
from detinfer.errors import Diverged, NativeError, UnsupportedDtype
from detinfer.ops import Covered
from detinfer.policy import proofs
from detinfer.policy.policy import Proof, Refused


class Table(dict[tuple[str, torch.dtype], Any]):
    """What a proof gives or raises, by operation and dtype; ``made`` counts the proofs."""

    made = 0

    def prove(self, op: str, dtype: torch.dtype) -> tuple[int, bytes]:
        """In the place of ``ops.prove``."""
        self.made += 1
        result = self[op, dtype]
        if isinstance(result, Exception):
            raise result
        assert isinstance(result, tuple)
        return result


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Table]:
    """Stands in for the families; the memo is fresh."""
    results = Table()
    covered = MappingProxyType({"aten::mean.dim": Covered("aten::mean.dim", "rows", lambda: None, True)})
    monkeypatch.setattr(ops, "prove", results.prove)
    monkeypatch.setattr(ops, "covered", lambda device: covered)
    monkeypatch.setattr(proofs, "level", lambda: b"avx2")
    proofs._made.clear()
    yield results
    proofs._made.clear()


def test_a_proof_holds_count_and_digest(table: Table) -> None:
    """The digest is the SHA-256 of the result bytes."""
    table["aten::mean.dim", torch.bfloat16] = (12, b"bytes")
    proof = proofs.prove("aten::mean.dim", torch.bfloat16)
    assert proof == Proof(
        "aten::mean.dim bfloat16", "detinfer.reference.rows", 12, hashlib.sha256(b"bytes").hexdigest()
    )


def test_a_proof_is_made_once_per_operation_dtype_and_instruction_set(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another dtype or another level is another kernel."""
    table["aten::mean.dim", torch.float32] = table["aten::mean.dim", torch.float16] = (1, b"")
    for _ in range(3):
        proofs.prove("aten::mean.dim", torch.float32)
        proofs.prove("aten::mean.dim", torch.float16)
    assert table.made == 2
    monkeypatch.setattr(proofs, "level", lambda: b"baseline")
    proofs.prove("aten::mean.dim", torch.float32)
    assert table.made == 3


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (Diverged("row 0 element 3 differs"), "its proof failed on this machine (avx2): row 0 element 3"),
        (UnsupportedDtype("float64 has no order"), "float64 has no order"),
        (NativeError("no library"), "no library"),
        (KeyError("shape"), "its proof did not run: KeyError: 'shape'"),
    ],
)
def test_a_proof_that_fails_is_a_refusal(table: Table, error: Exception, part: str) -> None:
    """Whatever goes wrong, nothing is raised and nothing is accepted."""
    table["aten::mean.dim", torch.float32] = error
    refused = proofs.prove("aten::mean.dim", torch.float32)
    assert isinstance(refused, Refused)
    assert part in refused.reason
    assert refused.path == "csrc/rows"


def test_a_proof_of_nothing_proves_nothing(table: Table) -> None:
    """Zero compared results are not a proof."""
    table["aten::mean.dim", torch.float32] = (0, b"")
    assert isinstance(proofs.prove("aten::mean.dim", torch.float32), Refused)


def test_without_a_library_every_proof_is_refused(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is the loader's."""

    def missing() -> bytes:
        raise NativeError("libdetinfer_cpu.so is nowhere")

    monkeypatch.setattr(proofs, "level", missing)
    refused = proofs.prove("aten::add.Tensor", torch.float32)
    assert isinstance(refused, Refused)
    assert refused.reason == "libdetinfer_cpu.so is nowhere"
    assert refused.path == "torch"
