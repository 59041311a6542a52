"""The whole model under the policy against torch's default: prefill and decode, both sides in turn in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

from detinfer import threads as held
from detinfer.errors import UsageError
from detinfer.policy import deterministic


@dataclass(frozen=True)
class Case:
    """``batch`` prompts of ``length`` tokens, or one decode step after them."""

    name: str
    batch: int
    length: int
    decode: bool


CASES = (
    Case("prefill 8x64", 8, 64, False),
    Case("decode, batch 1", 1, 16, True),
    Case("decode, batch 8", 8, 16, True),
)


@dataclass(frozen=True)
class Timing:
    """Median seconds of one forward pass on both sides; ``ratio`` is the median of the ratios of neighbours."""

    case: str
    dtype: str
    torch: float
    detinfer: float
    ratio: float


def run(target: Any, dtypes: Sequence[torch.dtype], threads: int = 2, repeats: int = 9) -> Iterator[Timing]:
    """Time every case in every dtype. UsageError for a target that is no causal language model."""
    if target.kind != "causal_lm":
        raise UsageError(f"{target.spec}: the benchmark times causal language models")
    model = target.module
    with held.threads(threads), torch.inference_mode():
        for dtype in dtypes:
            model = model.to(dtype)
            for case in CASES:
                once = _prepare(model, case)
                plain: list[float] = []
                ours: list[float] = []
                for _ in range(repeats + 1):
                    plain.append(_time(once, nullcontext()))
                    ours.append(_time(once, deterministic("batch", uncovered="trust")))
                ratios = [b / a for a, b in zip(plain[1:], ours[1:], strict=True)]  # the first pair warms up
                yield Timing(
                    case=case.name,
                    dtype=str(dtype).removeprefix("torch."),
                    torch=float(np.median(plain[1:])),
                    detinfer=float(np.median(ours[1:])),
                    ratio=float(np.median(ratios)),
                )


def _prepare(model: Any, case: Case) -> Callable[[], Any]:
    rng = np.random.default_rng(case.batch)
    ids = torch.from_numpy(rng.integers(0, model.config.vocab_size, size=(case.batch, case.length)))
    if not case.decode:
        return lambda: model(input_ids=ids, use_cache=True)
    held = model(input_ids=ids, use_cache=True).past_key_values

    def decode() -> Any:
        if (extra := held.get_seq_length() - case.length) > 0:
            held.crop(-extra)  # each step starts from the same cache
        return model(input_ids=ids[:, :1], past_key_values=held, use_cache=True)

    return decode


def _time(once: Callable[[], Any], context: AbstractContextManager[Any]) -> float:
    with context:
        once()  # the first pass inside pays for entering the policy, which a user enters once
        start = time.perf_counter()
        once()
        return time.perf_counter() - start


def table(timings: Sequence[Timing]) -> Table:
    """The timings as a table for a terminal."""
    shown = Table(title="whole model, ms a forward pass")
    for heading in ("dtype", "case", "torch", "detinfer", "detinfer / torch"):
        shown.add_column(heading, justify="left" if heading in ("dtype", "case") else "right")
    for t in timings:
        shown.add_row(t.dtype, t.case, f"{t.torch * 1e3:.1f}", f"{t.detinfer * 1e3:.1f}", f"{t.ratio:.2f}")
    return shown
