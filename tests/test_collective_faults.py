"""What ``collective`` and ``hybrid`` refuse on all ranks; ``collective`` where a thread is missing, leaves or fails."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch
from collective_cases import (
    SETTINGS,
    Routing,
    all_ranks,
    combine,
    dispatch,
    same,
    v1_spec,
    v2_spec,
)

from deep_ep_py import reference
from deep_ep_py.backends.collective import CollectiveBackend
from deep_ep_py.communicator import thread_world
from deep_ep_py.errors import EPArgumentError, EPError, EPMismatchError, EPPeerError, EPTimeoutError
from deep_ep_py.settings import Settings
from deep_ep_py.types import CombineSpec, ExpertPlacement

# Refusals: all ranks raise, nothing has moved, the buffer goes on ----------------------------------------------------


@dataclass(frozen=True)
class World:
    """Ranks, and how they are spread; ``domains`` None: over ``collective``."""

    num_ranks: int
    domains: tuple[tuple[int, ...], ...] | None = None

    @property
    def routing(self):
        return Routing(self.num_ranks)


WORLDS = {
    "collective": World(3),
    "hybrid 2x2": World(4, ((0, 3), (1, 2))),
    "hybrid 3x1": World(3, ((0,), (1,), (2,))),
    "hybrid 1x3": World(3, ((0, 1, 2),)),
}


@pytest.fixture(params=WORLDS)
def world(request):
    return WORLDS[request.param]


def refused(world, act, check):
    """``act`` raises an EPError on every rank, ``check(rank, error)`` judges it, and the backend works afterwards."""
    routing = world.routing

    def body(rank, backend):
        usual = dispatch(backend, v2_spec(routing, rank, expand=False))
        with pytest.raises(EPError) as caught:
            act(rank, backend, usual)
        check(rank, caught.value)
        again = dispatch(backend, v2_spec(routing, rank, expand=False))
        same(again.recv_x, usual.recv_x, "afterwards")
        ones = combine(backend, CombineSpec(torch.ones_like(again.recv_x), usual.plan)).combined_x
        there = routing.placement.rank[routing.inputs()[0][rank].clamp(min=0)].where(routing.inputs()[0][rank] >= 0, -1)
        sent = torch.stack([(there == r).any(1) for r in range(routing.num_ranks)]).sum(0)
        same(ones, sent[:, None].repeat(1, routing.hidden).to(routing.dtype), "combined afterwards")

    all_ranks(routing, body, domains=world.domains)


@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
@pytest.mark.parametrize("value", [7, -2])
def test_bad_expert_id(world, value, background):
    routing = world.routing

    def act(rank, backend, _):
        spec = v2_spec(routing, rank, expand=False)
        if rank == 2:
            spec.topk_idx[4, 1] = value
        dispatch(backend, spec, background)

    def check(rank, error):
        assert type(error) is EPArgumentError
        assert f"{value} at [4, 1]" in str(error)
        if rank == 2:
            assert error.argument == "topk_idx"
        else:
            assert error.ranks == (2,)

    refused(world, act, check)


def test_other_operation(world):
    routing = world.routing

    def act(rank, backend, usual):
        if rank == 1:
            backend.barrier()
        elif rank == 2:
            combine(backend, CombineSpec(usual.recv_x, usual.plan))
        else:
            dispatch(backend, v2_spec(routing, rank, expand=False))

    def check(_, error):
        assert type(error) is EPMismatchError
        assert error.field == "operation"
        wanted = ("dispatch", "barrier", "combine", "dispatch")
        assert error.values == dict(enumerate(wanted[: world.num_ranks]))

    refused(world, act, check)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("hidden", {"x": torch.zeros(3, 5)}),
        ("dtype", {"x": torch.zeros(3, 9, dtype=torch.float64)}),
        ("scale factor dtype", {"sf": None}),
        ("topk_weights", {"topk_weights": None}),
        ("do_expand", {"layout": "expand"}),
        ("num_topk", {"topk_idx": torch.zeros(3, 2, dtype=torch.int64), "topk_weights": torch.zeros(3, 2)}),
        ("num_experts", {"placement": ExpertPlacement.of(8, 3)}),
        ("expert_alignment", {"expert_alignment": 16}),
        ("num_max_tokens_per_rank", {"num_max_tokens_per_rank": 99}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_ranks_that_disagree(world, field, change):
    routing = world.routing

    def act(rank, backend, _):
        dispatch(backend, v2_spec(routing, rank, expand=False, **(change if rank == 0 else {})))

    def check(_, error):
        assert type(error) is EPMismatchError
        assert error.field == field
        assert set(error.values) == set(range(world.num_ranks))

    refused(world, act, check)


def test_handles_of_different_dispatches(world):
    routing, other = world.routing, Routing(world.num_ranks, seed=9)

    def act(rank, backend, usual):
        topk = other.inputs()[0][rank]
        strange = dispatch(backend, v2_spec(routing, rank, expand=False, topk_idx=topk))
        combine(backend, CombineSpec(strange.recv_x, (strange if rank else usual).plan))

    def check(rank, error):
        if rank:  # rank 0 may also notice that its rows are too few
            assert "handle" in str(error) or "rows" in str(error)

    refused(world, act, check)


def test_wrong_num_tokens_per_rank(world):
    routing = world.routing

    def act(rank, backend, _):
        spec = v1_spec(routing, rank)
        spec.num_tokens_per_rank = spec.is_token_in_rank.sum(0, dtype=torch.int32) + rank
        dispatch(backend, spec)

    def check(rank, error):
        assert type(error) is EPArgumentError
        assert error.argument == "num_tokens_per_rank" if rank else error.ranks == tuple(range(1, world.num_ranks))

    refused(world, act, check)


def test_worst_case_too_small_on_one_rank(world):
    routing = world.routing
    want = reference.v1_dispatch(
        routing.inputs()[2],
        [reference.v1_layout(t, 7, world.num_ranks).is_token_in_rank for t in routing.inputs()[0]],
        [reference.v1_layout(t, 7, world.num_ranks).num_tokens_per_expert for t in routing.inputs()[0]],
    )
    assert want[1].num_recv > 10

    def act(rank, backend, _):
        dispatch(backend, v1_spec(routing, rank, num_worst_tokens=10 if rank == 1 else 1000))

    def check(_, error):
        assert type(error) is EPArgumentError
        assert error.ranks == (1,)
        assert f"rank 1 receives {want[1].num_recv} rows" in str(error)

    refused(world, act, check)


@pytest.mark.parametrize("long", [1, 5000])
def test_fail_reaches_every_peer(world, long):
    def act(rank, backend, usual):
        if rank == 0:
            backend.fail("dispatch", "x: \u00e9 wrong " + "\u00e9" * long)
            raise EPError("own")
        combine(backend, CombineSpec(usual.recv_x, usual.plan))

    def check(rank, error):
        if rank:
            assert type(error) is EPArgumentError
            assert error.ranks == (0,)
            assert "x: \u00e9 wrong" in str(error)

    refused(world, act, check)


class Broken:
    def wait(self):
        raise ValueError("what came before failed")

    def done(self):
        return True


@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
def test_previous_event_that_raises(world, background):
    routing = world.routing

    def body(rank, backend):
        usual = dispatch(backend, v2_spec(routing, rank, expand=False))
        with pytest.raises(ValueError, match="what came before failed"):
            combine(backend, CombineSpec(usual.recv_x, usual.plan), background, [Broken()] if rank else [])
        backend.barrier()

    all_ranks(routing, body, domains=world.domains)


# Faults: the exchange is in an unknown state, the backend is poisoned ------------------------------------------------


def test_thread_that_never_comes():
    routing = Routing(3)

    def body(rank, backend):
        if rank == 1:
            time.sleep(1.0)
            return
        for _ in range(2):
            with pytest.raises(EPTimeoutError) as caught:
                backend.barrier()
            assert caught.value.ranks == (1,)
            assert (caught.value.op, caught.value.phase, caught.value.seq) == ("barrier", "notify", 1)
            assert str(caught.value).count("barrier") == 1

    all_ranks(routing, body, Settings(timeout_seconds=0.4))


def test_thread_that_leaves():
    routing = Routing(3)

    def body(rank, backend):
        if rank == 1:
            return
        flight = backend.prepare_combine(CombineSpec(torch.zeros(4, 9), plan_of_nothing()), background=True)
        backend.combine_send(flight)
        with pytest.raises(EPPeerError) as caught:
            flight.event.wait()
        assert 1 in caught.value.ranks
        with pytest.raises(EPPeerError):
            backend.barrier()

    all_ranks(routing, body)


def plan_of_nothing():
    spec = CollectiveBackend(thread_world(1)[0], SETTINGS)
    routing = Routing(1)
    return dispatch(spec, v2_spec(routing, 0, expand=False)).plan


def test_exception_in_the_middle_poisons():
    """Not a refusal: peers may be in the middle of the same exchange, so everyone has to stop."""
    routing = Routing(2)

    def body(rank, backend):
        usual = dispatch(backend, v2_spec(routing, rank, expand=False))
        flight = backend.prepare(v2_spec(routing, rank, expand=False), background=True)
        if rank == 0:
            flight.state[0].spec = None
        backend.dispatch_send(flight)
        with pytest.raises(AttributeError if rank == 0 else EPPeerError):
            flight.event.wait()
        with pytest.raises(EPError):
            combine(backend, CombineSpec(usual.recv_x, usual.plan))

    all_ranks(routing, body)


def test_closed():
    backend = CollectiveBackend(thread_world(1)[0], SETTINGS)
    backend.close()
    backend.close()
    with pytest.raises(EPError, match="closed"):
        backend.barrier()
