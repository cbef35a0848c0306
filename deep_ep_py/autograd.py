"""Differentiable dispatch and combine: plan once, then move rows along the plan, forth and back.

::

    recv_x, recv_topk_weights, handle = plan_and_dispatch(x, topk_idx, topk_weights, buffer, num_experts, expand=True)
    y = experts(recv_x, handle.expert_offsets) * recv_topk_weights[:, None]
    out = combine(y, handle)

The backward pass of a dispatch is a combine and that of a combine is a dispatch along the same plan, so nothing is
routed twice. Every call is collective over the buffer's group, forth and back: all ranks, in one order, also with zero
tokens. Each is an operator of torch (`ops.py`): it works under ``torch.compile(fullgraph=True)`` and in checkpointed
regions; what must not be repeated in a recomputation is ``plan`` (``torch.ops.deep_ep_py.plan.default``).

Shapes: T tokens of this rank, K slots, H hidden, E experts, N received tokens, D expanded rows; ``rows`` is N or D. All
tensors are on the buffer's device.
Errors are those of :class:`.ElasticBuffer`: refused arguments are refused on every rank, and the buffer stays usable.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch

from . import ops
from .elastic import ElasticBuffer
from .errors import EPArgumentError
from .registry import buffer_of
from .types import PlacementName

Bias = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None


class PlanHandle(NamedTuple):
    """A routing, as :func:`plan` returns it: tensors and numbers, and nothing of the buffer but its number.

    Any number may be outstanding and each may be used any number of times, in any order, with its own buffer or with
    another over the same group.

    Attributes:
        packed: int64, 1-D: the plan (docs/architecture.md, "Plans").
        recv_topk_idx: compact: [N, K] int64 local expert ids, -1 elsewhere. Expanded: [D, 1], each row's local expert,
            -1 in alignment gaps. Rows past the valid ones, without host sync, are -1.
        num_recv_tokens_per_expert: [E_local] int32, received slots of each local expert, not aligned.
        buffer: the number of the buffer that planned.
        num_tokens, num_topk: T and K.
        expert_alignment: expanded: blocks start at multiples of it.
        expand: one row per slot rather than one per token.
    """

    packed: torch.Tensor
    recv_topk_idx: torch.Tensor
    num_recv_tokens_per_expert: torch.Tensor
    buffer: int
    num_tokens: int
    num_topk: int
    expert_alignment: int
    expand: bool

    @property
    def num_rows(self) -> int:
        """Rows that dispatch delivers: N; expanded: D, alignment gaps included; without host sync the worst case."""
        return self.recv_topk_idx.shape[0]

    def __repr__(self) -> str:
        layout, local = "expanded" if self.expand else "compact", self.num_recv_tokens_per_expert.shape[0]
        return f"<PlanHandle: {self.num_rows} rows, {local} local experts, {layout}, of buffer {self.buffer}>"

    @property
    def expert_offsets(self) -> torch.Tensor:
        """[E_local] int32: the row at which each local expert's block of expanded rows ends, its gap included: the
        ``offs`` of ``torch._grouped_mm``."""
        n, a = self.num_recv_tokens_per_expert, self.expert_alignment
        aligned = n if a == 1 else (n + (a - 1)) // a * a
        return torch.cumsum(aligned, 0, dtype=torch.int32)


class PendingDispatch(NamedTuple):
    """A dispatch that runs in the background."""

    ticket: torch.Tensor
    arguments: tuple[Any, ...]

    def wait(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What :func:`dispatch` returns. Once; in the backward pass the combine of the gradients begins here."""
        found = ops.finish(self.ticket, *self.arguments)
        return found[0], found[1] if len(found) > 1 else None


class PendingPlanAndDispatch(NamedTuple):
    """A dispatch that runs in the background, of a routing that is new."""

    handle: PlanHandle
    pending: PendingDispatch

    def wait(self) -> tuple[torch.Tensor, torch.Tensor | None, PlanHandle]:
        """What :func:`plan_and_dispatch` returns. Once; before that ``handle.recv_topk_idx`` is not complete."""
        return *self.pending.wait(), self.handle


class PendingCombine(NamedTuple):
    """A combine that runs in the background; ``y`` must not change before it is waited for."""

    ticket: torch.Tensor
    arguments: tuple[Any, ...]

    def wait(self) -> torch.Tensor:
        """What :func:`combine` returns. Once; in the backward pass the dispatch of the gradient begins here."""
        return ops.finish(self.ticket, *self.arguments)[0]


