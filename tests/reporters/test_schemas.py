"""The published JSON Schemas: they are what the results are, results of every kind fit them, changed ones do not."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detinfer import cli
from detinfer.goldens.result import Comparison, Control, Divergence, Invariance, Result, Tally
from detinfer.integrations.server.result import Part, ServerResult
from detinfer.reporters import json as reporter

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed (the extra dev)")
ROOT = Path(__file__).parents[2]


def test_the_files_are_up_to_date(tmp_path: Path) -> None:
    """Written again from the dataclasses they are the same."""
    ended = subprocess.run([sys.executable, ROOT / "scripts/schemas.py", "--check"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stdout + ended.stderr


def test_every_file_is_a_schema_and_is_documented() -> None:
    """Valid for its draft, referred to by one kind of result, and named in the reference."""
    page = (ROOT / "docs/reference/results.md").read_text(encoding="utf-8")
    files = {file.stem: file for file in (ROOT / "detinfer/reporters/schemas").glob("*.json")}
    assert set(files) == set(reporter.SCHEMAS.values())
    for name, file in files.items():
        jsonschema.Draft202012Validator.check_schema(json.loads(file.read_text()))
        assert f"{name}.json" in page


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schemas") / "golden"
    assert cli.run(["record", "builtin:dense", "-o", str(path), "--n-prompts", "2", "--decode-steps", "2"]) == 0
    return path


def results(golden: Path, where: Path) -> dict[str, dict[str, Any]]:
    """A result of every kind, as it is written by the command that gives it."""
    commands = {
        "verify-1": ["verify", str(golden), "--n-trials", "2", "--axes", "batch,chunks", "--control"],
        "vectors-1": ["verify", str(ROOT / "goldens/rms_norm")],
        "diff-1": ["diff", str(golden), str(golden)],
    }
    found = {}
    for name, command in commands.items():
        assert cli.run([*command, "--json", str(where / name)]) == 0
        found[name] = json.loads((where / name).read_text())
    server = ServerResult("http://localhost", "sglang", "m", 0, {"n": 1}, True, parts=[Part("single", samples=[2])])
    found["server-1"] = json.loads(json.dumps(server.to_json()))
    return found


def mutants(held: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The result with one thing changed: the version, each key gone or of another type, a key too many."""
    found: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("version", lambda one: one.update(schema=99)),
        ("one more", lambda one: one.update(more=1)),
    ]
    for key in held:
        found.append((f"no {key}", lambda one, key=key: one.pop(key)))
        found.append((f"{key} is an object of nothing known", lambda one, key=key: one.update({key: {"?": {"?": 0}}})))
    mutated = []
    for name, change in found:
        one = copy.deepcopy(held)
        change(one)
        mutated.append((name, one))
    return mutated


def test_results_fit_and_mutants_do_not(golden: Path, tmp_path: Path) -> None:
    """Of every kind; each mutant of the outermost keys is refused."""
    # Objects of any content.
    free = ("environment", "policy", "sweep", "sampling", "faults", "seconds", "unfinished", "system_fingerprint")
    for name, held in results(golden, tmp_path).items():
        validator = jsonschema.Draft202012Validator(
            json.loads((ROOT / f"detinfer/reporters/schemas/{name}.json").read_text())
        )
        validator.validate(held)
        for what, mutant in mutants(held):
            if what.split(" ")[0] not in free:
                assert not validator.is_valid(mutant), (name, what)


def _deep(held: dict[str, Any]) -> list[Callable[[dict[str, Any]], Any]]:
    return [
        lambda one: one["invariance"].update(verdict="fine"),
        lambda one: one["invariance"].update(rows_compared="9"),
        lambda one: one["invariance"].update(rows_compared=1.5),
        lambda one: one["invariance"]["units"][0].pop("kind"),
        lambda one: one["invariance"]["first"].update(row=["0"]),
        lambda one: one["invariance"]["first"].pop("ulp"),
        lambda one: one["golden"]["stale"].append(["torch", "1.0"]),
        lambda one: one["control"].update(extra=1),
    ]


def test_what_lies_deeper_is_looked_at() -> None:
    """Verdicts, counts, divergences and stale fields inside a result have their shapes too."""
    first = Divergence("u", "leaf", "T", "prefill", 0, 0, "", (0, 1), 2, "0x0", "0x1", None, 1, 2)
    invariance = Invariance(units=[Tally("u", "leaf", "T")], first=first)
    held = Result("p", "t", "float32", {}, 0, invariance, Comparison(stale=[("a", "b", "c")]), Control())
    validator = jsonschema.Draft202012Validator(reporter.schema(held))
    plain = json.loads(json.dumps(held.to_json()))
    validator.validate(plain)
    for number, change in enumerate(_deep(plain)):
        mutant = copy.deepcopy(plain)
        change(mutant)
        assert not validator.is_valid(mutant), number
