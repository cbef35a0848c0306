"""Where rows land, of the oracle (:mod:`.reference`): the placement of experts and the place of every row. Imports
nothing of ours.

``Many``: one tensor for each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CPU = torch.device("cpu")
Many = Sequence[Tensor]


def align(n: int, alignment: int) -> int:
    """``n`` rounded up to a multiple of ``alignment``."""
    return -(-n // alignment) * alignment


def as_bytes(x: Tensor) -> Tensor:
    """One-byte rows as uint8 (torch gathers and scatters no fp8), others unchanged."""
    return x.contiguous().view(torch.uint8) if x.dtype.itemsize == 1 else x


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``x[index]``, for every dtype."""
    return as_bytes(x).index_select(0, index).view(x.dtype)


def scatter(rows: Tensor, at: Tensor, num_rows: int) -> Tensor:
    """``num_rows`` zero rows, those at ``at`` replaced by ``rows``."""
    raw = as_bytes(rows)
    return raw.new_zeros((num_rows, *rows.shape[1:])).index_copy_(0, at, raw).view(rows.dtype)


def int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=CPU)


def iota(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.int64, device=CPU)


@dataclass(frozen=True)
class Placement:
    """Where experts live: ``owner`` and ``local_id`` [E + 1] int64, ``num_local_experts`` per rank.

    The tables end with an entry of -1, which is what expert -1 finds.
    """

    owner: Tensor
    local_id: Tensor
    num_local_experts: tuple[int, ...]


def contiguous_placement(num_experts: int, num_ranks: int) -> Placement:
    """Experts in order, rank by rank; the first ``num_experts % num_ranks`` ranks own one more."""
    each, more = divmod(num_experts, num_ranks)
    counts = tuple(each + (rank < more) for rank in range(num_ranks))
    owner = [rank for rank, count in enumerate(counts) for _ in range(count)]
    local_id = [i for count in counts for i in range(count)]
    return Placement(int64([*owner, -1]), int64([*local_id, -1]), counts)


def localise(topk_idx: Tensor, placement: Placement, rank: int) -> Tensor:
    """[.., K] int64: local expert ids on ``rank``, -1 where the slot is empty or another rank's."""
    return torch.where(placement.owner[topk_idx] == rank, placement.local_id[topk_idx], -1)


def tokens_in_ranks(topk_idx: Tensor, placement: Placement) -> Tensor:
    """[T, R] bool: whether any slot of the token belongs to the rank."""
    owner = placement.owner[topk_idx]
    return torch.stack([(owner == r).any(dim=1) for r in range(len(placement.num_local_experts))], dim=1)


def only_highest(owner: Tensor) -> Tensor:
    """``owner`` [T, K] where a slot is the highest of its token with that owner, -1 elsewhere."""
    comes_again = (owner[:, :, None] == owner[:, None, :]).triu(1).any(dim=2)
    return torch.where(comes_again, -1, owner)


def compact_rows(is_token_in_rank: Many) -> list[Tensor]:
    """Per source rank, [T, R] int64: the row that the token takes on each destination rank, -1 where it is not sent."""
    rows, first = [], torch.zeros(is_token_in_rank[0].shape[1], dtype=torch.int64, device=CPU)
    for sent in is_token_in_rank:
        rows.append(torch.where(sent, first + sent.long().cumsum(0) - 1, -1))
        first = first + sent.sum(0)
    return rows


def expanded_rows(topk_idx: Many, placement: Placement, alignment: int) -> tuple[list[Tensor], list[Tensor]]:
    """Where every slot lands in the expanded output of its expert's owner.

    Returns ``(rows, counts)``: per source rank [T, K] int64, -1 for empty slots; per rank [E_local] int64, unaligned.
    """
    experts = torch.cat([t.reshape(-1) for t in topk_idx])  # in order (source rank, source token, slot)
    rows = torch.full_like(experts, -1)
    counts: list[list[int]] = [[] for _ in placement.num_local_experts]
    for expert, owner in enumerate(placement.owner[:-1].tolist()):
        here = (experts == expert).nonzero()[:, 0]
        rows[here] = sum(align(c, alignment) for c in counts[owner]) + iota(len(here))
        counts[owner].append(len(here))
    by_source = torch.split(rows, [t.numel() for t in topk_idx])
    return [r.reshape(t.shape) for r, t in zip(by_source, topk_idx, strict=True)], [int64(c) for c in counts]


def arrivals(x: Many, is_token_in_rank: Many, rank: int) -> Tensor:
    """The rows of ``x`` that ``rank`` receives, in the order of compact rows."""
    pieces = [
        as_bytes(take(mine, sent[:, rank].nonzero()[:, 0])) for mine, sent in zip(x, is_token_in_rank, strict=True)
    ]
    return torch.cat(pieces).view(x[0].dtype)
