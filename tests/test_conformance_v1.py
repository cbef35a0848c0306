"""V1 ``Buffer`` against the oracle: shapes, routings, dtypes, worlds; dispatch and combine bit for bit."""

import large_rows as large
import pytest
import torch
from large_rows import LARGE

from deep_ep_py.testing import Case, make_inputs, run_processes, run_threads
from deep_ep_py.testing import conformance_v1 as v1
from deep_ep_py.testing.cases import domain_size
from deep_ep_py.testing.compare import assert_same_bits

CASES = (
    # worlds, top-k, hidden sizes
    Case((13,), num_experts=16),
    Case((17, 5), hidden=1, num_topk=1, num_experts=7),
    Case((33, 40), hidden=2880, num_experts=7),
    Case((9, 0, 21), hidden=7168, num_topk=16, num_experts=32),
    Case((31, 32, 33, 1), num_topk=40, num_experts=64, expert_alignment=16),
    Case((12, 12, 12, 12), num_topk=2, num_experts=2),  # two of four ranks own no expert
    # token counts
    Case((0, 7)),
    Case((0, 0)),
    Case((4095, 1), num_experts=256, routing="distinct"),
    # routings
    Case((40, 30, 20), routing="one_expert"),
    Case((6, 5), routing="none"),
    Case((25, 26), num_topk=16, num_experts=7, routing="duplicates", expert_alignment=128),
    Case((25, 26, 27), num_topk=16, num_experts=7, routing="distinct"),
    # dtypes and strides
    Case((14, 15, 16), hidden=33, dtype=torch.float16, routing="distinct"),
    Case((14, 15, 16), hidden=33, dtype=torch.float32, routing="distinct"),
    Case((14, 15, 16), hidden=33, dtype=torch.float64, routing="distinct"),
    Case((20, 21), hidden=128, dtype=torch.float8_e4m3fn, sf="f32", num_scales=1),
    Case((20, 21), hidden=512, dtype=torch.float8_e4m3fn, sf="i32", num_scales=3, gaps="elements"),
    Case((20, 21), hidden=65, dtype=torch.float8_e5m2),
    Case((20, 21), hidden=3, dtype=torch.uint8),
    Case((20, 21), hidden=5, dtype=torch.int32),
    Case((20, 21), hidden=7, dtype=torch.bool),
    Case((20, 21), hidden=512, dtype=torch.float8_e4m3fn, sf="f32", num_scales=3, gaps="rows"),
    Case((18, 19, 20), hidden=40, gaps="elements"),
    Case((18, 19, 20), hidden=40, dtype=torch.float32, gaps="rows", seed=1),
)
IN_PROCESSES = (CASES[2], CASES[4], CASES[6], CASES[8], CASES[11], CASES[14], CASES[17])


def ids(case):
    return case.id


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_round_trip(case, backend):
    run_threads(case.num_ranks, v1.check_round_trip, case, backend)


def large_round_trip(comm, backend):
    rank, (topk_idx, topk_weights) = v1.rank_of(comm), large.routing(LARGE)
    x, y = large.rows(LARGE)
    layouts = [v1.reference.v1_layout(t, LARGE.num_experts, LARGE.num_ranks) for t in topk_idx]
    in_rank = [one.is_token_in_rank for one in layouts]
    with v1.open_buffer(comm, backend) as buffer:
        layout = v1.layout_arguments(buffer.get_dispatch_layout(topk_idx[rank], LARGE.num_experts))
        arguments = {**layout, "topk_idx": topk_idx[rank], "topk_weights": topk_weights[rank]}
        recv_x, recv_topk_idx, recv_weights, _, handle, _ = buffer.dispatch(x[rank], **arguments)
        assert_same_bits(recv_x, v1.reference.arrivals(x, in_rank, rank), "recv_x")
        weights = v1.reference.arrivals(topk_weights, in_rank, rank)
        assert_same_bits(recv_weights, torch.where(recv_topk_idx >= 0, weights, 0.0), "recv_topk_weights")
        again, *_ = buffer.dispatch(y[rank], handle=handle)
        assert_same_bits(again, v1.reference.arrivals(y, in_rank, rank), "recv_x, cached")
        del again
        sent = v1.reference.arrivals(y, in_rank, rank)
        combined_x, _, _ = buffer.combine(sent + rank, handle)
        assert_same_bits(combined_x, large.total(y[rank], in_rank[rank]), "combined_x")
        recv_x.copy_(sent + rank)
        combined_x, _, _ = buffer.combine(recv_x, handle)
        assert_same_bits(combined_x, large.total(y[rank], in_rank[rank]), "combined_x, y in place")


