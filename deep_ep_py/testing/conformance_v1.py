"""V1 on one rank against the oracle. Each check builds its own Buffer on ``group`` (a ProcessGroup or Communicator)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deep_ep_py import reference

from .cases import Case, computed_once, domain_size, make_inputs, make_rows, make_weights, settings_for
from .compare import assert_same_bits
from .devices import carried


@contextmanager
def open_buffer(group: Any, backend: str) -> Iterator[Any]:
    """A V1 Buffer, destroyed at the end."""
    from deep_ep_py.buffer import Buffer

    settings = settings_for(backend, rank_of(group), size_of(group))
    buffer = Buffer(group, backend=backend, settings=settings)
    try:
        yield carried(buffer)
    finally:
        buffer.destroy()


def rank_of(group: Any) -> int:
    """The calling rank: a method of ProcessGroups, an attribute of communicators."""
    return int(group.rank() if callable(group.rank) else group.rank)


def size_of(group: Any) -> int:
    """The number of ranks, likewise."""
    return int(group.size() if callable(group.size) else group.size)


@computed_once(maxsize=4)
def layouts(case: Case) -> tuple[reference.V1Layout, ...]:
    """The oracle's layout of every rank."""
    return tuple(reference.v1_layout(i.topk_idx, case.num_experts, case.num_ranks) for i in make_inputs(case))


@computed_once(maxsize=2)
def expected_dispatch(case: Case, with_topk: bool = True, num_worst_tokens: int = 0) -> list[reference.V1Received]:
    """What the oracle delivers to every rank."""
    inputs, layout = make_inputs(case), layouts(case)
    return reference.v1_dispatch(
        [i.x for i in inputs],
        [one.is_token_in_rank for one in layout],
        [one.num_tokens_per_expert for one in layout],
        sf=[i.sf for i in inputs if i.sf is not None] or None,
        topk_idx=[i.topk_idx for i in inputs] if with_topk else None,
        topk_weights=[i.topk_weights for i in inputs] if with_topk else None,
        expert_alignment=case.expert_alignment,
        num_worst_tokens=num_worst_tokens,
    )


@computed_once(maxsize=6)
def expected_combine(
    case: Case, num_bias: int, salt: int = 0, num_scaleup_ranks: int = 0
) -> list[tuple[Tensor, Tensor | None]]:
    """What the oracle combines from :func:`rows_of` and :func:`weights_of` of every rank."""
    received = expected_dispatch(case)
    ranks = range(case.num_ranks)
    return reference.v1_combine(
        [rows_of(case, r, received[r].num_recv, salt) for r in ranks],
        [one.is_token_in_rank for one in layouts(case)],
        topk_weights=[weights_of(case, r, received[r].num_recv, salt) for r in ranks],
        bias=[i.bias[:num_bias] for i in make_inputs(case)],
        num_scaleup_ranks=num_scaleup_ranks,
    )


@computed_once(maxsize=16)
def rows_of(case: Case, rank: int, num_rows: int, salt: int = 0) -> Tensor:
    """What ``rank`` hands to combine. Cached: do not write to it."""
    return make_rows(case, rank, num_rows, salt=salt)


@computed_once(maxsize=16)
def weights_of(case: Case, rank: int, num_rows: int, salt: int = 0) -> Tensor:
    """Its weights, likewise."""
    return make_weights(case, rank, (num_rows, case.num_topk), salt=salt)


def payload(case: Case, rank: int) -> Any:
    """x, or ``(x, sf)``, as dispatch takes it."""
    mine = make_inputs(case)[rank]
    return mine.x if mine.sf is None else (mine.x, mine.sf)


def layout_arguments(layout: Any) -> dict[str, Any]:
    """What dispatch wants from ``get_dispatch_layout``'s result."""
    names = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank")
    return dict(zip(names, layout, strict=False))


