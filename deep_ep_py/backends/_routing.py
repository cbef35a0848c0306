"""From a dispatch's routing and everyone's counts to its plan: pure functions over [T, K] and [R, E] integers."""

from __future__ import annotations

import hashlib

import torch

from ..layout import align, encode_targets
from ..plans import Plan
from ..types import DispatchSpec, ExpertPlacement


def owners(topk_idx: torch.Tensor, placement: ExpertPlacement) -> torch.Tensor:
    """[T, K] int64: the rank of each slot's expert, -1 for none."""
    return _look_up(placement.rank, topk_idx)


def local_ids(topk_idx: torch.Tensor, placement: ExpertPlacement, rank: torch.Tensor) -> torch.Tensor:
    """[n, K] int64: ids among the experts of ``rank`` [n, 1], -1 for slots of other ranks and for none."""
    local = _look_up(placement.local, topk_idx)
    return torch.where(owners(topk_idx, placement) == rank, local, torch.full_like(local, -1))


def tokens_in_ranks(spec: DispatchSpec, num_ranks: int) -> torch.Tensor:
    """[T, R] bool: where each token goes."""
    if spec.is_token_in_rank is not None:
        return spec.is_token_in_rank
    assert spec.topk_idx is not None
    assert spec.placement is not None
    owner = owners(spec.topk_idx, spec.placement)
    in_rank = torch.zeros((owner.shape[0], num_ranks + 1), dtype=torch.bool, device="cpu")
    in_rank.scatter_(1, torch.where(owner >= 0, owner, torch.full_like(owner, num_ranks)), True)
    return in_rank[:, :num_ranks]


def own_counts(spec: DispatchSpec, in_rank: torch.Tensor) -> torch.Tensor:
    """[R + E] int64: this rank's tokens to each rank, and its slots to each expert (V1: as the caller counted them)."""
    assert spec.placement is not None
    if spec.num_tokens_per_expert is not None:
        per_expert = spec.num_tokens_per_expert.to(torch.int64)
    else:
        assert spec.topk_idx is not None
        per_expert = torch.bincount(spec.topk_idx[spec.topk_idx >= 0], minlength=spec.placement.num_experts)
    return torch.cat([in_rank.sum(0, dtype=torch.int64), per_expert])


def rows_per_rank(spec: DispatchSpec, counts: torch.Tensor) -> list[int]:
    """Rows of every rank's output (expanded: alignment gaps included), from everyone's counts [R, R + E]."""
    assert spec.placement is not None
    num_ranks = counts.shape[0]
    if spec.layout != "expand":
        return counts[:, :num_ranks].sum(0).tolist()
    aligned = [align(n, spec.expert_alignment) for n in counts[:, num_ranks:].sum(0).tolist()]
    rows = [0] * num_ranks
    for rank, n in zip(spec.placement.rank.tolist(), aligned, strict=True):
        rows[rank] += n
    return rows


def build_plan(
    spec: DispatchSpec, in_rank: torch.Tensor, counts: torch.Tensor, rank: int, num_max_tokens: int, seq: int
) -> Plan:
    """The plan of one rank, from everyone's counts [R, R + E].

    Args:
        num_max_tokens: M, given or found out. seq: of the operation; handles of equal counts are told apart by it.
    """
    placement = spec.placement
    assert placement is not None
    num_ranks = counts.shape[0]
    tokens, slots = counts[:, :num_ranks], counts[:, num_ranks:]
    local = experts_of(placement, rank)
    num_rows = rows_per_rank(spec, counts)[rank]
    expand = spec.layout == "expand"
    targets = _expanded_targets(spec, slots, rank) if expand else _targets(spec, in_rank, tokens, rank)
    return Plan.pack(
        layout=spec.layout,
        targets=targets,
        num_rows=num_rows,
        num_output_rows=num_rows if spec.num_worst_tokens is None else spec.num_worst_tokens,
        num_recv_tokens=int(tokens[:, rank].sum()),
        rank_prefix=tokens.cumsum(0),
        expert_counts=slots.sum(0)[local],
        rank=rank,
        digest=plan_digest(spec, counts) ^ seq,
        expert_alignment=spec.expert_alignment,
        num_max_tokens_per_rank=num_max_tokens,
    )


def _targets(spec: DispatchSpec, in_rank: torch.Tensor, tokens: torch.Tensor, rank: int) -> torch.Tensor:
    """Rows of a rank are sorted by (source rank, source token): this rank's begin where those before it end."""
    rows = tokens[:rank].sum(0) + in_rank.cumsum(0, dtype=torch.int64) - 1  # [T, R]
    if spec.layout == "rank":
        to = torch.arange(in_rank.shape[1], dtype=torch.int64, device="cpu").expand_as(rows)
        to = torch.where(in_rank, to, torch.full_like(to, -1))
        return encode_targets(to, rows, torch.zeros_like(in_rank))
    assert spec.topk_idx is not None
    assert spec.placement is not None
    owner = owners(spec.topk_idx, spec.placement)
    shared = torch.zeros_like(owner, dtype=torch.bool)
    for k in range(owner.shape[1]):
        shared[:, k] = (owner[:, k + 1 :] == owner[:, k : k + 1]).any(1)
    return encode_targets(owner, rows.gather(1, owner.clamp(min=0)), shared)


def _expanded_targets(spec: DispatchSpec, slots: torch.Tensor, rank: int) -> torch.Tensor:
    """Rows are sorted by (local expert, source rank, source token, slot), blocks of experts at aligned rows."""
    assert spec.topk_idx is not None
    assert spec.placement is not None
    first = slots[:rank].sum(0)  # [E]: behind what lower ranks send to the expert ...
    totals = slots.sum(0).tolist()
    for r in range(slots.shape[0]):
        row = 0
        for expert in experts_of(spec.placement, r).tolist():
            first[expert] += row  # ... in the expert's block
            row += align(totals[expert], spec.expert_alignment)
    expert = spec.topk_idx.reshape(-1)
    by_expert = torch.argsort(expert, stable=True)  # then by (token, slot); -1 comes first
    in_order = expert[by_expert]
    begin = torch.searchsorted(in_order, in_order)  # where the expert's slots begin in this order
    nth = torch.empty_like(expert)
    nth[by_expert] = torch.arange(expert.numel(), dtype=torch.int64, device="cpu") - begin
    row_of = _look_up(first, expert) + nth
    owner = owners(spec.topk_idx, spec.placement)
    return encode_targets(owner, row_of.view_as(owner), torch.zeros_like(owner, dtype=torch.bool))


def experts_of(placement: ExpertPlacement, rank: int) -> torch.Tensor:
    """[E_local] int64: the rank's experts in the order of their local ids."""
    mine = (placement.rank == rank).nonzero().reshape(-1)
    return mine[torch.argsort(placement.local[mine], stable=True)]


def _look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``table[index]`` as int64, -1 where the index is negative."""
    if table.numel() == 0:
        return torch.full_like(index, -1)
    found = table.to(torch.int64)[index.clamp(min=0)]
    return torch.where(index >= 0, found, torch.full_like(found, -1))


def plan_digest(spec: DispatchSpec, counts: torch.Tensor) -> int:
    h = hashlib.blake2b(counts.numpy().tobytes(), digest_size=8)
    h.update(repr((spec.layout, tuple(counts.shape), spec.expert_alignment, spec.num_max_tokens_per_rank)).encode())
    return int.from_bytes(h.digest(), "little") >> 1
