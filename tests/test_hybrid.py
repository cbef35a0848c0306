"""The ``hybrid`` backend below the faces, against the oracle: domains in any order, shapes at the edges, any timing."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
import torch
from collective_cases import SETTINGS, M, Routing, all_ranks, cached, combine, dispatch, same, v1_spec, v2_spec

from deep_ep_py import reference
from deep_ep_py.backends import _pipeline
from deep_ep_py.communicator import ThreadCommunicator
from deep_ep_py.types import CombineSpec

CROSSED = ((0, 3), (1, 2))
INTERLEAVED = ((0, 2), (1, 3))
NEIGHBOURS = ((0, 1), (2, 3))

# Oracle: one sum for each domain, whatever ranks it has --------------------------------------------------------------


def sums_by_domain(recipe, y, owner, rows, domains):
    """The domain of every column, and by domain the rows that it returns."""
    of = torch.full((len(y) + 1,), -1, dtype=torch.int64)
    for d, ranks in enumerate(domains):
        of[list(ranks)] = d
    sums = []
    for d in range(len(domains)):
        inner = recipe(y, torch.where(of[owner] == d, owner, -1), rows)
        sums.append(reference.reduce_rows(inner, len(owner), y[0].shape[1], y[0].dtype))
    return of[owner], sums


def v2_combined(routing, domains, y, expand, multiple, bias):
    """[T, H] of every rank."""
    topk = routing.inputs()[0]
    options = {"num_experts": routing.num_experts, "expert_alignment": routing.alignment, "do_expand": expand}
    if not multiple:
        return [x for x, _ in reference.v2_combine(y, topk, allow_multiple_reduction=False, bias=bias, **options)]
    placement = reference.contiguous_placement(routing.num_experts, routing.num_ranks)
    by_rank = reference.compact_rows([reference.tokens_in_ranks(t, placement) for t in topk])
    by_slot, _ = reference.expanded_rows(topk, placement, routing.alignment)
    recipe = reference.v2_grouped_contributions if expand else reference.v2_contributions
    out = []
    for rank, t in enumerate(topk):
        owner = placement.owner[t]
        where, sums = sums_by_domain(recipe, y, owner, (by_slot if expand else by_rank)[rank], domains)
        places = torch.arange(len(owner))[:, None].expand(-1, len(sums))
        parts = reference.v2_contributions(sums, where, places)
        out.append(reference.reduce_rows(parts, len(owner), routing.hidden, y[0].dtype, bias[rank]))
    return out


def v1_combined(in_rank, domains, y, bias):
    """Domains in the order of their lowest ranks."""
    out = []
    for rank, rows in enumerate(reference.compact_rows(in_rank)):
        owner = torch.where(rows >= 0, torch.arange(len(y)), -1)
        where, sums = sums_by_domain(reference.contributions, y, owner, rows, domains)
        parts = []
        for d, rows_of_domain in enumerate(sums):
            tokens = (where == d).any(1).nonzero()[:, 0]
            parts.append((tokens, rows_of_domain, tokens))
        out.append(reference.reduce_rows(parts, len(rows), y[0].shape[1], y[0].dtype, bias[rank] if bias else ()))
    return out


class V2:
    """What V2 must deliver for a routing, and what it combines."""

    def __init__(self, routing, domains, expand):
        topk, weights, x, sf = routing.inputs()
        self.routing, self.expand = routing, expand
        self.received = reference.v2_dispatch(
            x,
            topk,
            num_experts=routing.num_experts,
            num_max_tokens_per_rank=M,
            topk_weights=weights,
            sf=sf,
            expert_alignment=routing.alignment,
            do_expand=expand,
        )
        self.y = routing.rows([w.recv_x.shape[0] for w in self.received])
        g = torch.Generator().manual_seed(5)
        self.back = [torch.rand(w.recv_topk_weights.shape, generator=g) for w in self.received]
        self.bias = [[b] for b in routing.rows([len(t) for t in topk], seed=8)]
        self.combined = {m: v2_combined(routing, domains, self.y, expand, m, self.bias) for m in (False, True)}
        options = {"num_experts": routing.num_experts, "expert_alignment": routing.alignment, "do_expand": expand}
        self.weights = [w for _, w in reference.v2_combine(self.y, topk, topk_weights=self.back, **options)]

    def valid(self, rank, plan):
        """Rows that are defined: gaps are zeroed, so everything that an expanded plan spans is."""
        valid = self.received[rank].row_valid
        return torch.arange(len(valid)) < plan.num_rows if self.expand else valid

    def check_dispatched(self, rank, got):
        want, plan = self.received[rank], got.plan
        valid, num_recv = self.valid(rank, plan), len(want.recv_src_metadata)
        rows = slice(len(want.recv_x))
        same(got.recv_x[rows], want.recv_x, "x", valid)
        same(got.recv_sf[rows], want.recv_sf, "sf", valid)
        if not self.expand:
            same(got.recv_topk_idx[rows], want.recv_topk_idx, "topk_idx", valid)
        same(got.recv_topk_weights[rows], want.recv_topk_weights, "weights", valid)
        columns = [0, *range(2, 2 + self.routing.num_topk)]
        same(got.recv_meta[:num_recv, columns].contiguous(), want.recv_src_metadata[:, columns].contiguous(), "meta")
        assert plan.num_recv_tokens == num_recv
        same(plan.expert_counts, want.num_unaligned_recv_tokens_per_expert, "counts")
        same(plan.rank_prefix[:, rank].contiguous(), want.psum_num_recv_tokens_per_scaleup_rank, "prefix")

    def check_cached(self, rank, got, weights):
        valid, rows = self.valid(rank, got.plan), slice(len(self.received[rank].recv_x))
        same(got.recv_x[rows], self.received[rank].recv_x, "cached x", valid)
        if weights is not None:
            same(got.recv_topk_weights[rows], self.received[rank].recv_topk_weights, "cached weights", valid)

    def combine_spec(self, rank, plan, multiple, y=None):
        y = self.y[rank] if y is None else y
        per_rank = self.expand and multiple
        return CombineSpec(y, plan, self.back[rank], tuple(self.bias[rank]), per_rank, reduce_per_domain=multiple)

    def check_combined(self, rank, got, multiple):
        same(got.combined_x, self.combined[multiple][rank], f"combined, multiple {multiple}")
        same(got.combined_topk_weights, self.weights[rank], "combined weights")


def v2_round_trip(rank, backend, want, worst, background):
    routing = want.routing
    got = dispatch(backend, v2_spec(routing, rank, expand=want.expand, worst=worst), background)
    want.check_dispatched(rank, got)
    weights = routing.inputs()[1][rank]
    for given in (None, weights):
        want.check_cached(rank, dispatch(backend, cached(routing, rank, got.plan, given), background), given)
    for multiple in (True, False):
        y = want.y[rank]
        if worst:  # what is past the valid rows is undefined
            y = torch.cat([y, y.new_full((len(got.recv_x) - len(y), routing.hidden), float("nan"))])
            spec = want.combine_spec(rank, got.plan, multiple, y)
            spec.weights = torch.cat(
                [spec.weights, spec.weights.new_ones((len(y) - len(spec.weights), *spec.weights.shape[1:]))]
            )
        else:
            spec = want.combine_spec(rank, got.plan, multiple)
        want.check_combined(rank, combine(backend, spec, background), multiple)


class V1:
    def __init__(self, routing, domains):
        topk, weights, x, sf = routing.inputs()
        layouts = [reference.v1_layout(t, routing.num_experts, routing.num_ranks) for t in topk]
        in_rank = [layout.is_token_in_rank for layout in layouts]
        per_expert = [layout.num_tokens_per_expert for layout in layouts]
        given = {"sf": sf, "topk_idx": topk, "topk_weights": weights, "expert_alignment": routing.alignment}
        self.routing = routing
        self.received = reference.v1_dispatch(x, in_rank, per_expert, **given)
        self.y = routing.rows([w.num_recv for w in self.received])
        g = torch.Generator().manual_seed(3)
        self.back = [torch.rand(len(rows), routing.num_topk, generator=g) for rows in self.y]
        biases = (routing.rows([len(t) for t in topk], seed=s) for s in (6, 7))
        self.bias = [[a, b] for a, b in zip(*biases, strict=True)]
        self.combined = v1_combined(in_rank, domains, self.y, self.bias)
        self.weights = v1_combined(in_rank, domains, self.back, None)

    def round_trip(self, rank, backend, background):
        want = self.received[rank]
        got = dispatch(backend, v1_spec(self.routing, rank), background)
        same(got.recv_x, want.recv_x, "x")
        same(got.recv_sf, want.recv_sf, "sf")
        same(got.recv_topk_idx, want.recv_topk_idx, "topk_idx")
        same(got.recv_topk_weights, want.recv_topk_weights, "weights")
        same(got.recv_meta, want.recv_src_idx, "source indices")
        same(got.plan.rank_prefix, want.rank_prefix_matrix, "prefix")
        again = dispatch(backend, cached(self.routing, rank, got.plan), background)
        same(again.recv_x, want.recv_x, "cached x")
        spec = CombineSpec(self.y[rank], got.plan, self.back[rank], tuple(self.bias[rank]))
        out = combine(backend, spec, background)
        same(out.combined_x, self.combined[rank], "combined")
        same(out.combined_topk_weights, self.weights[rank], "combined weights")


def conform(routing, domains, settings=SETTINGS):
    """Both faces' layouts, inline and in the background, exact and worst case."""
    compact, expand, v1 = V2(routing, domains, False), V2(routing, domains, True), V1(routing, domains)

    def body(rank, backend):
        v1.round_trip(rank, backend, background=False)
        v2_round_trip(rank, backend, compact, worst=False, background=True)
        v2_round_trip(rank, backend, expand, worst=False, background=False)
        v2_round_trip(rank, backend, compact, worst=True, background=False)
        v1.round_trip(rank, backend, background=True)

    all_ranks(routing, body, settings, domains)


