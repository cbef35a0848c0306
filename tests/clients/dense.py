"""Inputs and the dense layer that clients are compared with.

An expert multiplies a token by its own row of gains, so the layer is sum over slots of weight · gain[expert] · x. All
values are small whole numbers and powers of two, chosen so that every product and every sum is exact in the row's type,
in any order. A client's result must then *equal* the dense one: no tolerance, and no wrong row small enough to pass.
"""

from __future__ import annotations

import torch

HIDDEN = 64
NUM_TOPK = 3
LOCAL_EXPERTS = 4
CASES = ("full", "dropped", "empty")


def gains(num_ranks: int, dtype: torch.dtype) -> torch.Tensor:
    """[E, HIDDEN] of ``dtype``: whole numbers up to 4 (2 in bf16, whose eight bits must hold every sum)."""
    largest = 2 if dtype == torch.bfloat16 else 4
    generator = torch.Generator().manual_seed(1)
    shape = (num_ranks * LOCAL_EXPERTS, HIDDEN)
    return torch.randint(1, largest + 1, shape, generator=generator).to(dtype)


def tokens(rank: int, num_ranks: int, case: str, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x [T, HIDDEN], topk_idx [T, K] int64, topk_weights [T, K] float32, and the gradient of the output [T, HIDDEN].

    ``dropped``: a quarter of the slots is -1. ``empty``: the last rank has no tokens, nobody needs rank 0's experts.
    """
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    num_tokens = 0 if case == "empty" and rank == num_ranks - 1 else 20 + 7 * rank
    largest = 2 if dtype == torch.bfloat16 else 8
    x, grad = (
        torch.randint(-largest, largest + 1, (num_tokens, HIDDEN), generator=generator).to(dtype) for _ in range(2)
    )
    scores = torch.rand(num_tokens, num_ranks * LOCAL_EXPERTS, generator=generator)
    if case == "empty":
        scores[:, :LOCAL_EXPERTS] = -1
    topk_idx = scores.topk(NUM_TOPK).indices
    if case == "dropped":
        topk_idx = topk_idx.masked_fill(torch.rand(topk_idx.shape, generator=generator) < 0.25, -1)
    topk_weights = 0.5 ** torch.randint(0, 2, topk_idx.shape, generator=generator)
    return x, topk_idx, topk_weights, grad


def layer(x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """[T, HIDDEN] float64; differentiable in x and the weights."""
    weights = topk_weights.double() * (topk_idx >= 0)
    return torch.einsum("tk,tkh,th->th", weights, gain.double()[topk_idx.clamp(min=0)], x.double())


def unequal(result: torch.Tensor, expected: torch.Tensor) -> int:
    """How many elements differ; -1 for another shape."""
    if result.shape != expected.shape:
        return -1
    return int((result.double() != expected.double()).sum())


def worst_row(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative error of a row, so that a single wrong token shows; rows far below the average count as such."""
    result, expected = (t.detach().double().reshape(-1, t.shape[-1]) for t in (result, expected))
    norms = expected.norm(dim=1)
    return float(((result - expected).norm(dim=1) / (norms + 0.05 * norms.mean() + 1e-30)).max())
