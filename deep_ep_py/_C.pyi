"""The core. Private: addresses are those of CPU memory that outlives the call, or the event of a background call."""

from collections.abc import Callable, Sequence
from typing import Any

has_shm: bool

def simd() -> str: ...
def dispatch_layout(
    *,
    topk_idx: int,
    num_tokens: int,
    num_topk: int,
    num_ranks: int,
    num_experts: int,
    expert_rank: int,
    expert_local: int,
    tokens_per_rank: int,
    tokens_per_expert: int,
    is_token_in_rank: int,
) -> str: ...

plan_header_words: int
plan_magic: int

def read_plan(
    plan: int, words: int, /
) -> tuple[int, int, int, int, int, int, int, int, int, int, int, int, int, int, int]: ...
def copy_expert_counts(plan: int, out: int, /) -> None: ...
def heads_of_plan(*, plan: int, send_head: int) -> None: ...
def plan_from_heads(
    *, send_head: int, prefix: int, rank: int, num_ranks: int, num_tokens: int, num_output_rows: int, plan: int
) -> None: ...
def sent_minus_received(*, plan: int, recv_src_idx: int) -> int: ...
def hash_routing(*, topk_idx: int, num_tokens: int, num_topk: int) -> int: ...
def plan_digest(
    *, layout: int, num_experts: int, placement_hash: int, alignment: int, routings: Sequence[int]
) -> int: ...
def prefix_digest(*, prefix: int, num_ranks: int) -> int: ...

dispatch_agrees_on: tuple[str, ...]
combine_agrees_on: tuple[str, ...]
carried: tuple[str, ...]
same_arguments: str
same_order: str

def probe_copy(*, to: int, from_: int, bytes: int, stream: bool) -> None: ...
def probe_read(*, from_: int, bytes: int) -> int: ...
def route(
    *,
    layout: int,
    topk_idx: int,
    is_token_in_rank: int,
    columns: int,
    num_tokens: int,
    num_slots: int,
    num_ranks: int,
    num_experts: int,
    expert_rank: int,
    expert_local: int,
    first_of_rank: int,
    first_of_expert: int,
    targets: int,
) -> str: ...
def homeward(
    *,
    layout: int,
    targets: int,
    num_tokens: int,
    num_slots: int,
    domain_of: int,
    num_ranks: int,
    num_domains: int,
    per_row: bool,
    home: int,
    tokens: int,
    capacity: int,
    counts: int,
) -> bool: ...

class Event:
    def wait(self) -> None: ...
    def done(self) -> bool: ...