def test_large_round_trip(backend):
    run_threads(LARGE.num_ranks, large_round_trip, backend)


@pytest.mark.processes
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_round_trips_in_processes(num_ranks, backend):
    cases = tuple(c for c in (*CASES[:1], *IN_PROCESSES) if c.num_ranks == num_ranks)
    assert run_processes(num_ranks, v1.check_batch, cases, backend) == [len(cases)] * num_ranks
    assert cases


def without_topk(comm, case, backend):
    """No top-k in, none out; the combine needs no weights either."""
    rank = v1.rank_of(comm)
    with v1.open_buffer(comm, backend) as buffer:
        result = v1.dispatch(buffer, case, rank, with_topk=False)
        v1.check_dispatched(result, v1.expected_dispatch(case, with_topk=False)[rank])
        y = v1.rows_of(case, rank, v1.expected_dispatch(case)[rank].num_recv)
        wanted = v1.expected_combine(case, 0)[rank][0]
        out, weights, _ = buffer.combine(y, result[4])
        assert weights is None
        assert_same_bits(out, wanted, "combined_x")


@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[16]], ids=ids)
def test_without_topk(case, backend):
    run_threads(case.num_ranks, without_topk, case, backend)


def worst_tokens(comm, case, backend, num_worst_tokens):
    rank = v1.rank_of(comm)
    expected = v1.expected_dispatch(case, True, num_worst_tokens)[rank]
    with v1.open_buffer(comm, backend) as buffer:
        result = v1.dispatch(buffer, case, rank, num_worst_tokens=num_worst_tokens)
        v1.check_dispatched(result, expected)
        v1.check_combine(buffer, case, rank, result[4], 1, rows=num_worst_tokens)
        cached = buffer.dispatch(v1.payload(case, rank), handle=result[4], num_worst_tokens=num_worst_tokens)
        v1.check_recv_x(cached[0], expected)


@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[6], CASES[7], CASES[10], CASES[16]], ids=ids)
@pytest.mark.parametrize("spare", [0, 5])
def test_worst_tokens(case, backend, spare):
    num_worst_tokens = max(sum(case.num_tokens), 1) + spare
    run_threads(case.num_ranks, worst_tokens, case, backend, num_worst_tokens)


def routed_by_hand(comm, case, backend):
    """``is_token_in_rank`` is the caller's word: here every token goes to every rank, whatever its top-k says."""
    rank, inputs = v1.rank_of(comm), make_inputs(case)
    everywhere = [torch.ones((t, case.num_ranks), dtype=torch.bool) for t in case.num_tokens]
    per_expert = [one.num_tokens_per_expert for one in v1.layouts(case)]
    expected = v1.reference.v1_dispatch(
        [i.x for i in inputs],
        everywhere,
        per_expert,
        topk_idx=[i.topk_idx for i in inputs],
        topk_weights=[i.topk_weights for i in inputs],
    )
    ys = [v1.rows_of(case, r, expected[r].num_recv) for r in range(case.num_ranks)]
    with v1.open_buffer(comm, backend) as buffer:
        # Before the dispatch, where ranks meet: what the oracle reads nobody has handed to the library yet.
        wanted = v1.reference.v1_combine(ys, everywhere, num_scaleup_ranks=domain_size(buffer))[rank][0]
        result = buffer.dispatch(
            inputs[rank].x,
            num_tokens_per_rank=torch.full((case.num_ranks,), case.num_tokens[rank], dtype=torch.int32),
            is_token_in_rank=everywhere[rank],
            num_tokens_per_expert=per_expert[rank],
            topk_idx=inputs[rank].topk_idx,
            topk_weights=inputs[rank].topk_weights,
        )
        v1.check_dispatched(result, expected[rank])
        out, _, _ = buffer.combine(ys[rank], result[4])
        assert_same_bits(out, wanted, "combined_x")


