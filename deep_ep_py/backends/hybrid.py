"""``hybrid``: two hops. A row crosses to another domain once, to the rank there with the sender's index (its rail);
that rank places it for all its domain. Combine walks back: a domain's rows are summed before they cross.

Hop 1 is a :class:`~.._pairs.PairChannel` between the ranks of a rail, hop 2 a :class:`~.base.Domain`. Counts and top-k
ids go ahead of the rows, so that every row's final place is known when it arrives; rows travel in chunks
(:mod:`._pipeline`), and while one is on the wire others are placed or summed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .._pairs import PairChannel, Transfer, gather
from ..errors import EPArgumentError, EPError
from ..event import CompletionEvent
from ..layout import dispatch_layout, primary
from ..plans import Plan, PlanLayout
from ..settings import Settings
from ..types import Combined, CombineSpec, Dispatched, DispatchSpec
from ._checks import check_combine, check_dispatch, check_worst_case, combine_agrees_on, dispatch_agrees_on
from ._domains import Domains
from ._hops import Chunks, FirstRows, Headers, Homeward, exchange_headers, route
from ._order import Order
from ._pipeline import chunk_rows, measured_rate, run
from ._record import Record, meet, take_part
from ._routing import experts_of, plan_digest
from ._worker import Completion
from .base import Domain, Flight, Relayed, Statistics

_SLICE_BYTES = 1 << 20  # of work done between two looks at the wire


@dataclass(slots=True, eq=False)
class _Begun:
    """A dispatch whose routing is settled: its outputs, and who places what."""

    spec: DispatchSpec
    plan: Plan
    inner: Flight
    seq: int
    sent: list[torch.Tensor]
    received: list[int]
    own: Relayed
    relayed: list[Relayed]


class HybridBackend:
    """One rank's end. Construction is local: the channel is open, and the domain too.

    Args:
        rail: between this rank's rail, by domain; domain: of this rank's domain, by index.
    """

    name = "hybrid"

    def __init__(self, domains: Domains, rail: PairChannel, domain: Domain, settings: Settings) -> None:
        self.rank = domains.rank
        self.num_ranks = domains.num_ranks
        self.domains = domains
        self._rail = rail
        self._domain = domain
        self._order = Order(f"deep_ep_py-hybrid-{self.rank}", self.rank, self._tell_peers)
        self._statistics = Statistics()
        self._columns = torch.arange(self.num_ranks, dtype=torch.int32, device="cpu")
        self._here = torch.tensor(domains.here, dtype=torch.int32, device="cpu")
        self._given_rate = settings.link_gbps * 1e9 / 8 / len(domains.here)
        self._rate = 0.0  # measured, bytes a second
        self._agreed_rate = 0.0  # the highest that any rank told

    # Dispatch -------------------------------------------------------------------------------------------------------

    def prepare(
        self, spec: DispatchSpec, *, background: bool = False, previous: Sequence[CompletionEvent] = ()
    ) -> Flight:
        """Begin a dispatch; see :class:`.base.Backend`. Blocks until the routing is known everywhere.

        Raises:
            EPArgumentError, EPMismatchError: on every rank; nothing has moved and the buffer stays usable.
            EPTimeoutError, EPPeerError: ranks did not come or are gone; the buffer is poisoned.
        """
        begun = self._order.run("dispatch", lambda: self._begin_dispatch(spec, previous), background)
        return Flight(begun.inner.result, Completion() if background else None, begun)

    def dispatch_send(self, flight: Flight) -> None:
        begun, flight.state = flight.state, None
        self._order.start("dispatch", lambda: self._deliver(begun), flight.event)

    def dispatch_recv(self, flight: Flight) -> Dispatched:
        result: Dispatched = flight.result
        return result

    def _begin_dispatch(self, spec: DispatchSpec, previous: Sequence[CompletionEvent]) -> _Begun:
        worst = -1 if spec.num_worst_tokens is None else spec.num_worst_tokens
        tell = {"num_worst_tokens": worst, "num_tokens": spec.x.shape[0]}
        op = "dispatch" if spec.plan is None else "cached dispatch"
        home: list[Homeward] = []

        def check() -> None:
            check_dispatch(spec)
            if spec.plan is not None:
                home.append(self._homeward(spec.plan))

        records = self._meet(op, dispatch_agrees_on(spec), tell, check, previous)
        if spec.plan is not None:
            return self._along(spec, spec.plan, home[0])
        return self._along_new(spec, records)

    def _along(self, spec: DispatchSpec, plan: Plan, home: Homeward) -> _Begun:
        received = plan.relay_counts.tolist()
        headers = exchange_headers(spec, self.domains, self._rail, home.tokens, received)
        relayed = self._relayed(plan.relay.split(received), headers, [None] * len(received))
        own = Relayed(plan.targets, topk_weights=spec.topk_weights)
        nothing = torch.zeros(self.num_ranks, dtype=torch.int64, device="cpu")
        inner = self._domain.hop_begin(spec, plan, nothing, nothing)
        return _Begun(spec, plan, inner, self._order.seq, home.tokens, received, own, relayed)

    def _along_new(self, spec: DispatchSpec, records: list[Record]) -> _Begun:
        domains, placement = self.domains, spec.placement
        assert placement is not None
        num_ranks, num_domains = self.num_ranks, len(domains.members)
        counts = self._gather(self._own_counts(spec))
        self._statistics.rendezvous_with_counts += 1
        tokens, crossing, slots = counts.split([num_ranks, num_domains, placement.num_experts], 1)
        # Refusals that every rank makes alike come before anything else moves.
        by_rank = torch.cat([tokens, slots], 1)
        check_worst_case(spec, by_rank, [r.tell["num_worst_tokens"] for r in records], self._order.seq)
        first = FirstRows(spec.layout, tokens, slots, placement, spec.expert_alignment)
        targets = route(
            spec.layout, spec.topk_idx, spec.is_token_in_rank, self._columns, num_ranks, placement, first, self.rank
        )
        home = Homeward.of_targets(spec.layout, targets, domains)
        received = [0 if r == self.rank else int(crossing[r, domains.domain]) for r in domains.rail]
        headers = exchange_headers(spec, domains, self._rail, home.tokens, received)
        relay = [
            route(
                spec.layout, h.topk_idx, h.is_token_in_rank, self._here, num_ranks, placement, first, origin
            )
            if n
            else None
            for h, n, origin in zip(headers, received, domains.rail, strict=True)
        ]  # fmt: skip
        width = len(domains.here) if spec.layout == "rank" else targets.shape[1]
        filled = [torch.empty((0, width), dtype=torch.int64, device="cpu") if t is None else t for t in relay]
        rows = int(first.rows_to[self.rank])
        plan = Plan.pack(
            layout=spec.layout,
            targets=targets,
            num_rows=rows,
            num_output_rows=rows if spec.num_worst_tokens is None else spec.num_worst_tokens,
            num_recv_tokens=int(first.tokens_to[self.rank]),
            rank_prefix=tokens.cumsum(0),
            expert_counts=slots.sum(0)[experts_of(placement, self.rank)],
            rank=self.rank,
            digest=plan_digest(spec, counts) ^ self._order.seq,
            expert_alignment=spec.expert_alignment,
            num_max_tokens_per_rank=spec.num_max_tokens_per_rank or max(r.tell["num_tokens"] for r in records),
            relay_counts=torch.tensor(received, dtype=torch.int64, device="cpu"),
            relay=torch.cat(filled),
        )
        begin = [first.of_rank[r][self._here.long()].contiguous() for r in domains.rail]
        relayed = self._relayed(filled, headers, begin)
        own = Relayed(targets, topk_idx=spec.topk_idx, topk_weights=spec.topk_weights)
        own.first_token = begin[domains.domain]
        inner = self._domain.hop_begin(spec, plan, first.tokens_to, first.rows_to)
        return _Begun(spec, plan, inner, self._order.seq, home.tokens, received, own, relayed)

    def _own_counts(self, spec: DispatchSpec) -> torch.Tensor:
        """[R + D + E] int64: this rank's tokens to each rank and each domain, and its slots to each expert."""
        placement, in_rank, per_expert = spec.placement, spec.is_token_in_rank, spec.num_tokens_per_expert
        assert placement is not None
        if in_rank is None or per_expert is None:
            assert spec.topk_idx is not None
            _, per_expert, in_rank = dispatch_layout(spec.topk_idx, placement, self.num_ranks)
        crossing = [in_rank[:, list(ranks)].any(1).sum() for ranks in self.domains.members]
        return torch.cat([in_rank.sum(0, dtype=torch.int64), torch.stack(crossing), per_expert.to(torch.int64)])

    def _relayed(
        self,
        targets: Sequence[torch.Tensor],
        headers: Sequence[Headers],
        begin: Sequence[torch.Tensor | None],
    ) -> list[Relayed]:
        return [
            Relayed(t, tokens=h.tokens, topk_idx=h.topk_idx, topk_weights=h.topk_weights, first_token=b)
            for t, h, b in zip(targets, headers, begin, strict=True)
        ]

    def _deliver(self, begun: _Begun) -> None:
        self._order.at = ("dispatch", "place", begun.seq)
        spec, domain, inner = begun.spec, self._domain, begun.inner
        if spec.plan is None or spec.topk_weights is not None:
            for origin in (begun.own, *begun.relayed):
                origin.small = True
                domain.place(inner, origin)
        x, sf = _rows_as_bytes(spec.x), None if spec.sf is None else _rows_as_bytes(spec.sf)
        width = x.shape[1] + (0 if sf is None else sf.shape[1])
        if width:
            self._move(begun, x, sf, width)
        self._order.enter("arrive")
        domain.hop_finish(inner)

    def _move(self, begun: _Begun, x: torch.Tensor, sf: torch.Tensor | None, width: int) -> None:
        """Rows: chunks to and from the rail, and this rank's own to its own domain in between."""
        domain, me = self._domain, self.domains.domain
        chunks = self._chunks(width, [t.numel() for t in begun.sent], begun.received)
        relays = [origin.targets for origin in begun.relayed]
        ring: list[list[torch.Tensor]] = []

        def begin(i: int) -> Transfer:
            inputs, outputs = [], []
            for d, tokens in enumerate(begun.sent):
                first, end = chunks.sent_in(i, d)
                inputs.append(_pack_rows(x, sf, tokens[first:end]))
                first, end = chunks.received_in(i, d)
                outputs.append(domain.empty((end - first, width), torch.uint8))
            ring.append(outputs)
            return self._rail.start(outputs, inputs)

        def arrived(i: int) -> None:
            for d, rows in enumerate(ring.pop(0)):
                first, end = chunks.received_in(i, d)
                self._place_rows(begun.inner, relays[d][first:end], rows[:, : x.shape[1]], rows[:, x.shape[1] :])

        def own() -> Iterator[None]:
            step = max(1, _SLICE_BYTES // width)
            for first in range(0, x.shape[0], step):
                part = slice(first, first + step)
                self._place_rows(begun.inner, begun.own.targets[part], x[part], None if sf is None else sf[part])
                yield

        seconds = run(chunks.rounds, begin, arrived, own())
        assert chunks.sent[me] == chunks.received[me] == 0
        self._rate = measured_rate(width * max(sum(chunks.sent), sum(chunks.received)), seconds, self._rate)

    def _place_rows(self, inner: Flight, targets: torch.Tensor, x: torch.Tensor, sf: torch.Tensor | None) -> None:
        self._domain.place(inner, Relayed(targets, x=x, sf=sf if sf is not None and sf.shape[1] else None))

    # Combine --------------------------------------------------------------------------------------------------------

    def prepare_combine(
        self, spec: CombineSpec, *, background: bool = False, previous: Sequence[CompletionEvent] = ()
    ) -> Flight:
        """Begin a combine: outputs only. Ranks meet in ``combine_send``, which raises what :meth:`prepare` would."""
        result = self._order.run("combine", lambda: self._domain.prepare_combine(spec).result, background=False)
        return Flight(result, Completion() if background else None, (spec, tuple(previous)))

    def combine_send(self, flight: Flight) -> None:
        (spec, previous), flight.state = flight.state, None
        result = flight.result
        self._order.start("combine", lambda: self._combine(spec, previous, result), flight.event)

    def combine_recv(self, flight: Flight) -> Combined:
        result: Combined = flight.result
        return result

    def _combine(self, spec: CombineSpec, previous: Sequence[CompletionEvent], result: Combined) -> None:
        plan, per_row = spec.plan, not spec.reduce_per_domain
        home: list[Homeward] = []

        def check() -> None:
            check_combine(spec)
            home.append(self._homeward(plan))
            if per_row:
                home.append(self._homeward(plan, per_row=True))

        agree = combine_agrees_on(spec) | {"allow_multiple_reduction": int(spec.reduce_per_domain)}
        self._meet("combine", agree, {}, check, previous)
        self._order.enter("pull")
        inner = self._domain.pull_begin(spec)
        relayed = list(plan.relay.split(plan.relay_counts.tolist()))
        mine = plan.targets.index_select(0, home[0].tokens[self.domains.domain])
        relayed[self.domains.domain] = mine
        if spec.weights is not None:
            self._combine_weights(spec, inner, relayed, home[0], result)
        if per_row:
            relayed = [self._alone(targets) for targets in relayed]
        self._sum(spec, inner, relayed, home[-1], result)
        self._order.enter("release")
        self._domain.pull_end(inner)

    def _alone(self, targets: torch.Tensor) -> torch.Tensor:
        """[n, 1]: every row of this domain that ``targets`` name, by itself."""
        ranks = (targets >> 32) & 0x3FFFFFFF
        inside = self.domains.of[ranks.clamp(max=self.num_ranks - 1)] == self.domains.domain
        return targets[primary(targets) & inside][:, None].contiguous()

    def _combine_weights(
        self, spec: CombineSpec, inner: object, relayed: Sequence[torch.Tensor], home: Homeward, result: Combined
    ) -> None:
        """Weights return whole: a domain's [n, columns] for the tokens that it was sent."""
        assert result.combined_topk_weights is not None
        me, columns = self.domains.domain, result.combined_topk_weights.shape[1]
        layout = spec.plan.layout

        def empty(n: int) -> torch.Tensor:
            return torch.empty((n, columns), dtype=result.combined_topk_weights.dtype, device="cpu")  # type: ignore[union-attr]

        pulled = [empty(targets.shape[0]) for targets in relayed]
        for targets, out in zip(relayed, pulled, strict=True):
            self._domain.pull(inner, layout, targets, False, False, None, out)
        returned = [empty(0) if d == me else empty(t.numel()) for d, t in enumerate(home.tokens)]
        self._rail.start(returned, [empty(0) if d == me else p for d, p in enumerate(pulled)]).wait()
        returned[me] = pulled[me]
        by: PlanLayout = "rank" if layout == "rank" else "topk"
        end = result.combined_x.shape[0]
        self._domain.reduce(by, home.home, [], returned, result, 0, end, (), spec.max_threads)

    def _sum(
        self, spec: CombineSpec, inner: object, relayed: list[torch.Tensor], home: Homeward, result: Combined
    ) -> None:
        """Rows: summed here for the rail in chunks, and for this rank's own tokens in between."""
        domain, me, dtype, hidden = self._domain, self.domains.domain, spec.y.dtype, spec.y.shape[1]
        layout, width, alone = spec.plan.layout, hidden * dtype.itemsize, not spec.reduce_per_domain
        returned = [domain.empty((t.numel(), hidden), dtype) for t in home.tokens]
        chunks = self._chunks(width, [r.shape[0] for r in relayed], [t.numel() for t in home.tokens])
        have = [0] * len(returned)
        done = 0

        def begin(i: int) -> Transfer:
            inputs, outputs = [], []
            for d, targets in enumerate(relayed):
                first, end = chunks.sent_in(i, d)
                rows = domain.empty((end - first, hidden), dtype)
                domain.pull(inner, layout, targets[first:end], spec.reduce_per_rank, alone, rows, None)
                inputs.append(rows)
                first, end = chunks.received_in(i, d)
                outputs.append(returned[d][first:end])
            return self._rail.start(outputs, inputs)

        def arrived(i: int) -> None:
            for d in range(len(returned)):
                if d != me:
                    have[d] = chunks.received_in(i, d)[1]
            finish()

        def own() -> Iterator[None]:
            step = max(1, _SLICE_BYTES // width)
            targets, out = relayed[me], returned[me]
            for first in range(0, out.shape[0], step):
                part = slice(first, first + step)
                domain.pull(inner, layout, targets[part], spec.reduce_per_rank, alone, out[part], None)
                have[me] = min(first + step, out.shape[0])
                finish()
                yield

        def finish() -> None:
            """Add up the tokens for which everything is here."""
            nonlocal done
            missing = [t[n] for t, n in zip(home.tokens, have, strict=True) if n < t.numel()]
            end = int(min(missing)) if missing else result.combined_x.shape[0]
            biases = spec.bias
            domain.reduce(layout, home.home, returned, [], result, done, end, biases, spec.max_threads)
            done = end

        seconds = run(chunks.rounds, begin, arrived, own())
        finish()
        self._rate = measured_rate(width * max(sum(chunks.sent), sum(chunks.received)), seconds, self._rate)

    # The rest -------------------------------------------------------------------------------------------------------

    def abort(self, flight: Flight) -> None:  # noqa: ARG002
        """See :class:`.base.Backend`."""
        self._order.give_up("a dispatch was begun and then given up")

    def barrier(self) -> None:
        self._order.run("barrier", lambda: self._meet("barrier", {}, {}, lambda: None, ()), background=False)

    def fail(self, op: str, message: str) -> None:
        def announce() -> None:
            meet(self._gather, Record(op, self._order.begin(op), failed=message))

        self._order.run(op, announce, background=False)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._domain.empty(shape, dtype)

    def statistics(self) -> Statistics:
        inside, found = self._domain.statistics(), copy.deepcopy(self._statistics)
        for name in ("heap_bytes", "held_bytes", "segments", "moved_to_ordinary_memory", "copied_combine_inputs"):
            setattr(found, name, getattr(inside, name))
        found.wait_seconds = {r: s for r, s in zip(self.domains.rail, self._rail.waited, strict=True) if r != self.rank}
        return found

    def close(self) -> None:
        """Wait for this rank's own operations in flight, then leave; peers are not waited for."""
        if self._order.close():
            self._rail.close()
        self._domain.close()

    def _tell_peers(self, error: EPError) -> None:
        self._rail.close()
        self._domain.poison(error)

    def _homeward(self, plan: Plan, *, per_row: bool = False) -> Homeward:
        if plan.num_domains != len(self.domains.members):
            hops = "one hop" if plan.num_domains == 0 else f"{plan.num_domains} domains"
            expected = f"one made over {len(self.domains.members)} domains"
            raise EPArgumentError.of("handle", expected, f"one made over {hops}")
        return Homeward.of(plan, self.domains, per_row=per_row)

    def _chunks(self, row_bytes: int, sent: list[int], received: list[int]) -> Chunks:
        me = self.domains.domain
        others = [[0 if d == me else n for d, n in enumerate(counts)] for counts in (sent, received)]
        return Chunks(chunk_rows(row_bytes, self._given_rate or self._agreed_rate), *others)

    def _gather(self, own: torch.Tensor) -> torch.Tensor:
        """Everyone's, by rank: across the rail, then within the domain, so that it crosses once for each domain."""
        domains = self.domains
        across = gather(self._rail, domains.domain, len(domains.members), own)
        return self._domain.gather(across).flatten(0, 1)[domains.order]

    def _meet(
        self,
        op: str,
        agree: dict[str, int | str],
        tell: dict[str, int],
        check: Callable[[], None],
        previous: Sequence[CompletionEvent],
    ) -> list[Record]:
        told = tell | {"link": int(self._rate)}
        record = Record(op, self._order.begin(op), agree, told)
        records = take_part(self._gather, self.rank, record, check, previous)
        self._agreed_rate = float(max(r.tell["link"] for r in records))
        self._statistics.operations += 1
        return records


def _rows_as_bytes(x: torch.Tensor) -> torch.Tensor:
    """[T, bytes of a row] uint8: the same memory, where a row is dense."""
    if x.shape[1] == 1 or x.shape[0] == 0:  # strides that say nothing, and a view as bytes wants 1
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.uint8)


def _pack_rows(x: torch.Tensor, sf: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    """[n, bytes] of these tokens, x then scale factors; the same memory where nothing lies in between."""
    n = tokens.numel()
    if n == 0:
        return torch.empty((0, 0), dtype=torch.uint8, device="cpu")
    first, last = int(tokens[0]), int(tokens[-1])
    if sf is None and last - first == n - 1:
        return x[first : last + 1].contiguous()
    parts = [x.index_select(0, tokens)] + ([] if sf is None else [sf.index_select(0, tokens)])
    return parts[0] if sf is None else torch.cat(parts, 1)
