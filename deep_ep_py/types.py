"""Words shared by every layer: where experts live, what an operation asks of a backend, what it delivers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from .plans import Plan, PlanLayout

topk_idx_t = torch.int64

PlacementName = Literal["contiguous", "chunked"]
PLACEMENTS: tuple[PlacementName, ...] = get_args(PlacementName)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlacement:
    """Where each expert lives. Tables, not arithmetic: nothing divides by "experts per rank".

    Experts lie in order over ranks. ``"contiguous"``: the first E mod R ranks own one more than the others.
    ``"chunked"``: each rank owns ceil(E / R) as long as there are any, so the last ranks own fewer or none; that is how
    ``torch.chunk`` and a DTensor of ``Shard(0)`` split E rows.

    Attributes:
        rank: [E] int32, the rank that owns each expert.
        local: [E] int32, its index among that rank's experts.
        num_local: experts owned by each rank.
        digest: of both tables, equal on all ranks whose tables are.
    """

    rank: torch.Tensor
    local: torch.Tensor
    num_local: tuple[int, ...]
    digest: int = field(init=False)

    def __post_init__(self) -> None:
        h = hashlib.blake2b(digest_size=8)
        for table in (self.rank, self.local):
            h.update(table.contiguous().numpy().tobytes())
        object.__setattr__(self, "digest", int.from_bytes(h.digest(), "little") >> 1)

    @property
    def num_experts(self) -> int:
        return self.rank.numel()

    @staticmethod
    def shares(num_experts: int, num_ranks: int, placement: str = "contiguous") -> tuple[int, ...]:
        """``num_local`` of :meth:`of`."""
        share, more = divmod(num_experts, num_ranks)
        if placement == "contiguous":
            return tuple(share + (r < more) for r in range(num_ranks))
        chunk = share + (more > 0)
        return tuple(max(0, min(chunk, num_experts - r * chunk)) for r in range(num_ranks))

    @classmethod
    def of(cls, num_experts: int, num_ranks: int, placement: str = "contiguous") -> ExpertPlacement:
        """The placement of that name: one of ``PLACEMENTS``."""
        num_local = cls.shares(num_experts, num_ranks, placement)
        rank = [r for r in range(num_ranks) for _ in range(num_local[r])]
        local = [i for n in num_local for i in range(n)]
        as_int32 = {"dtype": torch.int32, "device": "cpu"}
        return cls(torch.tensor(rank, **as_int32), torch.tensor(local, **as_int32), num_local)  # type: ignore[arg-type]


@dataclass(slots=True, eq=False)
class DispatchSpec:
    """One dispatch as the engine asks for it: arguments are checked, tensors on the backend's device, dense in a row.

    Exactly one of ``topk_idx`` (V2), ``is_token_in_rank`` (V1) and ``plan`` (cached) drives the routing; V1 may carry
    ``topk_idx`` beside ``is_token_in_rank``, to be localised.

    Attributes:
        x: [T, H], unit stride in a row, any dtype. sf: [T, S] contiguous, any dtype, or None.
        topk_idx: [T, K] int64 contiguous, or None. topk_weights: [T, K] float32 or float64,
            contiguous, or None.
        is_token_in_rank: [T, R] bool contiguous, or None.
        num_tokens_per_rank: [R] int32 (V1: what the caller claims; checked against is_token_in_rank), or None.
        num_tokens_per_expert: [E] int32 (V1: as given by the caller), or None.
        placement: where experts live; None in a cached dispatch.
        mask_weights: compact: weights of slots that the destination does not own arrive as 0.
        describe_rows: expanded: deliver ``recv_topk_idx``.
        describe_sources: deliver ``recv_meta``.
        expert_alignment: expanded blocks start at multiples of this many rows.
        zero_padding: zero the alignment gaps.
        col_major_sf: deliver sf column-major, the leading dimension a multiple of 16 bytes (4-byte elements only).
        num_worst_tokens: rows of the outputs, where they are fixed in advance; None: exact.
        num_max_tokens_per_rank: M, the stride of global token indices in the metadata; 0: the largest token count.
        max_threads: upper bound of copy threads, on a GPU of multiprocessors; 0: the default.
        on_comm_stream: on a GPU, received tensors are memory of the communication stream.
        carries: what the rows are: "rows", or in a backward pass "gradients of rows".
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
    describe_rows: bool = False
    describe_sources: bool = True
    expert_alignment: int = 1
    zero_padding: bool = False
    col_major_sf: bool = False
    num_worst_tokens: int | None = None
    num_max_tokens_per_rank: int = 0
    max_threads: int = 0
    on_comm_stream: bool = False
    carries: str = "rows"


@dataclass(slots=True, eq=False)
class Dispatched:
    """What a dispatch delivers. Tensors belong to the caller.

    Attributes:
        recv_x: [rows, H]; recv_sf: [rows, S] row-major or None.
        recv_topk_idx: [rows, K] int64 local expert ids, -1 elsewhere; expanded: [rows, 1] where ``describe_rows`` asked
            for it. None where cached or not given.
        recv_topk_weights: [rows, K] of the weights' dtype ([rows] where expanded), or None.
        recv_meta: V1: [rows] int32 source token index at its source. V2: [N or worst, 2 + K] int32. None if cached
            or not asked for.
        plan: the plan that was followed.
        num_recv_tokens_per_expert: exact counts of this rank's experts, where the plan lies on a GPU and the host has
            waited for them; None elsewhere, see ``plan.expert_counts``.
    """

    recv_x: torch.Tensor
    recv_sf: torch.Tensor | None
    recv_topk_idx: torch.Tensor | None
    recv_topk_weights: torch.Tensor | None
    recv_meta: torch.Tensor | None
    plan: Plan
    num_recv_tokens_per_expert: list[int] | None = None


@dataclass(slots=True, eq=False)
class CombineSpec:
    """One combine as the engine asks for it.

    Attributes:
        y: [rows, H] bf16, fp16, fp32 or fp64, unit stride in a row.
        plan: the plan of the dispatch that is undone.
        weights: float32 or float64: [rows, K] (``rank``, ``topk``) or [rows] (``expand``), contiguous, or None.
        bias: 0, 1 or 2 tensors [T, H] of y's dtype, contiguous.
        reduce_per_rank: expanded only: sum and round the slots of one rank first.
        reduce_per_domain: over several domains: sum and round the rows of one domain first.
        max_threads, on_comm_stream, carries: as in ``DispatchSpec``.
    """

    y: torch.Tensor
    plan: Plan
    weights: torch.Tensor | None = None
    bias: tuple[torch.Tensor, ...] = ()
    reduce_per_rank: bool = False
    reduce_per_domain: bool = True
    max_threads: int = 0
    on_comm_stream: bool = False
    carries: str = "rows"


@dataclass(slots=True, eq=False)
class Combined:
    """What a combine delivers: combined_x [T, H] of y's dtype; combined_topk_weights [T, K] of the
    weights' dtype or None."""

    combined_x: torch.Tensor
    combined_topk_weights: torch.Tensor | None
