"""From what callers pass to what the engine runs: every argument checked, nothing moved yet."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from . import validate
from .errors import EPArgumentError
from .handle import EPHandle, unpack_v1
from .layout import worst_case_expanded_rows
from .plans import Plan
from .types import PLACEMENTS, CombineSpec, DispatchSpec, ExpertPlacement

#: No kernel wants more; and a slip of the pen must not allocate this many rows an expert.
MAX_ALIGNMENT = 1 << 16

Tokens = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
#: A dispatch returns what it is given: rows, or the pair of rows and scale factors.
Rows = TypeVar("Rows", torch.Tensor, tuple[torch.Tensor, torch.Tensor])


class Requests:
    """Builds the specs of one V2 buffer. All methods raise EPArgumentError."""

    def __init__(
        self, rank: int, num_ranks: int, num_max_tokens_per_rank: int, num_hops: int, device: torch.device
    ) -> None:
        self._rank = rank
        self._device = device
        self._num_hops = num_hops
        self.num_ranks = num_ranks
        self._num_max_tokens_per_rank = num_max_tokens_per_rank
        self._placements = Placements(num_ranks)

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
        if topk_idx is None or num_experts is None:
            raise validate.missing("topk_idx" if topk_idx is None else "num_experts")
        rows, sf = validate.tokens(x, self._device)
        spec = self.routing(
            rows, topk_idx, topk_weights, (torch.float32,), num_experts, num_max_tokens_per_rank, expert_alignment,
            sync, expand,
        )  # fmt: skip
        spec.sf = sf
        spec.max_threads = validate.whole("num_sms", num_sms, 0)
        if stats is not None:
            assert spec.placement is not None
            num_local = spec.placement.num_local[self._rank]
            name = "cumulative_local_expert_recv_stats"
            validate.tensor(name, stats, self._device, torch.int32, (num_local,))
            if stats.is_inference() and not torch.is_inference_mode_enabled():
                raise EPArgumentError.of(name, "a tensor that can be changed here", "one made in inference mode")
            if num_local > 1 and stats.stride(0) == 0:
                raise EPArgumentError.of(name, "an element in memory for each expert", "an expanded tensor")
        return spec

    def routing(
        self,
        rows: torch.Tensor,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        weight_dtypes: tuple[torch.dtype, ...],
        num_experts: int | None,
        num_max_tokens_per_rank: int | None,
        expert_alignment: int | None,
        sync: bool,
        expand: bool,
        placement: str = "contiguous",
    ) -> DispatchSpec:
        """A dispatch of ``rows`` [T, H], which are checked already, along a routing that is new."""
        num_tokens = rows.shape[0]
        topk_idx = validate.tensor("topk_idx", topk_idx, self._device, torch.int64, (num_tokens, None))
        num_topk = topk_idx.shape[1]
        if num_topk == 0:
            raise EPArgumentError.of("topk_idx", "at least one slot", validate.describe(topk_idx))
        if topk_weights is not None:
            shape = (num_tokens, num_topk)
            topk_weights = validate.floats("topk_weights", topk_weights, self._device, weight_dtypes, shape)
        table = self._placements.of(validate.whole("num_experts", num_experts, 1), placement)
        given = self._num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank
        limit = validate.whole("num_max_tokens_per_rank", given, 0)
        if limit and num_tokens > limit:
            raise EPArgumentError.of("x", f"at most num_max_tokens_per_rank = {limit} tokens", num_tokens)
        if limit * self.num_ranks >= 2**31:
            most = f"at most {2**31 // self.num_ranks - 1}, so that global token indices fit 32 bits"
            raise EPArgumentError.of("num_max_tokens_per_rank", most, limit)
        if not limit and not sync:
            raise EPArgumentError.of("num_max_tokens_per_rank", "a positive number where do_cpu_sync is off", limit)
        spec = DispatchSpec(
            x=rows,
            layout="expand" if expand else "topk",
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            placement=table,
            expert_alignment=1
            if expert_alignment is None
            else validate.whole("expert_alignment", expert_alignment, 1, MAX_ALIGNMENT),
            num_max_tokens_per_rank=limit,
        )
        if not sync:
            spec.num_worst_tokens = self.worst_rows(
                table.num_experts, num_topk, spec.expert_alignment, limit, expand=expand, placement=placement
            )
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
        rows, sf = validate.tokens(x, self._device)
        if expand != handle.do_expand:
            raise EPArgumentError.of("do_expand", f"{handle.do_expand}, as the handle's dispatch", expand)
        for name, value in agree.items():
            if value is not None and value != getattr(handle, name):
                raise EPArgumentError.of(name, f"{getattr(handle, name)}, as the handle's dispatch, or None", value)
        if topk_idx is not None and not _same_routing(topk_idx, handle.topk_idx):
            raise EPArgumentError.of("topk_idx", "None, or the handle's", "other routing; leave out the handle")
        spec = self.dispatch_along(plan, rows, topk_weights, (torch.float32,), fixed=not handle._has_host_counts)
        spec.sf = sf
        spec.max_threads = validate.whole("num_sms", num_sms, 0) or handle.num_sms
        return spec

    def combine(
        self, x: Any, handle: Any, topk_weights: Any, bias: Any, num_sms: int, allow_multiple_reduction: bool
    ) -> CombineSpec:
        """A combine along the handle's plan."""
        plan = self._plan_of(handle)
        spec = self.combine_along(plan, x, topk_weights, (torch.float32,), bias, allow_multiple_reduction)
        spec.max_threads = validate.whole("num_sms", num_sms, 0) or handle.num_sms
        return spec

    def dispatch_along(
        self, plan: Plan, rows: torch.Tensor, topk_weights: Any, weight_dtypes: tuple[torch.dtype, ...], *, fixed: bool
    ) -> DispatchSpec:
        """A dispatch of ``rows`` [T, H], which are checked but for T; ``fixed``: as many output rows."""
        if rows.shape[0] != plan.num_tokens:
            raise EPArgumentError.of("x", f"{plan.num_tokens} tokens, as the handle's dispatch", rows.shape[0])
        if topk_weights is not None:
            shape = (plan.num_tokens, plan.num_slots)
            topk_weights = validate.floats("topk_weights", topk_weights, self._device, weight_dtypes, shape)
        return DispatchSpec(
            x=rows,
            layout=plan.layout,
            topk_weights=topk_weights,
            plan=plan,
            expert_alignment=plan.expert_alignment,
            num_worst_tokens=plan.num_output_rows if fixed else None,
            num_max_tokens_per_rank=plan.num_max_tokens_per_rank,
        )

    def combine_along(
        self,
        plan: Plan,
        x: Any,
        topk_weights: Any,
        weight_dtypes: tuple[torch.dtype, ...],
        bias: Any,
        allow_multiple_reduction: bool,
    ) -> CombineSpec:
        """A combine of ``x`` [rows, H]."""
        y = validate.combine_rows(x, self._device, plan.num_output_rows, "dispatch")
        expand = plan.layout == "expand"
        if topk_weights is not None:
            rows = (plan.num_output_rows,)
            shape = rows if expand else (*rows, plan.num_slots)
            topk_weights = validate.floats("topk_weights", topk_weights, self._device, weight_dtypes, shape)
        return CombineSpec(
            y=y,
            plan=plan,
            weights=topk_weights,
            bias=validate.biases(bias, y, plan.num_tokens),
            reduce_per_rank=expand and allow_multiple_reduction,
            reduce_per_domain=allow_multiple_reduction,
        )

    def check_plan(self, plan: Plan) -> Plan:
        """Raises EPArgumentError: the plan of another rank, over another number of ranks, or on another device."""
        self.check_device(plan.packed)
        if plan.num_ranks != self.num_ranks or plan.rank != self._rank:
            made = f"rank {plan.rank} of {plan.num_ranks}"
            raise EPArgumentError.of("handle", f"one made by rank {self._rank} of {self.num_ranks}", f"one of {made}")
        return plan

    def check_device(self, packed: Any) -> torch.Tensor:
        """The tensor of a packed plan. Raises EPArgumentError: not a plan that could be read here."""
        tensor = validate.plain("handle", packed)
        if not isinstance(tensor, torch.Tensor) or tensor.device != self._device:
            raise EPArgumentError.of("handle", f"a plan on {self._device}", validate.describe(packed))
        return tensor

    def _plan_of(self, handle: Any) -> Plan:
        if not isinstance(handle, EPHandle):
            raise EPArgumentError.of("handle", "the EPHandle that dispatch returned", validate.describe(handle))
        return self.check_plan(handle._plan)

    @property
    def takes_two_hops(self) -> bool:
        """Plans then have a second part, as long as the tokens that this rank relays."""
        return self._num_hops > 1

    def num_local_experts(self, num_experts: int, placement: str = "contiguous") -> int:
        """Experts of this rank. No tables are built: fake kernels ask for it, in whose mode tensors have no data."""
        return ExpertPlacement.shares(num_experts, self.num_ranks, placement)[self._rank]

    def worst_rows(
        self,
        num_experts: int,
        num_topk: int,
        alignment: int,
        num_max_tokens_per_rank: int | None,
        *,
        expand: bool,
        placement: str = "contiguous",
    ) -> int:
        """Rows that hold for any routing."""
        limit = self._num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank
        if not expand:
            return self.num_ranks * limit
        local = self.num_local_experts(num_experts, placement)
        return worst_case_expanded_rows(self.num_ranks, limit, num_topk, local, alignment)


