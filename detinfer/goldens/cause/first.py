"""The first result of a run that is not what the request got alone.

What of a tensor belongs to the request is found from sizes, and sizes may fit by accident: rows that were picked by what
tokens hold, as those of an expert, are other rows in another run, and perhaps another expert's. So tensors are followed that
are made of such picked ones. An operation that is given one and differs is the cause only if nothing of what is made of it
agrees again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from detinfer import bits
from detinfer.goldens.cause.align import Pair
from detinfer.goldens.cause.operations import Found, Key, copied, local, waits
from detinfer.models.targets import tensors

Parts = Callable[[int, torch.Tensor, torch.Tensor], Iterator[Pair]]
"""``parts(call, alone, other)``: what of two results belongs to the request, part by part; nothing if none is known."""


@dataclass(frozen=True)
class Differs:
    """Operation ``number``, its result ``place``, and the part of it that is another in the run alone.

    ``expected`` and ``got`` are what the part held then: a fault by chance shows other bytes when it is looked at again.
    """

    number: int
    place: int
    pair: Pair
    expected: torch.Tensor
    got: torch.Tensor


class Results:
    """What the run alone gives, by operation; without ``integers`` floating point alone."""

    def __init__(self, integers: bool) -> None:
        self.integers = integers
        self._held: dict[int, list[torch.Tensor]] = {}
        self._unwritten = Unwritten()
        self._weights, self._of = Weights(), dict[int, list[int]]()

    def keep(self, number: int, func: Any, args: Any, kwargs: Any, found: list[torch.Tensor]) -> None:
        """``Seen`` of the run alone."""
        self._of[number] = self._weights([local(t) for t in tensors([args, kwargs])], found)
        if not is_view(func) and not self._unwritten(func, found):
            self._held[number] = [copied(t) if self.integers or floating(t) else t.new_empty(0) for t in found]

    def of(self, number: int | None) -> list[torch.Tensor] | None:
        """The results of an operation, or None where it has none to compare."""
        return None if number is None else self._held.get(number)

    def others(self, number: int | None, weights: Sequence[int]) -> bool:
        """Whether another operation is called with these weights, and not the one of this number."""
        own = self._of.get(-1 if number is None else number, [])
        return any(a != b and b in self._weights.all for a, b in zip(own, weights, strict=False))


class First:
    """Compares another run with ``Results``: ``see`` is its ``Seen``, and ``found`` what differs first, after it."""

    def __init__(self, results: Results, keys: Sequence[Key], beside: Mapping[int, int], parts: Parts) -> None:
        self._results, self._keys, self._beside, self._parts = results, keys, beside, parts
        self._unwritten, self._weights = Unwritten(), Weights()
        self._picked: set[int] = set()  # memory of what is made of picked rows and has not agreed since
        self._first: Differs | None = None
        self._perhaps: Differs | None = None
        self._agreed = True  # the last of the call's results that could be compared

    def found(self) -> Differs | None:
        """The first operation that differs; None where none does, or none that goes on to the end of its call."""
        return self._first or (None if self._agreed else self._perhaps)

    def see(self, number: int, func: Any, args: Any, kwargs: Any, found: list[torch.Tensor]) -> None:
        """Raises Found once it is known."""
        self._call_ends(number)
        given = [local(t) for t in tensors([args, kwargs])]
        weights = self._weights(given, found)
        if is_view(func):
            return
        # An expert that the other run alone has some token for moves all that follow: they are laid beside one another.
        picked = (
            self._results.others(self._beside.get(number), weights)
            or _picks(func, args)
            or any(_memory(t) in self._picked for t in given)
        )
        places = {_memory(t) for t in found}
        agrees = None if self._unwritten(func, found) else self._compared(number, given, found, picked)
        if agrees:
            self._picked -= places
        elif picked:
            self._picked |= places
        elif agrees is None:
            self._picked -= places  # the memory was given to somebody else

    def _compared(
        self, number: int, given: Sequence[torch.Tensor], found: Sequence[torch.Tensor], picked: bool
    ) -> bool | None:
        """Whether the request's parts agree; None where nothing could be compared. Raises Found where that is the cause."""
        wanted = self._results.of(self._beside.get(number))
        if wanted is None or not any(floating(t) for t in given):
            return None  # integers alone are exact: they differ where the runs ask for other things
        elements = 0
        for place, (got, expected) in enumerate(zip(found, wanted, strict=False)):
            if not (self._results.integers or floating(got)) or got.dtype != expected.dtype:
                continue
            for pair in self._parts(self._keys[number].call, expected, got):
                mine = expected[pair[0]]
                if not same(expected, got, pair):
                    self._differs(Differs(number, place, pair, mine.clone(), got[pair[1]].clone()), picked)
                    return False
                elements += mine.numel()
        if not elements:
            return None
        self._agreed = True
        if picked and self._perhaps is not None and elements >= self._perhaps.got.numel():
            self._perhaps = None  # of fewer it says nothing: a row's mean may agree, and the row not
        return True

    def _differs(self, one: Differs, picked: bool) -> None:
        self._agreed = False
        if not picked:
            self._first = one
            raise Found
        if self._perhaps is None:
            self._perhaps = one

    def _call_ends(self, number: int) -> None:
        if number and self._keys[number].call != self._keys[number - 1].call:
            if self.found() is not None:
                self._first = self.found()
                raise Found
            self._perhaps, self._agreed = None, True


