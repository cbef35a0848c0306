"""Handles: what a dispatch leaves for the cached dispatch and the combine that follow. Plain data, no buffer inside."""

from __future__ import annotations

from typing import Any

import torch

from . import _C
from .errors import EPArgumentError
from .layout import align, target_ranks, target_rows
from .plans import Plan, plan_words
from .validate import plain

#: What ``send_head`` of a V1 handle on a GPU carries as an attribute.
_PLAN = "_deep_ep_plan"


class EPHandle:
    """V2's handle. Outlives its buffer. Attributes may be assigned; those that few read are computed when first read.

    Shapes: T tokens, K slots, N received tokens, R ranks, M = ``num_max_tokens_per_rank``.

    Attributes:
        do_expand: one row per slot (expert-major) rather than one per token.
        num_experts, expert_alignment, num_max_tokens_per_rank, num_sms: as given to dispatch.
        topk_idx: [T, K] int64, a copy unless ``do_handle_copy`` was off.
        num_recv_tokens: N; without host sync the worst case R * M.
        num_expanded_tokens: rows of the expanded output, alignment gaps included; without host sync the worst case.
        num_recv_tokens_per_expert_list: aligned count of each local expert; empty without host sync.
        psum_num_recv_tokens_per_scaleup_rank: [U] int32, received tokens by the ranks 0..u of the domain that bring
            them (over several domains each brings those of its rail).
        psum_num_recv_tokens_per_expert: [E_local] int32. Compact: inclusive sum of aligned counts. Expanded: entry i is
            the aligned sum of the experts before i plus the exact count of i.
        num_unaligned_recv_tokens_per_expert: [E_local] int32.
        recv_src_metadata: [N, 2 + K] int32 (R * M rows without host sync, those past N undefined). Column 0: source
            rank * M + source token; column 1: private; columns 2..: the slot's row in the expanded output, or -1.
        dst_buffer_slot_idx: [T, K] int32, destination rank * M + index among the tokens this rank sends there, at the
            last slot of that destination; -1 elsewhere.
    """

    num_recv_tokens_per_expert_list: list[int]
    num_expanded_tokens: int
    psum_num_recv_tokens_per_scaleup_rank: torch.Tensor
    psum_num_recv_tokens_per_expert: torch.Tensor
    num_unaligned_recv_tokens_per_expert: torch.Tensor
    dst_buffer_slot_idx: torch.Tensor

    def __init__(
        self,
        *,
        plan: Plan,
        num_experts: int,
        num_sms: int,
        topk_idx: torch.Tensor,
        recv_src_metadata: torch.Tensor,
        recv_topk_idx: torch.Tensor | None,
        has_host_counts: bool,
        num_expanded_tokens: int | None,
        domains: tuple[tuple[int, ...], ...],
        expert_counts: list[int] | None = None,
    ) -> None:
        """``expert_counts``: the plan's, where the host has them already."""
        self.do_expand = plan.layout == "expand"
        self.num_experts = num_experts
        self.expert_alignment = plan.expert_alignment
        self.num_max_tokens_per_rank = plan.num_max_tokens_per_rank
        self.num_sms = num_sms
        self.topk_idx = topk_idx
        self.recv_src_metadata = recv_src_metadata
        num_ranks = plan.num_ranks
        self.num_recv_tokens = plan.num_recv_tokens if has_host_counts else num_ranks * plan.num_max_tokens_per_rank
        self._plan = plan
        self._recv_topk_idx = recv_topk_idx
        self._has_host_counts = has_host_counts
        self._domains = domains
        self._expert_counts = expert_counts
        if num_expanded_tokens is not None:
            self.num_expanded_tokens = num_expanded_tokens

    def __repr__(self) -> str:
        layout, num_rows = "expanded" if self.do_expand else "compact", self._plan.num_rows
        rows = f"{num_rows} rows" if num_rows >= 0 else "rows counted on the device"
        return f"<EPHandle: {rows}, {self.num_experts} experts, {layout}>"

    def __getattr__(self, name: str) -> Any:
        # Reached only for what is not set yet; the value is kept, so a second read costs nothing.
        compute = _LAZY.get(name)
        if compute is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = compute(self)
        setattr(self, name, value)
        return value


