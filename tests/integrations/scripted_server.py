"""A small server that speaks SGLang's and OpenAI's APIs and misbehaves as it is told.

Its model is a hash: the next token and its log-probability follow from all tokens before. ``Script`` says when they do not.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np


@dataclass
class Script:
    """What goes wrong. Numbers of attempts count requests that generate, from 0, after the first ``after``."""

    api: str = "sglang"
    lists: bool = True
    batch_from: int | None = None  # items of a request from which on log-probabilities differ
    crowd_from: int | None = None  # requests in flight from which on they do
    position_from: int | None = None  # positions in a request that differ
    cache_differs: bool = False
    cache_text: bool = False  # a cached prefix changes the text, not the log-probability alone
    decode_differs: bool = False
    only_with: str | None = None  # the faults above show only for requests with this field
    constant: bool = False
    empty: bool = False
    logprobs: bool = True
    caches: bool = True
    flushes: bool = True
    fault: str | None = None  # timeout, 500, disconnect, truncated, fewer, malformed, drip
    after: int = 0
    times: int = 1 << 30
    seconds: float = 0.0
    fingerprint: str | None = None  # the system_fingerprint of every completion


@dataclass
class State:
    """What the server remembers, and what a test may look at."""

    script: Script
    cached: list[tuple[int, ...]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    attempts: int = 0
    flying: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def tokens_of(prompt: str | Sequence[int]) -> tuple[int, ...]:
    """Token ids: a word is one token."""
    if isinstance(prompt, str):
        return tuple(100 + _number(word) % 5000 for word in prompt.split())
    return tuple(prompt)


def _number(value: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "little")


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _logprob(before: Sequence[int], token: int) -> float:
    return float(np.float32(-(_number((tuple(before), token)) % (1 << 20)) / 150_000.0))


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    state: State
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        script = self.state.script
        if self.path == "/get_model_info" and script.api == "sglang":
            self._reply({"model_path": "hash"})
        elif self.path == "/detinfer/fingerprint" and (script.fingerprint or "").startswith("di"):
            self._reply({"fingerprint": script.fingerprint})
        elif self.path == "/v1/models" and script.api != "sglang":
            self._reply({"data": [{"id": "hash"}]})
        else:
            self._reply({"error": "not here"}, 404)

    def do_POST(self) -> None:
        state, script = self.state, self.state.script
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        route = self.path.partition("?")[0]
        if route in ("/flush_cache", "/reset_prefix_cache"):
            if script.flushes:
                state.cached.clear()
            self._reply({}, 200 if script.flushes else 404)
            return
        body = json.loads(raw)
        with state.lock:
            number = state.attempts - script.after
            state.attempts += 1
            state.flying += 1
            state.bodies.append(body)
        try:
            time.sleep(script.seconds)
            if script.fault and 0 <= number < script.times and not self._go_wrong(script.fault):
                return
            fewer = script.fault == "fewer" and 0 <= number < script.times
            answer = {
                "/generate": self._generate,
                "/v1/completions": self._complete,
                "/v1/chat/completions": self._chat,
            }
            self._reply(*answer[route](body, fewer))
        finally:
            with state.lock:
                state.flying -= 1

    def _go_wrong(self, fault: str) -> bool:
        """Whether there is still an answer to be given."""
        if fault == "timeout":
            time.sleep(0.6)
        elif fault == "500":
            self._reply({"error": "out of memory"}, 500)
        elif fault == "disconnect":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "truncated":
            self.close_connection = True
            self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n[{"text": "a')
        elif fault == "malformed":
            self.close_connection = True
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>")
        elif fault == "drip":
            self.close_connection = True
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n")
            for _ in range(20):
                time.sleep(0.05)
                self.wfile.write(b" ")
                self.wfile.flush()
        else:
            return True
        return False

    def _reply(self, held: Any, status: int = 200) -> None:
        raw = held if isinstance(held, bytes) else json.dumps(held).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)
        except OSError:  # the client has left
            self.close_connection = True

    def _one(self, prompt: Any, body: dict[str, Any], count: int, position: int, size: int) -> dict[str, Any]:
        """Generate ``count`` tokens for one prompt of a request of ``size``."""
        state, script = self.state, self.state.script
        asked = tokens_of(prompt)
        known = [_common(one, asked) for one in state.cached] if script.caches else []
        cached = min(max(known, default=0), len(asked) - 1)
        on = script.only_with is None or script.only_with in body
        wrong = on and (
            (script.batch_from is not None and size >= script.batch_from)
            or (script.crowd_from is not None and state.flying >= script.crowd_from)
            or (script.position_from is not None and position >= script.position_from)
            or (script.cache_differs and cached > 0)
        )
        held, logprobs = list(asked), []
        for _ in range(0 if script.empty else count):
            token = 7 if script.constant else 100 + _number(tuple(held)) % 5000
            value = -1.5 if script.constant else _logprob(held, token)
            if wrong or (script.decode_differs and len(held) > len(asked)):
                value = float(np.nextafter(np.float32(value), np.float32(0)))
            logprobs.append(value)
            held.append(token)
        new = held[len(asked) :]
        if wrong and script.cache_text and new:
            new[-1] += 1
        with state.lock:
            state.cached.append(tuple(held))
        before = [None, *(_logprob(asked[:at], asked[at]) for at in range(1, len(asked)))]
        text = "".join(f" w{token}" for token in new)
        return {"text": text, "new": new, "logprobs": logprobs, "asked": asked, "before": before, "cached": cached}

    def _generate(self, body: dict[str, Any], fewer: bool) -> tuple[Any, int]:
        prompts = body.get("text") or body["input_ids"]
        count = body["sampling_params"]["max_new_tokens"]
        found = []
        for position, prompt in enumerate(prompts):
            one = self._one(prompt, body, count, position, len(prompts))
            meta: dict[str, Any] = {"prompt_tokens": len(one["asked"]), "cached_tokens": one["cached"]}
            if body["return_logprob"] and self.state.script.logprobs:
                meta["output_token_logprobs"] = [[v, t, None] for v, t in zip(one["logprobs"], one["new"], strict=True)]
                if body.get("logprob_start_len") == 0:
                    pairs = zip(one["before"], one["asked"], strict=True)
                    meta["input_token_logprobs"] = [[v, t, None] for v, t in pairs]
            found.append({"text": one["text"], "output_ids": one["new"], "meta_info": meta})
        found = found[:-1] if fewer else found
        if body["stream"]:
            events = [json.dumps({**item, "index": index}) for index, item in enumerate(found)]
            return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode(), 200
        return found, 200

    def _complete(self, body: dict[str, Any], fewer: bool) -> tuple[Any, int]:
        prompts = body["prompt"]
        several = isinstance(prompts, list) and not (prompts and isinstance(prompts[0], int))
        if not self.state.script.lists and not isinstance(prompts, str):
            return {"error": "prompt must be a string"}, 400
        prompts = prompts if several else [prompts]
        choices = []
        for position, prompt in enumerate(prompts):
            one = self._one(prompt, body, body["max_tokens"], position, len(prompts))
            tokens, values = one["new"], one["logprobs"]
            if body.get("echo"):
                tokens, values = [*one["asked"], *tokens], [*one["before"], *values]
            choice = {"index": position, "text": one["text"], "finish_reason": "length"}
            if body.get("logprobs") and self.state.script.logprobs:
                named = [f"token_id:{t}" if body.get("return_tokens_as_token_ids") else f" w{t}" for t in tokens]
                choice["logprobs"] = {"tokens": named, "token_logprobs": values}
            choices.append(choice)
        usage = {"prompt_tokens": sum(len(tokens_of(prompt)) for prompt in prompts)}
        choices = choices[:-1] if fewer else choices
        if body["stream"]:
            events = [json.dumps({"choices": [choice], **self._mark()}) for choice in choices]
            return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode(), 200
        return {"choices": choices, "usage": usage, **self._mark()}, 200

    def _chat(self, body: dict[str, Any], fewer: bool) -> tuple[Any, int]:
        one = self._one(body["messages"][0]["content"], body, body["max_tokens"], 0, 1)
        pairs = zip(one["new"], one["logprobs"], strict=True)
        content = [{"token": f" w{token}", "logprob": value} for token, value in pairs]
        choice = {"index": 0, "message": {"content": one["text"]}, "logprobs": {"content": content}}
        usage = {"prompt_tokens": len(one["asked"])}
        return {"choices": [] if fewer else [choice], "usage": usage, **self._mark()}, 200

    def _mark(self) -> dict[str, str]:
        named = self.state.script.fingerprint
        return {} if named is None else {"system_fingerprint": named}


class Server(ThreadingHTTPServer):
    """Takes many connections at once."""

    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, *arguments: object) -> None:
        """A connection that broke on purpose is no news."""


@contextmanager
def serving(script: Script) -> Iterator[tuple[str, State]]:
    """A running server: its URL and its state."""
    state = State(script)
    handler = type("Scripted", (Handler,), {"state": state})
    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
