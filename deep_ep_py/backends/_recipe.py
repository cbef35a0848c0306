"""Combine's arithmetic: rows added in the order that the plan fixes, one accumulator, rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..layout import primary, target_ranks
from ..plans import Plan


def positions(plan: Plan, num_ranks: int) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """How a rank fetches its rows: by holder, then by (token, column).

    Returns ``(index, counts, position)``: flat indices of the primary targets in that order, how many each holder
    has, and [T, W] int64 where each target's row stands in that order (shared targets: their primary's; -1: none).
    """
    ranks = target_ranks(plan.targets)
    moving = primary(plan.targets)
    index = moving.reshape(-1).nonzero().reshape(-1)
    holder = ranks.reshape(-1)[index]
    index = index[torch.argsort(holder, stable=True)]
    counts = torch.bincount(holder, minlength=num_ranks).tolist()
    position = torch.full_like(plan.targets, -1)
    position.view(-1)[index] = torch.arange(index.numel(), dtype=torch.int64, device=index.device)
    # A slot that shares its row has the one of its token that moves to that rank; where slots share, there is only one.
    of_rank = torch.full((ranks.shape[0], num_ranks), -1, dtype=torch.int64, device=ranks.device)
    token, slot = moving.nonzero(as_tuple=True)
    of_rank[token, ranks[token, slot]] = position[token, slot]
    shared = (ranks >= 0) & ~moving
    position = torch.where(shared, of_rank.gather(1, ranks.clamp(min=0)), position)
    return index, counts, position


def combine_rows(
    out: torch.Tensor,
    rows: torch.Tensor,
    plan: Plan,
    position: torch.Tensor,
    bias: Sequence[torch.Tensor],
    reduce_per_rank: bool,
) -> None:
    """``out`` [T, H]: bias and ``rows`` (at ``position``), columns ascending, rounded once to out's dtype."""
    acc_dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    acc = torch.zeros(out.shape, dtype=acc_dtype, device=out.device)
    if bias:
        acc.copy_(bias[0])
    if len(bias) == 2:
        acc += bias[1].to(acc_dtype)
    moving = primary(plan.targets)
    ranks = target_ranks(plan.targets)
    for column in range(moving.shape[1]):
        if not reduce_per_rank:
            _add(acc, rows, position[:, column], moving[:, column])
            continue
        of_rank = ranks[:, column : column + 1]
        last = moving[:, column] & ~(ranks[:, column + 1 :] == of_rank).any(1)
        tokens = last.nonzero().reshape(-1)
        partial = torch.zeros((tokens.numel(), out.shape[1]), dtype=acc_dtype, device=out.device)
        for k in range(column + 1):
            _add(partial, rows, position[tokens, k], (ranks[:, k] == ranks[:, column])[tokens])
        _add_at(acc, tokens, partial.to(out.dtype).to(acc_dtype))
    # One NaN, whatever bits the additions and, on a GPU, the rounding made.
    out.copy_(acc).masked_fill_(acc.isnan(), float("nan"))


def combine_weights(out: torch.Tensor, weights: torch.Tensor, plan: Plan, position: torch.Tensor) -> None:
    """``out`` [T, K] from the fetched ``weights``: a sum of columns (``rank``), or each slot's own value."""
    out.zero_()
    if plan.layout == "rank":
        for r in range(position.shape[1]):
            _add(out, weights, position[:, r], position[:, r] >= 0)
        return
    for k in range(position.shape[1]):
        tokens = (position[:, k] >= 0).nonzero().reshape(-1)
        values = weights.index_select(0, position[tokens, k])
        out[tokens, k] = values[:, k] if plan.layout == "topk" else values[:, 0]


def _add(acc: torch.Tensor, rows: torch.Tensor, position: torch.Tensor, where: torch.Tensor) -> None:
    """``acc[t] += rows[position[t]]`` for the tokens of ``where``."""
    tokens = where.nonzero().reshape(-1)
    _add_at(acc, tokens, rows.index_select(0, position[tokens]).to(acc.dtype))


def _add_at(acc: torch.Tensor, tokens: torch.Tensor, values: torch.Tensor) -> None:
    """``acc[tokens] += values``; each token occurs once, so the order of addition is the caller's."""
    if acc.is_cpu:
        acc.index_add_(0, tokens, values)
    else:
        # A GPU would add by atomics, which flush subnormal float32 to zero.
        acc.index_copy_(0, tokens, acc.index_select(0, tokens).add_(values))
