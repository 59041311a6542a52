"""The pytest plugin: tests that hold tensors to recorded bits, and functions to batch invariance.

    def test_block(golden):
        golden.check(block(x))                  # against goldens/test_file/test_block.safetensors beside the test
        golden.invariant(block, x)              # each row alone and in batches

    @pytest.mark.detinfer(policy="batch", n_trials=20)
    def test_model(golden): ...                 # runs under the policy

``--update-goldens=new`` writes what is missing, ``all`` writes everything anew; neither is accepted where ``CI`` is set.
torch is imported when a test asks for ``golden`` or has the marker.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

CI = ("CI", "CONTINUOUS_INTEGRATION", "BUILD_NUMBER")
"""Variables that say that nobody looks at what is written."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--update-goldens`` and the ini value ``detinfer_goldens``."""
    group = parser.getgroup("detinfer", "tensors held to recorded bits")
    group.addoption(
        "--update-goldens",
        choices=("no", "new", "all"),
        default="no",
        help="no: compare (default). new: write goldens that are missing. all: write every golden anew. Never in CI.",
    )
    parser.addini("detinfer_goldens", "Folder of goldens beside each test file (goldens).", default="goldens")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker; refuse to write where CI runs."""
    config.addinivalue_line(
        "markers", "detinfer(policy=None, n_trials=8): run under a policy; batches that golden.invariant forms."
    )
    update = config.getoption("--update-goldens")
    if update != "no" and (
        found := [name for name in CI if os.environ.get(name, "").lower() not in ("", "0", "false")]
    ):
        raise pytest.UsageError(
            f"--update-goldens={update}: {found[0]} is set, and goldens are not written in CI: a golden that is made where it "
            "is checked agrees with anything. Write it on your machine and commit it"
        )


def pytest_report_header(config: pytest.Config) -> list[str]:
    """The environment key, as far as it is known without torch."""
    return [f"detinfer: environment {_key()}, --update-goldens={config.getoption('--update-goldens')}"]


def _key() -> str:
    """Sixteen letters that differ where torch, Python or the CPU differ; read from files alone."""
    import hashlib
    import platform
    from importlib import metadata

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "none"

    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        cpu = ""
    names = sorted(set(re.findall(r"^(?:model name|CPU part|flags|Features)\s*:\s*(.*)$", cpu, re.MULTILINE)))
    parts = [version("torch"), version("numpy"), platform.machine(), platform.system(), *platform.libc_ver(), *names]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@pytest.fixture(autouse=True)
def _detinfer_policy(request: pytest.FixtureRequest) -> Iterator[None]:
    """The marker's policy around the test."""
    marker = request.node.get_closest_marker("detinfer")
    policy = None if marker is None else _option(marker, "policy", None)
    if policy is None:
        yield
        return
    from detinfer.policy import deterministic

    with deterministic(policy):
        yield


def _option(marker: pytest.Mark, name: str, default: Any) -> Any:
    unknown = set(marker.kwargs) - {"policy", "n_trials"}
    if marker.args or unknown:
        raise pytest.UsageError(
            f"@pytest.mark.detinfer takes policy= and n_trials=, not {marker.args or sorted(unknown)}"
        )
    return marker.kwargs.get(name, default)


