"""The ``collective`` backend below the faces, against the oracle: layouts, order, numerics, events."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from collective_cases import (
    ROUTINGS,
    SETTINGS,
    M,
    Routing,
    all_ranks,
    cached,
    combine,
    dispatch,
    same,
    v1_spec,
    v2_spec,
)

from deep_ep_py import reference
from deep_ep_py.backends.collective import CollectiveBackend
from deep_ep_py.communicator import communicator_of
from deep_ep_py.testing import run_processes
from deep_ep_py.types import CombineSpec

# Against the oracle -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
@pytest.mark.parametrize("worst", [False, True], ids=["exact", "worst"])
@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expand"])
@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_v2(routing, expand, worst, background):
    topk, weights, x, sf = routing.inputs()
    wanted = reference.v2_dispatch(
        x,
        topk,
        num_experts=routing.num_experts,
        num_max_tokens_per_rank=M,
        topk_weights=weights,
        sf=sf,
        expert_alignment=routing.alignment,
        do_expand=expand,
        do_cpu_sync=not worst,
    )
    y = routing.rows([w.recv_x.shape[0] for w in wanted])
    back = [torch.rand(w.recv_topk_weights.shape, generator=torch.Generator().manual_seed(5)) for w in wanted]
    bias = [[b] for b in routing.rows([len(t) for t in topk], seed=8)]

    def body(rank, backend):
        want = wanted[rank]
        got = dispatch(backend, v2_spec(routing, rank, expand=expand, worst=worst), background)
        plan, valid = got.plan, want.row_valid
        if expand:  # gaps are zero too, so everything that the plan spans is defined
            valid = torch.arange(len(valid)) < plan.num_rows
        same(got.recv_x, want.recv_x, "x", valid)
        same(got.recv_sf, want.recv_sf, "sf", valid)
        same(got.recv_topk_idx, want.recv_topk_idx, "topk_idx", valid)
        same(got.recv_topk_weights, want.recv_topk_weights, "weights", valid)
        num_recv = len(want.recv_src_metadata)
        assert plan.num_recv_tokens == num_recv
        fixed = worst
        assert len(got.recv_meta) == (routing.num_ranks * M if fixed else num_recv)
        columns = [0, *range(2, 2 + routing.num_topk)]
        same(got.recv_meta[:num_recv, columns].contiguous(), want.recv_src_metadata[:, columns].contiguous(), "meta")
        assert got.recv_meta[:num_recv, 1].tolist() == [i // M for i in got.recv_meta[:num_recv, 0].tolist()]
        same(plan.expert_counts, want.num_unaligned_recv_tokens_per_expert, "counts")
        same(plan.rank_prefix[:, rank].contiguous(), want.psum_num_recv_tokens_per_scaleup_rank, "prefix")

        again = dispatch(backend, cached(routing, rank, plan, weights[rank]), background)
        same(again.recv_x, want.recv_x, "cached x", valid)
        same(again.recv_topk_weights, want.recv_topk_weights, "cached weights", valid)
        assert again.recv_topk_idx is None
        assert again.recv_meta is None
        assert again.plan is plan
        outputs = []
        for per_rank in (False, True):
            spec = CombineSpec(y[rank], plan, back[rank], tuple(bias[rank]), reduce_per_rank=expand and per_rank)
            outputs.append(combine(backend, spec, background))
        return plan.digest, outputs

    results = all_ranks(routing, body)
    assert len({digest for digest, _ in results}) == 1
    for per_rank in (False, True):
        want = reference.v2_combine(
            y,
            topk,
            num_experts=routing.num_experts,
            expert_alignment=routing.alignment,
            do_expand=expand,
            allow_multiple_reduction=per_rank,
            topk_weights=back,
            bias=bias,
        )
        for (_, outputs), (combined_x, combined_weights) in zip(results, want, strict=True):
            same(outputs[per_rank].combined_x, combined_x, "combined")
            same(outputs[per_rank].combined_topk_weights, combined_weights, "combined weights")


@pytest.mark.parametrize("worst", [0, 200], ids=["exact", "worst"])
@pytest.mark.parametrize("with_topk", [True, False], ids=["topk", "mask"])
@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_v1(routing, with_topk, worst):
    topk, weights, x, sf = routing.inputs()
    layouts = [reference.v1_layout(t, routing.num_experts, routing.num_ranks) for t in topk]
    in_rank = [layout.is_token_in_rank for layout in layouts]
    per_expert = [layout.num_tokens_per_expert for layout in layouts]
    wanted = reference.v1_dispatch(
        x,
        in_rank,
        per_expert,
        sf=sf,
        topk_idx=topk if with_topk else None,
        topk_weights=weights if with_topk else None,
        expert_alignment=routing.alignment,
        num_worst_tokens=worst,
    )
    y = routing.rows([w.recv_x.shape[0] for w in wanted])
    back = [torch.rand(len(rows), routing.num_topk, generator=torch.Generator().manual_seed(3)) for rows in y]
    bias = [[a, b] for a, b in zip(*(routing.rows([len(t) for t in topk], seed=s) for s in (6, 7)), strict=True)]

    def body(rank, backend):
        want = wanted[rank]
        dropped = {} if with_topk else {"topk_idx": None, "topk_weights": None}
        got = dispatch(backend, v1_spec(routing, rank, num_worst_tokens=worst or None, **dropped))
        plan, valid = got.plan, slice(want.num_recv)
        same(got.recv_x, want.recv_x, "x", valid)
        same(got.recv_sf, want.recv_sf, "sf", valid)
        same(got.recv_topk_idx, want.recv_topk_idx, "topk_idx, its tail too")
        same(got.recv_topk_weights, want.recv_topk_weights, "weights", valid)
        same(got.recv_meta, want.recv_src_idx, "source indices, their tail too")
        same(plan.rank_prefix, want.rank_prefix_matrix, "prefix")
        again = dispatch(backend, cached(routing, rank, plan))
        same(again.recv_x, want.recv_x, "cached x", valid)
        return combine(backend, CombineSpec(y[rank], plan, back[rank], tuple(bias[rank])))

    results = all_ranks(routing, body)
    for got, (combined_x, combined_weights) in zip(
        results, reference.v1_combine(y, in_rank, topk_weights=back, bias=bias), strict=True
    ):
        same(got.combined_x, combined_x, "combined")
        same(got.combined_topk_weights, combined_weights, "combined weights")


@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expand"])
def test_column_major_sf_and_max_tokens_found_out(expand):
    routing = Routing(3, alignment=2)

    def body(rank, backend):
        plain = dispatch(backend, v2_spec(routing, rank, expand=expand))
        spec = v2_spec(routing, rank, expand=expand, col_major_sf=True, num_max_tokens_per_rank=0)
        got = dispatch(backend, spec)
        assert torch.equal(got.recv_sf, plain.recv_sf)
        assert got.recv_sf.stride(0) == 1
        assert got.recv_sf.stride(1) % 4 == 0
        assert got.plan.num_max_tokens_per_rank == max(len(t) for t in routing.inputs()[0])
        source, token = plain.recv_meta[:, 0] // M, plain.recv_meta[:, 0] % M
        assert torch.equal(got.recv_meta[:, 0], source * got.plan.num_max_tokens_per_rank + token)

    all_ranks(routing, body)


def test_brute_force_rows_of_an_expanded_dispatch():
    """The oracle's order, once more by sorting tuples: (local expert, source rank, source token, slot)."""
    routing = Routing(3, alignment=3)
    topk, _, x, _ = routing.inputs()
    placement = routing.placement

    def body(rank, backend):
        got = dispatch(backend, v2_spec(routing, rank, expand=True))
        slots = [
            (int(placement.local[e]), s, t, k)
            for s in range(3)
            for t, row in enumerate(topk[s].tolist())
            for k, e in enumerate(row)
            if e >= 0 and placement.rank[e] == rank
        ]
        row = 0
        for _, block in itertools.groupby(sorted(slots), key=lambda item: item[0]):
            for _, s, t, _ in block:
                assert torch.equal(got.recv_x[row], x[s][t])
                row += 1
            row = -(-row // 3) * 3

    all_ranks(routing, body)


def test_subnormals_and_nan_survive_combine():
    routing = Routing(2, num_experts=2, num_topk=2, hidden=4, dtype=torch.bfloat16)
    tiny = torch.tensor([1e-40, -1e-40, float("nan"), float("inf")]).to(torch.bfloat16)
    assert tiny[0] != 0
    want = tiny.masked_fill(tiny.isnan(), float("nan"))  # the one quiet NaN: torch's cast makes another

    def body(rank, backend):
        idx = torch.tensor([[0, -1]])
        spec = v2_spec(routing, rank, expand=False, x=tiny[None], sf=None, topk_idx=idx, topk_weights=None)
        got = dispatch(backend, spec)
        same(combine(backend, CombineSpec(got.recv_x, got.plan)).combined_x, want[None], "tiny")

    all_ranks(routing, body)


@pytest.mark.parametrize("default", ["meta", torch.float64], ids=str)
def test_torch_defaults_do_not_matter(default):
    routing = Routing(2, alignment=2)

    def body(rank, backend):
        spec = v2_spec(routing, rank, expand=True)
        before = dispatch(backend, spec)
        want = combine(backend, CombineSpec(before.recv_x, before.plan, before.recv_topk_weights))
        if default == "meta":
            with torch.device("meta"):
                got = dispatch(backend, spec)
                out = combine(backend, CombineSpec(got.recv_x, got.plan, got.recv_topk_weights))
        else:
            backend.barrier()
            torch.set_default_dtype(default)
            got = dispatch(backend, spec)
            out = combine(backend, CombineSpec(got.recv_x, got.plan, got.recv_topk_weights))
        same(got.recv_x, before.recv_x, "x")
        same(out.combined_x, want.combined_x, "combined")
        same(out.combined_topk_weights, want.combined_topk_weights, "weights")

    try:
        all_ranks(routing, body)
    finally:
        torch.set_default_dtype(torch.float32)


def test_strided_and_grad_inputs_and_inference_mode():
    routing = Routing(2)
    x = routing.inputs()[2]

    def body(rank, backend):
        wide = torch.zeros(len(x[rank]), 20)
        wide[:, :9] = x[rank]
        plain = dispatch(backend, v2_spec(routing, rank, expand=True))
        for inference, background in itertools.product((False, True), (False, True)):
            with torch.inference_mode(inference):
                spec = v2_spec(routing, rank, expand=True, x=wide[:, :9])
                got = dispatch(backend, spec, background)
                same(got.recv_x, plain.recv_x, "strided")
                combine(backend, CombineSpec(got.recv_x, got.plan), background)
        y = plain.recv_x.clone().requires_grad_()
        for background in (False, True):
            spec = CombineSpec(y, plain.plan, bias=(torch.zeros(x[rank].shape, requires_grad=True),))
            assert not combine(backend, spec, background).combined_x.requires_grad

    all_ranks(routing, body)


# Order of operations ------------------------------------------------------------------------------------------------


def test_many_outstanding_and_any_order():
    """Dispatch, dispatch, combine, combine crosswise, all in the background; nothing overwrites what was returned."""
    routing = Routing(3)
    x = routing.inputs()[2]

    def body(rank, backend):
        first = backend.prepare(v2_spec(routing, rank, expand=False), background=True)
        backend.dispatch_send(first)
        second = backend.prepare(v2_spec(routing, rank, expand=False, x=2 * x[rank]), background=True)
        backend.dispatch_send(second)
        first.event.wait()
        flights = []
        for flight in (second, first):
            spec = CombineSpec(flight.result.recv_x, flight.result.plan)
            flights.append(backend.prepare_combine(spec, background=True, previous=[second.event]))
            backend.combine_send(flights[-1])
        backend.barrier()
        assert all(f.event.done() for f in flights)
        same(second.result.recv_x, 2 * first.result.recv_x, "rows")
        same(flights[0].result.combined_x, 2 * flights[1].result.combined_x, "combined")
        assert backend.statistics().operations == 5
        assert backend.statistics().rendezvous_with_counts == 2

    all_ranks(routing, body)


def test_the_worker_ends_by_itself_and_comes_back():
    routing = Routing(2)

    def body(rank, backend):
        name = f"deep_ep_py-collective-{rank}"
        for _ in range(2):
            dispatch(backend, v2_spec(routing, rank, expand=False), background=True)
            assert name in [t.name for t in threading.enumerate()]
            end = time.monotonic() + 5
            while name in [t.name for t in threading.enumerate()]:
                assert time.monotonic() < end, "an idle worker would hold up the interpreter's exit"
                time.sleep(0.02)

    all_ranks(routing, body)


# Processes ----------------------------------------------------------------------------------------------------------


def over_gloo(group, routing):
    import torch.distributed as dist

    rank = dist.get_rank(group)
    topk, weights, x, sf = routing.inputs()
    backend = CollectiveBackend(communicator_of(group), SETTINGS)
    for expand in (False, True):
        want = reference.v2_dispatch(
            x,
            topk,
            num_experts=routing.num_experts,
            num_max_tokens_per_rank=M,
            topk_weights=weights,
            sf=sf,
            expert_alignment=routing.alignment,
            do_expand=expand,
        )
        got = dispatch(backend, v2_spec(routing, rank, expand=expand), background=expand)
        same(got.recv_x, want[rank].recv_x, "x")
        y = routing.rows([len(w.recv_x) for w in want])
        back = combine(backend, CombineSpec(y[rank], got.plan, reduce_per_rank=expand), background=expand)
        wanted = reference.v2_combine(
            y, topk, num_experts=routing.num_experts, do_expand=expand, expert_alignment=routing.alignment
        )
        same(back.combined_x, wanted[rank][0], "combined")
    backend.barrier()
    backend.close()


def world_and_subgroup(group):
    import torch.distributed as dist

    over_gloo(group, Routing(3, dtype=torch.float8_e4m3fn, alignment=4))
    if dist.get_rank() > 0:
        sub = dist.new_group([1, 2], use_local_synchronization=True)
        over_gloo(sub, Routing(2, dtype=torch.bfloat16))
    return True


@pytest.mark.processes
def test_gloo_world_and_subgroup():
    assert run_processes(3, world_and_subgroup) == [True] * 3
