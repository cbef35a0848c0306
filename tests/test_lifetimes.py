"""What calls return belongs to the caller; buffers do not disturb each other, nor the user's torch settings."""

import contextlib
import gc
import threading

import pytest
import torch
import torch.distributed as dist

from deep_ep_py.testing import Case, run_processes, run_threads
from deep_ep_py.testing import conformance_v1 as v1
from deep_ep_py.testing import conformance_v2 as v2
from deep_ep_py.testing.conformance_v1 import rank_of
from deep_ep_py.testing.conformance_v2 import MODES
from deep_ep_py.testing.devices import carry

COMPACT, EXPAND = MODES[0], MODES[2]
CPU = torch.device("cpu")
FIRST = Case((33, 0, 40), hidden=96, num_experts=7, routing="distinct")
SECOND = Case((20, 50, 1), hidden=200, num_topk=3, num_experts=10, dtype=torch.float32, seed=2)
PAIR = Case((33, 40), hidden=96, num_experts=7, routing="distinct")


def outstanding_v1(comm, backend, order):
    rank = rank_of(comm)
    with v1.open_buffer(comm, backend) as buffer:
        cases = (FIRST, SECOND, FIRST)
        results = [v1.dispatch(buffer, case, rank) for case in cases]
        for i in order:
            v1.check_combine(buffer, cases[i], rank, results[i][4], 1, salt=i)
    del buffer
    gc.collect()
    for case, result in zip(cases, results, strict=True):
        v1.check_dispatched(result, v1.expected_dispatch(case)[rank])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2, 1)], ids=str)
def test_v1_handles_and_tensors_stay_the_callers(order, backend):
    run_threads(3, outstanding_v1, backend, order)


def outstanding_v2(comm, backend, order):
    rank = rank_of(comm)
    with v2.open_buffer(comm, backend) as buffer:
        calls = ((FIRST, EXPAND), (SECOND, COMPACT), (FIRST, COMPACT))
        results = [v2.dispatch(buffer, case, mode, rank) for case, mode in calls]
        for i in order:
            v2.check_combine(buffer, *calls[i], rank, results[i][3], 1, salt=i)
    del buffer
    gc.collect()
    for (case, mode), result in zip(calls, results, strict=True):
        v2.check_dispatched(result, v2.expected_dispatch(case, mode)[rank], case, mode, rank)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2, 1)], ids=str)
def test_v2_handles_and_tensors_stay_the_callers(order, backend):
    run_threads(3, outstanding_v2, backend, order)


def handle_of_another_buffer(comm, backend):
    """A handle outlives its buffer: a new buffer combines and dispatches along it."""
    rank = rank_of(comm)
    with v1.open_buffer(comm, backend) as old:
        handle = v1.dispatch(old, FIRST, rank)[4]
    with v2.open_buffer(comm, backend) as old:
        first = v2.dispatch(old, FIRST, EXPAND, rank)
    del old
    gc.collect()
    with v1.open_buffer(comm, backend) as new:
        v1.check_combine(new, FIRST, rank, handle, 2)
        v1.check_recv_x(new.dispatch(v1.payload(FIRST, rank), handle=handle)[0], v1.expected_dispatch(FIRST)[rank])
    with v2.open_buffer(comm, backend) as new:
        v2.check_combine(new, FIRST, EXPAND, rank, first[3], 2)
        v2.check_cached(new, FIRST, EXPAND, rank, first, with_weights=True)


def test_handles_outlive_their_buffer(backend):
    run_threads(3, handle_of_another_buffer, backend)


def received_tensors_are_distinct(comm, backend):
    """Many dispatches kept, more dropped: memory that is reused is never memory that is still held."""
    rank, kept = rank_of(comm), []
    with v1.open_buffer(comm, backend) as buffer:
        for i in range(12):
            case = (FIRST, SECOND)[i % 2]
            result = v1.dispatch(buffer, case, rank)
            if i % 3 == 0:
                kept.append((case, result))
            del result
        for case, result in kept:
            v1.check_dispatched(result, v1.expected_dispatch(case)[rank])


def test_held_memory_is_not_reused(backend):
    run_threads(3, received_tensors_are_distinct, backend)


