"""From what V2's callers pass to what the engine runs: every argument checked, nothing moved yet."""

from __future__ import annotations

from typing import Any

import torch

from . import validate
from .errors import EPArgumentError
from .handle import EPHandle
from .layout import worst_case_expanded_rows
from .plans import Plan
from .types import CombineSpec, DispatchSpec, ExpertPlacement

Tokens = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class Requests:
    """Builds the specs of one buffer. All methods raise EPArgumentError."""

    def __init__(self, rank: int, num_ranks: int, num_max_tokens_per_rank: int) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        self._num_max_tokens_per_rank = num_max_tokens_per_rank
        self._placements: dict[int, ExpertPlacement] = {}

    def dispatch(
        self,
        x: Tokens,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        stats: torch.Tensor | None,
        num_experts: int | None,
        num_max_tokens_per_rank: int | None,
        expert_alignment: int | None,
        num_sms: int,
        sync: bool,
        expand: bool,
    ) -> DispatchSpec:
        """An uncached dispatch; ``sync``: exact output sizes."""
        rows, sf = validate.tokens(x)
        num_tokens = rows.shape[0]
        topk_idx = validate.tensor("topk_idx", topk_idx, torch.int64, (num_tokens, None))
        num_topk = topk_idx.shape[1]
        if num_topk == 0:
            raise EPArgumentError.of("topk_idx", "at least one slot", validate.describe(topk_idx))
        if topk_weights is not None:
            topk_weights = validate.tensor("topk_weights", topk_weights, torch.float32, (num_tokens, num_topk))
        placement = self._placement(validate.whole("num_experts", num_experts, 1))
        if stats is not None:
            validate.tensor(
                "cumulative_local_expert_recv_stats", stats, torch.int32, (placement.num_local[self._rank],)
            )
        given = self._num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank
        limit = validate.whole("num_max_tokens_per_rank", given, 0)
        if limit and num_tokens > limit:
            raise EPArgumentError.of("x", f"at most num_max_tokens_per_rank = {limit} tokens", num_tokens)
        if limit * self._num_ranks >= 2**31:
            most = f"at most {2**31 // self._num_ranks - 1}, so that global token indices fit 32 bits"
            raise EPArgumentError.of("num_max_tokens_per_rank", most, limit)
        if not limit and not sync:
            raise EPArgumentError.of("num_max_tokens_per_rank", "a positive number where do_cpu_sync is off", limit)
        spec = DispatchSpec(
            x=rows,
            sf=sf,
            layout="expand" if expand else "topk",
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            placement=placement,
            expert_alignment=1 if expert_alignment is None else validate.whole("expert_alignment", expert_alignment, 1),
            num_max_tokens_per_rank=limit,
            max_threads=validate.whole("num_sms", num_sms, 0),
        )
        if not sync:
            spec.num_worst_tokens = self.worst_rows(spec, expand=expand)
        return spec

    def cached_dispatch(
        self,
        x: Tokens,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        handle: EPHandle,
        agree: dict[str, int | None],
        num_sms: int,
        expand: bool,
    ) -> DispatchSpec:
        """A dispatch along the handle's plan; ``agree``: arguments that must be None or the handle's."""
        plan = self._plan_of(handle)
        rows, sf = validate.tokens(x)
        num_tokens, num_topk = plan.num_tokens, plan.num_slots
        if rows.shape[0] != num_tokens:
            raise EPArgumentError.of("x", f"{num_tokens} tokens, as the handle's dispatch", rows.shape[0])
        if expand != handle.do_expand:
            raise EPArgumentError.of("do_expand", f"{handle.do_expand}, as the handle's dispatch", expand)
        for name, value in agree.items():
            if value is not None and value != getattr(handle, name):
                raise EPArgumentError.of(name, f"{getattr(handle, name)}, as the handle's dispatch, or None", value)
        if topk_idx is not None and not torch.equal(topk_idx, handle.topk_idx):
            raise EPArgumentError.of("topk_idx", "None, or the handle's", "other routing; leave out the handle")
        if topk_weights is not None:
            topk_weights = validate.tensor("topk_weights", topk_weights, torch.float32, (num_tokens, num_topk))
        return DispatchSpec(
            x=rows,
            sf=sf,
            layout=plan.layout,
            topk_weights=topk_weights,
            plan=plan,
            expert_alignment=plan.expert_alignment,
            num_worst_tokens=None if handle._has_host_counts else plan.num_output_rows,
            num_max_tokens_per_rank=plan.num_max_tokens_per_rank,
            max_threads=validate.whole("num_sms", num_sms, 0) or handle.num_sms,
        )

    def combine(
        self, x: Any, handle: Any, topk_weights: Any, bias: Any, num_sms: int, allow_multiple_reduction: bool
    ) -> CombineSpec:
        """A combine along the handle's plan."""
        plan = self._plan_of(handle)
        y = validate.combine_rows(x, plan.num_output_rows, "dispatch")
        if topk_weights is not None:
            rows = (plan.num_output_rows,)
            shape = rows if handle.do_expand else (*rows, plan.num_slots)
            topk_weights = validate.tensor("topk_weights", topk_weights, torch.float32, shape)
        return CombineSpec(
            y=y,
            plan=plan,
            weights=topk_weights,
            bias=validate.biases(bias, y, plan.num_tokens),
            reduce_per_rank=handle.do_expand and allow_multiple_reduction,
            max_threads=validate.whole("num_sms", num_sms, 0) or handle.num_sms,
        )

    def _plan_of(self, handle: Any) -> Plan:
        if not isinstance(handle, EPHandle):
            raise EPArgumentError.of("handle", "the EPHandle that dispatch returned", validate.describe(handle))
        plan = handle._plan
        if plan.num_ranks != self._num_ranks or plan.rank != self._rank:
            made = f"rank {plan.rank} of {plan.num_ranks}"
            raise EPArgumentError.of("handle", f"one made by rank {self._rank} of {self._num_ranks}", f"one of {made}")
        return plan

    def worst_rows(self, spec: DispatchSpec, *, expand: bool) -> int:
        """Rows that hold for any routing, equal on all ranks."""
        assert spec.placement is not None
        assert spec.topk_idx is not None
        ranks, limit = self._num_ranks, spec.num_max_tokens_per_rank
        if not expand:
            return ranks * limit
        local = spec.placement.num_local[self._rank]
        return worst_case_expanded_rows(ranks, limit, spec.topk_idx.shape[1], local, spec.expert_alignment)

    def _placement(self, num_experts: int) -> ExpertPlacement:
        placement = self._placements.get(num_experts)
        if placement is None:
            placement = self._placements[num_experts] = ExpertPlacement.contiguous(num_experts, self._num_ranks)
        return placement
