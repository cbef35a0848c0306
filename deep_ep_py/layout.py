"""Pure math of a plan's targets, and the layout of one rank's tokens."""

from __future__ import annotations

import torch

from . import _C
from .errors import EPArgumentError
from .plans import SHARED_ROW
from .types import ExpertPlacement

_ROW_MASK = (1 << 32) - 1


def target_ranks(targets: torch.Tensor) -> torch.Tensor:
    """[T, W] int64: destination rank of each target, -1 for none."""
    return torch.where(targets >= 0, (targets & ~SHARED_ROW) >> 32, targets)


def target_rows(targets: torch.Tensor) -> torch.Tensor:
    """[T, W] int64: row in the destination's output, -1 for none."""
    return torch.where(targets >= 0, targets & _ROW_MASK, targets)


def primary(targets: torch.Tensor) -> torch.Tensor:
    """[T, W] bool: the targets at which a row moves and is added."""
    return (targets >= 0) & ((targets & SHARED_ROW) == 0)


def dispatch_layout(
    topk_idx: torch.Tensor, placement: ExpertPlacement, num_ranks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens per rank [R] int32, slots per expert [E] int32 and is_token_in_rank [T, R] bool.

    Args:
        topk_idx: [T, K] int64, contiguous, on the CPU, -1 for no expert.

    Raises:
        EPArgumentError: an expert id outside [-1, E).
    """
    num_tokens, num_topk = topk_idx.shape
    per_rank = torch.empty(num_ranks, dtype=torch.int32, device="cpu")
    per_expert = torch.empty(placement.num_experts, dtype=torch.int32, device="cpu")
    in_rank = torch.empty((num_tokens, num_ranks), dtype=torch.bool, device="cpu")
    wrong = _C.dispatch_layout(
        topk_idx=topk_idx.data_ptr(),
        num_tokens=num_tokens,
        num_topk=num_topk,
        num_ranks=num_ranks,
        num_experts=placement.num_experts,
        expert_rank=placement.rank.data_ptr(),
        expert_local=placement.local.data_ptr(),
        tokens_per_rank=per_rank.data_ptr(),
        tokens_per_expert=per_expert.data_ptr(),
        is_token_in_rank=in_rank.data_ptr(),
    )
    if wrong:
        raise EPArgumentError(wrong, argument="topk_idx")
    return per_rank, per_expert, in_rank


def layout_on_device(
    topk_idx: torch.Tensor, expert_rank: torch.Tensor, num_ranks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`dispatch_layout` on any device, without waiting for it: so an expert id outside [-1, E) is not found, and
    counts as none.

    Args:
        expert_rank: [E] int32, on the device of ``topk_idx``.
    """
    num_tokens, num_experts = topk_idx.shape[0], expert_rank.shape[0]
    none = (topk_idx < 0) | (topk_idx >= num_experts)
    # One bin more takes what goes nowhere. Integers: whatever the order of additions, the sums are the same.
    bins = topk_idx.masked_fill(none, num_experts)
    per_expert = expert_rank.new_zeros(num_experts + 1).scatter_add_(
        0, bins.flatten(), expert_rank.new_ones(1).expand(bins.numel())
    )
    ranks = torch.cat([expert_rank, expert_rank.new_full((1,), num_ranks)]).to(torch.int64)[bins]
    in_rank = topk_idx.new_zeros((num_tokens, num_ranks + 1), dtype=torch.bool).scatter_(1, ranks, True)
    in_rank = in_rank[:, :num_ranks].contiguous()
    return in_rank.sum(0, dtype=torch.int32), per_expert[:num_experts], in_rank


def align(n: int, alignment: int) -> int:
    """The smallest multiple of ``alignment`` that is not below ``n``."""
    return -(-n // alignment) * alignment


def worst_case_expanded_rows(num_ranks: int, num_max_tokens: int, num_topk: int, num_local: int, alignment: int) -> int:
    """Rows of an expanded output that hold for any routing: API.md, ``do_cpu_sync=False``."""
    rows = num_ranks * num_max_tokens * min(num_topk, num_local)
    return align(rows + (alignment - 1) * num_local, alignment)
