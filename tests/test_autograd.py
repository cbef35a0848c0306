"""The ops' gradients: gradcheck over all ranks' inputs, and what the ops deliver against ElasticBuffer bit for bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from autograd_world import FORMS, Board, Routing, every_rank, gather_in_group, layer, of_all_ranks, threads

import deep_ep_py as ep
from deep_ep_py.testing.cases import BACKENDS
from deep_ep_py.testing.worlds import run_processes

ROUTING = Routing()


def check_gradients(gather, rank, buffer, routing, form, expand, second=False, fast=False):
    n, k, h = routing.num_ranks, routing.num_topk, routing.hidden
    columns = (h, k, h, h)
    inputs = [t for seed, c in enumerate(columns) for t in every_rank(partial(routing.floats, seed=seed, columns=c), n)]
    topk_idx = routing.topk_idx(rank)

    def body(x, weights, bias0, bias1):
        # Nonlinear in the rows, so that the gradient depends on where each row came from.
        act = lambda rows: rows * torch.sin(rows)  # noqa: E731
        return layer(form, buffer, routing.num_experts, expand, x, topk_idx, weights, (bias0, bias1), act)

    function = of_all_ranks(partial(gather), rank, n, body)
    if second:
        return torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    return torch.autograd.gradcheck(function, inputs, fast_mode=fast)


def in_threads(routing, form, expand, backend, second=False):
    board = Board(routing.num_ranks)

    def body(rank, buffer):
        return check_gradients(partial(board.gather, rank), rank, buffer, routing, form, expand, second)

    assert all(threads(routing, body, backend=backend))


@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, expand):
    in_threads(ROUTING, form, expand, "shm")


AWKWARD = {
    "one rank": Routing((3,), num_experts=4),
    "no token has an expert": Routing((2, 0, 1), choice="none"),
    "one expert has all": Routing((2, 0, 1), choice="hot"),
    "fewer experts than ranks": Routing((2, 1, 1), num_experts=2),
}


@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
@pytest.mark.parametrize("name", AWKWARD)
def test_gradcheck_of_awkward_routings(name, expand):
    for form in ("plan aligned", "one call async"):
        in_threads(AWKWARD[name], form, expand, "shm")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
def test_no_tokens_anywhere(expand, backend):
    routing = Routing((0, 0, 0), hidden=5)

    def body(rank, buffer):
        x = routing.floats(rank, 1, 5).requires_grad_()
        weights = routing.floats(rank, 2, 2).requires_grad_()
        out = layer("one call async", buffer, 7, expand, x, routing.topk_idx(rank), weights, x, torch.sin)
        out.sum().backward()
        return out.shape, x.grad.shape, weights.grad.shape

    assert threads(routing, body, backend=backend) == [((0, 5), (0, 5), (0, 2))] * 3


@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
def test_gradcheck_collective(expand):
    in_threads(Routing((2, 0), num_experts=4), "plan async aligned", expand, "collective")


@pytest.mark.parametrize("form", ["plan async aligned", "one call fixed"])
@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
def test_gradcheck_over_two_hops(form, expand):
    in_threads(Routing((2, 0, 3, 1), num_experts=5), form, expand, "hybrid")


@pytest.mark.parametrize("form", ["plan aligned", "one call async"])
@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
def test_second_derivatives(form, expand):
    in_threads(Routing((2, 1), num_experts=4), form, expand, "shm", second=True)


def check_in_process(group, routing, forms):
    buffer = ep.ElasticBuffer(group, num_max_tokens_per_rank=max(routing.num_tokens))
    for form in forms:
        for expand in (False, True):
            check_gradients(partial(gather_in_group, group), group.rank(), buffer, routing, form, expand, fast=True)


@pytest.mark.processes
def test_gradcheck_in_processes():
    run_processes(3, check_in_process, Routing((2, 0, 1)), ("plan", "one call async"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
def test_as_the_buffer_delivers(expand, dtype, backend):
    """The same rows and sums as ElasticBuffer's, forth and back, in every dtype; weights masked to their owner."""
    routing = Routing((5, 0, 3, 4), num_experts=6, hidden=40)

    def body(rank, buffer):
        x, weights = routing.floats(rank, 1, 40, dtype), routing.floats(rank, 2, 2, torch.float32)
        topk_idx = routing.topk_idx(rank)
        num = routing.num_experts
        recv_x, recv_idx, recv_weights, handle, _ = buffer.dispatch(
            x, topk_idx, weights, num_experts=num, do_expand=expand
        )
        y = recv_x * 3
        combined, _, _ = buffer.combine(y, handle)
        g = routing.floats(rank, 3, 40, dtype)
        back, _, _, _, _ = buffer.dispatch(g, handle=handle, do_expand=expand)
        grad_x, _, _ = buffer.combine(back * 3, handle)
        if not expand:
            recv_weights = torch.where(recv_idx >= 0, recv_weights, 0.0)

        for form in ("plan", "one"):
            leaf = x.clone().requires_grad_()
            if form == "plan":
                plan = ep.plan(topk_idx, buffer, num, expand=expand)
                got_x, got_weights = ep.dispatch(leaf, weights, plan)
            else:
                got_x, got_weights, plan = ep.plan_and_dispatch(leaf, topk_idx, weights, buffer, num, expand=expand)
            out = ep.combine(got_x * 3, plan)
            out.backward(g)
            assert torch.equal(got_x, recv_x)
            assert torch.equal(got_weights, recv_weights)
            assert torch.equal(out, combined)
            assert torch.equal(leaf.grad, grad_x)
            assert out.dtype == dtype
            counts = handle.num_unaligned_recv_tokens_per_expert
            assert torch.equal(plan.num_recv_tokens_per_expert, counts)
            if expand:
                local = torch.repeat_interleave(torch.arange(len(counts)), counts.long())
                assert torch.equal(plan.recv_topk_idx, local[:, None])
                assert torch.equal(plan.expert_offsets, counts.cumsum(0, dtype=torch.int32))
            else:
                assert torch.equal(plan.recv_topk_idx, recv_idx)

    threads(routing, body, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gaps_and_tails_are_zero(backend):
    """A gradient that sums over rows finds nothing where no row is, forth and back."""
    routing = Routing((3, 2), num_experts=5, hidden=33)

    def body(rank, buffer):
        # Memory that was used before, so that what is not written shows.
        for _ in range(2):
            junk = [buffer.empty((64, 33), torch.float32).fill_(float("nan")) for _ in range(4)]
            del junk
            for sync in (True, False):
                x = routing.floats(rank, 1, 33, torch.float32).requires_grad_()
                weights = routing.floats(rank, 2, 2, torch.float32)
                args = (x, routing.topk_idx(rank), weights, buffer, 5)
                rows, recv_weights, plan = ep.plan_and_dispatch(
                    *args, expand=True, expert_alignment=4, do_cpu_sync=sync
                )
                valid = plan.recv_topk_idx[:, 0] >= 0
                assert int(valid.sum()) == int(plan.num_recv_tokens_per_expert.sum())
                assert (~valid).any()
                y = rows.detach().clone().requires_grad_()
                ep.combine(y, plan).sum().backward()
                for tensor in (rows.detach(), recv_weights[:, None], y.grad):
                    assert torch.count_nonzero(tensor[~valid]) == 0
                    assert not tensor.isnan().any()
                assert (y.grad[valid] == 1).all()

    threads(routing, body, backend=backend)


def test_half_weights_travel_as_float32():
    def body(rank, buffer):
        weights = ROUTING.floats(rank, 2, 2, torch.bfloat16).requires_grad_()
        x, topk_idx = ROUTING.floats(rank, 1, 8, torch.bfloat16), ROUTING.topk_idx(rank)
        _rows, recv_weights, _plan = ep.plan_and_dispatch(x, topk_idx, weights, buffer, 7, expand=True)
        assert recv_weights.dtype == torch.float32
        (recv_weights * 2).sum().backward()
        assert torch.equal(weights.grad, torch.where(topk_idx >= 0, 2.0, 0.0).bfloat16())

    threads(ROUTING, body)


def test_without_weights_and_without_gradients():
    def body(rank, buffer):
        x, topk_idx = torch.arange(float(ROUTING.num_tokens[rank]))[:, None].expand(-1, 3), ROUTING.topk_idx(rank)
        rows, none, plan = ep.plan_and_dispatch(x, topk_idx, None, buffer, 7)
        assert none is None
        assert not rows.requires_grad
        pending = ep.dispatch(x, None, plan, async_finish=True)
        again, none = pending.wait()
        assert none is None
        assert torch.equal(rows, again)
        bytes_, _ = ep.dispatch(x.to(torch.uint8), None, plan)  # any dtype travels
        assert torch.equal(bytes_, rows.to(torch.uint8))
        owners = (plan.recv_topk_idx >= 0).any(1).sum()
        assert int(owners) == plan.num_rows

    threads(ROUTING, body)


def test_two_layers_in_flight_and_a_handle_used_twice():
    """Handles are outstanding together, used in any order and more than once; gradients add up."""

    def body(rank, buffer):
        x = ROUTING.floats(rank, 1, 6).requires_grad_()
        topk_idx = ROUTING.topk_idx(rank)
        first = ep.plan(topk_idx, buffer, 7, expand=True)
        second = ep.plan(topk_idx.flip(1), buffer, 7)
        a, _ = ep.dispatch(x, None, first)
        b = ep.dispatch(x * 2, None, second, async_finish=True)
        c, _ = ep.dispatch(x * 3, None, first)  # before the first is combined
        from_c = ep.combine(c * c, first, async_finish=True)
        from_b = ep.combine(b.wait()[0] ** 2, second)
        from_a = ep.combine(a * a, first)
        out = from_a + from_b + from_c.wait()
        slots = (topk_idx >= 0).sum(1, keepdim=True)
        owners = ep.combine(torch.ones(second.num_rows, 1, dtype=torch.float64), second)
        torch.testing.assert_close(out, x * x * (slots * (1 + 9) + owners * 4), rtol=1e-12, atol=1e-12)
        out.sum().backward()
        torch.testing.assert_close(x.grad, 2 * x * (slots * (1 + 9) + owners * 4), rtol=1e-12, atol=1e-12)

    threads(ROUTING, body)


def test_unused_outputs_still_take_part():
    """A rank whose rows do not enter its loss sends zeros, so that the other ranks get theirs."""

    def body(rank, buffer):
        x = ROUTING.floats(rank, 1, 4).requires_grad_()
        weights = ROUTING.floats(rank, 2, 2).requires_grad_()
        rows, recv_weights, _plan = ep.plan_and_dispatch(x, ROUTING.topk_idx(rank), weights, buffer, 7, expand=True)
        loss = recv_weights.sum() if rank == 1 else rows.sum()
        loss.backward()
        owner = torch.where(ROUTING.topk_idx(rank) >= 0, _owner_of(ROUTING.topk_idx(rank)), -1)
        torch.testing.assert_close(weights.grad, (owner == 1).double())
        torch.testing.assert_close(x.grad, ((owner >= 0) & (owner != 1)).sum(1, keepdim=True).double().expand(-1, 4))

    threads(ROUTING, body)


def _owner_of(topk_idx):
    return torch.tensor([0, 0, 0, 1, 1, 2, 2])[topk_idx.clamp(min=0)]
