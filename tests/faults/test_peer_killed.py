"""A peer that is killed: in every phase of every operation its peers notice within a second, and go on without it."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist
from fault_world import LARGE, SMALL, SMALL_PAIR, World, backend_of, leftovers, run_world, shm_settings, use

from deep_ep_py import Buffer
from deep_ep_py.errors import EPPeerError
from deep_ep_py.testing import conformance_v1 as v1

pytestmark = pytest.mark.processes

VICTIM = 1
DISPATCH = ("layout", "publish", "notify", "map", "place", "arrive")
COMBINE = ("copy", "publish", "notify", "pull", "release")
SCENES = [
    *(("dispatch", phase) for phase in DISPATCH),
    ("larger dispatch", "grow"),
    ("larger dispatch", "grow wait"),
    *(("cached dispatch", phase) for phase in DISPATCH[1:]),
    *(("combine", phase) for phase in COMBINE),
    *(("combine in place", phase) for phase in (*COMBINE, "release wait")),
    ("barrier", "notify"),
    ("async dispatch", "place"),
    ("async combine", "pull"),
    ("barrier", "before it"),
]


class Scene:
    """A buffer that has been used, what came of that, and the operation in which somebody dies."""

    def __init__(self, world: World, settings) -> None:
        self.world = world
        self.buffer = Buffer(world.group, settings=settings)
        self.result = v1.dispatch(self.buffer, SMALL, world.rank)
        v1.check_combine(self.buffer, SMALL, world.rank, self.result[4], 0)

    def act(self, operation: str) -> None:
        rank, buffer, handle = self.world.rank, self.buffer, self.result[4]
        if operation == "dispatch":
            v1.dispatch(buffer, SMALL, rank)
        elif operation == "larger dispatch":
            v1.dispatch(buffer, LARGE, rank)
        elif operation == "cached dispatch":
            buffer.dispatch(v1.payload(SMALL, rank), handle=handle)
        elif operation == "async dispatch":
            v1.dispatch(buffer, SMALL, rank, async_finish=True)[-1].current_stream_wait()
        elif operation == "async combine":
            buffer.combine(self.result[0], handle, async_finish=True)[-1].current_stream_wait()
        elif operation == "combine":
            buffer.combine(self.result[0].clone(), handle)
        elif operation == "combine in place":
            buffer.combine(self.result[0], handle)
        elif operation == "barrier":
            buffer._engine.barrier()


def die_in(world: World, scene: Scene, phase: str) -> None:
    def hook(now: str) -> None:
        if now == phase:
            world.tell("died", time.monotonic())
            os.kill(os.getpid(), signal.SIGKILL)

    if phase == "before it":
        time.sleep(0.3)  # the others sleep in their wait by then
        hook(phase)
    backend_of(scene.buffer).set_phase_hook(hook)


def body(world: World, operation: str, phase: str):
    survivors = dist.new_group([r for r in range(world.size) if r != VICTIM])
    scene = Scene(world, shm_settings())
    errors = []
    if world.rank == VICTIM:
        die_in(world, scene, phase)
        scene.act(operation)
        raise AssertionError(f"the phase {phase} was never entered")
    # Where everything that survivors need had been given, they finish; the next operation then tells.
    for what in (operation, "barrier", "dispatch", "combine"):
        begin = time.monotonic()
        try:
            scene.act(what)
        except EPPeerError as e:
            errors.append((time.monotonic(), time.monotonic() - begin, e.ranks, e.op, e.phase, str(e)))
    scene.buffer.destroy()
    del scene
    left = leftovers()
    assert not left, left
    buffer = Buffer(survivors, settings=shm_settings())
    use(buffer, dist.get_rank(survivors), SMALL_PAIR)
    buffer.destroy()
    return errors


@pytest.mark.parametrize(("operation", "phase"), SCENES, ids=lambda word: word.replace(" ", "-"))
def test_killed_in(operation, phase):
    ranks = run_world(3, body, operation, phase, lost=(VICTIM,))
    assert ranks[VICTIM].exitcode == -signal.SIGKILL
    died = ranks[VICTIM].said["died"]
    for rank in (0, 2):
        errors = ranks[rank].result
        assert len(errors) >= 3, errors
        when, _, _, op, where, message = errors[0]
        assert when - died < 1.0, f"noticed after {when - died:.2f} s"
        assert op and where and "rank" in message, errors[0]
        assert {e[2] for e in errors} == {(VICTIM,)}, f"all name the dead rank: {errors}"
        assert len({e[5] for e in errors}) == 1, f"later calls raise the same: {errors}"
        assert all(e[1] < 0.1 for e in errors[1:]), f"at once: {errors}"
