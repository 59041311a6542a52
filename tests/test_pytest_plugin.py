"""The pytest plugin, run on small projects of its own; and the two assertions."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

import detinfer.collectives.torch_ops
import detinfer.policy  # noqa: F401
from detinfer.errors import UsageError
from detinfer.testing import assert_batch_invariant, assert_bits_equal

pytest_plugins = ["pytester"]

CHECK = """
import torch
VALUE = {value}
def test_one(golden):
    golden.check(torch.tensor([1.0, VALUE, -0.0]))
    golden.check(torch.arange(4).view(2, 2), "ints")
"""
MODEL = """
import torch
def by_row(x):
    return x * 3.0
def by_batch(x):
    return x + x.shape[0]  # what a kernel chosen by the number of rows does
X = torch.arange(15, dtype=torch.float32).view(5, 3)
"""


# Where detinfer is installed pytest finds the plugin by itself, and does not take it twice.
INSTALLED = any(point.value == "detinfer.pytest_plugin" for point in entry_points(group="pytest11"))
PLUGIN = () if INSTALLED else ("-p", "detinfer.pytest_plugin")


def run(pytester: pytest.Pytester, *words: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess(*PLUGIN, "-p", "no:cacheprovider", *words)


@pytest.fixture(autouse=True)
def outside_of_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests run in CI too."""
    for name in ("CI", "CONTINUOUS_INTEGRATION", "BUILD_NUMBER"):
        monkeypatch.delenv(name, raising=False)


# --- goldens


def test_missing_then_written_then_held(pytester: pytest.Pytester) -> None:
    """No golden: fails and says how. new: writes. Then the same bytes pass, and one other bit fails, named."""
    pytester.makepyfile(test_it=CHECK.format(value=2.5))
    done = run(pytester)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*test_one.safetensors has no golden '0': *--update-goldens=new*"])
    run(pytester, "--update-goldens=new").assert_outcomes(passed=1)
    path = pytester.path / "goldens/test_it/test_one.safetensors"
    first = path.read_bytes()
    run(pytester).assert_outcomes(passed=1)
    run(pytester, "--update-goldens=new").assert_outcomes(passed=1)
    assert path.read_bytes() == first
    pytester.makepyfile(test_it=CHECK.format(value="torch.nextafter(torch.tensor(2.5), torch.tensor(3.0)).item()"))
    done = run(pytester)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*golden '0' of *: 1 of 3 elements differ; *0x40200001*0x40200000*1 ULP*"])
    assert path.read_bytes() == first
    run(pytester, "--update-goldens=all").assert_outcomes(passed=1)
    assert path.read_bytes() != first
    run(pytester).assert_outcomes(passed=1)


def test_the_sign_of_zero(pytester: pytest.Pytester) -> None:
    """-0.0 recorded, +0.0 computed: other bytes."""
    pytester.makepyfile(test_it=CHECK.format(value=2.5))
    run(pytester, "--update-goldens=new").assert_outcomes(passed=1)
    pytester.makepyfile(test_it=CHECK.format(value=2.5).replace("-0.0", "0.0"))
    run(pytester).assert_outcomes(failed=1)


def test_a_failing_test_writes_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=CHECK.format(value=2.5) + "    assert False\n")
    run(pytester, "--update-goldens=new").assert_outcomes(failed=1)
    assert not (pytester.path / "goldens").exists()


