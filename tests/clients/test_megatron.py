"""Megatron-Core runs on this library: its fused functions, and a MoELayer against its own allgather dispatcher."""

from __future__ import annotations

from itertools import product

import pytest
from ranks import LEAVING, check_and_leave, need

# The frameworks alone take half a minute to import where cores are busy.
pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300), *need("megatron", "triton", "einops")]

FUSED = ["-".join(names) for names in product(("full", "dropped", "empty"), ("float32", "bfloat16"), ("sync", "async"))]
# Both layers compute in float32, on the same rows in the same order; only the sum over a token's three experts, and
# that of its gradients, is taken in another order: 2 roundings of 2**-24 each, more where terms cancel. Seen: 6e-8.
# A token with one wrong row gives 1e-1 and more.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    return check_and_leave("megatron_checks", tmp_path_factory.mktemp("megatron"), ("stay", "destroy"))


@pytest.fixture(scope="module")
def worlds(played):
    return played[0]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_fused_dispatch_and_combine_equal_the_dense_layer(worlds, num_ranks):
    for name in FUSED:
        figures = [rank[name] for rank in worlds[num_ranks]]
        for rank, figure in enumerate(figures):
            wrong = {key: figure[key] for key in ("output", "grad of x", "grad of weights", "counts") if figure[key]}
            assert not wrong, f"{name}, rank {rank}: elements that differ: {wrong}"
            assert figure["dtype"] == f"torch.{name.split('-')[1]}"
        if name.startswith("empty"):
            assert figures[-1]["tokens"] == figures[0]["rows"] == 0, name
        else:
            assert all(figure["tokens"] and figure["rows"] for figure in figures), name


@pytest.mark.parametrize("num_ranks", [3, 4])
def test_rows_are_added_in_rank_order(worlds, num_ranks):
    # 2**24 + 1 rounds to 2**24, so nothing is left of the first 1; the second comes after the cancellation.
    expected = 0.0 if num_ranks == 3 else 1.0
    assert [rank["order"] for rank in worlds[num_ranks]] == [[expected] * 2] * num_ranks


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_moe_layer_agrees_with_the_allgather_dispatcher(worlds, num_ranks):
    for rank in worlds[num_ranks]:
        layer = rank["layer"]
        assert layer["dispatchers"] == ["MoEFlexTokenDispatcher", "MoEAllGatherTokenDispatcher"]
        errors = {name: layer[name] for name in layer if name.startswith(("output", "grad of"))}
        assert len(errors) == 4 and len(layer["grads"]) == 9  # the router, and two weights of four experts
        assert max(*errors.values(), *layer["grads"].values()) < TOLERANCE, layer


def test_leaves_cleanly_with_its_buffer_in_a_global(played):
    """That statuses are 0 and stderr is empty was asserted on the way here, for all worlds."""
    assert played[1] == [[True, True]] * LEAVING
