"""Pure math of a plan's targets: encoding, decoding and what follows from the count matrix."""

from __future__ import annotations

import torch

from .types import SHARED_ROW

_ROW_MASK = (1 << 32) - 1


def encode_targets(rank: torch.Tensor, row: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """[T, W] int64 targets from destination ranks and rows (both -1 for none) and the mask of shared slots."""
    target = (rank.to(torch.int64) << 32) | (row.to(torch.int64) & _ROW_MASK)
    target = torch.where(shared, target | SHARED_ROW, target)
    return torch.where(rank >= 0, target, torch.full_like(target, -1))


def target_ranks(targets: torch.Tensor) -> torch.Tensor:
    """[T, W] int64: destination rank of each target, -1 for none."""
    return torch.where(targets >= 0, (targets & ~SHARED_ROW) >> 32, targets)


def target_rows(targets: torch.Tensor) -> torch.Tensor:
    """[T, W] int64: row in the destination's output, -1 for none."""
    return torch.where(targets >= 0, targets & _ROW_MASK, targets)


def primary(targets: torch.Tensor) -> torch.Tensor:
    """[T, W] bool: the targets at which a row moves and is added."""
    return (targets >= 0) & ((targets & SHARED_ROW) == 0)


def align(n: int, alignment: int) -> int:
    """The smallest multiple of ``alignment`` that is not below ``n``."""
    return -(-n // alignment) * alignment


def worst_case_expanded_rows(num_ranks: int, num_max_tokens: int, num_topk: int, num_local: int, alignment: int) -> int:
    """Rows of an expanded output that hold for any routing: API.md, ``do_cpu_sync=False``."""
    rows = num_ranks * num_max_tokens * min(num_topk, num_local)
    return align(rows + (alignment - 1) * num_local, alignment)
