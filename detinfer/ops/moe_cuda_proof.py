"""Stress inputs for mixtures of experts on a GPU, and the proofs of its kernels on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from detinfer.errors import Diverged
from detinfer.ops import matmul_wide, moe_cuda
from detinfer.ops.evidence import REFERENCE_NAME, Evidence, from_values
from detinfer.ops.moe import choices, take
from detinfer.reference import moe as reference
from detinfer.reference.arithmetic import store


def prove_topk(op: str, dtype: torch.dtype, function: Callable[..., Any]) -> tuple[int, bytes]:
    """``function`` on the choices of the CPU's proof and on rows beyond a warp's registers, against the reference."""
    evidence = Evidence(op, dtype)
    for x, k, largest, dim, index in choices(dtype):
        on = x.cuda() if dim else x.t().contiguous().cuda()
        values, indices = (t.cpu() if dim else t.t().contiguous().cpu() for t in function(on, k, dim, largest))
        where = f"{k} of {x.shape[1]}, {'greatest' if largest else 'least'}, dimension {dim}"
        evidence.expect(indices, index, f"{where}, indices")
        evidence.expect(values, take(x, 1, index), f"{where}, values")
    for n in (129, 256, 513, 1024, 1025):
        few = np.random.default_rng(n).integers(-40, 41, (3, n)).astype(np.float32)
        index = torch.from_numpy(reference.top_k(few, 8))
        evidence.expect(function(from_values(few, dtype).cuda(), 8)[1].cpu(), index, f"8 of {n}")
    return evidence.total()


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Both signs, exponents spread over sixteen powers of two, on the current GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device="cuda")

    mantissa = (draw(128, 256) * (draw(0, 2) * 2 - 1)).to(torch.float32)
    return torch.ldexp(mantissa, draw(-23, -7)).to(dtype)


def operands(
    tokens: int, experts: int, k: int, n: int, dtype: torch.dtype, across: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [tokens, k], weights [experts, n, k] and bias on which the order of k shows; weights' columns contiguous if
    ``across``. The first and the last term of each sum are large and nearly cancel."""
    x, w = numbers(1, tokens, k, dtype=dtype), numbers(2, experts, n, k, dtype=dtype)
    x[:, 0], x[:, -1] = 2.0**7, -(2.0**7)
    w[:, :, -1] = w[:, :, 0] = w[:, :, 0].sign() * (2 + w[:, :, 0].abs())
    if across:
        w = w.mT.contiguous().mT
    return x, w, numbers(3, experts, n, dtype=dtype)


def prove_experts(dtype: torch.dtype) -> tuple[int, bytes]:
    """Products of many experts against the plain kernel, and the sum over places against the reference's explicit loop.

    Every size of a tile, both layouts of weights, experts without a token, with one and with most of them, K that ends
    inside a chunk and rows that are not on 16-byte boundaries; a turned k must show. Returns how many results were compared
    and their bytes. Raises Diverged with the first difference.
    """
    evidence = Evidence("detinfer::experts", dtype)
    for tokens, experts, k, n, across in ((77, 9, 136, 100, False), (77, 9, 136, 104, True), (9, 4, 35, 21, False)):
        x, w, bias = operands(tokens, experts, k, n, dtype, across)
        chosen = torch.from_numpy(np.random.default_rng(k).permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1))
        chosen = chosen[:, :3].contiguous()
        chosen[: tokens // 2] = chosen[:1]  # three experts get half of all
        chosen = chosen.where(chosen != 1, chosen.sort(1)[0][:, -1:] % experts).cuda()
        for unrounded in (False, True):
            groups = moe_cuda.Groups(chosen, experts)
            given: dict[str, Any] = {"unrounded": unrounded, "places": 3}
            expected = moe_cuda.product(x, w, bias, groups, path="reference", **given).cpu()
            turned = moe_cuda.product(x.flip(1), w.flip(2), bias, groups, path="reference", **given).cpu()
            if unrounded and torch.equal(turned.view(torch.int32), expected.view(torch.int32)):
                raise Diverged("detinfer::experts: the inputs of its proof would not show a wrong order; report it")
            for rows in moe_cuda.TILE_ROWS:
                found = moe_cuda.product(x, w, bias, moe_cuda.Groups(chosen, experts, rows), path="tile", **given)
                evidence.expect(found.cpu(), expected, f"{k} -> {n}, tiles of {rows}")
    x, w, _ = operands(150, 5, 192, 272, dtype)  # as ``wide`` takes them, whose code is proved on its way
    chosen = torch.from_numpy(np.random.default_rng(1).integers(0, 4, (150, 2))).cuda()
    for unrounded in (False, True):
        cut = [moe_cuda.Groups(chosen, 5, rows) for rows in matmul_wide.ROWS]
        given = {"unrounded": unrounded, "places": 2}
        expected = moe_cuda.product(x, w, None, cut[0], path="reference", **given).cpu()
        for group in cut:
            found = moe_cuda.product(x, w, None, group, **given)
            evidence.expect(found.cpu(), expected, f"many tokens, tiles of {group.tile_rows}")
    weights, found, shared = numbers(5, 40, 4), numbers(6, 40, 4, 50), numbers(7, 40, 50)
    found[:, 3] = -found[:, 0]
    weights[:, 3] = weights[:, 0] * (1 + 2.0**-19)
    chosen = torch.zeros(40, 4, dtype=torch.int64, device="cuda")
    for more in (None, shared):
        got = moe_cuda.combine(chosen, weights, found, 1, dtype, more)
        values = reference.combine(
            weights.cpu().numpy(), found.cpu().numpy(), None if more is None else more.cpu().numpy()
        )
        evidence.expect(got.cpu(), from_values(values, dtype), "the sum over places")
    if store(reference.combine(weights.cpu().numpy()[:, ::-1], found.cpu().numpy()[:, ::-1], None),
             REFERENCE_NAME[dtype]).tobytes() == store(values, REFERENCE_NAME[dtype]).tobytes():  # fmt: skip
        raise Diverged("detinfer::experts: the inputs of its proof would not show a wrong order of places; report it")
    return evidence.total()
