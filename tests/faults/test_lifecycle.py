"""The end of buffers: destroyed with work under way, forked, forgotten in a global, broken between two halves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from fault_world import (
    SMALL,
    SMALL_PAIR,
    World,
    backend_of,
    leftovers,
    run_world,
    shm_settings,
    threads_of_this_process,
    use,
)

from deep_ep_py import Buffer
from deep_ep_py.errors import EPError, EPPeerError
from deep_ep_py.testing import conformance_v1 as v1
from deep_ep_py.testing import run_threads


def results_outlive(world: World):
    rank = world.rank
    buffer = Buffer(world.group, settings=shm_settings())
    kept = []
    for i in range(3):
        result = v1.dispatch(buffer, SMALL, rank)
        y = buffer.empty(result[0].shape, torch.float32).fill_(i)
        kept.append((result, y, buffer.combine(y, result[4])[0].clone()))
    buffer.destroy()
    buffer.destroy()  # again: nothing
    del buffer, result, y
    for i, (result, y, _) in enumerate(kept):
        v1.check_dispatched(result, v1.expected_dispatch(SMALL)[rank])
        assert (y == i).all()
        result[0].mul_(2)  # still writable
    assert leftovers(), "tensors stand on the heap"
    kept.clear()
    del result, y
    assert not leftovers(), leftovers()


@pytest.mark.processes
def test_results_outlive_the_buffer_and_nothing_outlives_them():
    run_world(3, results_outlive)


def destroyed_and_kept(world: World):
    buffer = Buffer(world.group, settings=shm_settings())
    use(buffer, world.rank, SMALL_PAIR)
    threads = threads_of_this_process()
    v1.dispatch(buffer, SMALL_PAIR, world.rank, async_finish=True)[-1].current_stream_wait()
    buffer._engine.barrier()
    buffer.destroy()
    with pytest.raises(EPError, match="destroyed"):
        v1.dispatch(buffer, SMALL_PAIR, world.rank)
    left = leftovers()
    assert not left, f"destroy() gives memory and mappings back while the object lives: {left}"
    assert threads_of_this_process() <= threads


@pytest.mark.processes
def test_destroy_frees_while_the_object_lives():
    run_world(2, destroyed_and_kept)


def destroyed_in_flight(comm, wait):
    """Rank 0 destroys while its operation waits for rank 1, who then hears of it."""
    rank = v1.rank_of(comm)
    buffer = Buffer(comm, settings=shm_settings(timeout_seconds=DEADLINE))
    result = v1.dispatch(buffer, SMALL_PAIR, rank)
    destroyed = DESTROYED[wait]
    if rank == 1:
        assert destroyed.wait(DEADLINE)
        with pytest.raises(EPPeerError) as caught:
            if wait == "background":  # rank 0 had published it: this one may still end well
                buffer.combine(result[0].clone(), result[4])
            buffer._engine.barrier()
        assert caught.value.ranks == (0,)
        buffer.destroy()
        return
    raised = []
    if wait == "background":
        event = buffer.combine(result[0].clone(), result[4], async_finish=True)[-1]

    def act():
        try:
            event.current_stream_wait() if wait == "background" else buffer._engine.barrier()
        except EPError as e:
            raised.append(str(e))

    thread = threading.Thread(target=act)
    thread.start()
    time.sleep(0.2)
    begin = time.monotonic()
    buffer.destroy()
    thread.join(DEADLINE)
    destroyed.set()
    assert not thread.is_alive(), "the operation under way was left waiting"
    assert time.monotonic() - begin < DEADLINE / 2, "destroy waits for nobody"
    assert len(raised) == 1 and "destroyed" in raised[0], raised


DEADLINE = 20.0
DESTROYED = {"background": threading.Event(), "foreground": threading.Event()}


@pytest.mark.parametrize("wait", list(DESTROYED))
def test_destroy_with_an_operation_in_flight(wait):
    run_threads(2, destroyed_in_flight, wait, timeout_seconds=30)


SLOW_WORKER = """
import gc, sys, threading, time, torch
from deep_ep_py import Buffer
from deep_ep_py.communicator import thread_world
from deep_ep_py.settings import Settings
from deep_ep_py.testing import Case, conformance_v1 as v1

case = Case((2000,), hidden=256, num_topk=2, num_experts=3, routing="distinct", dtype=torch.float32)
buffer = Buffer(thread_world(1)[0], settings=Settings(backend="shm"))
v1.dispatch(buffer, case, 0)
buffer._engine.backend.set_phase_hook(lambda phase: time.sleep(3.5) if phase == "place" else None)
result = v1.dispatch(buffer, case, 0, async_finish=True)
event = result[-1]
del result
buffer.destroy()
gc.collect()
junk = [torch.full((2000, 256), 7.0) for _ in range(20)] + [bytearray(b"x" * 200) for _ in range(20000)]
try:
    event.current_stream_wait()
except Exception as e:
    print("raised", e)