def two_buffers(comm, backend):
    """One V1 and one V2 buffer over the same ranks, each driven by a thread of its own at the same time."""
    rank, failures = rank_of(comm), []

    def drive(check):
        try:
            for i in range(4):
                check(i)
        except BaseException as e:
            failures.append(e)

    with contextlib.ExitStack() as stack:
        one = stack.enter_context(v1.open_buffer(comm, backend))
        two = stack.enter_context(v2.open_buffer(comm, backend))

        def check_one(i):
            result = v1.dispatch(one, FIRST, rank)
            v1.check_dispatched(result, v1.expected_dispatch(FIRST)[rank])
            v1.check_combine(one, FIRST, rank, result[4], 0, salt=i)

        def check_two(i):
            result = v2.dispatch(two, SECOND, EXPAND, rank)
            v2.check_dispatched(result, v2.expected_dispatch(SECOND, EXPAND)[rank], SECOND, EXPAND, rank)
            v2.check_combine(two, SECOND, EXPAND, rank, result[3], 0, salt=i)

        threads = [threading.Thread(target=drive, args=(c,), daemon=True) for c in (check_one, check_two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=50)
            assert not thread.is_alive(), "stuck"
    if failures:
        raise failures[0]


def test_two_buffers_at_once(backend):
    run_threads(3, two_buffers, backend)


def subgroups(world, backend):
    """Pairs of a world of four, at once with a buffer over the whole world; group ranks differ from global ones."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    mine = pairs[world.rank() % 2]
    case = Case((10, 11, 12, 13), num_experts=9)
    with v1.open_buffer(world, backend) as buffer:
        result = v1.dispatch(buffer, case, world.rank())
        v1.check_round_trip(mine, PAIR, backend)
        v2.check_round_trip(mine, PAIR, EXPAND, backend, (0,))
        v1.check_combine(buffer, case, world.rank(), result[4], 0)
    return mine.rank()


@pytest.mark.processes
def test_subgroups(backend):
    assert run_processes(4, subgroups, backend) == [0, 0, 1, 1]


@pytest.fixture
def _float64_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def under_other_defaults(comm, backend):
    torch.set_default_device("meta")  # of this thread
    try:
        v1.check_round_trip(comm, FIRST, backend)
        v2.check_round_trip(comm, FIRST, EXPAND, backend)
        v2.check_round_trip(comm, FIRST, MODES[1], backend)
        assert torch.empty(1).device.type == "meta", "the user's default was changed"
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_device(None)


@pytest.mark.usefixtures("_float64_by_default")
def test_the_users_default_dtype_and_device(backend):
    run_threads(3, under_other_defaults, backend)


def async_v1(comm, backend):
    rank, waited = rank_of(comm), []
    options = {"async_finish": True, "allocate_on_comm_stream": True}
    expected = v1.expected_dispatch(FIRST)[rank]
    mine = v1.make_inputs(FIRST)[rank]
    with v1.open_buffer(comm, backend) as buffer:
        *layout, event = buffer.get_dispatch_layout(
            mine.topk_idx, FIRST.num_experts, previous_event=buffer.capture(), **options
        )
        assert event.event is not None
        result = buffer.dispatch(
            mine.x,
            **v1.layout_arguments(layout),
            topk_idx=mine.topk_idx,
            topk_weights=mine.topk_weights,
            previous_event=event,
            **options,
        )
        assert result[-1].event is not None, "an asynchronous call has an event"
        result[-1].register_hook_after_wait(lambda: waited.append(rank))
        result[-1].current_stream_wait()
        assert waited == [rank], "the hook runs after the wait"
        v1.check_dispatched(result, expected)
        y, weights = v1.rows_of(FIRST, rank, expected.num_recv), v1.weights_of(FIRST, rank, expected.num_recv)
        wanted, wanted_weights = v1.expected_combine(FIRST, 0)[rank]
        cached = buffer.dispatch(mine.x, handle=result[4], previous_event=buffer.capture(), **options)
        # A combine behind a dispatch that nobody waited for: call order is the buffer's order.
        out, out_weights, event = buffer.combine(
            y, result[4], topk_weights=weights, previous_event=cached[-1], **options
        )
        with event:
            pass
        v1.assert_same_bits(out, wanted, "combined_x")
        v1.assert_same_bits(out_weights, wanted_weights, "combined_topk_weights")
        v1.check_recv_x(cached[0], expected)
        nothing = type(event)(None)
        with nothing:  # a finished event: no wait, no complaint
            cached = buffer.dispatch(mine.x, handle=result[4], previous_event=nothing)
        v1.check_recv_x(cached[0], expected)


def test_v1_async(backend):
    run_threads(3, async_v1, backend)


def async_v2(comm, backend, mode):
    rank = rank_of(comm)
    expected = v2.expected_dispatch(FIRST, mode)[rank]
    y, weights = v2.combine_inputs(FIRST, mode, rank)
    wanted, wanted_weights = v2.expected_combine(FIRST, mode, 0)[rank]
    with v2.open_buffer(comm, backend, multiple=mode.multiple) as buffer:
        for previous in ("previous_event", "previous_event_before_epilogue"):
            options = {"async_with_compute_stream": True, "allocate_on_comm_stream": True}
            result = v2.dispatch(buffer, FIRST, mode, rank, **options, **{previous: buffer.capture()})
            assert result[-1].event is not None, "an asynchronous call has an event"
            result[-1].current_stream_wait()
            v2.check_dispatched(result, expected, FIRST, mode, rank)
            out, out_weights, event = buffer.combine(
                y, result[3], topk_weights=weights, **options, **{previous: buffer.capture()}
            )
            event.current_stream_wait()
            v2.assert_same_bits(out, wanted, "combined_x")
            v2.assert_same_bits(out_weights, wanted_weights, "combined_topk_weights")
        buffer.barrier()


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.id)
def test_v2_async(mode, backend):
    run_threads(3, async_v2, backend, mode)


ROWS_AND_SCALES = Case(
    (20, 50, 1), hidden=200, num_topk=3, num_experts=10, dtype=torch.float8_e4m3fn, sf="f32", gaps="rows", seed=2
)


def hold_background(buffer, released):
    """What an operation does in the background, its reading of the inputs first of all, waits until ``released``."""
    backend = buffer._engine.backend

    def held(step):
        def wait_and_do(*args):
            assert released.wait(20), "still held"
            return step(*args)

        return wait_and_do

    if backend.name == "shm":
        hook = held(lambda: None)
        backend.set_phase_hook(lambda phase: hook() if phase in ("place", "copy") else None)
    else:
        backend._deliver, backend._combine = held(backend._deliver), held(backend._combine)


def with_inputs_gone(released, call, *args, **inputs):
    """``call(*args, **inputs)`` with copies of the tensors, none of which is there any more when the background begins:
    their memory is in other use."""

    copies = [carry(value, CPU) for value in (*args, *inputs.values())]
    flat = [t for value in copies for t in (value if isinstance(value, tuple) else (value,))]
    sizes = [t.untyped_storage().nbytes() for t in flat if isinstance(t, torch.Tensor)]
    released.clear()
    result = call(*copies[: len(args)], **dict(zip(inputs, copies[len(args) :], strict=True)))
    del copies, flat
    junk = [torch.full((size,), 0x55, dtype=torch.uint8) for size in sizes for _ in range(3)]
    released.set()
    result[-1].current_stream_wait()
    del junk
    return result


def async_inputs_v1(comm, backend):
    rank, case, released = rank_of(comm), ROWS_AND_SCALES, threading.Event()
    mine, expected = v1.make_inputs(case)[rank], v1.expected_dispatch(case)[rank]
    y, weights = v1.rows_of(case, rank, expected.num_recv), v1.weights_of(case, rank, expected.num_recv)
    topk = {"topk_idx": mine.topk_idx, "topk_weights": mine.topk_weights}
    options = {"async_finish": True, "allocate_on_comm_stream": True}
    with v1.open_buffer(comm, backend) as buffer:
        wanted, wanted_weights = v1.expected_combine(case, 2, 0, v1.domain_size(buffer))[rank]
        layout = v1.layout_arguments(buffer.get_dispatch_layout(mine.topk_idx, case.num_experts))
        hold_background(buffer, released)
        result = with_inputs_gone(released, buffer.dispatch, v1.payload(case, rank), **topk, **layout, **options)
        v1.check_dispatched(result, expected)
        handle = result[4]
        cached = with_inputs_gone(released, buffer.dispatch, v1.payload(case, rank), handle=handle, **options)
        v1.check_recv_x(cached[0], expected)
        out, out_weights, _ = with_inputs_gone(
            released, buffer.combine, y, handle, topk_weights=weights, bias=mine.bias, **options
        )
        v1.assert_same_bits(out, wanted, "combined_x")
        v1.assert_same_bits(out_weights, wanted_weights, "combined_topk_weights")


def async_inputs_v2(comm, backend, mode):
    rank, case, released = rank_of(comm), ROWS_AND_SCALES, threading.Event()
    mine, expected = v2.make_inputs(case)[rank], v2.expected_dispatch(case, mode)[rank]
    y, weights = v2.combine_inputs(case, mode, rank)
    options = {"async_with_compute_stream": True, "allocate_on_comm_stream": True}
    sizes = {"num_experts": case.num_experts, "num_max_tokens_per_rank": case.num_max_tokens_per_rank}
    with v2.open_buffer(comm, backend) as buffer:
        wanted, wanted_weights = v2.expected_combine(case, mode, 2, 0, v2.domain_size(buffer))[rank]
        hold_background(buffer, released)
        result = with_inputs_gone(
            released,
            buffer.dispatch,
            v1.payload(case, rank),
            mine.topk_idx,
            mine.topk_weights,
            do_expand=mode.expand,
            **sizes,
            **options,
        )
        v2.check_dispatched(result, expected, case, mode, rank)
        cached = with_inputs_gone(
            released,
            buffer.dispatch,
            v1.payload(case, rank),
            handle=result[3],
            topk_weights=mine.topk_weights,
            do_expand=mode.expand,
            **options,
        )
        v2.check_recv_x(cached[0], expected)
        v2.check_rows(cached[2], expected.recv_topk_weights, expected.row_valid, "the cached dispatch's weights")
        out, out_weights, _ = with_inputs_gone(
            released, buffer.combine, y, result[3], topk_weights=weights, bias=mine.bias, **options
        )
        v2.assert_same_bits(out, wanted, "combined_x")
        v2.assert_same_bits(out_weights, wanted_weights, "combined_topk_weights")


def test_v1_async_calls_own_their_inputs(backend):
    run_threads(3, async_inputs_v1, backend)


@pytest.mark.parametrize("mode", [COMPACT, EXPAND], ids=lambda m: m.id)
def test_v2_async_calls_own_their_inputs(mode, backend):
    run_threads(3, async_inputs_v2, backend, mode)
