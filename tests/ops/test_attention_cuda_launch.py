"""How calls of attention on a GPU are cut into launches, without a GPU: what each kernel would be given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detinfer.errors import Diverged, RefusedError, UsageError
from detinfer.ops import attention_cuda, attention_cuda_launch, attention_cuda_variants
from detinfer.ops.attention_cuda import attention, paged_attention, scaled_dot_product_attention
from detinfer.ops.attention_cuda_launch import Keys, plan
from detinfer.ops.attention_deal import BY_RULE, Chip, Deal


def shown(arguments: tuple[Any, ...]) -> list[Any]:
    return [("tensor", a.data_ptr(), a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments]


class Kernel:
    """Stands for a kernel of Triton and keeps what its launches are given."""

    def __init__(self, name: str, calls: list[tuple[Any, ...]]) -> None:
        self.name, self.calls = name, calls
        # In an order of their own, as the kernels' parameters have one.
        self.arg_names = sorted(["Q", "K", "V", "G", "SHARE", "D", "DV", "DP", "DVP", "CAUSAL", "WANT_LSE", "BM", "PAGE",
                                 "WINDOW", "SPANS", "MASK", "STARTED", "COUNTED", "SINK", "POSITIONS", "SCAN", "SEVERAL"])  # fmt: skip

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Any:
            self.calls.append((self.name, grid, shown(arguments), constants))
            return Compiled(self, constants)

        return launch


class Compiled:
    """What a launch gives: takes a grid of three, every parameter in its place, and the stream."""

    def __init__(self, kernel: Kernel, constants: dict[str, Any]) -> None:
        self.kernel, self.options = kernel, {n: c for n, c in constants.items() if n not in kernel.arg_names}
        self.names = [name for name in kernel.arg_names if name in constants]
        self.hash = f"{kernel.name} {sorted(constants.items())}"

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert len(grid) == 3 and grid[2] == 1

        def start(*arguments: Any, stream: int) -> None:
            assert stream == STREAM
            count = len(self.names)
            constants = dict(zip(self.names, arguments[-count:], strict=True)) | self.options
            self.kernel.calls.append((self.kernel.name, grid[:2], shown(arguments[:-count]), constants))

        return start


STREAM = 77
H200 = Chip(132, 227 << 10)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """The launches of a test, which computes nothing: tensors lie on the CPU."""
    made: list[tuple[Any, ...]] = []
    kernels = SimpleNamespace(
        **{name: Kernel(name, made) for name in ("tiles", "decode", "prefill", "spans", "plain")},
        descriptor=lambda t, *how: (t.data_ptr(), *how),
        block=64,
        least=256,
        most=16,
    )
    space = torch.zeros(1 << 22)
    monkeypatch.setattr(attention_cuda_launch, "kernels_of_triton", lambda: kernels)
    monkeypatch.setattr(attention_cuda_launch, "chip", lambda _: H200)
    monkeypatch.setattr(attention_cuda_launch, "_check_devices", lambda *_: None)
    monkeypatch.setattr(attention_cuda_launch, "workspace", lambda *work: (space, space, space, space))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: STREAM, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(attention_cuda_variants, "check", lambda *_: None)  # a proof computes
    attention_cuda._launches.clear()
    yield made
    attention_cuda._launches.clear()


def inputs(
    heads: int = 8, kv_heads: int = 2, queries: int = 1, keys: int = 1000, depth: int = 64, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = ((batch, heads, queries, depth), (batch, kv_heads, keys, depth), (batch, kv_heads, keys, depth))
    query, key, value = (torch.zeros(size, dtype=torch.bfloat16) for size in sizes)
    return query, key, value


def test_machine_code_is_proved_first(calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each launch, after it ran and before its result is there; what was refused is asked again."""
    asked: list[tuple[str, int]] = []
    refused = True

    def check(launch: Any, code: str, *_: Any) -> None:
        asked.append((code, len(calls)))
        if refused:
            raise Diverged("other bytes")

    monkeypatch.setattr(attention_cuda_variants, "check", check)
    for _ in range(2):
        with pytest.raises(Diverged):
            scaled_dot_product_attention(*inputs(), enable_gqa=True)
    assert asked == [(asked[0][0], 1), (asked[0][0], 2)] and asked[0][0].startswith("decode")
    refused = False
    for _ in range(5):
        scaled_dot_product_attention(*inputs(), enable_gqa=True)
    # The third call is asked about, then the launch that is remembered; no other.
    assert asked[2:] == [(asked[0][0], 3), (asked[0][0], 4)] and len(calls) == 7
    attention(*inputs(queries=300))
    assert asked[4][0] != asked[0][0] and len(asked) == 5


