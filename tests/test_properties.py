"""Properties: drawn shapes against the oracle, adjointness, permutation of experts, equality across world sizes."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from deep_ep_py import reference
from deep_ep_py.testing import Case, make_inputs, run_threads
from deep_ep_py.testing import conformance_v1 as v1
from deep_ep_py.testing import conformance_v2 as v2
from deep_ep_py.testing.cases import domain_size, order_sensitive, route
from deep_ep_py.testing.compare import assert_same_bits
from deep_ep_py.testing.conformance_v1 import rank_of
from deep_ep_py.testing.conformance_v2 import MODES, Mode

COMPACT, EXPAND, SINGLE = MODES[0], MODES[2], MODES[3]
#: Deterministic: a run draws the same shapes as the run before. The fixture ``backend`` is one value per test.
drawn = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
cases = st.builds(
    Case,
    num_tokens=st.lists(st.integers(0, 20), min_size=1, max_size=4).map(tuple),
    hidden=st.integers(1, 70),
    num_topk=st.integers(1, 10),
    num_experts=st.integers(1, 20),
    routing=st.sampled_from(["distinct", "masked", "duplicates", "one_expert", "none"]),
    dtype=st.sampled_from(
        [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.uint8]
    ),
    sf=st.sampled_from(["", "f32", "i32"]),
    num_scales=st.integers(1, 4),
    gaps=st.sampled_from(["", "elements", "rows"]),
    expert_alignment=st.integers(1, 9),
    seed=st.integers(0, 1000),
)


@drawn
@given(case=cases)
def test_v1_agrees_with_the_oracle(backend, case):
    run_threads(case.num_ranks, v1.check_round_trip, case, backend, (0, 2))


@drawn
@given(case=cases, mode=st.sampled_from(MODES))
def test_v2_agrees_with_the_oracle(backend, case, mode):
    assume(v2.fits(case, mode))
    run_threads(case.num_ranks, v2.check_round_trip, case, mode, backend, (0, 1))


def whole_numbers(shape, seed):
    """float64 whole numbers: sums of products are exact, so that adjointness holds to the bit."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1000, 1000, shape, generator=generator).to(torch.float64)


def inner_products(comm, case, backend, mode):
    """This rank's terms of ``<dispatch(x), g>`` and of ``<x, combine(g)>``."""
    rank = rank_of(comm)
    inputs = make_inputs(case)[rank]
    x = whole_numbers((case.num_tokens[rank], case.hidden), seed=rank)
    if mode is None:
        with v1.open_buffer(comm, backend) as buffer:
            layout = v1.layout_arguments(buffer.get_dispatch_layout(inputs.topk_idx, case.num_experts))
            recv_x, _, _, _, handle, _ = buffer.dispatch(x, **layout)
            g = whole_numbers(recv_x.shape, seed=100 + rank)
            adjoint, _, _ = buffer.combine(g, handle)
    else:
        with v2.open_buffer(comm, backend, multiple=mode.multiple) as buffer:
            arguments = {"num_experts": case.num_experts, "num_max_tokens_per_rank": case.num_max_tokens_per_rank}
            recv_x, _, _, handle, _ = buffer.dispatch(
                x,
                topk_idx=inputs.topk_idx,
                do_expand=mode.expand,
                do_zero_padding=mode.expand,
                expert_alignment=case.expert_alignment,
                **arguments,
            )
            g = whole_numbers(recv_x.shape, seed=100 + rank)
            adjoint, _, _ = buffer.combine(g, handle)
    return float((recv_x * g).sum()), float((x * adjoint).sum())


@pytest.mark.parametrize("mode", [None, COMPACT, EXPAND, SINGLE], ids=lambda m: m.id if m else "v1")
def test_combine_is_the_adjoint_of_dispatch(mode, backend):
    case = Case((19, 0, 30), hidden=48, num_topk=4, num_experts=10, dtype=torch.float64, expert_alignment=4)
    terms = run_threads(case.num_ranks, inner_products, case, backend, mode)
    left, right = (sum(column) for column in zip(*terms, strict=True))
    assert left == right
    assert left != 0


