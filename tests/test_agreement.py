"""What ranks must say alike is compared, in the words of the functions that users call; plans follow from inputs."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import deep_ep_py as ep
from deep_ep_py import _C, Buffer, ElasticBuffer, EPArgumentError, EPMismatchError, Settings
from deep_ep_py.backends._checks import combine_agrees_on, dispatch_agrees_on
from deep_ep_py.backends._dtypes import CARRIED, DTYPE_CODES
from deep_ep_py.plans import Plan
from deep_ep_py.testing import run_threads
from deep_ep_py.types import CombineSpec, DispatchSpec, ExpertPlacement

T, H, E, K = 12, 16, 6, 2
SETTINGS = Settings(timeout_seconds=20)
CAUSES = ("torch.compile", "backward pass", "same exchanges in the same order")


def routing(rank):
    generator = torch.Generator().manual_seed(rank)
    x = torch.arange(T * H).view(T, H).float() + 1000 * rank
    return x, torch.rand(T, E, generator=generator).topk(K)[1]


class Meeting:
    """What the threads of one world show each other: ``of(rank, value)`` is everyone's."""

    def __init__(self, size):
        self._size, self._barrier, self._shown = size, threading.Barrier(size), {}

    def of(self, rank, value):
        self._shown[rank] = value
        self._barrier.wait(30)
        found = [self._shown[r] for r in range(self._size)]
        self._barrier.wait(30)
        return found


# Plans --------------------------------------------------------------------------------------------------------------


def plans_of(comm, backend, meeting):
    """Plans of one routing, made twice with others in between; of another routing of equal counts; digests of ranks."""
    buffer = ElasticBuffer(comm, num_max_tokens_per_rank=T, backend=backend, settings=SETTINGS)
    x, idx = routing(comm.rank)
    found = []
    for expand in (False, True):
        made = []
        for given in (idx, idx.flip(0), idx):
            plan = buffer.dispatch(x, given, num_experts=E, do_expand=expand)[3]._plan
            made.append(plan.packed.clone())
            # The allocator gives freed memory again: a word that nobody writes would keep these bits.
            litter = torch.full_like(plan.packed, -1)
            del plan, litter
            by_op = ep.plan(given, buffer, E, expand=expand).packed
            assert torch.equal(by_op, made[-1])
        assert torch.equal(made[0], made[2])
        counts = [Plan.of(p).rank_prefix for p in made]
        assert torch.equal(counts[0], counts[1]) and not torch.equal(made[0], made[1])
        digests = [Plan.of(p).digest for p in made]
        assert digests[0] == digests[2] != digests[1]
        assert all(d == digests for d in meeting.of(comm.rank, digests))
        found.append(made[0])
    assert Plan.of(found[0]).digest != Plan.of(found[1]).digest
    num_counts = 3 * 3 + Plan.of(found[0]).num_local
    assert num_counts % 2 and all(p[_C.plan_header_words :].view(torch.int32)[num_counts] == 0 for p in found)
    buffer.destroy()
    return found


def test_plans_are_functions_of_their_inputs(backend):
    # Two experts a rank: an odd number of counts.
    run_threads(3, plans_of, backend, Meeting(3))


def test_plans_are_equal_in_all_backends():
    made: dict[str, dict[int, list[torch.Tensor]]] = {"shm": {}, "collective": {}}

    def body(comm, backend, meeting):
        made[backend][comm.rank] = plans_of(comm, backend, meeting)

    for backend in made:
        run_threads(3, body, backend, Meeting(3))
    for rank, plans in made["shm"].items():
        assert all(torch.equal(a, b) for a, b in zip(plans, made["collective"][rank], strict=True))


def test_the_digest_sees_every_slot_of_every_rank():
    idx = torch.arange(24).view(6, 4) % 5
    digests = set()
    for token, slot, expert in [(0, 0, 4), (5, 3, 4), (2, 1, -1), (0, 1, 0)]:
        other = idx.clone()
        other[token, slot] = expert
        for routings in ((other, idx), (idx, other)):
            hashes = [_C.hash_routing(topk_idx=r.data_ptr(), num_tokens=6, num_topk=4) for r in routings]
            digests.add(_C.plan_digest(layout=1, num_experts=5, placement_hash=7, alignment=1, routings=hashes))
    assert len(digests) == 8


