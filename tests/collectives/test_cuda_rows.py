"""Rows of a width that is no multiple of 8 go between GPUs with zeros behind them: why that leaves their bytes alone.

What the kernels make of it is in test_cuda_vectors.py, which needs a GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detinfer.collectives.cuda import _wider
from detinfer.reference.rows import square_sum


@pytest.mark.parametrize("n", [1, 7, 15, 77, 100, 1001, 1023, 1025, 2047, 2890])
def test_zeros_behind_a_row(n: int) -> None:
    """The sum of its squares has the same bytes; the mean has to be over the n elements, not over all."""
    random = np.random.default_rng(n)
    full = (
        random.integers(2**23, 2**24, (5, n))
        * random.choice([-1.0, 1.0], (5, n))
        * 2.0 ** random.integers(-30, -20, (5, n))
    )
    for row in (full.astype(np.float32), np.zeros((5, n), np.float32)):
        wide = _wider(torch.from_numpy(row)).numpy()
        assert wide.shape == (5, -(-n // 8) * 8)
        assert wide.shape[1] != n
        total = square_sum(row)
        assert square_sum(wide).tobytes() == total.tobytes()
        if row.any():
            assert (total / np.float32(n)).tobytes() != (total / np.float32(wide.shape[1])).tobytes()
            if n >= 1000:  # the order is one that a shift would show
                assert square_sum(np.roll(row, 1, axis=1)).tobytes() != total.tobytes()
