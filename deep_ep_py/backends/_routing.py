"""From tokens' routings and everyone's counts to plans: integers only, no communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import _C
from ..layout import align, dispatch_layout
from ..plans import LAYOUTS, Plan
from ..types import DispatchSpec, ExpertPlacement


def on_host(plan: Plan) -> Plan:
    """A plan whose integers are all known. From a GPU it is copied back, at every use: that is a wait for the stream
    and 8 bytes a slot, and it keeps no copy alive beside a tensor that may travel through an autograd graph."""
    return plan if plan.packed.is_cpu else Plan.of(plan.packed.cpu())


def routing_on_host(spec: DispatchSpec) -> DispatchSpec:
    """The same dispatch, with what routes it on the CPU. Rows, scale factors and weights stay where they are."""
    if spec.x.is_cpu:
        return spec
    names = ("topk_idx", "is_token_in_rank", "num_tokens_per_rank", "num_tokens_per_expert")
    routing: dict[str, Any] = {n: None if (t := getattr(spec, n)) is None else t.cpu() for n in names}
    return replace(spec, plan=None if spec.plan is None else on_host(spec.plan), **routing)


def own_layout(spec: DispatchSpec, num_ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where this rank's tokens go, [T, R] bool, and its slots to each expert, [E] int64 (V1: as the caller counted)."""
    assert spec.placement is not None
    if spec.layout == "rank":
        assert spec.is_token_in_rank is not None
        assert spec.num_tokens_per_expert is not None
        return spec.is_token_in_rank, spec.num_tokens_per_expert.to(torch.int64)
    assert spec.topk_idx is not None
    _, per_expert, in_rank = dispatch_layout(spec.topk_idx.contiguous(), spec.placement, num_ranks)
    return in_rank, per_expert.to(torch.int64)


def routing_hash(spec: DispatchSpec) -> int:
    """What tells this rank's routing from others in the digest of a plan; 0 in V1, whose digest follows from the
    counts."""
    if spec.topk_idx is None or spec.layout == "rank":
        return 0
    idx = spec.topk_idx.contiguous()
    return _C.hash_routing(topk_idx=idx.data_ptr(), num_tokens=idx.shape[0], num_topk=idx.shape[1])


