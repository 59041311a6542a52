"""The AITER adapter: its table of versions against sources, and its bytes over communicators that behave as AITER's."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiter_standin
import numpy as np
import pytest
import torch

from detinfer.collectives import aiter_versions, connect
from detinfer.collectives.aiter import Aiter, Declined, Way, decide_way, parameters, recognise, render
from detinfer.collectives.stress import cancelling
from detinfer.errors import RefusedError
from detinfer.reference.all_reduce import all_reduce as reference

KiB, MiB = 1024, 1024 * 1024
WHEEL, AUGUST = aiter_versions.WHEEL, aiter_versions.AUGUST_2026
STANDINS = {WHEEL.name: aiter_standin.Wheel, AUGUST.name: aiter_standin.August}
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16

# What ROCm/aiter has at e4048607a535 (custom_all_reduce.py, class CustomAllreduce), as recorded from its source.
RECORDED = {
    "capture": "",
    "should_custom_ar": "inp, prefill_support=False",
    "should_custom_ar_bytes": "inp, prefill_support=False",
    "should_custom_ag": "inp",
    "all_reduce": "inp, *, out=None, use_new=True, open_fp8_quant=False, registered_input=False",
    "custom_all_reduce": "input, use_new=True, open_fp8_quant=False",
    "should_custom_rs": "inp, dim",
    "reduce_scatter": "inp, out, dim=0, *, registered=False",
    "custom_reduce_scatter": "input, output, dim=0",
    "all_gather_reg": "inp, out=None, dim=0",
    "all_gather_unreg": "inp, out=None, dim=0",
    "custom_all_gather": "inp, dim=0",
    "fused_ar_rms": "inp, res_inp, *, res_out=None, out=None, scale_out=None, w, eps, registered=False, use_1stage=False, "
    "post_per_token_quant=False, out_hidden_dim=0, gemma_norm=False, emit_bf16=False",
    "custom_fused_ar_rms": "input, residual_inp, weight, eps, use_1stage, out_hidden_dim=0, gemma_norm=False",
    "close": "",
}


@pytest.fixture(scope="module")
def wheel() -> zipfile.ZipFile:
    """The wheel of amd-aiter, downloaded once into the cache of this machine; its code is read and never imported."""
    version = WHEEL.name
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "detinfer-tests" / f"amd-aiter-{version}"
    found = list(cache.glob("*.whl"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(cache)]
        try:
            done = subprocess.run([*command, f"amd-aiter=={version}"], capture_output=True, text=True, timeout=120)
            problem = done.stderr.strip()[-300:]
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        found = list(cache.glob("*.whl"))
        if not found:
            pytest.skip(f"amd-aiter {version} (40 MB) could not be downloaded: {problem}")
    return zipfile.ZipFile(found[0])


def methods(source: str) -> dict[str, str]:
    """Each method of ``class CustomAllreduce`` and its parameters, as ``parameters`` writes them."""
    kinds = inspect.Parameter
    (kind,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    found = {}
    for node in (part for part in kind.body if isinstance(part, ast.FunctionDef)):
        positional = node.args.args[1:]
        defaults = [kinds.empty] * (len(positional) - len(node.args.defaults)) + [
            ast.literal_eval(default) for default in node.args.defaults if isinstance(default, ast.Constant)
        ]
        words: list[tuple[str, Any, Any]] = [
            (argument.arg, kinds.POSITIONAL_OR_KEYWORD, default)
            for argument, default in zip(positional, defaults, strict=False)
        ]
        words += [
            (argument.arg, kinds.KEYWORD_ONLY, kinds.empty if default is None else ast.literal_eval(default))
            for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        ]
        found[node.name] = render(words)
    return found


def test_the_wheel_has_these_methods(wheel: zipfile.ZipFile) -> None:
    """Every method in the table is in the wheel with these parameters; those that only a later version has are not."""
    found = methods(wheel.read("aiter/dist/device_communicators/custom_all_reduce.py").decode())
    assert {name: found.get(name) for name in WHEEL.signatures} == dict(WHEEL.signatures)
    assert not set(AUGUST.signatures) - set(WHEEL.signatures) & set(found)
    assert not {"should_custom_ag", "reduce_scatter", "should_custom_rs"} & set(found)


def test_the_wheel_chooses_kernels_as_the_table_says(wheel: zipfile.ZipFile) -> None:
    """The thresholds, the rotation of the two-stage kernel and the order of results stand in the wheel's sources."""
    header = wheel.read("aiter_meta/csrc/include/custom_all_reduce.cuh").decode()
    assert "(world_size_ <= 4 && bytes < 160 * 1024) || (world_size_ <= 8 && bytes < 80 * 1024)" in header
    assert [window.below for window in WHEEL.windows] == [None, 160 * KiB, 80 * KiB]
    two_stages = header.partition("cross_device_reduce_2stage(")[2].partition("__global__")[0]
    assert "int target = (rank + i) % ngpus;" in two_stages
    one_stage = header.partition("cross_device_reduce_1stage(")[2].partition("__global__")[0]
    assert "for (int i = 1; i < ngpus; ++i)" in one_stage and "% ngpus" not in one_stage
    python = wheel.read("aiter/dist/device_communicators/custom_all_reduce.py").decode()
    assert "return res_out, out" in python and WHEEL.fused_returns == ("residual", "norm")
    assert "max_size=8192 * 1024 * 8" in python


