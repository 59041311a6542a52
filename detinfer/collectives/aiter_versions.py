"""What is known of AITER's ``CustomAllreduce`` (package amd-aiter), version by version: data, read from its sources.

A version is recognised by the signatures of its methods and not by its number: builds from source have none to rely on.
Sources: the wheel ``amd-aiter`` 0.1.7.post2.dev18 (``aiter/dist/device_communicators/custom_all_reduce.py``,
``csrc/include/custom_all_reduce.cuh``) and commit e4048607a535 of ROCm/aiter, August 2026 (the same files).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

KiB = 1024
MiB = 1024 * KiB


@dataclass(frozen=True)
class Window:
    """Where one of AITER's all-reduce kernels adds ranks 0, 1, ..., N-1 in fp32 and rounds once.

    Bytes of a rank's tensor in ``over`` < bytes < ``below`` (None: no limit), multiples of 16, at these world sizes.
    ``keywords`` are all_reduce's arguments that lead there; ``archs`` the only GPUs that have the kernel (empty: all).
    """

    kernel: str
    worlds: tuple[int, ...]
    below: int | None
    over: int = 0
    keywords: tuple[tuple[str, bool], ...] = ()
    archs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Version:
    """One version's surface and what its kernels do.

    ``signatures`` holds each method's parameters without annotations, ``self`` left out; a method that is not in it does
    not exist. ``registered`` is the name of all_reduce's argument for inputs that are registered already.
    ``fused_returns`` says in which order the fused kernel's two results come, ``gather_divides`` by what the size of the
    communicator's buffer is divided (times the ranks, where that is true) to limit a gather.
    """

    name: str
    source: str
    signatures: Mapping[str, str]
    registered: str
    windows: tuple[Window, ...]
    fused_returns: tuple[str, str]
    gather_halved_by_ranks: bool
    two_stages: str
    elsewhere: tuple[str, ...] = ()
    """GPUs for which this version has kernels of another order."""


WHEEL = Version(
    name="0.1.7.post2.dev18",
    source="the wheel amd-aiter 0.1.7.post2.dev18, November 2025",
    signatures=MappingProxyType(
        {
            "capture": "",
            "should_custom_ar": "inp",
            "all_reduce": "inp, *, out=None, open_fp8_quant=False, registered=False",
            "custom_all_reduce": "input, open_fp8_quant=False",
            "all_gather_reg": "inp, out=None",
            "all_gather_unreg": "inp, out=None",
            "custom_all_gather": "inp",
            "fused_ar_rms": "inp, res_inp, *, res_out=None, out=None, w, eps, registered=False",
            "custom_fused_ar_rms": "input, residual_inp, weight, eps",
            "close": "",
        }
    ),
    registered="registered",
    windows=(
        Window("1stage", (2,), None),
        Window("1stage", (4,), 160 * KiB),
        Window("1stage", (6, 8), 80 * KiB),  # at 6 the naive kernel: threads there are no multiple of the ranks
    ),
    fused_returns=("residual", "norm"),
    gather_halved_by_ranks=False,
    two_stages="starts each sum at the owner of the element, which depends on the tensor's size",
)

AUGUST_2026 = Version(
    name="e4048607a535",
    source="ROCm/aiter at e4048607a535, August 2026",
    signatures=MappingProxyType(
        {
            "capture": "",
            "should_custom_ar": "inp, prefill_support=False",
            "should_custom_ar_bytes": "inp, prefill_support=False",
            "should_custom_ag": "inp",
            "all_reduce": "inp, *, out=None, use_new=True, open_fp8_quant=False, registered_input=False",
            "custom_all_reduce": "input, use_new=True, open_fp8_quant=False",
            "should_custom_rs": "inp, dim",
            "reduce_scatter": "inp, out, dim=0, *, registered=False",
            "custom_reduce_scatter": "input, output, dim=0",
            "all_gather_reg": "inp, out=None, dim=0",
            "all_gather_unreg": "inp, out=None, dim=0",
            "custom_all_gather": "inp, dim=0",
            "fused_ar_rms": (
                "inp, res_inp, *, res_out=None, out=None, scale_out=None, w, eps, registered=False, use_1stage=False, "
                "post_per_token_quant=False, out_hidden_dim=0, gemma_norm=False, emit_bf16=False"
            ),
            "custom_fused_ar_rms": "input, residual_inp, weight, eps, use_1stage, out_hidden_dim=0, gemma_norm=False",
            "close": "",
        }
    ),
    registered="registered_input",
    windows=(
        Window("1stage", (2,), None, keywords=(("use_new", True),)),
        Window("1stage", (4,), 160 * KiB, keywords=(("use_new", True),)),
        # At 6 the 1-stage kernel of use_new reads a seventh rank's pointer: the older kernel does not.
        Window("1stage", (8,), 80 * KiB, keywords=(("use_new", True),)),
        Window("1stage_naive", (4,), 512 * KiB, keywords=(("use_new", False),)),
        Window("1stage_naive", (6, 8), 256 * KiB, keywords=(("use_new", False),)),
        Window("2stage_write_mode", (8,), None, over=4 * MiB, keywords=(("use_new", True),), archs=("gfx942",)),
    ),
    fused_returns=("norm", "residual"),
    gather_halved_by_ranks=True,
    two_stages="starts each sum at the owner of the element, which depends on the tensor's size",
    elsewhere=("gfx1250",),
)

VERSIONS = (WHEEL, AUGUST_2026)
"""Every version that is known, the oldest first."""
