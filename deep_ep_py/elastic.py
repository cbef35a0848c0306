"""V2's face: :class:`ElasticBuffer`."""

from __future__ import annotations

from typing import Any

import torch

from . import validate
from ._groups import group_of
from .choice import sizes
from .config import Config
from .engine import Engine
from .event import CompletionEvent, EventHandle, EventOverlap, behind, completions
from .face import Face
from .handle import EPHandle
from .plans import Plan
from .registry import register
from .requests import Requests, Rows
from .settings import Settings
from .sizes import elastic_heap_bytes
from .tickets import Flights
from .traced import untraced

PreviousEvent = EventHandle | EventOverlap | None


@untraced
class ElasticBuffer(Face):
    """Expert-parallel dispatch and combine with DeepEP's V2 interface.

    Args:
        group: torch process group (any backend) or its name, a DeviceMesh of one dimension (``mesh["ep"]``), an mpi4py
            communicator, or a deep_ep_py communicator.
        num_bytes: heap to reserve, in bytes (memory is used where rows come to lie); None: from the three sizes below.
            It grows where that proves too small.
        num_max_tokens_per_rank, hidden, num_topk: M, H and K of the largest call: its heap is ready at construction; M
            also is the default of dispatch's argument.
        use_fp8_dispatch: rows are fp8 with scale factors.
        allow_hybrid_mode: across domains, cross once for each domain and spread inside; else straight to each rank.
        allow_multiple_reduction: expanded combine may sum and round the slots of one rank first.
        prefer_overlap_with_compute: asynchronous calls leave a core to the computation; they always do here.
        num_cpu_timeout_secs: deadline of every wait, in seconds; None: ``Settings.timeout_seconds``, which is 300
            unless the environment or ``settings`` says otherwise.
        backend: ``"auto"``, or a backend's exact name; default: ``DEEP_EP_PY_BACKEND``.
        settings: instead of those of the environment.
        num_cpu_bytes, deterministic (results always are), sl_idx, num_allocated_qps, num_gpu_timeout_secs,
            explicitly_destroy: accepted; they mean nothing here.

    ``number`` is the buffer's number in this process, by which operators are told it.

    ``device`` is where every tensor of a call must be, and where results are.

    Construction is collective over the group. Results belong to the caller and outlive the buffer.

    Raises:
        EPArgumentError, EPMismatchError, EPTimeoutError, EPBackendUnavailableError: see :class:`.engine.Engine`.
    """

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: float | None = None,
        num_gpu_timeout_secs: float = 100,
        explicitly_destroy: bool = False,
        *,
        backend: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        communicator = self._communicator(group)
        refused: Exception | None = None
        chosen = settings or Settings()
        sizes = {"num_max_tokens_per_rank": 0, "hidden": 0, "num_topk": 0}
        heap_bytes, named_bytes, timeout = 0, 0, float(chosen.timeout_seconds)
        try:
            chosen = Settings.of(settings, backend=backend)
            given = {"num_max_tokens_per_rank": num_max_tokens_per_rank, "hidden": hidden, "num_topk": num_topk}
            sizes = {name: validate.whole(name, value, 0) for name, value in given.items()}
            most, width, slots = sizes.values()
            named_bytes = elastic_heap_bytes(communicator.size, most, width, slots, bool(use_fp8_dispatch))
            heap_bytes = named_bytes
            if num_bytes is not None:
                heap_bytes = validate.whole("num_bytes", num_bytes, 0, high=2**62)
            timeout = chosen.timeout_seconds
            if num_cpu_timeout_secs is not None:
                timeout = validate.seconds("num_cpu_timeout_secs", num_cpu_timeout_secs)
        except Exception as e:  # whatever it is: the peers must hear of it
            refused = e
        self.rank_idx, self.num_ranks = communicator.rank, communicator.size
        self.num_bytes = heap_bytes
        self.num_max_tokens_per_rank = sizes["num_max_tokens_per_rank"]
        self.num_allocated_qps = num_allocated_qps
        self.deterministic = bool(deterministic)
        self.allow_hybrid_mode = bool(allow_hybrid_mode)
        self.allow_multiple_reduction = bool(allow_multiple_reduction)
        self.explicitly_destroy = bool(explicitly_destroy)
        self._engine = Engine(
            communicator,
            chosen,
            face="ElasticBuffer",
            agree={
                **sizes,
                "num_bytes": heap_bytes,
                "use_fp8_dispatch": bool(use_fp8_dispatch),
                "allow_hybrid_mode": self.allow_hybrid_mode,
                "allow_multiple_reduction": self.allow_multiple_reduction,
            },
            heap_bytes=heap_bytes,
            prefault_bytes=min(heap_bytes, named_bytes),
            timeout_seconds=timeout,
            allow_hybrid_mode=self.allow_hybrid_mode,
            refused=refused,
        )
        self.device = self._engine.device
        domains = self._engine.info.logical_domains
        self.scaleout_rank_idx = next(i for i, ranks in enumerate(domains) if self.rank_idx in ranks)
        self.scaleup_rank_idx = domains[self.scaleout_rank_idx].index(self.rank_idx)
        self.num_scaleout_ranks = self.num_rdma_ranks = len(domains)
        self.num_scaleup_ranks = self.num_nvlink_ranks = len(domains[0])
        self._requests = Requests(
            communicator.rank,
            communicator.size,
            self.num_max_tokens_per_rank,
            self._engine.info.num_hops,
            self.device,
        )
        self._flights = Flights()
        self.number = register(self)

    @staticmethod
    def get_buffer_size_hint(
        group: Any,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes of heap with which calls of up to this size never grow it; pass it as ``num_bytes``."""
        group, _ = group_of(group)
        size = group.size() if callable(getattr(group, "size", None)) else group.size
        return elastic_heap_bytes(size, num_max_tokens_per_rank, hidden, num_topk, bool(use_fp8_dispatch))

    @staticmethod
    def capture() -> EventHandle:
        """The present point in the caller's order of operations: in a program that uses CUDA, of the current stream; on
        a CPU it has passed already."""
        return EventHandle()

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        """Return when every rank has called it. On a GPU it is the stream that waits, and the host only with
        ``with_cpu_sync``; on a CPU the host always does. The other arguments are accepted."""
        self._engine.barrier(host=bool(with_cpu_sync))

    def get_physical_domain_size(self) -> tuple[int, int]:
        """(scale-out ranks, scale-up ranks), by host or ``Settings.domain``."""
        return sizes(self._engine.info.domains)

    def get_logical_domain_size(self) -> tuple[int, int]:
        """(scale-out ranks, scale-up ranks) as dispatch and combine use them."""
        return self.num_scaleout_ranks, self.num_scaleup_ranks

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int, *args: Any, **kwargs: Any) -> int:
        """What to pass as ``num_sms``: the copy threads that this rank uses at most; on a GPU V1's default, for
        any shape. Further arguments are accepted."""
        if self.device.type != "cpu":
            return Config().num_sms
        return max(self._engine.settings.num_threads, 2)

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Queue pairs: none on shared memory; 1, so that programs may divide by it."""
        return 1

    def dispatch(
        self,
        x: Rows,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: PreviousEvent = None,
        previous_event_before_epilogue: PreviousEvent = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Rows, torch.Tensor | None, torch.Tensor | None, EPHandle, EventOverlap]:
        """Send every token to the ranks that own its experts.

        Args:
            x: [T, H] of any dtype, or ([T, H] fp8, [T, S] scale factors of 4 bytes, any strides). All tensors of a
                call are on the buffer's device, and so are the results.
            topk_idx: [T, K] int64, -1 for no expert. topk_weights: [T, K] float32 or None.
            cumulative_local_expert_recv_stats: [E_local] int32, to which the received slots of each local expert are
                added; not on cached calls.
            num_experts: E, over all ranks. num_max_tokens_per_rank: M, at least T, equal on all ranks; default: the
                constructor's.
            expert_alignment: expert blocks start at multiples of it, reported counts are rounded up to it; default
                1, at most 65536.
            num_sms: upper bound of copy threads, on a GPU of multiprocessors; 0: the default.
            handle: of an earlier dispatch, whose routing is repeated; the same ``do_expand``. ``topk_idx`` beside it
                must be the handle's (on a GPU its numbers are not compared, for which the host would have to wait).
            do_handle_copy: the handle keeps a copy of ``topk_idx``, not the caller's tensor.
            do_cpu_sync: exact output sizes; else the worst case, valid rows first. Default: unless a handle is given.
                On a GPU the host waits only for exact sizes; a call without can be captured in a CUDA graph.
            do_expand: one row per token and slot, sorted by local expert, source rank, source token and slot.
            do_zero_padding: expanded: alignment gaps are zeroed.
            use_tma_aligned_col_major_sf: scale factors come back column-major, leading dimension padded to 16 bytes.
            previous_event, previous_event_before_epilogue: waited for before anything is published.
            async_with_compute_stream: return before rows have arrived; wait for the event.
            allocate_on_comm_stream: on a GPU, received tensors are memory of the communication stream; that stream
                waits for the caller's in any case.
            num_qps: accepted.

        Returns:
            recv_x [N, H] (or the pair), compact rows sorted by source rank and token; recv_topk_idx [N, K] int64 local
            expert ids, -1 elsewhere (None where expanded); recv_topk_weights [N, K] float32, all K weights of the
            source ([rows] where expanded), None if none were given; handle; event.

        Raises:
            EPArgumentError, EPMismatchError: on every rank, nothing has moved, the buffer stays usable.
            EPTimeoutError, EPPeerError: the buffer is poisoned.
        """
        with self._engine.refusing("dispatch"):
            stats = cumulative_local_expert_recv_stats
            if handle is None:
                sync = do_cpu_sync is None or bool(do_cpu_sync)
                spec = self._requests.dispatch(
                    x, topk_idx, topk_weights, stats, num_experts, num_max_tokens_per_rank, expert_alignment, num_sms,
                    sync, bool(do_expand),
                )  # fmt: skip
                spec.zero_padding = bool(do_zero_padding) and bool(do_expand)
            else:
                agree = {
                    "num_experts": num_experts,
                    "num_max_tokens_per_rank": num_max_tokens_per_rank,
                    "expert_alignment": expert_alignment,
                }
                spec = self._requests.cached_dispatch(
                    x, topk_idx, topk_weights, handle, agree, num_sms, bool(do_expand)
                )
                spec.zero_padding = bool(do_zero_padding) and handle.do_expand
            spec.col_major_sf = bool(use_tma_aligned_col_major_sf)
            previous = self._completions(previous_event, previous_event_before_epilogue)
        got, event = self._engine.dispatch(
            spec,
            background=bool(async_with_compute_stream),
            previous=previous,
            on_comm_stream=bool(allocate_on_comm_stream),
        )
        recv_x: Any = got.recv_x if got.recv_sf is None else (got.recv_x, got.recv_sf)
        if handle is not None:
            return recv_x, handle._recv_topk_idx, got.recv_topk_weights, handle, event
        assert topk_idx is not None
        assert got.recv_meta is not None
        assert spec.placement is not None
        plan = got.plan
        if stats is not None:
            self._count(stats, plan, event)
        new_handle = EPHandle(
            plan=plan,
            num_experts=spec.placement.num_experts,
            num_sms=num_sms,
            topk_idx=topk_idx.clone() if do_handle_copy else topk_idx,
            recv_src_metadata=got.recv_meta,
            recv_topk_idx=got.recv_topk_idx,
            has_host_counts=sync,
            domains=self._engine.info.logical_domains,
            expert_counts=got.num_recv_tokens_per_expert,
            num_expanded_tokens=None
            if sync
            else self._requests.worst_rows(
                spec.placement.num_experts,
                topk_idx.shape[1],
                plan.expert_alignment,
                plan.num_max_tokens_per_rank,
                expand=True,
            ),
        )
        return recv_x, got.recv_topk_idx, got.recv_topk_weights, new_handle, event

    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: PreviousEvent = None,
        previous_event_before_epilogue: PreviousEvent = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Bring rows back to their tokens and sum them, in slot order; no weights are applied.

        Args:
            x: [rows, H] bf16, fp16, fp32 or fp64, as many rows as dispatch delivered. A tensor of :meth:`empty`, or the
                received one changed in place, is read where it lies; others are copied once.
            handle: of the dispatch.
            topk_weights: [rows, K] float32 ([rows] where expanded) to bring back beside the rows.
            bias: None, [T, H], or a pair; added first.
            num_sms: upper bound of copy threads, on a GPU of multiprocessors; 0: the handle's.

        Returns:
            combined_x [T, H] of x's dtype; combined_topk_weights [T, K] float32, per slot what its owner returned (0
            for -1), or None; event.

        Raises:
            EPArgumentError, EPMismatchError: on every rank, nothing has moved, the buffer stays usable.
            EPTimeoutError, EPPeerError: the buffer is poisoned.
        """
        with self._engine.refusing("combine"):
            spec = self._requests.combine(x, handle, topk_weights, bias, num_sms, self.allow_multiple_reduction)
            previous = self._completions(previous_event, previous_event_before_epilogue)
        got, event = self._engine.combine(
            spec,
            background=bool(async_with_compute_stream),
            previous=previous,
            on_comm_stream=bool(allocate_on_comm_stream),
        )
        return got.combined_x, got.combined_topk_weights, event

    def _completions(self, *previous: PreviousEvent) -> list[CompletionEvent]:
        return completions(*previous, streams=self.device.type != "cpu")

    def _count(self, stats: torch.Tensor, plan: Plan, event: EventOverlap) -> None:
        """Add what was received to ``stats``; the plan may still be written by a background call."""

        def count() -> list[torch.Tensor]:
            stats.add_(plan.expert_counts)
            return []

        if plan.num_rows >= 0:
            count()
        else:
            behind(event, self._engine.comm_stream(), count, uses=(stats, plan.packed))