SHAPES = [
    (Routing(4, dtype=torch.bfloat16, alignment=4), INTERLEAVED),
    (Routing(4, dtype=torch.float16), CROSSED),
    (Routing(4, num_experts=3, dtype=torch.float64, hidden=1), CROSSED),
    (Routing(4, dtype=torch.float8_e4m3fn, alignment=8), NEIGHBOURS),
    (Routing(4, num_topk=40, num_experts=64, tokens=(5, 6, 0, 7)), INTERLEAVED),
    (Routing(4, num_experts=40, num_topk=3, dtype=torch.bfloat16), CROSSED),
    (Routing(3, num_topk=1, hidden=1), ((0, 1, 2),)),
    (Routing(6, num_experts=13), ((0, 5), (1, 4), (2, 3))),
    (Routing(6, num_experts=13, dtype=torch.bfloat16), ((0, 4, 5), (1, 2, 3))),
    (Routing(4, num_experts=8, tokens=(0, 0, 1, 0)), NEIGHBOURS),
    (Routing(4, num_experts=8, tokens=(1, 0, 0, 0), wanted=(7,)), CROSSED),
    (Routing(4, num_experts=8, wanted=(4, 5, 6, 7)), NEIGHBOURS),
    (Routing(4, num_experts=8, tokens=(9, 11, 0, 0)), NEIGHBOURS),
    (Routing(4, num_experts=8, tokens=(0, 0, 0, 0)), NEIGHBOURS),
]


