"""A peer that is alive and does not come: the deadline names it and the phase, and nothing else stands still."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch.distributed as dist
from fault_world import SMALL, World, backend_of, leftovers, run_world, shm_settings

from deep_ep_py import Buffer
from deep_ep_py.errors import EPTimeoutError
from deep_ep_py.testing import conformance_v1 as v1

pytestmark = pytest.mark.processes

#: (operation, the phase in which a rank is stopped, the phase in which the others wait for it)
SCENES = [
    ("dispatch", "publish", "notify"),
    ("dispatch", "place", "arrive"),
    ("combine", "copy", "notify"),
    ("combine", "pull", "release wait"),
]
DEADLINE = 1.0


def wait_for_it(group, stopped: bool, operation: str, phase: str):
    first = Buffer(group, settings=shm_settings())
    recv_x, _, _, _, handle, _ = v1.dispatch(first, SMALL, group.rank())
    # Another buffer, so that the short deadline is that of one operation.
    buffer = Buffer(group, settings=shm_settings(timeout_seconds=30 if stopped else DEADLINE))
    y = buffer.empty(recv_x.shape, recv_x.dtype).copy_(recv_x)

    def act():
        if operation == "dispatch":
            v1.dispatch(buffer, SMALL, group.rank())
        else:
            buffer.combine(y, handle)

    if stopped:
        backend_of(buffer).set_phase_hook(lambda now: os.kill(os.getpid(), signal.SIGSTOP) if now == phase else None)
        act()
        raise AssertionError("it was stopped for good")
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.01):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    with pytest.raises(EPTimeoutError) as caught:
        act()
    stop.set()
    thread.join()
    with pytest.raises(EPTimeoutError) as again:
        act()
    assert str(again.value) == str(caught.value), "later calls raise the same, and wait for nobody"
    error = caught.value
    first.destroy()
    buffer.destroy()
    return error.ranks, error.op, error.phase, error.seq, error.seconds, len(ticks), str(error)


def body(world: World):
    """The first and the last rank play every scene, each with another rank between them, which is stopped in it."""
    first, *stopped, last = range(world.size)
    groups = [dist.new_group((first, rank, last)) for rank in stopped]
    played = []
    for rank, group, (operation, phase, _) in zip(stopped, groups, SCENES, strict=True):
        if world.rank in (first, rank, last):
            played.append(wait_for_it(group, world.rank == rank, operation, phase))
            assert not leftovers(), leftovers()
    return played


def test_stopped():
    stopped = tuple(range(1, len(SCENES) + 1))
    ranks = run_world(len(SCENES) + 2, body, lost=stopped)
    for number, (operation, phase, seen) in enumerate(SCENES):
        for survivor in (ranks[0], ranks[-1]):
            named, op, where, seq, seconds, ticks, message = survivor.result[number]
            assert (named, op, where, seq) == ((1,), operation, seen, 1), (phase, message)
            # Whoever meets the deadline first tells the other; neither can be early.
            assert seconds >= 0.9 * DEADLINE, message
            assert f"waited {seconds:.1f} s for ranks [1]" in message, message
            assert ticks > 5, f"{ticks} ticks of 0.01 s in {seconds:.1f} s: the GIL was held"
