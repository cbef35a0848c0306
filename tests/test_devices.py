"""A buffer has one device. Tensors elsewhere are refused on every rank; and what the faces do to tensors that are not
on the CPU asks the device for nothing: shown on ``meta`` tensors, which have no values that could be asked for."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import deep_ep_py as ep
from deep_ep_py import _C, Buffer, ElasticBuffer, EPArgumentError, Settings, event, handle, layout, ops, plans
from deep_ep_py.communicator import thread_world
from deep_ep_py.event import EventOverlap
from deep_ep_py.nn import GroupedExperts, MoELayer, Router, RouterConfig
from deep_ep_py.plans import Plan
from deep_ep_py.testing import run_threads
from deep_ep_py.types import Combined, Dispatched, ExpertPlacement

META = torch.device("meta")
T, H, E, K, M = 12, 16, 5, 2, 20


def routing(rank, num_tokens=T):
    generator = torch.Generator().manual_seed(rank)
    idx = torch.rand(num_tokens, E, generator=generator).topk(K)[1]
    return torch.randn(num_tokens, H, generator=generator), idx, torch.rand(num_tokens, K, generator=generator)


# Refused on every rank ------------------------------------------------------------------------------------------------


def refused(comm, call, bad, name):
    """Rank 0 replaces one tensor by another device's; every rank raises."""
    given = {k: v.to(META) if comm.rank == 0 and k == bad else v for k, v in call.keywords.items()}
    with pytest.raises(EPArgumentError) as caught:
        call(given)
    assert name in str(caught.value) and "on cpu" in str(caught.value) and "on meta" in str(caught.value)


def call_of(fn, **keywords):
    made = lambda given: fn(**given)  # noqa: E731
    made.keywords = keywords
    return made


def v2_refuses(comm, backend):
    buffer = ElasticBuffer(comm, backend=backend, settings=Settings(timeout_seconds=20))
    x, idx, w = routing(comm.rank)
    stats = torch.zeros(ExpertPlacement.shares(E, 2)[comm.rank], dtype=torch.int32)

    def dispatch(sf=None, **more):
        x = more.pop("x")
        return buffer.dispatch(x if sf is None else (x, sf), num_experts=E, **more)

    call = call_of(dispatch, x=x, topk_idx=idx, topk_weights=w, cumulative_local_expert_recv_stats=stats)
    for bad in call.keywords:
        refused(comm, call, bad, bad)
    refused(comm, call_of(dispatch, x=x, sf=torch.ones(T, 1), topk_idx=idx), "sf", "x[1]")
    recv_x, _, recv_w, made, _ = call(call.keywords)
    refused(comm, call_of(buffer.dispatch, x=x, handle=made), "x", "x")
    back = call_of(buffer.combine, x=recv_x, handle=None, topk_weights=recv_w, bias=x)
    back.keywords["handle"] = SimpleNamespace(to=lambda _: made)
    for bad in ("x", "topk_weights", "bias"):
        refused(comm, call_of(lambda **k: buffer.combine(**k | {"handle": made}), **back.keywords), bad, bad)
    plan = ep.plan(idx, buffer, E)
    refused(comm, call_of(lambda topk_idx: ep.plan(topk_idx, buffer, E), topk_idx=idx), "topk_idx", "topk_idx")
    refused(comm, call_of(lambda x: ep.dispatch(x, w, plan), x=x), "x", "x")
    refused(comm, call_of(lambda y: ep.combine(y, plan), y=recv_x), "y", "x")
    moved = call_of(lambda packed: ep.dispatch(x, w, plan._replace(packed=packed)), packed=plan.packed)
    refused(comm, moved, "packed", "handle")
    assert buffer.combine(recv_x, made, topk_weights=recv_w)[0].device == buffer.device == torch.device("cpu")
    buffer.destroy()


