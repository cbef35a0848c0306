"""Words shared by every layer: where experts live, what a plan is, what an operation asks of a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

topk_idx_t = torch.int64

#: Bit of a plan's target: another, later slot of the token stands for the same row.
SHARED_ROW = 1 << 62

#: How a plan's columns are read. ``rank``: column r is destination rank r (V1). ``topk``: column k is slot k and a
#: destination's row is shared by all slots that select it (V2 compact). ``expand``: each slot has its own row.
PlanLayout = Literal["rank", "topk", "expand"]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlacement:
    """Where each expert lives. Tables, not arithmetic: nothing divides by "experts per rank".

    Attributes:
        rank: [E] int32, the rank that owns each expert.
        local: [E] int32, its index among that rank's experts.
        num_local: experts owned by each rank.
    """

    rank: torch.Tensor
    local: torch.Tensor
    num_local: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        return self.rank.numel()

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> ExpertPlacement:
        """Experts in order over ranks; the first ``num_experts % num_ranks`` ranks own one more."""
        share, more = divmod(num_experts, num_ranks)
        num_local = tuple(share + (r < more) for r in range(num_ranks))
        rank = [r for r in range(num_ranks) for _ in range(num_local[r])]
        local = [i for n in num_local for i in range(n)]
        as_int32 = {"dtype": torch.int32, "device": "cpu"}
        return cls(torch.tensor(rank, **as_int32), torch.tensor(local, **as_int32), num_local)  # type: ignore[arg-type]


@dataclass(slots=True, eq=False)
class Plan:
    """Where every row goes, as one rank knows it. Pure integers: it outlives the buffer that made it.

    Attributes:
        layout: how columns are read.
        targets: [T, W] int64 (W: slots, or ranks for ``rank``): -1 where a token goes nowhere, else
            ``destination rank << 32 | row in its output``, with bit 62 (``SHARED_ROW``) set on all but the last slot
            that shares a row: rows move and are added at the last one, weights are read at every one.
        num_rows: rows of this rank's output that this plan fills or spans (expanded: alignment gaps included).
        num_output_rows: rows of the output tensors (``num_rows``, or the worst case where counts were not synced).
        num_recv_tokens: unique tokens received, N.
        counts: [R * R + E_local] int32: ``rank_prefix`` and ``expert_counts``, packed.
        num_ranks: R.
        digest: equal on all ranks for one plan, different for different counts; guards against mixed-up handles.
        expert_alignment: the multiple at which expanded blocks start, and to which reported counts are rounded up.
        num_max_tokens_per_rank: M, the stride of global token indices in the metadata.
    """

    layout: PlanLayout
    targets: torch.Tensor
    num_rows: int
    num_output_rows: int
    num_recv_tokens: int
    counts: torch.Tensor
    num_ranks: int
    digest: int
    expert_alignment: int = 1
    num_max_tokens_per_rank: int = 0

    @property
    def rank_prefix(self) -> torch.Tensor:
        """[R, R] int32, entry [s, r]: tokens that sources 0..s send to rank r."""
        return self.counts[: self.num_ranks * self.num_ranks].view(self.num_ranks, self.num_ranks)

    @property
    def expert_counts(self) -> torch.Tensor:
        """[E_local] int32: received slots of each local expert, not aligned."""
        return self.counts[self.num_ranks * self.num_ranks :]


@dataclass(slots=True, eq=False)
class DispatchSpec:
    """One dispatch as the engine asks for it: arguments are checked, tensors are on the CPU and dense in a row.

    Exactly one of ``topk_idx`` (V2), ``is_token_in_rank`` (V1) and ``plan`` (cached) drives the routing; V1 may carry
    ``topk_idx`` beside ``is_token_in_rank``, to be localised.

    Attributes:
        x: [T, H], unit stride in a row, any dtype. sf: [T, S] contiguous, any dtype, or None.
        topk_idx: [T, K] int64 contiguous, or None. topk_weights: [T, K] float32 contiguous, or None.
        is_token_in_rank: [T, R] bool contiguous, or None.
        num_tokens_per_rank: [R] int32 (V1: what the caller claims; checked against is_token_in_rank), or None.
        num_tokens_per_expert: [E] int32 (V1: as given by the caller), or None.
        placement: where experts live; None in a cached dispatch.
        mask_weights: V1: weights of slots that this destination does not own become 0.
        expert_alignment: expanded blocks start at multiples of this many rows.
        zero_padding: zero the alignment gaps.
        col_major_sf: deliver sf column-major, the leading dimension a multiple of 16 bytes (4-byte elements only).
        num_worst_tokens: rows of the outputs, where they are fixed in advance; None: exact.
        num_max_tokens_per_rank: M, the stride of global token indices in the metadata; 0: the largest token count.
        max_threads: upper bound of copy threads; 0: the default.
    """

    x: torch.Tensor
    layout: PlanLayout
    sf: torch.Tensor | None = None
    topk_idx: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    is_token_in_rank: torch.Tensor | None = None
    num_tokens_per_rank: torch.Tensor | None = None
    num_tokens_per_expert: torch.Tensor | None = None
    plan: Plan | None = None
    placement: ExpertPlacement | None = None
    mask_weights: bool = False
    expert_alignment: int = 1
    zero_padding: bool = False
    col_major_sf: bool = False
    num_worst_tokens: int | None = None
    num_max_tokens_per_rank: int = 0
    max_threads: int = 0


@dataclass(slots=True, eq=False)
class Dispatched:
    """What a dispatch delivers. Tensors belong to the caller.

    Attributes:
        recv_x: [rows, H]; recv_sf: [rows, S] row-major or None.
        recv_topk_idx: [rows, K] int64 local expert ids, -1 elsewhere; None where expanded, cached or not given.
        recv_topk_weights: [rows, K] float32 ([rows] where expanded), or None.
        recv_meta: V1: [rows] int32 source token index at its source. V2: [N or worst, 2 + K] int32. None if cached.
        plan: the plan that was followed.
    """

    recv_x: torch.Tensor
    recv_sf: torch.Tensor | None
    recv_topk_idx: torch.Tensor | None
    recv_topk_weights: torch.Tensor | None
    recv_meta: torch.Tensor | None
    plan: Plan


@dataclass(slots=True, eq=False)
class CombineSpec:
    """One combine as the engine asks for it.

    Attributes:
        y: [rows, H] bf16, fp16, fp32 or fp64, unit stride in a row.
        plan: the plan of the dispatch that is undone.
        weights: float32: [rows, K] (``rank``, ``topk``) or [rows] (``expand``), contiguous, or None.
        bias: 0, 1 or 2 tensors [T, H] of y's dtype, contiguous.
        reduce_per_rank: expanded only: sum and round the slots of one rank first.
        max_threads: upper bound of copy threads; 0: the default.
    """

    y: torch.Tensor
    plan: Plan
    weights: torch.Tensor | None = None
    bias: tuple[torch.Tensor, ...] = ()
    reduce_per_rank: bool = False
    max_threads: int = 0


@dataclass(slots=True, eq=False)
class Combined:
    """What a combine delivers: combined_x [T, H] of y's dtype; combined_topk_weights [T, K] float32 or None."""

    combined_x: torch.Tensor
    combined_topk_weights: torch.Tensor | None
