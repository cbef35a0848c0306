"""What ``collective`` refuses, and what all ranks must say alike, operation by operation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from .._rows import name_ranks
from ..errors import EPArgumentError
from ..types import CombineSpec, DispatchSpec


def dispatch_agrees_on(spec: DispatchSpec) -> dict[str, int | str]:
    """By the names that every backend's errors use."""
    agree: dict[str, int | str] = {
        "layout": spec.layout,
        "hidden": spec.x.shape[1],
        "dtype": str(spec.x.dtype),
        "scale factor bytes": 0 if spec.sf is None else spec.sf.shape[1] * spec.sf.element_size(),
        "topk_weights bytes": _element_bytes(spec.topk_weights),
    }
    if spec.plan is not None:
        return agree | {"handle": spec.plan.digest}
    assert spec.placement is not None
    return agree | {
        "topk_idx given": int(spec.topk_idx is not None),
        "num_topk": 0 if spec.topk_idx is None else spec.topk_idx.shape[1],
        "num_experts": spec.placement.num_experts,
        "expert_alignment": spec.expert_alignment,
        "num_max_tokens_per_rank": spec.num_max_tokens_per_rank,
        "placement": _digest(spec.placement.rank, spec.placement.local),
    }


def combine_agrees_on(spec: CombineSpec) -> dict[str, int | str]:
    columns = 0 if spec.weights is None else spec.weights.shape[1:].numel()  # the shape of one weight has one element
    return {
        "layout": spec.plan.layout,
        "hidden": spec.y.shape[1],
        "dtype": str(spec.y.dtype),
        "handle": spec.plan.digest,
        "topk_weights columns": columns,
        "topk_weights bytes": _element_bytes(spec.weights),
        "allow_multiple_reduction": int(spec.reduce_per_rank),
    }


def check_dispatch(spec: DispatchSpec) -> None:
    """Raises EPArgumentError: what would break the exchange."""
    num_tokens = spec.x.shape[0]
    if spec.plan is not None and spec.plan.num_tokens != num_tokens:
        expected = f"the {spec.plan.num_tokens} tokens of the handle's dispatch"
        raise EPArgumentError.of("x", expected, f"{num_tokens} tokens")
    for name in ("sf", "topk_idx", "topk_weights", "is_token_in_rank"):
        tensor = getattr(spec, name)
        if tensor is not None and tensor.shape[0] != num_tokens:
            raise EPArgumentError.of(name, f"one row for each of the {num_tokens} tokens of x", tuple(tensor.shape))
    if spec.num_tokens_per_rank is not None and spec.is_token_in_rank is not None:
        claimed, counted = spec.num_tokens_per_rank.tolist(), spec.is_token_in_rank.sum(0).tolist()
        for r, (n, expected) in enumerate(zip(claimed, counted, strict=True)):
            if n != expected:
                wanted = f"{expected} for rank {r}, as counted in is_token_in_rank"
                raise EPArgumentError.of("num_tokens_per_rank", wanted, n)
    if spec.topk_idx is not None and spec.placement is not None and spec.topk_idx.numel():
        num_experts = spec.placement.num_experts
        low, high = torch.aminmax(spec.topk_idx)
        if low < -1 or high >= num_experts:
            token, slot = ((spec.topk_idx < -1) | (spec.topk_idx >= num_experts)).nonzero()[0].tolist()
            value = int(spec.topk_idx[token, slot])
            expected = f"expert ids below num_experts={num_experts}, or -1 for none"
            raise EPArgumentError.of("topk_idx", expected, f"{value} at [{token}, {slot}]")


def check_combine(spec: CombineSpec) -> None:
    """Raises EPArgumentError: rows that the handle names and the tensors lack."""
    for name, tensor in (("x", spec.y), ("topk_weights", spec.weights)):
        if tensor is not None and tensor.shape[0] < spec.plan.num_rows:
            expected = f"the {spec.plan.num_output_rows} rows that dispatch delivered"
            raise EPArgumentError.of(name, expected, f"{tensor.shape[0]} rows")
    num_tokens = spec.plan.num_tokens
    for bias in spec.bias:
        if bias.shape != (num_tokens, spec.y.shape[1]):
            raise EPArgumentError.of("bias", f"shape {(num_tokens, spec.y.shape[1])}", tuple(bias.shape))


def check_worst_case(rows: Sequence[int], worst: Sequence[int], seq: int) -> None:
    """Raises EPArgumentError, on every rank: some rank receives more ``rows`` than its outputs were fixed to."""
    over = [r for r, n in enumerate(worst) if 0 <= n < rows[r]]
    if over:
        r = over[0]
        message = (
            f"num_worst_tokens: rank {r} receives {rows[r]} rows, but its outputs were fixed to {worst[r]}; "
            f"pass at least {max(rows[r] for r in over)} (too small on {name_ranks(over)})"
        )
        expected = f"at least {rows[r]}"
        raise EPArgumentError(
            message,
            argument="num_worst_tokens",
            expected=expected,
            got=str(worst[r]),
            op="dispatch",
            phase="notify",
            seq=seq,
            ranks=over,
        )


def _element_bytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.element_size()


def _digest(*tables: torch.Tensor) -> int:
    h = hashlib.blake2b(digest_size=7)
    for table in tables:
        h.update(table.to(torch.int32).contiguous().numpy().tobytes())
    return int.from_bytes(h.digest(), "little")
