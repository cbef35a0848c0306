"""A dispatch over two hops, after the ranks have met: settle the routing, then move the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .._pairs import Transfer
from ..plans import Plan
from ..types import Dispatched, DispatchSpec
from ._checks import check_worst_case
from ._hops import Chunks, Headers, Homeward, Ways, exchange_headers
from ._pipeline import SLICE_BYTES, run
from ._record import Gather, Record
from ._routing import Counts, own_layout
from .base import Flight, Relayed


@dataclass(slots=True, eq=False)
class Begun:
    """A dispatch whose routing is settled.

    Attributes:
        inner: of the domain; ``result``: its outputs.
        sent: by domain, this rank's tokens that go there. received: by domain, tokens that this rank relays from there.
        own, relayed: where this rank's tokens and each domain's go inside this rank's domain.
    """

    spec: DispatchSpec
    inner: Flight
    seq: int
    sent: list[torch.Tensor]
    received: list[int]
    own: Relayed
    relayed: list[Relayed]

    @property
    def result(self) -> Dispatched:
        found: Dispatched = self.inner.result
        return found


def begin_along(ways: Ways, spec: DispatchSpec, plan: Plan, home: Homeward, seq: int) -> Begun:
    """A dispatch along a plan; weights go ahead of the rows."""
    received = plan.relay_counts.tolist()
    headers = exchange_headers(spec, ways.domains, ways.rail, home.tokens, received)
    relayed = _relayed(plan.relay.split(received), headers, [None] * len(received))
    own = Relayed(plan.targets, topk_weights=spec.topk_weights)
    nothing = torch.zeros(ways.domains.num_ranks, dtype=torch.int64, device="cpu")
    inner = ways.domain.hop_begin(spec, plan, nothing, nothing)
    return Begun(spec, inner, seq, home.tokens, received, own, relayed)


def begin_new(ways: Ways, spec: DispatchSpec, records: list[Record], gather: Gather, seq: int) -> Begun:
    """A dispatch whose plan is made here: counts, then top-k ids, weights and indices go ahead of the rows.

    Raises:
        EPArgumentError: on every rank: outputs of a fixed size are too small. Nothing has moved.
    """
    domains, placement = ways.domains, spec.placement
    assert placement is not None
    rank, num_ranks, num_domains = domains.rank, domains.num_ranks, len(domains.members)
    told = gather(_own_counts(ways, spec))
    tokens, crossing, slots = told.split([num_ranks, num_domains, placement.num_experts], 1)
    counts = Counts(spec, tokens, slots)
    check_worst_case(counts.rows_to.tolist(), [r.tell["num_worst_tokens"] for r in records], seq)
    here = torch.tensor(domains.here, dtype=torch.int32, device="cpu")
    targets = counts.route(spec, spec.topk_idx, spec.is_token_in_rank, rank)
    home = Homeward.of_targets(spec.layout, targets, domains)
    received = [0 if r == rank else int(crossing[r, domains.domain]) for r in domains.rail]
    headers = exchange_headers(spec, domains, ways.rail, home.tokens, received)
    relay = [
        counts.route(spec, h.topk_idx, h.is_token_in_rank, origin, here)
        for h, origin in zip(headers, domains.rail, strict=True)
    ]
    num_max_tokens = spec.num_max_tokens_per_rank or max(r.tell["num_tokens"] for r in records)
    relay_counts = torch.tensor(received, dtype=torch.int64, device="cpu")
    routings = [r.tell["routing"] for r in records]
    plan = counts.plan(spec, targets, rank, num_max_tokens, routings, relay_counts, torch.cat(relay))
    begin = [counts.of_rank[r][here.long()].contiguous() for r in domains.rail]
    own = Relayed(targets, topk_idx=spec.topk_idx, topk_weights=spec.topk_weights, first_token=begin[domains.domain])
    inner = ways.domain.hop_begin(spec, plan, counts.tokens_to, counts.rows_to)
    return Begun(spec, inner, seq, home.tokens, received, own, _relayed(relay, headers, begin))


def _own_counts(ways: Ways, spec: DispatchSpec) -> torch.Tensor:
    """[R + D + E] int64: this rank's tokens to each rank and each domain, and its slots to each expert."""
    in_rank, per_expert = own_layout(spec, ways.domains.num_ranks)
    crossing = [in_rank[:, list(ranks)].any(1).sum() for ranks in ways.domains.members]
    return torch.cat([in_rank.sum(0, dtype=torch.int64), torch.stack(crossing), per_expert])


