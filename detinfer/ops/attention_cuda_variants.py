"""Every machine code of attention is compared with the plain kernel before its first result is handed out.

Triton makes other machine code of a kernel for each dtype, depth, number of heads on one head of K and V, kind of mask and
kind of strides, and a compiler can get one of them wrong while the rest are right: ptxas 12.8 made one that read keys from
anywhere, in tiles of 16 columns alone. So what ``proof`` says of one depth says nothing of another. The first time that a
call gets machine code which this process has not met, ``check`` runs that same code on inputs in which an order shows, and
compares every byte. It takes tens of milliseconds, and about as long as Triton takes to compile the plain kernel for a new
depth; what Triton has compiled once it keeps on disk.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from detinfer.bits import dtype_name, first_mismatch
from detinfer.errors import Diverged, RefusedError
from detinfer.ops import attention_cuda_launch as launches
from detinfer.ops.attention import NAME
from detinfer.ops.attention_cuda import reference
from detinfer.ops.attention_cuda_launch import Keys, Launch, plan
from detinfer.ops.attention_cuda_proof import check_close
from detinfer.ops.attention_deal import BY_RULE, Deal
from detinfer.torch_alone import torch_alone

LENGTHS = (700, 4627)
"""Keys of the proof's inputs: in splits of 256, and in longer ones."""

COUNTS = (2, 3, 16)
"""Splits of a program, where it takes several: the inputs' rows have 3 and 10, so that a last program has fewer or all."""

_PERIOD = 194
"""Keys in which the large values of the proof's inputs cancel."""

_WRONG: dict[str, dict[str, Any]] = {"from the last split": {"backwards": True}, "in splits of 128": {"split": 128}}
_proved: dict[str, int] = {}


def proved() -> dict[str, int]:
    """The machine codes that this process has proved, by Triton's hash, and how many results of each were compared."""
    return dict(_proved)


def check(launch: Launch, code: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Keys) -> None:
    """Prove the machine code ``code`` that ``launch`` got for these tensors, unless this process has proved it.

    Raises Diverged with the first byte that is another than the plain kernel's. RefusedError where nothing can be proved:
    inside a CUDA graph's capture, which runs nothing, or where the same code cannot be had for other inputs.
    """
    if code in _proved:
        return
    if torch.cuda.is_current_stream_capturing():
        raise RefusedError(
            f"{NAME}: a call met while a CUDA graph is captured has machine code that was never proved on this machine, and "
            "nothing runs in a capture: run the same step once before it, as a warm-up"
        )
    # The plain kernel and fp64 are torch's own operations, also under a policy that puts others in their place.
    with torch_alone():
        if code not in _proved:
            shown: set[str] = set()
            count = sum(_prove(launch, code, q, k, v, keys, length, shown) for length in LENGTHS)
            if shown != set(_WRONG):
                raise Diverged(
                    f"{_where(launch, q)}: the inputs do not show a wrong order, nothing was proved: report it"
                )
            _proved[code] = count


def _prove(
    launch: Launch,
    code: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: Keys,
    length: int,
    shown: set[str],
) -> int:
    """How many results were compared on ``length`` keys; ``shown`` gets the wrong orders that these inputs show."""
    case = _inputs(launch, q, k, v, keys, length)
    where = f"{_where(launch, q)}, {length} keys"
    results = []
    for deal in _deals(launch):
        again = plan(*case.given, case.keys, q.shape[3] ** -0.5, case.stride, launch.want_lse, launch.kernel, deal)
        again.checked = True
        results.append(again.start(*case.given, case.keys)[0].cpu())
        if again.code != code:
            raise RefusedError(
                f"{where}: the proof's inputs get other machine code than the call, so it was not proved: report it with "
                f"the call's shapes and strides: query {list(q.shape)} {q.stride()}, key {list(k.shape)} {k.stride()}"
            )
    ordered = functools.partial(reference, *case.plain, case.added, first=case.first, sinks=case.keys.sinks)
    want = ordered()
    if length == min(LENGTHS):
        check_close(want, case.plain, case.added, where, case.keys.sinks)
    want = want.cpu()
    shown |= {name for name, wrong in _WRONG.items() if first_mismatch(ordered(**wrong).cpu(), want) is not None}
    for got in results:
        if (found := first_mismatch(got, want)) is not None:
            raise Diverged(
                f"{where}: {found}: the machine code that Triton and ptxas made here does not keep the order, or is wrong. "
                "Do not use it: report it with the versions of Triton and of the driver"
            )
    return want.numel() * len(results)


def _deals(launch: Launch) -> tuple[Deal, ...]:
    """What holds a launch to the machine code of ``launch``: where a program takes several splits, each of some counts."""
    if launch.kernel != "decode":
        return (BY_RULE,)
    shape = launch.constants["num_warps"], launch.constants["num_stages"], launch.constants["WHOLE"]
    return tuple(Deal(each, *shape) for each in (COUNTS if launch.constants["SEVERAL"] else (1,)))


