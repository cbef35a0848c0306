"""The exchange inside an MoE layer, differentiable: this library's, and what a user writes over ``all_to_all_single``.

An exchange has ``dispatch(x [T, H], topk_idx [T, K], topk_weights [T, K])`` -> rows [D, H] sorted by local expert,
source rank, token and slot, their weights [D], the inclusive end row of each local expert [E_local] int32, and what
``combine(y [D, H], state)`` -> [T, H] needs. All rows lie in the same order, so experts compute the same.

Copying rows to several places and summing rows are each other's gradients, and both are written as such: torch's own
gradient of an indexed copy adds atomically, row by row, and that of an indexed sum keeps more than it needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

import deep_ep_py


class Arrived(NamedTuple):
    """What dispatch returns."""

    rows: Tensor
    row_weights: Tensor
    expert_offsets: Tensor
    state: Any


class Library:
    """This library: expanded rows, both steps one call."""

    def __init__(self, buffer: deep_ep_py.ElasticBuffer, num_experts: int) -> None:
        self._buffer, self._num_experts = buffer, num_experts

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Arrived:
        rows, row_weights, handle = deep_ep_py.plan_and_dispatch(
            x, topk_idx, topk_weights, self._buffer, self._num_experts, expand=True
        )
        return Arrived(rows, row_weights, handle.expert_offsets, handle)

    def combine(self, y: Tensor, state: Any) -> Tensor:
        return deep_ep_py.combine(y, state)


class RowPerSlot:
    """One row for each token and slot, as Megatron's all-to-all dispatcher and torchtitan do it.

    Sort the slots by expert, exchange counts, rows and weights, sort what arrived by local expert; then back, and sum a
    token's K rows in float32, rounded once. Weights travel and multiply inside the expert, as in this library's layer:
    weighting at home instead, over [T, K, H] in float32, costs the user more than their exchange.
    """

    def __init__(self, num_experts: int) -> None:
        self._num_ranks, self._num_experts = dist.get_world_size(), num_experts

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Arrived:
        expert_of_slot = topk_idx.flatten()
        order = expert_of_slot.argsort(stable=True)  # experts lie in order over ranks, so this sorts by rank as well
        num_topk = topk_idx.shape[1]
        copies = Copies(order // num_topk, _inverse(order), width=num_topk)
        counts = torch.bincount(expert_of_slot, minlength=self._num_experts)
        recv_counts = torch.empty_like(counts)
        dist.all_to_all_single(recv_counts, counts)
        sent, received = (c.view(self._num_ranks, -1).sum(1).tolist() for c in (counts, recv_counts))
        rows = AllToAll.apply(CopyRows.apply(x, copies), received, sent)
        row_weights = AllToAll.apply(Permute.apply(topk_weights.flatten(), order, copies.order), received, sent)

        # Rows arrive by source rank and expert.
        num_local = self._num_experts // self._num_ranks
        expert_of_row = torch.arange(num_local).repeat(self._num_ranks).repeat_interleave(recv_counts)
        by_expert = expert_of_row.argsort(stable=True)
        by_source = _inverse(by_expert)
        offsets = recv_counts.view(self._num_ranks, -1).sum(0).cumsum(0, dtype=torch.int32)
        return Arrived(
            Permute.apply(rows, by_expert, by_source),
            Permute.apply(row_weights, by_expert, by_source),
            offsets,
            (copies, by_expert, by_source, received, sent),
        )

    def combine(self, y: Tensor, state: Any) -> Tensor:
        copies, by_expert, by_source, received, sent = state
        back = AllToAll.apply(Permute.apply(y, by_source, by_expert), sent, received)
        return SumRows.apply(back, copies)


class RowPerRank:
    """One row for each token and rank that it goes to: the tuned form, with fewer bytes and more bookkeeping.

    Ids and weights travel in one exchange beside the rows; the receiver copies a row to its experts there, and sums
    their results before they go back. Sums are ``embedding_bag``'s, of the ways to write them in torch the fastest on a
    CPU, although it rounds to the rows' dtype after every addition.
    """

    def __init__(self, num_experts: int) -> None:
        self._num_ranks, self._num_local = dist.get_world_size(), num_experts // dist.get_world_size()

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Arrived:
        num_tokens, num_topk = topk_idx.shape
        rank_of_slot = topk_idx // self._num_local
        in_rank = torch.zeros((num_tokens, self._num_ranks), dtype=torch.bool).scatter_(1, rank_of_slot, True)
        rank_of_copy, token_of_copy = in_rank.t().nonzero(as_tuple=True)
        copies = Copies.grouped(token_of_copy, num_tokens)
        counts = in_rank.sum(0)
        recv_counts = torch.empty_like(counts)
        dist.all_to_all_single(recv_counts, counts)
        sent, received = counts.tolist(), recv_counts.tolist()
        rows = AllToAll.apply(CopyRows.apply(x, copies), received, sent)
        here = rank_of_slot[token_of_copy] == rank_of_copy[:, None]
        local = torch.where(here, topk_idx[token_of_copy] % self._num_local, -1)
        # Ids as numbers of the weights' dtype (exact: there are not 2^24 experts), so that one exchange carries both.
        meta = torch.cat([local.to(topk_weights.dtype), CopyRows.apply(topk_weights, copies)], 1)
        meta = AllToAll.apply(meta, received, sent)

        recv_ids = meta.detach()[:, :num_topk].to(torch.int64)
        row, slot = (recv_ids >= 0).nonzero(as_tuple=True)
        expert = recv_ids[row, slot]
        by_expert = expert.argsort(stable=True)
        row, slot = row[by_expert], slot[by_expert]
        inside = Copies.grouped(row, len(rows))
        row_weights = meta.flatten().index_select(0, row * (2 * num_topk) + num_topk + slot)
        offsets = torch.bincount(expert, minlength=self._num_local).cumsum(0, dtype=torch.int32)
        return Arrived(CopyRows.apply(rows, inside), row_weights, offsets, (copies, inside, received, sent))

    def combine(self, y: Tensor, state: Any) -> Tensor:
        copies, inside, received, sent = state
        return SumRows.apply(AllToAll.apply(SumRows.apply(y, inside), sent, received), copies)


@dataclass(frozen=True)
class Copies:
    """Rows copied to several places.

    Attributes:
        source: [n] int64, the row that each copy is of.
        order: [n] int64, the copies in the order of their rows.
        width: every row has so many copies; 0: ``starts`` says which.
        starts: [rows] int64: where in ``order`` the copies of each row begin.
    """

    source: Tensor
    order: Tensor
    width: int = 0
    starts: Tensor | None = None

    @classmethod
    def grouped(cls, source: Tensor, num_rows: int) -> Copies:
        counts = torch.bincount(source, minlength=num_rows)
        return cls(source, source.argsort(stable=True), starts=counts.cumsum(0) - counts)

    def copy(self, x: Tensor) -> Tensor:
        return x[self.source]

    def sum(self, y: Tensor) -> Tensor:
        if self.width:
            return y[self.order].view(-1, self.width, y.shape[1]).sum(1)  # torch adds in float32 and rounds once
        return torch.nn.functional.embedding_bag(self.order, y, self.starts, mode="sum")


class CopyRows(Function):
    @staticmethod
    def forward(ctx, x, copies):
        ctx.copies = copies
        return copies.copy(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.copies.sum(gradient.contiguous()), None


class SumRows(Function):
    @staticmethod
    def forward(ctx, y, copies):
        ctx.copies = copies
        return copies.sum(y)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.copies.copy(gradient), None


class Permute(Function):
    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.inverse = inverse
        return x[order]

    @staticmethod
    def backward(ctx, gradient):
        return gradient[ctx.inverse], None, None


class AllToAll(Function):
    """Rows in blocks by destination rank -> rows in blocks by source rank."""

    @staticmethod
    def forward(ctx, x, received, sent):
        ctx.splits = sent, received
        return _all_to_all(x, received, sent)

    @staticmethod
    def backward(ctx, gradient):
        return _all_to_all(gradient.contiguous(), *ctx.splits), None, None


def _all_to_all(x: Tensor, received: list[int], sent: list[int]) -> Tensor:
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x, received, sent)
    return out


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return inverse