# Names --------------------------------------------------------------------------------------------------------------


def test_backends_compare_the_same_fields():
    x, idx = routing(0)
    placement = ExpertPlacement.of(E, 1)
    spec = DispatchSpec(x, "topk", topk_idx=idx, placement=placement)
    buffer = ElasticBuffer(ep.communicator.thread_world(1)[0], backend="shm")
    plan = buffer.dispatch(x, idx, num_experts=E)[3]._plan
    for given in (spec, DispatchSpec(x, "topk", plan=plan)):
        assert tuple(dispatch_agrees_on(given)) == _C.dispatch_agrees_on
    assert tuple(combine_agrees_on(CombineSpec(x, plan), True)) == _C.combine_agrees_on
    assert set(CARRIED) == {"rows", "gradients of rows", "weights"}


def test_dtypes_have_numbers_of_their_own():
    assert len(set(DTYPE_CODES.values())) == len(DTYPE_CODES)
    assert all(0 < code < 2**63 for code in DTYPE_CODES.values())


# Arguments ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A call whose ranks differ. ``values``: what the error says of ranks 0 and 1. ``call(rank, buffer)``."""

    field: str
    values: tuple[Any, Any]
    call: Any
    causes: bool = False

    def __str__(self):
        return f"{self.field}-{self.values[1]}".replace(" ", "_")


def v2(rank, buffer, change):
    x, idx = routing(rank)
    more = {"x": x, "topk_idx": idx, "num_experts": E, "num_max_tokens_per_rank": T}
    buffer.dispatch(**more | (change(x) if rank else {}))


def scale_factors(dtype, rank, buffer, columns=2):
    x, idx = routing(rank)
    sf = torch.ones(T, columns if rank else 2, dtype=dtype if rank else torch.float32)
    x = x.to(torch.float8_e4m3fn)
    buffer.dispatch(x if rank and dtype is None else (x, sf), idx, num_experts=E)


def dispatch_carries(rank, buffer):
    x, idx = routing(rank)
    spec = buffer._requests.dispatch(x, idx, None, None, E, None, None, 0, True, False)
    spec.carries = "gradients of rows" if rank else "rows"
    buffer._engine.dispatch(spec, background=False, previous=())


def other_tables(rank, buffer):
    x, idx = routing(rank)
    spec = buffer._requests.dispatch(x, idx, None, None, E, None, None, 0, True, False)
    if rank:
        usual = spec.placement
        spec.placement = ExpertPlacement(usual.rank.flip(0), usual.local, usual.num_local)
    buffer._engine.dispatch(spec, background=False, previous=())


def combine_differs(change):
    def call(rank, buffer):
        x, idx = routing(rank)
        got = buffer.dispatch(x, idx, torch.ones(T, K), num_experts=E)
        spec = buffer._requests.combine(got[0], got[3], None, None, 0, True)
        if rank:
            spec = replace(spec, **change(got))
        buffer._engine.combine(spec, background=False, previous=())

    return call


