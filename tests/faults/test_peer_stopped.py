"""A peer that is alive and does not come: the deadline names it and the phase, and nothing else stands still."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from fault_world import SMALL, World, backend_of, leftovers, run_world, shm_settings

from deep_ep_py import Buffer
from deep_ep_py.errors import EPTimeoutError
from deep_ep_py.testing import conformance_v1 as v1

pytestmark = pytest.mark.processes

STOPPED, DEADLINE = 1, 1.0


def body(world: World, operation: str, phase: str):
    said = wait_for_it(world, operation, phase)
    assert not leftovers(), leftovers()
    return said


def wait_for_it(world: World, operation: str, phase: str):
    buffer = Buffer(world.group, settings=shm_settings(timeout_seconds=DEADLINE if world.rank != STOPPED else 30))
    result = v1.dispatch(buffer, SMALL, world.rank)

    def act():
        if operation == "dispatch":
            v1.dispatch(buffer, SMALL, world.rank)
        else:
            buffer.combine(result[0], result[4])

    if world.rank == STOPPED:
        backend_of(buffer).set_phase_hook(lambda now: os.kill(os.getpid(), signal.SIGSTOP) if now == phase else None)
        act()
        raise AssertionError("it was stopped for good")
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.01):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.monotonic()
    with pytest.raises(EPTimeoutError) as caught:
        act()
    waited = time.monotonic() - begin
    stop.set()
    thread.join()
    begin = time.monotonic()
    with pytest.raises(EPTimeoutError) as again:
        act()
    assert time.monotonic() - begin < 0.1, "later calls raise at once"
    assert str(again.value) == str(caught.value)
    error = caught.value
    buffer.destroy()
    return (error.ranks, error.op, error.phase, error.seq, error.seconds, waited, len(ticks), str(error))


@pytest.mark.parametrize(
    ("operation", "phase", "seen"),
    [
        ("dispatch", "publish", "notify"),
        ("dispatch", "place", "arrive"),
        ("combine", "copy", "notify"),
        ("combine", "pull", "release wait"),
    ],
)
def test_stopped_in(operation, phase, seen):
    ranks = run_world(3, body, operation, phase, lost=(STOPPED,))
    for rank in (0, 2):
        stopped, op, where, seq, seconds, waited, ticks, message = ranks[rank].result
        assert stopped == (STOPPED,)
        assert (op, where, seq) == (operation, seen, 2)
        # Whoever meets the deadline first tells the other.
        assert 0.9 * DEADLINE <= seconds < DEADLINE + 2, seconds
        assert waited < DEADLINE + 3
        assert ticks > 10 * waited, f"{ticks} ticks in {waited:.1f} s: the GIL was held"
        assert f"[{STOPPED}]" in message and "1.0 s" in message, message
