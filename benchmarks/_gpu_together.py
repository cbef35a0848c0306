"""Ranks that are threads of one process and share a GPU."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def on_own_stream(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn(group, ...)`` on the rank's GPU and on a stream of its own: on the default stream, which threads share, a
    rank would wait for the end of an operation that waits for this rank. Without a GPU: as it is, for a rehearsal."""

    @wraps(fn)
    def call(group: Any, *args: Any) -> Any:
        if not torch.cuda.is_available():
            return fn(group, *args)
        rank = group.rank() if callable(group.rank) else group.rank
        torch.cuda.set_device(rank % torch.cuda.device_count())
        with torch.cuda.stream(torch.cuda.Stream()):
            result = fn(group, *args)
            torch.cuda.current_stream().synchronize()
            return result

    return call


class NotCaptured(RuntimeError):
    """An operation cannot stand in a CUDA graph."""


class Together:
    """Where ``num_ranks`` threads meet on the host. A rank that does not come breaks it after ``seconds``."""

    def __init__(self, num_ranks: int, seconds: float = 30.0) -> None:
        self._barrier = threading.Barrier(num_ranks, timeout=seconds)
        self._capturing = threading.Lock()
        self._values: dict[int, float] = {}
        self._failures: list[Exception] = []

    def meet(self) -> None:
        self._barrier.wait()

    def most(self, value: float) -> float:
        """The largest of all ranks' values."""
        self._values[threading.get_ident()] = value
        self.meet()
        found = max(self._values.values())
        self.meet()  # all have read
        return found

    def capture(self, step: Callable[[], Any], steps: int = 1) -> tuple[Any, Any]:
        """A graph of ``steps`` steps, and what the last one returned. One rank after the other, while no kernel waits
        for a peer: beginning a capture frees memory, which waits for the device.

        Raises:
            NotCaptured: on every rank, if one cannot be captured.
        """
        graph, held = None, None
        self.synchronize()
        self.meet()
        try:
            with self._capturing:
                graph, held = self._captured(step, steps)
        except Exception as e:
            self._failures.append(e)
        self.meet()
        failures = list(self._failures)
        self.meet()  # all have read
        self._failures.clear()
        if failures:
            raise NotCaptured(str(failures[0])) from failures[0]
        return graph, held

    def _captured(self, step: Callable[[], Any], steps: int) -> tuple[Any, Any]:
        stream, graph, held = torch.cuda.current_stream(), torch.cuda.CUDAGraph(), None
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(steps):
                held = step()
        return graph, held

    def synchronize(self) -> None:
        """Wait for this rank's stream."""
        torch.cuda.current_stream().synchronize()

    def milliseconds(self, step: Callable[[], Any], steps: int, rounds: int = 5) -> float:
        """Of one ``step`` on the device, the slowest rank's, median of rounds. All ranks call it."""
        step()
        took = []
        for _ in range(rounds):
            self.synchronize()
            self.meet()
            took.append(self.most(self._time(step, steps) / steps))
        return statistics.median(took)

    def _time(self, step: Callable[[], Any], steps: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
