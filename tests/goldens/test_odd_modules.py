"""Modules that do what a module may: raise, write into their input, give results whose shape depends on what they hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from detinfer import cli

WIDTH = 16


class Raises(nn.Module):
    """For one request at a time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            raise ValueError("only one")
        return x * 2


class Asserts(nn.Module):
    """As models say what they take."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dim() == 2, "rows of words"
        return x


class Missing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: dict[str, torch.Tensor] = {}
        return x + found["scale"]


class Writes(nn.Module):
    """Into its argument, before and after that was used."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1.0)
        y: torch.Tensor = self.inner(x)
        x[:, 0] = 0
        return y


class Sparse(nn.Module):
    """As many rows as there are values in the whole batch that are not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(x)
        return found.nonzero()


class Counts(nn.Module):
    """Each call sees how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1.0
        y: torch.Tensor = self.inner(x) * self.calls
        return y


class Drops(nn.Module):
    """A dropout that asks for no mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


class Words(nn.Module):
    def forward(self, x: torch.Tensor) -> str:
        return f"{len(x)} rows"


def _with(module: nn.Module) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    values = torch.randint(-8, 9, (3, 1, 5, WIDTH), generator=torch.Generator().manual_seed(1)) / 8
    return module, [*values]


def raises() -> tuple[nn.Module, list[torch.Tensor]]:
    return _with(Raises())


def missing() -> tuple[nn.Module, list[torch.Tensor]]:
    return _with(Missing())


def asserts() -> tuple[nn.Module, list[torch.Tensor]]:
    return _with(Asserts())


def writes() -> tuple[nn.Module, list[torch.Tensor]]:
    return _with(Writes())


def sparse() -> tuple[nn.Module, list[torch.Tensor]]:
    return _with(Sparse())


def counts() -> tuple[nn.Module, list[torch.Tensor]]:
    return _with(nn.Sequential(nn.Linear(WIDTH, WIDTH), Counts()))


def drops() -> tuple[nn.Module, list[torch.Tensor]]:
    return _with(Drops())


def words() -> tuple[nn.Module, list[torch.Tensor]]:
    return _with(Words())


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize(
    ("name", "says", "rows"),
    [
        ("raises", "ValueError: only one", 2),
        ("missing", "KeyError: 'scale'", 1),
        ("asserts", "AssertionError: rows of words", 1),
    ],
)
def test_a_forward_that_raises(
    name: str, says: str, rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The module's own error, where it was raised and on how many rows; no internal error, no golden."""
    assert cli.run(["record", f"test_odd_modules:{name}", "-o", str(tmp_path / "golden")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"its forward raised {says}" in said and "test_odd_modules.py" in said and f"a batch of {rows}" in said
    assert "internal error" not in said and not (tmp_path / "golden").exists()


@pytest.mark.parametrize(("name", "keeps"), [("counts", "1.calls"), ("drops", "random numbers")])
def test_what_a_module_keeps_is_named(
    name: str, keeps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where runs differ because a call sees what another left, it is said what."""
    assert (
        cli.run(
            ["record", f"test_odd_modules:{name}", "-o", str(tmp_path / "golden"), "--allow", "aten::bernoulli_.float"]
        )
        != 0
    )
    said = " ".join(capsys.readouterr().err.split())
    assert "does not repeat itself" in said and said.endswith(f"What it keeps changed while it ran: {keeps}"), said
    assert not (tmp_path / "golden").exists()


def test_an_argument_that_is_written_into(tmp_path: Path) -> None:
    """A request is asked many times: each run has a copy of it."""
    golden = str(tmp_path / "golden")
    assert cli.run(["record", "test_odd_modules:writes", "-o", golden]) == 0
    assert cli.run(["verify", golden, "--n-trials", "4"]) == 0


def test_results_of_another_shape_with_each_batch(tmp_path: Path) -> None:
    """They differ, and the cause is told: the result is there, whatever the shapes."""
    golden, report = str(tmp_path / "golden"), tmp_path / "result.json"
    assert cli.run(["record", "test_odd_modules:sparse", "-o", golden]) == 0
    assert cli.run(["verify", golden, "--n-trials", "4", "--axes", "batch", "--json", str(report)]) == 1
    cause = json.loads(report.read_text())["invariance"]["cause"]
    assert cause["operation"] == "aten::nonzero" and "another shape" in cause["note"]


def test_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A result without a tensor: vacuous, and the axes say why they compared nothing."""
    golden = str(tmp_path / "golden")
    assert cli.run(["record", "test_odd_modules:words", "-o", golden]) == 0
    assert cli.run(["verify", golden, "--n-trials", "3", "--axes", "batch"]) == 5
    said = " ".join(capsys.readouterr().out.split())
    assert "not run: no row of a result could be compared" in said
