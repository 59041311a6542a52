"""Sampling of tokens: a counter-based generator, the tokens that may be drawn, and the draw, row by row.

A draw is the argmax of log-probability plus Gumbel noise. The noise of a token follows from the request's seed, the
position in the request and the token's number alone, so that neither the row's place in a batch nor the order in which
anything is computed can be seen. Sums of probabilities (top-p) are sums of integers, which have no order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from detinfer.reference import elementwise, rows
from detinfer.reference.arithmetic import Float, single

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
STEPS = (0x9E3779B9, 0xBB67AE85)
"""Philox4x32-10: Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011)."""

UNIT = 2.0**40
"""Probabilities are whole multiples of 1 / UNIT where they are added."""

Words = NDArray[np.uint32]


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Four words of 32 bits from a counter of four words (numbers or arrays) and a key of two."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
        c0, c1, c2, c3 = (p1 >> high) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> high) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + STEPS[0]) % 2**32, (k1 + STEPS[1]) % 2**32
    a, b, c, d = (word.astype(np.uint32) for word in np.broadcast_arrays(c0, c1, c2, c3))
    return a, b, c, d


def uniform(seed: int, position: int, n: int) -> NDArray[np.float64]:
    """[n] numbers in (0, 1): token v's is (r + 1/2) / 2^52, r the upper 52 bits of words 0 and 1 of counter (v, 0, position)."""
    seed, position = seed % 2**64, position % 2**64
    first, second, _, _ = philox(
        (np.arange(n), 0, position % 2**32, position >> 32),
        (seed % 2**32, seed >> 32),
    )
    r = (first.astype(np.uint64) << np.uint64(20)) | (second.astype(np.uint64) >> np.uint64(12))
    return np.asarray((r.astype(np.float64) + 0.5) * 2.0**-52)


def gumbel(seed: int, position: int, n: int) -> NDArray[np.float64]:
    """[n] Gumbel noise, -log(-log(u)), in float64."""
    return np.asarray(-elementwise.log_(-elementwise.log_(uniform(seed, position, n))))


def kept(
    log_probabilities: Float, probabilities: Float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[bool]:
    """Which tokens of one row may be drawn: the ``top_k`` likeliest, of these the fewest that hold ``top_p`` of their
    probability, and of these the ones at least ``min_p`` times as likely as the likeliest. Ties go to the lower number.

    ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 keep all.
    """
    n = len(log_probabilities)
    ranked = sorted(range(n), key=lambda v: (-log_probabilities[v], v))
    if 0 < top_k < n:
        ranked = ranked[:top_k]
    if top_p < 1:
        weights = [int(float(probabilities[v]) * UNIT) for v in ranked]
        wanted = float(sum(weights)) * top_p
        before, fewest = 0, []
        for rank, (v, weight) in enumerate(zip(ranked, weights, strict=True)):
            if rank == 0 or before < wanted:
                fewest.append(v)
            before += weight
        ranked = fewest
    least = np.float32(min_p) * probabilities.max()
    chosen = {v for v in ranked if min_p <= 0 or probabilities[v] >= least}
    return [v in chosen for v in range(n)]


def draw(log_probabilities: Float, may: list[bool], seed: int, position: int) -> int:
    """The token of one row with the greatest log-probability + noise; ties go to the lower number.

    -1 where the row has NaN or no token that may be drawn.
    """
    if np.isnan(log_probabilities).any():
        return -1
    best, token = -np.inf, -1
    for v, noise in enumerate(gumbel(seed, position, len(log_probabilities))):
        score = float(log_probabilities[v]) + noise
        if may[v] and score > best:
            best, token = score, v
    return token


def sample(
    logits: Float,
    seed: int,
    position: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """The token drawn from one row of logits; ``temperature`` 0 takes the first of the greatest."""
    with np.errstate(all="ignore"):
        x = np.asarray(logits, np.float32)[None]
        scaled = single(x / np.float32(temperature)) if temperature > 0 else x
        log_probabilities, probabilities = rows.log_softmax(scaled)[0], rows.softmax(scaled)[0]
        if np.isnan(log_probabilities).any():
            return -1
        if temperature <= 0:
            return int(np.argmax(x[0]))
        may = kept(log_probabilities, probabilities, top_k, top_p, min_p)
        return draw(log_probabilities, may, seed, position)