def through_experts(comm, backend, problem, permutation):
    """Dispatch, a fake expert that scales each row, combine. ``permutation[e]``: where expert e is placed.

    Returns this rank's combined rows, and the received block of each expert that it holds, by the expert's own name.
    """
    rank, num_ranks = rank_of(comm), problem["num_ranks"]
    x, topk_idx, scale, num_experts = (problem[k] for k in ("x", "topk_idx", "scale", "num_experts"))
    each = reference.align(len(x), num_ranks) // num_ranks
    mine = slice(rank * each, min((rank + 1) * each, len(x)))
    placed = torch.where(topk_idx >= 0, permutation[topk_idx], -1)[mine]
    name_of = torch.argsort(permutation)
    first = sum(reference.contiguous_placement(num_experts, num_ranks).num_local_experts[:rank])
    with v2.open_buffer(comm, backend, multiple=False) as buffer:
        recv_x, _, _, handle, _ = buffer.dispatch(
            x[mine], topk_idx=placed, num_experts=num_experts, num_max_tokens_per_rank=each, do_expand=True
        )
        counts = handle.num_recv_tokens_per_expert_list
        names = name_of[first : first + len(counts)]
        y = recv_x * scale[names].repeat_interleave(torch.tensor(counts, dtype=torch.int64))[:, None]
        combined, _, _ = buffer.combine(y, handle)
    return combined, dict(zip(names.tolist(), recv_x.split(counts), strict=True))


def make_problem(num_ranks, num_tokens=37, num_topk=6, num_experts=11):
    """One global problem, split over any number of ranks; rows and scales cancel so that a wrong order shows."""
    generator = torch.Generator().manual_seed(5)
    return {
        "num_ranks": num_ranks,
        "num_experts": num_experts,
        "x": torch.randn((num_tokens, 24), generator=generator).round(decimals=1),
        "topk_idx": route("masked", num_tokens, num_topk, num_experts, generator),
        "scale": order_sensitive((num_experts,), torch.float32, generator),
    }


def run_problem(num_ranks, backend, permutation):
    results = run_threads(num_ranks, through_experts, backend, make_problem(num_ranks), permutation)
    blocks = {name: rows for _, of_rank in results for name, rows in of_rank.items()}
    return torch.cat([out for out, _ in results]), blocks


def test_expanded_combine_is_equal_in_every_world(backend):
    identity = torch.arange(11)
    alone, blocks = run_problem(1, backend, identity)
    problem = make_problem(1)
    in_reverse = torch.zeros_like(alone)
    for k in reversed(range(problem["topk_idx"].shape[1])):
        expert = problem["topk_idx"][:, k]
        in_reverse += torch.where(expert[:, None] >= 0, problem["x"] * problem["scale"][expert][:, None], 0.0)
    assert (in_reverse != alone).any(), "the data must show the order"
    for num_ranks in (2, 3, 4):
        combined, others = run_problem(num_ranks, backend, identity)
        assert_same_bits(combined, alone, f"combined_x of {num_ranks} ranks")
        for name, rows in blocks.items():
            assert_same_bits(others[name], rows, f"the rows of expert {name} in a world of {num_ranks}")


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_where_experts_are_placed_changes_nothing(num_ranks, backend):
    plain, blocks = run_problem(num_ranks, backend, torch.arange(11))
    permutation = torch.tensor([7, 3, 9, 0, 10, 1, 5, 2, 8, 4, 6])
    permuted, moved = run_problem(num_ranks, backend, permutation)
    assert_same_bits(permuted, plain, "combined_x")
    assert blocks.keys() == moved.keys() == set(range(11))
    for name, rows in blocks.items():
        assert_same_bits(moved[name], rows, f"the rows of expert {name}")


