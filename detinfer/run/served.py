"""In a server under ``detinfer run``: the fingerprint of its process, in every answer and at a place of its own.

Whatever serves over uvicorn (transformers serve, vLLM, SGLang) makes a ``uvicorn.Config``; the application that it loads is put
inside ``Marked``. OpenAI's field for it is ``system_fingerprint`` (API reference, chat completions: it changes with what "might
impact determinism"). https://asgi.readthedocs.io/en/latest/specs/www.html for the messages.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import torch

from detinfer.policy.policy import Policy

if TYPE_CHECKING:
    from detinfer.fingerprint import Fingerprint

PLACE = "/detinfer/fingerprint"
"""Where the whole fingerprint is, as JSON."""
OBJECTS = ("chat.completion", "chat.completion.chunk", "text_completion", "text_completion.chunk", "completion")
"""The field ``object`` of answers that have a ``system_fingerprint``."""

Message = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]


class Marked:
    """An ASGI application whose completions carry a fingerprint: what ``capture`` gives, asked until it gives one."""

    def __init__(self, app: Any, capture: Callable[[], Fingerprint | None]) -> None:
        self._app, self._capture = app, capture
        self._found: Fingerprint | None = capture()

    def name(self) -> str | None:
        """The fingerprint's name; None while there is none."""
        if self._found is None:
            self._found = self._capture()
        return None if self._found is None else str(self._found)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        """Answer a request for the fingerprint, or hand the request on and mark what comes back."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] == PLACE and scope["method"] == "GET" and self.name() is not None:
            assert self._found is not None
            whole = json.dumps(self._found.to_json(), sort_keys=True).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(whole))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": whole})
        else:
            await self._app(scope, receive, _Answer(send, self.name))


class _Answer:
    """The answer to one request on its way out: JSON is held until it is whole, a stream goes event by event."""

    def __init__(self, send: Send, name: Callable[[], str | None]) -> None:
        self._send, self._name = send, name
        self._start: Message | None = None
        self._held = b""
        self._kind = ""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = {bytes(key).lower(): bytes(value) for key, value in message.get("headers", ())}
            packed = headers.get(b"content-encoding", b"identity") != b"identity"
            self._kind = "" if packed else headers.get(b"content-type", b"").partition(b";")[0].decode("latin-1")
            if self._kind == "application/json":
                self._start = message
                return
        elif message["type"] == "http.response.body" and self._kind == "application/json":
            self._held += message.get("body", b"")
            if message.get("more_body", False):
                return
            body = marked(self._held, self._name)
            assert self._start is not None
            headers_ = [(k, v) for k, v in self._start.get("headers", ()) if bytes(k).lower() != b"content-length"]
            await self._send({**self._start, "headers": [*headers_, (b"content-length", b"%d" % len(body))]})
            message = {"type": "http.response.body", "body": body}
        elif message["type"] == "http.response.body" and self._kind == "text/event-stream":
            whole, mark, self._held = (self._held + message.get("body", b"")).rpartition(b"\n")
            if not message.get("more_body", False):
                whole, mark, self._held = whole + mark + self._held, b"", b""
            message = {**message, "body": b"\n".join(_line(one, self._name) for one in whole.split(b"\n")) + mark}
        await self._send(message)


def _line(line: bytes, name: Callable[[], str | None]) -> bytes:
    """A line of a stream of server-sent events, marked where it is a completion."""
    if not line.startswith(b"data:"):
        return line
    body = line[5:].strip()
    return line if (found := marked(body, name)) == body else b"data: " + found


def marked(body: bytes, name: Callable[[], str | None]) -> bytes:
    """The JSON of a completion with a name in ``system_fingerprint``, after the server's own; anything else as it is."""
    try:
        held = json.loads(body)
    except ValueError:
        return body
    if not isinstance(held, dict) or held.get("object") not in OBJECTS:
        return body
    if (here := name()) is None:
        return body
    own = held.get("system_fingerprint")
    held["system_fingerprint"] = f"{own}+{here}" if own else here
    return json.dumps(held, ensure_ascii=False, separators=(",", ":")).encode()


def mark(module: Any, policy: Policy) -> None:
    """Have every ``Config`` of ``module`` (``uvicorn.config``) mark what it serves; makes every proof when one is loaded."""
    load = module.Config.load
    if getattr(load, "__wrapped__", None) is not None:
        return

    @functools.wraps(load)
    def loading(self: Any) -> Any:
        found = load(self)
        self.loaded_app = Marked(self.loaded_app, lambda: captured(policy))
        return found

    module.Config.load = loading


def captured(policy: Policy) -> Fingerprint | None:
    """This process's fingerprint; None on a machine with a GPU that this process does not use.

    There the model is in another process (an engine's worker), or not loaded yet, and to ask the GPU here would take
    memory from the one that has it.
    """
    if torch.cuda.is_available() and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    from detinfer import fingerprint

    return fingerprint.capture(policy)