@pytest.mark.parametrize("update", ["new", "all"])
def test_never_in_ci(pytester: pytest.Pytester, update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    pytester.makepyfile(test_it=CHECK.format(value=2.5))
    done = run(pytester, f"--update-goldens={update}")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([f"*--update-goldens={update}: CI is set*"])
    assert not (pytester.path / "goldens").exists()
    run(pytester).assert_outcomes(failed=1)


def test_another_environment_is_stale(pytester: pytest.Pytester) -> None:
    """Equal bytes pass wherever they were recorded; other bytes of another torch are called stale. A broken file is."""
    from detinfer import tensor_file

    pytester.makepyfile(test_it=CHECK.format(value=2.5))
    run(pytester, "--update-goldens=new").assert_outcomes(passed=1)
    path = pytester.path / "goldens/test_it/test_one.safetensors"
    with tensor_file.reader(path) as file:
        held = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        environment = json.loads(file.metadata()[tensor_file.METADATA_KEY])
    tensor_file.write(path, held, json.dumps(environment | {"torch": "1.0"}))
    run(pytester).assert_outcomes(passed=1)
    held["0"][0] = 7
    tensor_file.write(path, held, json.dumps(environment | {"torch": "1.0"}))
    done = run(pytester)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*STALE: golden '0' *recorded in another environment (torch: 1.0 then, *"])
    path.write_bytes(b"not one")
    run(pytester).stdout.fnmatch_lines(["*test_one.safetensors: no golden of this plugin*"])


def test_names(pytester: pytest.Pytester) -> None:
    """Parameters and classes have files of their own; two tensors of one name are an error."""
    pytester.makepyfile(
        test_it="""
        import pytest, torch
        class TestBoth:
            @pytest.mark.parametrize("n", [1, 2])
            def test_n(self, golden, n):
                golden.check(torch.full((2,), float(n)))
        def test_twice(golden):
            golden.check(torch.ones(1), "x")
            golden.check(torch.ones(1), "x")
        """
    )
    run(pytester, "--update-goldens=new").assert_outcomes(passed=2, failed=1)
    assert sorted(path.name for path in (pytester.path / "goldens/test_it").iterdir()) == [
        "TestBoth.test_n_1.safetensors",
        "TestBoth.test_n_2.safetensors",
    ]


# --- invariance and the marker


def test_invariance_and_the_marker(pytester: pytest.Pytester) -> None:
    """No folder is needed; a function that sees its batch fails with the row; the marker's policy is in force."""
    pytester.makepyfile(
        test_it=MODEL
        + """
import pytest
from detinfer.policy.state import STATE

def test_good(golden):
    golden.invariant(by_row, X)
    assert STATE.innermost() is None

def test_bad(golden):
    golden.invariant(by_batch, X)

@pytest.mark.detinfer(policy="batch", n_trials=3)
def test_policy(golden):
    golden.invariant(by_row, X)
    assert STATE.policy().guarantee.scope == "batch" and STATE.innermost() is not None

@pytest.mark.detinfer(policy="batch")
def test_refused():
    torch.cumsum(X, 0)

@pytest.mark.detinfer(trials=3)
def test_typo(golden):
    pass
"""
    )
    done = run(pytester, "--junit-xml=result.xml", "--strict-markers")
    done.assert_outcomes(passed=2, failed=2, errors=1)
    said = done.stdout.str()
    assert "row 0 at place 0 of a batch of 5 (trial 0), against the same row alone: " in said
    assert "aten::cumsum on float32 is refused" in said and "takes policy= and n_trials=, not ['trials']" in said
    header = re.search(r"detinfer: environment ([0-9a-f]{16}), --update-goldens=no", said)
    assert header is not None
    cases = {case.get("name"): case for case in ElementTree.parse(pytester.path / "result.xml").iter("testcase")}
    properties = {one.get("name"): one.get("value") for one in cases["test_policy"].iter("property")}
    assert properties == {"detinfer_environment": header[1], "detinfer_trials": "3"}
    assert not (pytester.path / "goldens").exists()


def test_torch_is_imported_when_a_test_asks(pytester: pytest.Pytester) -> None:
    """A suite that does not use the plugin pays for no torch: a process of its own."""
    pytester.makepyfile(test_it="import sys\ndef test_it():\n    assert not {'torch', 'numpy'} & set(sys.modules)\n")
    pytester.runpytest_subprocess(*PLUGIN).assert_outcomes(passed=1)


def test_xdist(pytester: pytest.Pytester) -> None:
    """Two workers write and check files of their own."""
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    tests = "\n".join(f"def test_{n}(golden):\n    golden.check(torch.full((3,), {n}.0))" for n in range(6))
    pytester.makepyfile(test_it=f"import torch\n{tests}\n")
    words = (*PLUGIN, "-n", "2")
    pytester.runpytest_subprocess(*words, "--update-goldens=new").assert_outcomes(passed=6)
    assert len(list((pytester.path / "goldens/test_it").glob("*.safetensors"))) == 6
    pytester.runpytest_subprocess(*words).assert_outcomes(passed=6)


# --- the assertions


def test_assert_bits_equal() -> None:
    """Bytes, not values: signed zero, NaN payloads, dtype, shape; nested results name the place."""
    nan = torch.tensor([0x7FC00001, 0x7FC00002], dtype=torch.int32).view(torch.float32)
    assert_bits_equal(nan, nan.clone())
    assert_bits_equal({"a": [torch.ones(2), (torch.zeros(1),)]}, {"a": [torch.ones(2), (torch.zeros(1),)]})
    for got, expected, words in (
        (torch.tensor([0.0]), torch.tensor([-0.0]), "1 of 1 elements differ"),
        (nan, nan.flip(0), "2 of 2 elements differ"),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), "float32 [2], expected float64 [2]"),
        (torch.ones(2), torch.ones(1, 2), "expected float32 [1, 2]"),
        ({"a": [torch.ones(1)]}, {"a": [torch.zeros(1)]}, "['a'][0]: 1 of 1"),
        ([torch.ones(1)], [torch.ones(1)] * 2, "1 results, expected 2"),
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}, "keys ['a'], expected ['b']"),
        (3, torch.ones(1), "int, and a tensor is expected"),
        (torch.ones(1), [torch.ones(1)], "Tensor, expected list"),
    ):
        with pytest.raises(AssertionError) as caught:
            assert_bits_equal(got, expected)
        assert words in str(caught.value)
    with pytest.raises(UsageError, match="give tensors"):
        assert_bits_equal(3, 3)


