"""The ``hybrid`` backend where something is wrong: what is refused, who is missing or gone, Ctrl-C, exits, leaks."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from collective_cases import SETTINGS, Routing, all_ranks, cached, combine, dispatch, open_hybrid, same, v2_spec

from deep_ep_py import Buffer
from deep_ep_py.communicator import communicator_of
from deep_ep_py.errors import EPArgumentError, EPError, EPMismatchError, EPPeerError, EPTimeoutError
from deep_ep_py.plans import Plan
from deep_ep_py.settings import Settings
from deep_ep_py.testing import Case, conformance_v1, run_threads
from deep_ep_py.types import CombineSpec

sys.path.append(str(Path(__file__).parent / "faults"))
from fault_world import leftovers, names_in, run_world, threads_of_this_process

CROSSED = ((0, 3), (1, 2))
ROUTING = Routing(4, tokens=(30, 0, 40, 20))


def usual(backend, rank, **more):
    return dispatch(backend, v2_spec(ROUTING, rank, expand=False, **more))


def works(backend, rank, before):
    same(usual(backend, rank).recv_x, before.recv_x, "afterwards")


# Refused: all ranks raise, nothing has moved, the buffer goes on ------------------------------------------------------


def changed(plan, change):
    packed = plan.packed.clone()
    change(Plan.of(packed))
    return Plan.of(packed)


def unknown_rank(plan):
    plan.targets[0, :] = (77 << 32) | 3


def unknown_rank_of_many_bits(plan):
    plan.targets[0, :] = (1 << 61) | 3


def relay_to_unknown_rank(plan):
    plan.relay[0, :] = (77 << 32) | 3


def relay_to_unknown_row(plan):
    plan.relay[0, :] = (1 << 32) | ((1 << 31) - 1)


def more_relayed_than_there_are(plan):
    plan.relay_counts[0] += 1


def fewer_relayed(plan):
    plan.relay_counts[0] -= 1
    plan.relay_counts[1] += 1


def follow(backend, rank, plan, rows, operation):
    if operation == "combine":
        combine(backend, CombineSpec(rows, plan))
    else:
        dispatch(backend, cached(ROUTING, rank, plan, ROUTING.inputs()[1][rank]))


@pytest.mark.parametrize("operation", ["cached dispatch", "combine"])
@pytest.mark.parametrize("damage", [unknown_rank, unknown_rank_of_many_bits], ids=lambda f: f.__name__)
def test_damaged_targets_are_refused(damage, operation):
    def body(rank, backend):
        before = usual(backend, rank)
        plan = changed(before.plan, damage) if rank == 2 else before.plan
        with pytest.raises(EPArgumentError) as caught:
            follow(backend, rank, plan, before.recv_x, operation)
        if rank == 2:
            assert caught.value.argument == "handle"
        else:
            assert caught.value.ranks == (2,)
        works(backend, rank, before)

    all_ranks(Routing(4), body, domains=CROSSED)


@pytest.mark.parametrize("operation", ["cached dispatch", "combine"])
@pytest.mark.parametrize(
    "damage",
    [relay_to_unknown_rank, relay_to_unknown_row, more_relayed_than_there_are, fewer_relayed],
    ids=lambda f: f.__name__,
)
def test_damaged_relays_stop_everybody(damage, operation):
    """What no rank can see before it begins: each of them raises, in that operation or the next."""

    def body(rank, backend):
        before = usual(backend, rank)
        plan = changed(before.plan, damage) if rank == 2 else before.plan
        with pytest.raises((EPError, AssertionError, RuntimeError)):
            follow(backend, rank, plan, before.recv_x, operation)
            backend.barrier()
        if not stays_usable(backend):
            with pytest.raises(EPError):
                backend.barrier()

    def stays_usable(backend):
        try:
            backend.barrier()
        except EPError:
            return False
        return True

    all_ranks(Routing(4), body, replace(SETTINGS, timeout_seconds=3), CROSSED)


def sends_nothing(plan):
    plan.targets[:] = -1


@pytest.mark.parametrize("operation", ["cached dispatch", "combine"])
@pytest.mark.parametrize(
    "damage", [more_relayed_than_there_are, fewer_relayed, sends_nothing], ids=lambda f: f.__name__
)
def test_plans_that_count_differently_are_refused(damage, operation):
    """Gloo says nothing where fewer bytes come than expected, and ends the process where more come."""

    def body(rank, backend):
        before = usual(backend, rank)
        plan = changed(before.plan, damage) if rank == 2 else before.plan
        with pytest.raises(EPArgumentError, match="handle"):
            follow(backend, rank, plan, before.recv_x, operation)
        works(backend, rank, before)

    all_ranks(Routing(4), body, replace(SETTINGS, timeout_seconds=3), CROSSED)


def v1_buffer(comm, backend):
    settings = Settings(domain=f"host {comm.rank // 2}", timeout_seconds=20, connect_timeout_seconds=20)
    return Buffer(comm, backend=backend, settings=settings)


V1_CASE = Case((9, 0, 12, 7), hidden=40, num_topk=3, num_experts=7, dtype=torch.float32)


def v1_works(buffer, rank):
    result = conformance_v1.dispatch(buffer, V1_CASE, rank)
    conformance_v1.check_dispatched(result, conformance_v1.expected_dispatch(V1_CASE)[rank])
    conformance_v1.check_combine(buffer, V1_CASE, rank, result[4], 1)


def refused_by_v1(buffer, rank, call):
    with pytest.raises(EPArgumentError) as caught:
        call()
    v1_works(buffer, rank)
    return caught.value


@pytest.mark.parametrize("operation", ["cached dispatch", "combine"])
@pytest.mark.parametrize("other", ["collective", "shm"])
def test_handles_of_another_number_of_hops(other, operation):
    """A 6-tuple of one hop says nothing of relays: refused by two. A 10-tuple has every row's final place: one hop
    follows it, where all ranks do."""

    def body(comm):
        rank, x = comm.rank, conformance_v1.payload(V1_CASE, comm.rank)
        two = v1_buffer(comm, "hybrid")
        one = Buffer(comm, backend=other, settings=Settings(timeout_seconds=20))
        of_two, of_one = (conformance_v1.dispatch(buffer, V1_CASE, rank) for buffer in (two, one))
        assert (len(of_two[4]), len(of_one[4])) == (10, 6)

        def follow(buffer, result):
            if operation == "combine":
                conformance_v1.check_combine(buffer, V1_CASE, rank, result[4], 1)
            else:
                again = buffer.dispatch(x, handle=result[4])
                conformance_v1.check_recv_x(again[0], conformance_v1.expected_dispatch(V1_CASE)[rank])

        for result in (of_one, of_one if rank == 1 else of_two):
            with pytest.raises(EPArgumentError, match="handle"):
                follow(two, result)
            v1_works(two, rank)
        follow(one, of_two)
        with pytest.raises(EPMismatchError, match="handle"):
            follow(one, of_two if rank == 1 else of_one)
        v1_works(one, rank)
        one.destroy()
        two.destroy()

    run_threads(4, body)


def test_truncated_and_foreign_handles():
    def body(comm):
        rank, buffer = comm.rank, v1_buffer(comm, "hybrid")
        handle = conformance_v1.dispatch(buffer, V1_CASE, rank)[4]
        for last in (handle[-1][:-1], handle[-1][:3], torch.zeros(40, dtype=torch.int64), handle[-1].int()):
            wrong = (*handle[:-1], last) if rank == 3 else handle
            error = refused_by_v1(
                buffer, rank, lambda w=wrong: buffer.dispatch(conformance_v1.payload(V1_CASE, rank), handle=w)
            )
            assert rank == 3 or error.ranks == (3,)
        buffer.destroy()

    run_threads(4, body)


def test_wrong_num_tokens_per_rdma_rank():
    def body(comm):
        rank, buffer = comm.rank, v1_buffer(comm, "hybrid")
        mine = conformance_v1.make_inputs(V1_CASE)[rank]
        layout = conformance_v1.layout_arguments(buffer.get_dispatch_layout(mine.topk_idx, V1_CASE.num_experts))
        if rank == 2:
            layout["num_tokens_per_rdma_rank"] = layout["num_tokens_per_rdma_rank"] + 1
        topk = {"topk_idx": mine.topk_idx, "topk_weights": mine.topk_weights}
        error = refused_by_v1(buffer, rank, lambda: buffer.dispatch(mine.x, **layout, **topk))
        assert error.argument == "num_tokens_per_rdma_rank" if rank == 2 else error.ranks == (2,)
        buffer.destroy()

    run_threads(4, body)


def differing_rates(rank_settings):
    def body(comm):
        backend = open_hybrid(comm, CROSSED, replace(SETTINGS, timeout_seconds=3, link_gbps=rank_settings[comm.rank]))
        routing = Routing(4, hidden=20_000, tokens=(40, 40, 40, 40))
        try:
            dispatch(backend, v2_spec(routing, comm.rank, expand=False))
            backend.barrier()
        finally:
            backend.close()

    run_threads(4, body)


def test_link_rates_that_differ():
    differing_rates((1e9, 1e-9, 1e-9, 0))


# Who is missing or leaves, between threads ---------------------------------------------------------------------------


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
    def body(rank, backend):
        if rank == absent:
            time.sleep(1.5)
            return None
        error = every_rank_raises(backend, (EPTimeoutError, EPPeerError))
        assert error.op == "barrier"
        return type(error), error.ranks

    seen = all_ranks(Routing(4), body, replace(SETTINGS, timeout_seconds=0.5), CROSSED)
    # Its rail, who waits for it first, knows for certain; the others may be stuck behind somebody who waits for it.
    rail = {0: 1, 1: 0, 2: 3, 3: 2}[absent]
    assert seen[rail] == (EPTimeoutError, (absent,))
    assert all(named and set(named) <= {0, 1, 2, 3} for _, named in filter(None, seen))


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


# Processes ----------------------------------------------------------------------------------------------------------


def act(backend, rank, operation, before):
    if operation == "dispatch":
        usual(backend, rank)
    elif operation == "background dispatch":
        dispatch(backend, v2_spec(ROUTING, rank, expand=False), background=True)
    elif operation == "combine":
        combine(backend, CombineSpec(before.recv_x.clone(), before.plan))
    elif operation == "combine in place":
        combine(backend, CombineSpec(before.recv_x, before.plan))
    else:
        backend.barrier()


def opened(world, seconds):
    return open_hybrid(communicator_of(world.group), CROSSED, replace(SETTINGS, timeout_seconds=seconds))


def when(backend, where, do):
    """``do()`` once, in a phase of the domain, or when the rail is used for the n-th time."""
    count = 0
    start = backend._rail.start

    def counted(*tensors):
        nonlocal count
        count += 1
        if where == f"rail {count}":
            do()
        return start(*tensors)

    backend._rail.start = counted
    if where == "before":
        do()
    elif not where.startswith("rail"):
        backend._domain.set_phase_hook(lambda phase: do() if phase == where else None)


VICTIM = 3


def lost_in(world, how, operation, where):
    backend = opened(world, 20 if how == signal.SIGKILL else 1.0)
    before = usual(backend, world.rank)

    def die():
        world.tell("died", True)
        os.kill(os.getpid(), how)

    if world.rank == VICTIM:
        if where == "before":
            time.sleep(0.3)  # the others sleep in their wait by then
        when(backend, where, die)
        act(backend, VICTIM, operation, before)
        raise AssertionError(f"{where} was never entered")
    errors = []
    for _ in range(4):
        begin = time.monotonic()
        try:
            act(backend, world.rank, operation, before)
        except EPError as e:
            errors.append((type(e), e.ranks, bool(e.op and e.phase), str(e), time.monotonic() - begin))
    begin = time.monotonic()
    backend.close()
    closing = time.monotonic() - begin
    del backend, before
    assert not leftovers()
    return errors, closing


SCENES = [
    ("barrier", "before"),
    ("dispatch", "rail 1"),
    ("dispatch", "rail 3"),
    ("dispatch", "rail 4"),
    ("dispatch", "notify"),
    ("dispatch", "place"),
    ("background dispatch", "arrive"),
    ("combine", "copy"),
    ("combine", "rail 2"),
    ("combine", "pull"),
    ("combine in place", "release wait"),
]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("how", "operation", "where"),
    [(signal.SIGKILL, *scene) for scene in SCENES] + [(signal.SIGSTOP, *scene) for scene in SCENES[::3]],
    ids=lambda word: getattr(word, "name", word).replace(" ", "-"),
)
def test_a_process_goes(how, operation, where):
    """All ranks of both domains raise at once, or at the deadline; whoever waits for the lost one itself names it."""
    ranks = run_world(4, lost_in, how, operation, where, lost=(VICTIM,), timeout_seconds=30)
    assert ranks[VICTIM].said == {"died": True}
    killed = how == signal.SIGKILL
    named = set()
    for rank in ranks[:VICTIM]:
        errors, closing = rank.result
        # A rank that had everything it needs hears of it in the next operation, or the one after.
        assert len(errors) >= 2, errors
        kind, who, placed, text, seconds = errors[0]
        assert kind is EPPeerError if killed else kind in (EPTimeoutError, EPPeerError)
        assert who
        assert placed
        assert seconds < 10, "far from the deadline of a killed one, and beyond that of a stopped one"
        assert {e[3] for e in errors} == {text}, "later calls raise the same"
        assert closing < 5
        named.add(who)
    assert (VICTIM,) in named


def interrupted(world, where):
    """Rank 0 is interrupted in a wait: on the rail, because rank 1 lingers, or in the domain, because rank 3 does."""
    backend = opened(world, 30)
    before = usual(backend, world.rank)
    lingers = {"rail": 1, "domain": 3, "background": 1}[where]
    if world.rank == lingers:
        when(backend, "notify" if where == "domain" else "rail 1", lambda: time.sleep(1.5))
    background = where == "background"
    begin = time.monotonic()
    if world.rank == 0:
        threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            dispatch(backend, v2_spec(ROUTING, 0, expand=False), background=background)
        assert time.monotonic() - begin < 1.4, "it was interrupted in its wait"
        with pytest.raises(EPError, match="nterrupt"):
            backend.barrier()
    else:
        with pytest.raises(EPPeerError):
            for _ in range(3):
                act(backend, world.rank, "background dispatch" if background else "dispatch", before)
    backend.close()
    assert time.monotonic() - begin < 15, "far from the deadline"


@pytest.mark.processes
@pytest.mark.parametrize("where", ["rail", "domain", "background"])
def test_ctrl_c(where):
    run_world(4, interrupted, where)


def forked(world):
    backend = opened(world, 20)
    before = usual(backend, world.rank)
    combine(backend, CombineSpec(before.recv_x, before.plan), background=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            raised = 0
            spec = CombineSpec(torch.zeros(before.recv_x.shape), before.plan)
            for refused in (backend.barrier, lambda: usual(backend, world.rank), lambda: combine(backend, spec)):
                try:
                    refused()
                except EPError as e:  # noqa: PERF203
                    raised += "fork" in str(e)
            backend.close()
            code = 0 if raised == 3 else 10 + raised
        finally:
            os._exit(code)
    deadline = time.monotonic() + 15
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        assert time.monotonic() < deadline, os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    works(backend, world.rank, before)
    backend.close()


@pytest.mark.processes
def test_a_forked_child_is_refused_and_its_parent_goes_on():
    run_world(4, forked)


def many(world):
    backend = opened(world, 20)
    rank = world.rank

    def iterate(backend, n):
        for i in range(n):
            got = usual(backend, rank)
            combine(backend, CombineSpec(got.recv_x, got.plan), background=i % 4 == 1)
            if i % 4 == 0:
                dispatch(backend, cached(ROUTING, rank, got.plan), background=True)
        del got
        backend.barrier()
        time.sleep(0.5)  # an idle worker ends by itself
        gc.collect()

    def facts(backend):
        statistics = backend.statistics()
        maps = Path("/proc/self/maps").read_text().count("\n")
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        found = {"fds": len(names_in("/proc/self/fd")), "threads": threads_of_this_process()}
        return found | {"heap": statistics.heap_bytes, "held": statistics.held_bytes, "maps": maps}, memory

    iterate(backend, 60)
    before, memory_before = facts(backend)
    iterate(backend, 130)
    after, memory_after = facts(backend)
    assert after["maps"] <= before.pop("maps") + 8, "mappings grow"
    after.pop("maps")
    assert all(after[what] <= before[what] for what in before), (before, after)
    assert memory_after - memory_before < 4 << 20, f"{(memory_after - memory_before) >> 10} KiB more"
    backend.close()
    del backend
    left = leftovers()
    assert not left, left


@pytest.mark.processes
def test_hundreds_of_operations_leave_nothing():
    run_world(4, many)


LEAVES = """
import os, sys, threading, time
import torch, torch.distributed as dist
from datetime import timedelta
from deep_ep_py import Buffer
from deep_ep_py.settings import Settings

