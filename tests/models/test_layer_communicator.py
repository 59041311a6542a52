"""Where sums over ranks are made does not show; in how many sums a mixture of experts is added does; misuse is named."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detinfer import bits, cli, deterministic
from detinfer.collectives import connect
from detinfer.errors import DoubleReduceError, TargetError, UnreducedError, UsageError
from detinfer.models import builtin
from detinfer.models.builtin import Communication
from detinfer.models.layer_communicator import LayerCommunicator, LayerModes, Stream, layer_modes, modes_of
from detinfer.models.partial import PartialSum
from detinfer.models.ranks import ALONE, Ranks, Spread
from detinfer.policy import Policy

sys.path.append(str(Path(__file__).parent))
import threads

KINDS = ("dense", "moe", "moe", "dense", "moe")
CARRIED = Communication(communicator=True)
SCATTERED = Communication(communicator=True, allow_reduce_scatter=True)
SEPARATE = Communication("separate")


def logits(ranks: Ranks, ids: torch.Tensor, how: Communication, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = builtin.layers(KINDS, dtype, 0, ranks, how)(ids).logits
        return found


def tokens(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, builtin.VOCABULARY, shape))


# --- modes


def test_modes_by_neighbours() -> None:
    """Rows are scattered between two sparse layers, carried elsewhere; the ends are full."""
    assert modes_of([False, True, True, False, True], True) == [
        LayerModes("full", "carried"),
        LayerModes("carried", "scattered"),
        LayerModes("scattered", "carried"),
        LayerModes("carried", "carried"),
        LayerModes("carried", "full"),
    ]
    assert {mode.output for mode in modes_of([True, True, True], False)} == {"carried", "full"}
    assert modes_of([True], True) == [LayerModes("full", "full")]


def test_a_layers_output_is_its_successors_input() -> None:
    """For every row of eight layers, dense and sparse, as each layer derives it from its neighbours alone."""
    for row in range(256):
        sparse = [bool(row >> place & 1) for place in range(8)]
        for allowed in (False, True):
            found = modes_of(sparse, allowed)
            assert [mode.output for mode in found[:-1]] == [mode.input for mode in found[1:]]
    last = layer_modes(True, True, True, first=False, is_last_layer=True, allow_reduce_scatter=False)
    assert last.output == "full"


# --- bytes


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_where_sums_are_made_does_not_show(size: int) -> None:
    """Carried and scattered (12 rows; 5 rows, which 2, 3 and 4 ranks cannot share out) on ranks as threads."""
    for ids in (tokens(3, 4), tokens(1, 5)):
        together = threads.Together(size)

        def work(ranks: Ranks, ids: torch.Tensor = ids) -> list[bytes]:
            return [bits.as_bytes(logits(ranks, ids, how)) for how in (builtin.DEFAULT, CARRIED, SCATTERED)]

        with deterministic("batch", uncovered="trust"):
            found = threads.run(together, work)
        assert len({one for rank in found for one in rank}) == 1
        if size >= 3:
            rotated = threads.Together(size, threads.rotated)
            with deterministic("batch", uncovered="trust"):
                wrong = threads.run(rotated, work)
            assert wrong[0][0] != found[0][0], "the order over ranks does not show in these logits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fused_call_has_the_same_bytes(dtype: torch.dtype) -> None:
    """Ranks that share memory: all_reduce + add + RMSNorm in one kernel, proved; fewer calls."""
    ids, size, name = tokens(3, 4), 3, f"layers-{os.getpid()}-{dtype}"
    calls: list[list[str]] = []

    class Counted(Spread):
        def __init__(self, communicator: Any) -> None:
            super().__init__(communicator)
            for method in ("all_reduce", "all_reduce_rms_norm", "reduce_scatter"):
                setattr(communicator, method, self._counting(method, getattr(communicator, method)))
            self.made: list[str] = []

        def _counting(self, method: str, call: Any) -> Any:
            def counted(*arguments: Any, **options: Any) -> Any:
                self.made.append(method)
                return call(*arguments, **options)

            return counted

    results: dict[int, list[bytes]] = {}

    def rank(number: int) -> None:
        with connect(name=name, rank=number, size=size) as communicator:
            ranks = Counted(communicator)
            found = []
            for how in (builtin.DEFAULT, CARRIED, SCATTERED, SEPARATE):
                logits(ranks, ids, how, dtype)  # proves
                ranks.made.clear()
                found.append(bits.as_bytes(logits(ranks, ids, how, dtype)))
                if number == 0:
                    calls.append(list(ranks.made))
            results[number] = found
            subjects = {one["op"] for one in ranks.decisions() if one["accepted"]}
            assert {"detinfer::all_reduce", "detinfer::all_reduce_rms_norm"} <= subjects

    with deterministic("batch", uncovered="trust"):
        workers = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert len(results) == size
    for found in results.values():
        assert found[:3] == [found[0]] * 3 and found == results[0]
        assert found[3] != found[0], "separate sums round in other places"
    default, carried, scattered, separate = calls
    assert default == ["all_reduce"] * 10, "two a layer: the attention's, and one for all that the experts add"
    assert separate == ["all_reduce"] * 13, "three a mixture of experts"
    assert carried == ["all_reduce_rms_norm"] * 9 + ["all_reduce"]
    assert scattered.count("reduce_scatter") == 1 and len(scattered) == 10


# --- misuse


def test_a_part_is_no_sum() -> None:
    """Every use of a part as a tensor names the layer and what to do."""
    part = PartialSum(torch.ones(2, 3), "layers.1.feed_forward")
    x = torch.ones(2, 3)
    uses: list[Any] = [
        lambda: x + part,
        lambda: part + x,
        lambda: part * 2,
        lambda: 2 - part,
        lambda: torch.nn.functional.rms_norm(part, (3,)),
        lambda: torch.cat([x, part]),
        lambda: part.float(),
        lambda: part.sum(),
        lambda: part[0],
        lambda: bool(part),
        lambda: part @ x,
    ]
    for use in uses:
        with pytest.raises(UnreducedError, match=r"layers\.1\.feed_forward: .* this rank's part alone"):
            use()
    assert (part.shape, part.dtype) == (x.shape, x.dtype)
    assert part.take("the norm") is part._value
    with pytest.raises(DoubleReduceError, match=r"layers\.1\.feed_forward: the next norm reduces .* already"):
        part.take("the next norm")


@pytest.mark.parametrize("which", ["self_attn", "feed_forward"])
def test_reducing_twice_is_an_error(which: str) -> None:
    """A layer that sums its output itself, under a communicator that would sum it once more: both are named."""
    model = builtin.layers(("dense", "moe"), torch.float32, 0, ALONE, CARRIED)
    getattr(model.layers[1], which).reduce_results = True
    with pytest.raises(
        DoubleReduceError, match=rf"layers\.1\.{which}: .* layers\.1's communicator .* reduce_results=False"
    ):
        model(tokens(1, 3))


def test_a_part_that_nobody_adds_is_an_error() -> None:
    """A layer built to put its sum off, without a communicator; and a part that reaches the end of the model."""
    model = builtin.layers(("dense", "dense"), torch.float32, 0, ALONE)
    model.layers[1].feed_forward.reduce_results = False
    with pytest.raises(UnreducedError, match=r"layers\.1\.feed_forward: add takes its output"):
        model(tokens(1, 3))
    together = threads.Together(2)
    model = builtin.layers(("dense", "dense"), torch.float32, 0, threads.Thread(together, 0), CARRIED)
    left = Stream(
        torch.ones(1, 2, 3), torch.Size((1, 2, 3)), ALONE, PartialSum(torch.ones(1, 2, 3), "layers.0.feed_forward")
    )
    with pytest.raises(UnreducedError, match=r"layers\.0\.feed_forward: the end of the model"):
        left.whole()


def test_a_carried_part_is_reduced_once() -> None:
    """The same stream given to two layers: the second finds its part taken."""
    ranks = threads.Thread(threads.Together(1), 0)
    between = LayerCommunicator("layers.1", ranks, LayerModes("carried", "full"))
    norm = torch.nn.RMSNorm(3, eps=1e-5)
    part = PartialSum(torch.ones(1, 2, 3), "layers.0.feed_forward")
    stream = Stream(torch.ones(1, 2, 3), torch.Size((1, 2, 3)), ranks, part)
    between.prepare_attention(stream, norm)
    with pytest.raises(DoubleReduceError, match=r"layers\.0\.feed_forward: layers\.1\.attention_norm"):
        between.prepare_attention(stream, norm)


def test_separate_reductions_are_not_put_off() -> None:
    with pytest.raises(TargetError, match="merged ones alone"):
        builtin.layers(("moe",), torch.float32, 0, ALONE, Communication("separate", True))
    with pytest.raises(UsageError, match="one of merged, separate"):
        Policy(reductions="both")  # type: ignore[arg-type]


# --- the policy's identity

SMALL = ("--n-prompts", "2", "--length", "3", "--decode-steps", "1")


def verdicts(folder: Path, report: Path, *words: str) -> tuple[int, str, str, str]:
    """(exit code, of the golden, of the sweep, the first reason) of one trial."""
    few = ("--n-trials", "1", "--batch-sizes", "2", "--layers", r"layers\.1\.feed_forward", "--json", str(report))
    code = cli.run(["verify", str(folder), *few, *words])
    result = json.loads(report.read_text())
    report.unlink()
    return code, result["golden"]["verdict"], result["invariance"]["verdict"], "".join(result["golden"]["reasons"])


def test_a_golden_belongs_to_one_way(tmp_path: Path) -> None:
    """On 3 ranks: verifies as it was recorded, is STALE the other way, in both directions."""
    report, separate = tmp_path / "result.json", tmp_path / "separate"
    merged = Path(__file__).parents[2] / "goldens/builtin_moe/tp3"
    *found, why = verdicts(merged, report, "--reductions", "separate")
    assert found == [4, "stale", "same"] and "recorded with merged reductions" in why
    words = ["record", "builtin:moe", "--tp", "3", "--reductions", "separate", *SMALL, "-o", str(separate)]
    assert cli.run(words) == 0
    assert json.loads((separate / "manifest.json").read_text())["policy"]["reductions"] == "separate"
    assert verdicts(separate, report) == (0, "same", "same", "")
    *found, why = verdicts(separate, report, "--reductions", "merged")
    assert found == [4, "stale", "same"] and "recorded with separate reductions" in why


def test_other_targets_have_their_own(tmp_path: Path) -> None:
    assert cli.run(["record", "smollm2", "--reductions", "separate", "-o", str(tmp_path / "golden")]) == 2
