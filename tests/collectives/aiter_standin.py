"""Communicators with the methods, states and return values of AITER's, that run on CPU between processes.

Below AITER's thresholds they run our CPU kernel, above them what AITER's two-stage kernel does: each element's sum begins
at its owner. During the warm-up of a capture ``custom_*`` return zeros, and None where AITER declines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

KiB = 1024


def _rotated(parts: list[torch.Tensor]) -> torch.Tensor:
    """The two-stage kernel: packs of 16 bytes are shared out, the last rank takes the rest; the owner comes first."""
    size, flat = len(parts), [part.reshape(-1) for part in parts]
    pack = 16 // flat[0].element_size()
    part = flat[0].numel() // pack // size * pack
    out = torch.empty_like(flat[0])
    for owner in range(size):
        mine = slice(owner * part, None if owner == size - 1 else (owner + 1) * part)
        total = flat[owner][mine].float()
        for step in range(1, size):
            total = total + flat[(owner + step) % size][mine].float()
        out[mine] = total.to(out.dtype)
    return out


class _Base:
    """What both versions share. ``ran`` notes every kernel, ``stream_captures`` stands for the stream's state."""

    def __init__(self, ranks: Any, max_size: int) -> None:
        self._ranks, self.rank, self.world_size, self.max_size = ranks, ranks.rank, ranks.size, max_size
        self.disabled, self._IS_CAPTURING, self.stream_captures = False, False, False
        self.ran: list[str] = []
        self.smallest = 0
        """What AITER_CUSTOM_AR_MIN_SIZE sets."""

    @contextmanager
    def _capture(self) -> Iterator[None]:
        try:
            self._IS_CAPTURING = True
            yield
        finally:
            self._IS_CAPTURING = False

    def _should(self, inp: torch.Tensor) -> bool:
        return not self.disabled and inp.nbytes % 16 == 0 and self.smallest < inp.nbytes <= self.max_size

    def _kernel(self, nbytes: int, limits: dict[int, int]) -> str:
        return "1stage" if self.world_size == 2 or nbytes < limits[self.world_size] else "2stage"

    def _sum(self, inp: torch.Tensor, out: torch.Tensor, kernel: str) -> torch.Tensor:
        assert inp.is_contiguous() and out.is_contiguous() and inp.nbytes % 16 == 0
        self.ran.append(kernel)
        if kernel == "1stage":
            return self._ranks.all_reduce(inp, out=out)  # type: ignore[no-any-return]
        every = self._ranks.all_gather(inp[None])
        return out.copy_(_rotated(list(every.unbind(0))).view(out.shape))

    def _gather(self, inp: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        assert inp.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if out is None:
            out = torch.empty(inp.numel() * self.world_size, dtype=inp.dtype)
        if self.world_size == 6:  # prints an error and returns
            return out
        self.ran.append("all_gather")
        return out.copy_(self._ranks.all_gather(inp.reshape(-1)))

    def _norm(self, inp: Any, residual: Any, w: Any, eps: float) -> Any:
        return self._ranks.all_reduce_rms_norm(inp, residual, w, eps, mode="U", weight_mode="fp32")


class Wheel(_Base):
    """0.1.7.post2.dev18."""

    def __init__(self, ranks: Any, max_size: int = 8192 * 1024 * 8) -> None:
        super().__init__(ranks, max_size)

    def capture(self):  # type: ignore[no-untyped-def]
        return self._capture()

    def should_custom_ar(self, inp: torch.Tensor):  # type: ignore[no-untyped-def]
        return self._should(inp)

    def all_reduce(self, inp, *, out=None, open_fp8_quant=False, registered=False):  # type: ignore[no-untyped-def]
        assert not open_fp8_quant
        kernel = self._kernel(inp.nbytes, {4: 160 * KiB, 6: 80 * KiB, 8: 80 * KiB})
        return self._sum(inp, torch.empty_like(inp) if out is None else out, kernel)

    def custom_all_reduce(self, input, open_fp8_quant=False):  # type: ignore[no-untyped-def]
        if self.disabled or not self.should_custom_ar(input):
            return None
        if self._IS_CAPTURING and not self.stream_captures:
            return torch.zeros_like(input)
        return self.all_reduce(input, registered=self._IS_CAPTURING)

    def all_gather_reg(self, inp, out=None):  # type: ignore[no-untyped-def]
        return self._gather(inp, out)

    def all_gather_unreg(self, inp, out=None):  # type: ignore[no-untyped-def]
        return self._gather(inp, out)

    def custom_all_gather(self, inp):  # type: ignore[no-untyped-def]
        if self._IS_CAPTURING and not self.stream_captures:
            return torch.zeros_like(inp)  # of one rank's size
        return self.all_gather_unreg(inp)

    def fused_ar_rms(self, inp, res_inp, *, res_out=None, out=None, w, eps, registered=False):  # type: ignore[no-untyped-def]
        self.ran.append("fused_2stage")
        norm, residual = self._norm(inp, res_inp, w, eps)
        return residual, norm

    def custom_fused_ar_rms(self, input, residual_inp, weight, eps):  # type: ignore[no-untyped-def]
        return self.fused_ar_rms(input, residual_inp, w=weight, eps=eps) if self.should_custom_ar(input) else None

    def close(self):  # type: ignore[no-untyped-def]
        self.disabled = True


class August(_Base):
    """e4048607a535."""

    def __init__(self, ranks: Any, max_size: int = 1024 * 1024 * 1024) -> None:
        super().__init__(ranks, max_size)

    def capture(self):  # type: ignore[no-untyped-def]
        return self._capture()

    def should_custom_ar(self, inp, prefill_support=False):  # type: ignore[no-untyped-def]
        return self._should(inp)

    def should_custom_ar_bytes(self, inp, prefill_support=False):  # type: ignore[no-untyped-def]
        return self._should(inp)

    def should_custom_ag(self, inp):  # type: ignore[no-untyped-def]
        return not self.disabled and inp.nbytes % 16 == 0 and inp.nbytes <= self.max_size // (2 * self.world_size)

    def all_reduce(self, inp, *, out=None, use_new=True, open_fp8_quant=False, registered_input=False):  # type: ignore[no-untyped-def]
        assert not open_fp8_quant
        new, old = {4: 160, 6: 80, 8: 80}, {4: 512, 6: 256, 8: 256}
        limits = {world: limit * KiB for world, limit in (new if use_new else old).items()}
        kernel = self._kernel(inp.nbytes, limits)
        out = torch.empty_like(inp) if out is None else out
        self._sum(inp, out, kernel)
        if kernel == "1stage" and use_new and self.world_size == 6:
            out.reshape(-1)[:1] = 7  # threads 510 and 511 write over two slots of the other buffer
        return out

    def custom_all_reduce(self, input, use_new=True, open_fp8_quant=False):  # type: ignore[no-untyped-def]
        if self.disabled or not self.should_custom_ar(input):
            return None
        if self._IS_CAPTURING and not self.stream_captures:
            return torch.zeros_like(input)
        return self.all_reduce(input, use_new=use_new, registered_input=self._IS_CAPTURING)

    def should_custom_rs(self, inp, dim):  # type: ignore[no-untyped-def]
        return self._should(inp)

    def reduce_scatter(self, inp, out, dim=0, *, registered=False):  # type: ignore[no-untyped-def]
        whole = self._sum(inp, torch.empty_like(inp), "2stage")
        return out.copy_(whole.chunk(self.world_size, dim)[self.rank])

    def custom_reduce_scatter(self, input, output, dim=0):  # type: ignore[no-untyped-def]
        return self.reduce_scatter(input, output, dim)

    def all_gather_reg(self, inp, out=None, dim=0):  # type: ignore[no-untyped-def]
        assert dim == 0
        return self._gather(inp, out)

    def all_gather_unreg(self, inp, out=None, dim=0):  # type: ignore[no-untyped-def]
        assert dim == 0
        return self._gather(inp, out)

    def custom_all_gather(self, inp, dim=0):  # type: ignore[no-untyped-def]
        return self.all_gather_unreg(inp, dim=dim) if self.should_custom_ag(inp) else None

    def fused_ar_rms(  # type: ignore[no-untyped-def]
        self,
        inp,
        res_inp,
        *,
        res_out=None,
        out=None,
        scale_out=None,
        w,
        eps,
        registered=False,
        use_1stage=False,
        post_per_token_quant=False,
        out_hidden_dim=0,
        gemma_norm=False,
        emit_bf16=False,
    ):
        self.ran.append("fused_1stage" if use_1stage else "fused_2stage")
        return self._norm(inp, res_inp, w, eps)

    def custom_fused_ar_rms(  # type: ignore[no-untyped-def]
        self, input, residual_inp, weight, eps, use_1stage, out_hidden_dim=0, gemma_norm=False
    ):
        if not self.should_custom_ar(input):
            return None
        return self.fused_ar_rms(input, residual_inp, w=weight, eps=eps, use_1stage=use_1stage)

    def close(self):  # type: ignore[no-untyped-def]
        self.disabled = True
