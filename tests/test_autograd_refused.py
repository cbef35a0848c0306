"""What the ops refuse: on every rank, by name, and the buffer goes on."""

from __future__ import annotations

import gc

import pytest
import torch
from autograd_world import Routing, threads

import deep_ep_py as ep

ROUTING = Routing((3, 2, 4), num_experts=6, hidden=4)


def works(rank, buffer):
    x = ROUTING.floats(rank, 1, 4).requires_grad_()
    rows, _, plan = ep.plan_and_dispatch(x, ROUTING.topk_idx(rank), None, buffer, 6)
    ep.combine(rows, plan).sum().backward()
    assert x.grad is not None


def refused(rank, buffer, at, call, bad, match):
    """``call(bad)`` on rank ``at``, ``call(None)`` elsewhere: all raise, and the buffer works afterwards."""
    with pytest.raises(ep.EPArgumentError, match=match) as error:
        call(bad if rank == at else None)
    if rank != at:
        assert error.value.ranks == (at,)
    works(rank, buffer)


@pytest.mark.parametrize("backend", ["shm", "collective"])
def test_wrong_shapes_dtypes_and_values(backend):
    def body(rank, buffer):
        idx = ROUTING.topk_idx(rank)
        x = ROUTING.floats(rank, 1, 4)
        n = len(x)
        plan = ep.plan(idx, buffer, 6)

        def go(name, match):
            def call(bad):
                given = {
                    "topk_idx": idx,
                    "x": x,
                    "topk_weights": None,
                    "y": torch.zeros(plan.num_rows, 4).double(),
                    "bias": None,
                }
                if bad is not None:
                    given[name] = bad
                if name == "topk_idx":
                    ep.plan(given["topk_idx"], buffer, 6)
                elif name in ("x", "topk_weights"):
                    ep.dispatch(given["x"], given["topk_weights"], plan)
                else:
                    ep.combine(given["y"], plan, bias=given["bias"])

            return lambda bad: refused(rank, buffer, 1, call, bad, match)

        go("topk_idx", "topk_idx: expected torch.int64")(idx.int())
        go("topk_idx", r"topk_idx(\[0, .\])?: expected .*, got 6")(torch.full_like(idx, 6))
        go("x", f"x: expected {ROUTING.num_tokens[1]} tokens")(torch.zeros(n + 1, 4).double())
        go("x", "x: expected a tensor of two dimensions")(torch.zeros(n, 2, 2).double())
        go("topk_weights", "topk_weights: expected torch.float32")(torch.zeros(n, 3))
        go("topk_weights", "topk_weights: expected torch.float32")(torch.zeros(n, 2, dtype=torch.int32))
        go("y", "x: expected .* rows, as dispatch delivered")(torch.zeros(plan.num_rows + 1, 4).double())
        go("y", "x: expected one of")(torch.zeros(plan.num_rows, 4, dtype=torch.int32))
        go("bias", "bias: expected torch.float64")(torch.zeros(n + 1, 4).double())

    threads(ROUTING, body, backend=backend)


HEADER = 16  # words before the counts; csrc/protocol/packed_plan.hpp


@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
def test_a_damaged_plan(expand):
    """Whatever it says, nothing outside the blocks is touched: refused, or the buffer is given up in words."""

    def body(rank, buffer):
        good = ep.plan(ROUTING.topk_idx(rank), buffer, 6, expand=expand)
        x, weights = ROUTING.floats(rank, 1, 4), ROUTING.floats(rank, 2, 2, torch.float32)
        edits = {"alignment": (11, 0), "rows": (7, 0), "layout": (1, 0), "tokens": (2, 2**31), "ranks": (4, 0)}
        edits |= {"negative count": (HEADER + 5, -1), "other layout": (1, 1 if expand else 2)}
        for name, (word, value) in edits.items():
            if name == "rows" and not expand:
                continue  # compact plans carry no second word on it; `place` looks at the blocks
            packed = good.packed.clone()
            packed[word] = value
            bad = good._replace(packed=packed)
            refused(
                rank, buffer, 1, lambda b: ep.dispatch(x, weights, b or good), bad, "handle: expected|no plan|plan of a"
            )
            refused(rank, buffer, 1, lambda b: ep.combine(torch.zeros(good.num_rows, 4), b or good), bad, "plan|layout")

    threads(ROUTING, body)


@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
def test_targets_that_name_rows_that_are_not_there(expand):
    def body(rank, buffer):
        plan = ep.plan(ROUTING.topk_idx(rank), buffer, 6, expand=expand, do_cpu_sync=False)
        packed = plan.packed.clone()
        targets = packed[-plan.num_tokens * plan.num_topk :]
        if rank == 1:
            targets[targets >= 0] += 1 << 20
        x, weights = ROUTING.floats(rank, 1, 4), ROUTING.floats(rank, 2, 2, torch.float32)
        with pytest.raises(ep.EPError, match="has no such row"):
            ep.dispatch(x, weights, plan._replace(packed=packed))
        with pytest.raises(ep.EPError):
            ep.dispatch(x, weights, plan)  # given up: peers counted on the rows

    threads(ROUTING, body)