def test_the_recorded_commit() -> None:
    """The table of the commit is what was recorded from it."""
    assert dict(AUGUST.signatures) == RECORDED


def test_standins_have_the_signatures() -> None:
    """Each stand-in is recognised as its version, and a changed method makes it unknown."""
    for version in (WHEEL, AUGUST):
        standin = STANDINS[version.name]
        assert {name: parameters(getattr(standin, name)) for name in version.signatures} == dict(version.signatures)
        assert recognise(object.__new__(standin)) is version

    class Later(aiter_standin.August):
        def all_reduce(self, inp, *, out=None, use_new=False, open_fp8_quant=False, registered_input=False):  # type: ignore[no-untyped-def]
            return out

    class Between(aiter_standin.Wheel):
        def should_custom_ag(self, inp):  # type: ignore[no-untyped-def]
            return True

    for odd, method in ((Later, "all_reduce"), (Between, "should_custom_ag")):
        found = recognise(object.__new__(odd))
        assert isinstance(found, Declined) and method in found.reason and "ordered_gather" in found.reason


TABLE = [
    # version, collective, bytes, dtype, world -> (kernel, pieces), or words of the reason
    (WHEEL, "all_reduce", 64 * MiB, bf16, 2, ("1stage", 1)),
    (WHEEL, "all_reduce", 160 * KiB - 16, bf16, 4, ("1stage", 1)),
    (WHEEL, "all_reduce", 160 * KiB, bf16, 4, ("1stage", 2)),
    (WHEEL, "all_reduce", 80 * KiB - 16, f16, 8, ("1stage", 1)),
    (WHEEL, "all_reduce", 80 * KiB, f16, 8, ("1stage", 2)),
    (WHEEL, "all_reduce", 80 * KiB, f32, 6, ("1stage", 2)),
    (WHEEL, "all_reduce", 1 * MiB, bf16, 8, ("1stage", 13)),
    (WHEEL, "all_reduce", 2 * MiB, bf16, 8, "two-stage kernel"),
    (AUGUST, "all_reduce", 160 * KiB, bf16, 4, ("1stage_naive", 1)),
    (AUGUST, "all_reduce", 512 * KiB, bf16, 4, ("1stage_naive", 2)),
    (AUGUST, "all_reduce", 80 * KiB - 16, bf16, 8, ("1stage", 1)),
    (AUGUST, "all_reduce", 80 * KiB, bf16, 8, ("1stage_naive", 1)),
    (AUGUST, "all_reduce", 1 * KiB, bf16, 6, ("1stage_naive", 1)),  # never the 1-stage kernel that reads a 7th rank
    (AUGUST, "all_reduce", 8 * MiB, bf16, 8, "two-stage kernel"),
    (WHEEL, "all_reduce", 24, f32, 2, "multiples of 16"),
    (WHEEL, "all_reduce", 1024, torch.float64, 2, "not float64"),
    (WHEEL, "all_reduce", 1024, bf16, 3, "3 ranks"),
    (WHEEL, "all_gather", 1024, torch.int64, 8, ("all_gather_unreg", 1)),
    (WHEEL, "all_gather", 1024, bf16, 6, "6 ranks"),
    (WHEEL, "all_gather", 64 * MiB + 16, bf16, 8, "more than"),
    (AUGUST, "all_gather", 4 * MiB + 16, bf16, 8, "more than"),
    (WHEEL, "all_reduce_rms_norm", 1024, bf16, 8, "has no use_1stage"),
    (AUGUST, "all_reduce_rms_norm", 1024, bf16, 8, ("fused_1stage", 1)),
    (AUGUST, "all_reduce_rms_norm", 1024, bf16, 6, "6 ranks"),
    (WHEEL, "broadcast", 1024, bf16, 8, "has no broadcast"),
]


