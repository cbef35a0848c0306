"""V2 ``ElasticBuffer`` against the oracle: shapes, routings, dtypes, modes, worlds; everything bit for bit."""

import large_rows as large
import pytest
import torch
from large_rows import LARGE

from deep_ep_py.testing import Case, make_inputs, run_processes, run_threads
from deep_ep_py.testing import conformance_v2 as v2
from deep_ep_py.testing.compare import assert_same_bits
from deep_ep_py.testing.conformance_v1 import rank_of
from deep_ep_py.testing.conformance_v2 import MODES, Mode

#: Run in every mode.
CASES = (
    Case((13,), num_experts=16),
    Case((17, 5), hidden=1, num_topk=1, num_experts=7),
    Case((33, 20), hidden=2880, num_experts=7, expert_alignment=4),
    Case((31, 32, 33, 1), num_topk=40, num_experts=64, expert_alignment=3),
    Case((12, 12, 12, 12), num_topk=2, num_experts=2),  # two of four ranks own no expert
    Case((0, 7)),
    Case((0, 0), expert_alignment=8),
    Case((40, 30, 20), routing="one_expert", expert_alignment=128),
    Case((6, 5), routing="none"),
    Case((25, 26), num_topk=16, num_experts=7, routing="duplicates", expert_alignment=8),
    Case((25, 26), num_topk=3, num_experts=7, routing="duplicates", expert_alignment=8),
    Case((14, 15, 16), hidden=33, dtype=torch.float32, routing="distinct"),
    Case((20, 21), hidden=512, dtype=torch.float8_e4m3fn, sf="i32", num_scales=3, gaps="rows"),
)
#: Run compact and expanded, with counts.
MORE_CASES = (
    Case((9, 0, 21), hidden=7168, num_topk=16, num_experts=32),
    Case((4095, 1), num_experts=256, routing="distinct"),
    Case((25, 26, 27), num_topk=16, num_experts=7, routing="distinct"),
    Case((25, 26, 27, 28), num_topk=16, num_experts=7, routing="duplicates", dtype=torch.float32),
    Case((14, 15, 16), hidden=33, dtype=torch.float16, routing="distinct"),
    Case((14, 15, 16), hidden=33, dtype=torch.float64, routing="distinct"),
    Case((20, 21), hidden=128, dtype=torch.float8_e4m3fn, sf="f32", num_scales=1, expert_alignment=16),
    Case((20, 21), hidden=65, dtype=torch.float8_e5m2),
    Case((20, 21), hidden=3, dtype=torch.uint8),
    Case((20, 21), hidden=5, dtype=torch.int32),
    Case((20, 21), hidden=7, dtype=torch.bool),
    Case((20, 21), hidden=512, dtype=torch.float8_e4m3fn, sf="f32", num_scales=3, gaps="elements"),
    Case((18, 19, 20), hidden=40, gaps="elements"),
    Case((18, 19, 20), hidden=40, dtype=torch.float32, gaps="rows", seed=1),
)
ROUND_TRIPS = tuple((case, mode) for case in CASES for mode in MODES if v2.fits(case, mode))
# What processes add to threads is how memory is shared, waited for and left: every mode on a few cases shows it.
IN_PROCESSES = (
    *((case, MODES[i % len(MODES)]) for i, case in enumerate(c for c in CASES if c.num_ranks == 2)),
    *((CASES[4], mode) for mode in MODES),
    (CASES[3], MODES[4]),
)
COMPACT, EXPAND, SINGLE = MODES[0], MODES[2], MODES[3]


def ids(value):
    return value.id


@pytest.mark.parametrize(("case", "mode"), ROUND_TRIPS, ids=ids)
def test_round_trip(case, mode, backend):
    run_threads(case.num_ranks, v2.check_round_trip, case, mode, backend)


@pytest.mark.parametrize("mode", [COMPACT, EXPAND, SINGLE], ids=ids)
@pytest.mark.parametrize("case", MORE_CASES, ids=ids)
def test_more_round_trips(case, mode, backend):
    run_threads(case.num_ranks, v2.check_round_trip, case, mode, backend)