def plan(
    topk_idx: torch.Tensor,
    buffer: ElasticBuffer,
    num_experts: int,
    *,
    expand: bool = False,
    expert_alignment: int = 1,
    num_max_tokens_per_rank: int | None = None,
    do_cpu_sync: bool = True,
    placement: PlacementName = "contiguous",
) -> PlanHandle:
    """Exchange counts and learn where every row goes. No rows move, nothing is differentiable.

    Args:
        topk_idx: [T, K] int64, -1 for no expert.
        buffer: must live until the last operation along the plan, backward passes included.
        num_experts: E, over all ranks.
        expand: one row per token and slot, sorted by local expert, source rank, source token and slot.
        expert_alignment: expanded blocks of experts start at multiples of it, at most 65536; gaps are zero, also in
            gradients.
        num_max_tokens_per_rank: M, at least T, equal on all ranks; default: the buffer's.
        do_cpu_sync: exact numbers of rows; else the worst case for M, valid rows first, zeros behind: sizes are then
            static for compilers. On a GPU the host waits for exact numbers, and only for those.
        placement: which experts a rank owns, equal on all ranks; see :class:`.ExpertPlacement`.

    Raises:
        EPArgumentError, EPMismatchError: on every rank, nothing has moved, the buffer stays usable.
        EPTimeoutError, EPPeerError: the buffer is poisoned.
    """
    found = ops.plan(
        topk_idx,
        _number(buffer),
        num_experts,
        expert_alignment,
        num_max_tokens_per_rank,
        bool(expand),
        bool(do_cpu_sync),
        placement,
    )
    return _handle(found, topk_idx, buffer, expert_alignment, expand)


@overload
def dispatch(
    x: torch.Tensor,
    topk_weights: torch.Tensor | None,
    handle: PlanHandle,
    *,
    buffer: ElasticBuffer | None = ...,
    async_finish: Literal[False] = ...,
) -> tuple[torch.Tensor, torch.Tensor | None]: ...
@overload
def dispatch(
    x: torch.Tensor,
    topk_weights: torch.Tensor | None,
    handle: PlanHandle,
    *,
    buffer: ElasticBuffer | None = ...,
    async_finish: Literal[True],
) -> PendingDispatch: ...
def dispatch(
    x: torch.Tensor,
    topk_weights: torch.Tensor | None,
    handle: PlanHandle,
    *,
    buffer: ElasticBuffer | None = None,
    async_finish: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None] | PendingDispatch:
    """Send every token to the ranks that own its experts. Differentiable in ``x`` and ``topk_weights``.

    Args:
        x: [T, H]; bf16, fp16, float32 or float64 where it needs a gradient, else any dtype.
        topk_weights: [T, K] floats or None; they travel as float32 (float64 as it is).
        handle: from :func:`plan`.
        buffer: another than the one that planned, over the same group.
        async_finish: return what to ``wait()`` for; meanwhile rows travel, forth, and gradients, back.

    Returns:
        recv_x [rows, H]; recv_topk_weights or None: compact [N, K], 0 where ``recv_topk_idx`` is -1; expanded [D].

    Raises: as :func:`plan`; EPMismatchError: ranks use handles of different plans.
    """
    weights = _weights(topk_weights)
    number = _planned("dispatch", handle, buffer)
    found = ops.dispatch(x, weights, handle.packed, number, handle.num_rows, handle.expand, bool(async_finish))
    if async_finish:
        return _pending(found[-1], x, weights, handle, number)
    return found[0], found[1] if weights is not None else None


@overload
def plan_and_dispatch(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None,
    buffer: ElasticBuffer,
    num_experts: int,
    *,
    expand: bool = ...,
    expert_alignment: int = ...,
    num_max_tokens_per_rank: int | None = ...,
    do_cpu_sync: bool = ...,
    placement: PlacementName = ...,
    async_finish: Literal[False] = ...,
) -> tuple[torch.Tensor, torch.Tensor | None, PlanHandle]: ...
@overload
def plan_and_dispatch(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None,
    buffer: ElasticBuffer,
    num_experts: int,
    *,
    expand: bool = ...,
    expert_alignment: int = ...,
    num_max_tokens_per_rank: int | None = ...,
    do_cpu_sync: bool = ...,
    placement: PlacementName = ...,
    async_finish: Literal[True],
) -> PendingPlanAndDispatch: ...
def plan_and_dispatch(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None,
    buffer: ElasticBuffer,
    num_experts: int,
    *,
    expand: bool = False,
    expert_alignment: int = 1,
    num_max_tokens_per_rank: int | None = None,
    do_cpu_sync: bool = True,
    placement: PlacementName = "contiguous",
    async_finish: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, PlanHandle] | PendingPlanAndDispatch:
    """:func:`plan` and :func:`dispatch` in one rendezvous. Differentiable in ``x`` and ``topk_weights``.

    Returns:
        recv_x, recv_topk_weights, handle.
    """
    weights = _weights(topk_weights)
    number = _number(buffer)
    found = ops.plan_dispatch(
        x, weights, topk_idx, number, num_experts, expert_alignment, num_max_tokens_per_rank, bool(expand),
        bool(do_cpu_sync), bool(async_finish), placement,
    )  # fmt: skip
    handle = _handle(found[-3:], topk_idx, buffer, expert_alignment, expand)
    if async_finish:
        return PendingPlanAndDispatch(handle, _pending(found[0], x, weights, handle, number))
    return found[0], found[1] if weights is not None else None, handle


