"""What waits for what on a GPU, by a log of streams that are none: the order that `cuda_peer` relies on."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from deep_ep_py.backends import _cuda_machine
from deep_ep_py.errors import EPError

GPU = torch.device("cuda", 0)


class Streams:
    """Just enough of torch.cuda."""

    def __init__(self, monkeypatch):
        self.log, self.capturing, self.out_of_memory, self.names = [], False, 0, iter(["comm", "outside"])
        self.caller = self.now = self.make("caller")
        pools = iter(["pool", "captured"])
        for name, value in {
            "Stream": lambda *_, **__: self.make(next(self.names)),
            "MemPool": lambda _: next(pools),
            "current_stream": lambda _=None: self.caller,
            "is_current_stream_capturing": lambda: self.capturing,
            "stream": self.on,
            "device": lambda _: contextlib.nullcontext(),
            "use_mem_pool": self.use,
            "empty_cache": lambda: self.log.append("empty cache"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_beginAllocateCurrentThreadToPool", None, raising=False)
        monkeypatch.setattr(_cuda_machine, "_allocator", lambda _: SimpleNamespace(allocator=lambda: None))
        monkeypatch.setattr(_cuda_machine.library, "opened", lambda _: None)
        monkeypatch.setattr(_cuda_machine, "StreamEvent", lambda stream: f"event of {stream.name}")
        monkeypatch.setattr(torch, "empty", self.empty)

    def make(self, name):
        return SimpleNamespace(
            name=name,
            cuda_stream=len(name),
            wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"),
        )

    @contextlib.contextmanager
    def on(self, stream):
        before, self.now = self.now, stream or self.now
        yield
        self.now = before

    @contextlib.contextmanager
    def use(self, pool, _):
        self.pool = pool
        yield
        self.pool = None

    def empty(self, shape, **_):
        if self.out_of_memory:
            self.out_of_memory -= 1
            raise torch.OutOfMemoryError("planted")
        self.log.append(f"memory of {self.now.name} in {self.pool}")
        return SimpleNamespace(numel=lambda: 1, data_ptr=lambda: 1, nbytes=4)


@pytest.fixture
def streams(monkeypatch):
    return Streams(monkeypatch)


@pytest.fixture
def engine():
    return SimpleNamespace(enter_heap=lambda: None, leave_heap=lambda: None, in_heap=lambda **_: True)


def allocated(streams, engine, **options):
    machine = _cuda_machine.Machine(GPU)
    with machine.heap(engine, **{"on_comm_stream": False, **options}) as empty:
        empty((1,), torch.float32)
    return streams.log


def test_memory_is_offered_behind_its_earlier_users(streams, engine):
    assert allocated(streams, engine) == ["memory of caller in pool", "comm waits for caller"]


def test_memory_of_the_communication_stream(streams, engine):
    assert allocated(streams, engine, on_comm_stream=True) == ["memory of comm in pool"]


def test_memory_of_a_capture_is_of_no_graph(streams, engine):
    machine = _cuda_machine.Machine(GPU)
    streams.capturing = True
    with machine.heap(engine, on_comm_stream=True) as empty:
        empty((1,), torch.float32)
    assert streams.log == ["memory of outside in captured"]


def test_cached_memory_is_given_back_once(streams, engine):
    streams.out_of_memory = 1
    assert allocated(streams, engine)[:2] == ["empty cache", "memory of caller in pool"]
    streams.out_of_memory, streams.names = 2, iter(["comm", "outside"])
    with pytest.raises(torch.OutOfMemoryError), _again(streams).heap(engine, on_comm_stream=False) as empty:
        empty((1,), torch.float32)


def _again(streams):
    torch.cuda.MemPool = lambda _: "pool"  # undone by the fixture
    return _cuda_machine.Machine(GPU)


def test_memory_of_another_pool_is_refused(streams, engine):
    engine.in_heap = lambda **_: False
    with pytest.raises(EPError, match="another memory pool"):
        allocated(streams, engine)


def test_an_operation_is_behind_the_caller_and_before_it_goes_on(streams):
    machine, lent = _cuda_machine.Machine(GPU), []
    previous = SimpleNamespace(wait=lambda: streams.log.append(f"{streams.now.name} waits for an event"))
    machine.begin([previous])
    assert streams.log == ["comm waits for caller", "comm waits for an event"]
    tensor = SimpleNamespace(record_stream=lambda s: lent.append(s.name))
    assert machine.end([tensor, None], background=False, on_comm_stream=False) is None
    assert streams.log[2:] == ["caller waits for comm"] and lent == []
    machine.end([tensor], background=False, on_comm_stream=True)
    assert streams.log[3:] == ["caller waits for comm"] and lent == ["comm", "caller"]
    assert machine.end([tensor], background=True, on_comm_stream=False) == "event of comm"
    assert streams.log[4:] == [] and lent == ["comm", "caller"] * 2


def test_what_failed_is_joined(streams):
    machine = _cuda_machine.Machine(GPU)
    with pytest.raises(ValueError, match="planted"), machine.joined():
        raise ValueError("planted")
    assert streams.log == ["caller waits for comm"]


def test_no_construction_in_a_capture(streams):
    streams.capturing = True
    with pytest.raises(EPError, match="while a CUDA graph is captured"):
        _cuda_machine.Machine(GPU)


def test_old_torch_is_refused(streams, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_beginAllocateCurrentThreadToPool")
    with pytest.raises(EPError, match=r"2\.8 or later"):
        _cuda_machine.Machine(GPU)
