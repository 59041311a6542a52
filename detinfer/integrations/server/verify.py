"""Verify a server: connect, run the test modes asked for, run them again on the control, and put it into one result."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from detinfer.integrations.server import api as apis
from detinfer.integrations.server import cache, sweep
from detinfer.integrations.server.api import Api, Sampling
from detinfer.integrations.server.result import Part, ServerResult
from detinfer.integrations.server.transport import Transport

NAME = re.compile(r"\bdi\d+-\w+-[0-9a-f]{16}\b")
"""The name of a fingerprint of detinfer's, and where a server that has one gives the whole of it (``run.served``)."""
PLACE = "/detinfer/fingerprint"
MODES = ("single", "mixed", "prefix", "radix_cache", "p_vs_d")


@dataclass(frozen=True)
class Access:
    """How to reach a server: ``api`` is auto, sglang, openai or chat; ``timeout`` seconds for a whole attempt."""

    url: str
    api: str = "auto"
    model: str | None = None
    timeout: float = 120.0
    retries: int = 2
    token: str | None = None

    def connect(self, sampling: Sampling) -> tuple[Transport, Api]:
        """Connect and probe; UsageError where the server is no such server, Unanswered where it is not there."""
        transport = Transport(self.url, timeout=self.timeout, retries=self.retries, token=self.token)
        return transport, apis.connect(self.url, transport, self.api, self.model, sampling)


@dataclass(frozen=True)
class Control:
    """Where a difference is expected: another server, or the same one with ``sampling.extra`` in each request."""

    name: str
    access: Access
    sampling: Sampling


def verify(
    access: Access, modes: Sequence[str], sampling: Sampling, options: sweep.Options, control: Control | None = None
) -> ServerResult:
    """Run ``modes`` against a server. With a ``control`` that shows no difference either, a mode's verdict is vacuous.

    Raises InfrastructureError where the server cannot be reached at all, UsageError where it refuses the requests.
    """
    start = time.monotonic()
    transport, api = access.connect(sampling)
    result = ServerResult(
        access.url,
        api.name,
        api.model,
        options.seed,
        asdict(sampling) | {"extra": dict(sampling.extra)},
        sampling.logprobs,
    )
    for mode in modes:
        options.said(f"\n{mode}: {access.url} ({api.name}{f', {api.model}' if api.model else ''})")
        result.parts.append(run(mode, api, sampling, options))
    faults = transport.faults.copy()
    result.requests, result.retried = transport.requests, transport.retried
    result.most_at_once = transport.most_at_once
    if control is not None:
        result.control_name = control.name
        again, other = control.access.connect(control.sampling)
        for part in result.parts:
            options.said(f"\ncontrol, {part.mode}: {control.name}")
            checked = run(part.mode, other, control.sampling, replace(options, command="", fail_fast=False))
            result.control.append(checked)
            if part.verdict == "same" and checked.verdict != "diverged":
                part.judge([f"the control ({control.name}) shows no difference either: these requests cannot tell"])
        faults += again.faults
        result.requests += again.requests
        result.retried += again.retried
    result.system_fingerprints = dict(sorted(transport.fingerprints.items()))
    if any(NAME.search(name) for name in result.system_fingerprints):
        held = transport.get(PLACE)
        result.system_fingerprint = held if isinstance(held, dict) and "fingerprint" in held else None
    result.faults = dict(sorted(faults.items()))
    result.seconds = round(time.monotonic() - start, 3)
    return result


def run(mode: str, api: Api, sampling: Sampling, options: sweep.Options) -> Part:
    """One test mode."""
    if mode in cache.RUN:
        return cache.RUN[mode](api, sampling, options)
    return sweep.run(mode, api, sampling, options)