@pytest.mark.parametrize(("version", "collective", "nbytes", "dtype", "world", "expected"), TABLE)
def test_ways(version: Any, collective: str, nbytes: int, dtype: torch.dtype, world: int, expected: Any) -> None:
    """Which kernel in how many pieces, or why not: a wrong comparison at a boundary changes a row."""
    found = decide_way(version, collective, nbytes, dtype, world)
    if isinstance(expected, str):
        assert isinstance(found, Declined) and expected in found.reason
    else:
        assert isinstance(found, Way) and (found.kernel, found.pieces) == expected


def test_gpus_with_other_kernels() -> None:
    """gfx942 has a two-stage kernel in rank order for large tensors between 8 ranks; gfx1250 has ones that rotate."""
    found = decide_way(AUGUST, "all_reduce", 8 * MiB, bf16, 8, arch="gfx942")
    assert isinstance(found, Way) and (found.kernel, found.pieces) == ("2stage_write_mode", 1)
    # At 4 MiB it does not run yet, and 16 pieces of less than 256 KiB do not reach that far.
    assert isinstance(decide_way(AUGUST, "all_reduce", 4 * MiB, bf16, 8, arch="gfx942"), Declined)
    assert isinstance(decide_way(AUGUST, "all_reduce", 1024, bf16, 4, arch="gfx1250"), Declined)


def together(standin: Any, size: int, work: Any, **options: Any) -> list[Any]:
    """``work(communicator of AITER's kind)`` on ``size`` threads that are ranks."""
    name = f"aiter-{os.getpid()}-{standin.__name__}-{size}-{np.random.default_rng().integers(1 << 60)}"

    def rank(number: int) -> Any:
        with connect(name=name, rank=number, size=size) as ranks:
            return work(standin(ranks, **options))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


def tensor(bits: np.ndarray, dtype: str) -> torch.Tensor:
    """Stored bits as a tensor."""
    return torch.from_numpy(bits.view(np.uint8).copy()).view(getattr(torch, dtype))


def stored(result: torch.Tensor) -> bytes:
    """A tensor's bytes."""
    return result.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("standin", STANDINS.values())
