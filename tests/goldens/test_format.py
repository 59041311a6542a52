"""The golden on disk: the same bytes twice, nothing half-written, every damage named."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detinfer import bits, environment
from detinfer.errors import GoldenError, InfrastructureError, UnsupportedDtype, UsageError
from detinfer.goldens import manifest as manifests
from detinfer.goldens.format import Golden, GoldenWriter
from detinfer.goldens.manifest import Manifest
from detinfer.policy import Accepted, Proof, Refused

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    if dtype == torch.bool:
        return torch.from_numpy(rng.integers(0, 2, shape, dtype=np.uint8)).bool()
    raw = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


TENSORS = [draw((2, 3, width), dtype, width) for dtype in DTYPES for width in (1, 15, 49, 100)]
TENSORS += [torch.tensor(-0.0), torch.empty(0, 3), torch.empty(3, 0), torch.tensor(True)]


def make(units: list[dict[str, Any]], results: list[list[Any]] | None = None, **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "detinfer": "0.1.0",
        "environment": environment.capture().to_json(),
        "target": {
            "spec": "pkg.models:make",
            "kind": "module",
            "class": "Net",
            "dtype": "bfloat16",
            "weights_digest": "a" * 64,
            "config_digest": "b" * 64,
        },
        "inputs": {"digest": "c" * 64, "seed": 0, "prompts": [], "requests": [], "decode_steps": 0},
        "policy": {"scope": "batch"},
        "decisions": [],
        "tensors_mode": "full",
        "units": units,
        "outputs": {"tokens": [[1, 2]], "results": results or [], "batch": {}},
        **changes,
    }
    return Manifest(**values)


def unit(name: str, arguments: list[str], outputs: list[str]) -> dict[str, Any]:
    call = {
        "request": 0,
        "step": 0,
        "arguments": {"tuple": [{"tensor": digest} for digest in arguments]},
        "outputs": {"dict": {"y": {"list": [{"tensor": digest} for digest in outputs]}}},
    }
    return {"name": name, "kind": "leaf", "type": "Linear", "batch": {}, "calls": [call], "skipped": None}


def write(path: Path, store: Callable[[int], bool] = lambda i: True, **how: Any) -> list[str]:
    """A golden of TENSORS, of which those that ``store`` picks are kept; their digests."""
    writer = GoldenWriter(path, **how)
    names = [writer.add(t, store(i)) for i, t in enumerate(TENSORS)]
    assert writer.commit(make([unit("net.0", names, names[:3])], [[{"tensor": names[4]}]])) == path
    return names


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_every_tensor_comes_back_byte_for_byte(tmp_path: Path) -> None:
    names = write(tmp_path / "g", store=lambda i: i % 3 != 0)
    golden = Golden.read(tmp_path / "g")
    assert sorted(contents(tmp_path / "g")) == ["manifest.json", "tensors.safetensors"]
    for i, (name, t) in enumerate(zip(names, TENSORS, strict=True)):
        found = golden.tensor(name)
        if i % 3 == 0:
            assert found is None
        else:
            assert found is not None
            assert (found.dtype, found.shape) == (t.dtype, t.shape)
            assert bits.as_bytes(found) == bits.as_bytes(t)
        assert bits.as_bytes(golden.row_digests(name)) == bits.as_bytes(bits.row_digests(t))
        assert golden.row_digests(name).shape == bits.row_digests(t).shape
    assert golden.manifest.units[0]["name"] == "net.0"
    with pytest.raises(GoldenError, match="no tensor ffff"):
        golden.tensor("f" * 64)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 400])
def test_recording_twice_gives_the_same_bytes(tmp_path: Path, shard_bytes: int) -> None:
    # Many times: an order that varies shows only now and then.
    write(tmp_path / "a", shard_bytes=shard_bytes)
    first = contents(tmp_path / "a")
    for again in range(5):
        write(tmp_path / f"b{again}", shard_bytes=shard_bytes)
        assert contents(tmp_path / f"b{again}") == first
    write(tmp_path / "a", overwrite=True, shard_bytes=shard_bytes)
    assert contents(tmp_path / "a") == first
    other = [t.clone() for t in TENSORS]
    other[0].view(torch.int32)[0, 0, 0] ^= 1
    writer = GoldenWriter(tmp_path / "c", shard_bytes=shard_bytes)
    names = [writer.add(t, True) for t in other]
    writer.commit(make([unit("net.0", names, names[:3])], [[{"tensor": names[4]}]]))
    assert contents(tmp_path / "c") != first


def test_another_hash_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "here")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_format as t, pathlib; "
        f"t.write(pathlib.Path(sys.argv[1]))"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    variables = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], env=variables, check=True)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_files_are_cut_into_shards_and_hold_one_metadata_key_at_most(tmp_path: Path) -> None:
    names = write(tmp_path / "g", shard_bytes=400)
    files = sorted(contents(tmp_path / "g"))
    assert files[:2] == ["manifest.json", "tensors-00001.safetensors"]
    assert files[-1] == "tensors.safetensors.index.json"
    assert files[-2] == f"tensors-{len(files) - 2:05d}.safetensors"
    assert len(files) > 5
    for file in files[1:-1]:
        raw = (tmp_path / "g" / file).read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        assert len(header.get("__metadata__", {})) <= 1
    golden = Golden.read(tmp_path / "g")
    for name, t in zip(names, TENSORS, strict=True):
        found = golden.tensor(name)
        assert found is not None
        assert bits.as_bytes(found) == bits.as_bytes(t)


def test_an_index_says_which_file_holds_a_tensor(tmp_path: Path) -> None:
    """As the readers of sharded safetensors want it; one that was edited is refused, one that is missing is not needed."""
    write(tmp_path / "g", shard_bytes=400)
    file = tmp_path / "g" / "tensors.safetensors.index.json"
    index = json.loads(file.read_text())
    sizes = 0
    for name, place in index["weight_map"].items():
        raw = (tmp_path / "g" / place).read_bytes()
        start, end = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])[name]["data_offsets"]
        sizes += end - start
    assert index["metadata"] == {"total_size": sizes}
    one, other = min(index["weight_map"]), max(index["weight_map"])
    index["weight_map"][one], index["weight_map"][other] = index["weight_map"][other], index["weight_map"][one]
    file.write_text(json.dumps(index))
    with pytest.raises(GoldenError, match=r"index\.json: names other tensors"):
        Golden.read(tmp_path / "g")
    file.write_text("[")
    with pytest.raises(GoldenError, match="not an index"):
        Golden.read(tmp_path / "g")
    file.unlink()
    Golden.read(tmp_path / "g")


def test_equal_tensors_are_stored_once_and_may_be_stored_later(tmp_path: Path) -> None:
    t = draw((1000, 100), torch.float32, 5)
    writer = GoldenWriter(tmp_path / "g", shard_bytes=1000)
    assert writer.add(t, False) == writer.add(t.clone(), True) == writer.add(t.t().contiguous().t(), True)
    writer.commit(make([]))
    golden = Golden.read(tmp_path / "g")
    assert sum(entry["size"] for entry in golden.manifest.files) < 1.2 * t.numel() * 4
    assert golden.tensor(bits.digest(t)) is not None


def test_a_tensor_is_kept_as_it_was_when_it_was_added(tmp_path: Path) -> None:
    t = torch.ones(4, 4)
    writer = GoldenWriter(tmp_path / "g")
    name = writer.add(t[1:3], True)
    t.zero_()
    writer.commit(make([]))
    found = Golden.read(tmp_path / "g").tensor(name)
    assert found is not None
    assert found.tolist() == torch.ones(2, 4).tolist()
    found.zero_()  # a copy of its own
    again = Golden.read(tmp_path / "g").tensor(name)
    assert again is not None
    assert again.tolist() == torch.ones(2, 4).tolist()
    assert found.data_ptr() % 64 == 0


def test_without_commit_nothing_is_left(tmp_path: Path) -> None:
    def interrupted() -> None:
        with GoldenWriter(tmp_path / "g", shard_bytes=100) as writer:
            for t in TENSORS:
                writer.add(t, True)
            assert any(item.name.startswith(".g.partial-") for item in tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_bad_manifest_leaves_the_golden_before_it(tmp_path: Path) -> None:
    write(tmp_path / "g")
    before = contents(tmp_path / "g")
    for bad, word in (
        (make([unit("x", ["d" * 64], [])]), "never added"),
        (make([{**unit("x", [], []), "kind": "layer"}]), r"units\[0\].kind: expected one of leaf"),
        (make([], notes=[float("nan")]), r"notes\[0\]"),
        (make([], policy={"a": float("inf")}), r"policy.a: expected a finite number"),
        (make([], environment={}), "missing key"),
        (make([], outputs={"tokens": [], "results": [[object()]], "batch": {}}), r"results\[0\]\[0\]"),
    ):
        with pytest.raises(GoldenError, match=word):
            GoldenWriter(tmp_path / "g", overwrite=True).commit(bad)
        assert contents(tmp_path / "g") == before
        assert [item.name for item in tmp_path.iterdir()] == ["g"]


KILLED = """
import os, pathlib, sys, time
sys.path.insert(0, {folder!r})
import test_format as t
from detinfer.goldens import folder, format
{patch}
writer = format.GoldenWriter(pathlib.Path(sys.argv[1]), overwrite=True, shard_bytes=100)
for tensor in t.TENSORS:
    writer.add(tensor, True)