@pytest.mark.parametrize(("routing", "domains"), SHAPES, ids=str)
def test_shapes(routing, domains):
    conform(routing, domains)


@pytest.mark.parametrize("rows", [1, 2, 1 << 30])
@pytest.mark.parametrize(("routing", "domains"), [SHAPES[0], SHAPES[7]], ids=str)
def test_chunks(monkeypatch, routing, domains, rows):
    """Chunks of one row, of a few, and one that holds everything."""
    monkeypatch.setattr(_pipeline, "chunk_rows", lambda *_: rows)
    monkeypatch.setattr("deep_ep_py.backends._hop_dispatch.SLICE_BYTES", 64)
    monkeypatch.setattr("deep_ep_py.backends._hop_combine.SLICE_BYTES", 64)
    conform(routing, domains)


@pytest.mark.parametrize("gbps", [1e-9, 1e9])
def test_rate_of_the_link(gbps):
    conform(replace(SHAPES[1][0], hidden=20_000), CROSSED, replace(SETTINGS, link_gbps=gbps))


# Any timing ---------------------------------------------------------------------------------------------------------


class Late:
    """A rail that takes its time: starts and waits after random pauses, and says late that a transfer is done."""

    def __init__(self, channel, nap):
        self._channel, self._nap = channel, nap
        self.close = channel.close

    @property
    def waited(self):
        return self._channel.waited

    def start(self, outputs, inputs):
        self._nap()
        return LateTransfer(self._channel.start(outputs, inputs), self._nap)


class LateTransfer:
    def __init__(self, transfer, nap):
        self._transfer, self._nap = transfer, nap
        self._looks = 0

    def done(self):
        self._looks += 1
        return self._looks > 2 and self._transfer.done()

    def wait(self):
        self._nap()
        self._transfer.wait()


