"""How SGLang on AITER chooses a collective's kernel, as data: pure functions of sizes, and what a policy lets run.

The rules are those of SGLang's pull requests 15340 (one-stage switch, log lines), 21986 (gate, one-stage choice, kernel
support) and 25093 (all-gather), and of AITER's ``custom_all_reduce``. Bytes are those of one rank's tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from detinfer.bits import dtype_name
from detinfer.policy.policy import Accepted, Decision, Proof, Refused

FUSED_BYTES = 8 * 1024 * 8192
"""The fused kernel takes tensors of up to this many bytes, the boundary included (hidden 4096, bfloat16, 8192 tokens)."""

ONE_STAGE_BYTES = 128 * 1024
"""One stage is chosen up to here, the boundary included."""

ONE_STAGE_BLOCKS = 80
"""Blocks of the one-stage kernel at most: more tokens take turns on them."""

WIDEST = 16384
"""Elements of a row that are fused at most."""

MOST_PACKS = 1024
"""16-byte packs of a row that the one-stage kernel holds."""

FUSED_WORLDS = (2, 4, 8)
"""World sizes of the fused kernel: 6 is excluded."""

GATHERED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Kernel = Literal["unfused", "fused_1stage", "fused_2stage"]
State = Literal["eager", "capturing", "piecewise", "warm_up"]
Gather = Literal["all_gather_reg", "all_gather_unreg", "zeros", "fall_through"]


@dataclass(frozen=True)
class FusedCall:
    """A call of fused all-reduce + RMSNorm: ``tokens`` rows of ``hidden`` elements among ``world`` ranks."""

    tokens: int
    hidden: int
    dtype: torch.dtype
    world: int

    @property
    def nbytes(self) -> int:
        """Of one rank's tensor."""
        return self.tokens * self.hidden * self.dtype.itemsize


def gate(call: FusedCall) -> str:
    """Why SGLang's layer communicator does not fuse ``call``; empty where it does."""
    if call.world not in FUSED_WORLDS:
        return f"world size {call.world} is none of {', '.join(map(str, FUSED_WORLDS))}"
    if call.nbytes == 0:
        return "an empty tensor"
    if call.hidden > WIDEST:
        return f"rows of {call.hidden} are longer than {WIDEST}"
    if call.nbytes > FUSED_BYTES:
        return f"{call.nbytes} bytes are more than {FUSED_BYTES}"
    return ""


def one_stage_supported(hidden: int, dtype: torch.dtype) -> bool:
    """Whether the one-stage kernel can hold a row: whole packs, and not too many. No list of hidden sizes."""
    pack = 16 // dtype.itemsize
    return hidden % pack == 0 and hidden // pack <= MOST_PACKS


def one_stage_chosen(call: FusedCall, use_1stage: bool | None = None) -> bool:
    """What SGLang asks for: its switch where that is set, else by bytes."""
    return call.nbytes <= ONE_STAGE_BYTES if use_1stage is None else use_1stage


def one_stage_blocks(tokens: int) -> int:
    """Blocks that the one-stage kernel is launched with: one for each token, up to the limit."""
    return min(tokens, ONE_STAGE_BLOCKS)


def fused_kernel(call: FusedCall, use_1stage: bool | None = None) -> Kernel:
    """The kernel that a call ends in: what is asked for, as far as the kernel supports it."""
    if gate(call):
        return "unfused"
    if one_stage_chosen(call, use_1stage) and one_stage_supported(call.hidden, call.dtype):
        return "fused_1stage"
    return "fused_2stage"


def decide_fused(call: FusedCall, proof: Proof | None = None) -> Decision:
    """What a policy decides: one stage where it runs and is proved, for every size; two stages never.

    Both kernels add the ranks in order, but their sums of squares have different trees, so that a size at which one
    gives way to the other changes bits. Since SGLang's pull request 21986 its deterministic flag no longer forces one
    stage: the switch has to.
    """
    op = "fused_all_reduce_rms_norm"
    if why := gate(call):
        return Refused(op, "aiter_fused_1stage", f"it is not fused: {why}; the separate all_reduce and RMSNorm decide")
    if not one_stage_supported(call.hidden, call.dtype):
        return Refused(
            op,
            "aiter_fused_2stage",
            f"a row of {call.hidden} x {dtype_name(call.dtype)} does not fit one stage, and two stages have another tree: "
            "use the separate all_reduce and RMSNorm",
        )
    if proof is None:
        return Refused(op, "aiter_fused_1stage", "it has not been proved on this machine")
    return Accepted(op, "aiter_fused_1stage", "ranks in order in one stage, forced for every size", proof)


