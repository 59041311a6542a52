"""What every test shares: the machine named in the header, and the marker for tests that need a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer import native


def pytest_report_header() -> list[str]:
    """Name what the results depend on."""
    state = native.load()
    if isinstance(state, native.Loaded):
        library = f"{state.path}, running {native.isa()} of {', '.join(state.levels)}"
    else:
        library = f"not loaded: {state.reason}"
    return [f"torch {torch.__version__}, {torch.get_num_threads()} threads", f"native library {library}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is no device, with the reason."""
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