how, rank, store = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
buffer = Buffer(dist.group.WORLD, backend="hybrid", settings=Settings(domain=f"host {rank}", timeout_seconds=20))
assert buffer.backend_info().num_hops == 2
topk, weights = torch.tensor([[0, 3], [1, 2]]), torch.ones(2, 2)
layout = buffer.get_dispatch_layout(topk, 4)
names = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank")
given = dict(zip(names, layout), topk_idx=topk, topk_weights=weights)

def dispatch(background):
    return buffer.dispatch(torch.ones(2, 1000), async_finish=background, **given)

x, _, _, _, handle, _ = dispatch(False)
assert x.shape == (4, 1000)
if how == "in flight":
    for _ in range(3):
        dispatch(True)
        buffer.combine(x.clone(), handle, async_finish=True)
elif how == "waiting for nobody" and rank == 0:
    event = buffer.combine(x, handle, async_finish=True)[-1]
    time.sleep(0.3)
    assert not event.event.completion.done()
if how == "waiting for nobody":
    time.sleep(6 * rank)
"""


@pytest.mark.processes
@pytest.mark.parametrize("how", ["idle", "in flight", "waiting for nobody"])
def test_interpreter_exit_with_an_open_buffer(how, tmp_path):
    """Nobody closes anything; the exit status is 0 and nothing is said."""
    command = [sys.executable, "-c", LEAVES, how]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, str(r), str(tmp_path / "store")], **pipes) for r in range(2)]
    try:
        for process in ranks:
            out, err = process.communicate(timeout=60)
            assert (process.returncode, out, err) == (0, "", "")
    finally:
        for process in ranks:
            process.kill()
            process.wait()
