"""The scale model: bytes of every link, and expected times of dispatch and combine, for any number of nodes.

It computes from a routing alone, and needs no rank to run, what :mod:`.traffic` computes from the plans of ranks that
do; tests hold the two equal to the byte. Experts lie in order over ranks, and ranks in order over nodes; all rows are
V2's.

Shapes: R ranks, D nodes (domains), T tokens of a rank, K slots. Matrices [R, R] are indexed [source, destination].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .backends._pipeline import chunk_rows
from .errors import EPArgumentError
from .traffic import RECORD_BYTES
from .types import ExpertPlacement

Integers = NDArray[np.int64]
BackendName = Literal["shm", "hybrid", "collective"]
Op = Literal["dispatch", "combine"]

#: How times follow from bytes; stands in the command's help.
FORMULA = """\
A node's wire carries what its ranks send to other nodes, and at the same time what comes from them, each at
--link-gbps. A rank's memory takes, at --memory-gbps, each byte that the rank places, fetches, packs for the wire or
takes from it, and the rows that a combine delivers.
  shm         max over ranks (memory)
  hybrid      max(max over nodes (wire out, wire in) + pipeline fill, max over ranks (memory)) + latency
  collective  max over nodes (wire out, wire in) + max over ranks (memory) + latency: one follows the other