def dispatch(buffer: Any, case: Case, rank: int, *, with_topk: bool = True, **options: Any) -> tuple[Any, ...]:
    """One uncached dispatch of the case's inputs, through ``get_dispatch_layout``."""
    mine = make_inputs(case)[rank]
    layout = layout_arguments(buffer.get_dispatch_layout(mine.topk_idx, case.num_experts))
    topk = {"topk_idx": mine.topk_idx, "topk_weights": mine.topk_weights} if with_topk else {}
    result = buffer.dispatch(payload(case, rank), **layout, **topk, expert_alignment=case.expert_alignment, **options)
    assert len(result) == 6
    return tuple(result)


def check_layout(buffer: Any, case: Case, rank: int) -> None:
    expected = layouts(case)[rank]
    result = buffer.get_dispatch_layout(make_inputs(case)[rank].topk_idx, case.num_experts)
    per_rank, per_rdma_rank, per_expert, in_rank, event = result
    assert_same_bits(per_rank, expected.num_tokens_per_rank, "num_tokens_per_rank")
    size = domain_size(buffer)
    if not size:
        assert per_rdma_rank is None
    else:
        to_domain = expected.is_token_in_rank.view(-1, case.num_ranks // size, size).any(2)
        assert_same_bits(per_rdma_rank, to_domain.sum(0).int(), "num_tokens_per_rdma_rank")
    assert_same_bits(per_expert, expected.num_tokens_per_expert, "num_tokens_per_expert")
    assert_same_bits(in_rank, expected.is_token_in_rank, "is_token_in_rank")
    assert event.event is None, "a synchronous call has no event"


def check_recv_x(recv_x: Any, expected: reference.V1Received) -> None:
    """x and sf, the valid rows."""
    if expected.recv_sf is not None:
        recv_x, sf = recv_x
        assert sf.is_contiguous()
        assert sf.shape == expected.recv_sf.shape
        assert_same_bits(sf[: expected.num_recv], expected.recv_sf[: expected.num_recv], "recv_sf")
    assert recv_x.shape == expected.recv_x.shape, f"recv_x: {recv_x.shape}, expected {expected.recv_x.shape}"
    assert_same_bits(recv_x[: expected.num_recv], expected.recv_x[: expected.num_recv], "recv_x")


def check_dispatched(result: tuple[Any, ...], expected: reference.V1Received) -> None:
    """Every result of an uncached dispatch, and the comparable parts of its handle."""
    recv_x, recv_topk_idx, recv_topk_weights, counts, handle, _ = result
    check_recv_x(recv_x, expected)
    assert_same_bits(recv_topk_idx, expected.recv_topk_idx, "recv_topk_idx")
    if expected.recv_topk_weights is None:
        assert recv_topk_weights is None
    else:
        assert recv_topk_weights.shape == expected.recv_topk_weights.shape
        valid = slice(expected.num_recv)
        assert_same_bits(recv_topk_weights[valid], expected.recv_topk_weights[valid], "recv_topk_weights")
    assert counts == expected.num_recv_tokens_per_expert_list
    assert all(type(c) is int for c in counts), "the list holds Python ints"
    num_ranks = len(expected.rank_prefix_matrix)
    if len(handle) == 10:
        check_internode_handle(handle, expected)
        return
    rank_prefix, channel_prefix, recv_channel_prefix, recv_src_idx, in_rank, send_head = handle
    assert_same_bits(rank_prefix, expected.rank_prefix_matrix, "handle.rank_prefix_matrix")
    for prefix in (channel_prefix, recv_channel_prefix):
        assert prefix.dim() == 2
        assert len(prefix) == num_ranks
    assert_same_bits(recv_src_idx, expected.recv_src_idx, "handle.recv_src_idx")
    assert_same_bits(in_rank, expected.is_token_in_rank, "handle.is_token_in_rank")
    assert_same_bits(send_head, expected.send_head, "handle.send_head")


def check_internode_handle(handle: tuple[Any, ...], expected: reference.V1Received) -> None:
    """The handle over several domains: what clients read of it, and how its parts hang together."""
    in_rank, to_domain, to_rank, from_domain, from_domain_sum, from_rank, from_rank_sum, src_idx, send_head, _ = handle
    num_ranks, num_domains = len(expected.rank_prefix_matrix), len(to_domain)
    assert_same_bits(in_rank, expected.is_token_in_rank, "handle.is_token_in_rank")
    assert_same_bits(to_rank[:, 0], in_rank.sum(0).int(), "handle.gbl_channel_prefix_matrix")
    assert_same_bits(from_rank[:, 0].cumsum(0).int(), from_rank_sum, "handle.recv_gbl_channel_prefix_matrix")
    assert int(from_rank_sum[-1]) == expected.num_recv
    assert_same_bits(src_idx, expected.recv_src_idx, "handle.recv_src_meta")
    crossing = in_rank.view(-1, num_domains, num_ranks // num_domains).any(2)
    assert_same_bits(to_domain[:, 0], crossing.sum(0).int(), "handle.rdma_channel_prefix_matrix")
    assert_same_bits(from_domain[:, 0].cumsum(0).int(), from_domain_sum, "handle.recv_rdma_rank_prefix_sum")
    heads = torch.where(crossing, crossing.long().cumsum(0) - 1, -1).int()
    assert_same_bits(send_head, heads, "handle.send_rdma_head")


def check_combine(
    buffer: Any, case: Case, rank: int, handle: Any, num_bias: int, salt: int = 0, rows: int = -1
) -> None:
    """One combine with weights and ``num_bias`` biases. ``rows``: of y, where more than the valid ones."""
    valid = expected_dispatch(case)[rank].num_recv
    y, weights = rows_of(case, rank, valid, salt), weights_of(case, rank, valid, salt)
    if rows > valid:  # whatever stands in the undefined tail must not show
        y = torch.cat([y, y.new_full((rows - valid, case.hidden), float("nan"))])
        weights = torch.cat([weights, weights.new_full((rows - valid, case.num_topk), float("nan"))])
    mine = make_inputs(case)[rank]
    bias = (None, mine.bias[0], mine.bias)[num_bias]
    # The oracle first: it reads the same tensors, and must do so before the library can have touched them.
    expected_out, expected_weights = expected_combine(case, num_bias, salt, domain_size(buffer))[rank]
    out, out_weights, event = buffer.combine(y, handle, topk_weights=weights, bias=bias)
    assert_same_bits(out, expected_out, f"combined_x with {num_bias} biases")
    assert_same_bits(out_weights, expected_weights, "combined_topk_weights")
    assert event.event is None, "a synchronous call has no event"


def check_round_trip(group: Any, case: Case, backend: str, num_biases: tuple[int, ...] = (0, 1, 2)) -> None:
    """Layout, dispatch, combine with each number of biases, cached dispatch of other rows, combine again."""
    rank = rank_of(group)
    with open_buffer(group, backend) as buffer:
        check_layout(buffer, case, rank)
        expected = expected_dispatch(case)[rank]
        result = dispatch(buffer, case, rank)
        check_dispatched(result, expected)
        assert result[-1].event is None, "a synchronous call has no event"
        handle = result[4]
        for num_bias in num_biases:
            check_combine(buffer, case, rank, handle, num_bias)
        cached = buffer.dispatch(payload(case, rank), handle=handle)
        check_recv_x(cached[0], expected)
        assert cached[1:5] == (None, None, None, None)
        check_combine(buffer, case, rank, handle, num_biases[0], salt=1)


def check_batch(group: Any, cases: tuple[Case, ...], backend: str) -> int:
    """Round trips of several cases, one world: what a test of processes runs. Returns how many it did."""
    for case in cases:
        _check_named(group, case, backend)
    return len(cases)


def _check_named(group: Any, case: Case, backend: str) -> None:
    try:
        check_round_trip(group, case, backend)
    except Exception as e:
        raise AssertionError(f"{case.id}: {type(e).__name__}: {e}") from e
