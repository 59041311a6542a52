"""Batch dimensions are found by running at two sizes, and joining keeps every byte."""

from __future__ import annotations

import pytest
import torch

from detinfer import bits
from detinfer.goldens import batch, tree


def test_the_dimension_that_doubles_is_the_batch() -> None:
    """In front, in the middle, or shared: shapes at batch 1 and 2 tell."""
    one = tree.encode((torch.zeros(1, 3, 4), torch.zeros(3, 1, 4), torch.zeros(5), torch.zeros(6, 4)))
    two = tree.encode((torch.zeros(2, 3, 4), torch.zeros(3, 2, 4), torch.zeros(5), torch.zeros(12, 4)))
    assert batch.find(one, two) == {"0": 0, "1": 1, "2": None, "3": 0}


@pytest.mark.parametrize("shape", [(3, 3), (2, 6), (3,)], ids=str)
def test_any_other_change_of_shape_is_refused(shape: tuple[int, ...]) -> None:
    """A size that grows by one, two sizes that change, a dimension that appears: no batch can be formed."""
    with pytest.raises(batch.NoBatch, match="batch 2"):
        batch.find(tree.encode(torch.zeros(1, 3)), tree.encode(torch.zeros(shape)))


def test_join_puts_rows_in_the_given_order() -> None:
    """Rows stand where the trial puts them; what is shared comes once."""
    nodes = [tree.encode((torch.full((1, 2), float(i)), torch.ones(3))) for i in range(3)]
    joined = dict(tree.tensors(batch.join([nodes[2], nodes[0], nodes[2]], {"0": 0, "1": None})))
    assert bits.as_bytes(joined["0"]) == bits.as_bytes(torch.tensor([[2.0, 2.0], [0.0, 0.0], [2.0, 2.0]]))
    assert joined["1"].shape == (3,)


def test_rows_with_other_shared_tensors_keep_other_company() -> None:
    """Two requests may stand in one batch only when what they share has the same bytes; -0 is not +0."""
    dims = {"0": 0, "1": None}
    keys = {
        batch.company(tree.encode((torch.ones(1, 2) * i, torch.tensor([shared]))), dims)
        for i, shared in ((1, 0.0), (2, 0.0), (3, -0.0))
    }
    assert len(keys) == 2