def v1_refuses(comm, backend):
    buffer = Buffer(comm, backend=backend, settings=Settings(timeout_seconds=20))
    x, idx, w = routing(comm.rank)
    with pytest.raises(EPArgumentError, match=r"topk_idx.*on cpu.*on meta"):
        buffer.get_dispatch_layout(idx.to(META), E)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, E)
    counts = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}
    call = call_of(buffer.dispatch, x=x, topk_idx=idx, topk_weights=w, **counts)
    for bad in call.keywords:
        refused(comm, call, bad, bad)
    recv_x, _, recv_w, _, made, _ = call(call.keywords)
    refused(comm, call_of(lambda x: buffer.dispatch(x, handle=made), x=x), "x", "x")
    back = lambda **k: buffer.combine(handle=made, **k)  # noqa: E731
    for bad in ("x", "topk_weights", "bias"):
        refused(comm, call_of(back, x=recv_x, topk_weights=recv_w, bias=x), bad, bad)
    elsewhere = lambda last: buffer.combine(recv_x, (*made[:-1], last))  # noqa: E731
    refused(comm, call_of(elsewhere, last=made[-1]), "last", "handle")
    assert buffer.combine(recv_x, made)[0].device == buffer.device
    buffer.destroy()


@pytest.mark.parametrize("face", [v1_refuses, v2_refuses])
def test_refused_on_every_rank(face, backend):
    run_threads(2, face, backend)


# Pure parts, against the core's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_tokens", "num_experts", "num_ranks"), [(0, 3, 2), (31, 7, 3), (64, 2, 5), (9, 1, 1)])
def test_layout_on_device(num_tokens, num_experts, num_ranks):
    placement = ExpertPlacement.of(num_experts, num_ranks)
    idx = torch.randint(-1, num_experts, (num_tokens, 4), generator=torch.Generator().manual_seed(num_tokens))
    want = layout.dispatch_layout(idx, placement, num_ranks)
    wild = torch.where(idx < 0, torch.tensor([-1, num_experts, -(10**12), 10**12]), idx)
    for given in (idx, wild):
        got = layout.layout_on_device(given, placement.rank, num_ranks)
        for g, w in zip(got, want, strict=True):
            assert g.dtype == w.dtype and g.is_contiguous() and torch.equal(g, w)
    nowhere = layout.layout_on_device(idx.to(META), placement.rank.to(META), num_ranks)
    assert [(t.shape, t.device) for t in nowhere] == [(w.shape, META) for w in want]


def v1_handles(comm):
    buffer = Buffer(comm)
    x, idx, w = routing(comm.rank, num_tokens=(0, 9, 14)[comm.rank])
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, E)
    made = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, idx, w)[4]
    prefix, _, _, recv_src_idx, _, send_head = made
    assert torch.equal(handle.heads_of(in_rank), send_head)
    want = handle.unpack_v1(made, comm.rank, 3, torch.device("cpu"))
    none = (prefix, *made[1:3], recv_src_idx, in_rank[:0], send_head[:0])
    empty = handle.unpack_v1(none, comm.rank, 3, torch.device("cpu"))
    assert empty.num_tokens == 0 and empty.digest == want.digest
    got = handle.plan_from_heads(empty, prefix, send_head)
    assert got[1:] == want._replace(recv_src_idx=None)[1:]
    assert torch.equal(got.targets, want.targets) and torch.equal(got.rank_prefix, want.rank_prefix)
    buffer.destroy()


def test_v1_handles_by_torch_are_those_of_the_core():
    run_threads(3, v1_handles)


def packed_plan():
    buffer = ElasticBuffer(thread_world(1)[0])
    return ep.plan(routing(0)[1], buffer, E, expand=True, expert_alignment=4).packed