@overload
def combine(
    y: torch.Tensor,
    handle: PlanHandle,
    bias: Bias = ...,
    *,
    buffer: ElasticBuffer | None = ...,
    async_finish: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def combine(
    y: torch.Tensor,
    handle: PlanHandle,
    bias: Bias = ...,
    *,
    buffer: ElasticBuffer | None = ...,
    async_finish: Literal[True],
) -> PendingCombine: ...
def combine(
    y: torch.Tensor,
    handle: PlanHandle,
    bias: Bias = None,
    *,
    buffer: ElasticBuffer | None = None,
    async_finish: bool = False,
) -> torch.Tensor | PendingCombine:
    """Bring rows back to their tokens and sum them, in slot order; no weights are applied. Differentiable in ``y`` and
    the biases.

    Args:
        y: [rows, H] bf16, fp16, float32 or float64. Rows that lie in ``buffer.empty(...)`` are read there.
        handle: of the plan. bias: None, [T, H] of y's dtype, or a pair; added first.
        buffer: another than the one that planned, over the same group.
        async_finish: return what to ``wait()`` for.

    Returns:
        [T, H] of y's dtype; one float32 accumulator per element (float64: float64), rounded once.

    Raises: as :func:`dispatch`.
    """
    number = _planned("combine", handle, buffer)
    pair = tuple(bias) if isinstance(bias, tuple | list) else (bias,)
    if len(pair) > 2:
        with buffer_of(number)._engine.refusing("combine"):
            raise EPArgumentError.of("bias", "None, a tensor or a pair of tensors", f"{len(pair)} tensors")
    bias0, bias1 = (*pair, None, None)[:2]
    if async_finish:
        # The biases' gradient is there when the combine was waited for, so that is where they enter the graph.
        start = [b.detach() if isinstance(b, torch.Tensor) else b for b in (bias0, bias1)]
        (ticket,) = ops.combine(y, None, handle.packed, *start, number, handle.num_tokens, 0, handle.expand, True)
        shape = (handle.num_tokens, handle.num_rows, y.shape[1], y.dtype, 0, None)
        return PendingCombine(ticket, (handle.packed, bias0, bias1, y, None, number, False, handle.expand, *shape))
    found = ops.combine(y, None, handle.packed, bias0, bias1, number, handle.num_tokens, 0, handle.expand, False)
    return found[0]


def _pending(
    ticket: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None, handle: PlanHandle, number: int
) -> PendingDispatch:
    columns, dtype = (0, None) if weights is None else (handle.num_topk, weights.dtype)
    shape = (handle.num_rows, handle.num_tokens, x.shape[1], x.dtype, columns, dtype)
    return PendingDispatch(ticket, (handle.packed, None, None, x, weights, number, True, handle.expand, *shape))


def _weights(topk_weights: torch.Tensor | None) -> torch.Tensor | None:
    """The dtypes that travel; half precisions are exact in float32."""
    if isinstance(topk_weights, torch.Tensor) and topk_weights.dtype in (torch.bfloat16, torch.float16):
        return topk_weights.to(torch.float32)
    return topk_weights


def _handle(found: Any, topk_idx: torch.Tensor, buffer: ElasticBuffer, alignment: int, expand: bool) -> PlanHandle:
    num_tokens, num_topk = topk_idx.shape
    return PlanHandle(found[0], found[1], found[2], buffer.number, num_tokens, num_topk, alignment, bool(expand))


def _number(buffer: Any) -> int:
    if not isinstance(buffer, ElasticBuffer):
        raise EPArgumentError.of("buffer", "an ElasticBuffer", type(buffer).__name__)
    return buffer.number


def _planned(op: str, handle: Any, buffer: ElasticBuffer | None) -> int:
    if isinstance(handle, PlanHandle):
        return handle.buffer if buffer is None else _number(buffer)
    error = EPArgumentError.of("handle", "the PlanHandle of deep_ep_py.plan", type(handle).__name__)
    if not isinstance(buffer, ElasticBuffer):
        raise error  # of no known buffer: there are no peers to tell
    with buffer._engine.refusing(op):
        raise error
