"""What a server under ``detinfer run`` says of itself: every completion carries the fingerprint, and nothing else changes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer.fingerprint import Fingerprint
from detinfer.policy import Policy
from detinfer.run import served

MARK = Fingerprint({"policy": {"scope": "batch"}})
NAME = str(MARK)
COMPLETION = {"object": "chat.completion", "choices": [{"message": {"content": "café\n"}}]}


def asked(
    headers: list[tuple[bytes, bytes]],
    parts: list[bytes],
    path: str = "/v1/chat/completions",
    captured: tuple[Fingerprint | None, ...] = (MARK,),
) -> Any:
    """(status, headers, parts of the body) of an application's answer through ``Marked``."""
    found: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 201, "headers": headers})
        for number, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": number + 1 < len(parts)})

    async def send(message: dict[str, Any]) -> None:
        found.append(message)

    scope = {"type": "http", "path": path, "method": "GET"}
    marks = iter(captured)
    asyncio.run(served.Marked(app, lambda: next(marks))(scope, None, send))
    start, *rest = found
    assert [one.get("more_body", False) for one in rest] == [True] * (len(rest) - 1) + [False]
    return start["status"], dict(start["headers"]), [one["body"] for one in rest]


@pytest.mark.parametrize("cut", [1, 7, 10_000])
@pytest.mark.parametrize(("own", "name"), [(None, NAME), ("", NAME), ("fp_7", f"fp_7+{NAME}")])
def test_an_answer(cut: int, own: str | None, name: str) -> None:
    """In one piece or many: the same JSON with the name, its length said."""
    body = json.dumps(COMPLETION if own is None else {**COMPLETION, "system_fingerprint": own}).encode()
    parts = [body[at : at + cut] for at in range(0, len(body), cut)]
    kind = [(b"content-type", b"application/json; charset=utf-8"), (b"Content-Length", b"%d" % len(body))]
    status, headers, (answer,) = asked([*kind, (b"x-own", b"kept")], parts)
    assert (status, headers[b"x-own"]) == (201, b"kept")
    assert headers[b"content-length"] == b"%d" % len(answer) and b"Content-Length" not in headers
    assert json.loads(answer) == {**COMPLETION, "system_fingerprint": name}


@pytest.mark.parametrize("cut", [1, 16, 10_000])
def test_a_stream(cut: int) -> None:
    """Event by event, wherever it is cut; events that are none of a completion as they were."""
    chunk = {"object": "chat.completion.chunk", "system_fingerprint": "", "choices": [{"delta": {"content": "é"}}]}
    other = b': ping\n\ndata: {"object": "error"}\n\n'
    body = b"data: " + json.dumps(chunk).encode() + b"\n\n" + other + b"data: [DONE]"
    parts = [body[at : at + cut] for at in range(0, len(body), cut)]
    _, _, said = asked([(b"content-type", b"text/event-stream")], parts)
    assert len(said) == len(parts), "nothing waits for the end"
    first, rest = b"".join(said).split(b"\n\n", 1)
    assert json.loads(first[5:]) == {**chunk, "system_fingerprint": NAME}
    assert rest == other + b"data: [DONE]"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ([(b"content-type", b"application/json")], b'{"object":  "list", "data": []}'),
        ([(b"content-type", b"application/json")], b'[{"object": "chat.completion"}]'),
        ([(b"content-type", b"application/json")], b"not json"),
        ([(b"content-type", b"text/html")], b'{"object": "chat.completion"}'),
        ([(b"content-type", b"application/json"), (b"content-encoding", b"gzip")], b'{"object": "chat.completion"}'),
        ([], b'{"object": "chat.completion"}'),
    ],
)
def test_what_is_no_completion_stays_as_it_is(kind: list[tuple[bytes, bytes]], body: bytes) -> None:
    """Byte by byte."""
    assert b"".join(asked(kind, [body])[2]) == body


def test_the_whole_fingerprint_has_a_place() -> None:
    """Whatever the application has there."""
    status, _, (body,) = asked([], [b"its own"], served.PLACE)
    assert (status, json.loads(body)) == (200, MARK.to_json())


def test_a_process_without_the_model_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU's machine, until the GPU is used here: answers as they are, and then marked."""
    kind, body = [(b"content-type", b"application/json")], json.dumps(COMPLETION).encode()
    assert asked(kind, [body], captured=(None, None))[2] == [body]
    assert json.loads(asked(kind, [body], captured=(None, MARK))[2][0])["system_fingerprint"] == NAME
    assert asked([], [b"its own"], served.PLACE, (None, None))[2] == [b"its own"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert served.captured(Policy()) is None


CONFIG = """
class Config:
    def __init__(self, app):
        self.app = app

    def load(self):
        self.loaded_app = self.app
"""

PROGRAM = """
import asyncio, json, sys
{imports}
from uvicorn.config import Config

async def app(scope, receive, send):
    await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}})
    await send({{"type": "http.response.body", "body": b'{{"object": "text_completion"}}'}})

async def send(message):
    print(message.get("body", b"").decode(), end="")

config = Config(app)
config.load()
asyncio.run(config.loaded_app({{"type": "http", "path": "/v1/completions", "method": "POST"}}, None, send))
"""


@pytest.mark.parametrize("imports", ["import torch, uvicorn.config", "import uvicorn.config, torch", "import json"])
def test_whatever_is_imported_first(imports: str, tmp_path: Path) -> None:
    """uvicorn before torch or after it; a server that never imports torch is left alone. It is not loaded for its sake."""
    (tmp_path / "uvicorn").mkdir()
    (tmp_path / "uvicorn/__init__.py").touch()
    (tmp_path / "uvicorn/config.py").write_text(CONFIG)
    (tmp_path / "server.py").write_text(PROGRAM.format(imports=imports))
    command = [sys.executable, "-m", "detinfer", "run", "--", sys.executable, "server.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    answer = json.loads(done.stdout)
    if "torch" in imports:
        assert done.returncode == 0, done.stderr
        assert answer["system_fingerprint"].startswith("di1-batch-")
    else:
        assert (done.returncode, answer) == (5, {"object": "text_completion"}), done.stderr