def test_a_layout_that_is_not_the_plan_s():
    def body(rank, buffer):
        plan = ep.plan(ROUTING.topk_idx(rank), buffer, 6)
        x = ROUTING.floats(rank, 1, 4)
        other = plan._replace(expand=True)
        refused(
            rank,
            buffer,
            0,
            lambda b: ep.dispatch(x, None, b or plan),
            other,
            "handle: expected one whose plan is expanded",
        )

    threads(ROUTING, body)


@pytest.mark.parametrize("go", [{}, {"async_finish": True}], ids=["sync", "async"])
def test_a_bias_that_is_none(go):
    def body(rank, buffer):
        plan = ep.plan(ROUTING.topk_idx(rank), buffer, 6)
        x, y = ROUTING.floats(rank, 1, 4), torch.zeros(plan.num_rows, 4).double()
        wait = lambda found: found.wait() if go else found  # noqa: E731
        for bad, match in (
            ((x, x, x), "bias: expected None, a tensor or a pair"),
            ("zz", "bias: expected torch.float64"),
        ):
            refused(rank, buffer, 1, lambda b: wait(ep.combine(y, plan, b, **go)), bad, match)

    threads(ROUTING, body)


def test_an_alignment_that_no_kernel_wants():
    def body(rank, buffer):
        idx = ROUTING.topk_idx(rank)
        plan = lambda a: ep.plan(idx, buffer, 6, expand=True, expert_alignment=a or 1)  # noqa: E731
        refused(rank, buffer, 2, plan, 2**30, "expert_alignment: expected a whole number from 1 to 65536")

    threads(ROUTING, body)


def test_a_copied_module_shares_its_buffer():
    import copy
    import pickle

    def body(rank, buffer):
        layer = ep.nn.MoELayer(4, 8, 6, 2, buffer)
        twin = copy.deepcopy(layer)
        assert twin.buffer is buffer
        x = ROUTING.floats(rank, 1, 4, torch.float32)
        assert torch.equal(layer(x).output, twin(x).output)
        with pytest.raises(ep.EPError, match="cannot be pickled"):
            pickle.dumps(buffer)

    threads(ROUTING, body)


def test_a_handle_that_is_none():
    def body(rank, buffer):
        plan = ep.plan(ROUTING.topk_idx(rank), buffer, 6)
        x = ROUTING.floats(rank, 1, 4)
        short = plan._replace(packed=plan.packed[:-1].contiguous())
        garbage = plan._replace(packed=torch.arange(40))
        halves = plan._replace(packed=plan.packed.to(torch.int32))
        for bad, match in (
            (short, "its header tells of"),
            (garbage, "does not begin"),
            (halves, "contiguous torch.int64"),
        ):
            refused(rank, buffer, 2, lambda b: ep.dispatch(x, None, b or plan), bad, match)
        with pytest.raises(ep.EPArgumentError, match=r"handle: expected the PlanHandle of deep_ep_py\.plan, got tuple"):
            ep.dispatch(x, None, (1, 2))
        with pytest.raises(ep.EPArgumentError, match="buffer: expected an ElasticBuffer, got str"):
            ep.plan(ROUTING.topk_idx(rank), "buffer", 6)
        works(rank, buffer)

    threads(ROUTING, body)


@pytest.mark.parametrize("backend", ["shm", "collective"])
def test_handles_of_other_ranks_buffers_and_plans(backend):
    plans = {}

    def plan_only(rank, buffer):
        plans[buffer.num_ranks, rank] = ep.plan(ROUTING.topk_idx(rank), buffer, 6)

    threads(Routing((3, 2), num_experts=6), plan_only, backend=backend)

    def body(rank, buffer):
        x = ROUTING.floats(rank, 1, 4)
        mine = ep.plan(ROUTING.topk_idx(rank), buffer, 6)
        plans[3, rank] = mine
        buffer.barrier()
        # Made for another number of ranks; its own buffer is gone by now.
        other = plans[2, rank % 2]
        with pytest.raises(
            ep.EPArgumentError, match=r"handle: expected one made by rank . of 3, got one of rank . of 2"
        ):
            ep.dispatch(x, None, other, buffer=buffer)
        works(rank, buffer)
        # A peer's.
        refused(
            rank, buffer, 0, lambda b: ep.dispatch(x, None, b or mine, buffer=buffer), plans[3, 1], "of rank 1 of 3"
        )
        # Ranks use different plans.
        other = ep.plan(ROUTING.topk_idx(rank).flip(1), buffer, 6)  # of equal counts
        with pytest.raises(ep.EPMismatchError, match="handle"):
            ep.dispatch(x, None, other if rank == 1 else mine)
        works(rank, buffer)

    threads(ROUTING, body, backend=backend)


