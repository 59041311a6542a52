"""How the ranks of one host come by one shared mapping without a name in any file system.

Rank 0 makes an anonymous file (memfd_create) and hands its descriptor to the others over a Unix socket in the abstract
namespace. Neither has a file: the kernel frees both with the last process that holds them, however it ends, so that a
rank killed at any moment leaves nothing behind.

Rank r sends ``{"rank": r, "size": n}``, receives the descriptor, opens it, answers ``mapped`` and waits for ``go``, which
rank 0 sends when all have opened it. Instead of any answer there may come ``{"error": sentence}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from detinfer.errors import PeerError, UsageError

_MESSAGE = 4096
LINGER = 1.0
"""Seconds for which rank 0, once it has given up, still tells others why."""


def share(
    name: str, rank: int, size: int, bytes_: int, version: int, timeout: float, use: Callable[[int], None]
) -> None:
    """Give every rank a descriptor of the same file of ``bytes_`` zeros; ``use(fd)`` maps it and owns ``fd``.

    Returns on all ranks once all have mapped it. Raises PeerError naming ranks that did not arrive within ``timeout``
    seconds or died on the way, and UsageError where the ranks disagree on ``size``, ``bytes_`` or ``version``.
    """
    if not hasattr(os, "memfd_create"):
        raise UsageError("connect: ranks of one host need Linux (memfd_create)")
    address = f"\0detinfer.{os.getuid()}.{name}"
    patience = _Patience(timeout)
    greeting = {"rank": rank, "size": size, "bytes": bytes_, "version": version}
    if rank == 0:
        _lead(address, size, greeting, patience, use)
    else:
        _follow(address, greeting, patience, use)


class _Patience:
    """Seconds of waiting that are left. Time during which this process itself was stopped is not waiting."""

    def __init__(self, seconds: float) -> None:
        self.given = self.left = seconds

    def _waited(self, start: float, most: float) -> None:
        self.left -= min(time.monotonic() - start, 2 * most)

    def readable(self, sockets: list[socket.socket]) -> list[socket.socket]:
        """Those of ``sockets`` that have something to read; none once the patience is at an end."""
        poll = select.poll()  # select() stops at 1024 descriptors, which a large program has
        for one in sockets:
            poll.register(one, select.POLLIN)
        while True:
            start, slice_ = time.monotonic(), 0.1
            found = {fd for fd, _ in poll.poll(slice_ * 1000)}
            self._waited(start, slice_)
            if found or self.left <= 0:
                return [one for one in sockets if one.fileno() in found]

    def sleep(self, seconds: float) -> None:
        start = time.monotonic()
        time.sleep(seconds)
        self._waited(start, seconds)


def _say(connection: socket.socket, message: dict[str, Any], fd: int | None = None) -> None:
    data = [json.dumps(message).encode()]
    if fd is None:
        connection.send(data[0])
    else:
        socket.send_fds(connection, data, [fd])


def _same_user(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", credentials)[1] == os.getuid())


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def _lead(address: str, size: int, greeting: dict[str, Any], patience: _Patience, use: Callable[[int], None]) -> None:
    joined: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        try:
            listener.bind(address)
        except OSError as error:
            raise UsageError(
                f"connect: another rank 0 of this user already waits under the name {address[1:]!r} ({error}); "
                "give each group a name of its own"
            ) from None
        listener.listen(size)
        try:
            _gather(listener, joined, size, greeting, patience)
            fd = os.memfd_create("detinfer", os.MFD_CLOEXEC)
            try:
                os.ftruncate(fd, greeting["bytes"])
                for rank, connection in joined.items():
                    _tell(rank, connection, {"fd": True}, fd)
            except BaseException:
                os.close(fd)
                raise
            use(fd)
            for rank, connection in joined.items():
                _expect(connection, rank, "mapped", patience)
            for rank, connection in joined.items():
                _tell(rank, connection, {"go": True})
        except BaseException as error:
            message = {"error": str(error) or type(error).__name__, "usage": isinstance(error, UsageError)}
            _give_up(listener, list(joined.values()), size, message)
            raise
        finally:
            for connection in joined.values():
                connection.close()


def _give_up(listener: socket.socket, joined: list[socket.socket], size: int, message: dict[str, Any]) -> None:
    """Tell the error to all who are here, and for a moment to those who still come, until they have hung up.

    A connection that is closed with something unread in it is reset, and then its other end may lose what it was told.
    """
    patience = _Patience(LINGER)
    told, open_ = len(joined), list(joined)
    for connection in joined:
        with contextlib.suppress(OSError):  # it may be the one that died
            _say(connection, message)
    while (open_ or told < size - 1) and (ready := patience.readable([listener, *open_])):
        for connection in ready:
            if connection is listener:
                late, _ = listener.accept()
                with contextlib.suppress(OSError):
                    _say(late, message)
                open_.append(late)
                told += 1
                continue
            try:
                over = not connection.recv(_MESSAGE)
            except OSError:
                over = True
            if over:
                open_.remove(connection)
                connection.close()


def _gather(
    listener: socket.socket,
    joined: dict[int, socket.socket],
    size: int,
    greeting: dict[str, Any],
    patience: _Patience,
) -> None:
    while len(joined) < size - 1:
        ready = patience.readable([listener, *joined.values()])
        if not ready:
            missing = [rank for rank in range(1, size) if rank not in joined]
            raise PeerError(
                f"connect: {_named(missing)} did not arrive within {patience.given:g} s (rank 0 of {size} waited)"
            )
        for rank, connection in joined.items():
            if connection in ready:  # they have nothing to say yet: it is the end
                raise PeerError(f"connect: rank {rank} died while rank 0 waited for the others")
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        if not _same_user(connection):
            connection.close()
            continue
        try:
            theirs = json.loads(connection.recv(_MESSAGE) if patience.readable([connection]) else b"")
        except (OSError, ValueError):
            connection.close()  # not one of ours, or dead before it said who it is
            continue
        rank = theirs["rank"]
        same = all(theirs[key] == greeting[key] for key in ("size", "bytes", "version"))
        if not same or rank in joined or not 0 < rank < size:
            joined[-1] = connection  # to be told as well
            raise UsageError(
                f"connect: the ranks disagree: {theirs} came to {greeting}"
                + (f", and rank {rank} was there already" if rank in joined else "")
            )
        joined[rank] = connection


def _tell(rank: int, connection: socket.socket, message: dict[str, Any], fd: int | None = None) -> None:
    try:
        _say(connection, message, fd)
    except OSError as error:
        raise PeerError(f"connect: rank {rank} died while connecting ({error})") from None


def _receive(connection: socket.socket, rank: int, patience: _Patience) -> tuple[dict[str, Any], list[int]]:
    if not patience.readable([connection]):
        raise PeerError(f"connect: rank {rank} did not answer within {patience.given:g} s")
    try:
        data, fds, _, _ = socket.recv_fds(connection, _MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise PeerError(f"connect: rank {rank} died while connecting ({error})") from None
    if not data:
        raise PeerError(f"connect: rank {rank} died while connecting")
    message = json.loads(data)
    if "error" in message:
        raise (UsageError if message.get("usage") else PeerError)(message["error"])
    return message, fds


def _expect(connection: socket.socket, rank: int, word: str, patience: _Patience) -> list[int]:
    message, fds = _receive(connection, rank, patience)
    if word not in message:
        raise PeerError(f"connect: rank {rank} answered {message}, not {word!r}")
    return fds


def _follow(address: str, greeting: dict[str, Any], patience: _Patience, use: Callable[[int], None]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        pause = 0.001
        while True:
            try:
                connection.connect(address)
                break
            except OSError:  # it does not listen yet
                if patience.left <= 0:
                    raise PeerError(
                        f"connect: rank 0 did not arrive within {patience.given:g} s (rank {greeting['rank']} waited)"
                    ) from None
            patience.sleep(pause)
            pause = min(pause * 1.5, 0.05)
        if not _same_user(connection):
            raise UsageError(f"connect: the name {address[1:]!r} belongs to another user's process")
        # Rank 0 says when others are late: a little after it would itself give up.
        patience.left += 5.0
        _tell(0, connection, greeting)
        (fd,) = _expect(connection, 0, "fd", patience)
        use(fd)
        _tell(0, connection, {"mapped": True})
        _expect(connection, 0, "go", patience)
