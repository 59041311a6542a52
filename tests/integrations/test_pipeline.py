"""docs/recipes/ci.md, done: its files written, its commands run in their order, the hook, the session.

What installs packages is not run: ``pip install`` is noted, and ``detinfer`` is this checkout.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

sys.path.append(str(Path(__file__).parent))
import offline
import project
from project import ROOT, Place, commands, damage, files, given

HOOKS = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
ELSEWHERE = {"lm_eval": "lm_eval", "inspect": "inspect_ai", "lighteval": "lighteval"}
"""Programs of the page and the packages they need, which may be missing."""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty project."""
    return project.project(tmp_path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's module and its golden."""
    return project.record(tmp_path_factory.mktemp("recorded"))


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
