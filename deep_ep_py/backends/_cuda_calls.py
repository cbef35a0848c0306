"""A call on a GPU in numbers: rows known in advance, plans that the device writes, addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _C
from ..plans import LAYOUTS, Plan
from ..types import DispatchSpec

#: recv_x, recv_sf, recv_topk_idx, recv_topk_weights, recv_meta.
_Maybe = torch.Tensor | None
Outputs = tuple[_Maybe, _Maybe, _Maybe, _Maybe, _Maybe]


def known_rows(spec: DispatchSpec, num_ranks: int) -> tuple[int, int] | None:
    """Rows of the outputs, and of ``recv_meta``, where they are known before anybody has met."""
    if spec.plan is not None:
        return spec.plan.num_output_rows if spec.num_worst_tokens is None else spec.num_worst_tokens, 0
    if spec.num_worst_tokens is None:
        return None
    if spec.layout == "rank":
        return spec.num_worst_tokens, spec.num_worst_tokens
    return spec.num_worst_tokens, num_ranks * spec.num_max_tokens_per_rank


def device_plan(
    spec: DispatchSpec,
    packed: torch.Tensor,
    rank: int,
    num_ranks: int,
    num_slots: int,
    num_local: int,
    flight: _C.CudaFlight,
    known: tuple[int, int] | None,
) -> Plan:
    """A plan that the device writes. What the host has not waited for (where rows were ``known``) is -1 in it."""
    return Plan(
        packed=packed,
        layout_number=LAYOUTS.index(spec.layout),
        num_tokens=spec.x.shape[0],
        num_slots=num_slots,
        num_ranks=num_ranks,
        rank=rank,
        num_local=num_local,
        num_rows=-1 if known else flight.num_rows,
        num_output_rows=known[0] if known else flight.num_rows,
        num_recv_tokens=-1 if known else flight.num_recv_tokens,
        digest=-1 if known else flight.digest,
        expert_alignment=spec.expert_alignment,
        num_max_tokens_per_rank=spec.num_max_tokens_per_rank if known else flight.num_max_tokens_per_rank,
        num_domains=0,
        num_relayed=0,
        relay_slots=0,
    )


def numbers(outputs: Sequence[torch.Tensor | None]) -> tuple[int, ...]:
    """As csrc/bindings/cuda.cpp reads them: addresses, the leading dimension of column-major scale factors, rows."""
    recv_x, recv_sf, recv_idx, recv_weights, recv_meta = outputs
    assert recv_x is not None
    col_major = recv_sf is not None and recv_sf.stride(0) == 1 and recv_sf.stride(1) > 1
    return (
        recv_x.data_ptr(),
        address(recv_sf),
        recv_sf.stride(1) if recv_sf is not None and col_major else 0,
        address(recv_idx),
        address(recv_weights),
        address(recv_meta),
        recv_x.shape[0],
        0 if recv_meta is None else recv_meta.shape[0],
    )


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
