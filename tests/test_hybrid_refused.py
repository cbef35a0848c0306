"""What the ``hybrid`` backend refuses: all ranks raise, nothing has moved, and the buffer goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from collective_cases import SETTINGS, Routing, all_ranks, cached, combine, dispatch, open_hybrid, v2_spec
from hybrid_cases import CROSSED, ROUTING, usual, works

from deep_ep_py import Buffer
from deep_ep_py.errors import EPArgumentError, EPError
from deep_ep_py.plans import Plan
from deep_ep_py.settings import Settings
from deep_ep_py.testing import Case, conformance_v1, run_threads
from deep_ep_py.types import CombineSpec


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
    follows it, and it goes with the 6-tuples of the same routing."""

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
