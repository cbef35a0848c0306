"""GPU peer memory: ranks of one machine write rows straight into each other's outputs. Wraps the CUDA library's engine.

A call launches kernels on the communication stream and returns; the host waits only where exact counts are asked for.
What goes wrong behind its back (a rank that did not come, a handle that is not this combine's) is raised by the next
call that looks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..communicator import Communicator
from ..errors import EPBackendUnavailableError, EPError
from ..event import CompletionEvent
from ..plans import LAYOUTS, plan_words
from ..settings import Settings
from ..types import Combined, CombineSpec, Dispatched, DispatchSpec, ExpertPlacement
from ._cuda_calls import Outputs, address, device_plan, known_rows, numbers
from ._cuda_machine import Machine
from ._dtypes import CARRIED, DTYPE_CODES, ROW_TYPES
from .base import Flight, Statistics

_OPS = {"dispatch": 1, "combine": 3, "barrier": 4}
# What is queued when a buffer is closed gets so long to end; then its waits are ended.
_CLOSE_SECONDS = 10.0


class CudaPeerBackend:
    """See :class:`deep_ep_py.backends.base.Backend`. Construction is collective."""

    name = "cuda_peer"

    def __init__(
        self,
        communicator: Communicator,
        settings: Settings,
        *,
        device: torch.device,
        epoch: int,
        heap_bytes: int,
        unavailable: str = "",
        machine: Callable[[torch.device], Machine] = Machine,
    ) -> None:
        """Map everyone's heap.

        Args:
            epoch: random, equal on all ranks; the identity of this construction.
            heap_bytes: heap to prepare.
            unavailable: why this rank cannot, if it is known already.
            machine: makes what stands for the GPU.

        Raises:
            EPBackendUnavailableError: on every rank, if one of them could not map a peer; says who and why.
            EPTimeoutError: a rank did not come.
        """
        self.rank, self.num_ranks, self.device = communicator.rank, communicator.size, device

        def exchange(what: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
            timeout = settings.connect_timeout_seconds
            answers = communicator.exchange(json.dumps(payload).encode(), timeout=timeout, what=what)
            found = [json.loads(a) for a in answers]
            refused = {f"rank {r}": a["refused"] for r, a in enumerate(found) if a["refused"]}
            if refused:
                why = "; ".join(f"{r}: {text}" for r, text in refused.items())
                raise EPBackendUnavailableError(f"GPU peer memory does not work here: {why}", reasons={self.name: why})
            return found

        refused, endpoint = unavailable, ""
        try:
            if not refused:
                self._machine = machine(device)
                self.device = self._machine.device
                self._engine = self._machine.library.open(
                    epoch=epoch,
                    rank=self.rank,
                    num_ranks=self.num_ranks,
                    device=self._machine.index,
                    timeout_seconds=settings.timeout_seconds,
                    heap_bytes=heap_bytes,
                    num_sms=0,
                )
                endpoint = self._engine.endpoint()
        except Exception as e:  # whatever it is: the peers must hear of it
            refused = str(e) or type(e).__name__
        endpoints = [a["endpoint"] for a in exchange("endpoints", {"refused": refused, "endpoint": endpoint})]
        try:
            self._engine.connect(endpoints)
        except EPError as e:
            refused = str(e)
        exchange("mapping", {"refused": refused})
        self._tables: dict[int, tuple[ExpertPlacement, tuple[torch.Tensor, ...]]] = {}
        self._copied_inputs = 0
        self._closed = False

    @property
    def comm_stream(self) -> Any:
        """The stream on which rows move."""
        return self._machine.comm_stream

    # Dispatch -------------------------------------------------------------------------------------------------------

    def prepare(
        self, spec: DispatchSpec, *, background: bool = False, previous: Sequence[CompletionEvent] = ()
    ) -> Flight:
        self._require_open()
        machine, plan, x, placement = self._machine, spec.plan, spec.x, spec.placement
        cached = plan is not None
        num_tokens, hidden = x.shape
        row_bytes = hidden * x.element_size()
        topk_idx, weights = spec.topk_idx, spec.topk_weights
        num_topk = topk_idx.shape[1] if topk_idx is not None else weights.shape[1] if weights is not None else 0
        tables: tuple[torch.Tensor | None, ...] = (None,) * 4
        known, outputs = known_rows(spec, self.num_ranks), None
        with self._refusing("dispatch"):
            if plan is not None:
                packed, num_local, num_slots = plan.packed, plan.num_local, plan.num_slots
            else:
                assert placement is not None
                num_local = placement.num_local[self.rank]
                num_slots = self.num_ranks if spec.layout == "rank" else num_topk
                words = plan_words(num_tokens, num_slots, self.num_ranks, num_local)
                packed = torch.empty(words, dtype=torch.int64, device=self.device)
                tables = self._tables_of(placement)
            if known is not None:
                outputs = self._outputs(spec, num_topk, *known)
            machine.begin(previous)
        held: list[torch.Tensor] = []

        def workspace(num_bytes: int) -> int:
            with self._refusing("dispatch"), machine.on_comm_stream():  # nobody else uses it
                held.append(torch.empty(num_bytes, dtype=torch.uint8, device=self.device))
            return held[-1].data_ptr()

        with machine.joined():
            flight = self._engine.dispatch_begin(
                stream=machine.stream,
                layout=LAYOUTS.index(spec.layout),
                cached=cached,
                host_counts=known is None,
                num_tokens=num_tokens,
                num_topk=num_topk,
                num_experts=0 if placement is None else placement.num_experts,
                num_local=num_local,
                num_slots=num_slots,
                topk_idx=address(topk_idx),
                topk_weights=address(weights),
                has_topk=topk_idx is not None,
                weight_bytes=0 if weights is None else weights.element_size(),
                is_token_in_rank=address(spec.is_token_in_rank),
                num_tokens_per_rank=address(spec.num_tokens_per_rank),
                num_tokens_per_expert=address(spec.num_tokens_per_expert),
                expert_rank=address(tables[0]),
                expert_local=address(tables[1]),
                placement_hash=0 if placement is None else placement.digest,
                sorted_experts=address(tables[2]),
                rank_begin=address(tables[3]),
                plan=packed.data_ptr(),
                x=x.data_ptr(),
                x_stride_bytes=x.stride(0) * x.element_size() if num_tokens > 1 else row_bytes,
                row_bytes=row_bytes,
                hidden=hidden,
                dtype=DTYPE_CODES[x.dtype],
                sf=address(spec.sf),
                sf_bytes=0 if spec.sf is None else spec.sf.shape[1] * spec.sf.element_size(),
                sf_dtype=0 if spec.sf is None else DTYPE_CODES[spec.sf.dtype],
                carries=CARRIED[spec.carries],
                expert_alignment=spec.expert_alignment,
                zero_padding=spec.zero_padding,
                mask_weights=spec.mask_weights,
                describe_sources=spec.describe_sources and plan is None,
                col_major_sf=spec.col_major_sf,
                num_worst_tokens=-1 if spec.num_worst_tokens is None else spec.num_worst_tokens,
                num_max_tokens_per_rank=spec.num_max_tokens_per_rank,
                num_output_rows=0 if known is None else known[0],
                num_sms=spec.max_threads,
                allocate_workspace=workspace,
                outputs=None if outputs is None else numbers(outputs),
            )
        if plan is None:
            plan = device_plan(spec, packed, self.rank, self.num_ranks, num_slots, num_local, flight, known)
        if outputs is None:
            try:
                meta_rows = flight.num_rows if spec.layout == "rank" else flight.num_recv_tokens
                outputs = self._outputs(spec, num_topk, flight.num_rows, meta_rows)
            except Exception as e:  # no memory: the peers wait for an offer
                self._engine.dispatch_move(flight=flight, outputs=(0,) * 8, failed=f"{type(e).__name__}: {e}")
                raise
        recv_x, recv_sf, recv_idx, recv_weights, recv_meta = outputs
        assert recv_x is not None
        counts = None if known or cached else flight.expert_counts
        result = Dispatched(recv_x, recv_sf, recv_idx, recv_weights, recv_meta, plan, counts)
        return Flight(result, state=(flight, spec, background, packed, held))

    def dispatch_send(self, flight: Flight) -> None:
        core, spec, background, packed, _ = flight.state
        out: Dispatched = flight.result
        made = (out.recv_x, out.recv_sf, out.recv_topk_idx, out.recv_topk_weights, out.recv_meta)
        with self._machine.joined():
            self._engine.dispatch_move(flight=core, outputs=numbers(made), failed=None)
        flight.state = None
        given = (spec.x, spec.sf, spec.topk_idx, spec.topk_weights, spec.is_token_in_rank, spec.num_tokens_per_rank)
        uses = (*given, spec.num_tokens_per_expert, *made, packed)
        flight.event = self._machine.end(uses, background=background, on_comm_stream=spec.on_comm_stream)

    def dispatch_recv(self, flight: Flight) -> Dispatched:
        # Both halves are on the stream already: a kernel waits there for the rows.
        result: Dispatched = flight.result
        return result

    def _outputs(self, spec: DispatchSpec, num_topk: int, rows: int, meta_rows: int) -> Outputs:
        """recv_x, recv_sf, recv_topk_idx, recv_topk_weights, recv_meta: in the heap, where peers write to them."""
        x, sf, new, expand = spec.x, spec.sf, spec.plan is None, spec.layout == "expand"
        recv_sf = recv_idx = recv_weights = recv_meta = None
        with self._machine.heap(self._engine, on_comm_stream=spec.on_comm_stream) as empty:
            recv_x = empty((rows, x.shape[1]), x.dtype)
            if sf is not None:
                # Column-major: a whole number of 16 bytes from one column to the next, so that peers know it from the
                # size alone.
                leading = max(-(-rows // 4) * 4, 4) if spec.col_major_sf else rows
                stored = empty((sf.shape[1], leading), sf.dtype)
                recv_sf = stored[:, :rows].t() if spec.col_major_sf else stored.view(rows, sf.shape[1])
            if new and spec.topk_idx is not None and (spec.describe_rows or not expand):
                recv_idx = empty((rows, 1 if expand else num_topk), torch.int64)
            if spec.topk_weights is not None:
                recv_weights = empty((rows,) if expand else (rows, num_topk), spec.topk_weights.dtype)
            if new and spec.describe_sources:
                width = () if spec.layout == "rank" else (2 + num_topk,)
                recv_meta = empty((meta_rows, *width), torch.int32)
        return recv_x, recv_sf, recv_idx, recv_weights, recv_meta

    def _tables_of(self, placement: ExpertPlacement) -> tuple[torch.Tensor, ...]:
        """On the device: rank and local number of each expert; experts by those; where each rank's begin."""
        known = self._tables.get(id(placement))
        if known is None:
            if self._machine.capturing():
                raise EPError("call dispatch once with this number of experts before a CUDA graph is captured")
            order = torch.argsort(placement.rank.long() * placement.num_experts + placement.local)
            begin = torch.tensor([0, *placement.num_local], dtype=torch.int64, device="cpu").cumsum(0)
            host = (placement.rank, placement.local, order.to(torch.int32), begin.to(torch.int32))
            known = self._tables[id(placement)] = (placement, tuple(t.to(self.device) for t in host))
        return known[1]

    # Combine --------------------------------------------------------------------------------------------------------

    def prepare_combine(
        self, spec: CombineSpec, *, background: bool = False, previous: Sequence[CompletionEvent] = ()
    ) -> Flight:
        y, plan = spec.y, spec.plan
        self._require_open()
        weights, shared_weights = None, None
        with self._refusing("combine"):
            combined_x = torch.empty((plan.num_tokens, y.shape[1]), dtype=y.dtype, device=self.device)
            if spec.weights is not None:
                columns = spec.weights.shape[1] if plan.layout == "rank" else plan.num_slots
                weights = torch.empty((plan.num_tokens, columns), dtype=spec.weights.dtype, device=self.device)
                shared_weights = self._room_for(spec.weights, spec.on_comm_stream)
            shared = self._room_for(y, spec.on_comm_stream)
            self._machine.begin(previous)
            with self._machine.joined(), self._machine.on_comm_stream():
                for room, given in ((shared, y), (shared_weights, spec.weights)):
                    if room is not None and given is not None and room is not given:
                        room.copy_(given)
        return Flight(Combined(combined_x, weights), state=(spec, background, shared, shared_weights))

    def combine_send(self, flight: Flight) -> None:
        spec, background, y, weights = flight.state
        out: Combined = flight.result
        plan, bias = spec.plan, spec.bias
        with self._machine.joined():
            self._engine.combine(
                stream=self._machine.stream,
                plan=plan.packed.data_ptr(),
                layout=plan.layout_number,
                num_slots=plan.num_slots,
                num_local=plan.num_local,
                num_tokens=plan.num_tokens,
                y=y.data_ptr(),
                y_rows=y.shape[0],
                row_bytes=y.shape[1] * y.element_size(),
                hidden=y.shape[1],
                dtype=ROW_TYPES[y.dtype],
                weights=address(weights),
                weight_bytes=4 if weights is None else weights.element_size(),
                num_weights=0 if weights is None else weights.shape[1] if weights.dim() == 2 else 1,
                num_bias=len(bias),
                bias0=bias[0].data_ptr() if bias else 0,
                bias1=bias[1].data_ptr() if len(bias) > 1 else 0,
                reduce_per_rank=spec.reduce_per_rank,
                out=out.combined_x.data_ptr(),
                out_weights=address(out.combined_topk_weights),
                carries=CARRIED[spec.carries],
                num_sms=spec.max_threads,
            )
        flight.state = None
        uses = (y, weights, spec.y, spec.weights, *bias, plan.packed, out.combined_x, out.combined_topk_weights)
        flight.event = self._machine.end(uses, background=background, on_comm_stream=spec.on_comm_stream)

    def combine_recv(self, flight: Flight) -> Combined:
        result: Combined = flight.result
        return result

    def _room_for(self, rows: torch.Tensor, on_comm_stream: bool) -> torch.Tensor:
        """Where peers can read ``rows``: where they are if that is in the heap, else room for a copy."""
        if rows.is_contiguous() and self._engine.in_heap(data=rows.data_ptr(), bytes=rows.nbytes):
            return rows
        self._copied_inputs += rows.dim() == 2
        with self._machine.heap(self._engine, on_comm_stream=on_comm_stream) as empty:
            return empty(rows.shape, rows.dtype)

    # The rest -------------------------------------------------------------------------------------------------------

    def abort(self, flight: Flight) -> None:
        if flight.state is not None:
            self._engine.poison("a dispatch was begun and then given up")

    def barrier(self, *, host: bool = True) -> None:
        self._require_open()
        self._machine.begin(())
        with self._machine.joined():
            self._engine.barrier(stream=self._machine.stream, host=host)
        self._machine.end((), background=False, on_comm_stream=False)

    def fail(self, op: str, message: str) -> None:
        if self._machine.capturing():
            return  # nothing of a capture is carried out now, so no peer waits
        self._engine.fail(stream=self._machine.stream, op=_OPS[op], text=message[:500])

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self._require_open()
        with self._machine.heap(self._engine, on_comm_stream=False) as empty:
            return empty(shape, dtype)

    def statistics(self) -> Statistics:
        counters: dict[str, Any] = self._engine.statistics()
        return Statistics(**counters, copied_combine_inputs=self._copied_inputs)

    def poisoned(self) -> bool:
        return False  # unknown to the host, but for what the errors' types say

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._machine.drain(_CLOSE_SECONDS)
        self._engine.close()
        self._machine.close()

    def _require_open(self) -> None:
        if self._closed:
            raise EPError("this buffer was destroyed: build a new one")

    @contextmanager
    def _refusing(self, op: str) -> Iterator[None]:
        """Nothing is published yet: what goes wrong inside is told to the peers, at this operation's place."""
        try:
            yield
        except Exception as e:
            self.fail(op, f"{type(e).__name__}: {e}")
            raise