def large_round_trip(comm, mode, backend):
    rank, (topk_idx, topk_weights) = rank_of(comm), large.routing(LARGE)
    x, y = large.rows(LARGE)
    capacity = LARGE.num_max_tokens_per_rank
    placed = large.placed(LARGE, capacity, mode.expand)[rank]
    with v2.open_buffer(comm, backend, multiple=mode.multiple) as buffer:
        recv_x, _, recv_weights, handle, _ = buffer.dispatch(
            x[rank],
            topk_idx=topk_idx[rank],
            topk_weights=topk_weights[rank],
            num_experts=LARGE.num_experts,
            num_max_tokens_per_rank=capacity,
            do_expand=mode.expand,
        )
        tokens, metadata = placed
        assert_same_bits(recv_x, v2.reference.take(torch.cat(x), tokens), "recv_x")
        if mode.expand:
            assert len(recv_weights) == len(tokens)
        else:
            assert_same_bits(recv_weights, v2.reference.take(torch.cat(topk_weights), tokens), "recv_topk_weights")
        assert_same_bits(handle.recv_src_metadata[:, 0], metadata[:, 0], "handle.recv_src_metadata[:, 0]")
        recv_x.copy_(v2.reference.take(torch.cat(y), tokens) + rank)
        combined_x, _, _ = buffer.combine(recv_x, handle)
        sent_to = large.owners(LARGE)[rank] if mode.expand else large.in_ranks(LARGE)[rank]
        assert_same_bits(combined_x, large.total(y[rank], sent_to), "combined_x")


@pytest.mark.parametrize(("mode", "backend"), [(COMPACT, "shm"), (EXPAND, "shm"), (COMPACT, "collective")])
def test_large_round_trip(mode, backend):
    run_threads(LARGE.num_ranks, large_round_trip, mode, backend)


@pytest.mark.processes
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_round_trips_in_processes(num_ranks, backend):
    cases = tuple((case, mode) for case, mode in IN_PROCESSES if case.num_ranks == num_ranks)
    assert run_processes(num_ranks, v2.check_batch, cases, backend) == [len(cases)] * num_ranks
    assert {mode for _, mode in cases} == set(MODES)


def without_weights(comm, case, mode, backend):
    rank = rank_of(comm)
    with v2.open_buffer(comm, backend) as buffer:
        result = v2.dispatch(buffer, case, mode, rank, with_weights=False)
        v2.check_dispatched(result, v2.expected_dispatch(case, mode, False)[rank], case, mode, rank)
        assert result[2] is None


@pytest.mark.parametrize("mode", [COMPACT, EXPAND], ids=ids)
def test_without_weights(mode, backend):
    run_threads(CASES[2].num_ranks, without_weights, CASES[2], mode, backend)


def zero_padding(comm, case, mode, backend):
    """Gaps of x, sf and weights are zero although the same memory held something else before."""
    rank = rank_of(comm)
    expected = v2.expected_dispatch(case, mode)[rank]
    gaps = ~expected.row_valid
    with v2.open_buffer(comm, backend) as buffer:
        for _ in range(4):
            (x, sf), _, weights, handle, _ = v2.dispatch(buffer, case, mode, rank, do_zero_padding=True)
            rows = handle.num_expanded_tokens if mode.sync else last_row(expected)
            for name, out, want in (
                ("x", x, expected.recv_x),
                ("sf", sf, expected.recv_sf),
                ("weights", weights, expected.recv_topk_weights),
            ):
                assert_same_bits(out[:rows], want[:rows], f"{name} with its gaps")
            for out in (x.view(torch.uint8), sf.view(torch.uint8), weights):
                out.fill_(77)
            del x, sf, weights, out
    return int(gaps.sum())


def last_row(expected):
    """One past the last defined row."""
    return int(expected.row_valid.nonzero().max()) + 1 if expected.row_valid.any() else 0