def _where(launch: Launch, q: torch.Tensor) -> str:
    constants = ", ".join(f"{name}={value}" for name, value in launch.constants.items() if value)
    return f"{NAME} on {dtype_name(q.dtype)}, {launch.kernel} of {constants}"


@dataclass
class _Case:
    """``given`` as the call has them; ``plain``, ``added``, ``first``: the same for the plain kernel, in one piece."""

    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    keys: Keys
    stride: tuple[int, ...]
    plain: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    added: torch.Tensor
    first: torch.Tensor | None


def _inputs(launch: Launch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Keys, length: int) -> _Case:
    """Stress inputs that get the call's machine code: its kinds of masks and strides, fewer rows, heads and sequences."""
    constants, dtype, device = launch.constants, q.dtype, q.device
    group, decode, even = constants["G"], launch.kernel == "decode", length == LENGTHS[0]
    if decode and constants["MASK"] and not constants["SCAN"]:
        length += launches._SCANNED  # a mask longer than the kernel reads itself
    rows = min(q.shape[2], 16 if decode else 2 * max(1, constants["BM"] // group) + 5)
    rows = min(rows, length)
    page = constants.get("PAGE", 0)
    # One head of K and V where the call shows one many times, and where many query heads share one.
    kv_heads = 1 if k.stride(1) == 0 or group * constants["SHARE"] > 4 else min(k.shape[1], 2)
    heads = kv_heads * group * constants["SHARE"]
    batch = 2 if heads * rows * v.shape[3] >= 1024 else 8
    if q.shape[0] == 1 and min(t.stride(0) for t in (q, k, v)) <= 1:
        batch = 1  # that stride has machine code of its own
    odd = torch.arange(batch, dtype=torch.int32, device=device) % 2

    # What each row sees: [batch, heads, rows, length]. The rows are the last ones.
    counted = torch.full((batch,), length, dtype=torch.int32, device=device)
    if keys.lengths is not None:
        counted -= odd * 131
    periods = counted // _PERIOD
    starts = torch.zeros_like(counted)
    if keys.starts is not None:
        starts += counted - _PERIOD * (periods - odd)
    at, row = torch.arange(length, device=device), torch.arange(rows, device=device)
    end = counted[:, None].expand(batch, rows)
    if constants["CAUSAL"]:
        end = torch.minimum(end, row[None] + (counted - rows)[:, None] + 1)
    window = 3 * _PERIOD if keys.window else 0
    low = torch.maximum(starts[:, None], end - window) if window else starts[:, None].expand(batch, rows)
    seen = ((at >= low[..., None]) & (at < end[..., None]))[:, None].expand(batch, heads, rows, length)
    added = torch.zeros(batch, heads, rows, length, device=device).masked_fill(~seen, -math.inf)
    first: torch.Tensor | None = starts[:, None, None].expand(batch, heads, rows)
    mask = None
    if keys.added is not None:
        mask, own = _mask(keys.added, (batch, heads, rows, length))
        added = added + own
        first = None  # blocks are counted from a row's first unmasked key
    depths = q.shape[3], v.shape[3]
    query, key, value = _stress(counted, (heads, kv_heads), rows, length, depths, dtype, even)

    table, paged_k, paged_v = None, key, value
    if page:
        table, (paged_k, paged_v) = _pages(page, (key, value), keys.table)
    given = (_like(q, query), _like(k, paged_k), _like(v, paged_v))
    like_out = torch.empty_strided(launch.shape, launch.stride, dtype=dtype, device="meta")
    sinks = None
    if keys.sinks is not None:
        sinks = (torch.arange(heads, device=device) % 7 - 3).to(keys.sinks.dtype)
    again = Keys(
        mask, constants["CAUSAL"], length - rows, window, None if keys.starts is None else starts,
        None if keys.lengths is None else counted, table, sinks,
    )  # fmt: skip
    stride = _strides(like_out, (batch, heads, rows, v.shape[3]))
    # As given: a dimension that is repeated holds one thing.
    plain = tuple(t.contiguous() for t in ((given[0], key, value) if page else given))
    return _Case(given, again, stride, plain, added, first)  # type: ignore[arg-type]


def _stress(
    counted: torch.Tensor,
    heads: tuple[int, int],
    rows: int,
    length: int,
    depths: tuple[int, int],
    dtype: torch.dtype,
    even: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query, key and value of ``length`` keys, of which sequence b sees the first ``counted[b]``.

    A quarter of the values is large, and cancels: counted from the sequence's end, a key of the first half of a period has
    its negative half a period on, with the same weight. What is left is small and shows what was rounded away. Whoever
    sees whole periods up to the end sees all of them cancel: exactly where they are ``even``, all of one weight, 1, which
    is the greatest of every block; else as nearly as a weight that was rounded twice does, beside maxima that change.
    """
    device, batch = counted.device, len(counted)
    draw = torch.Generator(device).manual_seed(length * 1009 + depths[0])

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=draw, device=device).float()

    query = integers(-255, 256, batch, heads[0], rows, depths[0]) / 128
    key = integers(-255, 256, batch, heads[1], length, depths[0]) / 128
    spread = integers(*((-11, -3) if even else (-14, -4)), batch, heads[1], length, 1)
    value = torch.ldexp(integers(-255, 256, batch, heads[1], length, depths[1]), spread)
    for b in range(batch):
        whole = int(counted[b]) // _PERIOD * _PERIOD
        near = torch.arange(whole, device=device).view(-1, 2, _PERIOD // 2)[:, 0].reshape(-1)
        near = int(counted[b]) - 1 - near[torch.randint(0, 4, near.shape, generator=draw, device=device) == 0]
        far = near - _PERIOD // 2
        large = integers(1, 256, heads[1], len(near), depths[1]) * 128
        value[b, :, near], value[b, :, far] = large, -large
        key[b, :, far] = key[b, :, near]
        if even:
            pair = torch.cat([near, far])
            key[b, :, pair], key[b, :, pair, 0] = 0.0, 6 * depths[0] ** 0.5
            query[b, :, :, 0] = 1.0
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _mask(mask: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(a mask of the kind of ``mask`` for ``shape``, what it adds): rows with holes, padding, and one that sees nothing.

    What cancels is hidden together.
    """
    own = [1 if stride == 0 else n for n, stride in zip(shape, mask.stride(), strict=True)]
    periods, half = own[3] // _PERIOD, _PERIOD // 2
    draw = torch.Generator(mask.device).manual_seed(9)
    drawn = torch.randint(0, 10, (*own[:3], periods, 1, half), generator=draw, device=mask.device) < 7
    seen = torch.zeros(own, dtype=torch.bool, device=mask.device)
    seen[..., own[3] - periods * _PERIOD :] = drawn.expand(*own[:3], periods, 2, half).flatten(3).flip(-1)
    if own[2] > 5:
        seen[:, :, 5] = False
    added = torch.zeros(own, device=mask.device).masked_fill(~seen, -math.inf)
    if mask.dtype is torch.bool:
        return _like(mask, seen.expand(shape)), added
    from_end = own[3] - 1 - torch.arange(own[3], device=mask.device)
    added = added + from_end % half % 11 / 4
    return _like(mask, added.to(mask.dtype).expand(shape)), added


def _pages(page: int, cached: tuple[torch.Tensor, ...], like: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(table, caches [pages, Hkv, page, D]): the keys in pages that lie anywhere; what lies in no sequence is NaN."""
    (batch, _, length, _), device = cached[0].shape, cached[0].device
    each = -(-length // page)
    draw = torch.Generator(device).manual_seed(3)
    order = torch.randperm(batch * each + 3, generator=draw, device=device)[: batch * each].to(torch.int32)
    table = _like(like, order.view(batch, each))
    found = []
    for t in cached:
        whole = torch.full((batch * each + 3, t.shape[1], page, t.shape[3]), math.nan, dtype=t.dtype, device=device)
        filled = torch.full((batch, t.shape[1], each * page, t.shape[3]), math.nan, dtype=t.dtype, device=device)
        filled[:, :, :length] = t
        whole[order.long()] = filled.view(batch, -1, each, page, t.shape[3]).transpose(1, 2).flatten(0, 1)
        found.append(whole)
    return table, found


def _strides(like: torch.Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides for ``shape`` in the order of those of ``like``, each the same modulo 16 and 1 where it is 1: so much of
    them makes machine code. A dimension that ``like`` repeats (stride 0) is repeated."""
    found, extent = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda d: (like.stride(d), like.shape[d])):
        own = like.stride(dim)
        if own > 1:
            found[dim] = extent + (own - extent) % 16 or 16
            found[dim] += 16 * (found[dim] == 1)
        else:
            found[dim] = own
        extent += found[dim] * (shape[dim] - 1)
    return tuple(found)


def _like(like: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``values`` with strides of the kind of ``like``'s, at an address that is the same modulo 16."""
    strides, width = _strides(like, tuple(values.shape)), values.element_size()
    first = like.data_ptr() % 16 // width
    count = 1 + sum(stride * (n - 1) for stride, n in zip(strides, values.shape, strict=True))
    held = torch.empty(first + count, dtype=values.dtype, device=values.device)[first:].as_strided(
        values.shape, strides
    )
    repeated = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)
    held[repeated] = values[repeated]
    return held
