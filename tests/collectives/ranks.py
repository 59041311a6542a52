"""Processes that are ranks: each executes methods of its communicators by name and sends back what they gave.

One set of processes serves all tests of a file: they are forked from a server that has torch imported.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from detinfer.errors import DetinferError

HERE = os.path.dirname(os.path.abspath(__file__))
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["detinfer.collectives", "detinfer.ops.rows", "numpy"])


@dataclass(frozen=True)
class Tensor:
    """A tensor by its stored bits: how it lies in memory is ``layout``."""

    bits: Any
    dtype: str
    layout: str = "dense"


@dataclass(frozen=True)
class Call:
    """A method of the communicator ``on`` and its arguments; those that are Tensor become torch tensors."""

    method: str
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    on: str = "main"


def laid_out(tensor: Tensor) -> Any:
    """The torch tensor of these bits, in the layout that is asked for."""
    import torch

    dtype = getattr(torch, tensor.dtype)
    signed = np.ascontiguousarray(tensor.bits).copy()
    whole = torch.from_numpy(signed.reshape(-1).view(np.uint8)).view(dtype).reshape(signed.shape)
    if tensor.layout == "offset":  # starts in the middle of a larger one, off by one element
        room = torch.zeros(whole.numel() + 5, dtype=dtype)
        room[3 : 3 + whole.numel()] = whole.reshape(-1)
        return room[3 : 3 + whole.numel()].reshape(whole.shape)
    if tensor.layout == "strided":  # every third element
        room = torch.zeros([*whole.shape, 3], dtype=dtype)
        room[..., 1] = whole
        return room[..., 1]
    if tensor.layout == "transposed":  # weakly contiguous: dense, but not in row-major order
        return whole.t().contiguous().t()
    if tensor.layout == "expanded":  # one row, seen several times
        return whole[:1].expand(whole.shape)
    return whole


def plain(value: Any) -> Any:
    """Tensors as arrays of unsigned integers, which keep every bit on the way to the parent."""
    import torch

    if isinstance(value, tuple):
        return tuple(plain(part) for part in value)
    if isinstance(value, torch.Tensor):
        kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}.get(value.element_size(), np.uint8)
        flat = value.contiguous().reshape(-1).view(torch.uint8).numpy().view(kind)
        return flat.reshape([*value.shape, -1] if kind is np.uint8 and value.element_size() > 8 else value.shape)
    return value


def _execute(call: Call, communicators: dict[str, Any]) -> Any:
    import torch

    from detinfer.collectives import connect

    if call.method == "connect":
        communicators[call.on] = connect(*call.arguments, **call.options)
        return None
    if call.method == "sleep":
        time.sleep(call.arguments[0])
        return None
    if call.method == "init_process_group":
        torch.distributed.init_process_group("gloo", **call.options)
        return None
    if call.method == "hold_isa":
        from detinfer import native

        native.check(native.library().detinfer_cpu_select(call.arguments[0].encode()))
        return None
    if call.method == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if call.method == "exit":
        os._exit(0)
    arguments = [laid_out(a) if isinstance(a, Tensor) else a for a in call.arguments]
    options = dict(call.options)
    if options.get("out") == "same":
        options["out"] = arguments[0]
    elif options.get("out") == "overlapping":
        n = arguments[0].numel()
        room = torch.zeros(n + 1, dtype=arguments[0].dtype)
        room[:n] = arguments[0]
        arguments[0], options["out"] = room[:n], room[1:]
    elif options.get("out") == "strided":
        options["out"] = torch.zeros([*arguments[0].shape, 2], dtype=arguments[0].dtype)[..., 0]
    name = call.method.removeprefix("compiled ")
    method = getattr(communicators[call.on], name)
    if name != call.method:  # a graph whose inputs and results the collective does not see as they are
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, *a, **o: method(x.neg().neg(), *a, **o), backend="aot_eager", fullgraph=True)
        result = compiled(*arguments, **options)
    else:
        result = method(*arguments, **options)
    if "out" in options:
        assert result is options["out"]
    return plain(result)


def serve(pipe: Connection) -> None:
    """Execute lists of calls until the pipe closes; a call that raises one of detinfer's errors gives that error."""
    import torch

    torch.set_num_threads(1)
    communicators: dict[str, Any] = {}
    while True:
        try:
            calls = pipe.recv()
        except EOFError:
            return
        results: list[Any] = []
        for call in calls:
            start = time.monotonic()
            try:
                results.append(_execute(call, communicators))
            except DetinferError as error:
                results.append((type(error).__name__, str(error), time.monotonic() - start))
            except Exception:  # whatever it is, it crosses to the test, which compares it with what it expects
                results.append(("Exception", traceback.format_exc(), 0.0))
        pipe.send(results)


def _answer(pipe: Connection) -> list[Any]:
    try:
        return pipe.recv() if pipe.poll(100) else [("Hang", "no answer within 100 s", 100.0)]  # type: ignore[no-any-return]
    except (EOFError, ConnectionError):
        return [("Dead", "", 0.0)]


class Ranks:
    """``size`` processes that serve calls."""

    def __init__(self, size: int) -> None:
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        for _ in range(size):
            ours, theirs = SERVER.Pipe()
            process = SERVER.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, calls: Sequence[Sequence[Call]]) -> list[list[Any]]:
        """``calls[r]`` one after the other on process r, all processes at once; what each call gave."""
        for pipe, own in zip(self.pipes, calls, strict=False):
            pipe.send(list(own))
        return [_answer(pipe) for pipe, _ in zip(self.pipes, calls, strict=False)]

    def connect(self, size: int, on: str, **options: Any) -> list[Any]:
        """Processes 0 to size - 1 connect under the name ``on``; what each got: None, or its error."""
        name = f"test-{os.getpid()}-{id(self)}-{on}"
        calls = [[Call("connect", (), {"name": name, "rank": r, "size": size, **options}, on)] for r in range(size)]
        return [results[0] for results in self.run(calls)]

    def close(self) -> None:
        """End all processes."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.close()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