def _relayed(
    targets: Sequence[torch.Tensor], headers: Sequence[Headers], begin: Sequence[torch.Tensor | None]
) -> list[Relayed]:
    return [
        Relayed(t, tokens=h.tokens, topk_idx=h.topk_idx, topk_weights=h.topk_weights, first_token=b)
        for t, h, b in zip(targets, headers, begin, strict=True)
    ]


def deliver(ways: Ways, begun: Begun, enter: Callable[[str], None]) -> None:
    """Place everything that this rank sends or relays, and wait for what the others do. ``enter``: told the phases."""
    enter("place")
    spec, inner = begun.spec, begun.inner
    if spec.plan is None or spec.topk_weights is not None:
        for origin in (begun.own, *begun.relayed):
            origin.small = True
            ways.domain.place(inner, origin)
    x, sf = _as_bytes(spec.x), None if spec.sf is None else _as_bytes(spec.sf)
    if x.shape[1] or sf is not None:
        _move(ways, begun, x, sf)
    enter("arrive")
    ways.domain.hop_finish(inner)


def _move(ways: Ways, begun: Begun, x: torch.Tensor, sf: torch.Tensor | None) -> None:
    """Rows: chunks to and from the rail, and this rank's own to its own domain in between."""
    domain, columns = ways.domain, x.shape[1]
    width = columns + (0 if sf is None else sf.shape[1])
    chunks = Chunks.across(ways, width, [t.numel() for t in begun.sent], begun.received)
    relays = [origin.targets for origin in begun.relayed]
    under_way: list[list[torch.Tensor]] = []

    def place(targets: torch.Tensor, x: torch.Tensor, sf: torch.Tensor | None) -> None:
        domain.place(begun.inner, Relayed(targets, x=x, sf=sf))

    def begin(i: int) -> Transfer:
        inputs, outputs = [], []
        for d, tokens in enumerate(begun.sent):
            first, end = chunks.sent_in(i, d)
            inputs.append(_pack(x, sf, tokens[first:end]))
            first, end = chunks.received_in(i, d)
            outputs.append(domain.empty((end - first, width), torch.uint8))
        under_way.append(outputs)
        return ways.rail.start(outputs, inputs)

    def arrived(i: int) -> None:
        for d, rows in enumerate(under_way.pop(0)):
            first, end = chunks.received_in(i, d)
            place(relays[d][first:end], rows[:, :columns], None if sf is None else rows[:, columns:])

    def own() -> Iterator[None]:
        step = max(1, SLICE_BYTES // width)
        for first in range(0, x.shape[0], step):
            part = slice(first, first + step)
            place(begun.own.targets[part], x[part], None if sf is None else sf[part])
            yield

    ways.pace.measure(width * chunks.most, run(chunks.rounds, begin, arrived, own()))


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    """[T, bytes of a row] uint8: the same memory, where a row is dense."""
    if x.shape[1] == 1 or x.shape[0] == 0:  # strides that say nothing, and a view as bytes wants 1
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.uint8)


def _pack(x: torch.Tensor, sf: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    """[n, bytes] of these tokens, x then scale factors; the same memory where nothing lies in between."""
    n = tokens.numel()
    if n == 0:
        return torch.empty((0, 0), dtype=torch.uint8, device="cpu")
    first, last = int(tokens[0]), int(tokens[-1])
    if sf is None:
        return x[first : last + 1].contiguous() if last - first == n - 1 else x.index_select(0, tokens)
    return torch.cat([x.index_select(0, tokens), sf.index_select(0, tokens)], 1)
