"""What compilers do to exchanges: their order, the life of what they read, recomputation, and methods of buffers."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import deep_ep_py as ep
from deep_ep_py import traced
from deep_ep_py.communicator import thread_world
from deep_ep_py.event import EventHandle, EventOverlap
from deep_ep_py.testing.worlds import run_processes, run_threads

HIDDEN, EXPERTS = 64, 4
SAVE_PLAN = {"context_fn": partial(create_selective_checkpoint_contexts, [torch.ops.deep_ep_py.plan.default])}


@pytest.fixture(autouse=True)
def nothing_cached():
    """Graphs on disk are of whatever version of the operators they were compiled with."""
    import torch._functorch.config
    import torch._inductor.config

    with torch._functorch.config.patch(enable_autograd_cache=False), torch._inductor.config.patch(fx_graph_cache=False):
        yield


class Top1(nn.Module):
    """A layer whose weights are applied before the dispatch, beside a dense one: much that may be reordered."""

    def __init__(self, buffer, rank=0, num_ranks=1):
        super().__init__()
        self.buffer, self.first = buffer, rank * (EXPERTS // num_ranks)
        self.norm, self.gate = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up, self.down = (nn.Parameter(torch.randn(EXPERTS, HIDDEN)) for _ in range(2))
        self.shared = nn.Sequential(nn.Linear(HIDDEN, 256), nn.SiLU(), nn.Linear(256, HIDDEN))

    def forward(self, x):
        n = self.norm(x)
        weights, topk_idx = self.gate(n).sigmoid().topk(1)
        plan = ep.plan(topk_idx, self.buffer, EXPERTS, expand=True)
        rows, _ = ep.dispatch(n * weights, None, plan)
        expert = plan.recv_topk_idx[:, 0] + self.first
        return x + ep.combine(torch.relu(rows * self.up[expert]) * self.down[expert], plan) + self.shared(n)


class Log:
    """The exchanges of one rank's buffers, in the order in which they run."""

    def __init__(self, *buffers):
        self.seen = []
        for i, buffer in enumerate(buffers):
            engine = buffer._engine
            for name in ("dispatch", "combine"):
                setattr(engine, name, self._watch(i, name, getattr(engine, name)))

    def _watch(self, i, name, call):
        def watched(spec, **options):
            rows = spec.x if name == "dispatch" else spec.y
            moves = name if rows.shape[1] else "plan"
            self.seen.append((i, moves, getattr(spec, "carries", None)))
            return call(spec, **options)

        return watched

    def of(self, run):
        self.seen.clear()
        run()
        return list(self.seen)


def alone(num_tokens=4096):
    return ep.ElasticBuffer(thread_world(1)[0], num_max_tokens_per_rank=num_tokens)


def a_step(body, num_tokens):
    x = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(num_tokens)).requires_grad_()
    body(x).square().mean().backward()
    return x.grad


ROWS, GRADIENTS = "rows", "gradients of rows"
FORTH = [("plan", ROWS), ("dispatch", ROWS), ("combine", ROWS)]
BACK = [("dispatch", GRADIENTS), ("combine", GRADIENTS)]


def test_the_order_of_a_program():
    """Two layers, each with a buffer of its own, forth and back; and what an exchange says that it carries."""
    buffers = alone(), alone()
    torch.manual_seed(0)
    layers = nn.Sequential(*(Top1(buffer) for buffer in buffers))
    log = Log(*buffers)
    program = [(i, *e) for i in (0, 1) for e in FORTH] + [(i, *e) for i in (1, 0) for e in BACK]
    assert log.of(lambda: a_step(layers, 12)) == program
    for form in ("one graph", "a graph each", "a break between"):
        torch._dynamo.reset()
        if form == "one graph":
            body = torch.compile(layers, fullgraph=True, backend="aot_eager")
        elif form == "a graph each":
            body = nn.Sequential(*(torch.compile(layer, fullgraph=True, backend="aot_eager") for layer in layers))
        else:

            def broken(x):
                y = layers[0](x)
                torch._dynamo.graph_break()
                return layers[1](y)

            body = torch.compile(broken, backend="aot_eager")
        for num_tokens in (12, 300):
            got = []
            assert log.of(lambda n=num_tokens, body=body, got=got: got.append(a_step(body, n))) == program, form
            torch.testing.assert_close(got[0], a_step(layers, num_tokens))


