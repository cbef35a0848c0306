"""The byte ledger's math: what one rank moves over which link in one dispatch or combine, from its plan and sizes.

Nothing is measured here: plan and sizes determine every byte of the payload that an operation must move. What a
transport adds to it (frames, acknowledgements) is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .layout import primary, target_ranks
from .plans import Plan
from .types import CombineSpec, DispatchSpec

#: Bytes of the record with which every operation of ``collective`` and ``hybrid`` begins, to each peer of a channel.
RECORD_BYTES = 4096

_INT = 8  # bytes of an int64: counts, row numbers, and the ids and token numbers that ``collective`` sends

Kind = Literal["local", "domain", "wire"]
Domains = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True, order=True)
class Link:
    """What went from one rank to another in one operation, in bytes.

    Attributes:
        source, destination: ranks; equal where a rank moves rows to itself.
        kind: ``local`` (one rank), ``domain`` (two ranks of one domain) or ``wire`` (across domains).
        rows: x and scale factors, or y.
        routing: top-k ids, weights, indices of tokens and rows.
        control: records and vectors of counts.
    """

    source: int
    destination: int
    kind: Kind
    rows: int
    routing: int
    control: int

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.rows + self.routing + self.control


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one rank moved in one operation. The ledgers of all ranks together hold every byte once.

    Who counts what: a dispatch counts what this rank writes or sends. A combine counts what this rank fetches (rows
    and weights that it reads from its domain; with ``collective`` the rows that it asked for, whose source is their
    holder), and of what crosses or asks, what this rank sends.

    Attributes:
        op: ``dispatch`` or ``combine``. backend: its name. rank: whose ledger it is.
        links: sorted by source and destination; none of them is empty.
    """

    op: str
    backend: str
    rank: int
    links: tuple[Link, ...]

    def total(self, kind: Kind | None = None) -> int:
        """Bytes over links of one kind, or over all."""
        return sum(link.bytes for link in self.links if kind in (None, link.kind))


@dataclass(slots=True)
class DispatchSizes:
    """What of a dispatch, beside its plan, determines its bytes.

    Attributes:
        row_bytes, sf_bytes: of one token's x and scale factors.
        num_topk: K of ids or weights; 0 without either.
        has_topk: ids travel. weight_bytes: of one weight; 0: none travel.
        num_experts: E, the length of the counts that ranks exchange; 0 where cached.
        cached: the routing is known, so no counts, ids or indices travel.
        describes_sources: token numbers are delivered, for which ``collective`` has an exchange of its own.
    """

    row_bytes: int
    sf_bytes: int
    num_topk: int
    has_topk: bool
    weight_bytes: int
    num_experts: int
    cached: bool
    describes_sources: bool = True


@dataclass(slots=True)
class CombineSizes:
    """What of a combine, beside its plan, determines its bytes.

    Attributes:
        row_bytes: of one row of y.
        num_weights: weights that stand beside one row (K, or 1 where expanded); 0: none travel.
        weight_bytes: of one of them.
        reduce_per_domain: a domain's rows are summed before they cross.
    """

    row_bytes: int
    num_weights: int
    weight_bytes: int
    reduce_per_domain: bool = True


def dispatch_sizes(spec: DispatchSpec) -> DispatchSizes:
    """The sizes of one dispatch; keeps none of its tensors."""
    ids, weights = spec.topk_idx, spec.topk_weights
    by_slot = ids if ids is not None else weights
    return DispatchSizes(
        row_bytes=_row_bytes(spec.x),
        sf_bytes=0 if spec.sf is None else _row_bytes(spec.sf),
        num_topk=0 if by_slot is None else by_slot.shape[1],
        has_topk=ids is not None,
        weight_bytes=0 if weights is None else weights.element_size(),
        num_experts=0 if spec.placement is None else spec.placement.num_experts,
        cached=spec.plan is not None,
        describes_sources=spec.describe_sources,
    )


def combine_sizes(spec: CombineSpec) -> CombineSizes:
    """The sizes of one combine; keeps none of its tensors."""
    weights = spec.weights
    return CombineSizes(
        row_bytes=_row_bytes(spec.y),
        num_weights=0 if weights is None else weights.shape[1] if weights.dim() == 2 else 1,
        weight_bytes=0 if weights is None else weights.element_size(),
        reduce_per_domain=spec.reduce_per_domain,
    )