class Placements:
    """Where experts live, by their number and the name of the placement; made once."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._made: dict[tuple[int, str], ExpertPlacement] = {}
        self._ranks_on_device: dict[int, torch.Tensor] = {}

    def of(self, num_experts: int, placement: str = "contiguous") -> ExpertPlacement:
        """Raises EPArgumentError: no placement has that name."""
        table = self._made.get((num_experts, placement))
        if table is None:
            if placement not in PLACEMENTS:
                raise EPArgumentError.of("placement", " or ".join(map(repr, PLACEMENTS)), repr(placement))
            table = self._made[num_experts, placement] = ExpertPlacement.of(num_experts, self._num_ranks, placement)
        return table

    def ranks_on(self, device: torch.device, num_experts: int) -> torch.Tensor:
        """[E] int32, the rank of each expert. Always asked for the same device; the first time it is copied there."""
        ranks = self._ranks_on_device.get(num_experts)
        if ranks is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                known = "one that a call before the capture has had: its table is copied to the GPU then"
                raise EPArgumentError.of("num_experts", known, num_experts)
            ranks = self._ranks_on_device[num_experts] = self.of(num_experts).rank.to(device)
        return ranks


class RequestsV1:
    """Builds the specs of one V1 buffer. All methods raise EPArgumentError.

    Args:
        domains: ranks of each scale-up domain, where rows take two hops; else None.
    """

    def __init__(
        self, rank: int, num_ranks: int, domains: tuple[tuple[int, ...], ...] | None, device: torch.device
    ) -> None:
        self._rank, self._num_ranks, self._domains, self._device = rank, num_ranks, domains, device
        self.placements = Placements(num_ranks)

    def dispatch(
        self,
        x: Tokens,
        num_tokens_per_rank: torch.Tensor | None,
        num_tokens_per_rdma_rank: torch.Tensor | None,
        is_token_in_rank: torch.Tensor | None,
        num_tokens_per_expert: torch.Tensor | None,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        expert_alignment: int,
        num_worst_tokens: int,
        num_sms: int,
    ) -> DispatchSpec:
        """An uncached dispatch."""
        device, num_ranks = self._device, self._num_ranks
        rows, sf = validate.tokens(x, device)
        num_tokens = rows.shape[0]
        if (topk_idx is None) != (topk_weights is None):
            raise EPArgumentError.of("topk_weights", "both topk_idx and topk_weights, or neither", "one of them")
        worst = validate.whole("num_worst_tokens", num_worst_tokens, 0)
        if topk_idx is not None:
            topk_idx = validate.tensor("topk_idx", topk_idx, device, torch.int64, (num_tokens, None))
            shape = tuple(topk_idx.shape)
            topk_weights = validate.tensor("topk_weights", topk_weights, device, torch.float32, shape)
        elif worst:
            raise EPArgumentError.of("topk_idx", "a tensor where num_worst_tokens is given", None)
        layout = {
            "num_tokens_per_rank": num_tokens_per_rank,
            "is_token_in_rank": is_token_in_rank,
            "num_tokens_per_expert": num_tokens_per_expert,
        }
        for name, value in layout.items():
            if value is None:
                raise validate.missing(name)
        per_expert = validate.tensor("num_tokens_per_expert", num_tokens_per_expert, device, torch.int32, (None,))
        if per_expert.numel() == 0:
            raise EPArgumentError.of("num_tokens_per_expert", "one count for each expert", "an empty tensor")
        in_rank_shape = (num_tokens, num_ranks)
        in_rank = validate.tensor("is_token_in_rank", is_token_in_rank, device, torch.bool, in_rank_shape)
        per_rank = validate.tensor("num_tokens_per_rank", num_tokens_per_rank, device, torch.int32, (num_ranks,))
        self._check_domains(num_tokens_per_rdma_rank, in_rank)
        return DispatchSpec(
            x=rows,
            sf=sf,
            layout="rank",
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            is_token_in_rank=in_rank,
            num_tokens_per_rank=per_rank,
            num_tokens_per_expert=per_expert,
            placement=self.placements.of(per_expert.numel()),
            mask_weights=True,
            expert_alignment=validate.whole("expert_alignment", expert_alignment, 1, MAX_ALIGNMENT),
            num_worst_tokens=worst or None,
            max_threads=num_sms,
        )

    def cached_dispatch(self, x: Tokens, topk_idx: Any, topk_weights: Any, handle: Any, num_sms: int) -> DispatchSpec:
        """A dispatch along the handle's plan."""
        rows, sf = validate.tokens(x, self._device)
        if topk_idx is not None or topk_weights is not None:
            raise EPArgumentError.of("topk_idx", "None beside a handle (a cached dispatch moves rows only)", "a tensor")
        plan = unpack_v1(handle, self._rank, self._num_ranks, self._device)
        if plan.num_tokens != rows.shape[0]:
            raise EPArgumentError.of("x", f"{plan.num_tokens} tokens, as the handle's dispatch", rows.shape[0])
        return DispatchSpec(
            x=rows, sf=sf, layout="rank", plan=plan, num_worst_tokens=plan.num_output_rows, max_threads=num_sms
        )

    def combine(self, x: Any, handle: Any, topk_weights: Any, bias: Any, num_sms: int) -> CombineSpec:
        """A combine along the handle's plan."""
        plan = unpack_v1(handle, self._rank, self._num_ranks, self._device)
        y = validate.combine_rows(x, self._device, plan.num_output_rows, "dispatch")
        if topk_weights is not None:
            shape = (plan.num_output_rows, None)
            topk_weights = validate.tensor("topk_weights", topk_weights, self._device, torch.float32, shape)
        bias = validate.biases(bias, y, plan.num_tokens)
        return CombineSpec(y=y, plan=plan, weights=topk_weights, bias=bias, max_threads=num_sms)

    def tokens_per_domain(self, in_rank: torch.Tensor) -> torch.Tensor | None:
        """[D] int32; None where rows take one hop."""
        if self._domains is None:
            return None
        return torch.stack([in_rank[:, list(ranks)].any(1).sum(dtype=torch.int32) for ranks in self._domains])

    def _check_domains(self, claimed: Any, in_rank: torch.Tensor) -> None:
        if self._domains is None or claimed is None:
            return
        given = validate.tensor("num_tokens_per_rdma_rank", claimed, self._device, torch.int32, (len(self._domains),))
        counted = self.tokens_per_domain(in_rank)
        assert counted is not None
        if not torch.equal(given, counted):  # on a GPU the host waits; two hops make it wait anyway
            expected = f"{counted.tolist()}, as counted in is_token_in_rank"
            raise EPArgumentError.of("num_tokens_per_rdma_rank", expected, given.tolist())


def _same_routing(topk_idx: Any, of_handle: torch.Tensor) -> bool:
    """On a GPU ids are not compared, for which the host would have to wait: only that it is a table like it."""
    if topk_idx is of_handle:
        return True
    topk_idx = validate.plain("topk_idx", topk_idx)
    if not isinstance(topk_idx, torch.Tensor) or topk_idx.device != of_handle.device:
        return False
    if not topk_idx.is_cpu:
        return topk_idx.dtype == of_handle.dtype and topk_idx.shape == of_handle.shape
    return torch.equal(topk_idx, of_handle)
