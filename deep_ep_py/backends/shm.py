"""Shared memory: ranks of one host write rows straight into each other's outputs. Wraps the core's engine."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from .. import _C
from ..communicator import Communicator
from ..errors import EPBackendUnavailableError, EPError
from ..event import CompletionEvent
from ..notices import HeapNotices
from ..plans import LAYOUTS, Plan, plan_words
from ..settings import Settings, available_memory_bytes
from ..types import Combined, CombineSpec, Dispatched, DispatchSpec
from ._dtypes import CARRIED, DTYPE_CODES, ROW_TYPES
from .base import Flight, Statistics

_LAYOUT = {layout: number for number, layout in enumerate(LAYOUTS)}
_OPS = {"dispatch": 1, "combine": 3, "barrier": 4}
# DLPack type code and bits of what torch can take over as it is; other types travel as bytes.
_DLPACK = {
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.uint8: (1, 8),
    torch.int8: (0, 8),
    torch.int16: (0, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
}
# Below this size a combine result lies in ordinary memory: fresh pages cost nothing there.
_SMALL_RESULT_BYTES = 64 << 10
_CLOSE_GRACE_SECONDS = 2.0


def unavailable_because(hosts: Sequence[dict[str, Any]]) -> str:
    """Why these ranks cannot share memory; empty if they can. ``hosts``: one :func:`host_facts` a rank."""
    if not _C.has_shm:
        return "this build has no shared memory engine (it needs Linux with memfd, futex and pidfd)"
    for field, words in (("domain", "Settings.domain"), ("boot_id", "the machine (kernel boot id)")):
        values = {r: h[field] for r, h in enumerate(hosts)}
        if len(set(values.values())) > 1:
            return f"ranks differ in {words}: {values}"
    return ""


class ShmBackend:
    """See :class:`deep_ep_py.backends.base.Backend`. Construction is collective."""

    name = "shm"
    device = torch.device("cpu")
    comm_stream = None

    def __init__(
        self,
        communicator: Communicator,
        settings: Settings,
        *,
        epoch: int,
        heap_bytes: int,
        num_cores: int,
        names: Sequence[int] = (),
        prefault_bytes: int = 0,
    ) -> None:
        """Map everyone's heap.

        Args:
            epoch: random, equal on all ranks; the identity of this construction.
            heap_bytes: heap to reserve: address space, whose pages cost nothing until they are used.
            num_cores: cores that this process may use.
            names: what errors call these ranks, where they are a part of the buffer's.
            prefault_bytes: of the heap, what is present in every rank's mapping from the start.

        Raises:
            EPBackendUnavailableError: on every rank, if one of them could not map a peer; says who and why.
            EPTimeoutError: a rank did not come.
        """
        self.rank, self.num_ranks = communicator.rank, communicator.size
        limit = settings.max_heap_bytes or available_memory_bytes() // (2 * self.num_ranks)
        spin = settings.spin_microseconds
        if spin < 0:
            spin = 200 if self.num_ranks <= num_cores else 0

        def exchange(what: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
            timeout = settings.connect_timeout_seconds
            answers = communicator.exchange(json.dumps(payload).encode(), timeout=timeout, what=what)
            found = [json.loads(a) for a in answers]
            refused = {f"rank {r}": a["refused"] for r, a in enumerate(found) if a["refused"]}
            if refused:
                why = "; ".join(f"{r}: {text}" for r, text in refused.items())
                raise EPBackendUnavailableError(f"shared memory does not work here: {why}", reasons={self.name: why})
            return found

        refused, endpoint = "", None
        try:
            self._engine = _C.Engine(
                epoch=epoch,
                rank=self.rank,
                num_ranks=self.num_ranks,
                timeout_seconds=settings.timeout_seconds,
                spin_microseconds=spin,
                max_heap_bytes=limit,
                heap_bytes=min(heap_bytes, limit),
                prefault_bytes=min(prefault_bytes, limit),
                num_threads=settings.num_threads or max(1, num_cores // self.num_ranks),
                names=list(names),
            )
            endpoint = self._engine.endpoint()
        except EPError as e:
            refused = str(e)
        endpoints = [tuple(a["endpoint"]) for a in exchange("endpoints", {"refused": refused, "endpoint": endpoint})]
        try:
            self._engine.connect(endpoints)
        except EPError as e:
            refused = str(e)
        exchange("mapping", {"refused": refused})
        # Inputs and results of background operations, until these are complete: the core has only addresses.
        self._in_flight: deque[tuple[CompletionEvent, Any]] = deque()
        self._notices = HeapNotices(names[self.rank] if names else self.rank, limit)
        self._num_segments = self._engine.num_segments

    def prepare(
        self, spec: DispatchSpec, *, background: bool = False, previous: Sequence[CompletionEvent] = ()
    ) -> Flight:
        self._forget_complete()
        plan, x, sf, placement = spec.plan, spec.x, spec.sf, spec.placement
        num_tokens, hidden = x.shape
        row_bytes = hidden * x.element_size()
        topk_idx, weights = spec.topk_idx, spec.topk_weights
        num_topk = topk_idx.shape[1] if topk_idx is not None else weights.shape[1] if weights is not None else 0
        num_local = 0
        if plan is not None:
            packed = plan.packed
        else:
            assert placement is not None
            num_local = placement.num_local[self.rank]
            width = self.num_ranks if spec.layout == "rank" else num_topk
            words = plan_words(num_tokens, width, self.num_ranks, num_local)
            packed = torch.empty(words, dtype=torch.int64, device="cpu")
        flight = self._engine.dispatch_begin(
            layout=_LAYOUT[spec.layout],
            cached=plan is not None,
            num_tokens=num_tokens,
            num_topk=num_topk,
            topk_idx=address(topk_idx),
            topk_weights=address(weights),
            has_topk=topk_idx is not None,
            weight_bytes=0 if weights is None else weights.element_size(),
            is_token_in_rank=address(spec.is_token_in_rank),
            num_tokens_per_rank=address(spec.num_tokens_per_rank),
            num_tokens_per_expert=address(spec.num_tokens_per_expert),
            num_experts=0 if placement is None else placement.num_experts,
            num_local=num_local,
            expert_rank=0 if placement is None else placement.rank.data_ptr(),
            expert_local=0 if placement is None else placement.local.data_ptr(),
            placement_hash=0 if placement is None else placement.digest,
            plan=packed.data_ptr(),
            recv_src_idx=0 if plan is None else address(plan.recv_src_idx),
            x=x.data_ptr(),
            x_stride_bytes=x.stride(0) * x.element_size() if num_tokens > 1 else row_bytes,
            row_bytes=row_bytes,
            hidden=hidden,
            dtype=DTYPE_CODES[x.dtype],
            sf=address(sf),
            sf_bytes=0 if sf is None else sf.shape[1] * sf.element_size(),
            sf_dtype=0 if sf is None else DTYPE_CODES[sf.dtype],
            carries=CARRIED[spec.carries],
            expert_alignment=spec.expert_alignment,
            zero_padding=spec.zero_padding,
            mask_weights=spec.mask_weights,
            describe_rows=spec.describe_rows,
            num_worst_tokens=-1 if spec.num_worst_tokens is None else spec.num_worst_tokens,
            num_max_tokens_per_rank=spec.num_max_tokens_per_rank,
            max_threads=spec.max_threads,
            background=background,
            previous=self._core_events("dispatch", previous),
        )
        if self._engine.num_segments != self._num_segments:  # by this dispatch, or by an operation before it
            self._note_growth()
        rows = flight.num_output_rows
        if plan is None:
            plan = Plan.of(packed)
        try:
            result = self._outputs(spec, flight, plan, rows, num_topk)
        except BaseException:
            self._engine.abandon(flight=flight)
            raise
        return Flight(result, state=(flight, spec, background))

    def _outputs(
        self, spec: DispatchSpec, flight: _C.DispatchFlight, plan: Plan, rows: int, num_topk: int
    ) -> Dispatched:
        """Output tensors: rows in heap blocks (ordinary memory where the user holds too much), the rest ordinary."""
        x, sf = spec.x, spec.sf
        staged = flight.staged
        if staged:
            self._notices.ordinary_memory(self.statistics().held_bytes)
        in_heap = not staged and rows > 0
        recv_x = _take(flight.take_x, (rows, x.shape[1]), x.dtype, in_heap)
        recv_sf = None
        if sf is not None:
            if spec.col_major_sf:
                leading = max(-(-rows // 4) * 4, 4)
                recv_sf = torch.empty_strided((rows, sf.shape[1]), (1, leading), dtype=sf.dtype, device="cpu")
            else:
                recv_sf = _take(flight.take_sf, (rows, sf.shape[1]), sf.dtype, in_heap)
        cached, expand = spec.plan is not None, spec.layout == "expand"
        recv_topk_idx = recv_weights = recv_meta = None
        if spec.topk_idx is not None and not cached and (spec.describe_rows or not expand):
            recv_topk_idx = torch.empty((rows, 1 if expand else num_topk), dtype=torch.int64, device="cpu")
        if spec.topk_weights is not None:
            shape = (rows,) if expand else (rows, num_topk)
            recv_weights = torch.empty(shape, dtype=spec.topk_weights.dtype, device="cpu")
        if not cached and spec.describe_sources:
            if spec.layout == "rank":
                meta_shape: tuple[int, ...] = (rows,)
            elif spec.num_worst_tokens is not None:
                meta_shape = (plan.num_ranks * plan.num_max_tokens_per_rank, 2 + num_topk)
            else:
                meta_shape = (plan.num_recv_tokens, 2 + num_topk)
            recv_meta = torch.empty(meta_shape, dtype=torch.int32, device="cpu")
        return Dispatched(recv_x, recv_sf, recv_topk_idx, recv_weights, recv_meta, plan)

    def dispatch_send(self, flight: Flight) -> None:
        core, spec, background = flight.state
        out: Dispatched = flight.result
        moved = core.staged and out.recv_x.numel() > 0
        flight.event = self._engine.dispatch_move(
            flight=core,
            recv_x=out.recv_x.data_ptr() if moved else 0,
            recv_sf=address(out.recv_sf) if moved or spec.col_major_sf else 0,
            recv_sf_leading=out.recv_sf.stride(1) if out.recv_sf is not None and spec.col_major_sf else 0,
            recv_topk_idx=address(out.recv_topk_idx),
            recv_topk_weights=address(out.recv_topk_weights),
            recv_meta=address(out.recv_meta),
            around=None if flight.span is None else flight.span.around,
        )
        if background:
            self._keep(flight)

    def dispatch_recv(self, flight: Flight) -> Dispatched:
        # The core runs both halves of a flat dispatch in one piece, in `dispatch_send`.
        result: Dispatched = flight.result
        return result

    def prepare_combine(
        self, spec: CombineSpec, *, background: bool = False, previous: Sequence[CompletionEvent] = ()
    ) -> Flight:
        self._forget_complete()
        y, plan = spec.y, spec.plan
        shape = (plan.num_tokens, y.shape[1])
        combined_x = None
        if shape[0] * shape[1] * y.element_size() >= _SMALL_RESULT_BYTES:
            combined_x = self._allocate(shape, y.dtype)
        if combined_x is None:
            combined_x = torch.empty(shape, dtype=y.dtype, device="cpu")
        weights = None
        if spec.weights is not None:
            columns = spec.weights.shape[1] if plan.layout == "rank" else plan.num_slots
            weights = torch.empty((shape[0], columns), dtype=spec.weights.dtype, device="cpu")
        return Flight(Combined(combined_x, weights), state=(spec, background, previous))

    def combine_send(self, flight: Flight) -> None:
        spec, background, previous = flight.state
        out: Combined = flight.result
        y, plan, weights = spec.y, spec.plan, spec.weights
        row_bytes = y.shape[1] * y.element_size()
        flight.event = self._engine.combine(
            plan=plan.packed.data_ptr(),
            recv_src_idx=address(plan.recv_src_idx),
            y=y.data_ptr(),
            y_rows=plan.num_rows,
            y_stride_bytes=y.stride(0) * y.element_size() if plan.num_rows > 1 else row_bytes,
            row_bytes=row_bytes,
            hidden=y.shape[1],
            dtype=ROW_TYPES[y.dtype],
            weights=address(weights),
            weight_bytes=4 if weights is None else weights.element_size(),
            num_weights=0 if weights is None else weights.shape[1] if weights.dim() == 2 else 1,
            num_bias=len(spec.bias),
            bias0=spec.bias[0].data_ptr() if spec.bias else 0,
            bias1=spec.bias[1].data_ptr() if len(spec.bias) > 1 else 0,
            reduce_per_rank=spec.reduce_per_rank,
            out=out.combined_x.data_ptr(),
            out_weights=address(out.combined_topk_weights),
            carries=CARRIED[spec.carries],
            max_threads=spec.max_threads,
            background=background,
            previous=self._core_events("combine", previous),
            around=None if flight.span is None else flight.span.around,
        )
        if background:
            self._keep(flight)

    def combine_recv(self, flight: Flight) -> Combined:
        # Publishing, pulling and releasing are one piece in the core, run by `combine_send`.
        result: Combined = flight.result
        return result

    def abort(self, flight: Flight) -> None:
        self._engine.abandon(flight=flight.state[0])

    def barrier(self, *, host: bool = True) -> None:  # noqa: ARG002
        self._engine.barrier()
        self._forget_complete()

    def fail(self, op: str, message: str) -> None:
        self._engine.fail(op=_OPS[op], text=message[:500])

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        tensor = self._allocate(tuple(shape), dtype)
        return torch.empty(tuple(shape), dtype=dtype, device="cpu") if tensor is None else tensor

    def statistics(self) -> Statistics:
        counters: dict[str, Any] = self._engine.statistics()
        return Statistics(**counters)

    def poisoned(self) -> bool:
        return self._engine.poisoned()

    def set_phase_hook(self, hook: Any) -> None:
        """For tests: ``hook(phase)`` is called in every phase of every operation, in the thread that runs it."""
        self._engine.set_phase_hook(hook)

    def close(self) -> None:
        if self._engine.close(grace_seconds=_CLOSE_GRACE_SECONDS):
            self._in_flight.clear()

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        if 0 in shape:
            return None
        stored, code, bits = _as_stored(shape, dtype)
        capsule = self._engine.allocate(shape=stored, code=code, bits=bits)
        if capsule is None:
            self._notices.ordinary_memory(self.statistics().held_bytes)
            return None
        tensor = from_dlpack(capsule)
        return tensor if dtype in _DLPACK else tensor.view(dtype)

    def _note_growth(self) -> None:
        statistics = self.statistics()
        self._num_segments = statistics.segments
        self._notices.growth(statistics.segments, statistics.heap_bytes)

    def _core_events(self, op: str, previous: Sequence[CompletionEvent]) -> Sequence[_C.Event]:
        """The core waits for its own events in the right thread; foreign ones are waited for here."""
        found = []
        for event in previous:
            if isinstance(event, _C.Event):
                found.append(event)
                continue
            try:
                event.wait()
            except Exception as e:
                self.fail(op, f"previous_event failed: {e}")
                raise
        return found

    def _keep(self, flight: Flight) -> None:
        self._forget_complete()
        if flight.event is not None:
            self._in_flight.append((flight.event, flight))

    def _forget_complete(self) -> None:
        while self._in_flight and self._in_flight[0][0].done():
            self._in_flight.popleft()


def _take(take: Any, shape: tuple[int, int], dtype: torch.dtype, in_heap: bool) -> torch.Tensor:
    if not in_heap or shape[1] == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    stored, code, bits = _as_stored(shape, dtype)
    tensor = from_dlpack(take(shape=stored, code=code, bits=bits))
    return tensor if dtype in _DLPACK else tensor.view(dtype)


def _as_stored(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], int, int]:
    """Shape, DLPack code and bits under which torch takes the tensor over; unknown types as bytes."""
    if dtype in _DLPACK:
        return (shape, *_DLPACK[dtype])
    return (*shape[:-1], shape[-1] * dtype.itemsize), 1, 8


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