def dispatch_traffic(backend: str, sizes: DispatchSizes, plan: Plan, domains: Domains) -> Traffic:
    """What ``plan.rank`` moves in one dispatch.

    Args:
        backend: ``shm``, ``hybrid`` or ``collective``.
        domains: the ranks of each scale-up domain, as ``BackendInfo.domains`` has them.
    """
    ledger = _Ledger(plan.rank, domains)
    if backend == "collective":
        _collective_dispatch(ledger, sizes, plan)
    elif backend == "hybrid":
        _hybrid_dispatch(ledger, sizes, plan)
    else:
        assert backend in ("shm", "cuda_peer"), backend
        _place(ledger, sizes, plan, [plan.targets])
    return ledger.close("dispatch", backend)


def combine_traffic(backend: str, sizes: CombineSizes, plan: Plan, domains: Domains) -> Traffic:
    """What ``plan.rank`` moves in one combine; arguments as :func:`dispatch_traffic`."""
    ledger = _Ledger(plan.rank, domains)
    if backend == "collective":
        _collective_combine(ledger, sizes, plan)
    elif backend == "hybrid":
        _hybrid_combine(ledger, sizes, plan)
    else:
        assert backend in ("shm", "cuda_peer"), backend
        _pull(ledger, sizes, plan, [plan.targets])
    return ledger.close("combine", backend)


class _Ledger:
    """Adds up one rank's links."""

    def __init__(self, rank: int, domains: Domains) -> None:
        self.rank = rank
        self.domains = domains
        self.domain_of = {r: d for d, ranks in enumerate(domains) for r in ranks}
        self._links: dict[tuple[int, int], list[int]] = {}

    @property
    def here(self) -> Sequence[int]:
        return self.domains[self.domain_of[self.rank]]

    @property
    def rail(self) -> list[int]:
        """By domain, the rank with this one's index."""
        index = list(self.here).index(self.rank)
        return [ranks[index] for ranks in self.domains]

    def add(self, source: int, destination: int, *, rows: int = 0, routing: int = 0, control: int = 0) -> None:
        link = self._links.setdefault((source, destination), [0, 0, 0])
        for i, n in enumerate((rows, routing, control)):
            link[i] += n

    def close(self, op: str, backend: str) -> Traffic:
        links = [Link(s, d, self._kind(s, d), *n) for (s, d), n in sorted(self._links.items()) if any(n)]
        return Traffic(op, backend, self.rank, tuple(links))

    def _kind(self, source: int, destination: int) -> Kind:
        if source == destination:
            return "local"
        return "domain" if self.domain_of[source] == self.domain_of[destination] else "wire"


# --- inside a domain --------------------------------------------------------------------------------------------------


def _place(ledger: _Ledger, sizes: DispatchSizes, plan: Plan, origins: Sequence[torch.Tensor]) -> None:
    """Rows go straight to their final place; what describes them goes to the receiver's scratch."""
    expand, num_ranks, weight = plan.layout == "expand", plan.num_ranks, sizes.weight_bytes
    rows = _sum(_rows_to, origins, num_ranks)
    tokens = _sum(_tokens_to, origins, num_ranks)
    for r in ledger.here:
        if expand:
            # A weight for each row; the source token and the row of each of its slots once for each token.
            routing = rows[r] * weight
            described = tokens[r] * 4 * (1 + plan.num_slots)
        else:
            routing = rows[r] * sizes.num_topk * weight
            described = rows[r] * (4 + 8 * sizes.num_topk * sizes.has_topk)
        moved = rows[r] * (sizes.row_bytes + sizes.sf_bytes)
        ledger.add(ledger.rank, r, rows=moved, routing=routing + (0 if sizes.cached else described))


def _pull(ledger: _Ledger, sizes: CombineSizes, plan: Plan, origins: Sequence[torch.Tensor]) -> None:
    """Each row is read once; of weights, those that the result takes: a slot's own, V1 all that stand beside a row."""
    rows = _sum(_rows_to, origins, plan.num_ranks)
    slots = _sum(_slots_to, origins, plan.num_ranks)
    weights = 0 if sizes.num_weights == 0 else sizes.num_weights if plan.layout == "rank" else 1
    for r in ledger.here:
        routing = slots[r] * weights * sizes.weight_bytes
        ledger.add(r, ledger.rank, rows=rows[r] * sizes.row_bytes, routing=routing)


# --- two hops ---------------------------------------------------------------------------------------------------------