def test_the_order_of_checkpointed_programs():
    """Inductor's order is the same for few tokens and for many, where a region's exchanges are run again."""
    buffer = alone()
    torch.manual_seed(0)
    layers = Top1(buffer), Top1(buffer)
    log = Log(buffer)

    def region(x, **options):
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False, **options)
        return x

    def steps(options, backend, num_tokens):
        torch._dynamo.reset()
        eager = partial(region, **options)
        compiled = torch.compile(eager, fullgraph=True, backend=backend)
        got = []
        seen = log.of(lambda: got.append(a_step(compiled, num_tokens)))
        torch.testing.assert_close(got[0], a_step(eager, num_tokens), rtol=1e-4, atol=1e-6)
        return [exchange for _, *exchange in map(tuple, seen)]

    plan, dispatch, _ = map(list, FORTH)
    back = [list(e) for e in BACK]
    # A region's dispatch is run again for the backward pass of its experts, and its plan where that was not saved.
    assert steps(SAVE_PLAN, "aot_eager", 12) == 2 * [list(e) for e in FORTH] + 2 * [back[0], dispatch, back[1]]
    expected = 2 * [list(e) for e in FORTH] + 2 * [plan, back[0], dispatch, back[1]]
    assert [steps({}, "inductor", n) for n in (12, 4096)] == [expected] * 2


def equal_programs(group):
    """12 tokens and 4096 in one step, compiled by inductor: gradients are those of the eager program."""
    rank = group.rank()
    buffer = ep.ElasticBuffer(group, num_max_tokens_per_rank=4096, num_cpu_timeout_secs=200)
    torch.manual_seed(0)
    layers = Top1(buffer, rank, 2), Top1(buffer, rank, 2)

    def region(x):
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False, **SAVE_PLAN)
        return x

    found = [a_step(body, (12, 4096)[rank]) for body in (region, torch.compile(region, fullgraph=True))]
    return float((found[0] - found[1]).abs().max() / found[0].abs().max())


@pytest.mark.processes
@pytest.mark.timeout(240)
def test_ranks_with_few_and_with_many_tokens():
    assert max(run_processes(2, equal_programs, timeout_seconds=220)) < 1e-4


def test_no_memory_budget_recomputes_exchanges():
    """Unless the user checkpoints the region."""
    import torch._functorch.config

    buffer = alone()
    torch.manual_seed(0)
    layers = nn.Sequential(Top1(buffer), ep.nn.MoELayer(HIDDEN, 8, EXPERTS, 2, buffer), Top1(buffer))
    log = Log(buffer)

    def body(x):
        return layers[2](layers[1](layers[0](x)).output)

    expected = log.of(lambda: a_step(body, 300))
    assert len(expected) == 2 * len(FORTH + BACK) + 4
    for budget in (0.0, 0.1):
        torch._dynamo.reset()
        with torch._functorch.config.patch(activation_memory_budget=budget):
            compiled = torch.compile(body, fullgraph=True, backend="aot_eager")
            assert log.of(lambda compiled=compiled: a_step(compiled, 300)) == expected


class Late:
    """A completion of an operation that reads its inputs only when it is waited for."""

    def __init__(self, again):
        self._again = again

    def done(self):
        return False

    def wait(self):
        self._again()


def read_late(engine):
    """Started operations of ``engine`` read their inputs as late as they may."""

    def late(call, delivered):
        def run(spec, *, background, previous):
            found, event = call(spec, background=False, previous=previous)
            if not background:
                return found, event
            tensors = [t for t in delivered(found) if t is not None]
            for tensor in tensors:
                tensor.fill_(float("nan"))

            def again():
                repeated, _ = call(spec, background=False, previous=previous)
                for tensor, new in zip(tensors, (t for t in delivered(repeated) if t is not None), strict=True):
                    tensor.copy_(new)

            return found, EventOverlap(EventHandle(Late(again)))

        return run

    engine.dispatch = late(engine.dispatch, lambda got: (got.recv_x, got.recv_topk_weights))
    engine.combine = late(engine.combine, lambda got: (got.combined_x, got.combined_topk_weights))


