"""``detinfer record`` and ``detinfer verify`` on modules that are sound and on modules that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from detinfer import cli

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def factories(monkeypatch: pytest.MonkeyPatch) -> None:
    """``faults:name`` is importable."""
    monkeypatch.syspath_prepend(str(HERE))


def record(name: str, where: Path, *options: str) -> int:
    return cli.run(["record", f"faults:{name}", "-o", str(where), *options])


def verify(where: Path, *options: str) -> tuple[int, dict[str, Any]]:
    report = where.parent / "result.json"
    report.unlink(missing_ok=True)
    code = cli.run(["verify", str(where), "--n-trials", "20", "--json", str(report), *options])
    return code, json.loads(report.read_text()) if report.exists() else {}


@pytest.mark.parametrize("name", ["sound", "sound_bfloat16"])
def test_sound_layers_pass(name: str, tmp_path: Path) -> None:
    """A sound module: exit 0, both verdicts same, every row that can be compared is, and every plant is seen."""
    assert record(name, tmp_path / "golden") == 0
    code, result = verify(tmp_path / "golden", "--control")
    assert (code, result["schema"]) == (0, 1)
    assert [result[part]["verdict"] for part in ("invariance", "golden")] == ["same", "same"]
    assert result["control"]["verdict"] in ("same", "diverged")
    assert result["invariance"]["rows_compared"] == result["invariance"]["rows_possible"] > 1000
    assert result["invariance"]["batches"] == sum(unit["batches"] for unit in result["invariance"]["units"]) > 40
    plants = {probe["operation"].partition(".")[0]: probe["seen"] for probe in result["invariance"]["sensitivity"]}
    assert plants == {"aten::linear": True, "aten::sum": True}
    assert any(name.startswith("aten::silu") for name in result["invariance"]["order_free"])


@pytest.mark.parametrize("fault", ["tail_sum", "scalar_tail_silu", "linear_by_rows", "attention_by_tile"])
def test_a_faulty_layer_is_caught_and_named(fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit 1; the layer is named, not the model around it; the line that is printed redoes just that."""
    assert record(fault, tmp_path / "golden") == 0
    code, result = verify(tmp_path / "golden")
    invariance = result["invariance"]
    assert (code, invariance["verdict"], result["golden"]["verdict"]) == (1, "diverged", "same")
    first = invariance["first"]
    assert first["unit"] == "layer"
    assert first["batch"] > 1
    assert first["got"] != first["expected"]
    assert first["ulp"] >= 1
    differing = {unit["name"] for unit in invariance["units"] if unit["rows_differing"]}
    assert differing == {"layer", ""}, "the layer and the whole model differ, the sound layer does not"
    assert "first cause" in capfd.readouterr().out

    again = [word.strip("'") for word in first["command"].split()[1:]]
    assert cli.run(again) == 1
    out = capfd.readouterr().out
    assert first["got"] in out
    assert first["expected"] in out
    assert cli.run([*again[:-1], _alone(result)]) in (0, 5), "a batch of one row cannot differ"


def _alone(result: dict[str, Any]) -> str:
    """A trial of the same seed whose batch has one row."""
    from detinfer.goldens.runner import Request
    from detinfer.goldens.sweep import plan

    return str(next(t.number for t in plan([Request()], 40, result["seed"]) if len(t.batch) == 1))


def test_fail_fast_stops_and_says_what_was_left_out(tmp_path: Path) -> None:
    """Rows compared stay below rows possible."""
    assert record("linear_by_rows", tmp_path / "golden") == 0
    code, result = verify(tmp_path / "golden", "--fail-fast")
    assert code == 1
    assert result["invariance"]["rows_compared"] < result["invariance"]["rows_possible"]


def test_nothing_that_could_differ_is_vacuous(tmp_path: Path) -> None:
    """A module without a reduction: exit 5, and the reason is printed in the result."""
    assert record("only_copies", tmp_path / "golden") == 0
    code, result = verify(tmp_path / "golden")
    assert (code, result["invariance"]["verdict"]) == (5, "vacuous")
    assert any("no operation with a reduction" in reason for reason in result["invariance"]["reasons"])


