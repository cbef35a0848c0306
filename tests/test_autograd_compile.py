"""The ops under torch.library's checks, torch.compile(fullgraph=True) and activation checkpointing."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from autograd_world import Routing, layer, threads
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import deep_ep_py as ep
from deep_ep_py.communicator import thread_world
from deep_ep_py.testing.cases import settings_for
from deep_ep_py.testing.worlds import run_processes

ROUTING = Routing((3, 5), num_experts=6, hidden=8)


@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
def test_opcheck(expand):
    """Schemas, fake kernels, gradients' registration, and the traced program against the eager one."""
    routing = Routing((4,), num_experts=3, hidden=5)
    buffer = ep.ElasticBuffer(thread_world(1)[0], num_max_tokens_per_rank=6)
    ops, idx = torch.ops.deep_ep_py, routing.topk_idx(0)
    x = routing.floats(0, 1, 5).requires_grad_()
    weights = routing.floats(0, 2, 2).requires_grad_()
    n, check = buffer.number, torch.library.opcheck
    for sync in (True, False):
        check(ops.plan.default, (idx, n, 3, 2, None, expand, sync, "chunked"))
        for w in (weights, None):
            check(ops.plan_dispatch.default, (x, w, idx, n, 3, 2, 6, expand, sync, False, "chunked"))
        plan = ep.plan(idx, buffer, 3, expand=expand, expert_alignment=2, do_cpu_sync=sync)
        y = torch.randn(plan.num_rows, 5, dtype=torch.float64, requires_grad=True)
        at_rows = torch.randn(plan.num_rows, 2, dtype=torch.float64)[:, : 1 if expand else 2].squeeze(1)
        bias = routing.floats(0, 3, 5).requires_grad_()
        for w in (weights, None):
            check(ops.dispatch.default, (x, w, plan.packed, n, plan.num_rows, expand, False))
        for w in (at_rows.clone().requires_grad_(), None):
            for bias0, bias1 in ((None, None), (bias, None), (bias, bias.detach().clone().requires_grad_())):
                check(
                    ops.combine.default,
                    (y, w, plan.packed, bias0, bias1, n, 4, 2 if w is not None else 0, expand, False),
                )
    # An operation under way is state, which the traced program cannot share with the eager one, and the number of its
    # ticket differs from run to run: nothing that compares two runs.
    once = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    check(ops.dispatch.default, (x, weights, plan.packed, n, plan.num_rows, expand, True), **once)
    (ticket,) = ops.dispatch(x, weights, plan.packed, n, plan.num_rows, expand, True)
    shape = (plan.num_rows, 4, 5, torch.float64, 2, torch.float64)
    check(ops.finish.default, (ticket, plan.packed, None, None, x, weights, n, True, expand, *shape), **once)


def step(form, backend, buffer, routing, rank, expand, tokens=None):
    """Output and all gradients of a layer, compiled or not."""
    lin = torch.nn.Linear(8, 8)
    with torch.no_grad():
        lin.weight.copy_(torch.linspace(-1, 1, 64).view(8, 8))
        lin.bias.fill_(0.5)
    x, bias = (routing.floats(rank, s, 8, torch.float32)[:tokens].clone().requires_grad_() for s in (1, 3))
    weights = routing.floats(rank, 2, 2, torch.float32)[:tokens].clone().requires_grad_()
    topk_idx = routing.topk_idx(rank)[:tokens]

    def body(x, topk_idx, weights, bias):
        act = lambda rows: torch.tanh(lin(rows))  # noqa: E731
        return layer(form, buffer, routing.num_experts, expand, x, topk_idx, weights, bias, act)

    run = body if backend is None else torch.compile(body, fullgraph=True, backend=backend)
    out = run(x, topk_idx, weights, bias)
    (out * out).sum().backward()
    return [out.detach(), x.grad, weights.grad, bias.grad, lin.weight.grad, lin.bias.grad]