FP8, F32, F16 = torch.float8_e4m3fn, torch.float32, torch.float16
DIFFERENCES = [
    Difference("carries", ("rows", "gradients of rows"), dispatch_carries, causes=True),
    Difference("do_expand", ("False", "True"), lambda r, b: v2(r, b, lambda x: {"do_expand": True})),
    Difference("do_cpu_sync", ("True", "False"), lambda r, b: v2(r, b, lambda x: {"do_cpu_sync": False})),
    Difference("hidden", (H, H - 1), lambda r, b: v2(r, b, lambda x: {"x": x[:, 1:]})),
    Difference("dtype", (str(F32), str(FP8)), lambda r, b: v2(r, b, lambda x: {"x": x.to(FP8)})),
    Difference("dtype", (str(F32), "torch.bfloat16"), lambda r, b: v2(r, b, lambda x: {"x": x.bfloat16()})),
    Difference("scale factor dtype", (str(F32), "torch.int32"), lambda r, b: scale_factors(torch.int32, r, b)),
    Difference("scale factor dtype", (str(F32), "None"), lambda r, b: scale_factors(None, r, b)),
    Difference("scale factor bytes per token", (8, 12), lambda r, b: scale_factors(F32, r, b, 3)),
    Difference("topk_weights", ("None", str(F32)), lambda r, b: v2(r, b, lambda x: {"topk_weights": torch.ones(T, K)})),
    Difference("num_topk", (K, K + 1), lambda r, b: v2(r, b, lambda x: {"topk_idx": torch.ones(T, K + 1).long()})),
    Difference("num_experts", (E, E + 1), lambda r, b: v2(r, b, lambda x: {"num_experts": E + 1})),
    Difference("placement", (None, None), other_tables),
    Difference("expert_alignment", (1, 4), lambda r, b: v2(r, b, lambda x: {"expert_alignment": 4})),
    Difference("num_max_tokens_per_rank", (T, 99), lambda r, b: v2(r, b, lambda x: {"num_max_tokens_per_rank": 99})),
    Difference("carries", ("rows", "weights"), combine_differs(lambda g: {"carries": "weights"}), causes=True),
    Difference("dtype", (str(F32), str(F16)), combine_differs(lambda g: {"y": g[0].half()})),
    Difference("topk_weights", ("None", str(F32)), combine_differs(lambda g: {"weights": g[2]})),
]


def differences(comm, backend):
    buffer = ElasticBuffer(comm, backend=backend, settings=SETTINGS)
    for difference in DIFFERENCES:
        with pytest.raises(EPMismatchError) as caught:
            difference.call(comm.rank, buffer)
        error, case = caught.value, str(difference)
        assert error.field == difference.field, case
        if difference.values != (None, None):
            assert error.values == dict(enumerate(difference.values)), case
            shown = ", ".join(f"rank {r}: {v}" for r, v in enumerate(difference.values))
            assert shown in str(error), case
        named = "what the exchange carries" if difference.field == "carries" else difference.field
        assert f"ranks disagree about {named}: " in str(error), case
        assert all((cause in str(error)) == difference.causes for cause in CAUSES), case
        x, idx = routing(comm.rank)
        got = buffer.dispatch(x, idx, num_experts=E)
        ranks = 1 + (idx[:, 0] // 3 != idx[:, 1] // 3).long()  # of each token's two experts
        assert torch.equal(buffer.combine(got[0], got[3])[0], x * ranks[:, None]), case
    buffer.destroy()


def test_ranks_that_differ(backend):
    """One world for all cases: each error is raised on both ranks, and the buffer is usable afterwards."""
    run_threads(2, differences, backend)


def v1_worst(comm, backend):
    buffer = Buffer(comm, backend=backend, settings=SETTINGS)
    x, idx = routing(comm.rank)
    with pytest.raises(EPMismatchError) as caught:
        v1(buffer, x, idx, num_worst_tokens=99 * comm.rank)
    assert caught.value.field == "num_worst_tokens"
    assert caught.value.values == {0: "not given", 1: "given"}
    v1(buffer, x, idx)
    buffer.destroy()


def test_worst_case_of_one_rank(backend):
    run_threads(2, v1_worst, backend)


# Handles ------------------------------------------------------------------------------------------------------------


def v1(buffer, x, idx, **more):
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, E)
    layout = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}
    return buffer.dispatch(x, **layout, topk_idx=idx, topk_weights=torch.ones(idx.shape), **more)


