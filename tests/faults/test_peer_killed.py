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

DISPATCH = ("layout", "publish", "notify", "map", "place", "arrive")
COMBINE = ("copy", "publish", "notify", "pull", "release")
#: One world each: (operation, the phase in which a rank is killed).
WORLDS = {
    "dispatch": [
        *(("dispatch", phase) for phase in DISPATCH),
        ("larger dispatch", "grow"),
        ("larger dispatch", "grow wait"),
        ("async dispatch", "place"),
    ],
    "cached dispatch": [
        *(("cached dispatch", phase) for phase in DISPATCH[1:]),
        ("barrier", "notify"),
        ("barrier", "before it"),
    ],
    "combine": [*(("combine", phase) for phase in COMBINE), ("async combine", "pull")],
    "combine in place": [("combine in place", phase) for phase in (*COMBINE, "release wait")],
}
DEADLINE = 20.0


class Scene:
    """A buffer that has been used, what came of that, and the operation in which somebody dies."""

    def __init__(self, group) -> None:
        self.rank = group.rank()
        self.buffer = Buffer(group, settings=shm_settings(timeout_seconds=DEADLINE))
        self.result = v1.dispatch(self.buffer, SMALL, self.rank)
        v1.check_combine(self.buffer, SMALL, self.rank, self.result[4], 0)

    def act(self, operation: str) -> None:
        rank, buffer, handle = self.rank, self.buffer, self.result[4]
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


def body(world: World, scenes: list[tuple[str, str]]):
    """The first and the last rank play every scene, each with another rank between them, which dies in it."""
    first, *victims, last = range(world.size)
    survivors, *groups = (dist.new_group(ranks) for ranks in ((first, last), *((first, v, last) for v in victims)))
    played = []
    for victim, group, (operation, phase) in zip(victims, groups, scenes, strict=True):
        if world.rank not in (first, victim, last):
            continue
        scene = Scene(group)
        if world.rank == victim:
            die_in(world, scene, phase)
            scene.act(operation)
            raise AssertionError(f"the phase {phase} was never entered")
        played.append(survive(scene, operation))
        del scene
        left = leftovers()
        assert not left, left
        buffer = Buffer(survivors, settings=shm_settings())
        use(buffer, survivors.rank(), SMALL_PAIR)
        buffer.destroy()
    return played


def survive(scene: Scene, operation: str):
    """What was raised in the operation and in those that follow: a rank that had been given all it needs finishes the
    first of them."""
    errors = []
    for what in (operation, "barrier", "dispatch", "combine"):
        try:
            scene.act(what)
        except EPPeerError as e:  # noqa: PERF203
            errors.append((time.monotonic(), e.ranks, e.op, e.phase, str(e)))
    scene.buffer.destroy()
    return errors


@pytest.mark.parametrize("scenes", WORLDS.values(), ids=[name.replace(" ", "-") for name in WORLDS])
def test_killed_in(scenes):
    victims = tuple(range(1, len(scenes) + 1))
    ranks = run_world(len(scenes) + 2, body, scenes, lost=victims, timeout_seconds=60.0)
    for number, scene in enumerate(scenes):
        victim = ranks[victims[number]]
        assert "died" in victim.said and victim.exitcode == -signal.SIGKILL, f"{scene}: it was not killed"
        for survivor in (ranks[0], ranks[-1]):
            errors = survivor.result[number]
            assert len(errors) >= 3, f"{scene}: {errors}"
            when, named, op, where, message = errors[0]
            assert when - victim.said["died"] < DEADLINE / 2, f"{scene}: noticed at the deadline only"
            assert named == (1,) and op and where and "rank" in message, f"{scene}: {errors[0]}"
            assert {(e[1], e[4]) for e in errors} == {(named, message)}, (
                f"{scene}: later calls raise the same: {errors}"
            )