class Golden:
    """The fixture's value: one test's recorded tensors, by name, in one file beside the test."""

    def __init__(self, path: Path, update: str, n_trials: int, record: Callable[[str, object], None]) -> None:
        self.path, self._update, self._n_trials, self._record = path, update, n_trials, record
        self._named: dict[str, torch.Tensor] = {}
        self._held: dict[str, torch.Tensor] | None = None
        self._environment: dict[str, Any] = {}
        self._writes = False

    def check(self, tensor: torch.Tensor, name: str | None = None) -> None:
        """``tensor`` has the recorded bytes, dtype and shape; ``name`` tells several of a test apart (0, 1, ...).

        Fails with the first element that differs, and says so where the golden is of another environment (STALE) or is
        missing. With ``--update-goldens`` it writes instead.
        """
        import torch

        from detinfer.testing import assert_bits_equal

        name = str(len(self._named)) if name is None else name
        if name in self._named:
            pytest.fail(f"golden.check: two tensors are named {name!r} in one test", pytrace=False)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"golden.check takes a tensor, not {type(tensor).__name__}: call it once for each of several"
            )
        self._named[name] = tensor.detach().clone().contiguous()
        held = self._read()
        if self._update == "all" or (self._update == "new" and name not in held):
            self._writes = True
            return
        if name not in held:
            pytest.fail(
                f"{self.path} has no golden {name!r}: look at the values, then write it with --update-goldens=new",
                pytrace=False,
            )
        try:
            assert_bits_equal(self._named[name], held[name], f"golden {name!r} of {self.path}")
        except AssertionError as error:
            if stale := self._stale():
                fields = "; ".join(f"{field}: {then} then, {now} now" for field, then, now in stale)
                pytest.fail(
                    f"STALE: {error}. It was recorded in another environment ({fields}): record it again with "
                    "--update-goldens=all, or compare where it was recorded",
                    pytrace=False,
                )
            raise

    def invariant(self, fn: Callable[[torch.Tensor], Any], x: torch.Tensor, dim: int = 0) -> None:
        """``fn`` gives each row of ``x`` along ``dim`` the same bytes alone and in batches; needs no recorded file."""
        from detinfer.testing import assert_batch_invariant

        assert_batch_invariant(fn, x, dim, n_trials=self._n_trials)
        self._record("detinfer_trials", self._n_trials)

    def _read(self) -> dict[str, torch.Tensor]:
        if self._held is not None:
            return self._held
        from detinfer import tensor_file

        self._held = {}
        if self.path.exists():
            try:
                with tensor_file.reader(self.path) as file:
                    self._environment = json.loads((file.metadata() or {})[tensor_file.METADATA_KEY])
                    self._held = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            except (ValueError, KeyError) as error:
                pytest.fail(f"{self.path}: no golden of this plugin: {error}", pytrace=False)
        return self._held

    def _stale(self) -> tuple[tuple[str, str, str], ...]:
        from detinfer.environment import Environment, differences

        return differences(Environment.from_json(self._environment, str(self.path)), _capture())

    def _finish(self) -> None:
        """Write what the test has checked, all of it, where it is to be written."""
        if not self._writes:
            return
        from detinfer import tensor_file

        kept = {} if self._update == "all" else self._read()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".{os.getpid()}.part")
        tensor_file.write(part, {**self._named, **kept}, json.dumps(_capture().to_json(), sort_keys=True))
        part.replace(self.path)


def _capture() -> Any:
    from detinfer import environment, native

    return environment.capture(native.isa() if isinstance(native.load(), native.Loaded) else "none")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    """This test's recorded tensors: ``golden.check(tensor)``, ``golden.invariant(fn, x)``."""
    marker = request.node.get_closest_marker("detinfer")
    n_trials = 8 if marker is None else _option(marker, "n_trials", 8)
    name = re.sub(r"[^\w.=-]+", "_", request.node.name).strip("_")
    folder = request.path.parent / request.config.getini("detinfer_goldens")
    inside = "" if request.cls is None else f"{request.cls.__name__}."
    path = folder / request.path.stem / f"{inside}{name}.safetensors"
    properties = request.node.user_properties  # not record_property, which warns in pytest's own default for JUnit
    properties.append(("detinfer_environment", _key()))
    update = request.config.getoption("--update-goldens")
    found = Golden(path, update, n_trials, lambda name, value: properties.append((name, value)))
    yield found
    report = getattr(request.node, "_detinfer_failed", False)
    if not report:  # what a failing test has computed is no golden
        found._finish()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Remember that a test failed, for its fixture's end."""
    report = yield
    if call.when == "call" and report.failed:
        item._detinfer_failed = True  # type: ignore[attr-defined]
    return report