@pytest.mark.parametrize("size", [2, 4, 6, 8])
def test_sums_have_the_reference_bytes(standin: Any, size: int) -> None:
    """Below, at and above AITER's thresholds, on every rank; AITER's own call above them gives other bytes."""
    limit = {2: 160, 4: 160, 6: 80, 8: 80}[size] * KiB
    for dtype, nbytes in (("float32", 4096), ("float32", limit - 16), ("float32", limit), ("bfloat16", 3 * limit + 48)):
        width = getattr(torch, dtype).itemsize
        parts = cancelling(size, nbytes // width, dtype)  # type: ignore[arg-type]
        whole = reference(parts, dtype).tobytes()  # type: ignore[arg-type]

        def work(communicator: Any, parts: Any = parts, dtype: str = dtype) -> Any:
            own = tensor(parts[communicator.rank], dtype)
            with communicator.capture():  # warm-up: AITER's own wrapper gives zeros
                zeros = communicator.custom_all_reduce(own)
                warm = Aiter(communicator, "gfx950").all_reduce(own)
            direct = communicator.all_reduce(own)
            communicator.ran.clear()
            ours = Aiter(communicator, "gfx950").all_reduce(own.view(-1, 4))
            slices = Aiter(communicator, "gfx950").reduce_scatter(own[: len(own) // size * size].view(size, -1)[:, :16])
            return zeros, warm, direct, ours.reshape(-1), communicator.ran, slices

        found = together(standin, size, work)
        for rank, (zeros, warm, _, ours, ran, slices) in enumerate(found):
            assert stored(ours) == whole and stored(warm) == whole, (dtype, nbytes, rank)
            assert set(ran) == {"1stage"}
            assert not zeros.any()
            rows = [part[: len(part) // size * size].reshape(size, -1)[:, :16] for part in parts]
            assert stored(slices) == reference(rows, dtype)[rank].tobytes()  # type: ignore[arg-type]
        rotated = reference([*parts[1:], parts[0]], dtype).tobytes()  # type: ignore[arg-type]
        assert size == 2 or rotated != whole
        if nbytes >= limit and size > 2:
            assert all(stored(direct) != whole for _, _, direct, *_ in found)


@pytest.mark.parametrize("standin", STANDINS.values())
def test_gathers_copy_bytes(standin: Any) -> None:
    """Of any dtype, along any dimension, also where AITER's own wrapper returns zeros of the wrong shape."""
    random = np.random.default_rng(5)
    parts = [random.integers(0, 256, (6, 4, 8), np.uint8) for _ in range(4)]

    def work(communicator: Any) -> Any:
        own = torch.from_numpy(parts[communicator.rank].copy()).view(torch.int64)
        with communicator.capture():
            return [Aiter(communicator, "").all_gather(own.squeeze(-1), dim) for dim in (0, 1)]

    for first, second in together(standin, 4, work):
        assert stored(first) == np.concatenate(parts, 0).tobytes()
        assert stored(second) == np.concatenate(parts, 1).tobytes()


def test_the_fused_kernel() -> None:
    """Forced to one stage at every size where the version can, its results named; declined where it cannot."""

    def fused(communicator: Any) -> Any:
        rank = communicator.rank
        x = torch.full((600, 256), float(rank + 1))
        try:
            return Aiter(communicator, "").all_reduce_rms_norm(
                x, torch.ones(600, 256), torch.ones(256), 1e-6
            ), communicator.ran
        except RefusedError as error:
            return str(error), communicator.ran

    for (norm, residual), ran in together(aiter_standin.August, 2, fused):
        assert ran == ["fused_1stage"]
        assert stored(residual) == stored(torch.full((600, 256), 4.0)) and float(norm.max()) < 1.01
    for message, ran in together(aiter_standin.Wheel, 2, fused):
        assert "has no use_1stage" in message and ran == []


def test_refusals() -> None:
    """A disabled communicator, a size that the environment excludes, a stale version: said, and nothing runs."""

    def work(communicator: Any) -> Any:
        messages = []
        communicator.smallest = 4096
        adapter = Aiter(communicator, "")
        for call in (
            lambda: adapter.all_reduce(torch.zeros(256)),
            lambda: adapter.all_reduce(torch.zeros(3)),
            lambda: adapter.reduce_scatter(torch.zeros(7, 4)),
        ):
            with pytest.raises(RefusedError) as caught:
                call()
            messages.append(str(caught.value))
        communicator.close()
        with pytest.raises(RefusedError, match="disabled"):
            Aiter(communicator, "")
        return messages, communicator.ran

    for messages, ran in together(aiter_standin.August, 2, work):
        assert "AITER_CUSTOM_AR_MIN_SIZE" in messages[0]
        assert "multiples of 16 bytes" in messages[1]
        assert "not 2 equal slices" in messages[2]
        assert ran == []


def test_nan_is_canonical() -> None:
    """A NaN of any payload comes out as the contract's, whatever the hardware stores."""

    class Odd(aiter_standin.Wheel):
        def all_reduce(self, inp, *, out=None, open_fp8_quant=False, registered=False):  # type: ignore[no-untyped-def]
            out.copy_(inp).view(torch.int32)[::2] = 0x7FC00123
            return out

    def work(communicator: Any) -> torch.Tensor:
        return Aiter(communicator, "").all_reduce(torch.ones(8))

    for result in together(Odd, 2, work):
        assert result.view(torch.int32).tolist() == [0x7FFFFFFF, 0x3F800000] * 4
