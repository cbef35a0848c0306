"""Dispatch and combine beside gloo, MPI and the machine's own limits: one run, one routing, correctness first.

    torchrun --standalone --nproc-per-node 4 benchmarks/bench_dispatch_combine.py --json out.json --plot out.png
    python benchmarks/bench_dispatch_combine.py --markdown out.json

What is measured
    Every operation is first checked, bit for bit, against what the seeded inputs say it delivers; a wrong result ends
    the run. Then come rounds: 7, or 5 where they take long. One round measures, in turn: the machine's ceilings, every
    operation of this library, gloo, MPI. Ratios are taken inside a round; the table shows the median of the rounds'
    ratios and their smallest and largest.

Time of an operation
    All ranks leave one barrier (this library's, for gloo's operations too), then each takes the time of its call. The
    operation's time is the slowest rank's. Median and p95 are over all calls of all rounds.

SU GB/s
    As DeepEP counts: N * b / t, N the rows received by a rank (its own included, the mean over ranks) and b the bytes
    of one: x, scale factors, topk_idx, topk_weights for dispatch; a bf16 row and K float32 weights for combine.
    Expanded modes are counted with the same N, though they deliver D rows.

Floor
    What the bytes alone cost at the speed at which these R processes, all at once, read and write this memory:

        floor = bytes read / read rate + bytes written / write rate

        dispatch:              reads T * B,  writes N * B     (expanded: D * B)
        combine, y in place:   reads N * B,  writes T * B
        combine, y copied:     the same, and one copy of the rows: reads N * B, writes N * B

    summed over ranks; B is a row with its scale factors, small arrays are left out. Rates are of all ranks together:
    R * probe bytes / time of the slowest rank, median of the repetitions in this very round. Reading is a plain sum
    over a heap tensor; writing is the library's own row copy to a heap tensor, from 256 KiB that stay in a core's
    cache. Where a rank receives more than 8 MiB, tensors are larger than the caches and stores are non-temporal. Else
    tensors are as large as what it receives, and stores are ordinary, so that caches help the probes as they help the
    operations; such a floor knows nothing of lines that must come out of another core's cache, nor of the two
    rendezvous. A sum of two times is no law of nature: reading and writing overlap where one core alone cannot fill
    the memory's bus, and an operation can then pass 100 %. So a stricter floor stands beside it, "% of copy floor": as
    many bytes as are both read and written go at the rate of a copy (probed likewise), the others at their own rate.

Peers
    gloo: ``dist.all_to_all_single`` and the permutes, see harness/gloo.py. It includes, like V2: destinations from
    topk_idx, exchange of counts, ids and weights, and for combine the sum (without weights). Its buffers are allocated
    once. MPI: ``Alltoallv`` of the same bytes between a second set of processes, and nothing else: no permutes, no
    counts, no sum. Each sleeps while the others run. V1's dispatch includes get_dispatch_layout.

Also: latency of one token and where it goes; the first dispatch of a new buffer; asynchronous overlap: see
harness/extras.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

PARTS = ("v2", "expand", "v1", "fp8", "gloo", "latency", "first", "overlap")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0], epilog="Run it by torchrun.")
    parser.add_argument("--tokens", "--shapes", type=int, nargs="+", help="T of each shape (4096 128)")
    parser.add_argument("--hidden", type=int, help="hidden size (7168)")
    parser.add_argument("--experts", type=int, help="number of experts (256)")
    parser.add_argument("--topk", type=int, default=8, help="slots of a token")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (7, or 5 where they take long)")
    parser.add_argument("--iters", type=int, default=0, help="calls of an operation in a round; 0: by size")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--mpi", choices=("auto", "off"), help="MPI Alltoallv beside it (auto; off in --quick)")
    parser.add_argument("--backend", default="auto", help="backend of this library")
    parser.add_argument("--seed", type=int, default=0, help="of the routing")
    parser.add_argument("--quick", "--smoke", action="store_true", help="small shapes, seconds; needs torch only")
    parser.add_argument("--json", metavar="FILE", help="write the record")
    parser.add_argument("--plot", metavar="FILE.png", help="write a chart (needs matplotlib)")
    parser.add_argument(
        "--markdown",
        metavar="FILE.json",
        help="print the tables of a record (with --plot, draw its shapes of --tokens) and do nothing else",
    )
    options = parser.parse_args(argv)
    defaults: dict[str, Any] = {"tokens": [4096, 128], "hidden": 7168, "experts": 256, "rounds": 0, "mpi": "auto"}
    if options.quick:
        defaults = {"tokens": [256, 16], "hidden": 512, "experts": 32, "rounds": 5, "mpi": "off"}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if min(*options.tokens, options.hidden, options.experts, options.topk) < 1:
        parser.error("sizes are positive")
    if max(options.tokens) > 32768:
        parser.error("--tokens: at most 32768: the checks number tokens in single bytes")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any] | None:
    """The record, on rank 0."""
    from harness import machine
    from harness.extras import first_dispatch, overlap, pair_latency
    from harness.mpi import MpiPeer
    from harness.ours import make_elastic
    from harness.routing import Problem, Shape
    from harness.run import Mpi, Options, run_shape
    from harness.world import World

    world = World()
    shapes = [Shape(t, options.hidden, options.experts, options.topk) for t in options.tokens]
    wanted = set(options.only)
    mpi = Mpi(reason="off")
    try:
        if world.rank == 0 and options.mpi == "auto" and wanted & {"v2", "v1", "fp8"}:
            world.progress("starting mpirun")
            try:
                mpi = Mpi(MpiPeer(world.size))
                mpi.library = mpi.peer.library if mpi.peer else ""
            except (OSError, RuntimeError, ValueError) as e:
                mpi = Mpi(reason=str(e))
        world.barrier()
        probe = make_elastic(world, Shape(1, 1, 1, 1), options.backend)
        info = probe.backend_info()
        probe.destroy()
        probe_bytes = 8 << 20 if options.quick else 96 << 20
        plan = Options(options.backend, options.rounds, options.iters, options.only, probe_bytes, options.seed)
        record: dict[str, Any] = {"format": 1, "machine": machine.facts(world.cores)}
        timed = shapes if wanted & {"v2", "expand", "v1", "fp8"} else []
        record["shapes"] = [run_shape(world, shape, plan, mpi) for shape in timed]
        record["run"] = {
            "ranks": world.size,
            "threads": world.threads,
            "backend": info.name,
            "refused": info.refused,
            "mpi": mpi.library if mpi.peer else mpi.reason,
            "mpi_missing": "" if mpi.peer else mpi.reason.partition(" (")[0].partition(":")[0],
            "options": {k: v for k, v in vars(options).items() if k not in ("json", "plot", "markdown")},
        }
        if mpi.peer is not None:
            mpi.peer.close()
            mpi.peer = None
        if "latency" in wanted:
            world.progress("latency of one token")
            record["latency"] = pair_latency(world, shapes[0], options.backend, 100 if options.quick else 5000)
        if "first" in wanted:
            world.progress("first dispatch")
            problem = Problem(shapes[0], world.rank, world.size, options.seed)
            record["first"] = first_dispatch(world, problem, options.backend, 8)
            record["first"]["num_tokens"] = shapes[0].num_tokens
        if "overlap" in wanted:
            world.progress("overlap")
            if world.rank == 0:  # the others sleep in broadcast
                record["overlap"] = overlap(shapes[0], options.backend, 5 if options.quick else 9)
                record["overlap"]["num_tokens"] = shapes[0].num_tokens
            world.broadcast(None)
        world.progress("done")
    finally:
        if mpi.peer is not None:
            mpi.peer.close()
    world.close()
    return record if world.rank == 0 else None


def main() -> None:
    options = arguments()
    from harness import report

    if options.markdown:
        record = json.loads(Path(options.markdown).read_text(encoding="utf-8"))
        print(report.markdown(record))
        if options.plot:
            from harness.plot import plot

            plot(record | {"shapes": [s for s in record["shapes"] if s["num_tokens"] in options.tokens]}, options.plot)
        return
    if "RANK" not in os.environ:
        raise SystemExit(f"run it by torchrun: torchrun --standalone --nproc-per-node 2 {sys.argv[0]}")
    record = measure(options)
    if record is None:
        return
    print(report.text(record))
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.plot:
        from harness.plot import plot

        plot(record, options.plot)


if __name__ == "__main__":
    main()
