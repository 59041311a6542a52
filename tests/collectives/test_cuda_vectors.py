"""The portable vectors of goldens/ between 2 to 8 ranks on one GPU: the committed bytes, by every path, on every rank."""

from __future__ import annotations

import pytest
from cuda_ranks import Here
from cuda_vectors import GOLDENS, called

from detinfer import bits
from detinfer.goldens.vectors import file

pytestmark = pytest.mark.gpu

PATHS = {
    "all_reduce": ("push", "push_tiles", "pull", "two_shot", "two_shot@3x512"),
    "reduce_scatter": ("push", "two_shot"),
    "all_reduce_rms_norm": ("push", "push_tiles", "pull", "two_shot"),
}


@pytest.mark.parametrize("size", range(2, 9))
@pytest.mark.parametrize("operation", PATHS)
def test_vectors(operation: str, size: int) -> None:
    """All cases of a number of ranks; how many there are is what is committed."""
    cases = [case for case in file.read(GOLDENS / operation)[1] if case.ranks == size]
    assert len(cases) == {"all_reduce": 105, "reduce_scatter": 9, "all_reduce_rms_norm": 54}[operation]
    here = Here(size)
    wrong = []
    for case in cases:
        parts = [part.cuda() for part in case.parts]
        shared = {name: tensor.cuda() for name, tensor in case.inputs.items()}
        for path in PATHS[operation]:
            (found,) = here.run(
                lambda c, case=case, p=parts, s=shared, path=path: called(c, operation, case, p, s, path)
            )
            for rank, outputs in enumerate(found):
                for name, got in outputs.items():
                    wanted = case.outputs[name]
                    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
                    if bits.digest(got.cpu()) != bits.digest(wanted):
                        wrong.append((case.label(), path, rank, name))
    here.close()
    assert wrong == []