@pytest.fixture
def late(monkeypatch):
    """Called with a seed: from then on rails are :class:`Late`; returns what makes a domain's phases so too."""

    def make(seed):
        def napper(rank, salt):
            pauses = random.Random(f"{seed} {rank} {salt}")
            return lambda *_: time.sleep(pauses.choice((0, 0, 0, 1e-4, 2e-3)))

        opened = ThreadCommunicator.open_pairs
        monkeypatch.setattr(
            ThreadCommunicator,
            "open_pairs",
            lambda self, *, timeout: Late(opened(self, timeout=timeout), napper(self.names[self.rank], "rail")),
        )
        monkeypatch.setattr(_pipeline, "chunk_rows", lambda *_: 3)
        return lambda rank, backend: backend._domain.set_phase_hook(napper(rank, "domain"))

    return make


OPERATIONS = ("dispatch", "dispatch", "cached", "combine", "combine", "in place", "drop", "barrier")


@pytest.mark.parametrize(("domains", "seed"), [(CROSSED, 1), (NEIGHBOURS, 2), (((0,), (1,), (2,)), 3)], ids=str)
def test_any_timing(late, domains, seed):
    """Operations of all kinds, while every rank lingers where it likes; what was returned stays what it was."""
    num_ranks = sum(map(len, domains))
    linger = late(seed)
    sorts = [(Routing(num_ranks, seed=s, dtype=torch.bfloat16), expand) for s in (1, 2) for expand in (False, True)]
    wanted = [V2(routing, domains, expand) for routing, expand in sorts]

    def body(rank, backend):
        linger(rank, backend)
        # One stream for what all ranks do alike, one for what each does in its own way.
        common, own = random.Random(seed), random.Random(seed * 100 + rank)
        held, returned = [], []

        def finish(flight, check):
            if flight.event is None or own.random() < 0.3:
                if flight.event is not None:
                    flight.event.wait()
                check()
            else:
                returned.append((flight, check))

        def dispatched(want):
            spec = v2_spec(want.routing, rank, expand=want.expand)
            flight = backend.prepare(spec, background=own.random() < 0.5)
            backend.dispatch_send(flight)
            held.append((want, backend.dispatch_recv(flight), flight.event))
            got = held[-1][1]
            finish(flight, lambda: want.check_dispatched(rank, got))

        def cached_along(want, plan):
            weights = want.routing.inputs()[1][rank] if common.random() < 0.5 else None
            flight = backend.prepare(cached(want.routing, rank, plan, weights), background=own.random() < 0.5)
            backend.dispatch_send(flight)
            finish(flight, lambda: want.check_cached(rank, flight.result, weights))

        def combined(want, plan, y=None):
            multiple = common.random() < 0.7
            flight = backend.prepare_combine(
                want.combine_spec(rank, plan, multiple, y), background=y is None and own.random() < 0.5
            )
            backend.combine_send(flight)
            finish(flight, lambda: want.check_combined(rank, flight.result, multiple))

        for _ in range(130):
            operation = common.choice(OPERATIONS)
            pick = common.randrange(1000)
            if operation == "barrier":
                backend.barrier()
            elif operation == "dispatch" or not held:
                dispatched(wanted[pick % len(wanted)])
            elif operation == "cached":
                want, got, _ = held[pick % len(held)]
                cached_along(want, got.plan)
            elif operation == "combine":
                want, got, _ = held[pick % len(held)]
                combined(want, got.plan)
            else:
                want, got, event = held.pop(pick % len(held))
                if event is not None:
                    event.wait()
                want.check_dispatched(rank, got)
                if operation == "in place":
                    # In place, then overwritten at once: nobody reads it any more.
                    got.recv_x.copy_(want.y[rank])
                    combined(want, got.plan, got.recv_x)
                    got.recv_x.fill_(float("nan"))
                    returned[:] = [(f, check) for f, check in returned if f.result is not got]
        backend.barrier()
        for flight, check in returned:
            assert flight.event.done()
            check()
        for want, got, _ in held:
            want.check_dispatched(rank, got)
        assert backend.statistics().operations > 90

    all_ranks(Routing(num_ranks), body, domains=domains)


def test_waits_are_counted_by_rank():
    """``wait_seconds``: of the rail and of the domain, and only of who came late. Rank 1 waits for its neighbour, who
    waits on its rail."""

    def body(rank, backend):
        if rank == 3:
            time.sleep(0.5)
        backend.barrier()
        return backend.statistics().wait_seconds

    waited = all_ranks(Routing(4), body, domains=CROSSED)
    assert [set(w) for w in waited] == [{1, 3}, {0, 2}, {1, 3}, {0, 2}]
    late, others = (waited[2][3], waited[0][3], waited[1][2]), (waited[0][1], waited[1][0], waited[3][2])
    assert min(late) > max(others), waited
