"""A golden that changed waits beside the old one until a person accepts it; goldens by environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detinfer import cli, environment
from detinfer.goldens import pending
from detinfer.goldens.format import Golden

MODEL = """
import numpy as np
import torch
from torch import nn
from detinfer.goldens.stress import cancelling, disorder

ORDER = "written"

class Sums(nn.Module):
    def forward(self, x):
        return (x if ORDER == "written" else disorder(x, -1)).sum(-1, keepdim=True)

class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Sums()

    def forward(self, x):
        return self.layer(x)

def make():
    rng = np.random.default_rng(1)
    return Holder(), [cancelling(rng, (1, 3, 77), torch.float32) for _ in range(4)]
"""


@pytest.fixture(autouse=True)
def turning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``turning:make`` is importable, its order as written; and this is no CI."""
    (tmp_path / "turning.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "turning", raising=False)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.chdir(tmp_path)


def turn() -> None:
    """From now on the model adds in another order: every row agrees with itself, none with the golden."""
    import turning  # type: ignore[import-not-found]

    turning.ORDER = "other"


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def record(*more: str) -> int:
    return cli.run(["record", "turning:make", "--name", "sums", *more])


def key() -> str:
    (found,) = (path.name for path in Path("goldens/sums").iterdir() if not path.name.endswith(".pending"))
    return found


def test_recording_again_is_unchanged_or_waits(capfd: pytest.CaptureFixture[str]) -> None:
    """Exit 0 and nothing new where the bytes are the same; exit 1 and a golden beside where they are not."""
    assert record("--reason", "the first") == 0
    path = Path("goldens/sums", key())
    assert len(path.name) == 12
    before = contents(path)
    assert record("--reason", "again") == 0
    assert "unchanged" in capfd.readouterr().out
    assert [one.name for one in Path("goldens/sums").iterdir()] == [path.name]
    turn()
    assert record() == 1
    out = capfd.readouterr().out
    assert "golden accept" in out
    assert "units have other bytes, first layer" in out
    assert contents(path) == before, "never over"
    assert pending.pending(path).is_dir()


@pytest.fixture
def waiting() -> Path:
    """A golden beside which another waits."""
    assert record("--reason", "the first") == 0
    turn()
    assert record() == 1
    return Path("goldens/sums", key())


def test_what_waits_is_shown_and_makes_check_fail(waiting: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In ls, in show with what it changes, and in check with exit code 4."""
    capfd.readouterr()
    assert cli.run(["golden", "ls", "--json"]) == 0
    found = {Path(entry["path"]).name: entry["pending"] for entry in json.loads(capfd.readouterr().out)}
    assert found == {waiting.name: False, f"{waiting.name}.pending": True}
    assert cli.run(["golden", "ls"]) == 0
    assert "pending" in capfd.readouterr().out
    assert cli.run(["golden", "show", "goldens/sums"]) == 0
    assert "pending        " in capfd.readouterr().out
    assert cli.run(["golden", "check", "goldens/sums"]) == 4
    assert "accept or reject" in capfd.readouterr().out
    assert cli.run(["verify", "goldens/sums", "--n-trials", "3"]) == 1, "the golden there is the one that is verified"


def test_a_person_accepts(waiting: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Not without a reason and not in CI; then it is the golden, with the reason, and verifies."""
    old, new = contents(waiting), contents(pending.pending(waiting))
    assert cli.run(["golden", "accept", str(waiting)]) == 2
    assert cli.run(["golden", "accept", str(waiting), "--reason", " "]) == 2
    monkeypatch.setenv("CI", "true")
    assert cli.run(["golden", "accept", str(waiting), "--reason", "why not"]) == 2
    assert "a person accepts" in capfd.readouterr().err
    assert contents(waiting) == old
    monkeypatch.delenv("CI")
    assert cli.run(["golden", "accept", "goldens/sums", "--reason", "the order was turned"]) == 0
    now = contents(waiting)
    assert now["tensors.safetensors"] == new["tensors.safetensors"] != old["tensors.safetensors"]
    assert Golden.read(waiting).manifest.reason == "the order was turned"
    assert not pending.pending(waiting).exists()
    assert cli.run(["golden", "check", "goldens/sums"]) == 0
    assert cli.run(["verify", "goldens/sums", "--n-trials", "3"]) == 0
    assert cli.run(["golden", "accept", "goldens/sums", "--reason", "again"]) == 4


def test_in_ci_only_when_told(waiting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a job that a person has started for it."""
    monkeypatch.setenv("CI", "1")
    assert cli.run(["golden", "accept", str(pending.pending(waiting)), "--reason", "as agreed", "--in-ci"]) == 0


def test_reject_removes_what_waits_alone(waiting: Path) -> None:
    """The golden there stays, byte by byte."""
    before = contents(waiting)
    assert cli.run(["golden", "reject", "goldens/sums"]) == 0
    assert contents(waiting) == before
    assert not pending.pending(waiting).exists()
    assert cli.run(["golden", "reject", "goldens/sums"]) == 4


def test_one_that_was_damaged_is_not_accepted(waiting: Path) -> None:
    """Exit 4, and everything stays as it was."""
    before = contents(waiting)
    file = pending.pending(waiting) / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert cli.run(["golden", "accept", "goldens/sums", "--reason", "the order was turned"]) == 4
    assert contents(waiting) == before


def test_verify_records_what_changed(capfd: pytest.CaptureFixture[str]) -> None:
    """Of a golden in a folder of its own too; accepted, it verifies. Nothing waits where nothing changed."""
    assert cli.run(["record", "turning:make", "-o", "mine"]) == 0
    before = contents(Path("mine"))
    command = ["verify", "mine", "--n-trials", "3", "--pending"]
    assert cli.run(command) == 0
    assert not Path("mine.pending").exists()
    turn()
    assert cli.run(command) == 1
    assert contents(Path("mine")) == before
    assert "golden accept" in capfd.readouterr().err
    assert cli.run(["golden", "accept", "mine", "--reason", "the order was turned"]) == 0
    assert cli.run(command) == 0


def test_nothing_waits_where_rows_differ_among_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A golden of a model that depends on its batch would hide that."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert cli.run(["record", "faults:linear_by_rows", "-o", "mine"]) == 0
    import faults  # type: ignore[import-not-found]

    monkeypatch.setattr(faults.LinearByRows, "forward", lambda self, x: _by_rows(self, x))
    assert cli.run(["verify", "mine", "--n-trials", "6", "--pending"]) == 1
    assert "would hide that" in capfd.readouterr().err
    assert not Path("mine.pending").exists()


def _by_rows(self: object, x: object) -> object:
    import torch.nn.functional as F

    from detinfer.goldens.stress import disorder

    weight, rows = self.weight, x.numel() // x.shape[-1]  # type: ignore[attr-defined]
    if rows <= 8:
        return F.linear(disorder(x, -1), disorder(weight, -1))  # type: ignore[arg-type]
    return F.linear(x, weight)  # type: ignore[arg-type]


def test_a_golden_of_this_environment_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two environments' goldens under one name; where there is none of it, the other, whose operations are portable."""
    assert record() == 0
    here = key()
    real = environment.capture
    with monkeypatch.context() as patch:
        patch.setattr(
            environment, "capture", lambda *a, **k: environment.Environment(**{**vars(real(*a, **k)), "torch": "1.0"})
        )
        assert record() == 0
        names = {path.name for path in Path("goldens/sums").iterdir()}
        assert len(names) == 2
        assert {pending.resolve(Path("goldens/sums")).name} == names - {here}
    assert pending.resolve(Path("goldens/sums")).name == here
    patch.undo()
    monkeypatch.setattr(
        environment, "capture", lambda *a, **k: environment.Environment(**{**vars(real(*a, **k)), "torch": "2.0"})
    )
    assert pending.resolve(Path("goldens/sums")).name in names
    assert pending.resolve(Path("none")) == Path("none")


@pytest.mark.parametrize(
    "options",
    [(), ("--name", "a", "-o", "b"), ("--name", "../a"), ("--name", "a.pending"), ("--name", ".a")],
    ids=" ".join,
)
def test_places_that_make_no_sense(options: tuple[str, ...]) -> None:
    """Exit 2, and nothing is written."""
    assert cli.run(["record", "turning:make", *options]) == 2
    assert not Path("goldens").exists()
