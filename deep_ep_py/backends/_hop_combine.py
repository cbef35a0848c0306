"""A combine over two hops, after the ranks have met: sums inside the domain, which cross, and their sum at home."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .._pairs import Transfer
from ..layout import primary, target_ranks
from ..plans import PlanLayout
from ..types import Combined, CombineSpec
from ._hops import Chunks, Homeward, Ways
from ._pipeline import SLICE_BYTES, run


@dataclass(slots=True, eq=False)
class Returning:
    """What each domain returns for this rank's tokens: ``summed``, one row for all that a token has there, which is how
    weights always return; ``rows``: the same, or every row by itself where sums are not allowed to cross."""

    summed: Homeward
    rows: Homeward


def combine(
    ways: Ways, spec: CombineSpec, returning: Returning, result: Combined, enter: Callable[[str], None]
) -> None:
    """Fill ``result``. ``enter``: told the phases."""
    enter("pull")
    me, plan = ways.domains.domain, spec.plan
    inner = ways.domain.pull_begin(spec)
    # By domain, the tokens that this rank sums: those of its rail, and in its own domain its own.
    relayed = list(plan.relay.split(plan.relay_counts.tolist()))
    relayed[me] = plan.targets.index_select(0, returning.summed.tokens[me])
    if spec.weights is not None:
        _weights(ways, spec, inner, relayed, returning.summed, result)
    if not spec.reduce_per_domain:
        relayed = [_alone(ways, targets) for targets in relayed]
    _rows(ways, spec, inner, relayed, returning.rows, result)
    enter("release")
    ways.domain.pull_end(inner)


def _alone(ways: Ways, targets: torch.Tensor) -> torch.Tensor:
    """[n, 1]: every row of this domain that ``targets`` name, by itself."""
    ranks = target_ranks(targets).clamp(0, ways.domains.num_ranks - 1)
    inside = ways.domains.of[ranks] == ways.domains.domain
    return targets[primary(targets) & inside][:, None].contiguous()


def _weights(
    ways: Ways, spec: CombineSpec, inner: Any, relayed: list[torch.Tensor], home: Homeward, result: Combined
) -> None:
    """Weights return whole: a domain's [n, columns] for the tokens that it was sent."""
    out = result.combined_topk_weights
    assert out is not None
    me, layout = ways.domains.domain, spec.plan.layout

    def empty(n: int) -> torch.Tensor:
        return torch.empty((n, out.shape[1]), dtype=out.dtype, device="cpu")

    pulled = [empty(targets.shape[0]) for targets in relayed]
    for targets, weights in zip(relayed, pulled, strict=True):
        ways.domain.pull(inner, layout, targets, False, False, None, weights)
    returned = [empty(0) if d == me else empty(t.numel()) for d, t in enumerate(home.tokens)]
    ways.rail.start(returned, [empty(0) if d == me else p for d, p in enumerate(pulled)]).wait()
    returned[me] = pulled[me]
    by: PlanLayout = "rank" if layout == "rank" else "topk"
    ways.domain.reduce(by, home.home, [], returned, result, 0, out.shape[0], (), spec.max_threads)


def _rows(
    ways: Ways, spec: CombineSpec, inner: Any, relayed: list[torch.Tensor], home: Homeward, result: Combined
) -> None:
    """Rows: summed here for the rail in chunks, and for this rank's own tokens in between."""
    domain, me, dtype, hidden = ways.domain, ways.domains.domain, spec.y.dtype, spec.y.shape[1]
    layout, width, alone = spec.plan.layout, hidden * dtype.itemsize, not spec.reduce_per_domain
    returned = [domain.empty((t.numel(), hidden), dtype) for t in home.tokens]
    chunks = Chunks.across(ways, width, [r.shape[0] for r in relayed], [t.numel() for t in home.tokens])
    have = [0] * len(returned)  # rows that have come, by domain
    done = 0  # tokens that are summed

    def begin(i: int) -> Transfer:
        inputs, outputs = [], []
        for d, targets in enumerate(relayed):
            first, end = chunks.sent_in(i, d)
            rows = domain.empty((end - first, hidden), dtype)
            domain.pull(inner, layout, targets[first:end], spec.reduce_per_rank, alone, rows, None)
            inputs.append(rows)
            first, end = chunks.received_in(i, d)
            outputs.append(returned[d][first:end])
        return ways.rail.start(outputs, inputs)

    def arrived(i: int) -> None:
        for d in range(len(returned)):
            if d != me:
                have[d] = chunks.received_in(i, d)[1]
        finish()

    def own() -> Iterator[None]:
        step = max(1, SLICE_BYTES // width)
        targets, out = relayed[me], returned[me]
        for first in range(0, out.shape[0], step):
            part = slice(first, first + step)
            domain.pull(inner, layout, targets[part], spec.reduce_per_rank, alone, out[part], None)
            have[me] = min(first + step, out.shape[0])
            finish()
            yield

    def finish() -> None:
        """Sum the tokens for which everything is here."""
        nonlocal done
        missing = [t[n] for t, n in zip(home.tokens, have, strict=True) if n < t.numel()]
        end = int(min(missing)) if missing else result.combined_x.shape[0]
        domain.reduce(layout, home.home, returned, [], result, done, end, spec.bias, spec.max_threads)
        done = end

    seconds = run(chunks.rounds, begin, arrived, own())
    finish()
    ways.pace.measure(width * chunks.most, seconds)
