"""The built-in models at several numbers of ranks: recorded, and verified in batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detinfer import cli


@pytest.mark.parametrize(
    ("name", "ranks", "options"),
    [
        ("dense", 1, ()),
        ("dense", 2, ("--dtype", "bfloat16")),
        ("moe", 4, ("--tensors", "none")),
        ("moe", 8, ("--dtype", "float16", "--tensors", "slice")),
    ],
)
def test_verify_passes(name: str, ranks: int, options: tuple[str, ...], tmp_path: Path) -> None:
    """Exit 0, all three verdicts same, every row that can be compared is; inputs that are not stored are recomputed."""
    golden, report = tmp_path / "golden", tmp_path / "result.json"
    size = ("--n-prompts", "2", "--length", "3", "--decode-steps", "1")
    assert cli.run(["record", f"builtin:{name}", "--tp", str(ranks), "-o", str(golden), *size, *options]) == 0
    assert cli.run(["verify", str(golden), "--tp", str(ranks), "--n-trials", "2", "--json", str(report)]) == 0
    result = json.loads(report.read_text())
    assert [result[part]["verdict"] for part in ("invariance", "golden")] == ["same", "same"]
    assert result["invariance"]["rows_compared"] == result["invariance"]["rows_possible"] > 100 * ranks
    consistency = result["consistency"]
    if ranks == 1:
        assert consistency["verdict"] == "not_run"
    else:
        assert (consistency["verdict"], consistency["ranks"], consistency["differing"]) == ("same", ranks, 0)
        assert consistency["tensors"] > 50
    seen = {probe["operation"]: probe["seen"] for probe in result["invariance"]["sensitivity"]}
    assert seen.get("detinfer::all_reduce", "none") == {1: "none", 2: None}.get(ranks, True)
