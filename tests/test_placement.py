"""Where experts live: the named placements, and operators along the one that DTensor's chunks have."""

from __future__ import annotations

import pytest
import torch
from autograd_world import Routing, threads

import deep_ep_py as ep
from deep_ep_py.types import PLACEMENTS, ExpertPlacement


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("num_experts", [1, 4, 5, 7, 8])
def test_placements_by_name(num_experts, num_ranks):
    share, more = divmod(num_experts, num_ranks)
    expected = {
        "contiguous": tuple(share + (rank < more) for rank in range(num_ranks)),
        "chunked": tuple(len(c) for c in torch.arange(num_experts).chunk(num_ranks)),
    }
    for name in PLACEMENTS:
        placement = ExpertPlacement.of(num_experts, num_ranks, name)
        nonzero = tuple(n for n in placement.num_local if n)
        assert nonzero == tuple(n for n in expected[name] if n)
        assert len(placement.num_local) == num_ranks and placement.num_local[: len(nonzero)] == nonzero
        assert placement.rank.tolist() == [r for r, n in enumerate(placement.num_local) for _ in range(n)]
        assert placement.local.tolist() == [i for n in placement.num_local for i in range(n)]


#: contiguous: 2, 1, 1, 1 experts. chunked: 2, 2, 1, 0.
ROUTING = Routing((3, 0, 2, 4), num_experts=5, hidden=4)


def test_operators_follow_the_chunked_placement(backend):
    slots = torch.cat([ROUTING.topk_idx(rank) for rank in range(4)]).flatten()
    load = torch.bincount(slots[slots >= 0], minlength=5)

    def body(rank, buffer):
        owned = range(5)[2 * rank : 2 * rank + 2]
        x, idx = ROUTING.floats(rank, 1, 4), ROUTING.topk_idx(rank)
        x.requires_grad_()
        times = torch.arange(1.0, 6.0, dtype=torch.float64)  # an expert multiplies by its number plus one
        expected = x * torch.where(idx >= 0, times[idx.clamp(min=0)], 0).sum(1, keepdim=True)
        for sync in (True, False):
            for one_call in (True, False):
                kind = {"expand": True, "do_cpu_sync": sync, "placement": "chunked"}
                if one_call:
                    rows, _, plan = ep.plan_and_dispatch(x, idx, None, buffer, 5, **kind)
                else:
                    plan = ep.plan(idx, buffer, 5, **kind)
                    rows, _ = ep.dispatch(x, None, plan)
                assert plan.num_recv_tokens_per_expert.tolist() == load[owned.start : owned.stop].tolist()
                local = plan.recv_topk_idx[:, 0]
                factor = torch.where(local >= 0, times[(local + owned.start).clamp(0, 4)], 0)
                out = ep.combine(rows * factor[:, None], plan)
                torch.testing.assert_close(out, expected)
                x.grad = None
                out.sum().backward()
                torch.testing.assert_close(x.grad, (expected / x).detach())

    threads(ROUTING, body, backend=backend)


def test_unknown_placement_is_refused_on_every_rank():
    def body(rank, buffer):
        idx = ROUTING.topk_idx(rank)
        with pytest.raises(ep.EPArgumentError, match="placement: expected 'contiguous' or 'chunked', got 'random'"):
            ep.plan(idx, buffer, 5, placement="random" if rank == 1 else "chunked")
        assert ep.plan(idx, buffer, 5).num_rows >= 0

    threads(ROUTING, body)