def test_a_header_is_read_from_a_copy_of_itself():
    packed = packed_plan()
    host = plans._header_on_host(packed)
    assert Plan(packed, *_C.read_plan(host.data_ptr(), host.numel()))[1:] == Plan.of(packed)[1:]
    words = [*range(_C.plan_header_words), _C.plan_header_words - 1]
    for word, value in itertools.product(words[2:], (-1, 0, 2**40)):
        bad = packed.clone()
        bad[word] = value
        host = plans._header_on_host(bad)
        try:
            want = Plan.of(bad)[1:]
        except EPArgumentError:
            with pytest.raises(EPArgumentError):
                _C.read_plan(host.data_ptr(), host.numel())
        else:
            assert Plan(bad, *_C.read_plan(host.data_ptr(), host.numel()))[1:] == want
    with pytest.raises(EPArgumentError):
        short = plans._header_on_host(packed[:5])
        _C.read_plan(short.data_ptr(), short.numel())


def test_a_plan_elsewhere_is_remembered_by_its_tensor_alone():
    plan = Plan.of(packed_plan())._replace(num_rows=-1, num_recv_tokens=-1, digest=-1)
    there = plan._replace(packed=plan.packed.to(META))
    packed = there.remember()
    assert Plan.of(packed) == there
    assert Plan.of(packed).targets.device == Plan.of(packed).expert_counts.device == META
    with pytest.raises(NotImplementedError):  # a copy knows nothing, and meta tensors have nothing to read
        Plan.of(packed.clone())
    alive = weakref.ref(packed)
    gc.collect()
    gc.disable()
    try:
        del there, packed
        assert alive() is None, "the tensor holds itself"
    finally:
        gc.enable()
    assert Plan.of(plan.remember()).num_rows >= 0, "on a CPU the header is read"


# The faces, where nothing can be read ---------------------------------------------------------------------------------


class NoValues:
    """Stands for the engine of rank 0 of 2: results of the right shapes on ``meta``, so that reading one raises."""

    def __init__(self, *_, **__):
        self.device = META
        self.info = SimpleNamespace(num_hops=1, domains=((0, 1),), logical_domains=((0, 1),), name="none")
        self.calls = []

    def refusing(self, op):
        return contextlib.nullcontext()

    def close(self):
        pass

    def comm_stream(self):
        return None

    def dispatch(self, spec, **how):
        self.calls.append(how)
        new = lambda shape, like: torch.empty(shape, dtype=like.dtype, device=META)  # noqa: E731
        plan, counts = spec.plan, None
        if plan is None:
            width = 2 if spec.layout == "rank" else spec.topk_idx.shape[1]
            num_local = spec.placement.num_local[0]
            words = plans.plan_words(spec.x.shape[0], width, 2, num_local)
            packed = torch.empty(words, dtype=torch.int64, device=META)
            sync = spec.num_worst_tokens is None
            known = (T, T, T, 99) if sync else (-1, spec.num_worst_tokens, -1, -1)
            sizes = plans.LAYOUTS.index(spec.layout), spec.x.shape[0], width, 2, 0, num_local
            plan = Plan(packed, *sizes, *known, spec.expert_alignment, spec.num_max_tokens_per_rank, 0, 0, 0)
            counts = [3] * num_local if sync else None
        rows = plan.num_output_rows
        idx, w, expand = spec.topk_idx, spec.topk_weights, spec.layout == "expand"
        recv_idx = new((rows, 1 if expand else K), idx) if idx is not None else None
        recv_w = new((rows,) if expand else (rows, K), w) if w is not None else None
        meta_shape = (rows,) if spec.layout == "rank" else (rows, 2 + K)
        recv_meta = torch.empty(meta_shape, dtype=torch.int32, device=META)
        recv_sf = new((rows, spec.sf.shape[1]), spec.sf) if spec.sf is not None else None
        recv_x = new((rows, spec.x.shape[1]), spec.x)
        return Dispatched(recv_x, recv_sf, recv_idx, recv_w, recv_meta, plan, counts), EventOverlap()

    def combine(self, spec, **how):
        self.calls.append(how)
        w = None if spec.weights is None else spec.weights.new_empty((spec.plan.num_tokens, K))
        return Combined(spec.y.new_empty((spec.plan.num_tokens, spec.y.shape[1])), w), EventOverlap()


def on_meta(*tensors):
    assert all(t.device == META for t in tensors)


