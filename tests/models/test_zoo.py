"""Every model of the zoo under ``batch`` on CPU: bytes of every row along every axis, nothing refused, nothing allowed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer import bits, deterministic
from detinfer.policy import Accepted

sys.path.append(str(Path(__file__).parent))
import zoo

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)

DTYPES = (torch.bfloat16, torch.float32)
ROWS, LENGTH = 5, 13


def hidden(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits of a language model, the last hidden states of an encoder."""
    out = model(ids, **inputs)
    found: torch.Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return found


def in_pieces(model: Any, ids: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """The logits of a sequence that is given piece by piece, with a cache that grows."""
    cache, found = None, []
    for piece in ids.split(cuts, dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


@pytest.fixture
def split_by_rows(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A planted fault: linear cuts K in two where it has fewer than 30 rows, as a GPU's split-K does."""
    own = torch.nn.functional.linear

    def planted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        half = x.shape[-1] // 2
        if x.numel() // x.shape[-1] >= 30:
            return own(x, weight, bias)
        first, second = own(x[..., :half], weight[:, :half], bias), own(x[..., half:], weight[:, half:])
        return first + second

    return lambda: monkeypatch.setattr(torch.nn.functional, "linear", planted)


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Bytes, not values."""
    return bits.as_bytes(got) == bits.as_bytes(wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=bits.dtype_name)
@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_a_row_has_the_same_bytes_in_every_batch(name: str, dtype: torch.dtype, split_by_rows: Any) -> None:
    """Alone, in batches of 2 and 5, at every place, beside other rows; the planted fault is seen."""
    model, ids = zoo.build(name, dtype), zoo.tokens(ROWS, LENGTH)
    with deterministic("batch") as active:
        whole = hidden(model, ids)
        assert bool(torch.isfinite(whole).all())
        alone = [hidden(model, ids[row : row + 1]) for row in range(ROWS)]
        assert same(torch.cat(alone), whole), "each row alone"
        turned = hidden(model, ids.roll(2, 0)).roll(-2, 0)
        assert same(turned, whole), "each row at another place"
        other = torch.cat([zoo.tokens(1, LENGTH, seed=9), ids[3:4]])
        assert same(hidden(model, other)[1:], whole[3:4]), "beside another row"
    assert all(isinstance(decision, Accepted) for decision in active.decisions.values())
    assert not any("allowed by the policy" in decision.reason for decision in active.decisions.values())
    assert len({bits.as_bytes(row) for row in whole}) == ROWS, "rows differ from each other"
    split_by_rows()
    with deterministic("batch"):
        assert not any(same(hidden(model, ids[row : row + 1]), alone[row]) for row in range(ROWS))


@pytest.mark.parametrize("dtype", DTYPES, ids=bits.dtype_name)
@pytest.mark.parametrize("name", zoo.DECODERS)
def test_pieces_and_decode_have_the_bytes_of_prefill(name: str, dtype: torch.dtype, split_by_rows: Any) -> None:
    """Two cuts at odd places, one token at a time, each row alone and together; the planted fault is seen."""
    model, ids = zoo.build(name, dtype), zoo.tokens(3, LENGTH)
    cuts = ([5, 1, 7], [1, 9, 3], [4, *[1] * 9])
    with deterministic("batch"):
        whole = model(ids).logits
        for cut in cuts:
            assert same(in_pieces(model, ids, cut), whole), cut
        assert same(in_pieces(model, ids[1:2], cuts[2]), whole[1:2]), "a row alone"
    split_by_rows()
    with deterministic("batch"):
        assert not any(same(in_pieces(model, ids, cut), whole) for cut in cuts)


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_padding_changes_nothing(name: str) -> None:
    """Padding on the left (for an encoder on the right), of different lengths in one batch, and what stands in it."""
    model, ids = zoo.build(name, torch.bfloat16), zoo.tokens(3, LENGTH)
    lengths = (LENGTH, LENGTH - 4, LENGTH - 1)
    mask = torch.zeros(3, LENGTH + 2, dtype=torch.int64)
    padded = zoo.tokens(3, LENGTH + 2, seed=8)
    places = []
    for row, length in enumerate(lengths):
        start = 0 if name == "bert" else LENGTH + 2 - length
        places.append(slice(start, start + length))
        mask[row, places[row]] = 1
        padded[row, places[row]] = ids[row, :length]
    positions = {} if name == "bert" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with deterministic("batch"):
        found = hidden(model, padded, attention_mask=mask, **positions)
        for row, length in enumerate(lengths):
            alone = hidden(model, ids[row : row + 1, :length])
            assert same(found[row : row + 1, places[row]], alone), f"row {row} of {length}"


def test_without_a_policy_some_byte_depends_on_the_batch() -> None:
    """The control: torch's own kernels, whole against rows alone, over the whole zoo."""
    ids, differ = zoo.tokens(ROWS, LENGTH), []
    with torch.no_grad():
        for name in zoo.CONFIGS:
            model = zoo.build(name, torch.float32)
            whole = hidden(model, ids)
            if any(not same(hidden(model, ids[row : row + 1]), whole[row : row + 1]) for row in range(ROWS)):
                differ.append(name)
    assert differ
