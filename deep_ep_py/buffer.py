"""V1's face: :class:`Buffer`, normal mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from . import validate
from .config import Config, cuda_kernels_built
from .engine import Engine
from .errors import EPArgumentError
from .event import EventHandle, EventOverlap, behind, completions
from .face import Face
from .handle import pack_v1, pack_v1_internode
from .layout import align, dispatch_layout, layout_on_device
from .plans import Plan
from .profiling import span
from .requests import RequestsV1, Rows
from .settings import Settings
from .traced import untraced


@untraced
class Buffer(Face):
    """Expert-parallel dispatch and combine with DeepEP's V1 interface.

    Args:
        group: torch process group (any backend) or its name, a DeviceMesh of one dimension (``mesh["ep"]``), an mpi4py
            communicator, or a deep_ep_py communicator.
        num_nvl_bytes: heap to reserve, in bytes: memory is used where rows come to lie, not before. It grows where that
            proves too small. ``Settings.heap_bytes`` has it ready at construction.
        num_rdma_bytes: kept for programs written for DeepEP; nothing is allocated for it.
        low_latency_mode: accepted, so that buffers which also serve low latency elsewhere work in normal mode here.
        comm: mpi4py communicator, where ``group`` is None.
        backend: ``"auto"``, or a backend's exact name; default: ``DEEP_EP_PY_BACKEND``.
        settings: instead of those of the environment.
        num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, explicitly_destroy, enable_shrink, use_fabric,
            num_nvl_peers: accepted; they mean nothing here.

    ``device`` is where every tensor of a call must be, and where results are.

    Construction is collective over the group. Results belong to the caller and outlive the buffer.

    Raises:
        EPArgumentError, EPMismatchError, EPTimeoutError, EPBackendUnavailableError: see :class:`.engine.Engine`.
    """

    num_sms: ClassVar[int] = 20

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        use_fabric: bool = False,
        num_nvl_peers: int = 0,
        *,
        backend: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        communicator = self._communicator(group, comm)
        self.rank = communicator.rank
        self.group_size = communicator.size
        self.num_nvl_bytes = self.num_rdma_bytes = 0
        self.low_latency_mode = bool(low_latency_mode)
        self.explicitly_destroy = bool(explicitly_destroy)
        refused: Exception | None = None
        chosen = settings or Settings()
        try:
            chosen = Settings.of(settings, backend=backend)
            self.num_nvl_bytes = validate.whole("num_nvl_bytes", num_nvl_bytes, 0, high=2**62)
            self.num_rdma_bytes = validate.whole("num_rdma_bytes", num_rdma_bytes, 0, high=2**62)
        except Exception as e:  # whatever it is: the peers must hear of it
            refused = e
        self._engine = Engine(
            communicator,
            chosen,
            face="Buffer",
            agree={"num_nvl_bytes": self.num_nvl_bytes, "low_latency_mode": self.low_latency_mode},
            heap_bytes=self.num_nvl_bytes,
            timeout_seconds=chosen.timeout_seconds,
            refused=refused,
        )
        self.device = self._engine.device
        info = self._engine.info
        self._requests = RequestsV1(
            self.rank, self.group_size, None if info.num_hops == 1 else info.domains, self.device
        )

    @classmethod
    def set_num_sms(cls, new_num_sms: int) -> None:
        """Set the default of ``config.num_sms`` for all buffers, an even number: at most so many copy threads, on a GPU
        multiprocessors.

        Raises:
            EPArgumentError: odd or negative.
        """
        if validate.whole("new_num_sms", new_num_sms, 0) % 2:
            raise EPArgumentError.of("new_num_sms", "an even number", new_num_sms)
        Buffer.num_sms = int(new_num_sms)

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether CUDA kernels are in this build; those for Hopper are among them."""
        return cuda_kernels_built()

    @staticmethod
    def capture() -> EventOverlap:
        """The present point in the caller's order of operations: in a program that uses CUDA, of the current stream; on
        a CPU it has passed already."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """A configuration for any number of ranks."""
        validate.whole("num_ranks", num_ranks, 1)
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """A configuration for any number of ranks."""
        return Buffer.get_dispatch_config(num_ranks)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes that low latency would need: two buffers of every rank's tokens for every local expert, in bf16."""
        tokens = validate.whole("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, 0)
        width = validate.whole("hidden", hidden, 0) * 2 + 16
        experts = validate.whole("num_experts", num_experts, 1)
        validate.whole("num_ranks", num_ranks, 1)
        return -(-2 * experts * tokens * width // 128) * 128 + 128

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: Sequence[int] | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> torch.Tensor:
        """A tensor in this rank's heap, from which combine needs no copy.

        Args:
            dtype: of the tensor. size: its shape; default: ``num_nvl_bytes`` (or ``num_rdma_bytes``) worth of elements
            after ``offset`` bytes. use_rdma_buffer: which of the two.
        """
        total = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        shape = ((total - offset) // dtype.itemsize,) if size is None else tuple(size)
        return self._engine.empty(shape, dtype)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing to clean: normal and low latency mode share no memory."""

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | EventHandle | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Count where tokens go; local, no communication. On a GPU the host waits for nothing.

        Args:
            topk_idx: [T, K] int64 on the buffer's device, -1 for no expert. num_experts: E, over all ranks.

        Returns:
            num_tokens_per_rank [R] int32, num_tokens_per_rdma_rank [D] int32 (None where rows take one hop),
            num_tokens_per_expert [E] int32 (slots), is_token_in_rank [T, R] bool, event (complete).

        Raises:
            EPArgumentError: wrong dtype, shape or device; on a CPU also an expert id outside [-1, E). On a GPU such an
                id counts as none here, and is refused by the dispatch that is given it.
        """
        with span("get_dispatch_layout"):
            device, placements = self.device, self._requests.placements
            for event in completions(previous_event, streams=self.device.type != "cpu"):
                event.wait()
            topk_idx = validate.tensor("topk_idx", topk_idx, device, torch.int64, (None, None))
            num_experts = validate.whole("num_experts", num_experts, 1)
            if topk_idx.is_cpu:
                found = dispatch_layout(topk_idx, placements.of(num_experts), self.group_size)
            else:
                found = layout_on_device(topk_idx, placements.ranks_on(device, num_experts), self.group_size)
            per_rank, per_expert, in_rank = found
            per_domain = self._requests.tokens_per_domain(in_rank)
            return per_rank, per_domain, per_expert, in_rank, EventOverlap(EventHandle() if async_finish else None)

    def dispatch(
        self,
        x: Rows,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | EventHandle | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Rows, torch.Tensor | None, torch.Tensor | None, list[int] | None, tuple[Any, ...] | None, EventOverlap]:
        """Send every token to the ranks that own its experts.

        Args:
            x: [T, H] of any dtype, or ([T, H] fp8, [T, S] scale factors of 4 bytes). All tensors of a call are on the
                buffer's device, and so are the results.
            handle: of an earlier dispatch, whose routing is repeated (then no layout and no top-k).
            num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert: from
                :meth:`get_dispatch_layout`; the second may be left out, and is checked where rows take two hops.
            topk_idx: [T, K] int64, topk_weights: [T, K] float32; both or neither.
            expert_alignment: counts per expert are rounded up to a multiple of it; at most 65536.
            num_worst_tokens: rows of all outputs, fixed in advance; tail rows have ``recv_topk_idx`` -1.
            config: ``num_sms`` bounds the copy threads, on a GPU the multiprocessors.
            previous_event: waited for before anything is published. async_finish: return before rows have arrived; wait
                for the event. allocate_on_comm_stream: on a GPU, received tensors are memory of the communication
                stream; that stream waits for the caller's in any case.

        On a GPU the host waits for the counts, unless there is a handle or ``num_worst_tokens``: such calls can be
        captured in a CUDA graph.

        Returns:
            recv_x [N, H] (or the pair with [N, S] row-major), sorted by source rank and token; recv_topk_idx [N, K]
            int64 local expert ids, -1 elsewhere; recv_topk_weights [N, K] float32, 0 where the id is -1;
            num_recv_tokens_per_expert_list; handle; event. With a handle the four in the middle are None.

        Raises:
            EPArgumentError, EPMismatchError: on every rank, nothing has moved, the buffer stays usable.
            EPTimeoutError, EPPeerError: the buffer is poisoned.
        """
        engine = self._engine
        with engine.refusing("dispatch"):
            num_sms = self._num_sms(config)
            if handle is not None:
                spec = self._requests.cached_dispatch(x, topk_idx, topk_weights, handle, num_sms)
            else:
                spec = self._requests.dispatch(
                    x, num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert, topk_idx,
                    topk_weights, expert_alignment, num_worst_tokens, num_sms,
                )  # fmt: skip
            previous = completions(previous_event, streams=self.device.type != "cpu")
        got, event = engine.dispatch(
            spec,
            background=bool(async_finish),
            previous=previous,
            on_comm_stream=bool(allocate_on_comm_stream),
        )
        recv_x: Any = got.recv_x if got.recv_sf is None else (got.recv_x, got.recv_sf)
        if handle is not None:
            return recv_x, None, None, None, None, event
        assert spec.is_token_in_rank is not None
        assert got.recv_meta is not None
        counts = got.num_recv_tokens_per_expert
        if num_worst_tokens:
            counts = []
        elif counts is None:
            counts = got.plan.expert_counts.tolist()
        if expert_alignment > 1:
            counts = [align(n, expert_alignment) for n in counts]
        new_handle = self._pack(got.plan, got.recv_meta, spec.is_token_in_rank, event)
        return recv_x, got.recv_topk_idx, got.recv_topk_weights, counts, new_handle, event

    def combine(
        self,
        x: torch.Tensor,
        handle: tuple[Any, ...],
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | EventHandle | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Bring rows back to their tokens and sum them, in rank order; no weights are applied.

        Args:
            x: [N, H] bf16, fp16, fp32 or fp64, as many rows as dispatch delivered. A tensor of :meth:`empty`, or the
                received one changed in place, is read where it lies; others are copied once.
            handle: of the dispatch. topk_weights: [N, K] float32, summed like the rows, unmasked.
            bias: None, [T, H], or a pair; added first.

        Returns:
            combined_x [T, H] of x's dtype; combined_topk_weights [T, K] float32 or None; event.

        Raises:
            EPArgumentError, EPMismatchError: on every rank, nothing has moved, the buffer stays usable.
            EPTimeoutError, EPPeerError: the buffer is poisoned.
        """
        with self._engine.refusing("combine"):
            spec = self._requests.combine(x, handle, topk_weights, bias, self._num_sms(config))
            previous = completions(previous_event, streams=self.device.type != "cpu")
        got, event = self._engine.combine(
            spec,
            background=bool(async_finish),
            previous=previous,
            on_comm_stream=bool(allocate_on_comm_stream),
        )
        return got.combined_x, got.combined_topk_weights, event

    def _pack(
        self, plan: Plan, recv_src_idx: torch.Tensor, in_rank: torch.Tensor, event: EventOverlap
    ) -> tuple[Any, ...]:
        """The handle, which is read from a plan that a background call may still be writing."""
        domains = self._engine.info.logical_domains

        def pack() -> tuple[Any, ...]:
            if plan.num_domains:
                return pack_v1_internode(plan, recv_src_idx, in_rank, domains)
            return pack_v1(plan, recv_src_idx, in_rank)

        if plan.num_rows >= 0:
            return pack()
        return tuple(behind(event, self._engine.comm_stream(), pack, uses=(plan.packed, in_rank)))

    def _num_sms(self, config: Config | None) -> int:
        return config.num_sms if config is not None else self.num_sms