BOOL = torch.ones(2, 1, 1, 1000, dtype=torch.bool)
CASES: dict[str, tuple[dict[str, int], torch.Tensor | None, bool]] = {
    "decode": ({}, None, False),
    "a static cache": ({}, BOOL, False),
    "an added mask for each head": ({}, torch.zeros(2, 8, 1, 1000), False),
    "prefill": ({"queries": 1000}, None, True),
    "prefill under a mask": ({"queries": 300}, torch.ones(300, 1000, dtype=torch.bool), False),
    "a long mask": ({"keys": 40000}, torch.ones(2, 1, 1, 40000, dtype=torch.bool), False),
    "depth 256": ({"queries": 300, "depth": 256}, None, True),
    "one head of K and V": ({"heads": 71, "kv_heads": 1, "queries": 300}, None, True),
    "three heads": ({"heads": 9, "kv_heads": 3, "queries": 300}, None, True),
}
KERNELS = {
    "decode": ["decode"],
    "a static cache": ["decode"],
    "an added mask for each head": ["decode"],
    "prefill": ["prefill"],
    "prefill under a mask": ["spans", "tiles"],
    "a long mask": ["spans", "decode"],
    "depth 256": ["tiles"],
    "one head of K and V": ["prefill"],
    "three heads": ["prefill"],
}


@pytest.mark.parametrize("name", CASES)
def test_a_remembered_launch_is_the_same(name: str, calls: list[tuple[Any, ...]]) -> None:
    """The second call of a signature gives the kernels what the first one gave, but for fresh tensors."""
    sizes, mask, causal = CASES[name]
    tensors = inputs(**sizes)
    first = scaled_dot_product_attention(*tensors, mask, 0.0, causal, enable_gqa=True)
    assert [kernel for kernel, *_ in calls] == KERNELS[name]
    assert len(attention_cuda._launches) == 1
    made = list(calls)
    calls.clear()
    second = scaled_dot_product_attention(*tensors, mask, 0.0, causal, enable_gqa=True)
    assert first.shape == second.shape and first.stride() == second.stride() and first.dtype == second.dtype
    own = {t.data_ptr() for t in (*tensors, mask) if t is not None}
    for (kernel, grid, given, constants), again in zip(made, calls, strict=True):
        assert (kernel, grid, constants) == (again[0], again[1], again[3])
        for a, b in zip(given, again[2], strict=True):
            fresh = isinstance(a, tuple) and a[0] == "tensor" and a[1] not in own
            assert a == b or (fresh and a[2] == b[2] and b[1] not in own)


def test_another_shape_is_another_launch(calls: list[tuple[Any, ...]]) -> None:
    for batch in (2, 3):
        for scale in (None, 0.5):
            scaled_dot_product_attention(*inputs(batch=batch), scale=scale, enable_gqa=True)
    assert len(attention_cuda._launches) == 4
    assert len({(grid, str(given[-17:])) for _, grid, given, _ in calls}) >= 2


def test_copies_are_not_remembered(calls: list[tuple[Any, ...]]) -> None:
    """A call that had to copy its tensors, or whose scale is negative, is planned anew each time."""
    query, key, value = inputs()
    scaled_dot_product_attention(query, key.mT.contiguous().mT, value, enable_gqa=True)
    scaled_dot_product_attention(query, key, value, scale=-1.0, enable_gqa=True)
    off = torch.zeros(key.numel() + 1, dtype=key.dtype)[1:].view(key.shape)
    scaled_dot_product_attention(query, off, value, enable_gqa=True)
    assert not attention_cuda._launches
    assert all(t[1] % 16 == 0 for _, _, given, _ in calls for t in given if isinstance(t, tuple))
    scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert len(attention_cuda._launches) == 1
    calls.clear()
    scaled_dot_product_attention(query, off, value, enable_gqa=True)
    assert calls[0][2][1][1] != off.data_ptr(), "an address that is no multiple of 16"


def test_rows_of_a_tile_have_splits_of_one_length(calls: list[tuple[Any, ...]]) -> None:
    """``prefill`` takes a tile's rows together: not where some of them span 4096 keys and the next ones more."""
    for start, kernel in ((0, "prefill"), (4064, "prefill"), (4065, "tiles"), (4080, "prefill"), (9000, "prefill")):
        tensors = inputs(queries=400, keys=start + 400, batch=1)
        assert plan(*tensors, Keys(None, True, start), 1.0, None, False).kernel == kernel, start
    assert plan(*inputs(queries=400, keys=4500), Keys(), 1.0, None, False).kernel == "prefill"
    assert plan(*inputs(queries=400, keys=300), Keys(None, True, -100), 1.0, None, False).kernel == "tiles"


