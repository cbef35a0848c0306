"""A dispatch's outputs, and the exchanges that fill them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._rows import RowChannel, as_bytes
from ..layout import align, target_ranks, target_rows
from ..plans import Plan
from ..types import Dispatched, DispatchSpec
from ._routing import local_ids


def allocate(spec: DispatchSpec, plan: Plan, num_ranks: int) -> Dispatched:
    """Outputs of the right size, where x lies; ``plan``: on the CPU. What is documented as -1 in unused rows is -1
    already."""
    device = spec.x.device
    rows, new = plan.num_output_rows, spec.plan is None
    expand = plan.layout == "expand"
    recv_x = torch.empty((rows, spec.x.shape[1]), dtype=spec.x.dtype, device=device)
    recv_sf = recv_idx = recv_weights = recv_meta = None
    if spec.sf is not None:
        leading = max(align(rows, 4), 4)  # 16 bytes of 4-byte elements
        strides = (1, leading) if spec.col_major_sf else (spec.sf.shape[1], 1)
        recv_sf = torch.empty_strided((rows, spec.sf.shape[1]), strides, dtype=spec.sf.dtype, device=device)
    if new and spec.topk_idx is not None and (spec.describe_rows or not expand):
        recv_idx = torch.full((rows, 1 if expand else spec.topk_idx.shape[1]), -1, dtype=torch.int64, device=device)
    if spec.topk_weights is not None:
        shape = (rows,) if expand else (rows, spec.topk_weights.shape[1])
        recv_weights = torch.zeros(shape, dtype=spec.topk_weights.dtype, device=device)
    if new and spec.describe_sources and plan.layout == "rank":
        recv_meta = torch.full((rows,), -1, dtype=torch.int32, device=device)
    elif new and spec.describe_sources:
        num_meta = (
            num_ranks * plan.num_max_tokens_per_rank if spec.num_worst_tokens is not None else plan.num_recv_tokens
        )
        recv_meta = torch.full((num_meta, 2 + plan.num_slots), -1, dtype=torch.int32, device=device)
    if spec.plan is not None:
        return Dispatched(recv_x, recv_sf, recv_idx, recv_weights, recv_meta, spec.plan)
    counts = None if device.type == "cpu" else plan.expert_counts.tolist()
    here = plan._replace(packed=plan.packed.to(device))
    return Dispatched(recv_x, recv_sf, recv_idx, recv_weights, recv_meta, here, counts)


@dataclass(slots=True)
class Delivery:
    """One prepared dispatch. ``run`` moves everything; each destination gets a token once, its slots share it.
    ``plan``: the result's, on the CPU."""

    spec: DispatchSpec
    result: Dispatched
    plan: Plan
    rank: int
    num_ranks: int
    seq: int

    def run(self, channel: RowChannel) -> None:
        """``channel``: of tensors that lie where x does."""
        recv_sf = self.result.recv_sf
        if recv_sf is None or not self.spec.col_major_sf:
            self._run(channel, recv_sf)
            return
        row_major = torch.empty(recv_sf.shape, dtype=recv_sf.dtype, device=recv_sf.device)
        self._run(channel, row_major)
        recv_sf.copy_(row_major)

    def _run(self, channel: RowChannel, recv_sf: torch.Tensor | None) -> None:
        spec, result, plan = self.spec, self.result, self.plan
        targets, device = result.plan.targets, spec.x.device
        ranks = target_ranks(targets)
        sent = [(ranks == r).any(1).nonzero().reshape(-1) for r in range(self.num_ranks)]
        counts = [t.numel() for t in sent]
        token = torch.cat(sent)
        to = self._by_rank(counts, device)[:, None]
        from_each = plan.rank_prefix[:, self.rank].diff(prepend=plan.rank_prefix.new_zeros(1)).tolist()
        num_recv = plan.num_recv_tokens

        def move(rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            if out is None:
                out = torch.empty((num_recv, rows.shape[1]), dtype=rows.dtype, device=device)
            channel.all_to_all_single(out, rows, from_each, counts)
            return out

        expand = plan.layout == "expand"
        local = rows_of_slots = weights = None
        if spec.plan is None and spec.topk_idx is not None and not expand:
            assert spec.placement is not None
            local = local_ids(spec.topk_idx[token], spec.placement, to)
        if expand:
            here = ranks[token] == to
            rows_of_slots = move(torch.where(here, target_rows(targets)[token], -1))
        if result.recv_meta is not None:
            self._describe(result.recv_meta, move(token[:, None]).reshape(-1), from_each, rows_of_slots)
        if local is not None and result.recv_topk_idx is not None:
            move(local, result.recv_topk_idx[:num_recv])
        if spec.topk_weights is not None:
            weights = spec.topk_weights[token]
            if spec.mask_weights:
                weights = torch.where(ranks[token] == to if local is None else local >= 0, weights, 0.0)
        if rows_of_slots is None:
            if weights is not None and result.recv_topk_weights is not None:
                move(weights, result.recv_topk_weights[:num_recv])
            for rows, out in ((spec.sf, recv_sf), (spec.x, result.recv_x)):
                if rows is not None and out is not None and rows.shape[1] > 0:
                    move(_take(rows, token), as_bytes(out)[:num_recv])
            return
        if result.recv_topk_idx is not None:
            self._describe_rows(result.recv_topk_idx)
        source, slot = (rows_of_slots >= 0).nonzero(as_tuple=True)
        place = rows_of_slots[source, slot]
        gaps = torch.ones(plan.num_rows, dtype=torch.bool, device=device)
        gaps[place] = False
        gap = gaps.nonzero().reshape(-1) if spec.zero_padding else gaps.new_empty(0, dtype=torch.int64)
        if weights is not None and result.recv_topk_weights is not None:
            result.recv_topk_weights[place] = move(weights)[source, slot]
            result.recv_topk_weights[gap] = 0.0
        for rows, out in ((spec.sf, recv_sf), (spec.x, result.recv_x)):
            if rows is not None and out is not None and rows.shape[1] > 0:
                arrived = move(_take(rows, token))
                as_bytes(out).index_copy_(0, place, arrived.index_select(0, source)).index_fill_(0, gap, 0)

    def _describe(
        self, meta: torch.Tensor, token: torch.Tensor, from_each: list[int], rows_of_slots: torch.Tensor | None
    ) -> None:
        """Where received rows come from: ``recv_meta`` as types.Dispatched has it."""
        num_recv = token.numel()
        if self.plan.layout == "rank":
            meta[:num_recv] = token
            return
        source = self._by_rank(from_each, meta.device)
        meta[:num_recv, 0] = source * self.plan.num_max_tokens_per_rank + token
        meta[:num_recv, 1] = source
        if rows_of_slots is not None:
            meta[:num_recv, 2:] = rows_of_slots

    def _describe_rows(self, recv_topk_idx: torch.Tensor) -> None:
        """Expanded: the local expert of each row."""
        first = 0
        for expert, n in enumerate(self.plan.expert_counts.tolist()):
            recv_topk_idx[first : first + n] = expert
            first = align(first + n, self.spec.expert_alignment)

    def _by_rank(self, counts: list[int], device: torch.device) -> torch.Tensor:
        """[sum] int64: each rank, as often as counted."""
        return torch.repeat_interleave(_int64(range(self.num_ranks)), _int64(counts)).to(device)


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[n, bytes of a row] uint8: rows of any dtype; torch gathers no fp8."""
    if x.shape[1] == 1:  # a lone column may have any stride, and a view as bytes wants 1
        x = x.reshape(-1).contiguous().view(-1, 1)
    return x.view(torch.uint8).index_select(0, index)


def _int64(values: object) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device="cpu")  # type: ignore[call-overload]