del buffer, event
gc.collect()
print("ok")
"""


def run_script(code: str, timeout: float = 60, **environment: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **environment},
    )
    assert (ended.returncode, ended.stderr) == (0, ""), (ended.returncode, ended.stdout, ended.stderr)
    return ended.stdout


@pytest.mark.processes
def test_destroy_before_the_worker_has_begun_to_copy():
    """More than destroy's patience passes before the copy begins: what it works on is there still, or left alone."""
    # Freed memory does not look as it did.
    said = run_script(SLOW_WORKER, MALLOC_PERTURB_="165", GLIBC_TUNABLES="glibc.malloc.tcache_count=0").splitlines()
    assert said == ["ok"] or (len(said) == 2 and "destroyed" in said[0]), said


def broken_between_halves(comm):
    """An exception after the rendezvous and before the rows move: peers hear of it at once, not at the deadline."""
    rank = v1.rank_of(comm)
    buffer = Buffer(comm, settings=shm_settings(timeout_seconds=DEADLINE))
    v1.dispatch(buffer, SMALL_PAIR, rank)
    begin = time.monotonic()
    if rank == 0:

        def no_memory(*_):
            raise MemoryError("no more")

        backend = backend_of(buffer)
        backend._outputs = no_memory
        with pytest.raises(MemoryError):
            v1.dispatch(buffer, SMALL_PAIR, rank)
        with pytest.raises(EPError):
            buffer._engine.barrier()
    else:
        with pytest.raises(EPPeerError) as caught:
            v1.dispatch(buffer, SMALL_PAIR, rank)
        assert caught.value.ranks == (0,)
    assert time.monotonic() - begin < DEADLINE / 2, "noticed at the deadline only"


def test_exception_between_the_halves():
    run_threads(2, broken_between_halves, timeout_seconds=40)


def forked(world: World):
    buffer = Buffer(world.group, settings=shm_settings())
    result = v1.dispatch(buffer, SMALL_PAIR, world.rank)
    before = result[0].view(torch.int32).clone()  # bits: there are NaNs among them
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for call in (
            lambda: v1.dispatch(buffer, SMALL_PAIR, world.rank),
            lambda: buffer.combine(result[0], result[4]),
            lambda: buffer._engine.barrier(),
        ):
            try:
                call()
                said.append("nothing")
            except EPError as e:  # noqa: PERF203
                said.append("forked child" if "forked child" in str(e) else str(e))
        buffer.destroy()
        del buffer, result
        leftovers()  # collects garbage: the deleters of the parent's blocks run here and must do nothing
        os.write(writer, ",".join(said).encode())
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 1000).decode()
    assert os.waitpid(child, 0)[1] == 0
    assert said == "forked child,forked child,forked child"
    assert torch.equal(result[0].view(torch.int32), before)
    use(buffer, world.rank, SMALL_PAIR)
    buffer.destroy()


@pytest.mark.processes
def test_calls_in_a_forked_child():
    run_world(2, forked)


# Twenty interpreters for the price of one import: each fork ends as an interpreter does, to the last finaliser. What
# was imported is frozen, so that each collects in tenths of a second instead of seconds.
EXITS = """
import gc, os, sys, threading, torch
torch.set_num_threads(1)
from deep_ep_py import Buffer, ElasticBuffer
from deep_ep_py.communicator import thread_world
from deep_ep_py.settings import Settings
from deep_ep_py.testing import Case, conformance_v1 as v1

case = Case((9, 12), hidden=40, num_topk=3, num_experts=7, dtype=torch.float32)
v1.expected_dispatch(case)
buffers, kept = {}, {}
gc.freeze()

def rank_body(comm, number):
    buffer = buffers[comm.rank] = Buffer(comm, settings=Settings(backend="shm", timeout_seconds=60))
    result = kept[comm.rank] = v1.dispatch(buffer, case, comm.rank)
    if number % 3:
        buffer.combine(result[0], result[4], async_finish=True)
    if number in (2, 5) and comm.rank == 0:
        buffer.combine(result[0].clone(), result[4], async_finish=True)  # waits for rank 1, who never comes

number = 0
for number in range(20):
    child = os.fork()
    if child == 0:
        threads = [threading.Thread(target=rank_body, args=(c, number)) for c in thread_world(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        break  # falls off the end: the buffers are alive in a global
    status = os.waitpid(child, 0)[1]
    if status:
        print("exit", number, "status", status)
else:
    print("done")
"""


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_interpreter_exit_with_the_buffer_in_a_global():
    assert run_script(EXITS, timeout=280) == "done\n"


def exit_of_a_process(world: World):
    globals()["kept_alive"] = buffer = Buffer(world.group, settings=shm_settings())
    globals()["kept_results"] = v1.dispatch(buffer, SMALL_PAIR, world.rank)


@pytest.mark.processes
def test_exit_of_processes():
    assert [r.exitcode for r in run_world(2, exit_of_a_process)] == [0, 0]