def test_routed_by_hand(backend):
    case = Case((11, 0, 7), num_topk=3, num_experts=7, dtype=torch.float32)
    run_threads(case.num_ranks, routed_by_hand, case, backend)


def special_values(comm, case, backend):
    """Subnormals survive, infinities add up, inf - inf and NaN give NaN, -0.0 sums to +0.0 unless the bias is -0.0."""
    rank = v1.rank_of(comm)
    layout = v1.layouts(case)
    counts = [e.num_recv for e in v1.expected_dispatch(case)]
    tiny = torch.finfo(case.dtype).smallest_normal
    table = torch.tensor(
        [0.0, -0.0, tiny, -tiny, tiny / 2, -tiny / 4, tiny * 0.75, torch.inf, -torch.inf, torch.nan, 1.0, -1.0],
        dtype=torch.float64,
    ).to(case.dtype)
    ys = []
    for r in range(case.num_ranks):
        generator = torch.Generator().manual_seed(r)
        ys.append(table[torch.randint(0, len(table), (counts[r], case.hidden), generator=generator)])
    minus_zero = torch.full((case.num_tokens[rank], case.hidden), -0.0, dtype=case.dtype)
    in_rank = [one.is_token_in_rank for one in layout]
    minus_zeros = [(torch.full((t, case.hidden), -0.0, dtype=case.dtype),) for t in case.num_tokens]
    with v1.open_buffer(comm, backend) as buffer:
        handle = v1.dispatch(buffer, case, rank)[4]
        for bias, biases in ((None, None), (minus_zero, minus_zeros)):
            out, _, _ = buffer.combine(ys[rank], handle, bias=bias)
            size = domain_size(buffer)
            expected = v1.reference.v1_combine(ys, in_rank, bias=biases, num_scaleup_ranks=size)[rank][0]
            assert_same_bits(out, expected, f"combined_x with bias {bias is not None}", any_nan=True)
    return bool(expected.isnan().any()), bool(((expected != 0) & (expected.abs() < tiny)).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_special_values(dtype, backend):
    case = Case((40, 41, 42), hidden=100, num_topk=4, num_experts=9, dtype=dtype)
    results = run_threads(case.num_ranks, special_values, case, backend)
    assert results == [(True, True)] * case.num_ranks, "the data must hold NaN and subnormal results"


def in_place_rows(comm, case, backend):
    """``recv_x`` itself handed to combine, and overwritten as soon as combine returns: no peer may still read it."""
    rank = v1.rank_of(comm)
    original = make_inputs(case)[rank].x.clone()
    expected = v1.expected_dispatch(case)
    ys = [e.recv_x for e in expected]
    in_rank = [one.is_token_in_rank for one in v1.layouts(case)]
    with v1.open_buffer(comm, backend) as buffer:
        wanted = v1.reference.v1_combine(ys, in_rank, num_scaleup_ranks=domain_size(buffer))[rank][0]
        for _ in range(8):
            recv_x, _, _, _, handle, _ = v1.dispatch(buffer, case, rank)
            out, _, _ = buffer.combine(recv_x, handle)
            recv_x.fill_(99.0)
            assert_same_bits(out, wanted, "combined_x", any_nan=True)
            assert_same_bits(make_inputs(case)[rank].x, original, "x, which is only read")


def test_in_place_rows_may_be_overwritten(backend):
    case = Case((200, 100, 300), hidden=512, num_topk=4, dtype=torch.float32)
    run_threads(case.num_ranks, in_place_rows, case, backend)
