"""HTTP to a server of a language model: faults are counted by kind, retried within bounds, and never taken for a divergence."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

from detinfer.errors import InfrastructureError, UsageError

T = TypeVar("T")
_TRY_AGAIN = {408, 425, 429}
_PAUSE = 0.1
"""Seconds before the first retry; doubled before each of the next, at most two."""
_LARGEST = 1 << 28
"""Bytes of an answer, at most."""


class Fault(Exception):
    """One attempt failed for a reason that says nothing about bits; ``kind`` is what it is counted under."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Unanswered(InfrastructureError):
    """A request failed as often as it may be tried; the message names the server and the last fault."""


class Rejected(UsageError):
    """The server understood the request and does not want it (a status of 400 to 499); ``status`` says which."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Transport:
    """Requests to one server. ``faults`` counts failed attempts by kind, ``most_at_once`` requests in flight together.

    ``url`` is the server's root, with a path before the API's own where it has one. ``timeout`` is seconds for a whole
    attempt, ``retries`` how often one request is tried again.
    """

    def __init__(self, url: str, *, timeout: float = 120.0, retries: int = 2, token: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url}: a server is named like http://localhost:8000")
        self.url = url.rstrip("/")
        self._host, self._port, self._tls = parts.hostname, parts.port, parts.scheme == "https"
        self._before = parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.timeout, self.retries = timeout, retries
        self.faults: Counter[str] = Counter()
        self.fingerprints: Counter[str] = Counter()
        """What answers named as their ``system_fingerprint``."""
        self.requests = self.retried = self.most_at_once = 0
        self._flying = 0
        self._lock = threading.Lock()

    def get(self, path: str) -> Any:
        """The JSON at ``path``; None where the server has nothing there."""
        try:
            return self._insist("GET", path, None, _json)
        except Rejected:
            return None

    def exists(self, path: str) -> bool:
        """POST to ``path`` without a body: whether the server says that it did what that asks for."""
        try:
            self._insist("POST", path, None, lambda raw: raw)
        except Rejected:
            return False
        return True

    def post(self, path: str, body: Mapping[str, Any], read: Callable[[bytes], T]) -> T:
        """POST JSON and give the answer's bytes to ``read``, which raises Fault for what cannot be used."""
        return self._insist("POST", path, json.dumps(body).encode(), read)

    def _insist(self, method: str, path: str, body: bytes | None, read: Callable[[bytes], T]) -> T:
        with self._lock:
            self.requests += 1
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(_PAUSE * 2 ** (attempt - 1), 2.0))
                with self._lock:
                    self.retried += 1
            try:
                return read(self._once(method, path, body))
            except Fault as fault:
                with self._lock:
                    self.faults[fault.kind] += 1
                last = fault
        tries = f"{self.retries + 1} tries" if self.retries else "1 try"
        raise Unanswered(f"{method} {self.url}{path}: no usable answer in {tries}; the last: {last} ({last.kind})")

    def _once(self, method: str, path: str, body: bytes | None) -> bytes:
        deadline = time.monotonic() + self.timeout
        connection: http.client.HTTPConnection
        if self._tls:
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=self.timeout, context=context)
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=self.timeout)
        headers = self._headers | ({"Content-Type": "application/json"} if body is not None else {})
        with self._lock:
            self._flying += 1
            self.most_at_once = max(self.most_at_once, self._flying)
        try:
            connection.request(method, self._before + path, body, headers)
            response = connection.getresponse()
            raw = self._whole(response, connection, deadline)
        except TimeoutError as error:
            raise Fault("timeout", f"no whole answer within {self.timeout:g} s") from error
        except ssl.SSLCertVerificationError as error:
            raise UsageError(f"{self.url}: its certificate cannot be verified: {error.verify_message}") from error
        except socket.gaierror as error:
            raise Fault("unreachable", f"{self._host}: {error.strerror}") from error
        except ConnectionRefusedError as error:
            raise Fault("unreachable", "nothing listens there (connection refused)") from error
        except (OSError, http.client.HTTPException) as error:
            raise Fault("disconnect", f"the connection broke: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
            with self._lock:
                self._flying -= 1
        if response.status >= 500 or response.status in _TRY_AGAIN:
            raise Fault(f"status {response.status}", f"it answered {response.status} {response.reason}: {_short(raw)}")
        if not 200 <= response.status < 300:
            said = f"{response.status} {response.reason}: {_short(raw)}"
            raise Rejected(response.status, f"{method} {self.url}{path}: the server refuses the request: {said}")
        return raw

    def _whole(
        self, response: http.client.HTTPResponse, connection: http.client.HTTPConnection, deadline: float
    ) -> bytes:
        """The body; TimeoutError also where it comes in drops, each in time."""
        parts: list[bytes] = []
        size = 0
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if connection.sock is not None:
                connection.sock.settimeout(left)
            part = response.read1(1 << 16)
            if not part:
                break
            parts.append(part)
            size += len(part)
            if size > _LARGEST:
                raise Fault("malformed", f"an answer of more than {_LARGEST} bytes")
        if response.length:  # what Content-Length promised and did not come
            raise http.client.IncompleteRead(b"", response.length)
        return b"".join(parts)


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError as error:
        raise Fault("malformed", f"it answered no JSON: {_short(raw)}") from error


def _short(raw: bytes) -> str:
    text = " ".join(raw.decode("utf-8", "replace").split())
    return text[:300] or "(nothing)"
