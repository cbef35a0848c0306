"""Worlds of ranks inside one test: threads of this process, or processes of their own."""

from __future__ import annotations

import multiprocessing
import queue
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

#: What a server of forks imports once, so that a rank costs tenths of a second and not the seconds of torch.
PRELOAD = (
    "torch",
    "torch._dynamo",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "deep_ep_py",
    "deep_ep_py.testing",
)
#: After one rank failed, how many seconds the others may take before they are left behind (threads) or killed.
GRACE_SECONDS = 2.0


class WorldError(RuntimeError):
    """A rank failed, died or did not finish. ``rank``: the first that failed, or -1 for a timeout."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


def run_threads(num_ranks: int, fn: Callable[..., Any], *args: Any, timeout_seconds: float = 60.0) -> list[Any]:
    """Call ``fn(communicator, *args)`` on one thread per rank; return the results by rank.

    Raises:
        WorldError: the first rank that failed (its exception is the cause), or the ranks that did not finish in time.
            Threads cannot be killed: stragglers stay behind as daemons until their own deadline.
    """
    from deep_ep_py.communicator import thread_world

    results: list[Any] = [None] * num_ranks
    ended: queue.Queue[tuple[int, BaseException | None]] = queue.Queue()

    def body(rank: int, communicator: Any) -> None:
        try:
            results[rank] = fn(communicator, *args)
        except BaseException as e:
            ended.put((rank, e))
        else:
            ended.put((rank, None))

    threads = [
        threading.Thread(target=body, args=(rank, c), name=f"rank {rank}", daemon=True)
        for rank, c in enumerate(thread_world(num_ranks))
    ]
    for thread in threads:
        thread.start()
    failure: tuple[int, BaseException] | None = None
    deadline = time.monotonic() + timeout_seconds
    for _ in range(num_ranks):
        try:
            rank, error = ended.get(timeout=max(deadline - time.monotonic(), 0.01))
        except queue.Empty:
            break
        if error is not None and failure is None:
            failure = (rank, error)
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if failure is not None:
        rank, error = failure
        raise WorldError(f"rank {rank} of {num_ranks} (threads): {type(error).__name__}: {error}", rank) from error
    for thread in threads:
        thread.join(timeout=max(deadline - time.monotonic(), 0.01))
    late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if late:
        raise WorldError(f"ranks {late} of {num_ranks} (threads) did not finish in {timeout_seconds} s", -1)
    return results


def run_processes(num_ranks: int, fn: Callable[..., Any], *args: Any, timeout_seconds: float = 90.0) -> list[Any]:
    """Call ``fn(group, *args)`` in one new process per rank, ``group`` being a gloo world; return the results by rank.

    ``fn`` is importable by name in a new interpreter; arguments and results are pickled (no fp8 tensors: send bytes).
    Each rank is an interpreter of its own ("spawn"), unless the program chose the start method "forkserver".

    Raises:
        WorldError: with the failed rank's traceback, or naming the ranks that died or did not finish. No process is
            left behind in either case.
    """
    context = process_context(multiprocessing.get_start_method(allow_none=True) or "spawn")
    with tempfile.TemporaryDirectory() as folder:
        ended = context.SimpleQueue()
        workers = [
            context.Process(
                target=_worker, args=(rank, num_ranks, folder, timeout_seconds, ended, fn, args), daemon=True
            )
            for rank in range(num_ranks)
        ]
        try:
            for worker in workers:
                worker.start()
            return _collect(workers, ended, timeout_seconds)
        finally:
            for worker in workers:
                if worker.pid is not None:
                    worker.join(timeout=0 if worker.exitcode is None else None)
                    if worker.is_alive():
                        worker.kill()
                        worker.join()


def store_of_processes() -> Any:
    """A store that the ranks of :func:`run_processes` share: ``set`` and ``wait`` for what a rank must not do early."""
    import torch.distributed as dist

    from .._rows import prefixed

    return prefixed("test", dist.distributed_c10d._get_default_store())


def process_context(method: str) -> Any:
    """How ranks are started. "fork" is none of the ways: this process may have threads, and buffers."""
    if method != "forkserver":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    return context


def _worker(
    rank: int,
    num_ranks: int,
    folder: str,
    timeout_seconds: float,
    ended: Any,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=(Path(folder) / "rendezvous").as_uri(),
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=timeout_seconds),
        )
        assert dist.group.WORLD is not None
        result = fn(dist.group.WORLD, *args)
        dist.barrier()  # no rank may leave while a peer still uses its connections
        dist.destroy_process_group()
    except BaseException:
        ended.put((rank, None, traceback.format_exc()))
    else:
        ended.put((rank, result, ""))


def _collect(workers: list[Any], ended: Any, timeout_seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    failure: tuple[int, str] | None = None
    deadline = time.monotonic() + timeout_seconds
    while len(results) < len(workers) and time.monotonic() < deadline:
        alive = [worker.is_alive() for worker in workers]  # before the queue is read: the last words come first
        while not ended.empty():
            rank, result, trace = ended.get()
            results[rank] = result
            if trace and failure is None:
                failure = (rank, trace)
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        dead = [rank for rank in range(len(workers)) if not alive[rank] and rank not in results]
        if dead and failure is None:
            failure = (dead[0], f"died with exit code {workers[dead[0]].exitcode}")
            break
        time.sleep(0.005)
    if failure is not None:
        raise WorldError(f"rank {failure[0]} of {len(workers)} (processes):\n{failure[1]}", failure[0])
    late = [rank for rank in range(len(workers)) if rank not in results]
    if late:
        raise WorldError(f"ranks {late} of {len(workers)} (processes) did not finish in {timeout_seconds} s", -1)
    for worker in workers:
        worker.join(timeout=10)
    return [results[rank] for rank in range(len(workers))]
