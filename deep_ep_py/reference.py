"""The executable specification of dispatch and combine: the oracle of every test.

Pure torch, no communication, nothing of ours imported but its own first half (:mod:`._reference_rows`): all ranks'
inputs in (lists indexed by rank), all ranks' outputs out (lists indexed by rank). Written for reading; loops run over
ranks and slots, never over tokens or elements.

*Placement*: contiguous; the first ``E mod R`` ranks own one more expert. *Order*: received rows by (source rank, source
token); expanded rows by (local expert, source rank, source token, slot). Counts per expert count slots: a token that
names an expert twice counts twice, and has two expanded rows.

*Numerics of combine*: one accumulator per element, float64 for float64 rows and float32 otherwise. It starts at +0.0,
at the bias, or at bias 0 + bias 1 (added in the accumulator's type). Rows are added one at a time in the recipe's
order, and the sum is rounded once, to nearest even. The recipes:

- V1: ascending rank.
- V2 compact: slots ascending; a rank's row is added at the position of that rank's highest slot.
- V2 expanded, multiple reduction not allowed: slots ascending, every slot's row into the one accumulator.
- V2 expanded, multiple reduction allowed: the slots of one rank are summed first (slots ascending, from +0.0, in the
  accumulator's type) and rounded to the row dtype; that value is added at the position of the rank's highest slot.
- Over several domains (``num_scaleup_ranks`` contiguous ranks each), unless V2 does not allow multiple reduction: each
  of these sums is made for the ranks of one domain, one's own included, and rounded to the row dtype; that value is
  added at the position of the domain's highest slot (V1: domains ascending).

*Weights*: V1 sums every column over the destination ranks (float32, ascending rank, from +0.0, unmasked; over several
domains as its rows). V2 takes slot k from the rank that owns expert ``topk_idx[t, k]``, and 0 where that is -1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._reference_rows import (
    CPU,
    Many,
    Placement,
    align,
    arrivals,
    compact_rows,
    contiguous_placement,
    expanded_rows,
    int64,
    iota,
    localise,
    only_highest,
    scatter,
    take,
    tokens_in_ranks,
)

__all__ = [
    "CPU",
    "Contribution",
    "Many",
    "Placement",
    "V1Layout",
    "V1Received",
    "V2Received",
    "align",
    "arrivals",
    "compact_rows",
    "contiguous_placement",
    "contributions",
    "domain_contributions",
    "expanded_rows",
    "int64",
    "iota",
    "localise",
    "only_highest",
    "reduce_rows",
    "scatter",
    "slot_weights",
    "take",
    "tokens_in_ranks",
    "v1_combine",
    "v1_dispatch",
    "v1_layout",
    "v2_combine",
    "v2_contributions",
    "v2_dispatch",
    "v2_grouped_contributions",
]

#: (tokens, source, rows): ``acc[tokens] += source[rows]``; no token occurs twice in one contribution.
Contribution = tuple[Tensor, Tensor, Tensor]


def reduce_rows(
    contributions: Sequence[Contribution], num_tokens: int, hidden: int, dtype: torch.dtype, biases: Many = ()
) -> Tensor:
    """[num_tokens, hidden] ``dtype``: the contributions added in the order given, by the numerics of this module."""
    acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    acc = torch.zeros((num_tokens, hidden), dtype=acc_dtype, device=CPU)
    if biases:
        acc = biases[0].to(acc_dtype, copy=True)
    if len(biases) == 2:
        acc = acc + biases[1].to(acc_dtype)
    for tokens, source, rows in contributions:
        acc.index_copy_(0, tokens, acc.index_select(0, tokens) + take(source, rows).to(acc_dtype))
    return acc.to(dtype)


def contributions(y: Many, owner: Tensor, rows: Tensor) -> list[Contribution]:
    """Columns ascending: row ``rows[t, c]`` of ``y[owner[t, c]]`` for every token, where the owner is not -1."""
    parts = []
    for column in range(owner.shape[1]):
        for r, source in enumerate(y):
            tokens = (owner[:, column] == r).nonzero()[:, 0]
            parts.append((tokens, source, rows[tokens, column]))
    return parts


def v2_contributions(y: Many, owner: Tensor, rows: Tensor) -> list[Contribution]:
    """Compact: slots ascending, a rank's row at its highest slot. ``owner`` [T, K], ``rows`` [T, R]."""
    return contributions(y, only_highest(owner), rows.gather(1, owner.clamp(min=0)))


