"""The ``hybrid`` backend where a thread is missing, leaves or fails; how events, results and buffers end."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
from collective_cases import SETTINGS, Routing, all_ranks, combine, dispatch, open_hybrid, same, v2_spec
from hybrid_cases import CROSSED, ROUTING, usual

from deep_ep_py.errors import EPError, EPPeerError, EPTimeoutError
from deep_ep_py.testing import run_threads
from deep_ep_py.types import CombineSpec


def every_rank_raises(backend, kinds, seconds=20.0):
    """Its error, in this operation or one that follows; the ones after it raise the same."""
    start = time.monotonic()
    with pytest.raises(kinds) as caught:
        for _ in range(3):
            backend.barrier()
    assert time.monotonic() - start < seconds
    for act in (backend.barrier, lambda: backend.fail("dispatch", "x")):
        with pytest.raises(kinds) as again:
            act()
        assert str(again.value) == str(caught.value)
        assert again.value.ranks == caught.value.ranks
    return caught.value


@pytest.mark.parametrize("absent", [0, 1, 2, 3])
def test_thread_that_never_comes(absent):
    """Also those name it who wait for somebody that waits for it: across domains the deadline comes first."""

    def body(rank, backend):
        if rank == absent:
            time.sleep(3.5)
            return None
        error = every_rank_raises(backend, (EPTimeoutError, EPPeerError))
        assert error.op == "barrier"
        return error.ranks

    seen = all_ranks(Routing(4), body, replace(SETTINGS, timeout_seconds=2), CROSSED)
    assert seen == [None if rank == absent else (absent,) for rank in range(4)]


@pytest.mark.parametrize("absent", [0, 3])
def test_thread_that_leaves(absent):
    def body(rank, backend):
        usual(backend, rank)
        if rank == absent:
            return None
        error = every_rank_raises(backend, EPPeerError)
        return error.ranks

    seen = all_ranks(Routing(4), body, domains=CROSSED)
    assert any(named == (absent,) for named in seen if named is not None), seen
    assert all(named for r, named in enumerate(seen) if r != absent)


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["rail 1", "rail 3", "rail 4", "layout", "place", "arrive"])
@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
def test_exception_in_the_middle(where, background):
    """Raised in one rank after it has published: it raises what happened, all others that it is gone. Nobody closes
    before all have raised: it is the error that tells the others."""
    all_raised = threading.Barrier(4)

    def body(rank, backend):
        usual(backend, rank)
        if rank == 2:
            fail_in(backend, where)
        with pytest.raises((Stop, EPError) if rank == 2 else EPPeerError):
            dispatch(backend, v2_spec(ROUTING, rank, expand=False), background)
            backend.barrier()
        all_raised.wait(30)
        with pytest.raises(EPError):
            backend.barrier()

    all_ranks(Routing(4), body, domains=CROSSED)


def fail_in(backend, where):
    count = 0
    start = backend._rail.start

    def counted(*tensors):
        nonlocal count
        count += 1
        if where == f"rail {count}":
            raise Stop
        return start(*tensors)

    backend._rail.start = counted
    if not where.startswith("rail"):

        def hook(phase):
            if phase == where:
                raise Stop  # the core tells it on as an error of its own

        backend._domain.set_phase_hook(hook)


def test_events_and_results_when_a_rank_closes_with_operations_in_flight():
    """``close`` waits for what this rank has begun; the results are complete."""

    def body(rank, backend):
        before = usual(backend, rank)
        flights = []
        for _ in range(4):
            flight = backend.prepare(v2_spec(ROUTING, rank, expand=False), background=True)
            backend.dispatch_send(flight)
            flights.append(flight)
            spec = CombineSpec(before.recv_x, before.plan)
            flights.append(backend.prepare_combine(spec, background=True))
            backend.combine_send(flights[-1])
        backend.close()
        assert all(f.event.done() for f in flights)
        for flight in flights[::2]:
            flight.event.wait()
            same(flight.result.recv_x, before.recv_x, "x")
        for flight in flights[1::2]:
            flight.event.wait()
            same(flight.result.combined_x, flights[1].result.combined_x, "combined")
        for act in (backend.barrier, lambda: usual(backend, rank), lambda: combine(backend, spec)):
            with pytest.raises(EPError, match=r"closed|destroyed"):
                act()

    all_ranks(Routing(4), body, domains=CROSSED)


@pytest.mark.parametrize("kept", [1, 3])
def test_large_results_after_the_end(kept):
    """Outputs that lie in the heap are not asked of a buffer that is closed, or that has failed."""
    routing = Routing(4, hidden=3000, tokens=(30, 30, 30, 30))

    def body(rank, backend):
        got = dispatch(backend, v2_spec(routing, rank, expand=False))
        spec = CombineSpec(got.recv_x, got.plan)
        if rank == kept:
            backend.close()
            with pytest.raises(EPError, match=r"closed|destroyed"):
                combine(backend, spec)
            return
        error = every_rank_raises(backend, EPPeerError)
        for _ in range(2):
            with pytest.raises(EPPeerError) as again:
                combine(backend, spec)
            assert str(again.value) == str(error)

    all_ranks(routing, body, domains=CROSSED)


def test_two_buffers_in_turns():
    def body(comm):
        backends = [open_hybrid(comm.session(), domains) for domains in (CROSSED, ((0, 1), (2, 3)))]
        before = [usual(b, comm.rank) for b in backends]
        for i in range(12):
            flights = []
            for b in backends if i % 2 else backends[::-1]:
                flights.append(b.prepare(v2_spec(ROUTING, comm.rank, expand=False), background=i % 3 == 0))
                b.dispatch_send(flights[-1])
            for b, flight, usually in zip(backends if i % 2 else backends[::-1], flights, before, strict=True):
                combine(b, CombineSpec(flight.result.recv_x, flight.result.plan), background=True)
                same(flight.result.recv_x, usually.recv_x, "x")
        backends[0].close()
        same(usual(backends[1], comm.rank).recv_x, before[1].recv_x, "after the other was closed")
        backends[1].close()

    run_threads(4, body)