def compiled_as_eager(group, backend, cases, carrier="shm", without_tokens=(False, True)):
    """``carrier``: the buffer's backend. ``without_tokens``: whether rank 0 has none."""
    rank = group.rank()
    routing = Routing((0, 5), num_experts=6, hidden=8) if rank == 0 else ROUTING
    for zero_tokens in without_tokens:
        here = routing if zero_tokens else ROUTING
        settings = settings_for(carrier, rank, group.size())
        buffer = ep.ElasticBuffer(group, num_max_tokens_per_rank=8, backend=carrier, settings=settings)
        for form, expand in cases:
            torch._dynamo.reset()
            eager = step(form, None, buffer, here, rank, expand)
            compiled = step(form, backend, buffer, here, rank, expand)
            for a, b in zip(eager, compiled, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.processes
def test_compiled_over_two_hops():
    """A plan of two hops is as long as the tokens that a rank relays: a size that compilers do not know."""
    run_processes(2, compiled_as_eager, "aot_eager", (("plan", True), ("one call async", False)), "hybrid")


def compiled_for_changing_sizes(group):
    """Another number of tokens is no other program."""
    rank = group.rank()
    buffer = ep.ElasticBuffer(group, num_max_tokens_per_rank=16)
    routing = Routing((12, 12), num_experts=6, hidden=8)
    from torch._dynamo.testing import CompileCounter

    frames = CompileCounter()

    def body(x, topk_idx, weights):
        recv_x, recv_weights, plan = ep.plan_and_dispatch(x, topk_idx, weights, buffer, 6, expand=True)
        return ep.combine(recv_x.sin() * recv_weights[:, None], plan)

    compiled = torch.compile(body, fullgraph=True, backend=frames, dynamic=True)
    for tokens in (12, 7, 5, 9, 4):
        n = tokens + rank
        # Clones: a view's program depends on its base.
        whole = (routing.floats(rank, 1, 8), routing.topk_idx(rank), routing.floats(rank, 2, 2))
        args = [t[:n].clone() for t in whole]
        assert torch.equal(compiled(*args), body(*args))
    return frames.frame_count


def recomputed(rank, buffer, context, reentrant=False):
    """(rendezvous with counts, all rendezvous) of one step whose activations are recomputed, and its gradients."""
    lin = torch.nn.Linear(8, 8)
    torch.nn.init.constant_(lin.weight, 0.25)
    torch.nn.init.zeros_(lin.bias)
    x = ROUTING.floats(rank, 1, 8, torch.float32).requires_grad_()
    weights = ROUTING.floats(rank, 2, 2, torch.float32).requires_grad_()
    topk_idx = ROUTING.topk_idx(rank)

    def block(x, weights):
        act = lambda rows: torch.tanh(lin(rows)) * rows  # noqa: E731
        return x + layer("plan", buffer, 6, True, x, topk_idx, weights, None, act)

    before = buffer.statistics()
    if context == "kept":
        out = block(x, weights)
    else:
        options = {} if context is None else {"context_fn": context}
        out = checkpoint(block, x, weights, use_reentrant=reentrant, **options)
    (out * out).sum().backward()
    after = buffer.statistics()
    counts = after.rendezvous_with_counts - before.rendezvous_with_counts
    return (counts, after.operations - before.operations), [out.detach(), x.grad, weights.grad, lin.weight.grad]


SAVE_PLAN = partial(create_selective_checkpoint_contexts, [torch.ops.deep_ep_py.plan.default])
SAVE_NOTHING = partial(create_selective_checkpoint_contexts, [])


@pytest.mark.parametrize(
    ("context", "reentrant", "expected"),
    [
        # plan, dispatch, combine; then their two backward passes
        pytest.param("kept", False, (1, 5), id="kept"),
        # and, recomputed, all three (of a combine's output nothing is needed: without reentrance it stops before)
        pytest.param(None, True, (2, 8), id="full, reentrant"),
        pytest.param(None, False, (2, 7), id="full"),
        pytest.param(SAVE_NOTHING, False, (2, 7), id="selective, nothing saved"),
        # and, with the plan saved, no counts: the dispatch is a cached one
        pytest.param(SAVE_PLAN, False, (1, 6), id="selective, plan saved"),
    ],
)
def test_checkpointed(context, reentrant, expected):
    def body(rank, buffer):
        _, kept = recomputed(rank, buffer, "kept")
        seen, found = recomputed(rank, buffer, context, reentrant)
        for a, b in zip(kept, found, strict=True):
            assert torch.equal(a, b)
        return seen

    assert threads(ROUTING, body) == [expected] * 2


def compiled_and_checkpointed(group):
    """A compiled region with its plan saved exchanges counts once."""
    rank = group.rank()
    buffer = ep.ElasticBuffer(group, num_max_tokens_per_rank=8)
    x = ROUTING.floats(rank, 1, 8).requires_grad_()
    weights, topk_idx = ROUTING.floats(rank, 2, 2), ROUTING.topk_idx(rank)

    def block(x):
        act = lambda rows: torch.tanh(rows) * rows  # noqa: E731
        return x + layer("plan", buffer, 6, True, x, topk_idx, weights, None, act)

    def run(x, **options):
        return checkpoint(block, x, use_reentrant=False, **options).sum()

    seen = []
    block(x).sum().backward()
    eager, x.grad = x.grad, None
    for options in ({"context_fn": SAVE_PLAN}, {}):
        torch._dynamo.reset()
        before = buffer.statistics().rendezvous_with_counts
        torch.compile(run, fullgraph=True, backend="aot_eager")(x, **options).backward()
        seen.append(buffer.statistics().rendezvous_with_counts - before)
        torch.testing.assert_close(x.grad, eager)
        x.grad = None
    return seen


def with_aot_eager(group):
    cases = [(form, expand) for form in ("plan aligned", "one call async", "plan fixed") for expand in (True, False)]
    compiled_as_eager(group, "aot_eager", cases)
    return compiled_for_changing_sizes(group), compiled_and_checkpointed(group)


@pytest.mark.processes
@pytest.mark.timeout(240)
def test_compiled_fullgraph():
    """Forward and backward in one graph each; by ranks with and without tokens; sizes known and not; one program for
    many sizes; and the number of counts exchanged where a compiled region is recomputed, its plan saved or not."""
    assert run_processes(2, with_aot_eager, timeout_seconds=220) == [(1, [1, 2])] * 2


def with_inductor(group, folder):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # a new one: everything is compiled, but no kernel by both ranks
    compiled_as_eager(group, "inductor", [("plan", True)], without_tokens=(False,))
    # A rank without tokens, whose loss is a constant: its collectives serve the other rank all the same.
    torch._dynamo.reset()
    buffer = ep.ElasticBuffer(group, num_max_tokens_per_rank=8)
    torch.manual_seed(0)
    moe = ep.nn.MoELayer(16, 8, 4, 2, buffer, shared_width=8)
    x = torch.randn(5 * group.rank(), 16)
    y, aux_loss, _ = torch.compile(moe, fullgraph=True)(x)
    (y.square().sum() + aux_loss).backward()
    return buffer.statistics().operations


@pytest.mark.processes
@pytest.mark.timeout(240)
def test_compiled_by_inductor(tmp_path):
    # Dispatch and combine, and their backward passes: x needs no gradient, but the weights' come back with it.
    assert run_processes(2, with_inductor, str(tmp_path), timeout_seconds=220) == [4, 4]