@pytest.fixture
def no_values(monkeypatch):
    monkeypatch.setattr("deep_ep_py.buffer.Engine", NoValues)
    monkeypatch.setattr("deep_ep_py.elastic.Engine", NoValues)


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.usefixtures("no_values")
def test_v2_reads_nothing(sync, expand):
    buffer = ElasticBuffer(thread_world(2)[0], num_max_tokens_per_rank=M)
    x, idx, w = (t.to(META) for t in routing(0))
    stats = torch.zeros(3, dtype=torch.int32, device=META)
    x8, sf = x.to(torch.float8_e4m3fn), x[:, :1]
    (recv_x, recv_sf), _, recv_w, made, _ = buffer.dispatch(
        (x8, sf), idx, w, stats, num_experts=E, do_expand=expand, do_cpu_sync=sync, expert_alignment=4,
        allocate_on_comm_stream=1,
    )  # fmt: skip
    on_meta(recv_x, recv_sf, recv_w, made.topk_idx, made.recv_src_metadata, made.psum_num_recv_tokens_per_expert)
    on_meta(made.psum_num_recv_tokens_per_scaleup_rank, made.num_unaligned_recv_tokens_per_expert)
    on_meta(made.dst_buffer_slot_idx)
    assert made.num_recv_tokens_per_expert_list == ([4, 4, 4] if sync else [])
    assert made.num_recv_tokens == (T if sync else 2 * M)
    assert made.num_expanded_tokens == (12 if sync else 2 * M * K + 12)
    buffer.dispatch(x, idx.clone(), handle=made, do_expand=expand)
    got, weights, _ = buffer.combine(x.new_empty((len(recv_x), H)), made, recv_w, bias=(x, x))
    on_meta(got, weights)
    assert [c["on_comm_stream"] for c in buffer._engine.calls] == [True, False, False]


@pytest.mark.parametrize("worst", [0, 2 * M])
@pytest.mark.usefixtures("no_values")
def test_v1_reads_nothing(worst):
    buffer = Buffer(thread_world(2)[0])
    x, idx, w = (t.to(META) for t in routing(0))
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, E)
    recv_x, recv_idx, recv_w, counts, made, _ = buffer.dispatch(
        x, None, per_rank, None, in_rank, per_expert, idx, w, 8, worst
    )
    on_meta(per_rank, per_expert, in_rank, recv_x, recv_idx, recv_w, *made)
    assert counts == ([] if worst else [8, 8, 8])
    assert made[5].dtype == torch.int32 and made[5].shape == (T, 2)
    plan = handle.unpack_v1(made, 0, 2, META)
    assert plan.num_output_rows == len(recv_x) and plan.num_rows == (-1 if worst else T)
    on_meta(buffer.dispatch(x, handle=made)[0], *buffer.combine(recv_x, made, recv_w, bias=x)[:2])
    with pytest.raises(EPArgumentError, match="entries"):
        shorter = (*made[:3], made[3][:-1], *made[4:])
        buffer.combine(recv_x[:-1], shorter)
    with pytest.raises((NotImplementedError, RuntimeError)):  # a copy: the host has to ask for the prefix
        handle.unpack_v1((*made[:5], made[5].clone()), 0, 2, META)


def test_modules_read_nothing():
    for config in (RouterConfig(batch_loss_weight=1.0), RouterConfig.deepseek_v3(2, 1)):
        router = Router(H, 8, K, config, device=META)
        scores = torch.empty(2, 3, 8, device=META)  # not forward(): torch knows no autocast there
        on_meta(router._choose(scores.flatten(0, 1)), router._aux_loss(scores))
    experts = GroupedExperts(H, 8, 4, device=META, dtype=torch.bfloat16)
    offs = torch.empty(4, dtype=torch.int32, device=META)
    if hasattr(torch.nn.functional, "grouped_mm"):
        on_meta(experts(torch.empty(6, H, device=META, dtype=torch.bfloat16), offs, torch.empty(6, device=META)))


