"""``python -m deep_ep_py plan``: the scale model's command. Takes a problem and a cluster, prints what to expect."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import EPArgumentError
from .scale_model import (
    FORMULA,
    BackendName,
    Cluster,
    Counts,
    Integers,
    LinkBytes,
    Op,
    Times,
    Workload,
    bytes_of,
    count,
    times_of,
)
from .sizes import elastic_heap_bytes
from .validate import whole

#: Up to so many ranks, --json has every link.
_LEAST_RATE = 1e-6  # below it times are no numbers any more
MATRIX_RANKS = 64

_SF_CHANNELS = 128  # that share one float32 scale factor, as elastic_heap_bytes has it


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """One operation: its bytes by link, and its times."""

    op: Op
    moved: LinkBytes
    times: Times
    node_of: Integers

    def by_rank(self) -> dict[str, Integers]:
        """[R] bytes each: to itself, to and from others of its node, to and from other nodes."""
        total, same = self.moved.total, self.node_of[:, None] == self.node_of
        own = total.diagonal()
        inside, across = np.where(same, total, 0), np.where(same, 0, total)
        return {
            "local": own,
            "domain_out": inside.sum(1) - own,
            "domain_in": inside.sum(0) - own,
            "wire_out": across.sum(1),
            "wire_in": across.sum(0),
        }

    def largest_link(self) -> tuple[int, int, int]:
        """(source, destination, bytes) of the link that carries most: across nodes where there are several."""
        total = self.moved.total
        far = np.where(self.node_of[:, None] == self.node_of, 0, total)
        among = far if far.any() else total - np.diag(total.diagonal())
        source, destination = np.unravel_index(int(among.argmax()), among.shape)
        return int(source), int(destination), int(among.max())


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Everything that the command tells. ``recv_rows``: [R] rows that each rank receives."""

    backend: BackendName
    cluster: Cluster
    load: Workload
    routing: str
    heap_bytes: int
    recv_rows: Integers
    forecasts: tuple[Forecast, ...]

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "backend": self.backend,
            "cluster": asdict(self.cluster),
            "workload": asdict(self.load),
            "routing": self.routing,
            "heap_bytes_per_rank": self.heap_bytes,
            "recv_rows": self.recv_rows.tolist(),
        }
        for f in self.forecasts:
            times = f.times
            source, destination, num_bytes = f.largest_link()
            found[f.op] = {
                "bytes_by_rank": {name: values.tolist() for name, values in f.by_rank().items()},
                "largest_link": {"source": source, "destination": destination, "bytes": num_bytes},
                "bottleneck": times.bottleneck,
                "bottleneck_rank": int(times.memory.argmax()),
                "seconds": {
                    "total": times.total,
                    "wire_out": float(times.wire_out.max()),
                    "wire_in": float(times.wire_in.max()),
                    "memory": float(times.memory.max()),
                    "fill": times.fill,
                    "latency": times.latency,
                },
            }
            if self.cluster.num_ranks <= MATRIX_RANKS:
                parts = {name: getattr(f.moved, name).tolist() for name in ("rows", "routing", "control")}
                found[f.op]["links"] = parts
        return found

    def as_text(self) -> str:
        nodes, load, rows = self.cluster.nodes, self.load, self.recv_rows
        each = f"{nodes[0]}" if len(set(nodes)) == 1 else "+".join(map(str, nodes))
        width = load.row_bytes + load.sf_bytes
        one_for = "each slot" if load.expand else "each token and rank"
        link, memory, latency = self.cluster.link_gbps, self.cluster.memory_gbps, self.cluster.link_latency_us
        assumed = f"--link-gbps {link:g} a node, --memory-gbps {memory:g} a rank, --link-latency-us {latency:g}"
        lines = [
            f"deep_ep_py plan: {len(nodes)} node{'s' * (len(nodes) > 1)} of {each} ranks, backend {self.backend}",
            "",
            f"  routing       {self.routing}",
            f"  rows          {width} bytes out, {load.combined_row_bytes} back, one for {one_for}",
            f"  received      rows: {_spread(rows, str)}; the largest output {_size(int(rows.max()) * width)}",
            f"  heap          {_size(self.heap_bytes)} a rank hold any routing (get_buffer_size_hint)",
            f"  assumed       {assumed}",
        ]
        for f in self.forecasts:
            source, destination, num_bytes = f.largest_link()
            lines += ["", f.op]
            lines += [f"  {name:<13} {_spread(values, _size)}" for name, values in f.by_rank().items() if values.any()]
            if num_bytes:
                lines.append(f"  largest link  rank {source} to rank {destination}: {_size(num_bytes)}")
            lines.append(f"  bottleneck    {f.times.bottleneck}")
            lines.append(f"  time          {_ms(f.times.total)} = {_sum_of(f.times)}")
        return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "times:\n" + FORMULA
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each rank (4096)")
    parser.add_argument("--hidden", type=int, default=7168, help="channels of a token (7168)")
    parser.add_argument("--experts", type=int, default=256, help="experts, over all ranks (256)")
    parser.add_argument("--topk", type=int, default=8, help="experts of a token (8); a trace has its own")
    parser.add_argument("--nodes", type=int, default=2, help="nodes, each one scale-up domain (2)")
    parser.add_argument("--ranks-per-node", default="8", help="ranks of every node, or of each as in 3,1 (8)")
    parser.add_argument("--link-gbps", type=float, default=400.0, help="a node's link, each way, Gbit/s (400)")
    parser.add_argument("--memory-gbps", type=float, default=80.0, help="copy rate of one rank, Gbit/s (80)")
    parser.add_argument("--link-latency-us", type=float, default=0.0, help="from node to node, µs (0)")
    parser.add_argument("--dtype", choices=("bf16", "fp8"), default="bf16", help="of dispatched rows; back it is bf16")
    parser.add_argument("--expand", action="store_true", help="one row for each token and slot")
    parser.add_argument("--cached", action="store_true", help="the dispatch repeats a known routing")
    parser.add_argument("--no-weights", action="store_true", help="the dispatch carries no top-k weights")
    parser.add_argument("--combine-weights", action="store_true", help="the combine returns top-k weights")
    parser.add_argument("--no-multiple-reduction", action="store_true", help="rows cross back unreduced")
    parser.add_argument("--groups", type=int, default=1, help="equal groups of experts (1)")
    parser.add_argument("--top-groups", type=int, default=0, help="groups that a token's experts lie in (all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled routing (0)")
    parser.add_argument(
        "--trace",
        type=Path,
        help="recorded topk_idx, .npy or .npz: [R, T, K] of just these ranks is taken as it is; of any other, and of"
        " [T, K], each rank's --tokens are drawn with replacement",
    )
    parser.add_argument("--backend", choices=("auto", "shm", "hybrid", "collective"), default="auto")
    parser.add_argument("--json", action="store_true", help=f"one JSON object; every link up to {MATRIX_RANKS} ranks")


