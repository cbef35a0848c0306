"""Arguments that one rank alone gets wrong: every rank raises, names it, and the next call works."""

from __future__ import annotations

import pytest
import torch
from fault_world import SMALL, World, run_world, shm_settings, use

from deep_ep_py import Buffer, ElasticBuffer
from deep_ep_py.errors import EPArgumentError, EPError, EPMismatchError, EPPeerError
from deep_ep_py.layout import primary
from deep_ep_py.testing import Case, make_inputs, run_threads
from deep_ep_py.testing import conformance_v1 as v1
from deep_ep_py.testing import conformance_v2 as v2

RANKS, WRONG = SMALL.num_ranks, 1


def with_buffer(comm, body):
    rank = v1.rank_of(comm)
    buffer = Buffer(comm, settings=shm_settings(timeout_seconds=5))
    result = v1.dispatch(buffer, SMALL, rank)
    body(rank, buffer, result)
    use(buffer, rank, SMALL)
    v1.check_combine(buffer, SMALL, rank, result[4], 2)  # handles from before serve afterwards
    buffer.destroy()


def refused(comm, argument, wrong):
    """``wrong(buffer, arguments, result)`` makes the call on the rank at fault; its peers make the right one."""

    def body(rank, buffer, result):
        for _ in range(2):  # also twice in a row
            with pytest.raises(EPArgumentError) as caught:
                if rank == WRONG:
                    wrong(rank, buffer, result)
                elif wrong in COMBINES:
                    buffer.combine(result[0], result[4])
                else:
                    v1.dispatch(buffer, SMALL, rank)
            assert argument in str(caught.value)
            if rank == WRONG:
                assert caught.value.argument.startswith(argument)
            else:
                assert caught.value.ranks == (WRONG,)

    with_buffer(comm, body)


def wrong_dispatch(**change):
    def call(rank, buffer, _):
        mine = make_inputs(SMALL)[rank]
        layout = v1.layout_arguments(buffer.get_dispatch_layout(mine.topk_idx, SMALL.num_experts))
        arguments = {"topk_idx": mine.topk_idx, "topk_weights": mine.topk_weights, **layout}
        x = mine.x
        for name, value in change.items():
            if name == "x":
                x = value(x)
            else:
                arguments[name] = value(arguments.get(name))
        buffer.dispatch(x, **arguments)

    return call


def combine_too_few(rank, buffer, result):
    buffer.combine(result[0][:-1], result[4])


def combine_integers(rank, buffer, result):
    buffer.combine(result[0].to(torch.int32), result[4])


def combine_no_handle(rank, buffer, result):
    buffer.combine(result[0], (1, 2))


COMBINES = (combine_too_few, combine_integers, combine_no_handle)


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("x", wrong_dispatch(x=lambda x: x[0])),
        ("topk_idx", wrong_dispatch(topk_idx=lambda t: t.to(torch.int32))),
        ("topk_weights", wrong_dispatch(topk_weights=lambda _: None)),
        ("num_tokens_per_rank", wrong_dispatch(num_tokens_per_rank=lambda n: n + 1)),
        ("num_tokens_per_expert", wrong_dispatch(num_tokens_per_expert=lambda n: n[:0])),
        ("is_token_in_rank", wrong_dispatch(is_token_in_rank=lambda m: m[:-1])),
        ("expert_alignment", wrong_dispatch(expert_alignment=lambda _: 0)),
        ("x", combine_too_few),
        ("x", combine_integers),
        ("handle", combine_no_handle),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_refused_on_every_rank(argument, wrong):
    run_threads(RANKS, refused, argument, wrong)


def no_such_expert(comm):
    rank = v1.rank_of(comm)
    mine = make_inputs(SMALL)[rank]
    buffer = ElasticBuffer(
        comm, settings=shm_settings(), num_max_tokens_per_rank=SMALL.num_max_tokens_per_rank, hidden=40
    )
    topk_idx = mine.topk_idx.clone()
    if rank == WRONG:
        topk_idx[3, 1] = SMALL.num_experts
    for _ in range(3):
        with pytest.raises(EPArgumentError, match=r"topk_idx\[3, 1\]") as caught:
            buffer.dispatch(mine.x, topk_idx=topk_idx, topk_weights=mine.topk_weights, num_experts=SMALL.num_experts)
        assert caught.value.argument == "topk_idx" if rank == WRONG else caught.value.ranks == (WRONG,)
    result = v2.dispatch(buffer, SMALL, v2.MODES[0], rank)
    v2.check_dispatched(result, v2.expected_dispatch(SMALL, v2.MODES[0])[rank], SMALL, v2.MODES[0], rank)
    buffer.destroy()


