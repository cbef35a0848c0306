"""What every rank does: checks, one counted call of each operation, then timed rounds. See ``bench_nodes.py``."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness.gloo import TunedGlooPeer
from harness.ours import Mode
from harness.routing import Shape
from harness.world import World
from scenes import Place

from deep_ep_py import ElasticBuffer
from deep_ep_py.settings import Settings

from .problem import NodesProblem

CONTENDERS = ("hierarchical", "flat", "plain")
OPERATIONS = ("dispatch", "combine")
BACKENDS = {"hierarchical": "hybrid", "flat": "collective"}


@dataclass(frozen=True)
class Plan:
    """What one world runs. ``rates``: as ``tc`` writes them, or "none".

    ``rounds``: at least ``fewest``, and more until ``patience`` seconds are over, at most ``rounds``.
    """

    ranks_by_host: tuple[int, ...]
    tokens: tuple[int, ...]
    routings: tuple[str, ...]
    rates: tuple[str, ...]
    hidden: int
    num_experts: int
    num_topk: int
    rounds: int
    fewest: int
    patience: float
    iterations: int
    seed: int

    def arguments(self) -> dict[str, Any]:
        return {"plan": asdict(self)}

    def cells(self) -> Iterator[tuple[int, str, str]]:
        """(tokens, routing, rate), in the order in which they are run."""
        return itertools.product(self.tokens, self.routings, self.rates)

    def shape(self, num_tokens: int) -> Shape:
        return Shape(num_tokens, self.hidden, self.num_experts, self.num_topk)

    def problem(self, num_tokens: int, routing: str, rank: int = 0) -> NodesProblem:
        hosts = self.ranks_by_host
        return NodesProblem(self.shape(num_tokens), rank, sum(hosts), len(hosts), routing, self.seed)


def mark(cell: int, contender: str, step: str) -> str:
    """The gate before ``step``: an operation, or ``end``."""
    return f"cell{cell}-{contender}-{step}"


class NetWorld(World):
    """The world of a rank that :mod:`scenes` has connected."""

    def __init__(self, place: Place) -> None:
        self.group, self.rank, self.size = place.group, place.rank, place.num_ranks
        self.cores, self.threads = len(os.sched_getaffinity(0)), 1
        self._started = time.monotonic()


class Ours:
    def __init__(self, name: str, problem: NodesProblem, buffer: ElasticBuffer) -> None:
        self._mode = Mode(name, problem, buffer)
        self._got: Any = None
        self.check = self._mode.check

    def dispatch(self) -> None:
        self._got = self._mode.dispatch()

    def combine(self) -> Any:
        recv_x, _, weights, handle = self._got
        return self._mode.combine(recv_x, weights, handle)

    def ledger(self) -> list[int]:
        """[R] bytes between hosts, by the rank that sent them, as this rank's ledger has them of the last operation."""
        sent = [0] * self._mode.problem.size
        for link in self._mode.buffer.last_traffic().links:
            if link.kind == "wire":
                sent[link.source] += link.bytes
        return sent

    def forget(self) -> None:
        self._got = None


class Plain:
    def __init__(self, problem: NodesProblem) -> None:
        self._peer = TunedGlooPeer(problem)
        self._got: Any = None
        self.check = self._peer.check

    def dispatch(self) -> None:
        self._got = self._peer.dispatch()

    def combine(self) -> Any:
        return self._peer.combine(*self._got)

    def forget(self) -> None:
        self._got = None


def measure_nodes(place: Place, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """A record for each cell: seconds of this rank, ``[contender][operation][round][call]``, and the cores' share."""
    program = Plan(**plan)
    world = NetWorld(place)
    settings = replace(Settings.from_env(), num_threads=1)  # more ranks than cores
    buffers = {
        name: ElasticBuffer(
            place.group,
            num_max_tokens_per_rank=max(program.tokens),
            hidden=program.hidden,
            num_topk=program.num_topk,
            settings=replace(settings, backend=backend),
            allow_hybrid_mode=backend == "hybrid",
        )
        for name, backend in BACKENDS.items()
    }
    world.barrier = buffers["hierarchical"].barrier
    records, checked = [], ()
    for cell, (num_tokens, routing, rate) in enumerate(program.cells()):
        place.wait_at_gate(f"cell{cell}")  # there the rate is set
        if checked != (num_tokens, routing):
            problem = program.problem(num_tokens, routing, place.rank)
            contenders: dict[str, Any] = {name: Ours(name, problem, buffer) for name, buffer in buffers.items()}
            contenders["plain"] = Plain(problem)
            wrong = world.agree("; ".join(filter(None, (c.check() for c in contenders.values()))))
            if wrong:
                raise SystemExit(f"wrong results, nothing was timed: {wrong}")
            checked = (num_tokens, routing)
        record = {"tokens": num_tokens, "routing": routing, "rate": rate}
        records.append(record | _run_cell(place, world, cell, contenders, program))
    for buffer in buffers.values():
        buffer.destroy()
    return records


def _run_cell(place: Place, world: World, cell: int, contenders: dict[str, Any], plan: Plan) -> dict[str, Any]:
    first: dict[str, float] = {}
    ledgers: dict[str, dict[str, list[int]]] = {name: {} for name in BACKENDS}
    for name, contender in contenders.items():  # this warms up, too: each call finds its link's rate
        for operation in OPERATIONS:
            place.wait_at_gate(mark(cell, name, operation))
            start = time.perf_counter()
            getattr(contender, operation)()
            first[name] = first.get(name, 0.0) + time.perf_counter() - start
            if name in ledgers:
                ledgers[name][operation] = contender.ledger()
        place.wait_at_gate(mark(cell, name, "end"))
    iterations = plan.iterations or world.broadcast(max(1, min(5, int(1.0 / max(first.values())))))
    seconds: dict[str, dict[str, list[list[float]]]] = {c: {o: [] for o in OPERATIONS} for c in contenders}
    busy: dict[str, list[float]] = {c: [0.0, 0.0] for c in contenders}
    started = time.monotonic()
    for i in range(plan.rounds):
        if i >= plan.fewest and world.broadcast(time.monotonic() - started > plan.patience):
            break
        order = list(contenders)
        order = order[i % len(order) :] + order[: i % len(order)]
        for name in order:
            contender, before = contenders[name], _cores()
            for operation in OPERATIONS:
                seconds[name][operation].append(world.time(getattr(contender, operation), iterations)[0])
            for j, now in enumerate(_cores()):
                busy[name][j] += now - before[j]
            contender.forget()
    share = {name: used / total for name, (used, total) in busy.items() if total}
    return {"seconds": seconds, "iterations": iterations, "busy": share, "ledger": ledgers}


def _cores() -> tuple[float, float]:
    """Ticks of the machine's cores since boot: not idle, and all."""
    ticks = [float(t) for t in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)
