"""``collective`` on device tensors: the device path without a device, its numerics, its streams, what is refused."""

from __future__ import annotations

import contextlib
from dataclasses import fields, replace

import pytest
import torch
from collective_cases import (
    ROUTINGS,
    SETTINGS,
    Routing,
    cached,
    combine,
    dispatch,
    open_hybrid,
    same,
    v1_spec,
    v2_spec,
)  # fmt: skip
from device_stand_in import GPU, OnStandIns, StandIn, back, to_gpu

from deep_ep_py._rows import StagedRows
from deep_ep_py.backends import _ordered, _streams
from deep_ep_py.backends._recipe import combine_rows, positions
from deep_ep_py.backends.collective import CollectiveBackend
from deep_ep_py.errors import EPArgumentError
from deep_ep_py.plans import SHARED_ROW, Plan
from deep_ep_py.testing import run_threads
from deep_ep_py.types import CombineSpec


@pytest.fixture
def no_streams(monkeypatch):
    monkeypatch.setattr(_ordered, "streams_of", lambda _: _streams.Streams())


def moved(spec):
    """The same operation with its tensors on the device; of a plan only what lies there is told."""
    values = {f.name: to_gpu(getattr(spec, f.name)) for f in fields(spec)}
    if isinstance(spec, CombineSpec):
        values["bias"] = tuple(map(to_gpu, spec.bias))
    if spec.plan is not None and not isinstance(spec.plan.packed, StandIn):
        unknown = spec.plan._replace(packed=to_gpu(spec.plan.packed), num_rows=-1, num_recv_tokens=-1, digest=-1)
        values["plan"] = unknown
    return replace(spec, **values)


def both(num_ranks, body):
    """``body(rank, cpu, gpu)`` on every rank: two buffers, of which one has its tensors on the device."""

    def rank_body(communicator):
        cpu = CollectiveBackend(communicator, SETTINGS)
        gpu = CollectiveBackend(communicator.session(), SETTINGS, device=GPU)
        assert (cpu.device.type, gpu.device) == ("cpu", GPU)
        assert isinstance(gpu._rows, StagedRows)
        try:
            with OnStandIns():
                body(communicator.rank, cpu, gpu)
        finally:
            cpu.close()
            gpu.close()

    run_threads(num_ranks, rank_body)


def check_same(got, want, valid):
    for name in ("recv_x", "recv_sf", "recv_topk_weights"):
        same(back(getattr(got, name)), getattr(want, name), name, valid)
    for name in ("recv_topk_idx", "recv_meta"):
        same(back(getattr(got, name)), getattr(want, name), name)


@pytest.mark.usefixtures("no_streams")
@pytest.mark.parametrize(
    ("layout", "worst"), [("rank", True), ("topk", False), ("expand", False), ("expand", True)], ids=str
)
@pytest.mark.parametrize("routing", [*ROUTINGS[1:4], ROUTINGS[5]], ids=str)
def test_same_bits_as_on_the_cpu(routing, layout, worst):
    expand = layout == "expand"

    def body(rank, cpu, gpu):
        if layout == "rank":
            spec = v1_spec(routing, rank, num_worst_tokens=200 if worst else None)
        else:
            more = {"col_major_sf": routing.num_ranks == 2, "describe_rows": expand}
            spec = v2_spec(routing, rank, expand=expand, worst=worst, **more)
        want, got = dispatch(cpu, spec), dispatch(gpu, moved(spec))
        plan, valid = want.plan, slice(want.plan.num_rows)
        check_same(got, want, valid)
        assert got.plan[1:] == plan[1:]
        same(back(got.plan.packed), plan.packed, "plan")
        assert got.num_recv_tokens_per_expert == plan.expert_counts.tolist()

        again = cached(routing, rank, plan, spec.topk_weights)
        got = dispatch(gpu, moved(again))
        check_same(got, dispatch(cpu, again), valid)
        assert got.num_recv_tokens_per_expert is None

        (y,) = routing.rows([plan.num_output_rows], seed=rank)
        weights = torch.rand(want.recv_topk_weights.shape, generator=torch.Generator().manual_seed(3))
        bias = tuple(routing.rows([plan.num_tokens] * 2, seed=5 + rank))
        for per_rank in (False, True):
            home = CombineSpec(y, plan, weights, bias[: 1 + per_rank], reduce_per_rank=expand and per_rank)
            out, here = combine(cpu, home), combine(gpu, moved(home))
            same(back(here.combined_x), out.combined_x, "combined")
            same(back(here.combined_topk_weights), out.combined_topk_weights, "combined weights")

    both(routing.num_ranks, body)


