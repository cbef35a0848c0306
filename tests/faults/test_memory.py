"""Limits of memory, the library's own and the machine's; and a thousand calls that leave nothing behind."""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fault_world import (
    LARGE,
    SMALL,
    SMALL_PAIR,
    World,
    backend_of,
    leftovers,
    names_in,
    run_world,
    shm_settings,
    threads_of_this_process,
    use,
)

from deep_ep_py import Buffer
from deep_ep_py.errors import EPError
from deep_ep_py.testing import conformance_v1 as v1
from deep_ep_py.testing import run_threads

WIDE = replace(SMALL_PAIR, hidden=40000)  # about a MiB of rows


def limited(comm):
    """The user holds as much as the heap may give: results come from ordinary memory, correct and counted."""
    rank, kept = v1.rank_of(comm), []
    buffer = Buffer(comm, settings=shm_settings(max_heap_bytes=1 << 20))
    for i in range(12):
        case = (SMALL, LARGE)[i % 2]
        result = v1.dispatch(buffer, case, rank)
        v1.check_combine(buffer, case, rank, result[4], 1, salt=i % 3)
        cached = buffer.dispatch(v1.payload(case, rank), handle=result[4])
        kept.append((case, result, cached))
    statistics = buffer.statistics()
    assert statistics.moved_to_ordinary_memory > 0
    assert statistics.held_bytes < 3 << 20, statistics
    buffer.destroy()
    for case, result, cached in kept:
        v1.check_dispatched(result, v1.expected_dispatch(case)[rank])
        v1.check_recv_x(cached[0], v1.expected_dispatch(case)[rank])


def test_own_limit():
    run_threads(3, limited)


def no_growth(world: World, operation: str):
    """On rank 1 the system gives the heap nothing more (a limit of file sizes: it binds memfd, and not torch)."""
    buffer = Buffer(world.group, settings=shm_settings(timeout_seconds=8))
    result = v1.dispatch(buffer, WIDE, world.rank)
    held = []
    if world.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        for _ in range(64):  # until nothing is free
            try:
                block = backend_of(buffer)._allocate((1 << 18,), torch.uint8)
            except EPError:
                break
            if block is None:
                break
            held.append(block)
    message = ""
    try:
        if operation == "dispatch":
            got = v1.dispatch(buffer, replace(WIDE, num_tokens=(90, 120)), world.rank)
            v1.check_dispatched(got, v1.expected_dispatch(replace(WIDE, num_tokens=(90, 120)))[world.rank])
        elif operation == "combine":
            v1.check_combine(buffer, WIDE, world.rank, result[4], 0)
        else:
            buffer.empty((1 << 22,), torch.uint8).fill_(1)
    except EPError as e:
        message = str(e)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    held.clear()
    use(buffer, world.rank, SMALL_PAIR)
    buffer.destroy()
    return message


def no_growth_in_each(world: World):
    return {operation: no_growth(world, operation) for operation in ("dispatch", "combine", "empty")}


@pytest.mark.processes
def test_machines_limit():
    """It goes on, or every rank raises at once, with the size and what to do. `empty` goes on: it promises ordinary
    memory where the heap has none."""
    found = [r.result for r in run_world(2, no_growth_in_each)]
    for operation in ("dispatch", "combine"):
        messages = [by_operation[operation] for by_operation in found]
        assert all(messages) or not any(messages), messages
        for message in messages:
            if message:
                assert "MiB" in message, message
                assert "emedy" in message, message
    assert [by_operation["empty"] for by_operation in found] == ["", ""]


def growing(comm):
    """Offers made for few tokens, then many come: second records, again and again, in a heap that stops growing."""
    rank = v1.rank_of(comm)
    buffer = Buffer(comm, settings=shm_settings())
    sizes = []
    for i in range(30):
        use(buffer, rank, (SMALL, LARGE)[i % 2])
        sizes.append(buffer.statistics().heap_bytes)
    assert buffer.statistics().second_records >= 10, "rank by rank and turn by turn, offers were too small"
    assert len(set(sizes[6:])) == 1, f"the heap goes on growing: {sizes}"
    buffer.destroy()


def test_second_records():
    run_threads(3, growing)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def thousand(world: World):
    rank = world.rank
    buffer = Buffer(world.group, settings=shm_settings())
    case = SMALL_PAIR

    def facts():
        s = buffer.statistics()
        fds, threads = len(names_in("/proc/self/fd")), threads_of_this_process()
        maps = Path("/proc/self/maps").read_text().count("\n")
        return {
            "fds": fds,
            "maps": maps,
            "threads": threads,
            "heap": s.heap_bytes,
            "held": s.held_bytes,
        }

    def iterate(n):
        for i in range(n):
            result = v1.dispatch(buffer, case, rank)
            buffer.combine(result[0] if i % 2 else result[0].clone(), result[4])
            if i % 10 == 0:
                buffer.dispatch(v1.payload(case, rank), handle=result[4], async_finish=True)[-1].current_stream_wait()
        del result
        buffer._engine.barrier()
        buffer._engine.barrier()

    iterate(200)
    before, bytes_before = facts(), resident_bytes()
    iterate(1000)
    after, bytes_after = facts(), resident_bytes()
    assert after["fds"] <= before["fds"]
    assert after["threads"] <= before["threads"]
    assert after["heap"] == before["heap"]
    assert after["maps"] <= before["maps"] + 8, "mappings grow"  # malloc's arenas come and go
    assert bytes_after - bytes_before < 4 << 20, f"{(bytes_after - bytes_before) >> 10} KiB more"
    use(buffer, rank, case)


@pytest.mark.processes
def test_a_thousand_iterations():
    run_world(2, thousand)


def rebuilt(world: World):
    for _ in range(25):
        buffer = Buffer(world.group, settings=shm_settings())
        result = v1.dispatch(buffer, SMALL_PAIR, world.rank)
        buffer.destroy()
        del buffer
        v1.check_dispatched(result, v1.expected_dispatch(SMALL_PAIR)[world.rank])
        del result
        left = leftovers()
        assert not left, left


@pytest.mark.processes
def test_buffers_leave_nothing():
    run_world(2, rebuilt)
