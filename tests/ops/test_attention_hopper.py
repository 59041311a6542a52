"""``prefill_hopper``, whose warps hand tiles to one another: every byte, wherever rows, blocks, splits and stages end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from detinfer.bits import as_bytes, first_mismatch
from detinfer.ops.attention_cuda import reference
from detinfer.ops.attention_cuda_launch import Keys, hopper_of_triton, run
from detinfer.ops.attention_cuda_proof import by_path, causal_mask, stress

pytestmark = pytest.mark.gpu
PATH = "prefill_hopper"
FEW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no GPU of compute capability 9")
    if hopper_of_triton() is None:
        pytest.skip("this Triton's Gluon is another than 3.6's and 3.7's")


def same(got: torch.Tensor, want: torch.Tensor, where: Any) -> None:
    found = first_mismatch(got.cpu(), want.cpu())
    assert found is None, f"{where}: {found}"


@pytest.mark.parametrize("dtype", FEW)
@pytest.mark.parametrize("heads", [(4, 1), (8, 2), (3, 1), (5, 5), (64, 1), (14, 2)], ids=str)
def test_where_rows_and_blocks_end(heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Rows and keys on both sides of a tile, a group's half of it, a block and a split; causal and not, and with the sums."""
    for queries, keys in ((1, 1), (2, 64), (15, 65), (16, 127), (31, 128), (33, 129), (64, 256), (65, 257), (127, 700)):
        inputs = stress(heads, queries, keys, 64, dtype, 2)
        for causal in (True, False):
            mask = causal_mask(queries, keys) if causal else torch.zeros((), device="cuda")
            want = reference(*inputs, mask)
            if keys == 700:
                wrong = reference(*inputs, mask, backwards=True), reference(*inputs, mask, split=128)
                assert all(first_mismatch(one.cpu(), want.cpu()) is not None for one in wrong), "an order shows"
            held = Keys(None, causal, keys - queries)
            got, lse = run(*inputs, held, None, None, True, PATH)
            same(got, want, (queries, keys, causal))
            other = run(*inputs, held, None, None, True, "tiles")[1]
            assert lse is not None and other is not None
            same(lse, other, ("lse", queries, keys, causal))


@pytest.mark.parametrize("dtype", FEW)
@pytest.mark.parametrize("depth", [64, 80, 96, 128])
def test_prompts_of_many_stages(depth: int, dtype: torch.dtype) -> None:
    """The ring of stages goes round many times; past 4096 keys splits are longer. Twenty runs, and rows in pieces."""
    inputs = stress((8, 2), 4416, 4416, depth, dtype)
    want = by_path(inputs, Keys(None, True), "prefill")
    some = reference(inputs[0][:, :, -70:], *inputs[1:], causal_mask(70, 4416))
    same(want[:, :, -70:], some, "the kernel that it is compared with")
    wrong = reference(inputs[0][:, :, -70:], *inputs[1:], causal_mask(70, 4416), backwards=True)
    assert first_mismatch(wrong.cpu(), some.cpu()) is not None, "an order shows"
    for turn in range(20):
        same(by_path(inputs, Keys(None, True), PATH), want, turn)
    query, key, value = inputs
    for start in (32, 2048, 4064, 4384):
        got = by_path((query[:, :, start:], key, value), Keys(None, True, start), PATH)
        same(got, want[:, :, start:], f"the rows from {start}")


@pytest.mark.parametrize("dtype", FEW)
def test_what_a_row_must_not_see(dtype: torch.dtype) -> None:
    """NaN and infinities behind a row change no bit of it; those that it sees are in its result, as by ``tiles``."""
    query, key, value = stress((4, 1), 300, 300, 64, dtype, 2)
    want = by_path((query, key, value), Keys(None, True), "tiles")
    key[:, :, 150:], value[:, :, 160:] = math.nan, math.inf
    got = by_path((query, key, value), Keys(None, True), PATH)
    same(got[:, :, :150], want[:, :, :150], "rows before them")
    same(got, by_path((query, key, value), Keys(None, True), "tiles"), "all rows")
    assert not got[:, :, 160:].isfinite().any()


def test_strides_and_graphs() -> None:
    """[B, S, H, D] as models have it, heads shown many times, and a captured call."""
    query, key, value = (
        t.transpose(1, 2).contiguous().transpose(1, 2) for t in stress((8, 2), 333, 333, 128, FEW[0], 2)
    )
    want = reference(query, key, value, causal_mask(333, 333))
    same(by_path((query, key, value), Keys(None, True), PATH), want, "transposed")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = by_path((query, key, value), Keys(None, True), PATH)
    for _ in range(3):
        got.fill_(math.nan)
        graph.replay()
        assert as_bytes(got.cpu()) == as_bytes(want.cpu())