class Counts:
    """Everyone's counts, and what follows from them for every rank alike: where each source's rows begin.

    Args:
        tokens: [R, R] int64, entry [s, r]: tokens that source s sends to rank r. slots: [R, E] int64, entry [s, e].

    Attributes:
        of_rank: [R, R] int64, entry [s, r]: compact, the first row of source s on rank r.
        of_expert: [R, E] int64, entry [s, e]: expanded, the first row of source s for expert e on its rank.
        tokens_to, rows_to: [R] int64, unique tokens and rows (alignment gaps included) that each rank receives.
    """

    def __init__(self, spec: DispatchSpec, tokens: torch.Tensor, slots: torch.Tensor) -> None:
        assert spec.placement is not None
        self.tokens = tokens
        self.slots = slots
        self.placement = spec.placement
        self.of_rank = tokens.cumsum(0) - tokens
        self.tokens_to = tokens.sum(0)
        self.rows_to = self.tokens_to
        self.of_expert = slots
        if spec.layout == "expand":
            block, rows = self._blocks(slots.sum(0).tolist(), spec.expert_alignment)
            self.of_expert = slots.cumsum(0) - slots + torch.tensor(block, dtype=torch.int64, device="cpu")
            self.rows_to = torch.tensor(rows, dtype=torch.int64, device="cpu")

    def _blocks(self, totals: list[int], alignment: int) -> tuple[list[int], list[int]]:
        """First row of each expert's block, and rows of each rank."""
        first, rows = [0] * len(totals), [0] * self.tokens.shape[1]
        for rank in range(len(rows)):
            for expert in experts_of(self.placement, rank).tolist():
                first[expert] = rows[rank]
                rows[rank] += align(totals[expert], alignment)
        return first, rows

    def route(
        self,
        spec: DispatchSpec,
        topk_idx: torch.Tensor | None,
        is_token_in_rank: torch.Tensor | None,
        source: int,
        columns: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Final targets of some tokens of ``source``, [n, W] int64.

        Args:
            topk_idx: [n, K] int64; is_token_in_rank: [n, W] bool, which drives the layout ``rank`` (V1).
            columns: [W] int32, the ranks that its columns stand for; None: all of them.
        """
        by_rank = spec.layout == "rank"
        drives = is_token_in_rank if by_rank else topk_idx
        assert drives is not None
        num_ranks = self.tokens.shape[1]
        if columns is None:
            columns = torch.arange(num_ranks, dtype=torch.int32, device="cpu")
        targets = torch.empty(drives.shape, dtype=torch.int64, device="cpu")
        drives = drives.contiguous()
        first_of_rank, first_of_expert = self.of_rank[source].contiguous(), self.of_expert[source].contiguous()
        wrong = _C.route(
            layout=LAYOUTS.index(spec.layout),
            topk_idx=0 if by_rank else drives.data_ptr(),
            is_token_in_rank=drives.data_ptr() if by_rank else 0,
            columns=columns.data_ptr(),
            num_tokens=drives.shape[0],
            num_slots=drives.shape[1],
            num_ranks=num_ranks,
            num_experts=self.placement.num_experts,
            expert_rank=self.placement.rank.data_ptr(),
            expert_local=self.placement.local.data_ptr(),
            first_of_rank=first_of_rank.data_ptr(),
            first_of_expert=first_of_expert.data_ptr(),
            targets=targets.data_ptr(),
        )
        assert not wrong, wrong  # routings were checked before anything was published
        return targets

    def plan(
        self,
        spec: DispatchSpec,
        targets: torch.Tensor,
        rank: int,
        num_max_tokens: int,
        routings: Sequence[int],
        relay_counts: torch.Tensor | None = None,
        relay: torch.Tensor | None = None,
    ) -> Plan:
        """The plan of one rank.

        Args:
            num_max_tokens: M, given or found out. routings: :func:`routing_hash` of every rank.
            relay_counts, relay: of two hops; :meth:`~..plans.Plan.pack`.
        """
        num_rows, prefix = int(self.rows_to[rank]), self.tokens.cumsum(0)
        return Plan.pack(
            layout=spec.layout,
            targets=targets,
            num_rows=num_rows,
            num_output_rows=num_rows if spec.num_worst_tokens is None else spec.num_worst_tokens,
            num_recv_tokens=int(self.tokens_to[rank]),
            rank_prefix=prefix,
            expert_counts=self.slots.sum(0)[experts_of(self.placement, rank)],
            rank=rank,
            digest=self._digest(spec, prefix, routings),
            expert_alignment=spec.expert_alignment,
            num_max_tokens_per_rank=num_max_tokens,
            relay_counts=relay_counts,
            relay=relay,
        )

    def _digest(self, spec: DispatchSpec, prefix: torch.Tensor, routings: Sequence[int]) -> int:
        if spec.layout == "rank":
            counts = prefix.to(torch.int32).contiguous()
            return _C.prefix_digest(prefix=counts.data_ptr(), num_ranks=counts.shape[0])
        return _C.plan_digest(
            layout=LAYOUTS.index(spec.layout),
            num_experts=self.placement.num_experts,
            placement_hash=self.placement.digest,
            alignment=spec.expert_alignment,
            routings=routings,
        )


def experts_of(placement: ExpertPlacement, rank: int) -> torch.Tensor:
    """[E_local] int64: the rank's experts in the order of their local ids."""
    mine = (placement.rank == rank).nonzero().reshape(-1)
    return mine[torch.argsort(placement.local[mine], stable=True)]


def local_ids(topk_idx: torch.Tensor, placement: ExpertPlacement, rank: torch.Tensor) -> torch.Tensor:
    """[n, K] int64: ids among the experts of ``rank`` [n, 1], -1 for slots of other ranks and for none."""
    if placement.num_experts == 0:
        return torch.full_like(topk_idx, -1)
    expert, device = topk_idx.clamp(min=0), topk_idx.device
    here = (topk_idx >= 0) & (placement.rank.to(device, torch.int64)[expert] == rank)
    return torch.where(here, placement.local.to(device, torch.int64)[expert], -1)
