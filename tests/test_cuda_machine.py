"""What ``cuda_peer`` refuses of torch and of its memory, with a stand-in for torch.cuda. benchmarks/gpu_check.py checks
the order of streams, on a GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from deep_ep_py.backends import _cuda_machine
from deep_ep_py.errors import EPError

GPU = torch.device("cuda", 0)


class Memory:
    """Just enough of torch.cuda to allocate: fails as often as ``out_of_memory`` says."""

    def __init__(self, monkeypatch):
        self.capturing, self.out_of_memory, self.times_emptied = False, 0, 0
        stream = SimpleNamespace(cuda_stream=1, wait_stream=lambda _: None)
        for name, value in {
            "Stream": lambda *_, **__: stream,
            "MemPool": lambda _: "pool",
            "current_stream": lambda _=None: stream,
            "is_current_stream_capturing": lambda: self.capturing,
            "stream": lambda _: contextlib.nullcontext(),
            "device": lambda _: contextlib.nullcontext(),
            "use_mem_pool": lambda *_: contextlib.nullcontext(),
            "empty_cache": self.empty_cache,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_beginAllocateCurrentThreadToPool", None, raising=False)
        monkeypatch.setattr(_cuda_machine, "_allocator", lambda _: SimpleNamespace(allocator=lambda: None))
        monkeypatch.setattr(_cuda_machine.library, "opened", lambda _: None)
        monkeypatch.setattr(torch, "empty", self.empty)

    def empty_cache(self):
        self.times_emptied += 1

    def empty(self, shape, **_):
        if self.out_of_memory:
            self.out_of_memory -= 1
            raise torch.OutOfMemoryError("planted")
        return SimpleNamespace(numel=lambda: 1, data_ptr=lambda: 1, nbytes=4)

    def allocate(self, in_heap=True):
        engine = SimpleNamespace(enter_heap=lambda: None, leave_heap=lambda: None, in_heap=lambda **_: in_heap)
        with _cuda_machine.Machine(GPU).heap(engine, on_comm_stream=False) as empty:
            empty((1,), torch.float32)


@pytest.fixture
def memory(monkeypatch):
    return Memory(monkeypatch)


def test_cached_memory_is_given_back_once(memory):
    memory.out_of_memory = 1
    memory.allocate()
    assert memory.times_emptied == 1
    memory.out_of_memory = 2
    with pytest.raises(torch.OutOfMemoryError):
        memory.allocate()
    assert memory.times_emptied == 2


def test_memory_of_another_pool_is_refused(memory):
    with pytest.raises(EPError, match="another memory pool"):
        memory.allocate(in_heap=False)


def test_no_construction_in_a_capture(memory):
    memory.capturing = True
    with pytest.raises(EPError, match="while a CUDA graph is captured"):
        _cuda_machine.Machine(GPU)


def test_old_torch_is_refused(memory, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_beginAllocateCurrentThreadToPool")
    with pytest.raises(EPError, match=r"2\.8 or later"):
        _cuda_machine.Machine(GPU)
