"""Full-size rows whose sums are exact: checked without the oracle, whose order of addition small cases check."""

from __future__ import annotations

import torch
from torch import Tensor

from deep_ep_py import reference
from deep_ep_py.testing import Case
from deep_ep_py.testing.cases import computed_once, route

#: A prefill step of DeepSeek-V3 on one rank, and next to nothing on the other.
LARGE = Case((4095, 1), hidden=7168, num_experts=256, routing="distinct")


@computed_once(maxsize=1)
def routing(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """topk_idx [T, K] and topk_weights [T, K] of every rank."""
    seeded = torch.Generator().manual_seed(1)
    topk_idx = [route(case.routing, t, case.num_topk, case.num_experts, seeded) for t in case.num_tokens]
    return topk_idx, [torch.rand(t.shape, generator=seeded) for t in topk_idx]


@computed_once(maxsize=1)
def rows(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """x and y [T, H] of every rank: whole numbers of -4 to 4, so that K of them add up exactly in any order."""
    seeded = torch.Generator().manual_seed(2)
    x, y = (
        [torch.randint(-4, 5, (t, case.hidden), generator=seeded, dtype=torch.int8) for t in case.num_tokens]
        for _ in range(2)
    )
    return [t.to(case.dtype) for t in x], [t.to(case.dtype) for t in y]


@computed_once(maxsize=1)
def owners(case: Case) -> list[Tensor]:
    """[T, K, R] bool of every rank: which rank a slot belongs to."""
    owner = reference.contiguous_placement(case.num_experts, case.num_ranks).owner
    return [torch.stack([owner[t] == r for r in range(case.num_ranks)], dim=-1) for t in routing(case)[0]]


def in_ranks(case: Case) -> list[Tensor]:
    """[T, R] bool of every rank: where its tokens go."""
    return [to.any(dim=1) for to in owners(case)]


@computed_once(maxsize=2)
def placed(case: Case, capacity: int, expand: bool) -> list[tuple[Tensor, Tensor]]:
    """V2, by destination: for each received row the token (over all ranks' tokens), and the handle's metadata."""
    number = torch.arange(sum(case.num_tokens))[:, None].split(case.num_tokens)
    received = reference.v2_dispatch(
        number, routing(case)[0], num_experts=case.num_experts, num_max_tokens_per_rank=capacity, do_expand=expand
    )
    return [(r.recv_x[:, 0], r.recv_src_metadata) for r in received]


def total(y: Tensor, sent_to: Tensor) -> Tensor:
    """What comes back of ``y`` where every rank adds its own number to each row: ``sent_to`` [T, .., R] bool."""
    copies = sent_to.reshape(len(y), -1, sent_to.shape[-1]).sum(1)  # [T, R]
    own = copies @ torch.arange(copies.shape[1])
    return (y.float() * copies.sum(1, keepdim=True) + own[:, None]).to(y.dtype)