@pytest.mark.usefixtures("no_values")
def test_grouped_kernels_of_a_gpu_get_their_alignment():
    def alignment(buffer, **given):
        return MoELayer(H, 8, 4, K, buffer, device=META, **given).expert_alignment

    there, here = (
        ElasticBuffer(thread_world(2)[0]),
        SimpleNamespace(rank_idx=0, num_ranks=1, device=torch.device("cpu"), group="one", _mesh=lambda: None),
    )
    assert [alignment(there), alignment(here), alignment(there, expert_alignment=3)] == [8, 1, 3]


# Sizes that the device alone knows ------------------------------------------------------------------------------------


class Unknowing:
    """An engine whose plans do not tell the host how many rows there are, as without host sync on a GPU."""

    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def dispatch(self, spec, **how):
        got, done = self._engine.dispatch(spec, **how)
        if done.event is not None:
            done.current_stream_wait()
        for rows in (got.recv_x, *([] if got.recv_topk_weights is None else [got.recv_topk_weights])):
            rows[got.plan.num_rows :] = torch.nan
        got.plan = got.plan._replace(num_rows=-1, num_recv_tokens=-1, digest=-1)
        return got, done


def unknown_sizes(comm, expand, background):
    results = []
    for wrap in (lambda e: e, Unknowing):
        buffer = ElasticBuffer(comm, num_max_tokens_per_rank=M)
        buffer._engine = wrap(buffer._engine)
        x, idx, w = (t.requires_grad_(t.is_floating_point()) for t in routing(comm.rank))
        found = ep.plan_and_dispatch(x, idx, w, buffer, E, expand=expand, do_cpu_sync=False, async_finish=background)
        recv_x, recv_w, made = found.wait() if background else found
        again = ep.dispatch(x, w, made, async_finish=background)
        again_x, again_w = again.wait() if background else again
        total = (recv_x.sum(0) + again_x.sum(0)).square().sum() + (recv_w.sum() * again_w.sum())
        out = ep.combine((recv_x * again_w.sum(-1, keepdim=True) if not expand else recv_x * again_w[:, None]), made)
        (total + out.square().sum()).backward()
        results.append([recv_x.detach(), recv_w.detach(), again_x.detach(), again_w.detach(), out.detach()])
        results[-1] += [x.grad, w.grad, made.num_recv_tokens_per_expert]
        buffer.destroy()
    for want, got in zip(*results, strict=True):
        assert torch.equal(want, got) and not want.isnan().any()


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("expand", [False, True])
def test_rows_that_nobody_counted(expand, background):
    run_threads(2, unknown_sizes, expand, background)


# Compiled and elsewhere -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_values")
def test_fake_kernels_stay_on_the_device():
    buffer = ElasticBuffer(thread_world(2)[0], num_max_tokens_per_rank=M)
    x, idx, w = (t.to(META) for t in routing(0))
    n, packed = buffer.number, torch.empty(99, dtype=torch.int64, device=META)
    on_meta(*ops._plan_fake(idx, n, E, 1, None, True, False, "contiguous"))
    on_meta(*ops._plan_dispatch_fake(x, w, idx, n, E, 1, None, True, False, False, "contiguous"))
    on_meta(*ops._dispatch_fake(x, w, packed, n, 7, False, False))
    on_meta(*ops._combine_fake(x, w, packed, None, None, n, 5, K, False, False))
    (ticket,) = ops._dispatch_fake(x, w, packed, n, 7, False, True)
    assert ticket.device == ops._combine_fake(x, w, packed, None, None, n, 5, K, False, True)[0].device
    assert ticket.device == torch.device("cpu"), "a ticket is a number that the host reads"
    on_meta(*ops._finish_fake(ticket, packed, None, None, x, w, n, True, True, 7, 5, H, x.dtype, K, w.dtype))


def test_what_is_built():
    assert Buffer.is_sm90_compiled() is (Path(ep.__file__).parent / "lib" / "libdeep_ep_cuda.so").exists()
    assert event.stream_of(torch.zeros(1)) is None
