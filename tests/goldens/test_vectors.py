"""Vectors: what the reference gives, through every path, and the faults that they are there to catch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detinfer import cli
from detinfer.collectives import patterns
from detinfer.errors import Vacuous
from detinfer.goldens.vectors import file
from detinfer.goldens.vectors.case import OPERATIONS
from detinfer.goldens.vectors.make import RANKS, make, shows_order

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.append(str(HERE))
import planted  # noqa: E402

ROOT = HERE.parents[1]
GOLDENS = ROOT / "goldens"
MOST_BYTES = 5 << 20
BETWEEN_RANKS = ("all_reduce", "reduce_scatter", "all_reduce_rms_norm")


def verify(folder: Path, report: Path, *options: str) -> tuple[int, dict[str, Any]]:
    code = cli.run(["verify", str(folder), "--json", str(report), *options])
    return code, json.loads(report.read_text())


def test_the_folder_stays_small() -> None:
    """Everything in goldens/ together."""
    assert sum(item.stat().st_size for item in GOLDENS.rglob("*") if item.is_file()) < MOST_BYTES


@pytest.mark.parametrize("operation", OPERATIONS)
def test_committed_vectors_are_the_references(operation: str, tmp_path: Path) -> None:
    """Recording them again gives the same bytes in the tensor file and the same cases, and each has a reason."""
    data, held = file.read(GOLDENS / operation)
    assert data["reason"]
    again = file.write(tmp_path / "again", operation, make(operation), reason="a test", command="", overwrite=False)
    assert (again / "tensors.safetensors").read_bytes() == (GOLDENS / operation / "tensors.safetensors").read_bytes()
    assert file.read(again)[0]["cases"] == data["cases"]
    dtypes = {"float32", "bfloat16", "float16"}
    ranks = set(RANKS) if operation in BETWEEN_RANKS else {1}
    assert {(case.dtype, case.ranks) for case in held} == {(d, r) for d in dtypes for r in ranks}
    if operation == "all_reduce_rms_norm":
        assert {(c.arguments["mode"], c.arguments["weight_mode"]) for c in held} == {
            (mode, weight) for mode in "RU" for weight in ("llama", "fp32", "gemma")
        }


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_path_gives_the_vectors(operation: str, tmp_path: Path) -> None:
    """Exit 0, and every path, number of ranks and dtype has compared something."""
    code, result = verify(GOLDENS / operation, tmp_path / "result.json")
    assert (code, result["verdict"], result["mismatches"]) == (0, "same", [])
    assert all(cell["compared"] > 0 and cell["differing"] == 0 for cell in result["cells"])
    if operation in BETWEEN_RANKS:
        paths = {cell["path"] for cell in result["cells"]}
        assert {"1stage", "1stage, in pieces"} <= paths
        assert operation == "reduce_scatter" or {"2stage", "2stage, in pieces"} <= paths
        assert {(cell["path"], cell["ranks"]) for cell in result["cells"]} == {(p, n) for p in paths for n in RANKS}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library whose order over ranks is wrong when it is told so."""
    return planted.build(tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("fault", ["", *planted.FAULTS])
def test_a_planted_fault_is_caught_at_every_number_of_ranks(fault: str, faulty: Path, tmp_path: Path) -> None:
    """A rotated order, which is batch-invariant and shows nowhere else, and a sum that starts at +0 and loses -0."""
    report = tmp_path / "result.json"
    environment = {**os.environ, "DETINFER_NATIVE_LIBRARY": str(faulty), "PYTHONPATH": str(ROOT)}
    environment.pop("DETINFER_CPU_ISA", None)
    done = subprocess.run(
        [sys.executable, "-m", "detinfer", "verify", "goldens/all_reduce", "--json", str(report)],
        cwd=ROOT,
        env=environment | ({"PLANTED": fault} if fault else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == (1 if fault else 0), done.stdout
    result = json.loads(report.read_text())
    differing = {(cell["path"], cell["ranks"], cell["dtype"]) for cell in result["cells"] if cell["differing"]}
    everywhere = {(cell["path"], cell["ranks"], cell["dtype"]) for cell in result["cells"]}
    if not fault:
        assert not differing
    else:
        assert {cell for cell in everywhere if cell[1] >= 3} <= differing
        assert "DIVERGED" in done.stdout
        zeros = [found for found in result["mismatches"] if "(-0.0)" in found["place"].partition("expected")[2]]
        assert (zeros == result["mismatches"]) == (fault == "lost_zero")


def test_plain_random_numbers_are_no_vectors() -> None:
    """bf16 numbers of one magnitude add up to the same bits in any order: the maker refuses them."""
    rng = np.random.default_rng(0)
    parts = [(0x3F80 + rng.integers(0, 128, 64)).astype(np.uint16) for _ in range(4)]
    with pytest.raises(Vacuous, match="choose other inputs"):
        shows_order(parts, "bfloat16", "plain")
    shows_order(patterns.cancellation(rng, 4, (64,), "bfloat16"), "bfloat16", "cancellation")


def test_a_reason_is_needed_and_nothing_is_replaced_unasked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit 2 without --reason; a folder that is there stays without --force."""
    target = ["record", "vectors:reduce_scatter", "-o", str(tmp_path / "v")]
    assert cli.run(target) == 2
    assert "--reason" in capfd.readouterr().err
    assert not any(tmp_path.iterdir())
    assert cli.run([*target, "--reason", "first"]) == 0
    assert cli.run([*target, "--reason", "second"]) == 2
    assert file.read(tmp_path / "v")[0]["reason"] == "first"
    assert cli.run([*target, "--reason", "second", "--force"]) == 0
    assert file.read(tmp_path / "v")[0]["reason"] == "second"
    assert cli.run(["record", "vectors:linear", "-o", str(tmp_path / "w"), "--reason", "x"]) == 2


@pytest.mark.parametrize("how", ["tensors", "manifest", "newer", "missing"])
def test_damaged_vectors_are_refused(how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit 4, naming the file."""
    folder = shutil.copytree(GOLDENS / "reduce_scatter", tmp_path / "v")
    tensors, manifest = folder / "tensors.safetensors", folder / "manifest.json"
    if how == "tensors":
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x01")
    elif how == "manifest":
        manifest.write_text(manifest.read_text().replace('"ranks": 2', '"ranks": 3', 1))
    elif how == "newer":
        manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 2'))
    else:
        tensors.unlink()
    assert cli.run(["verify", str(folder)]) == 4
    assert ("tensors.safetensors" if how in ("tensors", "missing") else "manifest.json") in capfd.readouterr().err


def test_changed_vectors_are_found(tmp_path: Path) -> None:
    """An output that is whole and wrong: exit 1, with the place."""
    cases = make("rms_norm")
    number = next(number for number, case in enumerate(cases) if case.name == "rows of 77")
    view = cases[number].outputs["norm"].view(-1)
    view[3] = -view[3]
    file.write(tmp_path / "v", "rms_norm", cases, reason="a test", command="", overwrite=False)
    code, result = verify(tmp_path / "v", tmp_path / "result.json")
    assert (code, result["verdict"]) == (1, "diverged")
    assert result["mismatches"][0]["case"] == cases[number].label()
    assert "row 0, element 3" in result["mismatches"][0]["place"]


@pytest.mark.parametrize("options", [("--tp", "9"), ("--tp", "1")])
def test_ranks_that_no_vector_has(options: tuple[str, ...]) -> None:
    """Exit 2."""
    assert cli.run(["verify", str(GOLDENS / "all_reduce"), *options]) == 2


def test_two_ranks_alone_prove_nothing() -> None:
    """Exit 5: they commute."""
    assert cli.run(["verify", str(GOLDENS / "reduce_scatter"), "--tp", "2"]) == 5