def _aligned_counts(handle: EPHandle) -> list[int]:
    counts = handle._expert_counts
    if counts is None:
        counts = handle._plan.expert_counts.tolist()
    return [align(n, handle._plan.expert_alignment) for n in counts]


def _psum_per_expert(handle: EPHandle) -> torch.Tensor:
    counts, alignment = handle._plan.expert_counts, handle._plan.expert_alignment
    aligned = (counts + (alignment - 1)) // alignment * alignment
    ends = torch.cumsum(aligned, 0, dtype=torch.int32)
    return ends - aligned + counts if handle.do_expand else ends


def _psum_per_scaleup_rank(handle: EPHandle) -> torch.Tensor:
    ends = handle._plan.rank_prefix[:, handle._plan.rank]
    if len(handle._domains) == 1:
        return ends.contiguous()
    by_source = ends.diff(prepend=ends.new_zeros(1))
    by_index = by_source[torch.tensor(handle._domains, dtype=torch.int64, device=ends.device)].sum(0)
    return by_index.cumsum(0).to(torch.int32)


def _dst_buffer_slot_idx(handle: EPHandle) -> torch.Tensor:
    plan, me, limit = handle._plan, handle._plan.rank, handle.num_max_tokens_per_rank
    ranks = target_ranks(plan.targets)
    # A destination's slot is its last one; earlier slots of the same rank are -1.
    later = torch.zeros_like(ranks, dtype=torch.bool)
    for k in range(ranks.shape[1] - 1):
        later[:, k] = (ranks[:, k + 1 :] == ranks[:, k : k + 1]).any(dim=1)
    last = (ranks >= 0) & ~later
    if handle.do_expand:
        index = torch.zeros_like(ranks)
        for r in range(plan.num_ranks):
            here = (last & (ranks == r)).any(dim=1)
            index = torch.where((ranks == r), (torch.cumsum(here, 0) - 1).unsqueeze(1), index)
    else:
        first = plan.rank_prefix[me - 1].to(torch.int64) if me > 0 else torch.zeros_like(plan.rank_prefix[0]).long()
        index = target_rows(plan.targets) - first[ranks.clamp(min=0)]
    return torch.where(last, ranks * limit + index, torch.full_like(ranks, -1)).to(torch.int32)


_LAZY = {
    "num_recv_tokens_per_expert_list": lambda h: _aligned_counts(h) if h._has_host_counts else [],
    "num_expanded_tokens": lambda h: sum(_aligned_counts(h)),
    "psum_num_recv_tokens_per_scaleup_rank": _psum_per_scaleup_rank,
    "psum_num_recv_tokens_per_expert": _psum_per_expert,
    "num_unaligned_recv_tokens_per_expert": lambda h: h._plan.expert_counts,
    "dst_buffer_slot_idx": _dst_buffer_slot_idx,
}


def pack_v1(plan: Plan, recv_src_idx: torch.Tensor, is_token_in_rank: torch.Tensor) -> tuple[Any, ...]:
    """V1's handle inside one domain: (rank_prefix_matrix [R, R], channel_prefix_matrix [R, 1],
    recv_channel_prefix_matrix [R, 1], recv_src_idx [N], is_token_in_rank [T, R] bool, send_head [T, R]), else int32.

    One channel. ``send_head``: index of the token among those this rank sends to that one, or -1. On a GPU nothing
    waits, and this very tensor carries the plan, so that it need not be made anew.
    """
    prefix = plan.rank_prefix
    if plan.packed.is_cpu:
        send_head = torch.empty(is_token_in_rank.shape, dtype=torch.int32, device="cpu")
        _C.heads_of_plan(plan=plan.packed.data_ptr(), send_head=send_head.data_ptr())
    else:
        send_head = heads_of(is_token_in_rank)
        setattr(send_head, _PLAN, plan)
    rank = plan.rank
    before = prefix[rank - 1] if rank > 0 else torch.zeros_like(prefix[0])
    channel = (prefix[rank] - before).unsqueeze(1)
    recv_channel = prefix[:, rank].diff(prepend=prefix.new_zeros(1)).unsqueeze(1)
    return prefix, channel, recv_channel, recv_src_idx, is_token_in_rank, send_head


