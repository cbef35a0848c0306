"""V2 on one rank against the oracle. Each check builds its own ElasticBuffer on ``group``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deep_ep_py import reference

from .cases import Case, computed_once, domain_size, make_inputs, make_rows, make_weights, settings_for
from .compare import assert_same_bits
from .conformance_v1 import payload, rank_of, size_of
from .devices import carried

INT_FIELDS = ("num_recv_tokens", "num_expanded_tokens", "num_recv_tokens_per_expert_list")
TENSOR_FIELDS = (
    "psum_num_recv_tokens_per_expert",
    "num_unaligned_recv_tokens_per_expert",
    "dst_buffer_slot_idx",
)


@dataclass(frozen=True)
class Mode:
    """How V2 is called. ``multiple``: allow_multiple_reduction, which only expanded combines can tell."""

    expand: bool = False
    sync: bool = True
    multiple: bool = True

    @property
    def id(self) -> str:
        words = ["expand" if self.expand else "compact", "sync" if self.sync else "nosync"]
        return "-".join(words + ([] if self.multiple else ["single"]))


MODES = (
    Mode(),
    Mode(sync=False),
    Mode(expand=True),
    Mode(expand=True, multiple=False),
    Mode(expand=True, sync=False),
)


def fits(case: Case, mode: Mode) -> bool:
    """Whether the documented worst case holds every row: it counts min(K, E_local) slots per token and rank, and a
    token that repeats experts can have more."""
    few = case.routing != "duplicates" or case.num_topk <= case.num_experts // case.num_ranks
    return few or mode.sync or not mode.expand


@contextmanager
def open_buffer(group: Any, backend: str, *, multiple: bool = True, **options: Any) -> Iterator[Any]:
    """An ElasticBuffer, destroyed at the end."""
    from deep_ep_py.elastic import ElasticBuffer

    options.setdefault("settings", settings_for(backend, rank_of(group), size_of(group)))
    buffer = ElasticBuffer(
        group, allow_multiple_reduction=multiple, backend=backend, num_cpu_timeout_secs=30, **options
    )
    try:
        yield carried(buffer)
    finally:
        buffer.destroy()


@computed_once(maxsize=2)
def expected_dispatch(case: Case, mode: Mode, with_weights: bool = True) -> list[reference.V2Received]:
    """What the oracle delivers to every rank."""
    inputs = make_inputs(case)
    return reference.v2_dispatch(
        [i.x for i in inputs],
        [i.topk_idx for i in inputs],
        num_experts=case.num_experts,
        num_max_tokens_per_rank=case.num_max_tokens_per_rank,
        topk_weights=[i.topk_weights for i in inputs] if with_weights else None,
        sf=[i.sf for i in inputs if i.sf is not None] or None,
        expert_alignment=case.expert_alignment,
        do_expand=mode.expand,
        do_cpu_sync=mode.sync,
    )


@computed_once(maxsize=16)
def combine_inputs(case: Case, mode: Mode, rank: int, salt: int = 0) -> tuple[Tensor, Tensor]:
    """``(y, topk_weights)`` that ``rank`` hands to combine: undefined rows hold NaN, which must not show. Cached: do
    not write to them."""
    valid = expected_dispatch(case, mode)[rank].row_valid
    shape = (len(valid),) if mode.expand else (len(valid), case.num_topk)
    y, weights = make_rows(case, rank, len(valid), salt=salt), make_weights(case, rank, shape, salt=salt)
    if not valid.all():
        y[~valid] = torch.nan
        weights[~valid] = torch.nan
    return y, weights


@computed_once(maxsize=6)
def expected_combine(
    case: Case, mode: Mode, num_bias: int, salt: int = 0, num_scaleup_ranks: int = 0
) -> list[tuple[Tensor, Tensor | None]]:
    """What the oracle combines from :func:`combine_inputs` of every rank."""
    inputs = make_inputs(case)
    rows = [combine_inputs(case, mode, r, salt) for r in range(case.num_ranks)]
    return reference.v2_combine(
        [y for y, _ in rows],
        [i.topk_idx for i in inputs],
        num_experts=case.num_experts,
        expert_alignment=case.expert_alignment,
        do_expand=mode.expand,
        allow_multiple_reduction=mode.multiple,
        topk_weights=[w for _, w in rows],
        bias=[i.bias[:num_bias] for i in inputs],
        num_scaleup_ranks=num_scaleup_ranks,
    )


def dispatch(buffer: Any, case: Case, mode: Mode, rank: int, *, with_weights: bool = True, **options: Any) -> Any:
    """One uncached dispatch of the case's inputs."""
    mine = make_inputs(case)[rank]
    arguments = {
        "topk_idx": mine.topk_idx,
        "topk_weights": mine.topk_weights if with_weights else None,
        "num_experts": case.num_experts,
        "num_max_tokens_per_rank": case.num_max_tokens_per_rank,
        "expert_alignment": case.expert_alignment,
        "do_expand": mode.expand,
        "do_cpu_sync": mode.sync,
        **options,
    }
    result = buffer.dispatch(payload(case, rank), **arguments)
    assert len(result) == 5
    return result


def check_rows(actual: Tensor | None, expected: Tensor | None, valid: Tensor, what: str) -> None:
    """Shape and dtype of everything, bits of the valid rows."""
    if actual is None or expected is None:
        assert actual is expected, f"{what}: one of actual and expected is None"
        return
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)}, expected {list(expected.shape)}"
    at = valid.nonzero().reshape(-1)
    assert_same_bits(reference.take(actual, at), reference.take(expected, at), what)