def same(alone: torch.Tensor, other: torch.Tensor, pair: Pair) -> bool:
    """Whether two parts have the same bytes."""
    return bits.count_mismatches(alone[pair[0]], other[pair[1]]) == 0


def floating(t: torch.Tensor) -> bool:
    """Whether arithmetic on it rounds."""
    return t.is_floating_point() or t.is_complex()


def is_view(func: Any) -> bool:
    """Whether an operation only looks at its operand in another way: nothing can differ that did not before."""
    returned = func._schema.returns
    return waits(func) or (
        bool(returned) and all(r.alias_info is not None and not r.alias_info.is_write for r in returned)
    )


def _picks(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether what tensors hold decides which rows, or how many, an operation gives, or in which order."""
    if func.name().startswith("aten::index.Tensor"):  # by positions, or by a mask
        return any(t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1]))
    if func.name().startswith(("aten::sort", "aten::argsort")):
        return not floating(args[0])
    return torch.Tag.dynamic_output_shape in getattr(func, "tags", ())


class Weights:
    """Of each operation of a run the floating-point operands that no operation before it has made: 0 for another.

    ``all``: those of the whole run. Vectors and numbers are left out: constants are made anew in each run.
    """

    def __init__(self) -> None:
        self.all: set[int] = set()
        self._made: set[int] = set()

    def __call__(self, given: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> list[int]:
        memory = [_memory(t) for t in given]
        held = [
            t.data_ptr() if floating(t) and t.dim() > 1 and place >= 0 and place not in self._made else 0
            for t, place in zip(given, memory, strict=True)
        ]
        self.all.update(place for place in held if place)
        self._made.update({_memory(t) for t in results} - set(memory))
        return held


def _memory(t: torch.Tensor) -> int:
    """Where its elements lie; of a tensor that has no memory of its own (sparse, or around others) a number below 0."""
    try:
        return t.untyped_storage().data_ptr()
    except RuntimeError:
        return -id(t)


class Unwritten:
    """Tensors that were made without values, and so hold what memory held; they are filled part by part.

    What is written into them in place is not compared: whoever reads it is.
    """

    def __init__(self) -> None:
        self._held: set[int] = set()

    def __call__(self, func: Any, results: Sequence[torch.Tensor]) -> bool:
        """Whether the results of an operation are such."""
        places = {_memory(t) for t in results}
        if func.name().startswith(("aten::empty", "aten::new_empty")):
            self._held |= places
            return True
        if any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns):
            return bool(places & self._held)
        self._held -= places  # the memory was given to somebody else
        return False