def v1_handles(comm, backend):
    """Micro-batches of equal counts: handles of one are refused beside those of another, copies of a handle are not."""
    buffer = Buffer(comm, backend=backend, settings=SETTINGS)
    rank, size = comm.rank, comm.size
    x = routing(rank)[0]
    per_rank = E // size
    one = torch.tensor([[0], [0], [0], [per_rank], [per_rank], [0]])  # the same on all ranks
    first, second, again = (v1(buffer, x[:6], i) for i in (one, one.flip(0), one))
    assert torch.equal(first[4][0], second[4][0]) or len(first[4]) == 10, "the counts differ already"

    def copied(handle):
        return tuple(t.clone() for t in handle)

    def check(got, handle, tokens=6):
        assert torch.equal(buffer.combine(got[0], handle)[0], x[:tokens])
        assert torch.equal(buffer.dispatch(x[:tokens], handle=handle)[0], got[0])

    for mine in (first, second):
        check(mine, mine[4])
        check(mine, copied(mine[4]))
    # Equal routings: either handle will do, on any rank.
    check(first, (first if rank else again)[4])
    for alone in range(size):  # one rank with another handle than the rest
        mine = second if rank == alone else first
        for handle in (mine[4], copied(mine[4])):
            with pytest.raises(EPMismatchError, match="handle") as caught:
                buffer.combine(mine[0], handle)
            assert caught.value.field == "handle" and all(cause in str(caught.value) for cause in CAUSES)
            with pytest.raises(EPMismatchError, match="handle"):
                buffer.dispatch(x[:6], handle=handle)
        check(first, first[4])
    # A handle may be used before its dispatch was waited for: operations run in order.
    for to in (one, torch.zeros_like(one)):  # all to rank 0: the others receive nothing
        got, _, _, _, handle, event = v1(buffer, x[:6], to, async_finish=True)
        again, *_, after = buffer.dispatch(x[:6], handle=handle, async_finish=True)
        back, _, last = buffer.combine(got, handle, previous_event=event, async_finish=True)
        after.current_stream_wait()
        last.current_stream_wait()
        assert torch.equal(again, got) and torch.equal(back, x[:6])
    few = v1(buffer, x[:6], one) if rank else v1(buffer, x[:0], one[:0])
    check(few, few[4], 6 if rank else 0)
    buffer.destroy()


@pytest.mark.parametrize("size", [2, 3])
def test_v1_handles_of_equal_counts(backend, size):
    run_threads(size, v1_handles, backend)


def over_domains(comm):
    """Ten tensors, the plan among them: what they route is compared all the same."""
    settings = replace(SETTINGS, domain=f"host {comm.rank // 2}")
    buffer = Buffer(comm, backend="hybrid", settings=settings)
    x, _ = routing(comm.rank)
    idx = torch.tensor([[0], [0], [0], [3], [5], [2]])
    first, second = (v1(buffer, x[:6], i) for i in (idx, idx.flip(0)))
    assert len(first[4]) == 10
    mine = second if comm.rank == 3 else first
    with pytest.raises(EPMismatchError, match="handle"):
        buffer.combine(mine[0], mine[4])
    assert torch.equal(buffer.combine(first[0], first[4])[0], x[:6])
    buffer.destroy()


def test_v1_handles_over_domains():
    run_threads(4, over_domains)


# Construction -------------------------------------------------------------------------------------------------------


def test_a_fake_process_group_is_refused():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        for face in (Buffer, ElasticBuffer):
            with pytest.raises(EPArgumentError, match='of the backend "fake"'):
                face(dist.group.WORLD)
    finally:
        dist.destroy_process_group()


# Version counters ---------------------------------------------------------------------------------------------------


