"""Ctrl-C in every wait: KeyboardInterrupt here, a named rank there, and never a hang."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace

import pytest
from fault_world import SMALL_PAIR, World, backend_of, run_world, shm_settings

from deep_ep_py import Buffer
from deep_ep_py.errors import EPError, EPPeerError
from deep_ep_py.testing import conformance_v1 as v1

pytestmark = pytest.mark.processes

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


def interrupted_in(world: World, operation: str, wait: str, late_in: str):
    """Rank 0 is interrupted in ``wait``, because rank 1 lingers in ``late_in`` until it has been."""
    buffer = Buffer(world.group, settings=shm_settings())
    result = v1.dispatch(buffer, SMALL_PAIR, world.rank)
    interrupted = f"{operation} {wait}"

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
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        elif world.rank == 1 and now == late_in:
            world.wait_for(interrupted)

    backend_of(buffer).set_phase_hook(hook)
    if world.rank == 0:
        with pytest.raises(KeyboardInterrupt):
            act()
        world.set(interrupted)
        if operation != "async dispatch":
            with pytest.raises(EPError, match="interrupted"):
                act()
    elif operation == "async dispatch":
        act()
    else:
        hook(late_in if late_in == "before it" else "")
        with pytest.raises(EPPeerError) as caught:
            act()
            buffer._engine.barrier()  # a rank that had everything it needs learns it here
        assert caught.value.ranks == (0,)
        assert "interrupted" in str(caught.value)
    if operation == "async dispatch":  # only the wait for the event was interrupted; the operation goes on
        buffer._engine.barrier()
    buffer.destroy()


def behind_background_work(world: World):
    """Behind an operation in the background: the call gives up its wait, and takes no place in the order."""
    buffer = Buffer(world.group, settings=shm_settings())
    result = v1.dispatch(buffer, SMALL_PAIR, world.rank)
    y = result[0].clone()
    if world.rank == 1:
        world.wait_for("interrupted behind background work")
    event = buffer.combine(y, result[4], async_finish=True)[-1]
    if world.rank == 0:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            buffer._engine.barrier()
        world.set("interrupted behind background work")
    event.current_stream_wait()
    v1.check_combine(buffer, SMALL_PAIR, world.rank, result[4], 0)
    buffer.destroy()


def every_wait(world: World):
    for scene in WAITS:
        try:
            interrupted_in(world, *scene)
        except BaseException as e:  # noqa: PERF203  (a KeyboardInterrupt that came too late too)
            raise AssertionError(f"{scene}: {type(e).__name__}: {e}") from e
    behind_background_work(world)


def test_interrupted_in_every_wait():
    run_world(2, every_wait, timeout_seconds=60.0)
