"""Worlds whose ranks may die: processes that a test kills or stops, and what must be left of them afterwards: nothing.

Ranks are forked from one server process that has torch loaded, so that a world costs tenths of a second. Each reports
through a pipe of its own: one that dies takes nobody's lock with it.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deep_ep_py import Buffer
from deep_ep_py.settings import Settings
from deep_ep_py.testing import Case
from deep_ep_py.testing import conformance_v1 as v1
from deep_ep_py.testing.worlds import process_context

#: Small, with rows for everyone; the second needs more memory than offers made for the first can give.
SMALL = Case((9, 7, 12), hidden=40, num_topk=3, num_experts=7, routing="distinct", dtype=torch.float32)
LARGE = Case((900, 700, 800), hidden=40, num_topk=3, num_experts=7, routing="distinct", dtype=torch.float32, seed=3)
SMALL_PAIR = Case((9, 12), hidden=40, num_topk=3, num_experts=7, routing="distinct", dtype=torch.float32, seed=5)

#: Of the engine's memory, as the kernel names it in descriptors and mappings.
MEMORY_NAME = "memfd:deep_ep_py"


def shm_settings(**fields: Any) -> Settings:
    return Settings(**{"backend": "shm", "timeout_seconds": 20.0, "connect_timeout_seconds": 20.0, **fields})


@dataclass
class Rank:
    """What became of one rank. ``said``: what it told, the last of each key; ``exitcode``: -9 if it was killed."""

    pid: int
    result: Any = None
    trace: str = ""
    said: dict[str, Any] = field(default_factory=dict)
    exitcode: int | None = None


@dataclass(frozen=True)
class World:
    """What a rank's function gets: its rank, the gloo world, ways to tell the test or the other ranks something at
    once."""

    rank: int
    size: int
    group: Any
    tell: Callable[[str, Any], None]
    store: dist.Store

    def set(self, key: str) -> None:
        self.store.set(key, "")

    def wait_for(self, key: str) -> None:
        """Until some rank has set it."""
        self.store.wait([key], timedelta(seconds=30))


def run_world(
    num_ranks: int,
    fn: Callable[..., Any],
    *args: Any,
    lost: tuple[int, ...] = (),
    watch: Callable[[list[Rank]], None] | None = None,
    timeout_seconds: float = 45.0,
) -> list[Rank]:
    """Call ``fn(world, *args)`` in a process per rank. Those in ``lost`` are not waited for: they die.

    ``watch(ranks)`` is called again and again while they run (to send signals). Afterwards every process is gone, and
    neither a file in their temporary folder nor one of our segments' names in /dev/shm is left; whatever fails or is
    left behind is an assertion error.
    """
    context = process_context("forkserver")
    shared_before = set(names_in("/dev/shm"))
    with tempfile.TemporaryDirectory(prefix="fault_world_") as folder:
        store, scratch = Path(folder) / "store", Path(folder) / "tmp"
        scratch.mkdir()
        pipes = [context.Pipe(duplex=False) for _ in range(num_ranks)]
        processes = [
            context.Process(target=_worker, args=(r, num_ranks, str(store), str(scratch), pipes[r][1], fn, args))
            for r in range(num_ranks)
        ]
        try:
            for process in processes:
                process.start()
            for _, sender in pipes:
                sender.close()
            ranks = [Rank(int(p.pid or 0)) for p in processes]
            done = _collect(ranks, [receiver for receiver, _ in pipes], lost, watch, timeout_seconds)
        finally:
            for rank, process in enumerate(processes):
                if process.pid is not None:
                    process.join(timeout=0 if rank in lost else 3)
                    if process.is_alive():
                        process.kill()
                        process.join()
        for rank, process in zip(ranks, processes, strict=True):
            rank.exitcode = process.exitcode
            assert not Path(f"/proc/{rank.pid}").exists(), f"process {rank.pid} is left"
        failed = [f"rank {r}:\n{rank.trace}" for r, rank in enumerate(ranks) if rank.trace]
        assert not failed, "\n".join(failed)
        late = [r for r in range(num_ranks) if r not in done and r not in lost]
        exits = [rank.exitcode for rank in ranks]
        assert not late, f"ranks {late} did not finish in {timeout_seconds} s; exit codes {exits}"
        assert not list(scratch.rglob("*")), "files are left in the temporary folder"
    new = {n for n in set(names_in("/dev/shm")) - shared_before if re.search("deep_?ep", n, re.IGNORECASE)}
    assert not new, f"left in /dev/shm: {new}"
    return ranks


def _collect(
    ranks: list[Rank],
    receivers: list[Any],
    lost: tuple[int, ...],
    watch: Callable[[list[Rank]], None] | None,
    timeout_seconds: float,
) -> set[int]:
    done: set[int] = set()
    ended: set[int] = set()
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline and not done | ended >= set(range(len(ranks))) - set(lost):
        ready = connection.wait([r for i, r in enumerate(receivers) if i not in ended], timeout=0.02)
        for receiver in ready:
            who = receivers.index(receiver)
            try:
                what, value = receiver.recv()
            except EOFError:
                ended.add(who)
                continue
            if what == "result":
                ranks[who].result = value
                done.add(who)
            elif what == "failed":
                ranks[who].trace = value
                done.add(who)
                deadline = min(deadline, time.monotonic() + 2)
            else:
                ranks[who].said[what] = value
        if watch is not None:
            watch(ranks)
    return done


def _worker(
    rank: int, size: int, store: str, scratch: str, pipe: Any, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    tempfile.tempdir = scratch
    os.environ["TMPDIR"] = scratch
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server of the forks ignores it
    gc.freeze()  # what was imported before: `leftovers` collects in milliseconds instead of tenths of a second
    torch.set_num_threads(1)
    try:
        shared = dist.FileStore(store, size)
        dist.init_process_group("gloo", store=shared, rank=rank, world_size=size, timeout=timedelta(seconds=30))
        tell = lambda key, value: pipe.send((key, value))  # noqa: E731
        result = fn(World(rank, size, dist.group.WORLD, tell, dist.PrefixStore("test", shared)), *args)
        pipe.send(("result", result))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


def names_in(folder: str) -> list[str]:
    return [path.name for path in Path(folder).iterdir()]


def leftovers() -> list[str]:
    """What this process still has of the engine: descriptors of segments and of processes, and mappings."""
    gc.collect()
    found = []
    for fd in names_in("/proc/self/fd"):
        link = Path("/proc/self/fd") / fd
        if not link.is_symlink():  # it was the descriptor of the listing itself
            continue
        target = str(link.readlink())
        if MEMORY_NAME in target or "pidfd" in target:
            found.append(f"fd {fd} -> {target}")
    found += [line for line in Path("/proc/self/maps").read_text().splitlines() if MEMORY_NAME in line]
    return found


def threads_of_this_process() -> int:
    return len(names_in("/proc/self/task"))


def backend_of(buffer: Buffer) -> Any:
    return buffer._engine.backend


def use(buffer: Buffer, rank: int, case: Case) -> None:
    """A checked round trip: the buffer works."""
    result = v1.dispatch(buffer, case, rank)
    v1.check_dispatched(result, v1.expected_dispatch(case)[rank])
    v1.check_combine(buffer, case, rank, result[4], 1)