writer.commit(t.make([]))
print("not killed")
"""
WAIT = "print('ready', flush=True), time.sleep(60)"


@pytest.mark.parametrize(
    ("patch", "left"),
    [
        (f"folder.write_file = lambda *_: ({WAIT})", "old"),
        (f"folder.put_in_place = lambda *_: ({WAIT})", "old"),
        (f"pathlib.Path.rename = lambda one, to: ({WAIT}) if 'partial' in one.name else os.rename(one, to)", "aside"),
        (f"folder._sync = lambda path: None if 'partial' in path.name else ({WAIT})", "new"),
    ],
    ids=["no manifest yet", "before the renames", "between the renames", "after the renames"],
)
@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwrite"])
def test_a_kill_leaves_the_old_golden_or_the_new_one(tmp_path: Path, patch: str, left: str, existing: bool) -> None:
    path = tmp_path / "g"
    if existing:
        write(path, store=lambda i: False)
    before = contents(path) if existing else None
    code = KILLED.format(folder=str(Path(__file__).parent), patch=patch)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, env=variables
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        process.send_signal(signal.SIGKILL)
    if left == "new":
        assert len(Golden.read(path).manifest.tensors) == len(TENSORS)
        assert contents(path) != before
    elif existing and left == "old":
        assert contents(path) == before
    else:
        assert not path.exists()
        with pytest.raises(GoldenError, match="rename it back" if existing else "does not exist"):
            Golden.read(path)
    if existing and left != "new":  # the next write puts the old golden back, and asks
        with pytest.raises(UsageError, match="overwrite"):
            GoldenWriter(path)
        assert contents(path) == before
    write(path, overwrite=True)
    Golden.read(path)
    assert [item.name for item in tmp_path.iterdir()] == ["g"]


def test_a_full_disk_is_an_infrastructure_error(tmp_path: Path) -> None:
    write(tmp_path / "g", store=lambda i: False)
    before = contents(tmp_path / "g")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = GoldenWriter(tmp_path / "g", overwrite=True)
    writer.add(draw((300, 1000), torch.float32, 1), True)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InfrastructureError, match="nothing was written"):
            writer.commit(make([]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, kept)
    assert contents(tmp_path / "g") == before
    assert [item.name for item in tmp_path.iterdir()] == ["g"]


def test_a_path_below_a_file_is_an_infrastructure_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    writer = GoldenWriter(tmp_path / "file" / "g")
    with pytest.raises(InfrastructureError, match="file"):
        writer.commit(make([]))


def test_what_is_not_a_golden_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "thesis.txt").write_text("years of work")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text('{"name": "an app"}')
    (tmp_path / "file").write_text("x")
    for name in ("dir", "app", "file"):
        for overwrite in (False, True):
            with pytest.raises(UsageError, match=name):
                GoldenWriter(tmp_path / name, overwrite=overwrite)
    write(tmp_path / "g")
    with pytest.raises(UsageError, match="overwrite"):
        GoldenWriter(tmp_path / "g")
    (tmp_path / "g" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        GoldenWriter(tmp_path / "g", overwrite=True)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    write(tmp_path / "new" / "deep" / "g")


def test_what_appears_while_recording_is_not_overwritten(tmp_path: Path) -> None:
    writer = GoldenWriter(tmp_path / "g")
    write(tmp_path / "g")
    before = contents(tmp_path / "g")
    with pytest.raises(UsageError, match="overwrite"):
        writer.commit(make([]))
    assert contents(tmp_path / "g") == before


def test_a_dtype_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    writer = GoldenWriter(tmp_path / "g")
    writer.add(torch.ones(2, dtype=torch.complex128), False)
    with pytest.raises(UnsupportedDtype, match="complex128"):
        writer.add(torch.ones(2, dtype=torch.complex128), True)


def edit(path: Path, change: Callable[[dict[str, Any]], None], sealed: bool) -> None:
    """Change a manifest; ``sealed`` gives it a digest that fits, as a file made by another program would have."""
    data = json.loads((path / "manifest.json").read_text())
    change(data)
    if sealed:
        data["digest"] = manifests.digest(data)
    (path / "manifest.json").write_bytes(manifests.canonical(data))


def test_a_manifest_is_canonical_json(tmp_path: Path) -> None:
    write(tmp_path / "g")
    raw = (tmp_path / "g" / "manifest.json").read_bytes()
    data = json.loads(raw)
    assert raw == (json.dumps(data, sort_keys=True, indent=1, ensure_ascii=True) + "\n").encode()
    assert data.keys() == manifests.SHAPE.keys() - {"ranks"}, "what one rank needs not is not written"
    edit(tmp_path / "g", lambda d: None, sealed=True)
    assert (tmp_path / "g" / "manifest.json").read_bytes() == raw


def test_decisions_of_the_policy_have_their_place(tmp_path: Path) -> None:
    proof = Proof("aten::linear float32", "reference.matmul", 9, "e" * 64)
    decisions: list[dict[str, Any]] = [
        {"op": "aten::linear", "dtypes": ["float32"]} | Accepted("aten::linear", "native", "proved", proof).to_json(),
        {"op": "aten::view", "dtypes": ["float32"]} | Accepted("aten::view", "torch", "moves bytes").to_json(),
        {"op": "aten::fft", "dtypes": []} | Refused("aten::fft", "torch", "nobody covers it").to_json(),
    ]
    GoldenWriter(tmp_path / "g").commit(make([], decisions=decisions))
    assert Golden.read(tmp_path / "g").manifest.decisions == decisions


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda d: d["target"].update({"class": "Other"}), "does not match its digest"),
        (lambda d: d.update(reason="because"), "does not match its digest"),
        (lambda d: d.pop("digest"), "does not match its digest"),
        (lambda d: d.update(schema=2), r"newer detinfer \(0.1.0\).*upgrade"),
        (lambda d: d.update(schema=0), "older"),
        (lambda d: d.pop("schema"), "no schema"),
    ],
)
def test_an_edited_manifest_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None], word: str) -> None:
    write(tmp_path / "g")
    edit(tmp_path / "g", change, sealed=False)
    with pytest.raises(GoldenError, match=word) as caught:
        Golden.read(tmp_path / "g")
    assert "manifest.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda d: d.update(extra=1), "unknown key 'extra'"),
        (lambda d: d.pop("policy"), "missing key 'policy'"),
        (lambda d: d["target"].update(extra=1), "target: unknown key 'extra'"),
        (lambda d: d["target"].update({"class": 3}), "target.class: expected a string, found 3"),
        (lambda d: d["inputs"].update(seed=True), "inputs.seed: expected an integer"),
        (lambda d: d["units"][0].pop("kind"), r"units\[0\]: missing key 'kind'"),
        (lambda d: d["units"][0]["calls"][0].update(step="0"), r"units\[0\].calls\[0\].step"),
        (lambda d: d["environment"].pop("torch"), "environment: missing key 'torch'"),
        (lambda d: d["tensors"].update({"short": {}}), "'short' is no key"),
        (lambda d: d["tensors"].popitem(), "which it does not list|in the files and not"),
        (lambda d: d.update(tensors_mode="some"), "tensors_mode: expected one of full, slice, none"),
        (lambda d: d["files"][0].update(name="../../etc/passwd"), "not the name of a tensor file"),
        (lambda d: d["files"].clear(), "missing from the files"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], word: str
) -> None:
    write(tmp_path / "g")
    edit(tmp_path / "g", change, sealed=True)
    with pytest.raises(GoldenError, match=word):
        Golden.read(tmp_path / "g")


def test_every_kind_of_damage_to_files_is_named(tmp_path: Path) -> None:
    write(tmp_path / "g")
    good = contents(tmp_path / "g")
    for name, raw in good.items():
        file = tmp_path / "g" / name
        damages: dict[str, bytes | None] = {
            "gone": None,
            "empty": b"",
            "half": raw[: len(raw) // 2],
            "longer": raw + b"\0",
            "one byte less": raw[:-2],
        }
        damages |= {
            f"bit in byte {at}": raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :] for at in (0, 9, len(raw) // 2)
        }
        damages["not text"] = b"\xff" * len(raw)
        for damage, content in damages.items():
            file.unlink(missing_ok=True)
            if content is not None:
                file.write_bytes(content)
            with pytest.raises(GoldenError) as caught:
                Golden.read(tmp_path / "g")
            assert name in str(caught.value), damage
        file.write_bytes(raw)
    Golden.read(tmp_path / "g")


def test_a_file_that_changes_after_reading_is_seen(tmp_path: Path) -> None:
    names = write(tmp_path / "g")
    golden = Golden.read(tmp_path / "g")
    file = tmp_path / "g" / "tensors.safetensors"
    raw = file.read_bytes()
    place = raw.rindex(bits.as_bytes(TENSORS[3]))
    with file.open("r+b") as data:  # in place: the reader has the file mapped
        data.seek(place)
        data.write(bytes([raw[place] ^ 1]))
    with pytest.raises(GoldenError, match=r"tensors\.safetensors"):
        golden.tensor(names[3])
    assert golden.tensor(names[3], verify=False) is not None


def test_what_is_no_golden(tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match="does not exist"):
        Golden.read(tmp_path / "nothing")
    with pytest.raises(GoldenError, match=r"no manifest\.json"):
        Golden.read(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(GoldenError, match="not the manifest of a golden"):
        Golden.read(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(GoldenError, match="file"):
        Golden.read(tmp_path / "file")


def test_nothing_is_ever_unpickled() -> None:
    """Ranks of one launch exchange values through one module, which reads no file; nobody else unpickles."""
    package = Path(manifests.__file__).parents[1]
    for source in set(package.rglob("*.py")) - {package / "models/exchange.py"}:
        text = source.read_text()
        for word in ("torch" + ".load", "torch" + ".save", "import " + "pickle"):
            assert word not in text, source
