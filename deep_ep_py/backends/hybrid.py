"""``hybrid``: two hops. A row crosses to another domain once, to the rank there with the sender's index (its rail);
that rank places it for all its domain. Combine walks back: a domain's rows are summed before they cross.

Hop 1 is a :class:`~.._pairs.PairChannel` between the ranks of a rail, hop 2 a :class:`~.base.Domain`. Counts and top-k
ids go ahead of the rows, so that every row's final place is known when it arrives; rows travel in chunks
(:mod:`._pipeline`), and while one is on the wire others are placed or summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._pairs import PairChannel, gather
from .._rows import CPU
from ..errors import EPArgumentError, EPError
from ..event import CompletionEvent
from ..plans import Plan
from ..settings import Settings
from ..types import Combined, CombineSpec, DispatchSpec
from ._checks import check_combine, check_dispatch, combine_agrees_on, dispatch_agrees_on, told_of
from ._domains import Domains
from ._hop_combine import Returning, combine
from ._hop_dispatch import Begun, begin_along, begin_new, deliver
from ._hops import Homeward, Ways, check_crossings, crossings
from ._ordered import OrderedBackend
from ._pipeline import Pace
from ._record import Record
from ._routing import routing_hash
from .base import Domain, Statistics


class HybridBackend(OrderedBackend):
    """One rank's end. Construction is local: the channel is open, and the domain too.

    Args:
        rail: between this rank's rail, by domain; domain: of this rank's domain, by index.
        device: where tensors of calls and results lie; the hops themselves are the host's (:mod:`._staged`).
    """

    name = "hybrid"

    def __init__(
        self, domains: Domains, rail: PairChannel, domain: Domain, settings: Settings, device: torch.device = CPU
    ) -> None:
        super().__init__(domains.rank, domains.num_ranks, device)
        self.domains = domains
        self._rail = rail
        self._domain = domain
        # A host's link is shared by its ranks.
        self._pace = Pace(settings.link_gbps * 1e9 / 8 / len(domains.here))
        self._ways = Ways(domains, rail, domain, self._pace)

    def _begin_dispatch(self, spec: DispatchSpec, previous: Sequence[CompletionEvent]) -> Begun:
        worst = -1 if spec.num_worst_tokens is None else spec.num_worst_tokens
        tell: dict[str, Any] = {"num_worst_tokens": worst, "num_tokens": spec.x.shape[0], **told_of(spec.plan)}
        op = "dispatch" if spec.plan is None else "cached dispatch"
        home: list[Homeward] = []

        def check() -> None:
            check_dispatch(spec)
            tell["routing"] = routing_hash(spec)
            if spec.plan is not None:
                home.append(self._homeward(spec.plan))
                tell.update(crossings(home[0], spec.plan))

        records = self._meet(op, dispatch_agrees_on(spec), tell, check, previous)
        if spec.plan is not None:
            check_crossings(records, self.domains, self._order.seq)
            return begin_along(self._ways, spec, spec.plan, home[0], self._order.seq)
        self._statistics.rendezvous_with_counts += 1
        return begin_new(self._ways, spec, records, self._gather, self._order.seq)

    def _deliver(self, begun: Begun) -> None:
        self._order.at = ("dispatch", "place", begun.seq)
        deliver(self._ways, begun, self._order.enter)

    def _outputs(self, spec: CombineSpec) -> Combined:
        result: Combined = self._domain.prepare_combine(spec).result
        return result

    def _combine(self, spec: CombineSpec, previous: Sequence[CompletionEvent], result: Combined) -> None:
        returning: list[Returning] = []
        tell = told_of(spec.plan)

        def check() -> None:
            check_combine(spec)
            summed = self._homeward(spec.plan)
            rows = summed if spec.reduce_per_domain else self._homeward(spec.plan, per_row=True)
            returning.append(Returning(summed, rows))
            tell.update(crossings(summed, spec.plan))

        agree = combine_agrees_on(spec, spec.reduce_per_domain)
        records = self._meet("combine", agree, tell, check, previous)
        check_crossings(records, self.domains, self._order.seq)
        combine(self._ways, spec, returning[0], result, self._order.enter)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._domain.empty(shape, dtype)

    def statistics(self) -> Statistics:
        inside, found = self._domain.statistics(), super().statistics()
        for name in ("heap_bytes", "held_bytes", "segments", "moved_to_ordinary_memory", "copied_combine_inputs"):
            setattr(found, name, getattr(inside, name))
        across = {r: s for r, s in zip(self.domains.rail, self._rail.waited, strict=True) if r != self.rank}
        found.wait_seconds = dict(sorted((inside.wait_seconds | across).items()))
        return found

    def _release(self) -> None:
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

    def _gather(self, own: torch.Tensor) -> torch.Tensor:
        """Everyone's, by rank: across the rail, then within the domain, so that it crosses once for each domain."""
        domains = self.domains
        across = gather(self._rail, domains.domain, len(domains.members), own)
        return self._domain.gather(across).flatten(0, 1)[domains.order]

    def _meet(
        self,
        op: str,
        agree: dict[str, int | str],
        tell: dict[str, Any],
        check: Callable[[], None] = lambda: None,
        previous: Sequence[CompletionEvent] = (),
    ) -> list[Record]:
        tell["link"] = int(self._pace.measured)
        records = super()._meet(op, agree, tell, check, previous)
        self._pace.agreed = float(max(r.tell["link"] for r in records))
        return records
