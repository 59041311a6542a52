"""What every test shares: the machine named in the header, and the marker for tests that need a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer import native

LONGEST = (
    "collectives/test_fibers.py",
    "goldens/test_plants.py",
    "cli/test_tp_resume.py",
    "collectives/test_fibers_mismatch.py",
    "cli/test_tp_stopped.py",
    "cli/test_tp.py",
    "goldens/test_vectors.py",
    "cli/test_tp_sizes.py",
    "goldens/test_builtin_golden.py",
    "goldens/test_record.py",
    "native/test_matmul_chains.py",
    "models/test_zoo_axes.py",
    "integrations/test_workflow.py",
    "integrations/test_pipeline.py",
    "cli/test_tp_transformers.py",
    "goldens/test_resume.py",
    "cli/test_tp_locate.py",
    "cli/test_tp_cause.py",
    "cli/test_tp_experts.py",
    "goldens/test_cause_ranks.py",
    "policy/test_distributed.py",
)
"""Half a minute and more each. Workers take a file at a time: one that came last would leave the others idle."""


def pytest_report_header() -> list[str]:
    """Name what the results depend on."""
    state = native.load()
    if isinstance(state, native.Loaded):
        library = f"{state.path}, running {native.isa()} of {', '.join(state.levels)}"
    else:
        library = f"not loaded: {state.reason}"
    return [f"torch {torch.__version__}, {torch.get_num_threads()} threads", f"native library {library}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; skip tests marked gpu where there is no device, with the reason."""
    turn = {Path(__file__).parent / file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: turn.get(item.path, len(turn)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device on this machine"))


@pytest.fixture(autouse=True)
def _results_have_their_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result that a test writes is validated, where jsonschema is installed (the extra dev)."""
    try:
        import jsonschema
    except ModuleNotFoundError:
        return
    from detinfer.reporters import json as reporter

    real = reporter.write

    def write(result: Any, path: Path) -> None:
        real(result, path)
        jsonschema.Draft202012Validator(reporter.schema(result)).validate(json.loads(path.read_text(encoding="utf-8")))

    monkeypatch.setattr(reporter, "write", write)