def test_inputs_of_started_operations_outlive_them():
    """Forth and back; dispatch and combine; between start and wait a compiler needs memory of the same size."""
    tokens = 256
    buffer = alone(tokens)
    read_late(buffer._engine)
    torch.manual_seed(0)
    plan = ep.plan(torch.arange(tokens)[:, None] % EXPERTS, buffer, EXPERTS)
    dense = [torch.randn(HIDDEN, HIDDEN) / 8 for _ in range(4)]

    def beside(x):
        return ((x.tanh() @ dense[0]).tanh() @ dense[1]).tanh()

    def body(x, weights):
        pending = ep.dispatch(x @ dense[2], weights * 2, plan, async_finish=True)
        y = beside(x)
        rows, recv_weights = pending.wait()
        pending = ep.combine((rows * recv_weights) @ dense[3], plan, async_finish=True)
        z = beside(y)
        return pending.wait().tanh() + z

    def step(run):
        gen = torch.Generator().manual_seed(1)
        x, w = (torch.randn(tokens, n, generator=gen).requires_grad_() for n in (HIDDEN, 1))
        out = run(x, w)
        out.square().sum().backward()
        return out.detach(), x.grad, w.grad

    torch._dynamo.reset()
    for got, expected in zip(step(torch.compile(body, fullgraph=True)), step(body), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_torch_that_is_too_old(monkeypatch):
    monkeypatch.setattr(traced, "COMPILES_FROM", "99.1")
    buffer = alone()
    body = torch.compile(Top1(buffer), fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"cannot be compiled with torch .*Use torch 99\.1 or later"):
        body(torch.randn(4, HIDDEN))
    Top1(buffer)(torch.randn(4, HIDDEN))


def test_methods_of_buffers_are_not_traced():
    """One graph break each, without a warning; the frames around are compiled, none of the library is."""
    from torch._dynamo.testing import CompileCounter
    from torch._dynamo.utils import counters

    v1, v2 = ep.Buffer(thread_world(1)[0]), alone()
    topk_idx, weights = torch.arange(10).view(5, 2) % EXPERTS, torch.ones(5, 2)

    def with_v2(x):
        rows, _, _, handle, _ = v2.dispatch(x.sin(), topk_idx, weights, num_experts=EXPERTS)
        return v2.combine(rows.cos(), handle)[0] + 1

    def with_v1(x):
        y = x.sin()
        per_rank, _, per_expert, is_in_rank, _ = v1.get_dispatch_layout(topk_idx, EXPERTS)
        rows, _, _, _, handle, _ = v1.dispatch(y, None, per_rank, None, is_in_rank, per_expert, topk_idx, weights)
        return v1.combine(rows.cos(), handle)[0] + 1

    def in_background(x):
        rows, _, _, handle, event = v2.dispatch(
            x.sin(), topk_idx, weights, num_experts=EXPERTS, async_with_compute_stream=True
        )
        event.current_stream_wait()
        return v2.combine(rows.cos(), handle)[0] + 1

    for body, calls in ((with_v2, 2), (with_v1, 3), (in_background, 3)):
        torch._dynamo.reset()
        counters.clear()
        graphs = CompileCounter()
        x = torch.randn(5, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = torch.compile(body, backend=graphs)(x)
        assert torch.equal(got, body(x))
        assert sum(counters["graph_break"].values()) == calls, counters["graph_break"]
        assert counters["frames"]["total"] == calls + 1
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.ops\.deep_ep_py has what can be traced"):
            torch.compile(body, fullgraph=True)(x)


def swapped(communicator):
    """One rank runs the backward pass of a dispatch where the other runs a forward combine."""
    buffer = ep.ElasticBuffer(communicator, num_max_tokens_per_rank=8)
    plan = ep.plan(torch.arange(4)[:, None] % 2, buffer, 2)
    x = torch.randn(4, 8, requires_grad=True)
    rows, _ = ep.dispatch(x, None, plan)
    with pytest.raises(ep.EPMismatchError, match="gradients of rows") as caught:
        if communicator.rank:
            rows.sum().backward()
        else:
            ep.combine(rows.detach(), plan)
    ep.combine(rows.detach(), plan)
    return str(caught.value)


def test_a_swap_is_an_error():
    for text in run_threads(2, swapped):
        assert "compile" in text and "backward" in text