def test_another_buffer_over_the_same_ranks():
    """A buffer may be replaced before the backward pass; the plan goes on with the new one."""

    def body(rank, buffer):
        x = ROUTING.floats(rank, 1, 4).requires_grad_()
        plan = ep.plan(ROUTING.topk_idx(rank), buffer, 6)
        second = ep.ElasticBuffer(buffer.group, num_max_tokens_per_rank=4)
        rows, _ = ep.dispatch(x, None, plan, buffer=second)
        ep.combine(rows, plan, buffer=second).sum().backward()
        assert x.grad is not None

    threads(ROUTING, body)


def test_what_only_a_given_buffer_can_tell_the_peers():
    """A handle that is none names no buffer. Statistics are added to when rows have arrived, which is too late."""

    def body(rank, buffer):
        idx = ROUTING.topk_idx(rank)
        x = ROUTING.floats(rank, 1, 4)
        plan = ep.plan(idx, buffer, 6)
        refused(rank, buffer, 1, lambda bad: ep.dispatch(x, None, bad or plan, buffer=buffer), "none", "handle")
        y = torch.zeros(plan.num_rows, 4)
        refused(rank, buffer, 1, lambda bad: ep.combine(y, bad or plan, buffer=buffer), "none", "handle")
        with torch.inference_mode():
            made_in_inference_mode = torch.zeros(2, dtype=torch.int32)
        for bad in (torch.zeros(1, dtype=torch.int32).expand(2), made_in_inference_mode):
            counted = torch.zeros(2, dtype=torch.int32)

            def dispatch(stats, counted=counted):
                stats = counted if stats is None else stats
                buffer.dispatch(x, idx, None, stats, num_experts=6)

            refused(rank, buffer, 1, dispatch, bad, "cumulative_local_expert_recv_stats")
            assert not counted.any()

    threads(ROUTING, body)


def test_a_buffer_that_is_gone():
    def body(rank, buffer):
        x = ROUTING.floats(rank, 1, 4).requires_grad_()
        group = buffer.group
        short_lived = ep.ElasticBuffer(group, num_max_tokens_per_rank=4)
        rows, _, plan = ep.plan_and_dispatch(x, ROUTING.topk_idx(rank), None, short_lived, 6)
        short_lived.destroy()
        with pytest.raises(ep.EPError, match=r"destroyed|closed"):
            ep.dispatch(x, None, plan)
        with pytest.raises(ep.EPArgumentError, match="buffer: expected a buffer that is not destroyed"):
            ep.nn.MoELayer(4, 4, 6, 2, short_lived)
        del short_lived
        gc.collect()
        with pytest.raises(ep.EPArgumentError, match="one whose buffer is gone"):
            ep.dispatch(x, None, plan)
        with pytest.raises(ep.EPArgumentError, match="one whose buffer is gone"):
            rows.sum().backward()

    threads(ROUTING, body)


def test_waiting_twice_or_for_nothing():
    def body(rank, buffer):
        x = ROUTING.floats(rank, 1, 4).requires_grad_()
        plan = ep.plan(ROUTING.topk_idx(rank), buffer, 6)
        pending = ep.dispatch(x, None, plan, async_finish=True)
        stray = pending._replace(ticket=torch.zeros(1, dtype=torch.float64))
        with pytest.raises(ep.EPArgumentError, match="ticket: expected that of an operation of this buffer"):
            stray.wait()
        rows, _ = pending.wait()
        same, _ = pending.wait()
        assert torch.equal(rows, same)
        # Both in one graph: the gradients would have to travel twice, in a ticket that holds one.
        with pytest.raises(ep.EPArgumentError, match=r"ticket: .*waited for once"):
            (rows.sum() + same.sum()).backward()
        buffer.barrier()
        works(rank, buffer)

    threads(ROUTING, body)


def test_a_dropped_operation_holds_nothing():
    """An operation that nobody waits for (a recomputation that stopped early) gives its memory back."""

    def body(rank, buffer):
        x = torch.zeros(ROUTING.num_tokens[rank], 1 << 16)
        plan = ep.plan(ROUTING.topk_idx(rank), buffer, 6)
        for _ in range(20):
            ep.dispatch(x, None, plan, async_finish=True)
            buffer.barrier()
        return buffer.statistics().held_bytes, x.numel() * 4

    for held, one in threads(ROUTING, body):
        assert held < 6 * one
