"""Two hops beside one, across hosts: dispatch and combine over links of several rates, on this one machine.

    python benchmarks/bench_nodes.py --json out.json --plot out.png        (as root: it makes network namespaces)

The hosts are those of the test network (tests/net): namespaces with one interface each, whose rate ``tc tbf`` sets in
both directions. Ranks are forked from one server, and moved into their host's namespace. All of them share this
machine's cores, which carry the "network" too: where the cores are busy, it is they that are measured and not a link.

Contenders, on the same routing, in the same run
    hierarchical: ElasticBuffer, backend "hybrid": a row crosses once for each host, and is spread there; combine sums
    inside a host before it crosses. flat: ElasticBuffer with ``allow_hybrid_mode=False``, backend "collective".
    plain: ``dist.all_to_all_single`` over gloo with the permutes that a user would write, in its faster form
    (harness/gloo.py, ``TunedGlooPeer``); it moves no weights in combine.

Before anything is timed every contender's results are compared, bit for bit, with what the inputs say. These are small
whole numbers, so that sums are exact in any order.

What is measured
    Rounds interleave the contenders, and begin with another one each time. Ranks leave one barrier; the time of an
    operation is the slowest rank's. Median and p95 are over all calls, ratios are taken inside a round, and the table
    has their median, smallest and largest. "pair" is the sum of a round's dispatch and combine.

    SU GB/s = N * b / t, SO GB/s = unique (token, host) sent * b / t, as DeepEP counts them: per rank, the own host
    included, b the bytes of a row with topk_idx and topk_weights (combine: with weights only).

    "sent MB/host": what left the host's interface in one call (the busiest host); "rows MB/host": the rows alone,
    computed from the routing. "% of link, rows": those over time and rate. "% of link, frames": the same for all that
    the rate limit counted: rows, routing, control, and headers of every frame (of a full frame's 1514 bytes, 1448 are
    payload: rows cannot pass 95.6 %).

    "cores busy %": of all cores, by anybody, during the contender's rounds.

Routings
    even: K different experts of E, all alike. groups: K experts of the best 4 of 8 groups, chosen by the library's
    DeepSeek-V3 router with random weights. The last table has, for a dispatch, rows by token: those that cross with one
    hop and with two, counted in the routing, and what is expected of two hops; then, of two hops and the busiest host,
    the bytes of the rows, those in the library's ledger (``buffer.last_traffic()``), and those that left the interface.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "net")]  # ranks get it from here, too

from nodes import steer, table  # noqa: E402
from nodes.problem import ROUTINGS  # noqa: E402
from nodes.rank import Plan  # noqa: E402


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0], epilog="Run it as root.")
    parser.add_argument("--worlds", nargs="+", help="hosts x ranks of each world (2x4)")
    parser.add_argument(
        "--rates", nargs="+", help="of every host's link, as tc writes them, or none (none 1gbit 250mbit)"
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="T of each shape (128 1024)")
    parser.add_argument(
        "--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS), help="how experts are chosen"
    )
    parser.add_argument("--hidden", type=int, help="hidden size (7168)")
    parser.add_argument("--experts", type=int, help="number of experts (256)")
    parser.add_argument("--topk", type=int, default=8, help="slots of a token")
    parser.add_argument("--rounds", type=int, help="interleaved rounds at most (9)")
    parser.add_argument("--fewest", type=int, default=5, help="rounds at least")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds after which the fewest rounds have to do")
    parser.add_argument("--iters", type=int, default=0, help="calls of an operation in a round; 0: by time, 1 to 5")
    parser.add_argument("--seed", type=int, default=0, help="of the routing")
    parser.add_argument("--smoke", action="store_true", help="small shapes, seconds")
    parser.add_argument("--json", metavar="FILE", help="write the record")
    parser.add_argument("--plot", metavar="FILE.png", help="write a chart (needs matplotlib)")
    parser.add_argument("--markdown", metavar="FILE.json", help="print the tables of a record and do nothing else")
    options = parser.parse_args(argv)
    defaults: dict[str, Any] = {"worlds": ["2x4"], "rates": ["none", "1gbit", "250mbit"], "tokens": [128, 1024]}
    defaults |= {"hidden": 7168, "experts": 256, "rounds": 9}
    if options.smoke:
        defaults = {"worlds": ["2x2"], "rates": ["none", "1gbit"], "tokens": [16], "hidden": 64, "experts": 32}
        defaults |= {"rounds": 2}
        options.fewest = 2
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    try:
        options.ranks_by_host = [_ranks_by_host(world) for world in options.worlds]
        for rate in options.rates:
            table.bits_per_second(rate)
    except ValueError as e:
        parser.error(str(e))
    if any(options.experts % sum(ranks) for ranks in options.ranks_by_host):
        parser.error("--experts: a multiple of every world's ranks")
    if max(options.tokens) > 65536 or max(map(sum, options.ranks_by_host)) > 256:
        parser.error("the checks number at most 65536 tokens and 256 ranks")
    return options


def _ranks_by_host(world: str) -> tuple[int, ...]:
    hosts, _, ranks = world.partition("x")
    if not (hosts.isdecimal() and ranks.isdecimal() and int(hosts) > 1 and int(ranks) > 0):
        raise ValueError(f"--worlds: hosts x ranks of each, as 2x4, with two hosts at least; not {world!r}")
    return (int(ranks),) * int(hosts)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from harness import machine

    shape = {"hidden": options.hidden, "num_experts": options.experts, "num_topk": options.topk}
    record: dict[str, Any] = {"format": 1, "machine": machine.facts(len(os.sched_getaffinity(0))), "worlds": []}
    for ranks_by_host in options.ranks_by_host:
        plan = Plan(
            ranks_by_host=ranks_by_host,
            tokens=tuple(options.tokens),
            routings=tuple(options.routings),
            rates=tuple(options.rates),
            rounds=options.rounds,
            fewest=min(options.fewest, options.rounds),
            patience=options.patience,
            iterations=options.iters,
            seed=options.seed,
            **shape,
        )
        cells = steer.run(plan, steer.say)
        for cell in cells:
            cell["rows"] = table.rows_of(cell, shape)
        record["worlds"].append({"ranks_by_host": ranks_by_host, "shape": shape, "cells": cells})
    return record


def main() -> None:
    options = arguments()
    if options.markdown:
        print(table.markdown(json.loads(Path(options.markdown).read_text(encoding="utf-8"))))
        return
    from network import unavailable

    if why := unavailable():
        raise SystemExit(why)
    record = measure(options)
    print(table.text(record))
    if options.json:
        Path(options.json).write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.plot:
        from nodes.plot import plot

        plot(record, options.plot)


if __name__ == "__main__":
    main()
