"""One shape from checks to rows of the table: rounds that interleave ceilings, this library, gloo and MPI."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from deep_ep_py import Buffer

from .ceilings import KINDS, Ceilings
from .gloo import GlooPeer, TunedGlooPeer
from .mpi import MpiPeer
from .ours import make_elastic, make_modes
from .routing import Problem, Shape
from .world import World

Key = tuple[str, str]

_ROUNDS, _FEWEST_ROUNDS = 7, 5
_PATIENCE_SECONDS = 25.0  # for the rounds of one shape, before fewer of them have to do


@dataclass
class Options:
    """``rounds``: 0: 7, or 5 where they take long. ``iterations``: calls a round, 0: by size. ``only``: what to run.

    ``probe_bytes``: of the large ceilings.
    """

    backend: str
    rounds: int
    iterations: int
    only: list[str]
    probe_bytes: int
    seed: int = 0


@dataclass
class Mpi:
    """The MPI peer, on rank 0, or the reason why there is none."""

    peer: MpiPeer | None = None
    reason: str = ""
    library: str = ""

    def attempt(self, action: Callable[[MpiPeer], Any]) -> Any:
        """``action`` on the peer; on failure there is no peer any more, and the table says why."""
        if self.peer is None:
            return None
        try:
            return action(self.peer)
        except (OSError, RuntimeError, ValueError) as e:
            self.reason = f"failed: {e}"
            self.peer.close()
            self.peer = None
            return None


@dataclass
class Recorder:
    """Seconds by (contender, operation), one list a round: of this rank first, of the slowest rank after ``finish``."""

    seconds: dict[Key, list[list[float]]] = field(default_factory=dict)

    def add(self, contender: str, samples: dict[str, list[float]]) -> None:
        for operation, times in samples.items():
            self.seconds.setdefault((contender, operation), []).append(times)

    def finish(self, world: World) -> None:
        """Collective: every rank has recorded the same."""
        flat = iter(world.slowest([s for rounds in self.seconds.values() for times in rounds for s in times]))
        for rounds in self.seconds.values():
            for times in rounds:
                times[:] = [next(flat) for _ in times]


def run_shape(world: World, shape: Shape, options: Options, mpi: Mpi) -> dict[str, Any]:
    """A JSON-able record of the shape; equal on all ranks but for MPI's numbers, which rank 0 has."""
    problem = Problem(shape, world.rank, world.size, options.seed)
    elastic = make_elastic(world, shape, options.backend)
    v1 = Buffer(world.group, backend=options.backend) if "v1" in options.only else None
    before, world.barrier = world.barrier, elastic.barrier
    modes = make_modes(options.only, problem, elastic, v1)
    gloo: dict[str, GlooPeer] = {}
    if "gloo" in options.only and {"v2", "v1"} & set(options.only):
        gloo |= {"gloo": GlooPeer(problem), "tuned gloo": TunedGlooPeer(problem)}
    if "gloo" in options.only and "fp8" in options.only:
        gloo |= {"gloo fp8": GlooPeer(problem, fp8=True), "tuned gloo fp8": TunedGlooPeer(problem, fp8=True)}
    try:
        world.progress(f"T={shape.num_tokens}: checking")
        _refuse(world, [mode.check() for mode in modes] + [peer.check() for peer in gloo.values()])
        heavy = shape.num_tokens * shape.bf16_row_bytes > 8 << 20
        iterations = options.iterations or (3 if heavy else 30)
        slow_iterations = 1 if heavy else min(iterations, 5)
        moved = -(-problem.total_rows(False) // world.size) * shape.bf16_row_bytes
        ceilings = Ceilings(world, elastic, moved, options.probe_bytes, max(3, min(iterations, 10)))
        mpi.attempt(lambda peer: peer.setup(_byte_matrices(problem)))
        for mode in modes:
            mode.round(world, 2)

        recorder, mpi_recorder = Recorder(), Recorder()
        rounds, started = 0, time.monotonic()
        while rounds < (options.rounds or _ROUNDS):
            may_stop = not options.rounds and rounds >= _FEWEST_ROUNDS
            if may_stop and world.broadcast(time.monotonic() - started > _PATIENCE_SECONDS):
                break
            rounds += 1
            world.progress(f"T={shape.num_tokens}: round {rounds} of {options.rounds or _ROUNDS} at most")
            recorder.add("ceilings", ceilings.measure())
            for mode in modes:
                recorder.add(mode.name, mode.round(world, iterations))
            for name, peer in gloo.items():
                recorder.add(name, _gloo_round(world, peer, slow_iterations, combine="fp8" not in name))
            for operation in ("dispatch", "combine", "fp8 dispatch"):
                times = mpi.attempt(partial(MpiPeer.run, name=operation, iterations=iterations))
                if times:
                    mpi_recorder.add("mpi", {operation: times})
            world.barrier()
        recorder.finish(world)
    finally:
        world.barrier = before
    probes = [{kind: recorder.seconds["ceilings", kind][i] for kind in KINDS} for i in range(rounds)]
    rates = [ceilings.rates(slowest) for slowest in probes]
    rows = [
        _row(mode, operation, recorder.seconds, mpi_recorder.seconds, rates)
        for mode in modes
        for operation in mode.operations()
    ]
    elastic.destroy()
    if v1 is not None:
        v1.destroy()
    return {
        "num_tokens": shape.num_tokens,
        "hidden": shape.hidden,
        "num_experts": shape.num_experts,
        "num_topk": shape.num_topk,
        "seed": options.seed,
        "rounds": rounds,
        "iterations": iterations,
        "received_tokens_per_rank": problem.total_rows(False) / world.size,
        "expanded_rows_per_rank": problem.total_rows(True) / world.size,
        "ceilings": {
            "memory": ceilings.large,
            "bytes_per_rank": ceilings.bytes,
            "gb_per_s": {kind: _spread([r[kind] / 1e9 for r in rates]) for kind in KINDS},
        },
        "rows": rows,
    }


def _refuse(world: World, errors: list[str]) -> None:
    wrong = world.agree("; ".join(filter(None, errors)))
    if wrong:
        raise SystemExit(f"wrong results, nothing was timed: {wrong}")


def _gloo_round(world: World, peer: GlooPeer, iterations: int, *, combine: bool) -> dict[str, list[float]]:
    seconds, got = world.time(peer.dispatch, iterations)
    found = {"dispatch": seconds}
    if combine:
        found["combine"], _ = world.time(lambda: peer.combine(*got), iterations)
    return found


def _byte_matrices(problem: Problem) -> dict[str, list[list[int]]]:
    shape = problem.shape

    def times(matrix: list[list[int]], row_bytes: int) -> list[list[int]]:
        return [[count * row_bytes for count in row] for row in matrix]

    back = [list(column) for column in zip(*problem.counts, strict=True)]
    return {
        "dispatch": times(problem.counts, shape.dispatch_row_bytes(fp8=False)),
        "combine": times(back, shape.combine_row_bytes()),
        "fp8 dispatch": times(problem.counts, shape.dispatch_row_bytes(fp8=True)),
    }


def _row(
    mode: Any,
    operation: str,
    seconds: dict[Key, list[list[float]]],
    mpi: dict[Key, list[list[float]]],
    rates: list[dict[str, float]],
) -> dict[str, Any]:
    traffic, counted_bytes = mode.operations()[operation]
    rounds = seconds[mode.name, operation]
    every = sorted(s for times in rounds for s in times)
    medians = [statistics.median(times) for times in rounds]
    floors = [traffic.floor_seconds(r) for r in rates]
    row: dict[str, Any] = {
        "mode": mode.name,
        "operation": operation,
        "samples": len(every),
        "median_ms": 1e3 * statistics.median(every),
        "p95_ms": 1e3 * every[min(len(every) - 1, round(0.95 * (len(every) - 1)))],
        "su_gb_per_s": counted_bytes / statistics.median(every) / 1e9,
        "bytes_read": traffic.read,
        "bytes_written": traffic.written,
        "floor_ms": 1e3 * statistics.median(floors),
        "percent_of_floor": _spread([100 * f / m for f, m in zip(floors, medians, strict=True)]),
        "percent_of_copy_floor": _spread(
            [100 * traffic.copy_floor_seconds(r) / m for r, m in zip(rates, medians, strict=True)]
        ),
        "time_over_floor": _spread([m / f for f, m in zip(floors, medians, strict=True)]),
    }
    # A peer delivers what the compact modes deliver; nobody else's call delivers expanded rows.
    kind = operation.split(",", maxsplit=1)[0]
    sources = {
        "gloo": seconds.get(("gloo fp8" if mode.fp8 else "gloo", kind)),
        "tuned_gloo": seconds.get(("tuned gloo fp8" if mode.fp8 else "tuned gloo", kind)),
        "mpi": mpi.get(("mpi", "fp8 dispatch" if mode.fp8 else kind)),
    }
    for name, theirs in sources.items():
        if mode.expand or theirs is None or len(theirs) != len(medians):
            continue
        their_medians = [statistics.median(times) for times in theirs]
        row[name] = {
            "median_ms": 1e3 * statistics.median([s for times in theirs for s in times]),
            "ratio": _spread([t / m for t, m in zip(their_medians, medians, strict=True)]),
        }
    return row


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
