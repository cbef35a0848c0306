"""The ``hybrid`` backend where a process is lost: kills, stops, Ctrl-C, forks, exits; and what is left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from collective_cases import SETTINGS, cached, combine, dispatch, open_hybrid, v2_spec
from hybrid_cases import CROSSED, ROUTING, usual, works

from deep_ep_py.communicator import communicator_of
from deep_ep_py.errors import EPError, EPPeerError, EPTimeoutError
from deep_ep_py.types import CombineSpec

sys.path.append(str(Path(__file__).parent / "faults"))
from fault_world import leftovers, names_in, run_world, threads_of_this_process


def act(backend, rank, operation, before):
    if operation == "dispatch":
        usual(backend, rank)
    elif operation == "background dispatch":
        dispatch(backend, v2_spec(ROUTING, rank, expand=False), background=True)
    elif operation == "combine":
        combine(backend, CombineSpec(before.recv_x.clone(), before.plan))
    elif operation == "combine in place":
        combine(backend, CombineSpec(before.recv_x, before.plan))
    else:
        backend.barrier()


def opened(group, seconds):
    return open_hybrid(communicator_of(group), CROSSED, replace(SETTINGS, timeout_seconds=seconds))


def when(backend, where, do):
    """``do()`` once, in a phase of the domain, or when the rail is used for the n-th time."""
    count = 0
    start = backend._rail.start

    def counted(*tensors):
        nonlocal count
        count += 1
        if where == f"rail {count}":
            do()
        return start(*tensors)

    backend._rail.start = counted
    if where == "before":
        do()
    elif not where.startswith("rail"):
        backend._domain.set_phase_hook(lambda phase: do() if phase == where else None)


VICTIM = 3


def lost_in_each(world, how, scenes):
    """Ranks 0, 1 and 2 play every scene, each with another rank beside them, which is lost in it."""
    victims = range(VICTIM, world.size)
    groups = [dist.new_group((*range(VICTIM), victim)) for victim in victims]
    played = []
    for victim, group, (operation, where) in zip(victims, groups, scenes, strict=True):
        if world.rank < VICTIM or world.rank == victim:
            played.append(lost_in(world, group, how, operation, where))
    return played


def lost_in(world, group, how, operation, where):
    rank = group.rank()
    backend = opened(group, 20 if how == signal.SIGKILL else 1.0)
    before = usual(backend, rank)

    def die():
        world.tell("died", True)
        os.kill(os.getpid(), how)

    if rank == VICTIM:
        if where == "before":
            time.sleep(0.3)  # the others sleep in their wait by then
        when(backend, where, die)
        act(backend, VICTIM, operation, before)
        raise AssertionError(f"{where} was never entered")
    errors = []
    for _ in range(4):
        begin = time.monotonic()
        try:
            act(backend, rank, operation, before)
        except EPError as e:
            errors.append((type(e), e.ranks, bool(e.op and e.phase), str(e), time.monotonic() - begin))
    begin = time.monotonic()
    backend.close()
    closing = time.monotonic() - begin
    del backend, before
    end = time.monotonic() + 10
    while left := leftovers():  # transfers to a stopped rank hold their tensors until gloo gives them up
        assert time.monotonic() < end, (operation, where, left)
        time.sleep(0.05)
    return errors, closing


SCENES = [
    ("barrier", "before"),
    ("dispatch", "rail 1"),
    ("dispatch", "rail 3"),
    ("dispatch", "rail 4"),
    ("dispatch", "notify"),
    ("dispatch", "place"),
    ("background dispatch", "arrive"),
    ("combine", "copy"),
    ("combine", "rail 2"),
    ("combine", "pull"),
    ("combine in place", "release wait"),
]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("how", "scenes"), [(signal.SIGKILL, SCENES[:6]), (signal.SIGKILL, SCENES[6:]), (signal.SIGSTOP, SCENES[::3])],
    ids=["killed in a dispatch", "killed in a combine", "stopped"],
)  # fmt: skip
def test_a_process_goes(how, scenes):
    """All ranks of both domains raise at once, or at the deadline; whoever waits for the lost one itself names it."""
    victims = tuple(range(VICTIM, VICTIM + len(scenes)))
    ranks = run_world(VICTIM + len(scenes), lost_in_each, how, scenes, lost=victims, timeout_seconds=60)
    killed = how == signal.SIGKILL
    for number, scene in enumerate(scenes):
        assert ranks[victims[number]].said == {"died": True}, scene
        named = set()
        for rank in ranks[:VICTIM]:
            errors, closing = rank.result[number]
            # A rank that had everything it needs raises in the next operation, or the one after.
            assert len(errors) >= 2, (scene, errors)
            kind, who, placed, text, seconds = errors[0]
            assert kind is EPPeerError if killed else kind in (EPTimeoutError, EPPeerError), (scene, errors)
            assert who and placed, (scene, errors)
            assert seconds < 10, f"{scene}: far from the deadline of a killed one, and beyond that of a stopped one"
            assert {e[3] for e in errors} == {text}, f"{scene}: later calls raise the same"
            assert closing < 10, scene
            named.add(who)
        assert (VICTIM,) in named, (scene, named)


def interrupted(world, where):
    """Rank 0 is interrupted in a wait: on the rail, because rank 1 lingers, or in the domain, because rank 3 does."""
    backend = opened(world.group, 30)
    before = usual(backend, world.rank)
    lingers = {"rail": 1, "domain": 3, "background": 1}[where]
    if world.rank == lingers:
        when(backend, "notify" if where == "domain" else "rail 1", lambda: world.wait_for("interrupted"))
    background = where == "background"
    begin = time.monotonic()
    if world.rank == 0:
        threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            dispatch(backend, v2_spec(ROUTING, 0, expand=False), background=background)
        world.set("interrupted")
        with pytest.raises(EPError, match="nterrupt"):
            backend.barrier()
    else:
        with pytest.raises(EPPeerError):
            for _ in range(3):
                act(backend, world.rank, "background dispatch" if background else "dispatch", before)
    backend.close()
    assert time.monotonic() - begin < 15, "far from the deadline"


@pytest.mark.processes
@pytest.mark.parametrize("where", ["rail", "domain", "background"])
def test_ctrl_c(where):
    run_world(4, interrupted, where)


def forked(world):
    backend = opened(world.group, 20)
    before = usual(backend, world.rank)
    combine(backend, CombineSpec(before.recv_x, before.plan), background=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            raised = 0
            spec = CombineSpec(torch.zeros(before.recv_x.shape), before.plan)
            for refused in (backend.barrier, lambda: usual(backend, world.rank), lambda: combine(backend, spec)):
                try:
                    refused()
                except EPError as e:  # noqa: PERF203
                    raised += "fork" in str(e)
            backend.close()
            code = 0 if raised == 3 else 10 + raised
        finally:
            os._exit(code)
    deadline = time.monotonic() + 15
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        assert time.monotonic() < deadline, os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    works(backend, world.rank, before)
    backend.close()


@pytest.mark.processes
def test_a_forked_child_is_refused_and_its_parent_goes_on():
    run_world(4, forked)


def many(world):
    backend = opened(world.group, 20)
    rank = world.rank

    def iterate(backend, n):
        for i in range(n):
            got = usual(backend, rank)
            combine(backend, CombineSpec(got.recv_x, got.plan), background=i % 4 == 1)
            if i % 4 == 0:
                dispatch(backend, cached(ROUTING, rank, got.plan), background=True)
        del got
        backend.barrier()
        time.sleep(0.5)  # an idle worker ends by itself
        gc.collect()

    def facts(backend):
        statistics = backend.statistics()
        maps = Path("/proc/self/maps").read_text().count("\n")
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        found = {"fds": len(names_in("/proc/self/fd")), "threads": threads_of_this_process()}
        return found | {"heap": statistics.heap_bytes, "held": statistics.held_bytes, "maps": maps}, memory

    iterate(backend, 60)
    before, memory_before = facts(backend)
    iterate(backend, 130)
    after, memory_after = facts(backend)
    assert after["maps"] <= before.pop("maps") + 8, "mappings grow"
    after.pop("maps")
    assert all(after[what] <= before[what] for what in before), (before, after)
    assert memory_after - memory_before < 4 << 20, f"{(memory_after - memory_before) >> 10} KiB more"
    backend.close()
    del backend
    left = leftovers()
    assert not left, left


@pytest.mark.processes
def test_hundreds_of_operations_leave_nothing():
    run_world(4, many)


LEAVES = """
import os, sys, threading, time
import torch, torch.distributed as dist
from datetime import timedelta
from deep_ep_py import Buffer
from deep_ep_py.settings import Settings