@pytest.mark.usefixtures("no_streams")
def test_refusals_on_the_device():
    """What is wrong with a routing or a plan on the device is found before anything moves, and is everybody's."""
    routing = Routing(3)

    def body(rank, _, gpu):
        usual = dispatch(gpu, moved(v2_spec(routing, rank, expand=False)))

        def bad_id():
            spec = v2_spec(routing, rank, expand=False)
            if rank == 2:
                spec.topk_idx[4, 1] = 99
            dispatch(gpu, moved(spec))

        def bad_plan():
            packed = back(usual.plan.packed).clone()
            if rank == 1:
                packed[0] = 1
            combine(gpu, CombineSpec(usual.recv_x, usual.plan._replace(packed=to_gpu(packed))))

        for act, culprit, words in ((bad_id, 2, "99 at [4, 1]"), (bad_plan, 1, "")):
            with pytest.raises(EPArgumentError) as caught:
                act()
            assert words in str(caught.value)
            assert rank == culprit or caught.value.ranks == (culprit,)
        again = dispatch(gpu, moved(v2_spec(routing, rank, expand=False)))
        same(back(again.recv_x), back(usual.recv_x), "afterwards")
        assert gpu.empty((2, 3), torch.float16).device == GPU

    both(3, body)


@pytest.mark.usefixtures("no_streams")
def test_previous_events_come_before_checks():
    """What an event stands for may be the routing itself."""
    routing = Routing(2)

    def body(rank, cpu, _):
        want = dispatch(cpu, v2_spec(routing, rank, expand=False))
        spec = v2_spec(routing, rank, expand=False)
        topk_idx = spec.topk_idx.clone()
        spec.topk_idx.fill_(99)

        class Written:
            def wait(self):
                spec.topk_idx.copy_(topk_idx)

        same(dispatch(cpu, spec, previous=[Written()]).recv_x, want.recv_x, "x")

    both(2, body)


def sum_of_two(device):
    """One token, whose rows from ranks 0 and 1 are added."""
    targets = torch.tensor([[0 | SHARED_ROW, 0, 1 << 32]], dtype=torch.int64)
    zeros = torch.zeros(2, 2, dtype=torch.int32)
    plan = Plan.pack(
        layout="topk", targets=targets, rank_prefix=zeros, expert_counts=zeros[0], rank=0, num_rows=1,
        num_output_rows=1, num_recv_tokens=1, digest=1, expert_alignment=1, num_max_tokens_per_rank=1,
    )  # fmt: skip
    plan = plan._replace(packed=device(plan.packed))
    _, wanted, position = positions(plan, 2)
    assert wanted == [1, 1]

    def add(rows):
        out = device(torch.empty(1, rows.shape[1], dtype=rows.dtype))
        combine_rows(out, device(rows), plan, position, (), False)
        return out

    return add


def test_a_gpu_adds_without_atomics(monkeypatch):
    """Its float32 atomics flush subnormals: ``index_add_``, which uses them, is the CPU's alone."""
    rows = torch.tensor([[1e-40, float("nan"), 1.0], [1e-40, 1.0, 2.0]])
    want = sum_of_two(lambda t: t)(rows)
    assert 0 < want[0, 0] < 1e-38

    def refused(*_, **__):
        raise AssertionError("atomics")

    with OnStandIns():
        add = sum_of_two(to_gpu)
        monkeypatch.setattr(torch.Tensor, "index_add_", refused)
        same(back(add(rows)), want, "sum")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_one_nan(dtype):
    """By the rules of numerics, and not torch's casts, which make others on some CPUs and on GPUs."""
    out = sum_of_two(lambda t: t)(torch.full((2, 67), -float("nan"), dtype=dtype))
    quiet = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000, torch.float64: 0x7FF8 << 48}
    as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert set(out.view(as_int).flatten().tolist()) == {quiet[dtype]}


# Streams --------------------------------------------------------------------------------------------------------------


class Log(list):
    """Stands for torch.cuda; what happens to streams, in order."""

    capturing = False

    def stream(self, name):
        log = self

        class Stream:
            device = GPU

            def __repr__(self):
                return name

            def record_event(self):
                log.append(f"record on {name}")
                return f"event of {name}"

            def wait_event(self, event):
                log.append(f"{name} waits for {event}")

            def synchronize(self):
                log.append(f"host waits for {name}")

        return Stream()

    @contextlib.contextmanager
    def current(self, stream):
        self.append(f"enter {stream}")
        yield
        self.append(f"leave {stream}")