def heads_of(is_token_in_rank: torch.Tensor) -> torch.Tensor:
    """[T, R] int32: the token's index among those that this rank sends to that one, or -1."""
    return torch.where(is_token_in_rank, is_token_in_rank.cumsum(0, dtype=torch.int32) - 1, -1)


def pack_v1_internode(
    plan: Plan, recv_src_idx: torch.Tensor, is_token_in_rank: torch.Tensor, domains: tuple[tuple[int, ...], ...]
) -> tuple[Any, ...]:
    """V1's handle over D domains, one channel: (is_token_in_rank [T, R] bool, rdma_channel_prefix_matrix [D, 1] and
    gbl_channel_prefix_matrix [R, 1], tokens to each domain and rank; recv_rdma_channel_prefix_matrix [D, 1] and
    recv_rdma_rank_prefix_sum [D], tokens that reach this rank's rail from each domain; recv_gbl_channel_prefix_matrix
    [R, 1] and recv_gbl_rank_prefix_sum [R], rows received from each rank; recv_src_meta [N], tokens' indices at their
    source; send_rdma_head [T, D], index among the tokens sent to that domain, or -1), int32; last, where DeepEP has
    the heads of the second hop, the plan of both, int64.
    """
    prefix, rank = plan.rank_prefix, plan.rank
    before = prefix[rank - 1] if rank > 0 else torch.zeros_like(prefix[0])
    in_domain = torch.stack([is_token_in_rank[:, list(ranks)].any(1) for ranks in domains], 1)
    send_head = torch.where(in_domain, in_domain.cumsum(0) - 1, -1).to(torch.int32)
    sent = in_domain.sum(0, dtype=torch.int32)
    relayed = plan.relay_counts.to(torch.int32)
    own = next(d for d, ranks in enumerate(domains) if rank in ranks)
    relayed[own] = sent[own]
    received = prefix[:, rank].contiguous()
    return (
        is_token_in_rank,
        sent.unsqueeze(1),
        (prefix[rank] - before).unsqueeze(1),
        relayed.unsqueeze(1),
        relayed.cumsum(0, dtype=torch.int32),
        received.diff(prepend=received.new_zeros(1)).unsqueeze(1),
        received,
        recv_src_idx,
        send_head,
        plan.remember(),
    )