how, rank, store = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
buffer = Buffer(dist.group.WORLD, backend="hybrid", settings=Settings(domain=f"host {rank}", timeout_seconds=20))
assert buffer.backend_info().num_hops == 2
topk, weights = torch.tensor([[0, 3], [1, 2]]), torch.ones(2, 2)
layout = buffer.get_dispatch_layout(topk, 4)
names = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank")
given = dict(zip(names, layout), topk_idx=topk, topk_weights=weights)

def dispatch(background):
    return buffer.dispatch(torch.ones(2, 1000), async_finish=background, **given)

x, _, _, _, handle, _ = dispatch(False)
assert x.shape == (4, 1000)
if how == "in flight":
    for _ in range(3):
        dispatch(True)
        buffer.combine(x.clone(), handle, async_finish=True)
elif how == "waiting for nobody" and rank == 0:
    event = buffer.combine(x, handle, async_finish=True)[-1]
    time.sleep(0.3)
    assert not event.event.completion.done()
if how == "waiting for nobody":
    time.sleep(6 * rank)
"""


@pytest.mark.processes
@pytest.mark.parametrize("how", ["idle", "in flight", "waiting for nobody"])
def test_interpreter_exit_with_an_open_buffer(how, tmp_path):
    """Nobody closes anything; the exit status is 0 and nothing is said."""
    command = [sys.executable, "-c", LEAVES, how]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, str(r), str(tmp_path / "store")], **pipes) for r in range(2)]
    try:
        for process in ranks:
            out, err = process.communicate(timeout=60)
            assert (process.returncode, out, err) == (0, "", "")
    finally:
        for process in ranks:
            process.kill()
            process.wait()
