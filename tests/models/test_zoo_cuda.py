"""The mixtures of experts of the zoo under ``batch`` on a GPU: every row in any batch, prefill against decode."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from detinfer import bits, deterministic
from detinfer.policy import Accepted

sys.path.append(str(Path(__file__).parent))
import test_zoo
import zoo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
]


@pytest.mark.parametrize("dtype", test_zoo.DTYPES, ids=bits.dtype_name)
@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_rows_and_pieces_have_the_same_bytes(name: str, dtype: torch.dtype) -> None:
    model, ids = zoo.build(name, dtype).cuda(), zoo.tokens(test_zoo.ROWS, test_zoo.LENGTH).cuda()
    with deterministic("batch") as active:
        whole = test_zoo.hidden(model, ids).cpu()
        assert bool(torch.isfinite(whole).all())
        for row in range(test_zoo.ROWS):
            alone = test_zoo.hidden(model, ids[row : row + 1]).cpu()
            assert test_zoo.same(alone, whole[row : row + 1]), row
        if name != "bert":
            for cut in ([5, 1, 7], [4, *[1] * 9]):
                assert test_zoo.same(test_zoo.in_pieces(model, ids, cut).cpu(), whole), cut
    assert all(isinstance(decision, Accepted) for decision in active.decisions.values())