def unpack_v1(handle: Any, rank: int, num_ranks: int, device: torch.device) -> Plan:
    """The plan behind a V1 handle; made anew from its tensors, so that it may have passed through autograd contexts.

    On a GPU the handle's own tensors still know the plan. Copies of them do not: the host then waits for the prefix.

    Raises:
        EPArgumentError: not a handle of a dispatch over as many ranks, on this device; or, while a CUDA graph is
            captured, made of copies.
    """
    if isinstance(handle, tuple | list) and len(handle) == 10 and torch.is_tensor(handle[-1]):
        packed = plain("handle (plan)", handle[-1])
        if packed.device != device:
            raise EPArgumentError.of("handle", f"tensors on {device}", f"tensors on {packed.device}")
        plan = Plan.of(packed)
        if plan.num_ranks != num_ranks or plan.rank != rank or plan.layout != "rank":
            made = f"rank {plan.rank} of {plan.num_ranks}"
            raise EPArgumentError.of("handle", f"one made by rank {rank} of {num_ranks}", f"one made by {made}")
        recv_src_meta = handle[7]
        if not torch.is_tensor(recv_src_meta) or recv_src_meta.shape != (plan.num_output_rows,):
            raise EPArgumentError.of("handle (recv_src_meta)", f"{plan.num_output_rows} entries", "another shape")
        if recv_src_meta.dtype != torch.int32 or recv_src_meta.device != device:
            got = f"{recv_src_meta.dtype} on {recv_src_meta.device}"
            raise EPArgumentError.of("handle (recv_src_meta)", f"torch.int32 on {device}", got)
        if device.type != "cpu":
            return plan
        return plan._replace(recv_src_idx=recv_src_meta.contiguous())
    if not isinstance(handle, tuple | list) or len(handle) != 6 or not all(torch.is_tensor(t) for t in handle):
        raise EPArgumentError.of("handle", "the tuple that dispatch returned", f"{type(handle).__name__}")
    prefix, _, _, recv_src_idx, is_token_in_rank, send_head = handle
    prefix, send_head = plain("handle (rank_prefix_matrix)", prefix), plain("handle (send_head)", send_head)
    recv_src_idx = plain("handle (recv_src_idx)", recv_src_idx)
    if prefix.shape != (num_ranks, num_ranks) or send_head.shape != is_token_in_rank.shape:
        raise EPArgumentError.of(
            "handle", f"a handle of a dispatch over {num_ranks} ranks", f"one over {tuple(prefix.shape)}"
        )
    for name, part in (("rank_prefix_matrix", prefix), ("recv_src_idx", recv_src_idx), ("send_head", send_head)):
        if part.dtype != torch.int32 or part.device != device:
            raise EPArgumentError.of(f"handle ({name})", f"torch.int32 on {device}", f"{part.dtype} on {part.device}")
    known: Plan | None = None if send_head.is_cpu else getattr(send_head, _PLAN, None)
    if known is not None:
        if known.rank != rank:
            raise EPArgumentError.of("handle", f"one made by rank {rank}", f"one made by rank {known.rank}")
        if recv_src_idx.shape != (known.num_output_rows,):
            entries = f"{known.num_output_rows} entries"
            raise EPArgumentError.of("handle (recv_src_idx)", entries, tuple(recv_src_idx.shape))
        return known
    if prefix.is_cuda and torch.cuda.is_current_stream_capturing():
        raise EPArgumentError.of(
            "handle", "the tensors that dispatch returned, while a CUDA graph is captured", "copies of them"
        )
    on_device, prefix = prefix, prefix.to("cpu").contiguous()
    num_rows = int(prefix[-1, rank])
    if recv_src_idx.dim() != 1 or recv_src_idx.shape[0] < num_rows:
        raise EPArgumentError.of("handle (recv_src_idx)", f"at least {num_rows} entries", tuple(recv_src_idx.shape))
    # On a GPU the core sees no tokens, which it could not read: it makes the header, and the targets are made there.
    send_head, num_tokens = send_head.contiguous(), send_head.shape[0]
    read = num_tokens if send_head.is_cpu else 0
    packed = torch.empty(plan_words(read, num_ranks, num_ranks, 0), dtype=torch.int64, device="cpu")
    _C.plan_from_heads(
        send_head=send_head.data_ptr() if read else 0,
        prefix=prefix.data_ptr(),
        rank=rank,
        num_ranks=num_ranks,
        num_tokens=read,
        num_output_rows=recv_src_idx.shape[0],
        plan=packed.data_ptr(),
    )
    if send_head.is_cpu:
        return Plan.of(packed, recv_src_idx.contiguous())
    return plan_from_heads(Plan.of(packed), on_device, send_head)


def plan_from_heads(empty: Plan, prefix: torch.Tensor, send_head: torch.Tensor) -> Plan:
    """A V1 plan on any device from that of no tokens, which lies on the CPU.

    Args:
        prefix: [R, R] int32. send_head: [T, R] int32.
    """
    rank, num_ranks = empty.rank, empty.num_ranks
    first = prefix[rank - 1] if rank > 0 else torch.zeros_like(prefix[0])
    ranks = torch.arange(num_ranks, dtype=torch.int64, device=send_head.device)
    return Plan.pack(
        layout="rank",
        targets=torch.where(send_head < 0, -1, (ranks << 32) + (first + send_head)),
        rank_prefix=prefix,
        expert_counts=prefix.new_empty(0),
        rank=rank,
        num_rows=empty.num_rows,
        num_output_rows=empty.num_output_rows,
        num_recv_tokens=empty.num_recv_tokens,
        digest=empty.digest,
        expert_alignment=empty.expert_alignment,
        num_max_tokens_per_rank=empty.num_max_tokens_per_rank,
    )
