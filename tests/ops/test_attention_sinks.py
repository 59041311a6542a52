"""Attention with sinks: bytes against the reference, prefill against decode, and a sink in the wrong place."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from detinfer import bits
from detinfer.errors import UnsupportedDtype, UsageError
from detinfer.ops import attention_proof, attention_sinks
from detinfer.ops.evidence import REFERENCE_NAME, from_values, to_values
from detinfer.reference import attention as reference
from detinfer.reference.arithmetic import store

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SINKS = np.array([-3.0, 0.5, 2.5, 60.0], np.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=bits.dtype_name)
def test_bytes_are_the_references(dtype: torch.dtype, level: str, threads: int) -> None:
    """Every instruction set and number of threads; the proof's cases besides."""
    query, key, value = attention_proof.stress((4, 2), 37, 37, 16, 24, dtype, 2)
    sinks = from_values(SINKS, dtype)
    got = attention_sinks.attention_with_sinks(query, key, value, sinks, is_causal=True)
    wanted = attention_sinks.expected(query, key, value, sinks, is_causal=True)
    assert bits.as_bytes(got) == bits.as_bytes(wanted)
    without = attention_proof.expected(query, key, value, is_causal=True)
    assert not bits.rows_equal(got, without).any(), "the sinks take weight in every row"
    attention_sinks.prove.cache_clear()
    assert attention_sinks.prove(dtype)[0] > 1000


def test_a_row_depends_on_its_own_keys_alone() -> None:
    """Decode after prefill, left padding and a window: the same bytes; a sink among the keys would give others."""
    query, key, value = attention_proof.stress((4, 2), 1100, 1100, 8, 5, torch.float32)
    sinks = torch.from_numpy(SINKS)
    rows = (0, 1, 37, 1023, 1024, 1099)
    whole = attention_sinks.attention_with_sinks(query[:, :, list(rows)], key, value, sinks, _causal(rows, 1100))
    for place, row in enumerate(rows):
        one = query[:, :, row : row + 1]
        seen = slice(0, row + 1)
        alone = attention_sinks.attention_with_sinks(one, key[:, :, seen], value[:, :, seen], sinks)
        assert bits.as_bytes(alone) == bits.as_bytes(whole[:, :, place : place + 1].contiguous()), row
        padding = torch.full((1, 2, 13, 8), math.nan), torch.full((1, 2, 13, 5), math.nan)
        padded = [torch.cat([pad, t[:, :, seen]], 2) for pad, t in zip(padding, (key, value), strict=True)]
        mask = (torch.arange(13 + row + 1) >= 13)[None, None, None]
        shifted = attention_sinks.attention_with_sinks(one, *padded, sinks, mask)
        assert bits.as_bytes(shifted) == bits.as_bytes(alone), row
    assert _as_first_key(query, key, value, sinks, rows) != bits.as_bytes(whole.transpose(0, 2).contiguous())


def _causal(rows: tuple[int, ...], keys: int) -> torch.Tensor:
    return (torch.arange(keys)[None] <= torch.tensor(rows)[:, None])[None, None]


def _as_first_key(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor, rows: tuple[int, ...]
) -> bytes:
    """The sink as a key before all others: mathematically the same, another order of the sum."""
    q, k, v = (to_values(t) for t in (query, key, value))
    k, v = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
    found = []
    for row in rows:
        n = row + 1
        s = reference.scores(q[:, :, row:n], k[:, :, :n], 1 / math.sqrt(8), None)
        s = np.concatenate([np.broadcast_to(SINKS[None, :, None, None], (1, 4, 1, 1)), s], -1)
        allowed = np.ones_like(s, bool)
        p = reference.weights(s, allowed, reference.greatest_score(s, allowed))
        o = np.zeros((1, 4, 1, 5), np.float32)
        for j in range(n):
            o = reference.fma(p[..., j + 1, None], v[..., None, j, :], o)
        found.append(store(o / reference.weight_sums(p, allowed)[..., None], REFERENCE_NAME[torch.float32]))
    return np.stack(found).reshape(len(rows), 4, 1, 5).tobytes()


def test_wrong_arguments() -> None:
    query, key, value = attention_proof.stress((4, 2), 3, 3, 8, 8, torch.float32)
    with pytest.raises(UsageError, match=r"sinks of \[3\]"):
        attention_sinks.attention_with_sinks(query, key, value, torch.zeros(3))
    with pytest.raises(UnsupportedDtype):
        attention_sinks.attention_with_sinks(query.double(), key.double(), value.double(), torch.zeros(4))