def v2_grouped_contributions(y: Many, owner: Tensor, rows: Tensor) -> list[Contribution]:
    """Expanded, each rank's slots summed and rounded first, then as compact. ``owner`` and ``rows`` [T, K]."""
    grouped = []
    for r, source in enumerate(y):
        inner = contributions([source], torch.where(owner == r, 0, -1), rows)
        grouped.append(reduce_rows(inner, len(owner), source.shape[1], source.dtype))
    return v2_contributions(grouped, owner, iota(len(owner))[:, None].expand(-1, len(y)))


def domain_contributions(
    recipe: Callable[[Many, Tensor, Tensor], list[Contribution]], y: Many, owner: Tensor, rows: Tensor, size: int
) -> list[Contribution]:
    """``recipe`` for the ranks of each domain of ``size`` ranks, summed and rounded; 0: all ranks are one domain."""
    if not size:
        return recipe(y, owner, rows)
    sums = []
    for d in range(len(y) // size):
        inner = recipe(y, torch.where(owner // size == d, owner, -1), rows)
        sums.append(reduce_rows(inner, len(owner), y[0].shape[1], y[0].dtype))
    return v2_contributions(sums, owner // size, iota(len(owner))[:, None].expand(-1, len(sums)))


def slot_weights(weights: Many, owner: Tensor, rows: Tensor) -> Tensor:
    """[T, K] float32: slot k's value from its owner, at ``rows`` [T, K] there; 0 for empty slots."""
    out = torch.zeros(owner.shape, dtype=torch.float32, device=CPU)
    for k in range(owner.shape[1]):
        for r, of_rank in enumerate(weights):
            tokens = (owner[:, k] == r).nonzero()[:, 0]
            at = of_rank.index_select(0, rows[tokens, k])
            out[tokens, k] = at if at.dim() == 1 else at[:, k]
    return out


@dataclass(frozen=True)
class V1Layout:
    """``num_tokens_per_rank`` [R] int32, ``num_tokens_per_expert`` [E] int32, ``is_token_in_rank`` [T, R] bool."""

    num_tokens_per_rank: Tensor
    num_tokens_per_expert: Tensor
    is_token_in_rank: Tensor


def v1_layout(topk_idx: Tensor, num_experts: int, num_ranks: int) -> V1Layout:
    """The layout of one rank's tokens. ``topk_idx`` [T, K] int64."""
    sent = tokens_in_ranks(topk_idx, contiguous_placement(num_experts, num_ranks))
    per_expert = torch.bincount(topk_idx[topk_idx >= 0].reshape(-1), minlength=num_experts)
    return V1Layout(sent.sum(0).int(), per_expert.int(), sent)


@dataclass(frozen=True)
class V1Received:
    """One rank's dispatch results, the comparable parts of its handle, and ``num_recv``, its count of valid rows.

    After ``num_worst_tokens``: ``recv_x``, ``recv_sf``, ``recv_topk_weights`` are undefined past ``num_recv`` (here 0);
    the tails of ``recv_topk_idx`` and ``recv_src_idx`` are -1; the list is empty.
    """

    num_recv: int
    recv_x: Tensor
    recv_sf: Tensor | None
    recv_topk_idx: Tensor | None  # [N, K] int64 local ids, -1 elsewhere
    recv_topk_weights: Tensor | None  # [N, K] float32, 0 where recv_topk_idx is -1
    num_recv_tokens_per_expert_list: list[int]  # aligned
    rank_prefix_matrix: Tensor  # [R, R] int32: [s, r] rows from sources 0..s on rank r
    recv_src_idx: Tensor  # [N] int32 token index at its source rank
    is_token_in_rank: Tensor  # [T, R] bool
    send_head: Tensor  # [T, R] int32 index among the tokens this rank sends to r, or -1


def v1_dispatch(
    x: Many,
    is_token_in_rank: Many,
    num_tokens_per_expert: Many,
    *,
    sf: Many | None = None,
    topk_idx: Many | None = None,
    topk_weights: Many | None = None,
    expert_alignment: int = 1,
    num_worst_tokens: int = 0,
) -> list[V1Received]:
    placement = contiguous_placement(len(num_tokens_per_expert[0]), len(x))
    sent_counts = torch.stack([sent.sum(0) for sent in is_token_in_rank])  # [source, destination]
    per_expert = torch.stack(list(num_tokens_per_expert)).sum(0)
    source_token = [iota(len(sent)) for sent in is_token_in_rank]
    received = []
    for rank, own in enumerate(is_token_in_rank):
        num_recv = int(sent_counts[:, rank].sum())
        num_rows, place = num_worst_tokens or num_recv, iota(num_recv)
        recv_idx = recv_weights = None
        if topk_idx is not None and topk_weights is not None:
            local = localise(arrivals(topk_idx, is_token_in_rank, rank), placement, rank)
            weights = torch.where(local >= 0, arrivals(topk_weights, is_token_in_rank, rank), 0.0)
            recv_idx = scatter(local + 1, place, num_rows) - 1
            recv_weights = scatter(weights, place, num_rows)
        counts = [align(c, expert_alignment) for c in per_expert[placement.owner[:-1] == rank].tolist()]
        received.append(
            V1Received(
                num_recv=num_recv,
                recv_x=scatter(arrivals(x, is_token_in_rank, rank), place, num_rows),
                recv_sf=scatter(arrivals(sf, is_token_in_rank, rank), place, num_rows) if sf else None,
                recv_topk_idx=recv_idx,
                recv_topk_weights=recv_weights,
                num_recv_tokens_per_expert_list=[] if num_worst_tokens else counts,
                rank_prefix_matrix=sent_counts.cumsum(0).int(),
                recv_src_idx=(scatter(arrivals(source_token, is_token_in_rank, rank) + 1, place, num_rows) - 1).int(),
                is_token_in_rank=own,
                send_head=torch.where(own, own.long().cumsum(0) - 1, -1).int(),
            )
        )
    return received


def v1_combine(
    y: Many,
    is_token_in_rank: Many,
    *,
    topk_weights: Many | None = None,
    bias: Sequence[Many] | None = None,
    num_scaleup_ranks: int = 0,
) -> list[tuple[Tensor, Tensor | None]]:
    """``y`` [N, H] and ``topk_weights`` [N, K] by destination rank; ``bias``: per source rank, none to two [T, H].

    Returns, per source rank, ``(combined_x [T, H], combined_topk_weights [T, K] float32 | None)``.
    """
    combined = []
    for rank, rows in enumerate(compact_rows(is_token_in_rank)):
        owner, weights = torch.where(rows >= 0, iota(len(y)), -1), None
        parts = domain_contributions(contributions, y, owner, rows, num_scaleup_ranks)
        out = reduce_rows(parts, len(rows), y[rank].shape[1], y[rank].dtype, bias[rank] if bias else ())
        if topk_weights is not None:
            parts = domain_contributions(contributions, topk_weights, owner, rows, num_scaleup_ranks)
            weights = reduce_rows(parts, len(rows), topk_weights[rank].shape[1], torch.float32)
        combined.append((out, weights))
    return combined


@dataclass(frozen=True)
class V2Received:
    """One rank's dispatch results and handle fields; ``row_valid`` [rows] bool says which rows are defined.

    Undefined rows (alignment gaps, and everything past the valid rows without CPU sync) are 0 here, as zero padding
    makes the gaps. ``recv_src_metadata`` holds the valid rows only; its private column 1 is 0.
    """

    recv_x: Tensor
    recv_sf: Tensor | None
    recv_topk_idx: Tensor | None  # compact: [rows, K] int64 local ids, -1 elsewhere; expanded: None
    recv_topk_weights: Tensor | None  # compact: [rows, K] float32, all source weights unmasked; expanded: [rows]
    row_valid: Tensor
    num_recv_tokens: int
    num_expanded_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    psum_num_recv_tokens_per_scaleup_rank: Tensor
    psum_num_recv_tokens_per_expert: Tensor
    num_unaligned_recv_tokens_per_expert: Tensor
    recv_src_metadata: Tensor
    dst_buffer_slot_idx: Tensor


def v2_dispatch(
    x: Many,
    topk_idx: Many,
    *,
    num_experts: int,
    num_max_tokens_per_rank: int,
    topk_weights: Many | None = None,
    sf: Many | None = None,
    expert_alignment: int = 1,
    do_expand: bool = False,
    do_cpu_sync: bool = True,
) -> list[V2Received]:
    num_topk, a, m = topk_idx[0].shape[1], expert_alignment, num_max_tokens_per_rank
    placement = contiguous_placement(num_experts, len(x))
    in_rank = [tokens_in_ranks(t, placement) for t in topk_idx]
    slot_rows, counts = expanded_rows(topk_idx, placement, a)
    global_token = [source * m + iota(len(t)) for source, t in enumerate(topk_idx)]
    received = []
    for rank, num_local in enumerate(placement.num_local_experts):
        per_source = int64([int(sent[:, rank].sum()) for sent in in_rank])
        aligned = int64([align(c, a) for c in counts[rank].tolist()])
        num_recv, num_expanded = int(per_source.sum()), int(aligned.sum())
        if not do_cpu_sync:
            num_recv, num_expanded = len(x) * m, align(len(x) * m * min(num_topk, num_local) + num_local * (a - 1), a)
        # row [V]: which arrival each valid row of the output is a copy of; slot [V]: for which slot; place [V]: where
        local = localise(arrivals(topk_idx, in_rank, rank), placement, rank)  # [N, K]
        to_row = torch.where(local >= 0, arrivals(slot_rows, in_rank, rank), -1)  # [N, K]
        num_rows, row, slot, place = num_recv, iota(len(local)), iota(0), iota(len(local))
        if do_expand:
            row, slot = (to_row >= 0).nonzero(as_tuple=True)
            num_rows, place = num_expanded, to_row[row, slot]
        recv_weights = None
        if topk_weights is not None:
            weights = arrivals(topk_weights, in_rank, rank)
            recv_weights = scatter(weights[row, slot] if do_expand else weights, place, num_rows)
        exact = aligned.cumsum(0) - aligned + counts[rank]
        owner = placement.owner[topk_idx[rank]]
        sent_as = (in_rank[rank].long().cumsum(0) - 1).gather(1, owner.clamp(min=0))
        token = arrivals(global_token, in_rank, rank)[:, None]
        metadata = [token, torch.zeros_like(token), to_row if do_expand else torch.full_like(to_row, -1)]
        received.append(
            V2Received(
                recv_x=scatter(take(arrivals(x, in_rank, rank), row), place, num_rows),
                recv_sf=scatter(take(arrivals(sf, in_rank, rank), row), place, num_rows) if sf else None,
                recv_topk_idx=None if do_expand else scatter(local, place, num_rows),
                recv_topk_weights=recv_weights,
                row_valid=scatter(torch.ones_like(place), place, num_rows).bool(),
                num_recv_tokens=num_recv,
                num_expanded_tokens=num_expanded,
                num_recv_tokens_per_expert_list=aligned.tolist() if do_cpu_sync else [],
                psum_num_recv_tokens_per_scaleup_rank=per_source.cumsum(0).int(),
                psum_num_recv_tokens_per_expert=(exact if do_expand else aligned.cumsum(0)).int(),
                num_unaligned_recv_tokens_per_expert=counts[rank].int(),
                recv_src_metadata=torch.cat(metadata, dim=1).int(),
                dst_buffer_slot_idx=torch.where(only_highest(owner) >= 0, owner * m + sent_as, -1).int(),
            )
        )
    return received


def v2_combine(
    y: Many,
    topk_idx: Many,
    *,
    num_experts: int,
    expert_alignment: int = 1,
    do_expand: bool = False,
    allow_multiple_reduction: bool = True,
    topk_weights: Many | None = None,
    bias: Sequence[Many] | None = None,
    num_scaleup_ranks: int = 0,
) -> list[tuple[Tensor, Tensor | None]]:
    """``y`` by destination rank ([N, H], expanded [rows, H]), ``topk_weights`` likewise ([N, K], expanded [rows]).

    Returns, per source rank, ``(combined_x [T, H], combined_topk_weights [T, K] float32 | None)``.
    """
    placement = contiguous_placement(num_experts, len(y))
    token_rows = compact_rows([tokens_in_ranks(t, placement) for t in topk_idx])
    slot_rows, _ = expanded_rows(topk_idx, placement, expert_alignment)
    expand_recipe = v2_grouped_contributions if allow_multiple_reduction else contributions
    recipe, size = (
        expand_recipe if do_expand else v2_contributions,
        num_scaleup_ranks if allow_multiple_reduction else 0,
    )
    combined = []
    for rank, (by_rank, by_slot) in enumerate(zip(token_rows, slot_rows, strict=True)):
        owner = placement.owner[topk_idx[rank]]
        parts = domain_contributions(recipe, y, owner, by_slot if do_expand else by_rank, size)
        out, weights = reduce_rows(parts, len(owner), y[rank].shape[1], y[rank].dtype, bias[rank] if bias else ()), None
        if topk_weights is not None:
            weights = slot_weights(topk_weights, owner, by_slot if do_expand else by_rank.gather(1, owner.clamp(min=0)))
        combined.append((out, weights))
    return combined