class DispatchFlight:
    @property
    def seq(self) -> int: ...
    @property
    def digest(self) -> int: ...
    @property
    def num_recv_tokens(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_output_rows(self) -> int: ...
    @property
    def num_max_tokens_per_rank(self) -> int: ...
    @property
    def staged(self) -> bool: ...
    def take_x(self, *, shape: Sequence[int], code: int, bits: int) -> Any: ...
    def take_sf(self, *, shape: Sequence[int], code: int, bits: int) -> Any: ...

class CombineFlight: ...

class Engine:
    def __init__(
        self,
        *,
        epoch: int,
        rank: int,
        num_ranks: int,
        timeout_seconds: float,
        spin_microseconds: float,
        max_heap_bytes: int,
        heap_bytes: int,
        num_threads: int,
        names: Sequence[int] = ...,
        prefault_bytes: int = ...,
    ) -> None: ...
    def endpoint(self) -> tuple[int, int, int]: ...
    def connect(self, endpoints: Sequence[tuple[int, int, int]]) -> None: ...
    def barrier(self) -> None: ...
    def fail(self, *, op: int, text: str) -> None: ...
    def allocate(self, *, shape: Sequence[int], code: int, bits: int) -> Any | None: ...
    def close(self, *, grace_seconds: float) -> bool: ...
    def abandon(self, *, flight: DispatchFlight) -> None: ...
    def statistics(self) -> dict[str, Any]: ...
    def poisoned(self) -> bool: ...
    @property
    def num_segments(self) -> int: ...
    def set_phase_hook(self, hook: Callable[[str], object] | None) -> None: ...
    def dispatch_begin(
        self,
        *,
        layout: int,
        cached: bool,
        num_tokens: int,
        num_topk: int,
        topk_idx: int,
        topk_weights: int,
        has_topk: bool,
        weight_bytes: int,
        is_token_in_rank: int,
        num_tokens_per_rank: int,
        num_tokens_per_expert: int,
        num_experts: int,
        num_local: int,
        expert_rank: int,
        expert_local: int,
        placement_hash: int,
        plan: int,
        recv_src_idx: int,
        x: int,
        x_stride_bytes: int,
        row_bytes: int,
        hidden: int,
        dtype: int,
        sf: int,
        sf_bytes: int,
        sf_dtype: int,
        carries: int,
        expert_alignment: int,
        zero_padding: bool,
        mask_weights: bool,
        describe_rows: bool,
        num_worst_tokens: int,
        num_max_tokens_per_rank: int,
        max_threads: int,
        background: bool,
        previous: Sequence[Event],
    ) -> DispatchFlight: ...
    def dispatch_move(
        self,
        *,
        flight: DispatchFlight,
        recv_x: int,
        recv_sf: int,
        recv_sf_leading: int,
        recv_topk_idx: int,
        recv_topk_weights: int,
        recv_meta: int,
        around: Callable[[Callable[[], None]], object] | None,
    ) -> Event | None: ...
    def combine(
        self,
        *,
        plan: int,
        recv_src_idx: int,
        y: int,
        y_rows: int,
        y_stride_bytes: int,
        row_bytes: int,
        hidden: int,
        dtype: int,
        weights: int,
        weight_bytes: int,
        num_weights: int,
        num_bias: int,
        bias0: int,
        bias1: int,
        reduce_per_rank: bool,
        out: int,
        out_weights: int,
        carries: int,
        max_threads: int,
        background: bool,
        previous: Sequence[Event],
        around: Callable[[Callable[[], None]], object] | None,
    ) -> Event | None: ...
    def gather(self, *, own: int, bytes: int, all: int) -> None: ...
    def hop_begin(
        self,
        *,
        plan: int,
        cached: bool,
        num_topk: int,
        has_topk: bool,
        weight_bytes: int,
        local_of: int,
        num_experts: int,
        expert_rank: int,
        expert_local: int,
        tokens_to: int,
        rows_to: int,
        row_bytes: int,
        hidden: int,
        dtype: int,
        sf_bytes: int,
        zero_padding: bool,
        mask_weights: bool,
        describe_rows: bool,
        num_worst_tokens: int,
        max_threads: int,
        previous: Sequence[Event],
    ) -> DispatchFlight: ...
    def hop_place(
        self,
        *,
        flight: DispatchFlight,
        targets: int,
        num_tokens: int,
        num_slots: int,
        rows: bool,
        x: int,
        x_stride_bytes: int,
        sf: int,
        sf_stride_bytes: int,
        small: bool,
        tokens: int,
        topk_idx: int,
        topk_weights: int,
        first_token: int,
    ) -> None: ...
    def hop_finish(
        self,
        *,
        flight: DispatchFlight,
        recv_x: int,
        recv_sf: int,
        recv_sf_leading: int,
        recv_topk_idx: int,
        recv_topk_weights: int,
        recv_meta: int,
    ) -> None: ...
    def pull_begin(
        self,
        *,
        plan: int,
        local_of: int,
        y: int,
        y_rows: int,
        y_stride_bytes: int,
        row_bytes: int,
        hidden: int,
        dtype: int,
        weights: int,
        weight_bytes: int,
        num_weights: int,
        reduce_per_rank: bool,
        max_threads: int,
        previous: Sequence[Event],
    ) -> CombineFlight: ...
    def pull(
        self,
        *,
        flight: CombineFlight,
        layout: int,
        targets: int,
        num_tokens: int,
        num_slots: int,
        reduce_per_rank: bool,
        verbatim: bool,
        out: int,
        out_weights: int,
    ) -> None: ...
    def pull_end(self, *, flight: CombineFlight) -> None: ...
    def reduce(
        self,
        *,
        layout: int,
        targets: int,
        num_tokens: int,
        num_slots: int,
        out: int,
        out_weights: int,
        biases: Sequence[int],
        rows: Sequence[int],
        weights: Sequence[int],
        limit: Sequence[int],
        hidden: int,
        row_bytes: int,
        dtype: int,
        weight_bytes: int,
        num_weights: int,
        max_threads: int,
    ) -> None: ...
    def poison(self, *, text: str, timeout: bool, ranks: Sequence[int], seconds: float) -> None: ...

class CudaLibrary:
    def __init__(self, path: str) -> None: ...
    def unavailable_because(self, device: int) -> str: ...
    def device_name(self, device: int) -> str: ...
    def num_sms(self, device: int) -> int: ...
    def cast(
        self,
        *,
        stream: int,
        device: int,
        x: int,
        x_stride_bytes: int,
        num_rows: int,
        hidden: int,
        channels: int,
        dtype: int,
        round_scale: bool,
        out: int,
        scales: int,
    ) -> None: ...
    def open(
        self,
        *,
        epoch: int,
        rank: int,
        num_ranks: int,
        device: int,
        timeout_seconds: float,
        heap_bytes: int,
        num_sms: int,
    ) -> CudaEngine: ...

class CudaFlight:
    @property
    def num_recv_tokens(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_max_tokens_per_rank(self) -> int: ...
    @property
    def digest(self) -> int: ...
    @property
    def expert_counts(self) -> list[int]: ...

class CudaEngine:
    def endpoint(self) -> str: ...
    def connect(self, endpoints: Sequence[str]) -> None: ...
    def enter_heap(self) -> None: ...
    def leave_heap(self) -> None: ...
    def in_heap(self, *, data: int, bytes: int) -> bool: ...
    def barrier(self, *, stream: int, host: bool) -> None: ...
    def fail(self, *, stream: int, op: int, text: str) -> None: ...
    def check(self) -> None: ...
    def poison(self, text: str) -> None: ...
    def statistics(self) -> dict[str, int]: ...
    def close(self) -> None: ...
    # fmt: off
    def dispatch_begin(
        self, *, stream: int, layout: int, cached: bool, host_counts: bool, num_tokens: int, num_topk: int,
        num_experts: int, num_local: int, num_slots: int, topk_idx: int, topk_weights: int, has_topk: bool,
        weight_bytes: int, is_token_in_rank: int, num_tokens_per_rank: int, num_tokens_per_expert: int,
        expert_rank: int, expert_local: int, placement_hash: int, sorted_experts: int, rank_begin: int, plan: int,
        x: int, x_stride_bytes: int, row_bytes: int, hidden: int, dtype: int, sf: int, sf_bytes: int, sf_dtype: int,
        carries: int, expert_alignment: int, zero_padding: bool, mask_weights: bool, describe_sources: bool,
        col_major_sf: bool, num_worst_tokens: int, num_max_tokens_per_rank: int, num_output_rows: int, num_sms: int,
        allocate_workspace: Callable[[int], int], outputs: Sequence[int] | None,
    ) -> CudaFlight: ...
    # fmt: on
    def dispatch_move(self, *, flight: CudaFlight, outputs: Sequence[int], failed: str | None) -> None: ...
    # fmt: off
    def combine(
        self, *, stream: int, plan: int, layout: int, num_slots: int, num_local: int, num_tokens: int, y: int,
        y_rows: int, row_bytes: int, hidden: int, dtype: int, weights: int, weight_bytes: int, num_weights: int,
        num_bias: int, bias0: int, bias1: int, reduce_per_rank: bool, out: int, out_weights: int, carries: int,
        num_sms: int,
    ) -> None: ...
    # fmt: on
