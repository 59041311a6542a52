"""``detinfer bench collectives-cuda --tune``: what it makes of times; the times themselves need several GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detinfer import cli
from detinfer.bench import collectives_check, collectives_tune
from detinfer.bench.collectives_tune import Line
from detinfer.collectives import cuda_paths
from detinfer.collectives.patterns import stored_each_step
from detinfer.errors import Diverged, Vacuous
from detinfer.reference.all_reduce import all_reduce


def _lines() -> list[Line]:
    lines = []
    for name, known in cuda_paths.KNOWN.items():
        for nbytes, push in ((1024, 2.0), (2048, 4.0), (4096, 9.0)):
            lines.append(Line(name, nbytes, "push", push))
            lines.append(Line(name, nbytes, f"{known[-1]}@66x8192", 5.0))
            lines.append(Line(name, nbytes, f"{known[-1]}@132x16384", 4.9 if nbytes == 4096 else 6.0))
    return lines


def test_the_fastest_path_of_each_size() -> None:
    """Up to the last size that a path wins; push, which takes no size above all others, never stands last."""
    table = collectives_tune.table_of(_lines())
    assert table["all_reduce"] == {"up_to": [[2048, "push"]], "above": "two_shot@132x16384"}
    assert table["all_gather"] == {"up_to": [[2048, "push"]], "above": "push_tiles@132x16384"}
    assert cuda_paths.make(table).of("all_reduce", 2049) == "two_shot@132x16384"
    pushes = [line for line in _lines() if line.path == "push"]
    assert collectives_tune.table_of(pushes)["all_reduce"] == {"up_to": [[4096, "push"]], "above": "two_shot"}


def test_a_path_stays_while_it_is_near() -> None:
    """Within a hundredth of the fastest the table gets no new step; beyond it does."""
    for us, steps in ((10.05, [[4096, "push"]]), (10.2, [[2048, "push"], [4096, "pull"]])):
        lines = [Line("all_reduce", 2048, "push", 3.0), Line("all_reduce", 4096, "push", us)]
        lines += [Line("all_reduce", 4096, "pull", 10.0), Line("all_reduce", 8192, "two_shot", 9.0)]
        assert collectives_tune.table_of(lines)["all_reduce"] == {"up_to": steps, "above": "two_shot"}


@pytest.mark.parametrize("ranks", range(2, 9))
def test_what_is_tried(ranks: int) -> None:
    """Cuts that differ in what csrc does, all within the geometry; few at a small size, several at a large one."""
    geometry = collectives_tune.largest(ranks)
    for name, paths in cuda_paths.KNOWN.items():
        for path in paths:
            small, large = (collectives_tune.cuts(path, name, n, geometry, ranks) for n in (32768, 1 << 26))
            assert len(set(small)) == len(small) >= 1
            assert len(large) == (1 if path == "push" else 9 if ranks <= 4 else 6)
            assert len(small) < len(large) or path == "push"
            for each in large:
                kind, blocks, most = cuda_paths.cut(name, each)
                assert kind == path
                assert blocks <= geometry.tile_channels
                assert most * (ranks if path == "two_shot" else 1) <= max(geometry.tile_bytes, geometry.part_bytes)


def test_a_path_that_has_lost() -> None:
    """Is left out of larger sizes, but not for being slow at a small one: two_shot begins slow and ends fast."""
    row = {"push_tiles": 20.0, "two_shot": 10.0, "pull": 14.0}
    assert collectives_tune.losers(1 << 24, row) == {"push_tiles"}
    assert collectives_tune.losers(1 << 15, {"push": 3.5, "two_shot": 8.0}) == set()


def test_the_memory_that_a_table_needs() -> None:
    """The largest number of blocks and the largest tiles of what was chosen, and no more."""
    geometry = collectives_tune.largest(4)
    table = collectives_tune.table_of(_lines())
    found = collectives_tune.needed(geometry, table, 4)
    assert (found.tile_channels, found.tile_bytes, found.part_bytes) == (132, 16384, 4 * 16384)
    table["all_reduce"]["above"] = "two_shot@264x32768"
    found = collectives_tune.needed(geometry, table, 4)
    assert (found.tile_channels, found.tile_bytes, found.part_bytes) == (264, 16384, 4 * 32768)


def test_without_the_gpus(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Fewer GPUs than ranks is a usage error; --table alone is one too."""
    many = str(torch.cuda.device_count() + 2)
    assert cli.run(["bench", "collectives-cuda", "--tune", "--ranks", many]) == 2
    assert "need as many GPUs" in capsys.readouterr().err
    assert cli.run(["bench", "collectives-cuda", "--table", str(tmp_path / "t.json")]) == 2
    assert "give --tune" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_the_check_before_timing(ranks: int) -> None:
    """It passes the reference's bytes, fails a rotated and a stepwise rounded sum, and says when it checked nothing."""
    n = 4096
    parts = [collectives_check.cancelling(n, rank, ranks, "cpu") for rank in range(ranks)]
    bits = [part.view(torch.int16).numpy().view(np.uint16) for part in parts]
    right = _tensor(all_reduce(bits, "bfloat16"))
    collectives_check.compare(parts, right, "sum")
    if ranks == 2:
        assert bool((right != 0).all())
        return
    rotated = _tensor(all_reduce(bits[1:] + bits[:1], "bfloat16"))
    for wrong in (rotated, _tensor(stored_each_step(bits, "bfloat16"))):
        with pytest.raises(Diverged, match="elements have other bytes"):
            collectives_check.compare(parts, wrong, "sum")
    ones = [torch.ones_like(part) for part in parts]
    with pytest.raises(Vacuous, match="nothing was checked"):
        collectives_check.compare(ones, torch.full_like(right, float(ranks)), "sum")


def _tensor(bits: Any) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


@pytest.mark.gpu
def test_two_gpus(tmp_path: Path) -> None:
    """A table for two GPUs is written, and ``read`` takes it."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here: tuning needs two")
    table = tmp_path / "table.json"
    assert cli.run(["bench", "collectives-cuda", "--tune", "--table", str(table)]) == 0
    found = cuda_paths.read(table, torch.cuda.get_device_name(0), 2)
    assert found.paths.of("all_reduce", 2048) == "push"