def test_few_rows_of_a_long_sequence_are_split(calls: list[tuple[Any, ...]]) -> None:
    launch = plan(*inputs(queries=3, keys=9000, batch=1), Keys(None, True, 8997), 1.0, None, False)
    assert (launch.kernel, launch.grid) == ("decode", (16, 6))
    launch = plan(*inputs(heads=2, queries=4, keys=9000), Keys(BOOL[..., :1].expand(2, 2, 4, 9000)), 1.0, None, False)
    assert (launch.kernel, launch.constants["POSITIONS"], launch.grid) == ("decode", 4, (16, 4))
    for keys, splits in ((1 << 21, 16), ((1 << 21) + 1, 17), (3_000_000, 23)):
        query, key, value = (
            t.expand(1, 2, n, 64) for t, n in zip(inputs(2, 2, 1, 1, 64, 1), (1, keys, keys), strict=True)
        )
        assert plan(query, key, value, Keys(), 1.0, None, False).grid == (splits, 2), "a split is 131072 keys at most"


def test_how_many_splits_a_program_takes(calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows where they fill the chip, else so many that all programs run at a time; one kernel for rows that grow."""

    def dealt(keys: int, batch: int = 8, deal: Deal = BY_RULE) -> tuple[Any, ...]:
        launch = plan(*inputs(heads=8, kv_heads=8, keys=keys, batch=batch), Keys(), 1.0, None, False, None, deal)
        assert launch.kernel == "decode" and launch.work[1] == launch.grid[0] * launch.numbers[7]
        return launch.grid, launch.numbers[7], launch.constants["SEVERAL"]

    for keys, splits in ((200, 1), (1000, 4), (4096, 16), (9000, 16)):
        assert dealt(keys, deal=Deal(1)) == ((splits, 64), 1, False)
        assert dealt(keys, deal=Deal(4)) == ((-(-splits // 4), 64), min(4, splits), True)
    shape = plan(*inputs(), Keys(), 1.0, None, False, None, Deal(2, 8, 5)).constants
    assert (shape["num_warps"], shape["num_stages"]) == (8, 5)
    alone = (1,)
    for deal, counts in (
        (Deal(4, 2, 2), attention_cuda_variants.COUNTS), (Deal(1, 2, 2), alone), (Deal(1, 2, 2, whole=True), alone),
    ):  # fmt: skip
        launch = plan(*inputs(), Keys(), 1.0, None, False, None, deal)
        proved = [plan(*inputs(), Keys(), 1.0, None, False, None, d) for d in attention_cuda_variants._deals(launch)]
        assert [made.numbers[7] for made in proved] == [min(count, 4) for count in counts]
        assert all(made.constants == launch.constants for made in proved), "the proof is of other machine code"
    # 132 multiprocessors: 528 programs run at a time, and from 119 rows on each has a program.
    assert [dealt(keys) for keys in (200, 1000, 1100, 2048, 4096, 4097, 100000)] == [
        ((1, 64), 1, True), ((4, 64), 1, True), ((5, 64), 1, True), ((8, 64), 1, True), ((8, 64), 2, True),
        ((8, 64), 2, True), ((8, 64), 2, True),
    ]  # fmt: skip
    assert [dealt(4096, batch=batch) for batch in (1, 4, 5, 10, 12, 14)] == [
        ((16, 8), 1, False), ((16, 32), 1, False), ((8, 40), 2, True), ((6, 80), 3, True), ((4, 96), 4, True),
        ((4, 112), 4, True),
    ]  # fmt: skip
    assert {dealt(keys, batch=64) for keys in (200, 4096, 9000)} == {((1, 512), 1, False)}

    def shape_of(batch: int, keys: int = 2000, **sizes: int) -> tuple[bool, int]:
        given = inputs(heads=8, kv_heads=8, keys=keys, batch=batch, **sizes)
        found = plan(*given, Keys(), 1.0, None, False).constants
        return found["WHOLE"], found["num_stages"]

    assert [shape_of(batch, keys) for batch in (1, 2, 3, 14) for keys in (100, 9000)] == [
        (False, 3), (False, 3), (False, 3), (False, 3), (False, 2), (False, 2), (False, 2), (False, 2),
    ]  # fmt: skip
    assert [shape_of(batch) for batch in (15, 16, 17, 33, 34, 66, 67, 400)] == [
        (True, 5), (True, 5), (True, 3), (True, 3), (True, 2), (True, 2), (True, 3), (True, 3),
    ]  # fmt: skip
    assert shape_of(64, depth=192) == (False, 2), "deeper heads were not measured"

    def varied(batch: int, **kind: Any) -> tuple[bool, int, bool, int]:
        given = inputs(heads=8, kv_heads=8, keys=4096, batch=batch)
        made = plan(*given, Keys(**{name: give(batch) for name, give in kind.items()}), 1.0, None, False)
        return made.constants["WHOLE"], made.numbers[7], made.constants["SEVERAL"], made.constants["num_stages"]

    def each_int(batch: int) -> torch.Tensor:
        return torch.zeros(batch, dtype=torch.int32)

    def a_mask(batch: int) -> torch.Tensor:
        return torch.ones(batch, 1, 1, 4096, dtype=torch.bool).expand(batch, 8, 1, 4096)

    for kind in ({"starts": each_int}, {"added": a_mask}):
        assert [varied(batch, **kind) for batch in (16, 17, 49, 50, 67)] == [
            (False, 4, True, 2), (False, 1, False, 2), (False, 1, False, 2), (True, 1, False, 2), (True, 1, False, 3),
        ], "padded rows may be longer than others"  # fmt: skip
    for batch in (17, 64, 400):
        assert varied(batch, lengths=each_int) == (False, 1, False, 2), "one request's row may be very long"
    monkeypatch.setattr(attention_cuda_launch, "chip", lambda _: Chip(132, 99 << 10))
    assert [shape_of(batch) for batch in (1, 16, 24, 64)] == [(False, 3), (True, 3), (True, 3), (True, 2)]
    monkeypatch.setattr(attention_cuda_launch, "chip", lambda _: Chip(132, 64 << 10))
    assert [shape_of(batch) for batch in (1, 16)] == [(False, 2), (True, 2)], "stages that shared memory has room for"
    monkeypatch.setattr(attention_cuda_launch, "chip", lambda _: Chip(16, 227 << 10))
    assert dealt(4096, batch=1) == ((8, 8), 2, True), "a smaller chip is filled sooner"
    assert shape_of(2) == (True, 5)
    float32 = [t.float() for t in inputs(heads=8, kv_heads=8, keys=4096, batch=64)]
    single = plan(float32[0], float32[1], float32[2], Keys(), 1.0, None, False).constants
    assert not single["SEVERAL"] and not single["WHOLE"]
    many = plan(*inputs(heads=128, kv_heads=2, keys=4096, batch=64), Keys(), 1.0, None, False).constants
    assert (many["BM"], many["num_warps"], many["num_stages"], many["WHOLE"]) == (64, 4, 2, False)


def test_refusals_and_functions_of_their_own(calls: list[tuple[Any, ...]]) -> None:
    query, key, value = inputs()
    with pytest.raises(RefusedError, match="a depth of 320"):
        scaled_dot_product_attention(*inputs(depth=320), enable_gqa=True)
    with pytest.raises(UsageError, match="leave out window"):
        attention(query, key, value, mask=BOOL, window=4)
    with pytest.raises(UsageError, match="window=-1"):
        attention(query, key, value, window=-1)
    with pytest.raises(UsageError, match=r"starts is torch\.int64"):
        attention(query, key, value, starts=torch.tensor([1, 2]))
    pages, lengths = torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    cache = torch.zeros(9, 16, 2, 64, dtype=torch.bfloat16)
    paged_attention(query, cache, cache, pages, lengths)
    assert calls[0][3]["PAGE"] == 16 and calls[0][3]["COUNTED"]
    with pytest.raises(UsageError, match="caches"):
        paged_attention(query, cache, cache[:, :8], pages, lengths)
    with pytest.raises(UsageError, match="block_table is"):
        paged_attention(query, cache, cache, pages.long(), lengths)
    calls.clear()
    empty = scaled_dot_product_attention(query, key[:, :, :0], value[:, :, :0], enable_gqa=True)
    assert not calls and not empty.view(torch.int16).any()


def test_without_triton_the_error_says_so() -> None:
    try:
        import triton  # noqa: F401
    except ImportError:
        with pytest.raises(attention_cuda_launch.NativeError, match="needs Triton"):
            attention_cuda_launch.kernels_of_triton()
    else:
        assert attention_cuda_launch.kernels_of_triton().block == 64