def check_recv_x(recv_x: Any, expected: reference.V2Received) -> None:
    """x and sf, the valid rows."""
    if expected.recv_sf is not None:
        recv_x, sf = recv_x
        check_rows(sf, expected.recv_sf, expected.row_valid, "recv_sf")
    check_rows(recv_x, expected.recv_x, expected.row_valid, "recv_x")


def check_dispatched(result: Any, expected: reference.V2Received, case: Case, mode: Mode, rank: int) -> None:
    """Every result of an uncached dispatch, and every field of its handle."""
    recv_x, recv_topk_idx, recv_topk_weights, handle, _ = result
    check_recv_x(recv_x, expected)
    check_rows(recv_topk_idx, expected.recv_topk_idx, expected.row_valid, "recv_topk_idx")
    check_rows(recv_topk_weights, expected.recv_topk_weights, expected.row_valid, "recv_topk_weights")
    assert bool(handle.do_expand) == mode.expand
    assert handle.num_experts == case.num_experts
    assert handle.expert_alignment == case.expert_alignment
    assert handle.num_max_tokens_per_rank == case.num_max_tokens_per_rank
    assert_same_bits(handle.topk_idx, make_inputs(case)[rank].topk_idx, "handle.topk_idx")
    for name in INT_FIELDS:
        assert getattr(handle, name) == getattr(expected, name), f"handle.{name}"
    for name in TENSOR_FIELDS:
        assert_same_bits(getattr(handle, name), getattr(expected, name), f"handle.{name}")
    ends = handle.psum_num_recv_tokens_per_scaleup_rank.cpu()
    by_source = expected.psum_num_recv_tokens_per_scaleup_rank.diff(prepend=ends.new_zeros(1))
    wanted = by_source.view(-1, len(ends)).sum(0).cumsum(0).int()  # over several domains by the rail that brings them
    assert_same_bits(ends, wanted, "handle.psum_num_recv_tokens_per_scaleup_rank")
    metadata, wanted = handle.recv_src_metadata.cpu(), expected.recv_src_metadata
    assert metadata.shape[0] == (len(wanted) if mode.sync else case.num_ranks * case.num_max_tokens_per_rank)
    metadata = metadata[: len(wanted)]
    assert_same_bits(metadata[:, 0], wanted[:, 0], "handle.recv_src_metadata[:, 0]")
    assert_same_bits(metadata[:, 2:], wanted[:, 2:], "handle.recv_src_metadata[:, 2:]")


def check_combine(
    buffer: Any,
    case: Case,
    mode: Mode,
    rank: int,
    handle: Any,
    num_bias: int,
    *,
    salt: int = 0,
    with_weights: bool = True,
) -> None:
    """One combine with ``num_bias`` biases."""
    y, weights = combine_inputs(case, mode, rank, salt)
    mine = make_inputs(case)[rank]
    bias = (None, mine.bias[0], mine.bias)[num_bias]
    # The oracle first: it reads the same tensors, and must do so before the library can have touched them.
    expected_out, expected_weights = expected_combine(case, mode, num_bias, salt, domain_size(buffer))[rank]
    out, out_weights, event = buffer.combine(y, handle, topk_weights=weights if with_weights else None, bias=bias)
    assert_same_bits(out, expected_out, f"combined_x with {num_bias} biases")
    assert_same_bits(out_weights, expected_weights if with_weights else None, "combined_topk_weights")
    assert event.event is None, "a synchronous call has no event"


def check_round_trip(group: Any, case: Case, mode: Mode, backend: str, num_biases: tuple[int, ...] = (0, 1, 2)) -> None:
    """Dispatch, combine with each number of biases, cached dispatches with and without weights, combine again."""
    rank = rank_of(group)
    with open_buffer(group, backend, multiple=mode.multiple) as buffer:
        expected = expected_dispatch(case, mode)[rank]
        result = dispatch(buffer, case, mode, rank)
        check_dispatched(result, expected, case, mode, rank)
        assert result[-1].event is None, "a synchronous call has no event"
        handle = result[3]
        for num_bias in num_biases:
            check_combine(buffer, case, mode, rank, handle, num_bias)
        check_combine(buffer, case, mode, rank, handle, num_biases[0], with_weights=False)
        for with_weights in (False, True):
            check_cached(buffer, case, mode, rank, result, with_weights)
        check_combine(buffer, case, mode, rank, handle, num_biases[0], salt=1)


def check_cached(buffer: Any, case: Case, mode: Mode, rank: int, first: Any, with_weights: bool) -> None:
    """A dispatch along the handle of ``first``: the same rows, the same handle object, the cached indices."""
    _, recv_topk_idx, _, handle, _ = first
    weights = make_inputs(case)[rank].topk_weights if with_weights else None
    expected = expected_dispatch(case, mode)[rank]
    cached = buffer.dispatch(payload(case, rank), handle=handle, do_expand=mode.expand, topk_weights=weights)
    check_recv_x(cached[0], expected)
    assert cached[3] is handle
    if mode.expand:
        assert cached[1] is None
    else:
        check_rows(cached[1], recv_topk_idx, expected.row_valid, "the cached recv_topk_idx")
    wanted = expected.recv_topk_weights if with_weights else None
    check_rows(cached[2], wanted, expected.row_valid, "the cached dispatch's weights")


def check_batch(group: Any, cases: tuple[tuple[Case, Mode], ...], backend: str) -> int:
    """Round trips of several cases, one world: what a test of processes runs. Returns how many it did."""
    for case, mode in cases:
        _check_named(group, case, mode, backend)
    return len(cases)


def _check_named(group: Any, case: Case, mode: Mode, backend: str) -> None:
    try:
        check_round_trip(group, case, mode, backend)
    except Exception as e:
        raise AssertionError(f"{case.id}-{mode.id}: {type(e).__name__}: {e}") from e
