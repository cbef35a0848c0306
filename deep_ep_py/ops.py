"""The operators ``torch.ops.deep_ep_py.*``: plan, dispatch, combine, plan_dispatch, finish; see `autograd.py`.

Arguments and results are tensors and numbers. A routing is a packed plan (`plans.py`), a buffer is its number
(`registry.py`), an operation that was only started is its ticket (`tickets.py`). T tokens, K slots, H hidden; ``rows``
are those that dispatch delivers. Weights are [T, K] at the token and [rows, K] (expanded: [rows]) where they arrive.

dispatch and combine are each other's transpose: a row that dispatch copies to several places is summed over them, and
weights that dispatch masks to their owner are read back from it. So each is the other's backward pass, along the same
plan, and a started dispatch is undone by a started combine, which begins where the dispatch was waited for.

A backward pass keeps its plan in an attribute, not among the saved tensors: those a checkpointed region recomputes, and
for the plan of a combine it would have to run the combine again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import validate
from .errors import EPArgumentError
from .event import behind, on_stream, stream_of
from .operators import Operator
from .plans import Plan, plan_words
from .profiling import span
from .registry import buffer_of
from .traced import is_traced
from .types import DispatchSpec

_WEIGHT_DTYPES = (torch.float32, torch.float64)
_GRADIENTS = "gradients of rows"  # what the rows of an exchange in a backward pass are; see DispatchSpec.carries
Gradients = Sequence[torch.Tensor | None]


class _Shape(NamedTuple):
    """What a backward pass needs beside the plan; saved as a plain tuple, which is made faster."""

    buffer: int
    num_tokens: int
    hidden: int
    dtype: torch.dtype
    num_rows: int
    num_topk: int
    weight_dtype: torch.dtype | None
    expand: bool
    background: bool

    def at_rows(self, gradients: Gradients, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients of what dispatch delivers; zeros for what nobody used, since every rank sends the same kinds."""
        return self._complete(gradients, like, self.num_rows, (self.num_rows,) if self.expand else None)

    def at_tokens(self, gradients: Gradients, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients of what combine delivers."""
        return self._complete(gradients, like, self.num_tokens, None)

    def _complete(
        self, gradients: Gradients, like: torch.Tensor, rows: int, weights: tuple[int, ...] | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = gradients[0]
        if x is None:
            x = like.new_zeros((rows, self.hidden), dtype=self.dtype)
        if self.weight_dtype is None:
            return x, None
        w = gradients[1]
        return x, like.new_zeros(weights or (rows, self.num_topk), dtype=self.weight_dtype) if w is None else w


# plan ---------------------------------------------------------------------------------------------------------------


def _routing(
    face: Any, rows: torch.Tensor, weights: Any, topk_idx: Any, num_experts: int, alignment: int, limit: int | None,
    expand: bool, sync: bool, placement: str,
) -> DispatchSpec:  # fmt: skip
    spec: DispatchSpec = face._requests.routing(
        rows, topk_idx, weights, _WEIGHT_DTYPES, num_experts, limit, alignment, sync, expand, placement
    )
    spec.mask_weights, spec.zero_padding, spec.describe_rows, spec.describe_sources = not expand, expand, expand, False
    return spec


def _plan(
    topk_idx: torch.Tensor, buffer: int, num_experts: int, alignment: int, limit: int | None, expand: bool, sync: bool,
    placement: str,
) -> Sequence[torch.Tensor]:  # fmt: skip
    face = buffer_of(buffer)
    with face._engine.refusing("dispatch"):
        device = face._engine.device
        rows = validate.tensor("topk_idx", topk_idx, device, torch.int64, (None, None))[:, :0]  # a plan moves no bytes
        spec = _routing(face, rows, None, topk_idx, num_experts, alignment, limit, expand, sync, placement)
    got, _ = face._engine.dispatch(spec, background=False, previous=())
    return [got.plan.remember(), got.recv_topk_idx, got.plan.copy_expert_counts()]


def _plan_fake(
    topk_idx: torch.Tensor, buffer: int, num_experts: int, alignment: int, limit: int | None, expand: bool, sync: bool,
    placement: str,
) -> Sequence[torch.Tensor]:  # fmt: skip
    requests = buffer_of(buffer)._requests
    num_tokens, num_topk = topk_idx.shape
    num_local = requests.num_local_experts(num_experts, placement)
    if sync:
        num_rows: Any = torch.library.get_ctx().new_dynamic_size()
    else:
        num_rows = requests.worst_rows(num_experts, num_topk, alignment, limit, expand=expand, placement=placement)
    words: Any = plan_words(num_tokens, num_topk, requests.num_ranks, num_local)
    if requests.takes_two_hops:
        words = torch.library.get_ctx().new_dynamic_size()
    return [
        topk_idx.new_empty(words),
        topk_idx.new_empty((num_rows, 1 if expand else num_topk)),
        topk_idx.new_empty(num_local, dtype=torch.int32),
    ]


# dispatch -----------------------------------------------------------------------------------------------------------


def _read(face: Any, packed: torch.Tensor, expand: bool) -> Plan:
    plan: Plan = face._requests.check_plan(Plan.of(face._requests.check_device(packed)))
    if plan.layout != ("expand" if expand else "topk"):
        raise EPArgumentError.of("handle", f"one whose plan is {'expanded' if expand else 'compact'}", plan.layout)
    return plan


def _delivered(
    face: Any, spec: DispatchSpec, background: bool, counted: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a new plan returns (only if ``counted``) and what a dispatch does. Rows past the valid ones, which nobody
    writes, are zeroed: a gradient that sums over rows must find nothing there."""
    got, event = face._engine.dispatch(spec, background=background, previous=())
    plan, found = got.plan, [got.recv_x]
    if got.recv_topk_weights is not None:
        found.append(got.recv_topk_weights)
    if plan.num_rows >= 0:
        if plan.num_output_rows > plan.num_rows:
            for rows in found:
                rows[plan.num_rows :] = 0
        counts = [plan.copy_expert_counts()] if counted else []
    else:  # the device alone knows how many are valid; a background call has it after its last kernel

        def finish_rows() -> list[torch.Tensor]:
            for rows in found:
                _zero_tail(rows, plan.rows_on_device)
            return [plan.copy_expert_counts()] if counted else []

        counts = [*behind(event, face._engine.comm_stream(), finish_rows, uses=(plan.packed, *found))]
    new = [plan.remember(), got.recv_topk_idx, *counts] if counted else []
    return new, [face._flights.start(found, event)] if background else found


def _zero_tail(rows: torch.Tensor, first: torch.Tensor) -> None:
    """From row ``first`` on, a number on the device: no host waits for it."""
    tail = torch.arange(rows.shape[0], device=rows.device) >= first
    rows.masked_fill_(tail.view(-1, *[1] * (rows.dim() - 1)), 0)


def _dispatch(
    x: torch.Tensor, weights: torch.Tensor | None, packed: torch.Tensor, buffer: int, num_rows: int, expand: bool,
    background: bool, carries: str = "rows", copy: bool = False,
) -> Sequence[torch.Tensor]:  # fmt: skip
    face = buffer_of(buffer)
    with face._engine.refusing("dispatch"):
        plan = _read(face, packed, expand)
        rows, _ = validate.tokens(x, face._engine.device)
        if copy:
            rows, weights = rows.clone(), None if weights is None else weights.clone()
        spec = face._requests.dispatch_along(plan, rows, weights, _WEIGHT_DTYPES, fixed=True)
        spec.mask_weights, spec.zero_padding, spec.carries = not expand, expand, carries
    return _delivered(face, spec, background, counted=False)[1]


def _dispatch_fake(
    x: torch.Tensor, weights: torch.Tensor | None, packed: torch.Tensor, buffer: int, num_rows: int, expand: bool,
    background: bool, *_: Any,
) -> Sequence[torch.Tensor]:  # fmt: skip
    if background:
        return [_ticket_fake()]
    found = [x.new_empty((num_rows, x.shape[1]))]
    if weights is not None:
        found.append(weights.new_empty((num_rows,) if expand else (num_rows, weights.shape[1])))
    return found


def _ticket_fake() -> torch.Tensor:
    return torch.empty(1, dtype=torch.float64, device="cpu")


def _save_dispatch(ctx: Any, inputs: Any, output: Any) -> None:
    x, weights, packed, buffer, num_rows, expand, background, *_ = inputs
    _save_tokens(ctx, packed, x, weights, buffer, num_rows, expand, background)


def _save_tokens(
    ctx: Any, packed: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None, buffer: int, num_rows: int,
    expand: bool, background: bool,
) -> None:  # fmt: skip
    ctx.packed, ctx.stream = packed, stream_of(packed) if background else None
    columns, dtype = (0, None) if weights is None else (weights.shape[1], weights.dtype)
    ctx.shape = (buffer, *x.shape, x.dtype, num_rows, columns, dtype, expand, background)


def _undo_dispatch(ctx: Any, gradients: Gradients) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of x and of the weights."""
    packed, s = ctx.packed, _Shape(*ctx.shape)
    if s.background:
        with on_stream(ctx.stream):
            found = finish(
                gradients[0], packed, None, None, None, None, s.buffer, False, s.expand, s.num_tokens, s.num_rows,
                s.hidden, s.dtype, s.num_topk, s.weight_dtype,
            )  # fmt: skip
    else:
        x, weights = s.at_rows(gradients, packed)
        found = combine(x, weights, packed, None, None, s.buffer, s.num_tokens, s.num_topk, s.expand, False, _GRADIENTS)
    return found[0], None if s.weight_dtype is None else found[1]


# plan and dispatch in one rendezvous --------------------------------------------------------------------------------


def _plan_dispatch(
    x: torch.Tensor, weights: torch.Tensor | None, topk_idx: torch.Tensor, buffer: int, num_experts: int,
    alignment: int, limit: int | None, expand: bool, sync: bool, background: bool, placement: str,
) -> Sequence[torch.Tensor]:  # fmt: skip
    face = buffer_of(buffer)
    with face._engine.refusing("dispatch"):
        rows, _ = validate.tokens(x, face._engine.device)
        spec = _routing(face, rows, weights, topk_idx, num_experts, alignment, limit, expand, sync, placement)
    new, found = _delivered(face, spec, background, counted=True)
    return [*found, *new]


def _plan_dispatch_fake(
    x: torch.Tensor, weights: torch.Tensor | None, topk_idx: torch.Tensor, buffer: int, num_experts: int,
    alignment: int, limit: int | None, expand: bool, sync: bool, background: bool, placement: str,
) -> Sequence[torch.Tensor]:  # fmt: skip
    plan = _plan_fake(topk_idx, buffer, num_experts, alignment, limit, expand, sync, placement)
    return [*_dispatch_fake(x, weights, plan[0], buffer, plan[1].shape[0], expand, background), *plan]


def _save_plan_dispatch(ctx: Any, inputs: Any, output: Any) -> None:
    x, weights, _, buffer, _, _, _, expand, _, background, *_ = inputs
    _save_tokens(ctx, output[-3], x, weights, buffer, output[-2].shape[0], expand, background)


# combine ------------------------------------------------------------------------------------------------------------


def _combine(
    y: torch.Tensor, weights: torch.Tensor | None, packed: torch.Tensor, bias0: torch.Tensor | None,
    bias1: torch.Tensor | None, buffer: int, num_tokens: int, num_topk: int, expand: bool, background: bool,
    carries: str = "rows", copy: bool = False,
) -> Sequence[torch.Tensor]:  # fmt: skip
    face = buffer_of(buffer)
    with face._engine.refusing("combine"):
        plan = _read(face, packed, expand)
        bias = tuple(b for b in (bias0, bias1) if b is not None) or None
        if copy:
            y, weights = y.clone(), None if weights is None else weights.clone()
        spec = face._requests.combine_along(plan, y, weights, _WEIGHT_DTYPES, bias, face.allow_multiple_reduction)
        spec.carries = carries
    got, event = face._engine.combine(spec, background=background, previous=())
    found = [got.combined_x] if got.combined_topk_weights is None else [got.combined_x, got.combined_topk_weights]
    return [face._flights.start(found, event)] if background else found


def _combine_fake(
    y: torch.Tensor, weights: torch.Tensor | None, packed: torch.Tensor, bias0: torch.Tensor | None,
    bias1: torch.Tensor | None, buffer: int, num_tokens: int, num_topk: int, expand: bool, background: bool, *_: Any,
) -> Sequence[torch.Tensor]:  # fmt: skip
    if background:
        return [_ticket_fake()]
    found = [y.new_empty((num_tokens, y.shape[1]))]
    return found if weights is None else [*found, weights.new_empty((num_tokens, num_topk))]


def _save_combine(ctx: Any, inputs: Any, output: Any) -> None:
    y, weights, packed, bias0, bias1, buffer, num_tokens, num_topk, expand, background, *_ = inputs
    ctx.packed, ctx.stream = packed, stream_of(packed) if background else None
    dtype = None if weights is None else weights.dtype
    num_rows, hidden = y.shape
    ctx.shape = (buffer, num_tokens, hidden, y.dtype, num_rows, num_topk, dtype, expand, background)
    ctx.num_bias = (bias0 is not None) + (bias1 is not None)


def _combine_backward(ctx: Any, gradients: Gradients) -> Gradients:
    packed, s = ctx.packed, _Shape(*ctx.shape)
    bias: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if s.background:  # the gradients of the biases are known, and returned, where the combine was waited for
        with on_stream(ctx.stream):
            found = finish(
                gradients[0], packed, None, None, None, None, s.buffer, True, s.expand, s.num_rows, s.num_tokens,
                s.hidden, s.dtype, s.num_topk, s.weight_dtype,
            )  # fmt: skip
    else:
        x, weights = s.at_tokens(gradients, packed)
        found = dispatch(x, weights, packed, s.buffer, s.num_rows, s.expand, False, _GRADIENTS)
        bias = _bias_gradients(x, ctx.num_bias)
    return found[0], None if s.weight_dtype is None else found[1], None, *bias


def _bias_gradients(x: torch.Tensor, num_bias: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return x if num_bias > 0 else None, x if num_bias > 1 else None


# finish -------------------------------------------------------------------------------------------------------------


def _finish(
    ticket: torch.Tensor, packed: torch.Tensor, bias0: torch.Tensor | None, bias1: torch.Tensor | None,
    x: torch.Tensor | None, weights: torch.Tensor | None, buffer: int, *_: Any,
) -> Sequence[torch.Tensor]:  # fmt: skip
    """``x`` and ``weights``, which the operation reads, are arguments for compilers: that they live until here."""
    with span("finish"):
        found: Sequence[torch.Tensor] = buffer_of(buffer)._flights.finish(ticket)
    return found


def _finish_fake(
    ticket: torch.Tensor, packed: torch.Tensor, bias0: torch.Tensor | None, bias1: torch.Tensor | None,
    x: torch.Tensor | None, weights: torch.Tensor | None, buffer: int, of_dispatch: bool, expand: bool, rows: int,
    rows_before: int, hidden: int, dtype: torch.dtype, num_topk: int, weight_dtype: torch.dtype | None,
) -> Sequence[torch.Tensor]:  # fmt: skip
    found = [packed.new_empty((rows, hidden), dtype=dtype)]
    if weight_dtype is not None:
        shape = (rows,) if of_dispatch and expand else (rows, num_topk)
        found.append(packed.new_empty(shape, dtype=weight_dtype))
    return found


def _save_finish(ctx: Any, inputs: Any, output: Any) -> None:
    _, ctx.packed, bias0, bias1, _, _, buffer, of_dispatch, expand, rows, before, *shape = inputs
    hidden, dtype, *weights = shape[:4]
    num_tokens, num_rows = (before, rows) if of_dispatch else (rows, before)
    ctx.shape = (buffer, num_tokens, hidden, dtype, num_rows, *weights, expand, True)
    ctx.of_dispatch = of_dispatch
    ctx.num_bias = (bias0 is not None) + (bias1 is not None)


def _finish_backward(ctx: Any, gradients: Gradients) -> Gradients:
    packed, s = ctx.packed, _Shape(*ctx.shape)
    bias: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    # A compiler gives the gradients' memory away after their last use, and where this operation is waited for only its
    # ticket is known: so in a traced program it reads copies.
    start = s.expand, True, _GRADIENTS, is_traced(packed)
    if ctx.of_dispatch:
        x, weights = s.at_rows(gradients, packed)
        (ticket,) = combine(x, weights, packed, None, None, s.buffer, s.num_tokens, s.num_topk, *start)
    else:
        x, weights = s.at_tokens(gradients, packed)
        (ticket,) = dispatch(x, weights, packed, s.buffer, s.num_rows, *start)
        bias = _bias_gradients(x, ctx.num_bias)
    return ticket, None, *bias


_FLAGS = 'str carries="rows", bool copy=False'  # copy: a started operation reads copies of its inputs

plan = Operator(
    "plan",
    "Tensor topk_idx, int buffer, int num_experts, int alignment, int? limit, bool expand, bool sync, str placement",
    _plan,
    _plan_fake,
)
dispatch = Operator(
    "dispatch",
    f"Tensor x, Tensor? weights, Tensor packed, int buffer, SymInt num_rows, bool expand, bool background, {_FLAGS}",
    _dispatch,
    _dispatch_fake,
    _save_dispatch,
    _undo_dispatch,
)
plan_dispatch = Operator(
    "plan_dispatch",
    "Tensor x, Tensor? weights, Tensor topk_idx, int buffer, int num_experts, int alignment, int? limit, bool expand, "
    "bool sync, bool background, str placement",
    _plan_dispatch,
    _plan_dispatch_fake,
    _save_plan_dispatch,
    _undo_dispatch,
)
combine = Operator(
    "combine",
    "Tensor y, Tensor? weights, Tensor packed, Tensor? bias0, Tensor? bias1, int buffer, SymInt num_tokens, "
    f"SymInt num_topk, bool expand, bool background, {_FLAGS}",
    _combine,
    _combine_fake,
    _save_combine,
    _combine_backward,
)
finish = Operator(
    "finish",
    "Tensor ticket, Tensor packed, Tensor? bias0, Tensor? bias1, Tensor? x, Tensor? weights, int buffer, "
    "bool of_dispatch, bool expand, SymInt rows, SymInt rows_before, SymInt hidden, ScalarType dtype, SymInt num_topk, "
    "ScalarType? weight_dtype",
    _finish,
    _finish_fake,
    _save_finish,
    _finish_backward,
)