def run(options: argparse.Namespace) -> int:
    """Print the forecast. 2: the options make no sense together, says why."""
    try:
        plan = forecast(options)
    except (EPArgumentError, OSError) as e:
        print(f"plan: {e}", file=sys.stderr)  # noqa: T201
        return 2
    except MemoryError:
        ranks = f"{options.nodes} nodes of {options.ranks_per_node} ranks"
        print(f"plan: {ranks} with {options.tokens} tokens each do not fit into memory", file=sys.stderr)  # noqa: T201
        return 2
    print(json.dumps(plan.as_json()) if options.json else plan.as_text())  # noqa: T201
    return 0


def forecast(options: argparse.Namespace) -> Plan:
    """The forecast for the command's options.

    Raises:
        EPArgumentError: an option is out of range, or the trace is none. OSError: the trace cannot be read.
    """
    for name in ("tokens", "hidden", "experts", "topk", "nodes", "groups"):
        whole(f"--{name}", getattr(options, name), 0 if name == "tokens" else 1)
    for name in ("link_gbps", "memory_gbps"):
        if not _LEAST_RATE <= getattr(options, name) < math.inf:
            raise EPArgumentError.of(f"--{name.replace('_', '-')}", "a positive rate", getattr(options, name))
    if not 0 <= options.link_latency_us < math.inf:
        raise EPArgumentError.of("--link-latency-us", "0 or more", options.link_latency_us)
    whole("--seed", options.seed, 0)
    cluster = Cluster(_nodes(options), options.link_gbps, options.memory_gbps, options.link_latency_us)
    backend = cluster.choose(options.backend)
    routing, described, num_topk = _routing(options, cluster.num_ranks)
    counts = count(routing, cluster, options.experts)
    fp8 = options.dtype == "fp8"
    load = Workload(
        row_bytes=options.hidden * (1 if fp8 else 2),
        sf_bytes=4 * -(-options.hidden // _SF_CHANNELS) if fp8 else 0,
        combined_row_bytes=2 * options.hidden,
        num_experts=options.experts,
        num_topk=num_topk,
        expand=options.expand,
        cached=options.cached,
        weights=not options.no_weights,
        combine_weights=options.combine_weights,
        multiple_reduction=not options.no_multiple_reduction,
    )
    most = int(counts.tokens.max())
    return Plan(
        backend=backend,
        cluster=cluster,
        load=load,
        routing=described,
        heap_bytes=elastic_heap_bytes(cluster.num_ranks, most, options.hidden, num_topk, fp8),
        recv_rows=counts.rows(load.expand).sum(0),
        forecasts=(
            _forecast("dispatch", backend, counts, load, cluster),
            _forecast("combine", backend, counts, load, cluster),
        ),
    )


def _forecast(op: Op, backend: BackendName, counts: Counts, load: Workload, cluster: Cluster) -> Forecast:
    moved = bytes_of(op, backend, counts, load, cluster)
    return Forecast(op, moved, times_of(op, backend, moved.total, counts, load, cluster), cluster.node_of)


def _nodes(options: argparse.Namespace) -> tuple[int, ...]:
    try:
        sizes = [int(word) for word in options.ranks_per_node.split(",")]
    except ValueError:
        sizes = []
    sizes = sizes * options.nodes if len(sizes) == 1 else sizes
    if len(sizes) != options.nodes or min(sizes) < 1:
        expected = f"a number of ranks, or {options.nodes} of them with commas between"
        raise EPArgumentError.of("--ranks-per-node", expected, repr(options.ranks_per_node))
    return tuple(sizes)


# --- routing ----------------------------------------------------------------------------------------------------------


def _routing(options: argparse.Namespace, num_ranks: int) -> tuple[Iterator[NDArray[np.integer]], str, int]:
    """By rank, top-k ids; what they are, in words; K."""
    if options.trace is None:
        top_groups = options.top_groups or options.groups
        sampled = sample(
            num_ranks, options.tokens, options.experts, options.topk, options.groups, top_groups, options.seed
        )
        among = f" in {top_groups} of {options.groups} groups" if top_groups < options.groups else ""
        words = f"{options.tokens} tokens a rank, top-{options.topk} of {options.experts} experts{among}, all alike"
        return sampled, f"{words} (seed {options.seed})", options.topk
    trace = read_trace(options.trace, options.experts)
    num_topk = trace.shape[-1]
    if trace.ndim == 3 and trace.shape[0] == num_ranks:
        return iter(trace), f"{options.trace.name}: {trace.shape[1]} tokens a rank, top-{num_topk}", num_topk
    pool = trace.reshape(-1, num_topk)
    if not len(pool):
        raise EPArgumentError.of("--trace", "tokens to draw from", f"shape {list(trace.shape)}")
    drawn = (
        pool[np.random.default_rng([options.seed, rank]).integers(0, len(pool), options.tokens)]
        for rank in range(num_ranks)
    )
    words = f"{options.tokens} tokens a rank, top-{num_topk}, drawn from the {len(pool)} of {options.trace.name}"
    return drawn, f"{words} (seed {options.seed})", num_topk


def sample(
    num_ranks: int, num_tokens: int, num_experts: int, num_topk: int, num_groups: int, top_groups: int, seed: int
) -> Iterator[Integers]:
    """By rank, [T, K] different experts, all alike; where there are groups, within ``top_groups`` of them.

    Raises:
        EPArgumentError: groups do not divide the experts, or too few experts are left.
    """
    size, rest = divmod(num_experts, num_groups)
    if rest:
        raise EPArgumentError.of("--groups", f"a divisor of {num_experts} experts", num_groups)
    whole("--top-groups", top_groups, 1, num_groups)
    whole("--topk", num_topk, 1, top_groups * size)

    def of_rank(rank: int) -> Integers:
        rng = np.random.default_rng([seed, rank])
        groups = _different(rng, num_tokens, num_groups, top_groups)
        experts = _different(rng, num_tokens, top_groups * size, num_topk)
        return np.take_along_axis(groups, experts // size, 1) * size + experts % size

    return map(of_rank, range(num_ranks))


def _different(rng: np.random.Generator, num_rows: int, population: int, size: int) -> Integers:
    """[rows, size] different numbers below ``population``, every set alike (Floyd's algorithm, CACM 30/9, 1987)."""
    picks = np.empty((num_rows, size), dtype=np.int64)
    for i, last in enumerate(range(population - size, population)):
        pick = rng.integers(0, last + 1, num_rows)
        taken = (picks[:, :i] == pick[:, None]).any(1)
        picks[:, i] = np.where(taken, last, pick)
    return picks


def read_trace(path: Path, num_experts: int) -> NDArray[np.integer]:
    """A recorded ``topk_idx`` [T, K] or [R, T, K] from .npy, or from .npz (by that name, or its only array).

    Raises:
        EPArgumentError: it holds something else. OSError: it cannot be read.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                names = loaded.files
                if "topk_idx" not in names and len(names) != 1:
                    raise EPArgumentError.of("--trace", "topk_idx or a single array in it", names)
                loaded = loaded["topk_idx" if "topk_idx" in names else names[0]]
    except ValueError as e:
        raise EPArgumentError.of("--trace", "a .npy or .npz file of integers", f"{path}: {e}") from e
    if loaded.ndim not in (2, 3) or loaded.shape[-1] == 0 or not np.issubdtype(loaded.dtype, np.integer):
        raise EPArgumentError.of("--trace", "integers [T, K] or [R, T, K]", f"{loaded.dtype} {list(loaded.shape)}")
    if loaded.size and not -1 <= loaded.min() <= loaded.max() < num_experts:
        found = f"{loaded.min()} to {loaded.max()}"
        raise EPArgumentError.of("--trace", f"expert ids from -1 to {num_experts - 1}, see --experts", found)
    trace: NDArray[np.integer] = loaded
    return trace


# --- words ------------------------------------------------------------------------------------------------------------


def _sum_of(times: Times) -> str:
    wire, memory = _ms(times.wire), _ms(float(times.memory.max()))
    if not times.wire:
        return f"memory {memory}"
    overlapped = f"max(wire {wire} + fill {_ms(times.fill)}, memory {memory})"
    work = overlapped if times.overlapped else f"wire {wire} + memory {memory}"
    return f"{work} + latency {_ms(times.latency)}"


def _spread(values: Integers, words: Any) -> str:
    """Mean and largest, with the rank that has it."""
    if values.min() == values.max():
        return f"{words(int(values[0]))} on every rank"
    return f"{words(round(values.mean()))} on average, most {words(int(values.max()))} (rank {values.argmax()})"


def _size(num_bytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes} B"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
