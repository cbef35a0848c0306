"""torchtitan runs on this library: its functions and its dispatcher class, training and inference."""

from __future__ import annotations

from itertools import product

import pytest
from ranks import LEAVING, check_and_leave, need

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.timeout(300),  # the framework alone takes half a minute to import where cores are busy
    *need("torchtitan", "spmd_types", "tyro"),
]

CHECKS = ["-".join(n) for n in product(("functions", "class"), ("full", "dropped", "empty"), ("float32", "bfloat16"))]
MUST_BE_ZERO = ("training", "inference", "grad of x", "grad of weights", "counts", "kept handles")


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    return check_and_leave(
        "torchtitan_checks", tmp_path_factory.mktemp("torchtitan"), ("stay", "destroy", "unfinished")
    )


@pytest.fixture(scope="module")
def worlds(played):
    return played[0]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_equals_the_dense_layer(worlds, num_ranks):
    for name in CHECKS:
        figures = [rank[name] for rank in worlds[num_ranks]]
        for rank, figure in enumerate(figures):
            wrong = {key: figure[key] for key in MUST_BE_ZERO if figure.get(key)}
            assert not wrong, f"{name}, rank {rank}: elements that differ: {wrong}"
            assert figure["dtype"] == f"torch.{name.split('-')[2]}"
        if name.startswith("functions-empty"):
            assert figures[-1]["tokens"] == figures[0]["rows"] == 0, name
        else:
            assert all(figure["tokens"] for figure in figures), name


def test_leaves_cleanly_with_its_buffer_in_a_global(played):
    """That statuses are 0 and stderr is empty was asserted on the way here, for all worlds."""
    assert played[1] == [[True, True]] * LEAVING
