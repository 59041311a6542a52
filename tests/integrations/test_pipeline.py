"""docs/recipes/ci.md, done: its files written, its commands run in their order, the hook, the session and the workflow.

What installs packages is not run: ``pip install`` is noted, and ``detinfer`` is this checkout.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

sys.path.append(str(Path(__file__).parent))
import offline

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/recipes/ci.md").read_text(encoding="utf-8")
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/detinfer-verify.yml").read_text(encoding="utf-8"))
HOOKS = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
ELSEWHERE = {
    "lm_eval": "lm_eval",
    "inspect": "inspect_ai",
    "lighteval": "lighteval",
}
"""Commands of the page that need a package which may be missing; the evaluations have tests of their own."""


@dataclass(frozen=True)
class Place:
    """A project's folder, and an environment whose ``python`` and ``detinfer`` are this checkout's."""

    folder: Path
    variables: dict[str, str]

    def run(self, command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A command line in the folder, as GitHub's runners do: bash that ends at the first failure."""
        variables = {**self.variables, **more}
        return subprocess.run(
            ["bash", "-e", "-c", command], cwd=self.folder, env=variables, capture_output=True, text=True, check=False
        )

    @property
    def installed(self) -> list[list[str]]:
        """What pip was asked for."""
        log = self.folder.parent / "pip.log"
        return [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty project."""
    return project(tmp_path)


def project(folder: Path) -> Place:
    """A folder ``here`` and programs beside it."""
    (folder / "here").mkdir()
    (folder / "bin").mkdir()
    python = shlex.quote(sys.executable)
    pip = f'if [ "$1 $2" = "-m pip" ]; then shift 2; printf "%q " "$@" >> {folder}/pip.log; echo >> {folder}/pip.log; exit 0; fi\n'
    for name, text in {"python": f'{pip}exec {python} "$@"\n', "detinfer": f'exec {python} -m detinfer "$@"\n'}.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (folder / "bin" / name).chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", ""), "."]))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "GITHUB", "CI"))}
    own = {"PATH": path, "PYTHONPATH": modules, "HOME": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if not any(one.name == "detinfer" for one in importlib.metadata.entry_points(group="pytest11")):
        own["PYTEST_PLUGINS"] = "detinfer.pytest_plugin"  # a checkout that is not installed
    return Place(folder / "here", {**kept, **own})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's module and its golden."""
    place = project(tmp_path_factory.mktemp("recorded"))
    (place.folder / "block.py").write_text(files()["block.py"])
    found = place.run(commands()[0])
    assert found.returncode == 0, found.stderr
    return place.folder


def files() -> dict[str, str]:
    """The page's files: a block behind a line that ends in a name in backquotes."""
    blocks = re.findall(r"`([\w./-]+\.(?:py|ya?ml))`[^`\n]*(?:\n[^`\n]+)*\n\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    return dict(blocks)


def commands() -> list[str]:
    """The page's command lines, in their order."""
    blocks = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]


def test_the_page_has_what_is_tested() -> None:
    """Its files, and the commands that are left to other tests."""
    assert set(files()) == {
        "block.py",
        ".pre-commit-config.yaml",
        "noxfile.py",
        ".github/workflows/bits.yml",
        "test_block.py",
    }
    elsewhere = [line for line in commands() if line.split()[0] == "nox" or "localhost" in line or " -- " in line]
    assert len(elsewhere) == 6 and len(commands()) == 13


def test_every_command_of_the_page(place: Place) -> None:
    """From the first recording to the fingerprint, each ends with 0."""
    for name, text in files().items():
        (place.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (place.folder / name).write_text(text)
    done = []
    for line in commands():
        if line.startswith("nox") or "localhost" in line or " -- " in line:
            continue
        found = place.run(line)
        assert found.returncode == 0, f"{line}\n{found.stdout}\n{found.stderr}"
        done.append(line.split()[1])
    assert done == ["record", "verify", "golden", "-m", "fingerprint", "verify", "fingerprint"]


@pytest.mark.parametrize("line", [line for line in commands() if "detinfer eval" in line])
def test_an_evaluation_of_the_page(line: str, place: Place) -> None:
    """Where its library is: the very line, on a small model and a task of the library's own kind."""
    program = line.partition(" -- ")[2].split()[0]
    if importlib.util.find_spec(ELSEWHERE[program]) is None:
        pytest.skip(f"{ELSEWHERE[program]} is not installed here")
    offline.write_model(place.folder / "model")
    documents = offline.write_tasks(place.folder / "tasks") / "documents.jsonl"
    if program == "inspect":
        text = importlib.import_module("test_inspect_ai").TASK.format(documents=str(documents))
        (place.folder / "task.py").write_text(text)
    elif program == "lighteval":
        (place.folder / "data").mkdir()
        (place.folder / "data/test.jsonl").write_bytes(documents.read_bytes())
        (place.folder / "tasks.py").write_text(importlib.import_module("test_lighteval").TASKS.format(data="data"))
        (place.folder / "sitecustomize.py").write_text(OFFLINE)
    found = place.run(line, HF_HOME=str(place.folder / "hub"))
    assert found.returncode == 0, f"{found.stdout}\n{found.stderr}"
    assert " same " in found.stderr


OFFLINE = """
import sys

if "lighteval" in sys.orig_argv:  # one of its own task files downloads data while it is imported
    from lighteval.tasks.registry import Registry

    Registry._load_from_files = staticmethod(lambda files, module: {})
    Registry._load_from_subdirs = staticmethod(lambda folders: {})
"""


def test_the_server_of_the_page(place: Place) -> None:
    """Where transformers can serve: its two lines, on a port that is free, and the server's fingerprint in the reports."""
    for module in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(module, reason="pip install 'transformers[serving]'", exc_type=ImportError)
    offline.write_model(place.folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    serve, ask = (line.replace("8000", port) for line in commands() if "8000" in line)
    with (place.folder / "serve.log").open("w") as log:
        server = subprocess.Popen(
            shlex.split(serve), cwd=place.folder, env=place.variables, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while place.run(f"curl -sf http://localhost:{port}/health").returncode:
            assert server.poll() is None and time.monotonic() < deadline, (place.folder / "serve.log").read_text()
            time.sleep(0.5)
        found = place.run(f"{ask} --batch-sizes 1,2,5 --max-new-tokens 8")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    assert found.returncode == 0, f"{found.stdout}\n{found.stderr}"
    assert "di1-batch-" in (place.folder / "server.xml").read_text()
    assert "di1-batch-" in (place.folder / "server.html").read_text()


def given(place: Place, recorded: Path) -> Path:
    """The page's golden, in this project."""
    shutil.copytree(recorded, place.folder, dirs_exist_ok=True)
    return place.folder / "goldens/block"


def damage(golden: Path) -> None:
    """Turn one bit of the tensors."""
    file = golden / "tensors.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


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


def test_the_hook(place: Place, recorded: Path) -> None:
    """pre-commit itself, in a repository that names the hook as the page does: whole goldens pass, a damaged one does not."""
    pytest.importorskip("pre_commit", reason="pre-commit is not installed here")
    hooks = place.folder.parent / "hooks"
    hooks.mkdir()
    (hooks / ".pre-commit-hooks.yaml").write_bytes((ROOT / ".pre-commit-hooks.yaml").read_bytes())
    git = "git -c user.name=a -c user.email=a@b -c init.defaultBranch=main"
    made = place.run(f"cd {hooks} && git init -q && git add -A && {git} commit -qm hooks && git rev-parse HEAD")
    golden = given(place, recorded)
    config = files()[".pre-commit-config.yaml"].replace("https://github.com/OWNER/detinfer", str(hooks))
    (place.folder / ".pre-commit-config.yaml").write_text(config.replace("REF", made.stdout.strip()))
    place.run("git init -q && git add -A")
    command = f"{shlex.quote(sys.executable)} -m pre_commit run"
    held = {"PRE_COMMIT_HOME": str(place.folder.parent / "cache")}
    assert place.run(f"{command} --all-files", **held).returncode == 0
    place.run(f"{git} commit -qm golden --no-verify")
    damage(golden)
    place.run("git add -A")
    found = place.run(command, **held)
    assert found.returncode == 1 and "goldens/block: " in found.stdout and "detinfer golden check" not in found.stderr
    place.run("git checkout -q HEAD -- goldens && touch other && git add -A")
    skipped = place.run(command, **held)
    assert skipped.returncode == 0 and "no files to check" in skipped.stdout


def test_the_hooks_command(place: Place, recorded: Path) -> None:
    """What pre-commit gives it are files: a golden of several is read once, a folder of goldens in whole."""
    golden = given(place, recorded)
    (hook,) = HOOKS
    names = [str(file.relative_to(place.folder)) for file in golden.iterdir()]
    assert len(names) >= 2 and all(re.search(hook["files"], name) for name in names)
    found = place.run(f"{hook['entry']} {' '.join(names)}")
    assert (found.returncode, found.stdout) == (0, "goldens/block: whole\n"), found.stderr
    (golden / "manifest.json").unlink()
    found = place.run(f"{hook['entry']} goldens")
    assert found.returncode == 4 and "its manifest.json is missing" in found.stdout
    assert place.run(f"{hook['entry']} here-is-none").returncode == 4


def test_the_nox_session(place: Place, recorded: Path) -> None:
    """nox itself, with what is installed left out: green, and red for a damaged golden."""
    pytest.importorskip("nox", reason="nox is not installed here")
    golden = given(place, recorded)
    (place.folder / "noxfile.py").write_text(files()["noxfile.py"])
    # An environment that nox would have made, with this checkout's detinfer and what is installed here.
    venv = f"{shlex.quote(sys.executable)} -m venv --without-pip --system-site-packages .nox/bits"
    assert place.run(venv).returncode == 0
    (place.folder / ".nox/bits/bin/detinfer").write_bytes((place.folder.parent / "bin/detinfer").read_bytes())
    (place.folder / ".nox/bits/bin/detinfer").chmod(0o755)
    command = f"{shlex.quote(sys.executable)} -m nox -R --force-venv-backend venv -s bits"
    found = place.run(command, DETINFER="detinfer")
    assert found.returncode == 0, found.stderr
    assert {"bits.xml", "bits.html"} <= {file.name for file in place.folder.iterdir()}
    damage(golden)
    assert place.run(command, DETINFER="detinfer").returncode == 1
