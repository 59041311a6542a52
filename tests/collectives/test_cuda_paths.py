"""The table of paths between GPUs: what ships, a user's file, files that are wrong or of another machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from detinfer.collectives import cuda_paths
from detinfer.collectives.cuda_native import Geometry
from detinfer.errors import UsageError

GPU = "NVIDIA H200"


@pytest.fixture(autouse=True)
def _own_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(cuda_paths.VARIABLE, raising=False)


@pytest.mark.parametrize("ranks", range(2, 9))
def test_what_ships(ranks: int) -> None:
    """For every number of ranks; push only up to what a communicator of that geometry holds."""
    found = cuda_paths.shipped(ranks)
    assert cuda_paths.chosen("any GPU", ranks) == found
    assert found.paths.within(found.geometry) == found.paths
    for name, known in cuda_paths.KNOWN.items():
        assert found.paths.of(name, 1) == "push"
        path, blocks, most = cuda_paths.cut(name, found.paths.of(name, 1 << 40))
        assert path in set(known) - {"push"}
        assert blocks <= found.geometry.tile_channels
        assert most * (ranks if path == "two_shot" else 1) <= max(found.geometry.part_bytes, found.geometry.tile_bytes)


def _write(path: Path, **changes: Any) -> cuda_paths.Tuned:
    table = {name: {"up_to": [[4096, "push"]], "above": known[-1]} for name, known in cuda_paths.KNOWN.items()}
    tuned = cuda_paths.Tuned(str(path), Geometry(tile_channels=99), cuda_paths.make(table))
    cuda_paths.write(path, {"gpu": GPU, "ranks": 4}, tuned)
    if changes:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return tuned


def test_the_users_table_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Over what ships, for its GPU and number of ranks alone; the variable's file wins over both."""
    mine = cuda_paths.user_file(GPU, 4)
    written = _write(mine)
    assert mine.name == "nvidia-h200-4.json"
    assert cuda_paths.chosen(GPU, 4) == written
    assert written.paths.of("all_reduce", 4096) == "push"
    assert written.paths.of("all_reduce", 4097) == "two_shot"
    assert cuda_paths.chosen(GPU, 3) == cuda_paths.shipped(3)
    assert cuda_paths.chosen("NVIDIA H100", 4) == cuda_paths.shipped(4)
    other = tmp_path / "other.json"
    monkeypatch.setenv(cuda_paths.VARIABLE, str(other))
    with pytest.raises(UsageError, match=r"other\.json.*No such file"):
        cuda_paths.chosen(GPU, 4)
    assert _write(other) == cuda_paths.chosen(GPU, 4)


PATHS = {name: {"up_to": [], "above": known[-1]} for name, known in cuda_paths.KNOWN.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "no table of paths"),
        ({"environment": {"gpu": GPU, "ranks": 8}}, r"made for 8 x NVIDIA H200, here are 4 x NVIDIA H200"),
        ({"environment": {"gpu": "NVIDIA B200", "ranks": 4}}, "made for 4 x NVIDIA B200"),
        ({"environment": 3}, "has no attribute"),
        ({"paths": {}}, "all_reduce needs up_to"),
        ({"paths": 7}, "have to be objects"),
        (
            {"paths": {**PATHS, "all_reduce": {"up_to": [[9, "ring"]], "above": "pull"}}},
            "path .ring. is one of push, push_tiles",
        ),
        (
            {"paths": {**PATHS, "all_gather": {"up_to": [], "above": "two_shot"}}},
            "all_gather has push, push_tiles, and",
        ),
        ({"paths": {**PATHS, "all_reduce": {"up_to": [], "above": "push"}}}, "push takes no size above"),
        ({"geometry": {"blocks": 3}}, "geometry has 'blocks': 3"),
        ({"geometry": {"tile_channels": "many"}}, "geometry has 'tile_channels': 'many'"),
        ({"geometry": {"overlap": 2}}, "geometry has 'overlap': 2"),
    ],
)
def test_a_wrong_file_is_named(changes: dict[str, Any], message: str) -> None:
    """A file that cannot be used is an error that names it, never another table in its place."""
    mine = cuda_paths.user_file(GPU, 4)
    _write(mine, **changes)
    with pytest.raises(UsageError, match=f"nvidia-h200-4.json: .*{message}.*remove the file"):
        cuda_paths.chosen(GPU, 4)


def test_a_file_that_is_no_json() -> None:
    """Named as well."""
    mine = cuda_paths.user_file(GPU, 4)
    mine.parent.mkdir(parents=True)
    mine.write_text("{")
    with pytest.raises(UsageError, match=r"nvidia-h200-4\.json"):
        cuda_paths.chosen(GPU, 4)


def test_push_within_a_geometry() -> None:
    """A communicator with less room for push takes the next path where push would not fit."""
    table = {**PATHS, "all_reduce": {"up_to": [[1 << 20, "push"], [2 << 20, "push_tiles"]], "above": "two_shot"}}
    paths = cuda_paths.make(table).within(Geometry(push_channels=4, push_bytes=1024))
    assert [paths.of("all_reduce", n) for n in (4096, 4097, 1 << 20, 3 << 20)] == [
        *("push", "push_tiles", "push_tiles", "two_shot")
    ]


def test_how_a_path_is_cut() -> None:
    """``@BLOCKSxBYTES`` after any path but push; what cannot be read names the paths."""
    assert cuda_paths.cut("all_reduce", "two_shot@66x8192") == ("two_shot", 66, 8192)
    assert cuda_paths.cut("all_reduce", "pull") == ("pull", 0, 0)
    assert cuda_paths.cut("all_reduce", "push") == ("push", 0, 0)
    for wrong in ("ring", "push@66x8192", "two_shot@0x8192", "two_shot@66", "two_shot@66x8192x1", "two_shot@-1x512"):
        with pytest.raises(UsageError, match="is one of push, push_tiles, pull, two_shot"):
            cuda_paths.cut("all_reduce", wrong)