Pipeline fill: the wire stands still while the first chunk is packed and the last one placed, so twice one chunk for
every other node, at --memory-gbps (a chunk: 10 ms of a rank's part of the link, 64 KiB to 8 MiB). Latency:
--link-latency-us for each exchange that another waits for (records, counts, headers, weights, rows).
Not in it: a transport's framing, its processor time, and nodes that share links further on."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where ranks run.

    Attributes:
        nodes: ranks of each node.
        link_gbps: of a node's link to the others, each way, in Gbit/s.
        memory_gbps: rate at which one rank copies rows while its neighbours do, in Gbit/s.
        link_latency_us: from one node to another, in µs.
    """

    nodes: tuple[int, ...]
    link_gbps: float
    memory_gbps: float
    link_latency_us: float = 0.0

    @property
    def num_ranks(self) -> int:
        return sum(self.nodes)

    @property
    def node_of(self) -> Integers:
        """[R]: each rank's node."""
        return np.repeat(np.arange(len(self.nodes)), self.nodes)

    def choose(self, backend: str) -> BackendName:
        """The backend of this name that these ranks would use.

        Raises:
            EPArgumentError: it cannot carry them.
        """
        even, several = len(set(self.nodes)) == 1, len(self.nodes) > 1
        if backend == "auto":
            return "hybrid" if several and even else "collective" if several else "shm"
        if backend == "shm" and not several:
            return "shm"
        if backend == "hybrid" and even:
            return "hybrid"
        if backend == "collective":
            return "collective"
        raise EPArgumentError.of("backend", "shm for one node, hybrid for nodes of one size, or collective", backend)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is dispatched and combined, beside its routing.

    Attributes:
        row_bytes, sf_bytes: of one token's x and scale factors; combined_row_bytes: of one row of y.
        num_experts, num_topk: E, K. expand: one row for each slot. cached: the dispatch repeats a known routing.
        weights: a dispatch carries float32 weights; combine_weights: a combine does.
        multiple_reduction: a node's rows are summed before they cross.
    """

    row_bytes: int
    sf_bytes: int
    combined_row_bytes: int
    num_experts: int
    num_topk: int
    expand: bool = False
    cached: bool = False
    weights: bool = True
    combine_weights: bool = False
    multiple_reduction: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """What of a routing matters: [R] tokens; [R, R] tokens and slots that go from one rank to another; [R, D] tokens
    that cross from a rank to another node, 0 to its own."""

    tokens: Integers
    to_rank: Integers
    slots: Integers
    crossing: Integers

    def rows(self, expand: bool) -> Integers:
        """[R, R]: rows that dispatch delivers and combine adds up."""
        return self.slots if expand else self.to_rank


def count(routing: Iterable[NDArray[np.integer]], cluster: Cluster, num_experts: int) -> Counts:
    """Count a routing: by rank, top-k ids [T, K] of any integer dtype, -1 for none."""
    num_ranks, num_nodes, node_of = cluster.num_ranks, len(cluster.nodes), cluster.node_of
    owner = np.repeat(np.arange(num_ranks), ExpertPlacement.shares(num_experts, num_ranks))
    owner = np.append(owner, -1)  # where an id of -1 looks
    tokens = np.zeros(num_ranks, dtype=np.int64)
    to_rank, slots = (np.zeros((num_ranks, num_ranks), dtype=np.int64) for _ in range(2))
    crossing = np.zeros((num_ranks, num_nodes), dtype=np.int64)
    for source, topk_idx in enumerate(routing):
        ranks = np.sort(owner[topk_idx], axis=1)
        tokens[source] = len(ranks)
        slots[source] = np.bincount(ranks[ranks >= 0], minlength=num_ranks)
        to_rank[source] = _distinct(ranks, num_ranks)
        crossing[source] = _distinct(np.where(ranks >= 0, node_of[ranks], -1), num_nodes)
    crossing[np.arange(num_ranks), node_of] = 0
    return Counts(tokens, to_rank, slots, crossing)


def _distinct(values: Integers, size: int) -> Integers:
    """[size]: rows of ``values`` [T, K], each sorted, in which each number occurs."""
    first = np.ones(values.shape, dtype=bool)
    first[:, 1:] = values[:, 1:] != values[:, :-1]
    return np.bincount(values[first & (values >= 0)], minlength=size)


# --- bytes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class LinkBytes:
    """[R, R] each: what one operation moves, as :class:`.traffic.Link` tells it apart."""

    rows: Integers
    routing: Integers
    control: Integers

    @classmethod
    def none(cls, num_ranks: int) -> LinkBytes:
        return cls(*(np.zeros((num_ranks, num_ranks), dtype=np.int64) for _ in range(3)))

    @property
    def total(self) -> Integers:
        return self.rows + self.routing + self.control


def bytes_of(op: Op, backend: BackendName, counts: Counts, load: Workload, cluster: Cluster) -> LinkBytes:
    """The bytes of every link in one operation."""
    if backend == "collective":
        return _collective(op, counts, load, cluster.num_ranks)
    found = LinkBytes.none(cluster.num_ranks)
    if backend == "shm":
        _inside(op, counts.rows(load.expand), counts.to_rank, counts.slots, load, found)
        return found
    by_node = (len(cluster.nodes), cluster.nodes[0])
    # On the way in, a rank places what the ranks with its index, on every node, send to its own node.
    rows, tokens, slots = (_relayed(m, *by_node) for m in (counts.rows(load.expand), counts.to_rank, counts.slots))
    _inside(op, rows, tokens, slots, load, found)
    _across(op, counts, load, found, *by_node)
    return found


def _inside(op: Op, rows: Integers, tokens: Integers, slots: Integers, load: Workload, found: LinkBytes) -> None:
    """Shared memory; the matrices are [R, R] of placing rank and rank placed at."""
    if op == "combine":
        found.rows[:] = rows.T * load.combined_row_bytes
        found.routing[:] = slots.T * (4 * load.combine_weights)
        return
    found.rows[:] = rows * (load.row_bytes + load.sf_bytes)
    if load.weights:
        found.routing[:] = slots * 4 if load.expand else tokens * (4 * load.num_topk)
    if not load.cached:
        found.routing[:] += tokens * (4 * (1 + load.num_topk) if load.expand else 4 + 8 * load.num_topk)


def _relayed(counts: Integers, num_nodes: int, size: int) -> Integers:
    """[R, R]: counts of (source, destination) as counts of (rank of the source's index on that node, destination)."""
    by_index = counts.reshape(num_nodes, size, num_nodes, size).sum(0)
    out = np.zeros_like(counts)
    node = np.arange(num_nodes)
    out.reshape(num_nodes, size, num_nodes, size)[node, :, node, :] = by_index.transpose(1, 0, 2)
    return out


def _across(op: Op, counts: Counts, load: Workload, found: LinkBytes, num_nodes: int, size: int) -> None:
    num_ranks, num_topk = num_nodes * size, load.num_topk
    others = np.arange(num_nodes) != np.repeat(np.arange(num_nodes), size)[:, None]
    if op == "dispatch":
        header = 4 * num_topk * load.weights + (0 if load.cached else 4 + 4 * num_topk)
        told = RECORD_BYTES + (0 if load.cached else 8 * (num_ranks + num_nodes + load.num_experts))
        width = load.row_bytes + load.sf_bytes
    else:
        header, told, width = 4 * num_topk * load.combine_weights, RECORD_BYTES, load.combined_row_bytes
    index = np.arange(size)
    parts = (
        (found.rows, crossing_rows(op, counts, load, num_nodes, size) * width),
        (found.routing, counts.crossing * header),
        (found.control, others * told),
    )
    for whole, part in parts:
        # [R, D] by rank and other node, to [index, D, D] of the rail, whose ranks meet.
        to = part.reshape(num_nodes, size, num_nodes).transpose(1, 0, 2)
        back = to.transpose(0, 2, 1)  # what crossed returns on the way it came
        whole.reshape(num_nodes, size, num_nodes, size)[:, index, :, index] += to if op == "dispatch" else back


def crossing_rows(op: Op, counts: Counts, load: Workload, num_nodes: int, size: int) -> Integers:
    """[R, D]: rows that cross between a rank and the rank of its rail on each other node."""
    if op == "dispatch" or load.multiple_reduction:
        return counts.crossing
    rows = counts.rows(load.expand).reshape(-1, num_nodes, size).sum(2)
    return np.where(counts.crossing > 0, rows, 0)


def _collective(op: Op, counts: Counts, load: Workload, num_ranks: int) -> LinkBytes:
    found, num_topk = LinkBytes.none(num_ranks), load.num_topk
    if op == "combine":
        rows = counts.rows(load.expand)  # which each rank asks for by number, and then gets
        weights = 0 if not load.combine_weights else 4 if load.expand else 4 * num_topk
        found.rows[:] = rows.T * load.combined_row_bytes
        found.routing[:] = rows * 8 + rows.T * weights
        found.control[:] = RECORD_BYTES + 8
        return found
    described = 4 * num_topk * load.weights
    described += 8 * num_topk if load.expand or not load.cached else 0  # rows of slots, or ids
    described += 0 if load.cached else 8
    found.rows[:] = counts.to_rank * (load.row_bytes + load.sf_bytes)
    found.routing[:] = counts.to_rank * described
    found.control[:] = RECORD_BYTES + (0 if load.cached else 8 * (num_ranks + load.num_experts))
    return found


# --- times ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Times:
    """Seconds that one operation is expected to take: ``FORMULA``.

    Attributes:
        wire_out, wire_in: [D] of each node's link. memory: [R] of each rank.
        fill, latency: see the formula.
        overlapped: wire and memory work at the same time.
    """

    wire_out: NDArray[np.float64]
    wire_in: NDArray[np.float64]
    memory: NDArray[np.float64]
    fill: float
    latency: float
    overlapped: bool

    @property
    def wire(self) -> float:
        return float(max(self.wire_out.max(), self.wire_in.max()))

    @property
    def total(self) -> float:
        wire, memory = self.wire + self.fill, float(self.memory.max())
        return (max(wire, memory) if self.overlapped else wire + memory) + self.latency

    @property
    def bottleneck(self) -> str:
        """The resource that is busy longest."""
        candidates = {
            f"wire out of node {self.wire_out.argmax()}": self.wire_out.max(),
            f"wire into node {self.wire_in.argmax()}": self.wire_in.max(),
            f"memory of rank {self.memory.argmax()}": self.memory.max(),
        }
        return max(candidates, key=lambda name: candidates[name])


def times_of(op: Op, backend: BackendName, moved: Integers, counts: Counts, load: Workload, cluster: Cluster) -> Times:
    """Expected times. ``moved`` [R, R]: bytes of every link, :attr:`LinkBytes.total`."""
    link, memory = cluster.link_gbps * 1e9 / 8, cluster.memory_gbps * 1e9 / 8
    node_of, num_nodes = cluster.node_of, len(cluster.nodes)
    across = np.where(node_of[:, None] == node_of, 0, moved)
    sent, received = across.sum(1), across.sum(0)
    inside = moved - across
    worked = sent + received + (inside.sum(1) if op == "dispatch" else inside.sum(0))
    if backend == "collective":  # packs and takes apart what stays inside, too
        worked = worked + (inside.sum(0) if op == "dispatch" else inside.sum(1))
    if op == "combine":
        worked = worked + counts.tokens * load.combined_row_bytes
    fill = 0.0
    if backend == "hybrid":
        width = load.row_bytes + load.sf_bytes if op == "dispatch" else load.combined_row_bytes
        chunk = chunk_rows(width * max(num_nodes - 1, 1), link / cluster.nodes[0])
        rows = crossing_rows(op, counts, load, num_nodes, cluster.nodes[0])
        fill = 2 * float(np.minimum(rows, chunk).sum(1).max()) * width / memory
    return Times(
        wire_out=np.bincount(node_of, sent, num_nodes) / link,
        wire_in=np.bincount(node_of, received, num_nodes) / link,
        memory=worked / memory,
        fill=fill,
        latency=num_exchanges(op, backend, load) * cluster.link_latency_us * 1e-6 * (num_nodes > 1),
        overlapped=backend != "collective",
    )


def num_exchanges(op: Op, backend: BackendName, load: Workload) -> int:
    """Exchanges over a channel that follow one another."""
    if backend == "shm":
        return 0
    if op == "combine":
        return (2 if backend == "hybrid" else 4) + load.combine_weights  # flat: how many rows, and which
    if backend == "hybrid":
        headers = load.weights or not load.cached
        return 2 + headers + (not load.cached)
    described = (not load.cached) + (load.expand or not load.cached) + load.weights
    return 2 + (not load.cached) + described + (load.sf_bytes > 0)
