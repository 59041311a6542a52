"""A whole model on a GPU under the policy against torch's default: prefill, decode in a CUDA graph, eager decode.

The model is an 8B-sized Qwen3 of transformers, its weights drawn from integers on the device. Both sides are timed in
turn in one run, and the bytes of the same rows are compared: a row of a batch with the row alone, prefill with decode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from detinfer import bits, environment
from detinfer.errors import UsageError
from detinfer.models.huggingface import transformers
from detinfer.models.random_weights import draw
from detinfer.models.row_parallel import local
from detinfer.policy import deterministic

_NAMES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
SHAPES = {"qwen3-8b": (151936, 4096, 12288, 36, 32, 8, 128), "qwen3-small": (32000, 1024, 3072, 4, 16, 8, 128)}
"""Configurations: the shapes of Qwen3-8B, and a small model of the same kind."""


@dataclass(frozen=True)
class Case:
    """``batch`` prompts of ``length`` tokens (``prefill``), or one decode step after them: in a graph, or eager."""

    name: str
    kind: str
    batch: int
    length: int


CASES = (
    Case("prefill 8x2048", "prefill", 8, 2048),
    Case("decode, graph, batch 1", "graph", 1, 1024),
    Case("decode, graph, batch 8", "graph", 8, 1024),
    Case("decode, graph, batch 64", "graph", 64, 1024),
    Case("decode, eager, batch 1", "eager", 1, 1024),
    Case("decode, eager, batch 8", "eager", 8, 1024),
)

ROOM = 512
"""Slots of a static cache after the prompt: a replay takes one."""


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one forward pass on both sides; ``host`` is the host's time to start it, in an eager one."""

    case: str
    torch: float
    detinfer: float
    torch_host: float
    detinfer_host: float

    @property
    def ratio(self) -> float:
        """detinfer's time over torch's."""
        return self.detinfer / self.torch


@dataclass(frozen=True)
class Check:
    """Rows whose logits were compared byte by byte: how many, and how many differ with the policy on and off."""

    name: str
    rows: int
    differ: int
    differ_without: int