def special_values(comm, case, backend, mode):
    """Rows of zeros of both signs, subnormals, infinities and NaN, and a bias of -0.0."""
    rank, inputs = rank_of(comm), make_inputs(case)
    tiny = torch.finfo(case.dtype).smallest_normal
    values = [0.0, -0.0, -0.0, -0.0, tiny, -tiny, tiny / 2, -tiny / 4, tiny * 0.75, torch.inf, -torch.inf, torch.nan]
    table = torch.tensor(values, dtype=torch.float64).to(case.dtype)
    likely = torch.tensor([8.0] * 9 + [1.0] * 3)  # NaN and infinities in few elements only
    ys = []
    for r, expected in enumerate(v2.expected_dispatch(case, mode)):
        generator = torch.Generator().manual_seed(r)
        picks = torch.multinomial(likely, len(expected.recv_x) * case.hidden, replacement=True, generator=generator)
        ys.append(table[picks].reshape(-1, case.hidden))
    minus_zero = [(torch.full((t, case.hidden), -0.0, dtype=case.dtype),) for t in case.num_tokens]
    seen = set()
    with v2.open_buffer(comm, backend, multiple=mode.multiple) as buffer:
        handle = v2.dispatch(buffer, case, mode, rank)[3]
        for bias in (None, minus_zero):
            expected = reference.v2_combine(
                ys,
                [i.topk_idx for i in inputs],
                num_experts=case.num_experts,
                do_expand=mode.expand,
                allow_multiple_reduction=mode.multiple,
                bias=bias,
                num_scaleup_ranks=domain_size(buffer),
            )[rank][0]
            out, _, _ = buffer.combine(ys[rank], handle, bias=bias[rank][0] if bias else None)
            assert_same_bits(out, expected, f"combined_x with bias {bias is not None}", any_nan=True)
            zero = expected == 0
            seen |= {"NaN"} if expected.isnan().any() else set()
            seen |= {"subnormal"} if (~zero & (expected.abs() < tiny)).any() else set()
            seen |= {"-0.0"} if (zero & expected.signbit()).any() else set()
    return seen


@pytest.mark.parametrize("mode", [COMPACT, EXPAND, SINGLE], ids=lambda m: m.id)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_special_values(dtype, mode, backend):
    case = Case((40, 41, 42), hidden=100, num_topk=4, num_experts=9, dtype=dtype)
    summed_first = mode == EXPAND or (backend == "hybrid" and mode.multiple)
    for seen in run_threads(case.num_ranks, special_values, case, backend, mode):
        # Sums of a rank or a domain start at +0.0, so that only a token sent nowhere keeps a bias of -0.0 where these
        # are made first.
        assert seen >= {"NaN", "subnormal"} | (set() if summed_first else {"-0.0"}), "the data must reach these"


def in_place_rows(comm, case, backend, mode):
    """``recv_x`` itself handed to combine, and overwritten as soon as combine returns: no peer may still read it."""
    rank = rank_of(comm)
    expected = v2.expected_dispatch(case, mode)
    topk_idx = [i.topk_idx for i in make_inputs(case)]
    options = {"num_experts": case.num_experts, "do_expand": mode.expand}
    with v2.open_buffer(comm, backend) as buffer:
        options["num_scaleup_ranks"] = domain_size(buffer)
        wanted = reference.v2_combine([e.recv_x for e in expected], topk_idx, **options)[rank][0]
        for _ in range(6):
            recv_x, _, _, handle, _ = v2.dispatch(buffer, case, mode, rank)
            out, _, _ = buffer.combine(recv_x, handle)
            recv_x.fill_(99.0)
            assert_same_bits(out, wanted, "combined_x", any_nan=True)


@pytest.mark.parametrize("mode", [COMPACT, EXPAND, Mode(sync=False)], ids=lambda m: m.id)
def test_in_place_rows_may_be_overwritten(mode, backend):
    case = Case((200, 100, 300), hidden=512, num_topk=4, dtype=torch.float32)
    run_threads(case.num_ranks, in_place_rows, case, backend, mode)
