"""The ranks of the run: aligned starts, the slowest rank's time, progress."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class World:
    """One rank's view of the torchrun world (gloo).

    Attributes:
        rank, size: of this process. cores: those this process may use. threads: torch's, and of a rank's copies.
        barrier: aligns starts (the library's own, once a buffer exists: gloo's leaves ranks far apart).
    """

    def __init__(self) -> None:
        dist.init_process_group("gloo")
        assert dist.group.WORLD is not None
        self.group: Any = dist.group.WORLD
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = max(1, self.cores // self.size)
        torch.set_num_threads(self.threads)
        self.barrier: Callable[[], Any] = dist.barrier
        self._started = time.monotonic()

    def close(self) -> None:
        dist.barrier()
        dist.destroy_process_group()

    def progress(self, text: str) -> None:
        """A line on stderr, from rank 0."""
        if self.rank == 0:
            print(f"[{time.monotonic() - self._started:6.1f} s] {text}", file=sys.stderr, flush=True)

    def time(self, operation: Callable[[], Any], iterations: int) -> tuple[list[float], Any]:
        """Seconds of each call on this rank, every call started together; and what the last one returned."""
        seconds: list[float] = []
        result: Any = None
        gc_was_on = gc.isenabled()
        gc.disable()
        try:
            for _ in range(iterations):
                result = None  # before the start: giving memory back is not part of the next call
                self.barrier()
                start = time.perf_counter()
                result = operation()
                seconds.append(time.perf_counter() - start)
        finally:
            if gc_was_on:
                gc.enable()
        return seconds, result

    def slowest(self, seconds: list[float]) -> list[float]:
        """The largest over ranks, entry by entry. Collective: lists of one length on every rank."""
        values = torch.tensor(seconds, dtype=torch.float64)
        if values.numel():
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        found: list[float] = values.tolist()
        return found

    def agree(self, error: str) -> str:
        """Every rank's error texts, joined; empty if no rank has one. Collective."""
        texts: list[Any] = [None] * self.size
        dist.all_gather_object(texts, error)
        return "; ".join(f"rank {r}: {t}" for r, t in enumerate(texts) if t)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]
