"""Beyond throughput: latency of one token and where it goes, the first dispatch, overlap with computation."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from deep_ep_py import ElasticBuffer
from deep_ep_py.communicator import thread_world

from .ours import make_elastic
from .routing import Problem, Shape
from .world import World


class _Timed:
    """Stands for the core's engine and adds up the time inside its calls: the binding, the core, waiting for peers."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._core, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = method(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        setattr(self, name, timed)
        return timed


def pair_latency(world: World, shape: Shape, backend: str, most: int) -> dict[str, Any]:
    """One token a rank through V2: dispatch, then combine of the received rows; microseconds, medians.

    At most ``most`` iterations, about a second for each part. ``whole``: the slowest rank's pair. The other parts are
    rank 0's, medians of loops in turn: ``backend``: the same through ``ElasticBuffer``'s backend with specs built
    before; ``core``: of it, inside the calls of the C++ core, with the binding and waiting for peers; ``tensors``: what
    the outputs' ``torch.empty`` and ``from_dlpack`` cost, measured apart; ``face``: ``whole`` of rank 0 less
    ``backend``.
    """
    shape = Shape(1, shape.hidden, shape.num_experts, shape.num_topk)
    problem = Problem(shape, world.rank, world.size)
    buffer = make_elastic(world, shape, backend)
    before, world.barrier = world.barrier, buffer.barrier

    def pair() -> Any:
        recv_x, _, _, handle, _ = buffer.dispatch(
            problem.x, topk_idx=problem.topk_idx, topk_weights=problem.topk_weights, num_experts=shape.num_experts,
            do_handle_copy=False,
        )  # fmt: skip
        return buffer.combine(recv_x, handle)

    try:
        warm = world.time(pair, 30)[0]
        iterations: int = world.broadcast(min(most, max(30, int(1.0 / statistics.median(warm)))))
        world.time(pair, iterations // 10)
        whole = world.slowest(world.time(pair, iterations)[0])
        found: dict[str, Any] = {
            "iterations": iterations,
            "whole_us": _us(whole),
            "whole_p95_us": 1e6 * statistics.quantiles(whole, n=20)[-1],
            "barrier_us": _us(world.slowest(world.time(buffer.barrier, iterations)[0])),
        }
        inner = buffer._engine.backend
        if inner.name == "shm":
            found.update(_breakdown(world, buffer, problem, pair, iterations))
        return found
    finally:
        world.barrier = before
        world.barrier()
        buffer.destroy()


def _breakdown(
    world: World, buffer: Any, problem: Problem, face_pair: Callable[[], Any], iterations: int
) -> dict[str, float]:
    """See :func:`pair_latency`. Specs are taken from real calls, so that they are what the face builds."""
    backend: Any = buffer._engine.backend
    specs: list[Any] = []

    def noting(prepare: Callable[..., Any]) -> Callable[..., Any]:
        def noted(spec: Any, **options: Any) -> Any:
            specs.append(spec)
            return prepare(spec, **options)

        return noted

    backend.prepare = noting(backend.prepare)
    backend.prepare_combine = noting(backend.prepare_combine)
    shape = problem.shape
    recv_x, recv_idx, weights, handle, _ = buffer.dispatch(
        problem.x, topk_idx=problem.topk_idx, topk_weights=problem.topk_weights, num_experts=shape.num_experts
    )
    combined, _, _ = buffer.combine(recv_x, handle)
    del backend.prepare, backend.prepare_combine
    dispatch_spec, combine_spec = specs

    def pair() -> None:
        flight = backend.prepare(dispatch_spec)
        backend.dispatch_send(flight)
        backend.dispatch_recv(flight)
        second = backend.prepare_combine(combine_spec)
        backend.combine_send(second)
        backend.combine_recv(second)

    real = backend._engine
    timed = _Timed(real)

    def in_core() -> float:
        timed.seconds = 0.0
        pair()
        return timed.seconds

    world.time(pair, 20)
    wholes: list[float] = []
    backends: list[float] = []
    cores: list[float] = []
    for _ in range(10):  # in turn, because the parts are subtracted from each other
        wholes += world.time(face_pair, iterations // 10)[0]
        backends += world.time(pair, iterations // 10)[0]
        backend._engine = timed
        try:
            for _ in range(iterations // 10):
                world.barrier()
                cores.append(in_core())
        finally:
            backend._engine = real
    plan = dispatch_spec.plan or handle._plan
    outputs = [plan.targets, plan.rank_prefix, plan.expert_counts, recv_idx, weights, handle.recv_src_metadata]
    outputs.append(combined)
    ordinary = _cost(lambda: [torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in outputs if t is not None])
    code = {"code": 4, "bits": 16}
    views = _cost(lambda: from_dlpack(real.allocate(shape=(1, shape.hidden), **code)))
    return {
        "rank0_whole_us": _us(wholes),
        "backend_us": _us(backends),
        "core_us": _us(cores),
        "tensors_us": 1e6 * (ordinary + views),
        "face_us": _us(wholes) - _us(backends),
    }


def _cost(fn: Callable[[], Any], iterations: int = 2000) -> float:
    for _ in range(50):
        fn()
    start = time.perf_counter()
    for _ in range(iterations):
        fn()
    return (time.perf_counter() - start) / iterations


def _us(seconds: list[float]) -> float:
    return 1e6 * statistics.median(seconds)


def first_dispatch(world: World, problem: Problem, backend: str, steady: int) -> dict[str, float]:
    """A new buffer whose constructor was told the sizes: construction, first dispatch, median of ``steady`` more."""
    shape = problem.shape
    world.barrier()
    start = time.perf_counter()
    buffer = make_elastic(world, shape, backend)
    construction = time.perf_counter() - start
    before, world.barrier = world.barrier, buffer.barrier

    def dispatch() -> Any:
        return buffer.dispatch(
            problem.x, topk_idx=problem.topk_idx, topk_weights=problem.topk_weights, num_experts=shape.num_experts
        )

    try:
        first = world.time(dispatch, 1)[0]
        times = world.slowest([construction, *first, *world.time(dispatch, steady)[0]])
        return {
            "construction_ms": 1e3 * times[0],
            "first_ms": 1e3 * times[1],
            "steady_ms": 1e3 * statistics.median(times[2:]),
        }
    finally:
        world.barrier = before
        world.barrier()
        buffer.destroy()


def overlap(shape: Shape, backend: str, repeats: int) -> dict[str, Any]:
    """One rank alone: how much of an asynchronous dispatch hides behind a single-threaded computation.

    ``hidden = 1 - (t_both - t_compute) / t_dispatch``, from medians; the median of ``repeats`` of them. Computation (a
    matmul that stays in one core's cache) and copying are pinned to a core each. Run by one process; others sleep.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        return {"skipped": "needs two cores and a system with CPU affinity"}
    problem = Problem(shape, 0, 1)
    buffer = ElasticBuffer(
        thread_world(1)[0], num_max_tokens_per_rank=shape.num_tokens, hidden=shape.hidden, num_topk=shape.num_topk,
        backend=backend,
    )  # fmt: skip
    a = torch.randn(128, 128)
    result = torch.empty_like(a)
    steps = 1

    def start_dispatch() -> Any:
        return buffer.dispatch(
            problem.x, topk_idx=problem.topk_idx, topk_weights=problem.topk_weights, num_experts=shape.num_experts,
            do_handle_copy=False, async_with_compute_stream=True,
        )  # fmt: skip

    def compute() -> None:
        for _ in range(steps):
            torch.mm(a, a, out=result)

    def dispatch() -> None:
        start_dispatch()[4].current_stream_wait()

    def both() -> None:
        got = start_dispatch()
        compute()
        got[4].current_stream_wait()

    def took(fn: Callable[[], None]) -> float:
        start = time.perf_counter()
        fn()
        return time.perf_counter() - start

    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    old = _threads()
    try:
        dispatch()  # starts the background threads
        for thread in _threads() - old:
            os.sched_setaffinity(thread, {cores[1]})
        os.sched_setaffinity(0, {cores[0]})
        for _ in range(3):
            dispatch()
        compute()
        t_dispatch = statistics.median(took(dispatch) for _ in range(5))
        t_step = min(took(compute) for _ in range(20))
        steps = max(1, int(2 * t_dispatch / t_step))
        rounds = [(took(compute), took(dispatch), took(both)) for _ in range(repeats)]
        hidden = [1 - (t_both - t_compute) / t_alone for t_compute, t_alone, t_both in rounds]
        medians = [1e3 * statistics.median(column) for column in zip(*rounds, strict=True)]
        return {
            "compute_ms": medians[0],
            "dispatch_ms": medians[1],
            "both_ms": medians[2],
            "hidden": statistics.median(hidden),
            "hidden_min": min(hidden),
            "hidden_max": max(hidden),
        }
    finally:
        os.sched_setaffinity(0, set(cores))
        torch.set_num_threads(torch_threads)
        buffer.destroy()


def _threads() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}
