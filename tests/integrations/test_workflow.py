"""The reusable workflow, step by step: what it installs is noted, what it runs is run; the schema that it has to fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

sys.path.append(str(Path(__file__).parent))
import project
from project import ROOT, Place, commands, damage, files, given

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/detinfer-verify.yml").read_text(encoding="utf-8"))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty project."""
    return project.project(tmp_path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's module and its golden."""
    return project.record(tmp_path_factory.mktemp("recorded"))


class Workflow:
    """The steps of the reusable workflow, done here: inputs and conditions resolved, ``run`` in a shell, ``uses`` noted."""

    def __init__(self, place: Place, **given: str) -> None:
        self.place = place
        inputs = WORKFLOW[True]["workflow_call"]["inputs"]  # YAML 1.1 reads the key `on` as true
        assert given.keys() <= inputs.keys()
        missing = [name for name, one in inputs.items() if one.get("required") and name not in given]
        assert missing == []
        self.inputs = {name: str(one.get("default", "")) for name, one in inputs.items()} | given
        self.ran: dict[str, subprocess.CompletedProcess[str]] = {}
        self.used: list[str] = []

    def resolved(self, text: str) -> str:
        """``text`` with its ``${{ inputs.NAME }}``."""
        found = re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda match: self.inputs[match[1]], text)
        assert "${{" not in found, text
        return found

    def run(self, *only: str) -> bool:
        """All steps, or those that install nothing and are named; whether the job is green."""
        (job,) = WORKFLOW["jobs"].values()
        summary = self.place.folder.parent / "summary.md"
        summary.touch()
        variables = {name: self.resolved(str(value)) for name, value in job["env"].items()}
        green = True
        for step in job["steps"]:
            wanted = step.get("if", "${{ success() }}")
            happens = {"success()": green, "failure()": not green, "always()": True, "!cancelled()": True}
            if not happens[wanted.removeprefix("${{ ").removesuffix(" }}")]:
                continue
            if only and step.get("name") not in only:
                continue
            if "uses" in step:
                self.used.append(step["uses"])
                for value in step.get("with", {}).values():
                    self.resolved(str(value))
                continue
            found = self.place.run(step["run"], **variables, CI="true", GITHUB_STEP_SUMMARY=str(summary))
            self.ran[step["name"]] = found
            green = green and found.returncode == 0
        self.summary = summary.read_text()
        return green


def test_the_workflow(place: Place, recorded: Path) -> None:
    """Green for a golden that is whole: what is installed, said, written."""
    given(place, recorded)
    caller = yaml.safe_load(files()[".github/workflows/bits.yml"])["jobs"]["bits"]
    wanted = {**{name: str(value) for name, value in caller["with"].items()}, "n-trials": "3"}
    flow = Workflow(place, **wanted, install="-r more.txt")
    assert flow.run(), [(name, one.stdout, one.stderr) for name, one in flow.ran.items()]
    assert list(flow.ran) == ["Install", "Environment", "Goldens", "Evaluation"]
    assert place.installed == [["install", "torch"], ["install", caller["with"]["detinfer"], "-r", "more.txt"]]
    assert "::notice title=detinfer invariance%3A same::" in flow.ran["Goldens"].stdout
    assert "| invariance | **same** |" in flow.summary and "Under `di1-batch-" in flow.summary
    reports = {file.name for file in (place.folder / "detinfer-report").iterdir()}
    assert reports == {"fingerprint.json"} | {f"goldens_block.{kind}" for kind in ("json", "html", "xml")}
    assert flow.used[-1].startswith("actions/upload-artifact@")


def test_the_workflow_of_a_damaged_golden(place: Place, recorded: Path) -> None:
    """Its step fails and says which; another that is not there is told too; steps for failures run."""
    damage(given(place, recorded))
    (place.folder / "detinfer-report").mkdir()
    flow = Workflow(place, detinfer="detinfer", goldens="goldens/block goldens/none")
    assert not flow.run("Goldens", "First cause")
    assert flow.ran["Goldens"].returncode == 4
    assert "goldens/block: " in flow.ran["Goldens"].stdout and "goldens/none: " in flow.ran["Goldens"].stdout
    assert flow.ran["First cause"].returncode == 0


def test_the_workflow_of_a_divergence(place: Place) -> None:
    """Rows that depend on their batch: the job fails, the annotation names the place, an evaluation that fails is seen."""
    text = (
        files()["block.py"]
        .replace("torch.nn.SiLU()", "Batched()")
        .replace("import torch\n", f"import torch\n{BATCHED}", 1)
    )
    (place.folder / "block.py").write_text(text)
    (place.folder / "detinfer-report").mkdir()
    assert place.run(commands()[0]).returncode == 0
    flow = Workflow(
        place, detinfer="detinfer", goldens="goldens/block", evaluation="'not a' command", **{"n-trials": "4"}
    )
    assert not flow.run("Goldens", "Evaluation")
    assert flow.ran["Goldens"].returncode == 1, flow.ran["Goldens"].stderr
    assert "::error title=detinfer invariance" in flow.ran["Goldens"].stdout
    assert flow.ran["Evaluation"].returncode == 2 and "'not a' command" in flow.ran["Evaluation"].stderr
    assert "| invariance | **diverged** |" in flow.summary


BATCHED = """

class Batched(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.silu(x) * (1 + 2**-12 if len(x) > 2 else 1)
"""


def test_the_workflows_keep_to_the_schema(tmp_path: Path) -> None:
    """GitHub's published schema, as check-jsonschema carries it: ours, and the page's that calls it, with inputs it has."""
    caller = yaml.safe_load(files()[".github/workflows/bits.yml"])["jobs"]["bits"]
    inputs = WORKFLOW[True]["workflow_call"]["inputs"]
    kinds = {"string": str, "number": int, "boolean": bool}
    assert caller["uses"].partition("@")[0].endswith("/.github/workflows/detinfer-verify.yml")
    assert all(isinstance(value, kinds[inputs[name]["type"]]) for name, value in caller["with"].items())
    assert {name for name, one in inputs.items() if one.get("required")} <= caller["with"].keys()
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed here: no schema to hold them to")
    (tmp_path / "bits.yml").write_text(files()[".github/workflows/bits.yml"])
    (tmp_path / "bad.yml").write_text(files()[".github/workflows/bits.yml"].replace("uses:", "use:"))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    for file, code in ((ROOT / ".github/workflows/detinfer-verify.yml", 0), ("bits.yml", 0), ("bad.yml", 1)):
        assert subprocess.run([*command, str(file)], cwd=tmp_path, check=False, capture_output=True).returncode == code