def test_expert_out_of_range():
    run_threads(RANKS, no_such_expert)


def row_beyond_the_weights(comm):
    """A handle that names a row which the output's rows would have room for, since blocks are rounded up, and its
    weights would not: nothing is written there."""
    case = Case((3, 4), hidden=1, num_topk=8, num_experts=16, dtype=torch.uint8)
    mine, buffer = make_inputs(case)[comm.rank], ElasticBuffer(comm, settings=shm_settings(timeout_seconds=5))
    handle = v2.dispatch(buffer, case, v2.MODES[0], comm.rank)[3]
    targets = handle._plan.targets
    if comm.rank == 0:
        token, slot = primary(targets).nonzero()[0].tolist()
        targets[token, slot] += 100
    with pytest.raises(EPError) as caught:
        buffer.dispatch(mine.x, handle=handle, topk_weights=mine.topk_weights)
        buffer.barrier()
    if comm.rank == 0:
        assert "it is not this dispatch's" in str(caught.value)
    else:
        assert isinstance(caught.value, EPPeerError) and caught.value.ranks == (0,)
    buffer.destroy()


def test_handle_with_a_row_beyond_the_weights():
    run_threads(2, row_beyond_the_weights)


def different_operations(comm):
    def body(rank, buffer, result):
        for _ in range(2):
            with pytest.raises(EPMismatchError) as caught:
                if rank == 0:
                    v1.dispatch(buffer, SMALL, rank)
                elif rank == 1:
                    buffer.combine(result[0], result[4])
                else:
                    buffer._engine.barrier()
            error = caught.value
            assert error.field == "operation"
            assert error.values == {0: "dispatch", 1: "combine", 2: "barrier"}
            assert all(word in str(error) for word in ("rank 0: dispatch", "rank 1: combine", "rank 2: barrier"))

    with_buffer(comm, body)


def test_different_operations():
    run_threads(RANKS, different_operations)


def different_arguments(comm, field, values, call):
    def body(rank, buffer, result):
        with pytest.raises(EPMismatchError) as caught:
            call(rank, buffer, result, values[rank])
        assert caught.value.field == field
        assert set(caught.value.values) == set(range(RANKS))
        if values[0] is not None and isinstance(values[0], int):
            assert caught.value.values == dict(enumerate(values))

    with_buffer(comm, body)


def dispatch_width(rank, buffer, _, hidden):
    wrong_dispatch(x=lambda x: x[:, :hidden])(rank, buffer, None)


def dispatch_dtype(rank, buffer, _, dtype):
    wrong_dispatch(x=lambda x: x.to(dtype))(rank, buffer, None)


def dispatch_alignment(rank, buffer, _, alignment):
    wrong_dispatch(expert_alignment=lambda _: alignment)(rank, buffer, None)


def combine_handle(rank, buffer, result, other):
    """Handles of two dispatches with one routing apart."""
    mine = make_inputs(SMALL)[rank]
    few = mine.topk_idx.clone()
    few[0] = -1
    layout = v1.layout_arguments(buffer.get_dispatch_layout(few, SMALL.num_experts))
    second = buffer.dispatch(mine.x, **layout, topk_idx=few, topk_weights=mine.topk_weights)
    used = second if other else result
    buffer.combine(used[0], used[4])


@pytest.mark.parametrize(
    ("field", "values", "call"),
    [
        ("hidden", (40, 40, 39), dispatch_width),
        ("dtype", (torch.float32, torch.bfloat16, torch.float32), dispatch_dtype),
        ("expert_alignment", (1, 2, 1), dispatch_alignment),
        ("handle", (None, True, None), combine_handle),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_different_arguments(field, values, call):
    run_threads(RANKS, different_arguments, field, values, call)


def between_processes(world: World):
    buffer = Buffer(world.group, settings=shm_settings())
    with pytest.raises(EPError) as caught:
        if world.rank == WRONG:
            wrong_dispatch(x=lambda x: x[0])(world.rank, buffer, None)
        else:
            v1.dispatch(buffer, SMALL, world.rank)
    use(buffer, world.rank, SMALL)
    return type(caught.value).__name__, str(caught.value), caught.value.ranks


@pytest.mark.processes
def test_refused_between_processes():
    for rank, said in enumerate(run_world(RANKS, between_processes)):
        kind, message, who = said.result
        assert kind == "EPArgumentError"
        assert "x: expected" in message
        assert rank == WRONG or (who == (WRONG,) and f"rank {WRONG}" in message)