def build(shape: str, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", **changes: int) -> Any:
    """A Qwen3 of transformers with weights from an integer generator, made on ``device``; in eval mode."""
    library = transformers("bench model on a GPU")
    if shape not in SHAPES:
        raise UsageError(f"bench model on a GPU has the shapes {', '.join(SHAPES)}, not {shape}")
    sizes = dict(zip(_NAMES, SHAPES[shape], strict=True)) | changes
    config = library.Qwen3Config(**sizes, max_position_embeddings=8192, tie_word_embeddings=False)
    with torch.device("meta"):
        model = library.Qwen3ForCausalLM(config).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # its buffers are computed
    draw(model, 0, torch.device(device))
    return model


def prove(model: Any) -> tuple[int, float]:
    """Measure and prove every shape of the model's linear layers, this rank's share of them, on this GPU: (shapes, seconds)."""
    from detinfer.ops.matmul_cuda_proof import prove_shape

    start = time.perf_counter()
    layers = [(local(m.weight), m.bias is not None) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    shapes = {(*weight.shape, weight.dtype, bias): weight.device for weight, bias in layers}
    for (n, k, dtype, bias), device in shapes.items():
        prove_shape(n, k, dtype, device, bias=bias)
    return len(shapes), time.perf_counter() - start


def policy(on: bool) -> AbstractContextManager[Any]:
    """The block of either side."""
    return deterministic("batch", uncovered="trust") if on else nullcontext()


def ids(model: Any, batch: int, length: int, seed: int) -> torch.Tensor:
    """Token ids [batch, length]."""
    device = model.device
    draw = torch.Generator(device).manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=draw, device=device)


Step = Callable[[], tuple[float, float]]
"""Milliseconds on the device, and of the host to start it."""


def run(
    model: Any,
    cases: Sequence[Case] = CASES,
    repeats: int = 7,
    said: Callable[[str], None] = lambda _: None,
    together: Callable[[Step], tuple[float, float]] = lambda step: step(),
) -> Iterator[Timing]:
    """Time every case, both sides in turn; ``together`` makes a step at once on all ranks and gives the slowest's times."""
    timers = {"prefill": _prefill, "graph": _graph, "eager": _eager}
    with torch.inference_mode():
        for case in cases:
            said(case.name)
            sides: list[list[tuple[float, float]]] = [[], []]
            once = [timers[case.kind](model, case, on) for on in (False, True)]
            for _ in range(repeats):
                for side, step in zip(sides, once, strict=True):
                    side.append(together(step))
            del once
            torch.cuda.empty_cache()
            off, on = ([_median([s[i] for s in side]) for i in (0, 1)] for side in sides)
            yield Timing(case.name, off[0], on[0], off[1], on[1])


def _median(found: Sequence[float]) -> float:
    return sorted(found)[len(found) // 2]


def _timed(call: Callable[[], Any], calls: int) -> tuple[float, float]:
    cuda: Any = torch.cuda  # untyped in torch
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    before = time.perf_counter()
    for _ in range(calls):
        call()
    host = time.perf_counter() - before
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / calls, host / calls * 1e3


def _prefill(model: Any, case: Case, on: bool) -> Step:
    tokens = ids(model, case.batch, case.length, 3)

    def step() -> tuple[float, float]:
        with policy(on):
            model(input_ids=tokens[:, :64], use_cache=False, logits_to_keep=1)  # entering is paid for once
            return _timed(lambda: model(input_ids=tokens, use_cache=False, logits_to_keep=1), 1)

    step()
    return step


def static_cache(model: Any, batch: int, length: int) -> Any:
    """A static cache with ``length`` tokens in it, drawn, and room for more."""
    config, device, dtype = model.config, model.device, model.dtype
    cache = transformers("a static cache").StaticCache(config=config, max_cache_len=length + ROOM)
    heads = len(local(model.model.layers[0].self_attn.k_proj.weight)) // config.head_dim  # of this rank
    cache.early_initialization(batch, heads, config.head_dim, dtype, device)
    draw = torch.Generator(device).manual_seed(7)
    for layer in cache.layers:
        for held in (layer.keys, layer.values):
            drawn = torch.randint(
                -127, 128, held[:, :, :length].shape, generator=draw, device=device, dtype=torch.int16
            )
            held[:, :, :length] = drawn * (1 / 64)
        layer.cumulative_length.fill_(length)
    return cache


def _graph(model: Any, case: Case, on: bool) -> Step:
    cache, tokens = static_cache(model, case.batch, case.length), ids(model, case.batch, 1, 5)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with policy(on):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                model(input_ids=tokens, past_key_values=cache, use_cache=True)
        torch.cuda.current_stream().wait_stream(side)
        # Only this thread's calls are the graph's: NCCL has a thread that asks for events.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            model(input_ids=tokens, past_key_values=cache, use_cache=True)
    chosen = tokens.clone()

    def step() -> tuple[float, float]:
        tokens.copy_(chosen)  # what the graph reads has to stay where it is: this function holds it
        for layer in cache.layers:
            layer.cumulative_length.fill_(case.length)
        graph.replay()
        return _timed(graph.replay, 10)

    return step


def _eager(model: Any, case: Case, on: bool) -> Step:
    cache, tokens = static_cache(model, case.batch, case.length), ids(model, case.batch, 1, 5)

    def step() -> tuple[float, float]:
        for layer in cache.layers:
            layer.cumulative_length.fill_(case.length)
        with policy(on):
            model(input_ids=tokens, past_key_values=cache, use_cache=True)
            return _timed(lambda: model(input_ids=tokens, past_key_values=cache, use_cache=True), 4)

    step()
    return step


def checks(model: Any, batch: int = 8, length: int = 509) -> Iterator[Check]:
    """Bytes of logits, with the policy on and off: rows of a batch against the rows alone, prefill against decode."""
    tokens = ids(model, batch, length + 1, 11)
    pairs: dict[str, list[list[tuple[torch.Tensor, torch.Tensor]]]] = {}
    with torch.inference_mode():
        for on in (True, False):
            with policy(on):
                whole = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, 0]
                rows = [tokens[i : i + 1] for i in range(batch)]
                alone = [model(input_ids=row, use_cache=False, logits_to_keep=1).logits[0, 0] for row in rows]
                pairs.setdefault("a row of the batch, the row alone", []).append(list(zip(whole, alone, strict=True)))
                held = model(input_ids=tokens[:, :length], use_cache=True, logits_to_keep=1).past_key_values
                steps = model(input_ids=tokens[:, length:], past_key_values=held, use_cache=True).logits[:, 0]
                pairs.setdefault("prefill, decode in the batch", []).append(list(zip(whole, steps, strict=True)))
                cache = static_cache(model, batch, length)
                cache.reset()
                model(input_ids=tokens[:, :length], past_key_values=cache, use_cache=True, logits_to_keep=1)
                slots = model(input_ids=tokens[:, length:], past_key_values=cache, use_cache=True).logits[:, 0]
                pairs.setdefault("prefill, decode with a static cache", []).append(list(zip(whole, slots, strict=True)))
    for name, (with_policy, without) in pairs.items():
        differ, plain = (
            sum(not bool(bits.rows_equal(a, b).all()) for a, b in found) for found in (with_policy, without)
        )
        yield Check(name, len(with_policy), differ, plain)


def tables(timings: Sequence[Timing], found: Sequence[Check]) -> Iterator[Table]:
    """The timings and the comparisons as tables for a terminal."""
    shown = Table(title="whole model on a GPU, ms a forward pass (host ms to start it)")
    for heading in ("case", "torch", "detinfer", "detinfer / torch"):
        shown.add_column(heading, justify="left" if heading == "case" else "right")
    for t in timings:
        sides = (f"{t.torch:.2f} ({t.torch_host:.2f})", f"{t.detinfer:.2f} ({t.detinfer_host:.2f})")
        shown.add_row(t.case, *sides, f"{t.ratio:.3f}")
    yield shown
    shown = Table(title="rows of logits whose bytes differ")
    for heading in ("compared", "rows", "policy on", "policy off"):
        shown.add_column(heading, justify="left" if heading == "compared" else "right")
    for check in found:
        shown.add_row(check.name, str(check.rows), str(check.differ), str(check.differ_without))
    yield shown


def to_json(timings: Sequence[Timing], found: Sequence[Check]) -> dict[str, Any]:
    """Everything as plain JSON values, with the environment."""
    return {
        "environment": environment.capture(device="cuda").to_json(),
        "timings": [asdict(t) | {"ratio": t.ratio} for t in timings],
        "checks": [asdict(c) for c in found],
    }
