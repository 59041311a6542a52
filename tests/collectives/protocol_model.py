"""The protocols of csrc/gpu as programs of a few instructions, and a search over everything that may happen.

A store is on its way until it is delivered, which may be at any time and in any order; a released flag is delivered after
all stores that its rank made before it. A rank sees its own stores at once. A rank that acquires at too small a scope, or without passing it on, may read
what it held before. A search visits every state; a wrong read, or a state in which nobody can go on, is a fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Place = tuple[Any, ...]


@dataclass(frozen=True)
class Store:
    """``value`` to ``place`` of rank ``to``; a flag that is ``released`` arrives after all stores before it."""

    to: int
    place: Place
    value: int
    released: bool = False


@dataclass(frozen=True)
class Wait:
    """Until the own ``place`` holds ``value``; then memory is fresh, unless the acquire does not reach every reader."""

    place: Place
    value: int
    fresh: bool = True


@dataclass(frozen=True)
class Read:
    """The own ``place``, which has to hold ``value``."""

    place: Place
    value: int


@dataclass(frozen=True)
class Arrive:
    """Until the own ``place`` is not blank (0); what lies there then has to be ``value``."""

    place: Place
    value: int


@dataclass(frozen=True)
class AtLeast:
    """Until the own ``place`` holds ``value`` or more."""

    place: Place
    value: int


Program = list[Store | Wait | Read | Arrive | AtLeast]


def packets(rank: int, ranks: int, calls: int, banks: int = 2) -> Program:
    """Path push of bytes: epoch and data in one word, so that waiting for the epoch reads the data."""
    program: Program = []
    for epoch in range(1, calls + 1):
        program += [Store(peer, (epoch % banks, rank), epoch) for peer in range(ranks) if peer != rank]
        program += [Wait((epoch % banks, peer), epoch) for peer in range(ranks) if peer != rank]
    return program


def blanks(
    rank: int, ranks: int, calls: int, banks: int = 4, cleared: bool = True, told: bool = True, released: bool = True
) -> Program:
    """Path push of sums: data into blank places, which are blanked again in the next call; then the others hear of it."""
    program: Program = []
    peers = [peer for peer in range(ranks) if peer != rank]
    for epoch in range(1, calls + 1):
        program += [Store(peer, (epoch % banks, rank), epoch) for peer in peers]
        if cleared and epoch > 1:
            program += [Store(rank, ((epoch - 1) % banks, peer), 0) for peer in peers]
        if told:
            program += [AtLeast(("told", peer), epoch - 1) for peer in peers if epoch > 1]
            # By the kernel's end the helper has told; what it tells of are the kernels before.
            program += [Store(peer, ("told", rank), epoch, released) for peer in peers]
        program += [Arrive((epoch % banks, peer), epoch) for peer in peers]
    return program


def tiles(
    rank: int, ranks: int, count: int, calls: int = 1, slots: int = 8, released: bool = True, fresh: bool = True
) -> Program:
    """Paths push_tiles and pull: in turn k, store k and tell it, take in k - 2; everything before a call ends.

    The warp that tells may be late, and stores of later turns before its flag: a flag, too, is delivered at any time, and
    it alone waits for what was stored before it.
    """
    program: Program = []
    peers = [peer for peer in range(ranks) if peer != rank]
    for call in range(calls):
        first = 1 + call * count
        for k in range(count + 2):
            if k < count:
                program += [Store(peer, ("data", (first + k) % slots, rank), first + k) for peer in peers]
                program += [Store(peer, ("flag", (first + k) % 8, rank), first + k, released) for peer in peers]
            if k >= 2:
                s = first + k - 2
                program += [Wait(("flag", s % 8, peer), s, fresh) for peer in peers]
                program += [Read(("data", s % slots, peer), s) for peer in peers]
    return program


def lead(tiles: int, sums: bool, stuck: int) -> int:
    """How many tiles a block's other warps can have stored beyond ``stuck``, after which one of its warps stands still.

    Two ranks, whose warps otherwise run as far as they can; ``sums``: two_shot, with parts and sums in one sequence.
    """
    order = []  # what a warp does: ("store", n) stores the n-th tile, ("see", n) waits for the peer's n-th
    stored = seen = 0
    for k in range(tiles + (4 if sums else 2)):
        if k < tiles:
            order.append(("store", stored))
            stored += 1
        if 2 <= k < tiles + 2:
            order.append(("see", seen))
            seen += 1
            if sums:
                order.append(("store", stored))
                stored += 1
        if sums and k >= 4:
            order.append(("see", seen))
            seen += 1
    at = {"slow": 0, "quick": 0, "peer": 0}

    def done(warp: str) -> int:
        return sum(what == "store" for what, _ in order[: at[warp]])

    def may(warp: str) -> bool:
        if at[warp] == len(order):
            return False
        what, n = order[at[warp]]
        if what == "store":
            return warp != "slow" or n < stuck
        # A tile is told once every warp of its rank has stored it.
        return n < (min(done("slow"), done("quick")) if warp == "peer" else done("peer"))

    while going := [warp for warp in at if may(warp)]:
        at[going[0]] += 1
    return done("quick") - done("slow")


@dataclass(frozen=True)
class State:
    """Where each rank is, what its memory holds, what it held at its last full acquire, what is on its way."""

    at: tuple[int, ...]
    memory: tuple[frozenset[tuple[Place, int]], ...]
    held: tuple[frozenset[tuple[Place, int]] | None, ...]
    flying: tuple[tuple[Store, ...], ...]


def _put(values: Sequence[Any], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _deliver(state: State, rank: int, index: int) -> State:
    store = state.flying[rank][index]
    memory = frozenset({**dict(state.memory[store.to]), store.place: store.value}.items())
    left = state.flying[rank][:index] + state.flying[rank][index + 1 :]
    return State(state.at, _put(state.memory, store.to, memory), state.held, _put(state.flying, rank, left))


def _sent(state: State, programs: Sequence[Program]) -> State:
    # A store that a rank comes to is on its way at once: to wait before sending it is to wait before delivering it.
    for rank, program in enumerate(programs):
        at, flying = state.at[rank], list(state.flying[rank])
        while at < len(program) and isinstance(step := program[at], Store):
            flying.append(step)
            at += 1
        if at != state.at[rank]:
            state = State(_put(state.at, rank, at), state.memory, state.held, _put(state.flying, rank, tuple(flying)))
    return state


def fault(programs: Sequence[Program]) -> str | None:
    """What can go wrong; None where nothing can, in any interleaving."""
    ranks = len(programs)
    none: frozenset[tuple[Place, int]] = frozenset()
    start = _sent(State((0,) * ranks, (none,) * ranks, (None,) * ranks, ((),) * ranks), programs)
    todo, seen = [start], {start}
    while todo:
        state = todo.pop()
        after: list[State] = []
        for rank, program in enumerate(programs):
            for index, store in enumerate(state.flying[rank]):
                if index == 0 or not store.released:
                    after.append(_deliver(state, rank, index))
            if state.at[rank] == len(program):
                continue
            step = program[state.at[rank]]
            at = _put(state.at, rank, state.at[rank] + 1)
            assert not isinstance(step, Store)
            found = dict(state.memory[rank]).get(step.place, 0)
            for own in state.flying[rank]:
                if own.to == rank and own.place == step.place:
                    found = own.value
            if isinstance(step, Arrive | AtLeast):
                if isinstance(step, Arrive) and found not in (0, step.value):
                    return f"rank {rank} reads {found} instead of {step.value} at {step.place}"
                if found >= max(step.value, 1):
                    after.append(State(at, state.memory, state.held, state.flying))
                continue
            if isinstance(step, Wait):
                if found == step.value:
                    # A reader that the acquire does not reach may still hold what lay there when the rank began to wait.
                    held = None if step.fresh else none
                    after.append(State(at, state.memory, _put(state.held, rank, held), state.flying))
                continue
            stale = state.held[rank]
            seen_value = found if stale is None else dict(stale).get(step.place, 0)
            if seen_value != step.value:
                return f"rank {rank} reads {seen_value} instead of {step.value} at {step.place}"
            after.append(State(at, state.memory, state.held, state.flying))
        if not after and any(state.at[rank] < len(program) for rank, program in enumerate(programs)):
            return f"nobody can go on at {state.at}"
        for each in (_sent(state, programs) for state in after):
            if each not in seen:
                seen.add(each)
                todo.append(each)
    return None