def tensors(value):
    """All tensors in what a call returned; of a handle, those that it has."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [t for v in value for t in tensors(v)]
    if isinstance(value, Plan):
        return [value.packed]
    return [t for v in vars(value).values() for t in tensors(v)] if isinstance(value, ep.EPHandle) else []


def returned(comm, backend):
    """Nothing that was returned is written to, as torch counts it: neither before the return nor behind an event."""
    legacy, elastic = (
        face(comm, backend=backend, settings=SETTINGS, **more)
        for face, more in ((Buffer, {}), (ElasticBuffer, {"num_max_tokens_per_rank": 2048}))
    )
    generator = torch.Generator().manual_seed(comm.rank)
    x, idx = torch.randn(2048, 256, generator=generator), torch.rand(2048, E, generator=generator).topk(K)[1]
    weights = torch.ones(2048, K)
    fp8 = x.to(torch.float8_e4m3fn), torch.ones(2048, 2)

    def whole(out, event):
        """``out`` at its return, and when the call is complete."""
        before = [t._version for t in tensors(out)]
        if event.event is not None:
            event.current_stream_wait()
        assert [t._version for t in tensors(out)] == before
        return out

    for background in (False, True):
        *out, event = v1(legacy, x, idx, async_finish=background)
        whole(out, event)
        assert not any(t._version for t in tensors(out[:3]))
        *combined, event = legacy.combine(out[0], out[4], out[2], async_finish=background)
        assert not any(t._version for t in tensors(whole(combined, event)))
        *cached, event = legacy.dispatch(x, handle=out[4], async_finish=background)
        assert not any(t._version for t in tensors(whole(cached, event)))
        for options in (
            {},
            {"do_expand": True, "do_zero_padding": True, "expert_alignment": 8},
            {"do_cpu_sync": False},
            {"do_expand": True, "do_cpu_sync": False},
            {"x": fp8},
            {"x": fp8, "use_tma_aligned_col_major_sf": True},
        ):
            *out, event = elastic.dispatch(
                **{"x": x, "topk_idx": idx, "topk_weights": weights, "num_experts": E} | options,
                async_with_compute_stream=background,
            )
            whole(out, event)
            assert not any(t._version for t in tensors(out)), options
            if "x" in options:
                continue
            *combined, event = elastic.combine(out[0], out[3], out[2], async_with_compute_stream=background)
            assert not any(t._version for t in tensors(whole(combined, event))), options
            *cached, event = elastic.dispatch(
                x, topk_weights=weights, handle=out[3], do_expand="do_expand" in options,
                async_with_compute_stream=background,
            )  # fmt: skip
            assert not any(t._version for t in tensors(whole(cached[0], event))), options
    legacy.destroy()
    elastic.destroy()


def test_nothing_returned_is_written_to(backend):
    run_threads(2, returned, backend)


def saved_before_the_wait(comm, backend):
    """An autograd function saves what an asynchronous dispatch returned; the event is waited for afterwards."""
    buffer = Buffer(comm, backend=backend, settings=SETTINGS)
    pending = []

    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            recv_x, _, _, _, handle, event = v1(buffer, x, torch.arange(x.shape[0]).view(-1, 1) % E, async_finish=True)
            ctx.save_for_backward(*handle)
            pending.append(event)
            return recv_x

        @staticmethod
        def backward(ctx, gradient):
            return buffer.combine(gradient.contiguous(), ctx.saved_tensors)[0]

    x = torch.randn(4096, 512, requires_grad=True)
    rows = Dispatch.apply(x)
    pending.pop().current_stream_wait()
    rows.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    buffer.destroy()


def test_a_handle_saved_before_the_wait(backend):
    run_threads(2, saved_before_the_wait, backend)


def test_received_rows_are_given_back_before_their_tensor():
    """As pipeline schedules do: a tensor stays in the graph, its memory goes. Storage of the heap has no other size
    (torch's error says so); memory of torch's own does."""
    buffer = ElasticBuffer(ep.communicator.thread_world(1)[0], num_max_tokens_per_rank=512, backend="shm")
    x, idx = torch.randn(512, 256), torch.zeros(512, 1, dtype=torch.int64)

    def held():
        buffer.dispatch(x[:1], idx[:1], num_experts=E)  # the heap takes back what was let go when it next allocates
        return buffer.statistics().held_bytes

    for let_go in (lambda t: t.set_(), lambda t: setattr(t, "data", torch.empty(0))):
        rows = buffer.dispatch(x, idx, num_experts=E)[0]
        assert held() >= x.nbytes
        with pytest.raises(RuntimeError, match="not resizable"):
            rows.untyped_storage().resize_(0)
        let_go(rows)
        assert held() < x.nbytes
    other = ElasticBuffer(ep.communicator.thread_world(1)[0], num_max_tokens_per_rank=512, backend="collective")
    rows = other.dispatch(x, idx, num_experts=E)[0]
    rows.untyped_storage().resize_(0)
    assert rows.untyped_storage().nbytes() == 0
