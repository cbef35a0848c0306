"""Ctrl-C in every wait: KeyboardInterrupt here, a named rank there, and never a hang."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
from fault_world import SMALL_PAIR, World, backend_of, run_world, shm_settings

from deep_ep_py import Buffer
from deep_ep_py.errors import EPError, EPPeerError
from deep_ep_py.testing import conformance_v1 as v1

pytestmark = pytest.mark.processes

LINGERS = 1.2  # seconds
MORE = replace(SMALL_PAIR, num_tokens=(900, 700))

WAITS = [
    ("dispatch", "notify", "publish"),
    ("dispatch", "arrive", "place"),
    ("larger dispatch", "grow wait", "grow"),
    ("combine", "notify", "copy"),
    ("combine in place", "release wait", "pull"),
    ("barrier", "notify", "before it"),
    ("async dispatch", "arrive", "place"),
]


def body(world: World, operation: str, wait: str, late_in: str):
    """Rank 0 is interrupted in ``wait``, because rank 1 lingers in ``late_in``."""
    buffer = Buffer(world.group, settings=shm_settings())
    result = v1.dispatch(buffer, SMALL_PAIR, world.rank)

    def act():
        if operation == "combine":
            buffer.combine(result[0].clone(), result[4])
        elif operation == "combine in place":
            buffer.combine(result[0], result[4])
        elif operation == "barrier":
            buffer._engine.barrier()
        else:
            case = MORE if operation == "larger dispatch" else SMALL_PAIR
            event = v1.dispatch(buffer, case, world.rank, async_finish=operation == "async dispatch")[-1]
            if event.event is not None:
                event.current_stream_wait()

    def hook(now):
        if world.rank == 0 and now == wait:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        elif world.rank == 1 and now == late_in:
            time.sleep(LINGERS)

    backend_of(buffer).set_phase_hook(hook)
    begin = time.monotonic()
    if world.rank == 0:
        with pytest.raises(KeyboardInterrupt):
            act()
        assert 0.2 < time.monotonic() - begin < LINGERS, "the wait was interrupted, and it was a wait"
        if operation == "async dispatch":  # only the wait for the event was interrupted; the operation goes on
            buffer._engine.barrier()
            return None
        begin = time.monotonic()
        with pytest.raises(EPError, match="interrupted"):
            act()
        assert time.monotonic() - begin < 0.2
        return None
    hook(late_in if late_in == "before it" else "")
    if operation == "async dispatch":
        act()
        buffer._engine.barrier()
        return None
    with pytest.raises(EPPeerError) as caught:
        act()
        buffer._engine.barrier()  # a rank that had everything it needs hears of it here
    assert caught.value.ranks == (0,)
    assert "interrupted" in str(caught.value)
    return time.monotonic() - begin


@pytest.mark.parametrize(("operation", "wait", "late_in"), WAITS, ids=lambda word: word.replace(" ", "-"))
def test_interrupted_in(operation, wait, late_in):
    ranks = run_world(2, body, operation, wait, late_in)
    assert ranks[1].result is None or ranks[1].result < 5


def repeated(world: World):
    """Behind an operation in the background: the call gives up its wait, and takes no place in the order."""
    buffer = Buffer(world.group, settings=shm_settings())
    result = v1.dispatch(buffer, SMALL_PAIR, world.rank)
    y = result[0].clone()
    if world.rank == 1:
        time.sleep(1.2)
    event = buffer.combine(y, result[4], async_finish=True)[-1]
    if world.rank == 0:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            buffer._engine.barrier()
    event.current_stream_wait()
    v1.check_combine(buffer, SMALL_PAIR, world.rank, result[4], 0)


def test_interrupted_behind_background_work():
    run_world(2, repeated)