@pytest.fixture
def log(monkeypatch):
    log, caller = Log(), None
    caller = log.stream("caller")
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: log.stream("comm"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: caller)
    monkeypatch.setattr(torch.cuda, "stream", log.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: log.capturing)
    monkeypatch.setattr(StandIn, "record_stream", lambda _, s: log.append(f"lent to {s}"), raising=False)
    return log


ENTERED = ["enter comm", "comm waits for event of caller", "leave comm"]
ENDED = [*ENTERED, "host waits for comm"]


def on_streams(log):
    """The streams' log of a dispatch and of a combine on one rank."""
    routing, logs = Routing(1), []

    def body(_, __, gpu):
        assert repr(gpu.comm_stream) == "comm"
        out = dispatch(gpu, moved(v2_spec(routing, 0, expand=False)))
        logs.append(log[:])
        log.clear()
        combine(gpu, CombineSpec(out.recv_x, out.plan))
        logs.append(log[:])

    both(1, body)
    return logs


def test_streams(log):
    """Behind what the caller enqueued, results its own, and complete when the call returns: so says every event."""
    dispatched, combined = on_streams(log)
    assert dispatched == ["record on caller", *ENTERED, *["lent to caller"] * 6, *ENDED]
    assert combined == ["record on caller", *ENTERED, "lent to caller", *ENDED]


def test_capture_is_refused(log):
    routing = Routing(2)

    def body(rank, _, gpu):
        usual = dispatch(gpu, moved(v2_spec(routing, rank, expand=False)))
        gpu.barrier()
        log.capturing = True
        with pytest.raises(EPArgumentError, match="graph is being captured"):
            dispatch(gpu, moved(v2_spec(routing, rank, expand=False)))
        with pytest.raises(EPArgumentError, match="graph is being captured"):
            combine(gpu, CombineSpec(usual.recv_x, usual.plan))
        gpu.barrier()
        log.capturing = False
        again = dispatch(gpu, moved(v2_spec(routing, rank, expand=False)))
        same(back(again.recv_x), back(usual.recv_x), "afterwards")

    both(2, body)


# Two hops -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_streams")
@pytest.mark.parametrize("layout", ["rank", "topk", "expand"])
@pytest.mark.parametrize("domains", [((0, 1), (2, 3)), ((0,), (1,), (2,), (3,)), ((0, 3), (1, 2))], ids=str)
def test_two_hops_by_way_of_the_host(domains, layout):
    """The same bits as two hops of tensors on the CPU, in results that lie on the device."""
    expand, routing = layout == "expand", Routing(4, tokens=(30, 0, 40, 20))

    def body(communicator):
        rank = communicator.rank
        cpu = open_hybrid(communicator.session(), domains)
        gpu = open_hybrid(communicator.session(), domains, device=GPU)
        try:
            with OnStandIns():
                if layout == "rank":
                    spec = v1_spec(routing, rank)
                else:
                    spec = v2_spec(routing, rank, expand=expand, describe_rows=expand, col_major_sf=expand)
                want, got = dispatch(cpu, spec), dispatch(gpu, moved(spec))
                check_same(got, want, slice(want.plan.num_rows))
                assert got.plan[1:] == want.plan[1:]
                assert got.recv_x.device == got.plan.packed.device == GPU
                assert got.num_recv_tokens_per_expert == want.plan.expert_counts.tolist()

                again = cached(routing, rank, want.plan, spec.topk_weights)
                check_same(dispatch(gpu, moved(again)), dispatch(cpu, again), slice(want.plan.num_rows))

                (y,) = routing.rows([want.plan.num_output_rows], seed=rank)
                weights = torch.rand(want.recv_topk_weights.shape, generator=torch.Generator().manual_seed(3))
                bias = tuple(routing.rows([want.plan.num_tokens] * 2, seed=5 + rank))
                home = CombineSpec(y, want.plan, weights, bias, reduce_per_rank=expand)
                out, here = combine(cpu, home), combine(gpu, moved(home))
                same(back(here.combined_x), out.combined_x, "combined")
                same(back(here.combined_topk_weights), out.combined_topk_weights, "combined weights")
                assert here.combined_x.device == gpu.empty((1,), torch.float32).device == GPU
        finally:
            cpu.close()
            gpu.close()

    run_threads(4, body)