@dataclass(frozen=True)
class GatherCall:
    """A call of all_gather into a tensor, of one rank's ``nbytes``; ``max_size`` is the communicator's, in bytes."""

    nbytes: int
    dtype: torch.dtype
    world: int
    input_contiguous: bool = True
    output_contiguous: bool = True
    max_size: int = 1024 * 1024 * 1024


def gather_declined(call: GatherCall) -> str:
    """Why AITER's all_gather does not take ``call``; empty where it does."""
    if not (call.input_contiguous and call.output_contiguous):
        return "input and output have to be contiguous"
    if call.dtype not in GATHERED_DTYPES:
        return f"{dtype_name(call.dtype)} is none of float32, float16, bfloat16"
    if call.nbytes % 16:
        return f"{call.nbytes} bytes are no multiple of 16"
    if call.nbytes > (limit := call.max_size // (2 * call.world)):
        return f"{call.nbytes} bytes are more than a rank's {limit}"
    return ""


def gather_path(call: GatherCall, state: State) -> Gather:
    """What SGLang's all_gather runs in a state of graph capture.

    A call that AITER declines falls through in every state alike; one that it takes never falls through, so that no
    collective of one state stands for another's in a graph. ``zeros`` keeps the graph's shape and gathers nothing.
    """
    if gather_declined(call):
        return "fall_through"
    by_state: dict[State, Gather] = {
        "eager": "all_gather_unreg",
        "capturing": "all_gather_reg",
        "piecewise": "all_gather_unreg",
        "warm_up": "zeros",
    }
    return by_state[state]


STATES: tuple[State, ...] = ("eager", "capturing", "piecewise", "warm_up")


def decide_gather(call: GatherCall, proved: frozenset[State] = frozenset()) -> Decision:
    """What a policy decides: a gather is a copy, so it is allowed once its bytes are proved in all four states."""
    op = "all_gather"
    if why := gather_declined(call):
        return Refused(op, "aiter_all_gather", f"AITER declines it: {why}; a path that copies bytes takes it")
    if missing := [state for state in STATES if state not in proved]:
        return Refused(
            op, "aiter_all_gather", f"its bytes are not proved in these states of graph capture: {', '.join(missing)}"
        )
    return Accepted(op, "aiter_all_gather", "a copy of bytes, proved eager and in every state of graph capture")


def explain_dispatch() -> list[Decision]:
    """The decisions on AITER's fused kernels and all_gather where nothing of them has been proved."""
    two_stages = Refused(
        "fused_all_reduce_rms_norm",
        "aiter_fused_2stage",
        "its sum of squares has another tree than one stage, so that a size decides bits: one stage is forced",
    )
    return [
        decide_fused(FusedCall(1, 4096, torch.bfloat16, 8)),
        two_stages,
        Refused(
            "all_reduce",
            "aiter_2stage",
            "its order starts at the owner of an element, which depends on the tensor's size: use 1-stage",
        ),
        decide_gather(GatherCall(4096, torch.bfloat16, 8)),
    ]


LOG_LINES = {
    "aiter": "[AR] Using AiterCustomAllreduce (AMD default)",
    "sglang": "[AR] Using sglang CustomAllreduce (1-stage kernel)",
    "one_stage": "[AR] All-reduce: 1-stage kernel ({why})",
    "default": "[AR] All-reduce: default",
}
"""SGLang's own lines, so that what looks for them still finds them."""


def log_line(kind: Literal["aiter", "sglang", "one_stage", "default", "refused", "accepted"], why: str = "") -> str:
    """The line that says which all-reduce runs: SGLang's four word for word, and two of ours beside them."""
    if kind == "refused":
        return f"[AR] detinfer: refused ({why})"
    if kind == "accepted":
        return f"[AR] detinfer: {why}"
    return LOG_LINES[kind].format(why=why)