def test_assert_batch_invariant() -> None:
    """A sum whose order depends on the rows is seen along either dimension; what could show nothing is an error."""
    x = torch.arange(24, dtype=torch.float32).view(6, 4).sin()
    assert_batch_invariant(lambda rows: rows * 2, x)
    assert_batch_invariant(lambda rows: torch.softmax(rows, -1), x, policy="batch")
    assert_batch_invariant(lambda columns: columns + 1, x, dim=1)

    def places(rows: torch.Tensor) -> torch.Tensor:  # adds where a row stands
        return rows + torch.arange(len(rows))[:, None]

    for fn, dim in ((places, 0), (lambda columns: columns * columns.shape[1], 1)):
        with pytest.raises(AssertionError, match=r"row \d+ at place \d+ of a batch of \d+"):
            assert_batch_invariant(fn, x, dim=dim)
    for fn, given, words in (
        (lambda rows: rows, x[:1], "1 rows"),
        (torch.zeros_like, x, "every row gives the same bytes"),
        (lambda rows: rows.sum(), x, "no row for each"),
    ):
        with pytest.raises(UsageError, match=words):
            assert_batch_invariant(fn, given)


def test_batches_are_the_same_every_time() -> None:
    """A seed gives its batches, and the generators that a test uses stay as they are."""
    before = torch.random.get_rng_state()
    seen: list[list[float]] = []

    def note(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows[:, 0].tolist())
        return rows

    x = torch.arange(4, dtype=torch.float32)[:, None]
    for _ in range(2):
        assert_batch_invariant(note, x, seed=3)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert {len(batch) for batch in seen} >= {1, 4} and max(map(len, seen)) > 4
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_entry_point_is_the_module() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points.pytest11]\ndetinfer = "detinfer.pytest_plugin"' in text