def test_batches_of_one_row_are_vacuous(tmp_path: Path) -> None:
    """Nothing stood beside any row: that shows nothing."""
    assert record("sound", tmp_path / "golden") == 0
    code, result = verify(tmp_path / "golden", "--batch-sizes", "1")
    assert code == 5
    assert any("one row" in reason for reason in result["invariance"]["reasons"])


@pytest.mark.parametrize("tensors", ["slice", "none"])
def test_inputs_that_are_not_stored_are_recomputed(tensors: str, tmp_path: Path) -> None:
    """Digests alone are enough to verify; a golden without tensors is smaller."""
    assert record("sound", tmp_path / "full") == 0
    assert record("sound", tmp_path / "some", "--tensors", tensors) == 0
    code, result = verify(tmp_path / "some")
    assert code == 0
    assert result["golden"]["verdict"] == "same"
    size = {where: sum(f.stat().st_size for f in (tmp_path / where).iterdir()) for where in ("full", "some")}
    assert tensors == "slice" or size["some"] < size["full"]


def test_recording_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    """Every file, byte for byte."""
    for where in ("a", "b"):
        assert record("sound", tmp_path / where) == 0
    first, second = ({f.name: f.read_bytes() for f in sorted((tmp_path / where).iterdir())} for where in ("a", "b"))
    assert first == second
    assert len(first) >= 2


@pytest.mark.parametrize(
    ("name", "options", "code", "says"),
    [
        ("random", (), 2, "aten::rand is refused in Holder.layer"),
        ("random", ("--allow", "aten::rand"), 1, "layer layer, output"),
        ("hidden", ("--allow", "aten::rand"), 2, "layer layer draws random numbers"),
        ("counting", (), 2, "layer layer changes its own state (calls)"),
        ("infinite", (), 2, "layer layer gives a value that is not finite"),
        ("raising", (), 2, "no weights here"),
        ("half_a_result", (), 2, "requests"),
        ("uncovered", (), 2, "aten::cumsum on float32 is refused in Holder.layer"),
        ("absent", (), 2, "absent"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_targets_are_named_and_nothing_is_written(
    name: str, options: tuple[str, ...], code: int, says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A clear error with the layer or the factory in it, and no half-written golden."""
    assert record(name, tmp_path / "golden", *options) == code
    assert says in capfd.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_golden_of_another_model_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit 4, naming what differs."""
    assert record("sound", tmp_path / "golden") == 0
    code, _ = verify(tmp_path / "golden", "--target", "faults:tail_sum")
    assert code == 4
    assert "another model" in capfd.readouterr().err


@pytest.mark.parametrize("how", ["truncated", "flipped", "manifest", "newer", "missing"])
def test_a_damaged_golden_is_refused(how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit 4, naming the file."""
    golden = tmp_path / "golden"
    assert record("sound", golden) == 0
    file, manifest = golden / "tensors.safetensors", golden / "manifest.json"
    data = file.read_bytes()
    if how == "truncated":
        file.write_bytes(data[:-5])
    elif how == "flipped":
        file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif how == "manifest":
        manifest.write_text(manifest.read_text().replace('"step": 0', '"step": 1', 1))
    elif how == "newer":
        manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 2'))
    else:
        manifest.unlink()
    code, result = verify(golden)
    assert code == 4
    assert result == {}
    error = capfd.readouterr().err
    assert ("tensors.safetensors" if how in ("truncated", "flipped") else "manifest.json") in error


@pytest.mark.parametrize(
    "options",
    [("--n-trials", "0"), ("--batch-sizes", "0"), ("--batch-sizes", "x"), ("--layers", "("), ("--layers", "nothing")],
    ids=" ".join,
)
def test_options_that_make_no_sense_are_usage_errors(options: tuple[str, ...], tmp_path: Path) -> None:
    """Exit 2."""
    assert record("sound", tmp_path / "golden") == 0
    assert cli.run(["verify", str(tmp_path / "golden"), *options]) == 2


def test_unsupported_dtype_is_a_usage_error(tmp_path: Path) -> None:
    """float64 has no canonical order on CPU."""
    assert record("sound", tmp_path / "golden", "--dtype", "float64") == 2