def _hybrid_dispatch(ledger: _Ledger, sizes: DispatchSizes, plan: Plan) -> None:
    # What tells a relay about a token ahead of its row: its number and ids as int32, V1 a bool for each rank there.
    header = sizes.num_topk * sizes.weight_bytes
    if not sizes.cached:
        header += 4 + 4 * sizes.num_topk * sizes.has_topk + (len(ledger.here) if plan.layout == "rank" else 0)
    counts = plan.num_ranks + len(ledger.domains) + sizes.num_experts
    control = RECORD_BYTES + (0 if sizes.cached else _INT * counts)
    ranks = target_ranks(plan.targets)
    for relay, members in zip(ledger.rail, ledger.domains, strict=True):
        if relay == ledger.rank:
            continue
        crossing = int(torch.isin(ranks, torch.tensor(list(members), device="cpu")).any(1).sum())
        rows = crossing * (sizes.row_bytes + sizes.sf_bytes)
        ledger.add(ledger.rank, relay, rows=rows, routing=crossing * header, control=control)
    _place(ledger, sizes, plan, [plan.targets, plan.relay])


def _hybrid_combine(ledger: _Ledger, sizes: CombineSizes, plan: Plan) -> None:
    relayed: list[int] = plan.relay_counts.tolist()
    columns = 0 if sizes.num_weights == 0 else sizes.num_weights if plan.layout == "rank" else plan.num_slots
    for home, n, targets in zip(ledger.rail, relayed, plan.relay.split(relayed), strict=True):
        if home == ledger.rank:
            continue
        rows = n if sizes.reduce_per_domain else int(primary(targets).sum())
        weights = n * columns * sizes.weight_bytes
        ledger.add(ledger.rank, home, rows=rows * sizes.row_bytes, routing=weights, control=RECORD_BYTES)
    _pull(ledger, sizes, plan, [plan.targets, plan.relay])


# --- one hop over a channel -------------------------------------------------------------------------------------------


def _collective_dispatch(ledger: _Ledger, sizes: DispatchSizes, plan: Plan) -> None:
    expand, new = plan.layout == "expand", not sizes.cached
    # A token travels once to each destination, with the rows of its slots there, its number, its ids, its weights.
    described = _INT * plan.num_slots if expand else 0
    described += _INT if new and sizes.describes_sources else 0
    described += _INT * sizes.num_topk if new and sizes.has_topk and not expand else 0
    described += sizes.num_topk * sizes.weight_bytes
    control = RECORD_BYTES + (_INT * (plan.num_ranks + sizes.num_experts) if new else 0)
    for r, n in enumerate(_tokens_to(plan.targets, plan.num_ranks).tolist()):
        rows = n * (sizes.row_bytes + sizes.sf_bytes)
        ledger.add(ledger.rank, r, rows=rows, routing=n * described, control=control)


def _collective_combine(ledger: _Ledger, sizes: CombineSizes, plan: Plan) -> None:
    """A rank asks each holder for rows by number: how many, which; then they come, and their weights."""
    for r, n in enumerate(_rows_to(plan.targets, plan.num_ranks).tolist()):
        ledger.add(ledger.rank, r, routing=n * _INT, control=RECORD_BYTES + _INT)
        ledger.add(r, ledger.rank, rows=n * sizes.row_bytes, routing=n * sizes.num_weights * sizes.weight_bytes)


# --- counts -----------------------------------------------------------------------------------------------------------


def _sum(
    counts_of: Callable[[torch.Tensor, int], torch.Tensor], origins: Sequence[torch.Tensor], num_ranks: int
) -> list[int]:
    """[R]: counts over the targets of all origins."""
    counts: list[int] = torch.stack([counts_of(targets, num_ranks) for targets in origins]).sum(0).tolist()
    return counts


def _slots_to(targets: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """[R]: slots by destination."""
    return torch.bincount(target_ranks(targets[targets >= 0]), minlength=num_ranks)


def _rows_to(targets: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """[R]: rows by destination; slots that share one count once."""
    return torch.bincount(target_ranks(targets[primary(targets)]), minlength=num_ranks)


def _tokens_to(targets: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """[R]: tokens by destination; slots of a token on one rank count once."""
    ranks = target_ranks(targets).sort(1).values
    first = torch.ones_like(ranks, dtype=torch.bool)
    first[:, 1:] = ranks[:, 1:] != ranks[:, :-1]
    return torch.bincount(ranks[first & (ranks >= 0)], minlength=num_ranks)


def _row_bytes(x: torch.Tensor) -> int:
    return x.shape[1] * x.element_size()
