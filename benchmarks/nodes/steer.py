"""Steers a world through its gates: sets rates, and reads the interfaces while the ranks are silent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import launch
import scenes
from network import INTERFACE, Network

from .rank import CONTENDERS, OPERATIONS, Plan, mark, measure_nodes

# Ranks import the program they are forked for, and find this there.
scenes.SCENES[measure_nodes.__name__] = measure_nodes

_START_SECONDS = 120.0
_CELL_SECONDS = 900.0


def run(plan: Plan, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """One record a cell: seconds of the slowest rank, and bytes on the wire by host.

    Raises:
        SystemExit: ranks failed; the message has their words.
    """
    counted: list[dict[str, Any]] = []
    with (
        Network(len(plan.ranks_by_host)) as network,
        launch.forked(network, plan.ranks_by_host, measure_nodes.__name__, **plan.arguments()) as world,
    ):
        try:
            for cell, (tokens, routing, rate) in enumerate(plan.cells()):
                progress(f"{'+'.join(map(str, plan.ranks_by_host))} ranks, T={tokens}, {routing}, link {rate}")
                world.wait_for(f"cell{cell}", _START_SECONDS if cell == 0 else _CELL_SECONDS)
                for host in network.hosts:
                    network.set_rate(host, None if rate == "none" else rate)
                load = os.getloadavg()[0]
                world.open(f"cell{cell}")
                counted.append({"load_average": load, "wire": {c: _count(world, cell, c) for c in CONTENDERS}})
            by_rank = world.values(_CELL_SECONDS)
        except AssertionError as e:
            said = {rank: found["error"] for rank, found in world.results(0.0).items() if "error" in found}
            raise SystemExit("\n".join(f"rank {rank}: {error}" for rank, error in said.items()) or str(e)) from e
    return [_merge(plan, [records[i] for records in by_rank], found) for i, found in enumerate(counted)]


def _count(world: launch.World, cell: int, contender: str) -> dict[str, Any]:
    """Bytes that left each host in one call, by operation: on its interface, and as its rate limit counts them."""
    found: dict[str, Any] = {}
    before: list[tuple[int, int]] = []
    for done, step in zip((None, *OPERATIONS), (*OPERATIONS, "end"), strict=True):
        gate = mark(cell, contender, step)
        world.wait_for(gate, _CELL_SECONDS)
        time.sleep(0.02)  # acknowledgements
        now = [_sent(world.network, host) for host in world.network.hosts]
        if done is not None:
            passed = [(a - c, b - d) for (a, b), (c, d) in zip(now, before, strict=True)]
            found[done] = {"interface": [p[0] for p in passed], "limited": [p[1] for p in passed]}
        before = now
        world.open(gate)
    return found


def _sent(network: Network, host: int) -> tuple[int, int]:
    """Bytes. The second counts the headers of every frame; the first hands 64 KiB over under one. 0: no limit."""
    command = ["tc", "-n", network.namespace(host), "-s", "-json", "qdisc", "show", "dev", INTERFACE]
    queues = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout)
    limited = sum(q["bytes"] for q in queues if q["kind"] == "tbf")
    return network.counters(host).tx_bytes, limited


def _merge(plan: Plan, by_rank: list[dict[str, Any]], counted: dict[str, Any]) -> dict[str, Any]:
    first, hosts = by_rank[0], _ranks_of(plan)
    slowest = {
        name: {
            operation: [
                [max(calls) for calls in zip(*(r["seconds"][name][operation][i] for r in by_rank), strict=True)]
                for i in range(len(rounds))
            ]
            for operation, rounds in operations.items()
        }
        for name, operations in first["seconds"].items()
    }
    ledgers = {
        name: {
            operation: [sum(r["ledger"][name][operation][source] for r in by_rank for source in host) for host in hosts]
            for operation in operations
        }
        for name, operations in first["ledger"].items()
    }
    return {
        **first,
        "seconds": slowest,
        "ledger": ledgers,
        **counted,
        **_closed_form(plan, first["tokens"], first["routing"]),
    }


def _closed_form(plan: Plan, tokens: int, routing: str) -> dict[str, Any]:
    problem = plan.problem(tokens, routing)
    crossings = problem.domains_of_tokens.sum(1)
    own = sum(int(crossings[r, host]) for host, ranks in enumerate(_ranks_of(plan)) for r in ranks)
    return {
        "wire_rows": {name: problem.wire_rows(name) for name in CONTENDERS},
        "crossings_per_token": (int(crossings.sum()) - own) / (problem.size * tokens),
        "expected_crossings_per_token": problem.expected_crossings(),
        "received_per_rank": problem.total_rows(False) / problem.size,
        "sent_per_rank": problem.num_sent_per_rank,
    }


def _ranks_of(plan: Plan) -> list[range]:
    """By host."""
    ends = list(accumulate(plan.ranks_by_host))
    return [range(end - n, end) for end, n in zip(ends, plan.ranks_by_host, strict=True)]


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