@pytest.mark.parametrize("mode", [EXPAND, Mode(expand=True, sync=False)], ids=ids)
def test_zero_padding(mode, backend):
    case = Case((20, 21), hidden=128, dtype=torch.float8_e4m3fn, sf="f32", num_scales=1, expert_alignment=16)
    assert min(run_threads(case.num_ranks, zero_padding, case, mode, backend)) > 0, "the case must have gaps"


def cumulative_stats(comm, case, mode, backend):
    rank = rank_of(comm)
    counts = v2.expected_dispatch(case, mode)[rank].num_unaligned_recv_tokens_per_expert
    stats = torch.full_like(counts, 1000)
    with v2.open_buffer(comm, backend) as buffer:
        for times in (1, 2):
            handle = v2.dispatch(buffer, case, mode, rank, cumulative_local_expert_recv_stats=stats)[3]
            assert_same_bits(stats, 1000 + times * counts, f"the statistics after {times} dispatches")
        again = {"handle": handle, "do_expand": mode.expand, "cumulative_local_expert_recv_stats": stats}
        buffer.dispatch(v2.payload(case, rank), **again)
        assert_same_bits(stats, 1000 + 2 * counts, "the statistics after a cached dispatch")


@pytest.mark.parametrize("mode", MODES, ids=ids)
def test_cumulative_stats(mode, backend):
    run_threads(CASES[2].num_ranks, cumulative_stats, CASES[2], mode, backend)


def column_major_sf(comm, case, mode, backend):
    rank = rank_of(comm)
    expected = v2.expected_dispatch(case, mode)[rank]
    with v2.open_buffer(comm, backend) as buffer:
        (x, sf), *_ = v2.dispatch(buffer, case, mode, rank, use_tma_aligned_col_major_sf=True)
        v2.check_recv_x((x, sf), expected)
        assert sf.stride(0) == 1
        assert sf.stride(1) == v2.reference.align(len(sf), 16 // sf.element_size())


@pytest.mark.parametrize("mode", [COMPACT, EXPAND, Mode(sync=False)], ids=ids)
@pytest.mark.parametrize("sf", ["f32", "i32"])
def test_column_major_sf(sf, mode, backend):
    case = Case((21, 22), hidden=128, dtype=torch.float8_e4m3fn, sf=sf, num_scales=5, routing="distinct")
    run_threads(case.num_ranks, column_major_sf, case, mode, backend)


def handle_copy(comm, case, backend):
    """``do_handle_copy``: the handle keeps its own copy of topk_idx, or the caller's tensor."""
    rank = rank_of(comm)
    with v2.open_buffer(comm, backend) as buffer:
        topk_idx = make_inputs(case)[rank].topk_idx.clone()
        own = v2.dispatch(buffer, case, COMPACT, rank, topk_idx=topk_idx, do_handle_copy=True)[3]
        shared = v2.dispatch(buffer, case, COMPACT, rank, topk_idx=topk_idx, do_handle_copy=False)[3]
        assert shared.topk_idx.data_ptr() == topk_idx.data_ptr()
        topk_idx.fill_(-1)
        assert_same_bits(own.topk_idx, make_inputs(case)[rank].topk_idx, "the handle's own topk_idx")
        v2.check_combine(buffer, case, COMPACT, rank, own, 0)


def test_handle_copy(backend):
    run_threads(CASES[2].num_ranks, handle_copy, CASES[2], backend)


def constructor_capacity(comm, case, backend):
    """Without a value of its own, a call takes num_max_tokens_per_rank from the constructor."""
    rank = rank_of(comm)
    size = {"num_max_tokens_per_rank": case.num_max_tokens_per_rank, "hidden": case.hidden, "num_topk": case.num_topk}
    with v2.open_buffer(comm, backend, **size) as buffer:
        result = v2.dispatch(buffer, case, COMPACT, rank, num_max_tokens_per_rank=None)
        v2.check_dispatched(result, v2.expected_dispatch(case, COMPACT)[rank], case, COMPACT, rank)


def test_capacity_of_the_constructor(backend):
    run_threads(CASES[2].num_ranks, constructor_capacity, CASES[2], backend)
