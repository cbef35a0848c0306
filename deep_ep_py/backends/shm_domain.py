"""Shared memory as the inner hop of several: the pieces of an operation, for rows that come from other domains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import EPArgumentError, EPError, EPMismatchError, EPTimeoutError
from ..plans import LAYOUTS, Plan, PlanLayout
from ..types import Combined, CombineSpec, Dispatched, DispatchSpec
from ._dtypes import DTYPE_CODES, ROW_TYPES
from .base import Flight, Relayed
from .shm import ShmBackend, address


@contextmanager
def _ours_alone() -> Iterator[None]:
    """Of what goes wrong inside one domain the others do not know, so no such error leaves the buffer usable."""
    try:
        yield
    except (EPArgumentError, EPMismatchError) as e:
        raise EPError(str(e), op=e.op, phase=e.phase, seq=e.seq, ranks=e.ranks) from e


class ShmDomain(ShmBackend):
    """See :class:`.base.Domain`. Plans and targets name the buffer's ranks; those of other domains are skipped."""

    def join_world(self, members: Sequence[int], num_ranks: int) -> None:
        """Which of the buffer's ranks these are, in the order of their numbers here."""
        self._local_of = torch.full((num_ranks,), -1, dtype=torch.int32, device="cpu")
        self._local_of[list(members)] = torch.arange(len(members), dtype=torch.int32, device="cpu")
        self._members = list(members)

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """[U, ...]: everyone's ``own``, contiguous and equal in shape."""
        everyones = torch.empty((self.num_ranks, *own.shape), dtype=own.dtype, device="cpu")
        self._engine.gather(own=own.data_ptr(), bytes=own.nbytes, all=everyones.data_ptr())
        return everyones

    # Dispatch -------------------------------------------------------------------------------------------------------

    def hop_begin(self, spec: DispatchSpec, plan: Plan, tokens_to: torch.Tensor, rows_to: torch.Tensor) -> Flight:
        x, sf, weights, placement = spec.x, spec.sf, spec.topk_weights, spec.placement
        num_topk = spec.topk_idx.shape[1] if spec.topk_idx is not None else 0
        num_topk = weights.shape[1] if weights is not None else num_topk
        here = torch.tensor(self._members, dtype=torch.int64, device="cpu")
        tokens_here, rows_here = tokens_to[here].contiguous(), rows_to[here].contiguous()
        with _ours_alone():
            flight = self._engine.hop_begin(
                plan=plan.packed.data_ptr(),
                cached=spec.plan is not None,
                num_topk=num_topk,
                has_topk=spec.topk_idx is not None,
                weight_bytes=0 if weights is None else weights.element_size(),
                local_of=self._local_of.data_ptr(),
                num_experts=0 if placement is None else placement.num_experts,
                expert_rank=0 if placement is None else placement.rank.data_ptr(),
                expert_local=0 if placement is None else placement.local.data_ptr(),
                tokens_to=tokens_here.data_ptr(),
                rows_to=rows_here.data_ptr(),
                row_bytes=x.shape[1] * x.element_size(),
                hidden=x.shape[1],
                dtype=DTYPE_CODES[x.dtype],
                sf_bytes=0 if sf is None else sf.shape[1] * sf.element_size(),
                zero_padding=spec.zero_padding,
                mask_weights=spec.mask_weights,
                describe_rows=spec.describe_rows,
                num_worst_tokens=-1 if spec.num_worst_tokens is None else spec.num_worst_tokens,
                max_threads=spec.max_threads,
                previous=[],
            )
        try:
            result = self._outputs(spec, flight, plan, flight.num_output_rows, num_topk)
        except BaseException:
            self._engine.abandon(flight=flight)
            raise
        # The core keeps addresses: the counts and tables must live as long as the flight.
        return Flight(result, state=(flight, spec, (plan, tokens_here, rows_here, placement)))

    def place(self, flight: Flight, source: Relayed) -> None:
        core, _, _ = flight.state
        x, sf, targets = source.x, source.sf, source.targets
        if targets.shape[0] == 0:
            return
        self._engine.hop_place(
            flight=core,
            targets=targets.data_ptr(),
            num_tokens=targets.shape[0],
            num_slots=targets.shape[1],
            rows=x is not None,
            x=address(x),
            x_stride_bytes=0 if x is None else x.stride(0) * x.element_size(),
            sf=address(sf),
            sf_stride_bytes=0 if sf is None else sf.stride(0) * sf.element_size(),
            small=source.small,
            tokens=address(source.tokens),
            topk_idx=address(source.topk_idx),
            topk_weights=address(source.topk_weights),
            first_token=address(source.first_token),
        )

    def hop_finish(self, flight: Flight) -> None:
        core, spec, _ = flight.state
        out: Dispatched = flight.result
        moved = core.staged and out.recv_x.numel() > 0
        self._engine.hop_finish(
            flight=core,
            recv_x=out.recv_x.data_ptr() if moved else 0,
            recv_sf=address(out.recv_sf) if moved or spec.col_major_sf else 0,
            recv_sf_leading=out.recv_sf.stride(1) if out.recv_sf is not None and spec.col_major_sf else 0,
            recv_topk_idx=address(out.recv_topk_idx),
            recv_topk_weights=address(out.recv_topk_weights),
            recv_meta=address(out.recv_meta),
        )

    # Combine --------------------------------------------------------------------------------------------------------

    def pull_begin(self, spec: CombineSpec) -> Any:
        y, weights, plan = spec.y, spec.weights, spec.plan
        row_bytes = y.shape[1] * y.element_size()
        with _ours_alone():
            return self._engine.pull_begin(
                plan=plan.packed.data_ptr(),
                local_of=self._local_of.data_ptr(),
                y=y.data_ptr(),
                y_rows=plan.num_rows,
                y_stride_bytes=y.stride(0) * y.element_size() if plan.num_rows > 1 else row_bytes,
                row_bytes=row_bytes,
                hidden=y.shape[1],
                dtype=ROW_TYPES[y.dtype],
                weights=address(weights),
                weight_bytes=4 if weights is None else weights.element_size(),
                num_weights=0 if weights is None else weights.shape[1] if weights.dim() == 2 else 1,
                reduce_per_rank=spec.reduce_per_rank,
                max_threads=spec.max_threads,
                previous=[],
            )

    def pull(
        self,
        flight: Any,
        layout: PlanLayout,
        targets: torch.Tensor,
        reduce_per_rank: bool,
        verbatim: bool,
        out: torch.Tensor | None,
        out_weights: torch.Tensor | None,
    ) -> None:
        if targets.shape[0] == 0:
            return
        self._engine.pull(
            flight=flight,
            layout=LAYOUTS.index(layout),
            targets=targets.data_ptr(),
            num_tokens=targets.shape[0],
            num_slots=targets.shape[1],
            reduce_per_rank=reduce_per_rank,
            verbatim=verbatim,
            out=address(out),
            out_weights=address(out_weights),
        )

    def pull_end(self, flight: Any) -> None:
        self._engine.pull_end(flight=flight)

    def reduce(
        self,
        layout: PlanLayout,
        home: torch.Tensor,
        rows: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        out: Combined,
        first: int,
        end: int,
        biases: Sequence[torch.Tensor],
        max_threads: int,
    ) -> None:
        if first == end:
            return
        x, w = out.combined_x, out.combined_topk_weights
        by = rows or weights
        row_bytes = x.shape[1] * x.element_size()
        self._engine.reduce(
            layout=LAYOUTS.index(layout),
            targets=home[first:].data_ptr(),
            num_tokens=end - first,
            num_slots=home.shape[1],
            out=x[first:].data_ptr() if rows else 0,
            out_weights=w[first:].data_ptr() if weights and w is not None else 0,
            biases=[b[first:].data_ptr() for b in biases],
            rows=[r.data_ptr() for r in rows],
            weights=[r.data_ptr() for r in weights],
            limit=[r.shape[0] for r in by],
            hidden=x.shape[1],
            row_bytes=row_bytes,
            dtype=ROW_TYPES[x.dtype],
            weight_bytes=4 if w is None else w.element_size(),
            num_weights=weights[0].shape[1] if weights else 0,
            max_threads=max_threads,
        )

    def poison(self, error: EPError) -> None:
        """Peers in this domain raise ``error`` from now on."""
        seconds = error.seconds if isinstance(error, EPTimeoutError) else 0.0
        late = isinstance(error, EPTimeoutError)
        self._engine.poison(text=str(error), timeout=late, ranks=list(error.ranks), seconds=seconds)
