"""What ``collective`` refuses, and what all ranks must say alike, operation by operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._rows import name_ranks
from ..errors import EPArgumentError
from ..plans import Plan
from ..types import CombineSpec, DispatchSpec


def dispatch_agrees_on(spec: DispatchSpec) -> dict[str, int | str]:
    """By the names of csrc/protocol/agreement.hpp, in its order and its words."""
    plan, sf, placement, by_rank = spec.plan, spec.sf, spec.placement, spec.layout == "rank"
    fixed = plan is None and spec.num_worst_tokens is not None
    slots = spec.topk_idx if spec.topk_idx is not None else spec.topk_weights
    return {
        "carries": spec.carries,
        "do_expand": str(spec.layout == "expand"),
        "do_cpu_sync": str(by_rank or not fixed),
        "num_worst_tokens": "given" if by_rank and fixed else "not given",
        "hidden": spec.x.shape[1],
        "dtype": str(spec.x.dtype),
        "scale factor dtype": _dtype(sf),
        "scale factor bytes per token": 0 if sf is None else sf.shape[1] * sf.element_size(),
        "topk_idx": "None" if spec.topk_idx is None else "given",
        "topk_weights": _dtype(spec.topk_weights),
        "num_topk": 0 if slots is None else slots.shape[1],
        "num_experts": 0 if placement is None else placement.num_experts,
        "placement": 0 if placement is None else placement.digest,
        "expert_alignment": spec.expert_alignment,
        "num_max_tokens_per_rank": spec.num_max_tokens_per_rank,
        "handle": 0 if plan is None else plan.digest,
    }


def combine_agrees_on(spec: CombineSpec, allow_multiple_reduction: bool) -> dict[str, int | str]:
    columns = 0 if spec.weights is None else spec.weights.shape[1:].numel()  # the shape of one weight has one element
    return {
        "carries": spec.carries,
        "do_expand": str(spec.plan.layout == "expand"),
        "hidden": spec.y.shape[1],
        "dtype": str(spec.y.dtype),
        "topk_weights": _dtype(spec.weights),
        "columns of topk_weights": columns,
        "allow_multiple_reduction": str(allow_multiple_reduction),
        "handle": spec.plan.digest,
    }


def told_of(plan: Plan | None) -> dict[str, Any]:
    """What a record tells of a handle; :meth:`.plans.Plan.sent_minus_received`."""
    return {"sent_minus_received": 0 if plan is None else plan.sent_minus_received()}


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


def _dtype(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else str(tensor.dtype)
