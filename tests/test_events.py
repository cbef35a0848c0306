"""Events of CUDA streams, on a torch.cuda that only writes down what is asked of it; and programs that have none."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import torch

from deep_ep_py.event import EventHandle, EventOverlap, StreamEvent, behind, completions


class FakeCuda:
    """Just enough of torch.cuda: what was done, in order."""

    def __init__(self, monkeypatch):
        self.log, self.capturing, self.reached = [], False, False
        self.current = self.stream("current")
        for name, value in {
            "Event": self.event,
            "current_stream": lambda device=None: self.current,
            "is_current_stream_capturing": lambda: self.capturing,
            "stream": self.on,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def stream(self, name):
        wait = lambda e: self.log.append(f"{name} waits for {e.at}")  # noqa: E731
        return SimpleNamespace(name=name, device="cuda:0", wait_event=wait)

    def event(self):
        made = SimpleNamespace(at="nothing", device="cuda:0", query=lambda: self.reached)
        made.record = lambda stream: setattr(made, "at", stream.name)
        made.synchronize = lambda: self.log.append(f"host waits for {made.at}")
        return made

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


def test_stream_events(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    made = StreamEvent(cuda.stream("comm"))
    assert not made.done()
    assert completions(EventHandle(made), streams=True) == [made] and cuda.log == []
    assert completions(EventOverlap(EventHandle(made))) == [] and cuda.log == ["host waits for comm"]
    EventOverlap(EventHandle(made)).current_stream_wait()
    assert cuda.log[1:] == ["current waits for comm"]
    cuda.reached = True
    assert made.done() and completions(EventHandle(made), streams=True) == []
    cuda.capturing = True
    assert not made.done() and completions(EventHandle(made), streams=True) == [made]
    assert EventHandle().completion is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert isinstance(EventHandle().completion, StreamEvent) and EventHandle().completion._event.at == "current"


def test_work_behind_a_background_call_is_covered_by_its_event(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    comm, uses = cuda.stream("comm"), []
    used, made = (SimpleNamespace(record_stream=lambda s, n=n: uses.append((n, s.name))) for n in ("used", "made"))
    over = EventOverlap(EventHandle(StreamEvent(cuda.stream("earlier"))))
    assert behind(over, comm, lambda: [made] if cuda.current is comm else [], [used]) == [made]
    assert over.event.completion._event.at == "comm" and cuda.current.name == "current"
    assert uses == [("used", "comm"), ("made", "current")]
    assert behind(EventOverlap(), None, lambda: [cuda.current.name]) == ["current"]


CPU_PROGRAM = """
import torch
def touched(*a, **k): raise AssertionError("a program on CPUs has touched torch.cuda")
for name in ("_lazy_init", "current_stream", "is_current_stream_capturing", "Event", "Stream", "stream",
             "current_device", "is_available", "device_count"):
    setattr(torch.cuda, name, touched)
import deep_ep_py as ep
from deep_ep_py.nn import MoELayer
layer = MoELayer(16, 8, 4, 2, ep.ElasticBuffer(ep.communicator.thread_world(1)[0]), shared_width=8)
layer(torch.randn(3, 16, requires_grad=True)).output.sum().backward()
b = ep.Buffer(ep.communicator.thread_world(1)[0])
a, _, c, d, e = b.get_dispatch_layout(torch.zeros(2, 1, dtype=torch.long), 2, b.capture(), True)
r = b.dispatch(torch.randn(2, 4), None, a, None, d, c, previous_event=e, async_finish=True)
with r[5]: pass
b.combine(r[0], r[4])
"""


def test_a_program_on_cpus_does_not_touch_cuda():
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CPU_PROGRAM], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
