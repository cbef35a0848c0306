"""Seeded routings and one-line operations for the tests of the ``collective`` and ``hybrid`` backends."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

import torch

from deep_ep_py import reference
from deep_ep_py.backends.collective import CollectiveBackend
from deep_ep_py.choice import Construction, open_backend
from deep_ep_py.layout import worst_case_expanded_rows
from deep_ep_py.settings import Settings
from deep_ep_py.testing import run_threads
from deep_ep_py.types import DispatchSpec, ExpertPlacement

M = 40
SETTINGS = Settings(timeout_seconds=20, connect_timeout_seconds=20)


@dataclass(frozen=True)
class Routing:
    """Seeded inputs of all ranks: uneven and zero token counts, empty slots, duplicate experts, odd expert counts.
    ``tokens``: of each rank, where they matter. ``wanted``: experts that tokens go to; empty: all."""

    num_ranks: int
    num_experts: int = 7
    num_topk: int = 4
    hidden: int = 9
    dtype: torch.dtype = torch.float32
    seed: int = 0
    alignment: int = 1
    tokens: tuple[int, ...] = ()
    wanted: tuple[int, ...] = ()

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        words = [f"R{self.num_ranks}-E{self.num_experts}-K{self.num_topk}-{name}-a{self.alignment}"]
        words += [f"H{self.hidden}"] if self.hidden != 9 else []
        words += ["T" + "+".join(map(str, self.tokens))] if self.tokens else []
        return "-".join(words + ([f"to{self.wanted[0]}"] if self.wanted else []))

    def inputs(self):
        g = torch.Generator().manual_seed(self.seed)
        num_tokens = self.tokens or [0 if r == 1 else 3 + 11 * r for r in range(self.num_ranks)]
        experts = torch.tensor([-1, *(self.wanted or range(self.num_experts))])
        topk = [experts[torch.randint(0, len(experts), (t, self.num_topk), generator=g)] for t in num_tokens]
        weights = [torch.rand(t, self.num_topk, generator=g) for t in num_tokens]
        x = [cast(torch.randn(t, self.hidden, generator=g), self.dtype) for t in num_tokens]
        sf = [torch.randint(0, 1000, (t, 3), generator=g, dtype=torch.int32) for t in num_tokens]
        return topk, weights, x, sf

    def rows(self, counts, seed=1):
        """Expert outputs whose sum depends on the order of addition."""
        g = torch.Generator().manual_seed(seed)
        dtype = self.dtype if self.dtype.itemsize > 1 else torch.bfloat16
        return [(torch.randn(n, self.hidden, generator=g) * 10.0 ** torch.randint(-4, 5, (n, 1), generator=g)).to(dtype)
                for n in counts]  # fmt: skip

    @property
    def placement(self):
        return ExpertPlacement.of(self.num_experts, self.num_ranks)


ROUTINGS = [
    Routing(1),
    Routing(2, alignment=4),
    Routing(3, dtype=torch.bfloat16, alignment=3),
    Routing(4, num_experts=3, dtype=torch.float64),
    Routing(3, num_topk=1, hidden=1),
    Routing(2, dtype=torch.float8_e4m3fn, alignment=8),
]


def cast(x, dtype):
    return x.to(dtype)


def same(got, want, what, valid=slice(None)):
    if want is None:
        assert got is None, what
        return
    assert got.dtype == want.dtype, what
    assert got.shape == want.shape, what
    got, want = got[valid], want[valid]
    assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8)), what


CPU = torch.device("cpu")


def open_hybrid(communicator, domains, settings=SETTINGS, device=CPU):
    """One rank's end of two hops over ``domains``, tuples of ranks. Collective."""
    where = {r: f"host {d}" for d, ranks in enumerate(domains) for r in ranks}
    nonces = communicator.exchange(secrets.token_bytes(7), timeout=20, what="epoch")
    backend, info = open_backend(
        Construction(
            communicator=communicator,
            settings=replace(settings, backend="hybrid"),
            hosts=[{"domain": where[r], "boot_id": "one machine"} for r in range(communicator.size)],
            device=device,
            epoch=sum(int.from_bytes(n, "little") for n in nonces),
            heap_bytes=1 << 20,
            num_cores=1,
            allow_hybrid_mode=True,
        )
    )
    assert info.name == "hybrid"
    return backend


def all_ranks(routing, body, settings=SETTINGS, domains=None):
    """``body(rank, backend)`` on every rank, as threads: on ``collective``, or over ``domains`` on ``hybrid``."""

    def rank_body(communicator):
        if domains is None:
            backend = CollectiveBackend(communicator, settings)
        else:
            backend = open_hybrid(communicator, domains, settings)
        try:
            return body(communicator.rank, backend)
        finally:
            backend.close()

    return run_threads(routing.num_ranks, rank_body)


def dispatch(backend, spec, background=False, previous=()):
    flight = backend.prepare(spec, background=background, previous=previous)
    backend.dispatch_send(flight)
    result = backend.dispatch_recv(flight)
    if flight.event is not None:
        flight.event.wait()
        assert flight.event.done()
    return result


def combine(backend, spec, background=False, previous=()):
    flight = backend.prepare_combine(spec, background=background, previous=previous)
    backend.combine_send(flight)
    result = backend.combine_recv(flight)
    if flight.event is not None:
        flight.event.wait()
    return result


def v2_spec(routing, rank, *, expand, worst=False, **more):
    topk, weights, x, sf = routing.inputs()
    rows = None
    if worst:
        rows = routing.num_ranks * M
        if expand:
            local = routing.placement.num_local[rank]
            rows = worst_case_expanded_rows(routing.num_ranks, M, routing.num_topk, local, routing.alignment)
    given = {
        "x": x[rank],
        "layout": "expand" if expand else "topk",
        "sf": sf[rank],
        "topk_idx": topk[rank],
        "topk_weights": weights[rank],
        "placement": routing.placement,
        "expert_alignment": routing.alignment,
        "num_max_tokens_per_rank": M,
        "num_worst_tokens": rows,
        "zero_padding": expand,
    }
    return DispatchSpec(**(given | more))


def v1_spec(routing, rank, **more):
    topk, weights, x, sf = routing.inputs()
    layout = reference.v1_layout(topk[rank], routing.num_experts, routing.num_ranks)
    given = {
        "x": x[rank],
        "layout": "rank",
        "sf": sf[rank],
        "topk_idx": topk[rank],
        "topk_weights": weights[rank],
        "is_token_in_rank": layout.is_token_in_rank,
        "num_tokens_per_expert": layout.num_tokens_per_expert,
        "placement": routing.placement,
        "mask_weights": True,
        "expert_alignment": routing.alignment,
    }
    return DispatchSpec(**(given | more))


def cached(routing, rank, plan, weights=None):
    """The same x along a plan that is already there."""
    return DispatchSpec(
        x=routing.inputs()[2][rank],
        layout=plan.layout,
        plan=plan,
        topk_weights=weights,
        zero_padding=plan.layout == "expand",
    )
