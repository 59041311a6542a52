"""What a policy lets run of AITER's collectives: what the version at hand has, cuts, or lacks, and a proof on this machine."""

from __future__ import annotations

import torch

from detinfer.collectives.aiter import Aiter, Declined, decide_way
from detinfer.collectives.aiter_versions import VERSIONS, Version
from detinfer.errors import DetinferError, Diverged
from detinfer.policy.collectives import Collective
from detinfer.policy.policy import Accepted, Decision, Proof, Refused
from detinfer.policy.rank_proofs import compare, inputs

REPEATS = 16
"""AITER's barriers acquire at device scope, which a peer's write need not obey: one comparison could be luck."""

_UNPROVED = "it has not been proved on this machine, whose AITER and ROCm decide the kernel"


def decide_aiter(
    version: Version,
    collective: str,
    nbytes: int,
    dtype: torch.dtype,
    world: int,
    *,
    arch: str = "",
    proof: Proof | Refused | None = None,
) -> Decision:
    """The decision on ``collective`` of a rank's ``nbytes`` between ``world`` ranks through AITER ``version``.

    A kernel that the version lacks or that has another order is refused with the reason, whatever was proved; one that
    has the contract's order by its source is accepted once ``proof`` shows it here.
    """
    way = decide_way(version, collective, nbytes, dtype, world, arch=arch)
    if isinstance(way, Declined):
        return Refused(collective, "aiter", way.reason)
    path = f"aiter_{way.kernel}"
    if proof is None:
        return Refused(collective, path, _UNPROVED)
    if isinstance(proof, Refused):
        return Refused(collective, path, proof.reason)
    pieces = f", in {way.pieces} pieces" if way.pieces > 1 else ""
    why = "a copy of bytes" if collective == "all_gather" else f"ranks in order, rounded once{pieces}"
    return Accepted(collective, path, f"{why}; AITER {version.name}", proof)


def prove_aiter(aiter: Aiter, collective: Collective, dtype: torch.dtype, device: str = "cuda") -> Proof | Refused:
    """The proof of ``collective`` (a sum, or a gather) of ``dtype`` on this rank; all ranks call it together.

    Compared with the reference, at a size of one piece and at one of several, again and again.
    """
    reduction = "" if collective == "all_gather" else "sum"
    subject = (collective, reduction, dtype)
    whole = len(inputs(*subject, aiter.size)[0][0])

    def run(own: torch.Tensor, way: str | None) -> torch.Tensor:
        copies = int(way or 1)
        # A multiple of 16 bytes and of the ranks, whatever the proof's inputs have; the padding is cut off again.
        if collective == "reduce_scatter":
            own = own.view(aiter.size, -1).repeat_interleave(copies, 0) if copies > 1 else own.view(aiter.size, -1)
            padded = torch.nn.functional.pad(own, (0, -own.shape[1] % 16))
            rows = aiter.reduce_scatter(padded)
            return _agreed(rows[:, : own.shape[1]], copies).reshape(-1)
        padded = torch.nn.functional.pad(own, (0, -len(own) % 16))
        if collective == "all_gather":
            parts = aiter.all_gather(padded.repeat(copies)).view(aiter.size, copies, -1)
            return _agreed(parts[..., : len(own)].transpose(0, 1), copies).reshape(-1)
        return _agreed(aiter.all_reduce(padded.repeat(copies)).view(copies, -1)[:, : len(own)], copies).reshape(-1)

    # Past the size at which the version's first kernel gives way to another.
    large = max(2, -(-(256 * 1024 + 4096) // (whole * dtype.itemsize)))
    try:
        return compare(run, ("1", str(large)) * REPEATS, subject, aiter.rank, aiter.size, device)
    except Diverged as error:
        return Refused(collective, "aiter", f"its proof failed on this machine: {error}")
    except DetinferError as error:
        return Refused(collective, "aiter", str(error))


def _agreed(copies: torch.Tensor, count: int) -> torch.Tensor:
    """One of ``count`` copies along the first dimension; Diverged where one of them has other bytes."""
    if count == 1:
        return copies
    bits = copies.contiguous().view(count, -1).view(torch.uint8)
    if bool((bits != bits[:1]).any()):
        row = int((bits != bits[:1]).any(1).nonzero()[0])
        raise Diverged(f"copy {row} of {count} in one tensor has other bytes than copy 0: bits depend on the position")
    return copies.reshape(count, -1)[:1]


def explain_aiter() -> list[Decision]:
    """What every known version comes to between 8 ranks where nothing of it has been proved."""
    found: list[Decision] = []
    for version in VERSIONS:
        for collective, nbytes in _SHOWN:
            decision = decide_aiter(version, collective, nbytes, torch.bfloat16, 8)
            found.append(
                Refused(
                    f"{collective}({nbytes // 1024} KiB, 8 ranks, AITER {version.name})", decision.path, decision.reason
                )
            )
    return found


_SHOWN = (
    ("all_reduce", 64 << 10),
    ("all_reduce", 16 << 20),
    ("reduce_scatter", 64 << 10),
    ("all_gather", 64 << 10),
    ("all_reduce_rms_norm", 64 << 10),
)
