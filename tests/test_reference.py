"""The oracle against a second, scalar implementation, and proof that the data of order tests shows a wrong order."""

import numpy as np
import pytest
import torch

from deep_ep_py import reference
from deep_ep_py.testing import Case, make_inputs, make_rows
from deep_ep_py.testing.cases import make_weights
from deep_ep_py.testing.compare import assert_same_bits

CASES = (
    Case((5,), hidden=3, num_topk=3, num_experts=5),
    Case((6, 4), hidden=5, num_topk=4, num_experts=7, expert_alignment=4),
    Case((5, 0, 7), hidden=4, num_topk=5, num_experts=8, routing="duplicates", dtype=torch.float32),
    Case(
        (3, 6, 2, 5), hidden=2, num_topk=6, num_experts=10, dtype=torch.float16, expert_alignment=3, routing="distinct"
    ),
    Case((4, 3, 2, 1), hidden=2, num_topk=2, num_experts=2, dtype=torch.float64),
    Case((2, 3), hidden=2, routing="none"),
    Case((0, 0), hidden=2),
    Case((5, 4), hidden=3, routing="one_expert", gaps="elements"),
)

# The second implementation: shares no code with the oracle, one Python scalar at a time ------------------------------


def owner_and_local(expert, num_experts, num_ranks):
    """(rank, local id): walk the experts, filling ranks one after the other."""
    rank, used = 0, 0
    for e in range(num_experts):
        size = num_experts // num_ranks + (1 if rank < num_experts % num_ranks else 0)
        while used == size:
            rank, used = rank + 1, 0
            size = num_experts // num_ranks + (1 if rank < num_experts % num_ranks else 0)
        if e == expert:
            return rank, used
        used += 1
    raise AssertionError(expert)


def compact_places(topk_idx, num_experts):
    """Per destination rank, the list of (source rank, token) in row order."""
    num_ranks = len(topk_idx)
    rows = []
    for dst in range(num_ranks):
        here = []
        for src in range(num_ranks):
            for token, slots in enumerate(topk_idx[src]):
                if any(e >= 0 and owner_and_local(e, num_experts, num_ranks)[0] == dst for e in slots):
                    here.append((src, token))
        rows.append(here)
    return rows


def expanded_places(topk_idx, num_experts, alignment):
    """Per destination rank, (source rank, token, slot) per row, None in gaps; and the exact counts per local expert."""
    num_ranks = len(topk_idx)
    rows, counts = [[] for _ in range(num_ranks)], [[] for _ in range(num_ranks)]
    for expert in range(num_experts):
        dst, _ = owner_and_local(expert, num_experts, num_ranks)
        block = [
            (src, token, slot)
            for src in range(num_ranks)
            for token, slots in enumerate(topk_idx[src])
            for slot, e in enumerate(slots)
            if e == expert
        ]
        counts[dst].append(len(block))
        while len(block) % alignment:
            block.append(None)
        rows[dst] += block
    return rows, counts


def round_to(value, dtype):
    """A float accumulator's value in ``dtype``, as a Python float."""
    if dtype == torch.bfloat16:
        if np.isnan(value):
            return float("nan")
        word = int(np.float32(value).view(np.uint32))
        kept, dropped = word >> 16, word & 0xFFFF
        kept += dropped > 0x8000 or (dropped == 0x8000 and kept & 1)
        return float(np.uint32(kept << 16).view(np.float32))
    with np.errstate(over="ignore"):
        return float({torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}[dtype](value))


def add_up(values, dtype, biases=()):
    """One element: ``values`` (floats) in order, in the accumulator's type; rounded once."""
    kind = np.float64 if dtype == torch.float64 else np.float32
    with np.errstate(all="ignore"):
        acc = kind(0.0)
        if len(biases) == 1:
            acc = kind(biases[0])
        elif len(biases) == 2:
            acc = kind(biases[0]) + kind(biases[1])
        for value in values:
            acc = acc + kind(value)
    return round_to(acc, dtype)


# Comparison ----------------------------------------------------------------------------------------------------------

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)


def lists(case):
    return [i.topk_idx.tolist() for i in make_inputs(case)]


def pick(tensors, places):
    """Rows ``tensors[source][token]`` stacked; zeros for None."""
    like = tensors[0].new_zeros(tensors[0].shape[1:])
    return torch.stack([like if p is None else tensors[p[0]][p[1]] for p in places] or [like])[: len(places)]


def place_of(expert, case):
    return owner_and_local(expert, case.num_experts, case.num_ranks)


def local_ids(slots, rank, case):
    return [place_of(e, case)[1] if e >= 0 and place_of(e, case)[0] == rank else -1 for e in slots]


def align_up(n, a):
    while n % a:
        n += 1
    return n


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(7, 2), (8, 2), (2, 4), (10, 4), (1, 1), (9, 4)])
def test_placement(num_experts, num_ranks):
    placement = reference.contiguous_placement(num_experts, num_ranks)
    pairs = list(zip(placement.owner.tolist()[:-1], placement.local_id.tolist()[:-1], strict=True))
    assert pairs == [owner_and_local(e, num_experts, num_ranks) for e in range(num_experts)]
    assert placement.num_local_experts == tuple(sum(p[0] == r for p in pairs) for r in range(num_ranks))


@all_cases
def test_v1_dispatch(case):
    inputs, topk, ranks = make_inputs(case), lists(case), range(case.num_ranks)
    layout = [reference.v1_layout(i.topk_idx, case.num_experts, case.num_ranks) for i in inputs]
    rows = compact_places(topk, case.num_experts)
    for s in ranks:
        sent = [[(s, t) in rows[r] for r in ranks] for t in range(case.num_tokens[s])]
        assert layout[s].is_token_in_rank.tolist() == sent
        assert layout[s].num_tokens_per_rank.tolist() == [sum(p[0] == s for p in rows[r]) for r in ranks]
        flat = [e for slots in topk[s] for e in slots]
        assert layout[s].num_tokens_per_expert.tolist() == [flat.count(e) for e in range(case.num_experts)]
    spare = sum(case.num_tokens) + 2
    for worst in (0, spare):
        received = reference.v1_dispatch(
            [i.x for i in inputs],
            [one.is_token_in_rank for one in layout],
            [one.num_tokens_per_expert for one in layout],
            topk_idx=[i.topk_idx for i in inputs],
            topk_weights=[i.topk_weights for i in inputs],
            expert_alignment=case.expert_alignment,
            num_worst_tokens=worst,
        )
        for r in ranks:
            got, n = received[r], len(rows[r])
            tail = [] if not worst else [-1] * (worst - n)
            assert_same_bits(got.recv_x[:n], pick([i.x for i in inputs], rows[r]), "recv_x")
            assert len(got.recv_x) == n + len(tail)
            ids = [local_ids(topk[s][t], r, case) for s, t in rows[r]]
            assert got.recv_topk_idx.tolist() == ids + [[-1] * case.num_topk for _ in tail]
            weights = [
                [float(inputs[s].topk_weights[t, k]) if ids[i][k] >= 0 else 0.0 for k in range(case.num_topk)]
                for i, (s, t) in enumerate(rows[r])
            ]
            assert got.recv_topk_weights[:n].tolist() == weights
            assert got.recv_src_idx.tolist() == [t for _, t in rows[r]] + tail
            prefix = [[sum(p[0] <= s for p in rows[q]) for q in ranks] for s in ranks]
            assert got.rank_prefix_matrix.tolist() == prefix
            heads = [[[p[1] for p in rows[q] if p[0] == r].index(t) if (r, t) in rows[q] else -1 for q in ranks]
                     for t in range(case.num_tokens[r])]  # fmt: skip
            assert got.send_head.tolist() == heads
            mine = [e for e in range(case.num_experts) if place_of(e, case)[0] == r]
            counts = [align_up(sum(slots.count(e) for t in topk for slots in t), case.expert_alignment) for e in mine]
            assert got.num_recv_tokens_per_expert_list == ([] if worst else counts)


@all_cases
@pytest.mark.parametrize("expand", [False, True])
def test_v2_dispatch(case, expand):
    inputs, topk, a, m = make_inputs(case), lists(case), case.expert_alignment, case.num_max_tokens_per_rank
    compact = compact_places(topk, case.num_experts)
    slots, counts = expanded_places(topk, case.num_experts, a)
    for sync in (True, False):
        received = reference.v2_dispatch(
            [i.x for i in inputs],
            [i.topk_idx for i in inputs],
            num_experts=case.num_experts,
            num_max_tokens_per_rank=m,
            topk_weights=[i.topk_weights for i in inputs],
            expert_alignment=a,
            do_expand=expand,
            do_cpu_sync=sync,
        )
        for r in range(case.num_ranks):
            got, rows = received[r], slots[r] if expand else compact[r]
            local = len(counts[r])
            worst = (case.num_ranks * m, align_up(case.num_ranks * m * min(case.num_topk, local) + (a - 1) * local, a))
            exact = (len(compact[r]), len(slots[r]))
            assert (got.num_recv_tokens, got.num_expanded_tokens) == (exact if sync else worst)
            assert len(got.recv_x) == (exact if sync else worst)[expand]
            assert_same_bits(got.recv_x[: len(rows)], pick([i.x for i in inputs], rows), "recv_x")
            valid = [p is not None for p in rows]
            assert got.row_valid.tolist() == valid + [False] * (len(got.recv_x) - len(rows))
            if expand:
                assert got.recv_topk_idx is None
                weights = [0.0 if p is None else float(inputs[p[0]].topk_weights[p[1], p[2]]) for p in rows]
            else:
                ids = [local_ids(topk[s][t], r, case) for s, t in rows]
                assert got.recv_topk_idx[: len(rows)].tolist() == ids
                weights = [inputs[s].topk_weights[t].tolist() for s, t in rows]
            assert got.recv_topk_weights[: len(rows)].tolist() == weights
            aligned = [align_up(c, a) for c in counts[r]]
            assert got.num_recv_tokens_per_expert_list == (aligned if sync else [])
            assert got.num_unaligned_recv_tokens_per_expert.tolist() == counts[r]
            upto = [sum(aligned[:i]) + (counts[r][i] if expand else aligned[i]) for i in range(local)]
            assert got.psum_num_recv_tokens_per_expert.tolist() == upto
            by_source = [sum(p[0] <= s for p in compact[r]) for s in range(case.num_ranks)]
            assert got.psum_num_recv_tokens_per_scaleup_rank.tolist() == by_source
            metadata = [
                [s * m + t] + [slots[r].index((s, t, k)) if expand and (s, t, k) in slots[r] else -1
                               for k in range(case.num_topk)]
                for s, t in compact[r]
            ]  # fmt: skip
            assert got.recv_src_metadata[:, [0, *range(2, 2 + case.num_topk)]].tolist() == metadata
            wanted = [[-1] * case.num_topk for _ in topk[r]]
            for dst in range(case.num_ranks):
                for i, t in enumerate(p[1] for p in compact[dst] if p[0] == r):
                    last = max(k for k, e in enumerate(topk[r][t]) if e >= 0 and place_of(e, case)[0] == dst)
                    wanted[t][last] = dst * m + i
            assert got.dst_buffer_slot_idx.tolist() == wanted


def scalar_combine(case, kind, ys, num_bias):
    """[T, H] per rank, one element at a time. ``kind``: v1, compact, grouped or single."""
    inputs, topk, dtype = make_inputs(case), lists(case), case.row_dtype
    compact = compact_places(topk, case.num_experts)
    slots, _ = expanded_places(topk, case.num_experts, case.expert_alignment)
    values = [y.double().numpy() for y in ys]
    biases = [[b.double().numpy() for b in i.bias[:num_bias]] for i in inputs]
    combined = []
    for s in range(case.num_ranks):
        out = np.zeros((case.num_tokens[s], case.hidden))
        for t, experts in enumerate(topk[s]):
            owners = [place_of(e, case)[0] if e >= 0 else None for e in experts]
            in_slot_order = []  # ranks, each at its last slot
            for k, owner in enumerate(owners):
                if owner is not None and owner not in owners[k + 1 :]:
                    in_slot_order.append(owner)
            for h in range(case.hidden):
                if kind == "v1":
                    parts = [values[r][compact[r].index((s, t))][h] for r in sorted(in_slot_order)]
                elif kind == "compact":
                    parts = [values[r][compact[r].index((s, t))][h] for r in in_slot_order]
                else:
                    each = {k: values[r][slots[r].index((s, t, k))][h] for k, r in enumerate(owners) if r is not None}
                    parts = list(each.values())
                    if kind == "grouped":
                        groups = [[each[k] for k in each if owners[k] == r] for r in in_slot_order]
                        parts = [add_up(group, dtype) for group in groups]
                out[t, h] = add_up(parts, dtype, [b[t, h] for b in biases[s]])
        combined.append(torch.from_numpy(out).to(dtype))
    return combined


def oracle(case, kind, ys, num_bias, topk_idx=None):
    inputs = make_inputs(case)
    topk_idx = topk_idx or [i.topk_idx for i in inputs]
    bias = [i.bias[:num_bias] for i in inputs]
    if kind == "v1":
        in_rank = [reference.v1_layout(t, case.num_experts, case.num_ranks).is_token_in_rank for t in topk_idx]
        return [out for out, _ in reference.v1_combine(ys, in_rank, bias=bias)]
    options = {"do_expand": kind != "compact", "allow_multiple_reduction": kind == "grouped"}
    combined = reference.v2_combine(
        ys, topk_idx, num_experts=case.num_experts, expert_alignment=case.expert_alignment, bias=bias, **options
    )
    return [out for out, _ in combined]


def rows_for(case, kind):
    topk = lists(case)
    if kind in ("v1", "compact"):
        counts = [len(rows) for rows in compact_places(topk, case.num_experts)]
    else:
        counts = [len(rows) for rows in expanded_places(topk, case.num_experts, case.expert_alignment)[0]]
    return [make_rows(case, r, n) for r, n in enumerate(counts)]


@all_cases
@pytest.mark.parametrize("kind", ["v1", "compact", "grouped", "single"])
def test_combine(case, kind):
    ys = rows_for(case, kind)
    for num_bias in (0, 1, 2):
        got, wanted = oracle(case, kind, ys, num_bias), scalar_combine(case, kind, ys, num_bias)
        for r in range(case.num_ranks):
            assert_same_bits(got[r], wanted[r], f"rank {r}, {num_bias} biases")


@pytest.mark.parametrize("expand", [False, True])
@all_cases
def test_weights(case, expand):
    """V1: every column summed over ranks. V2: slot k from its owner."""
    inputs, topk = make_inputs(case), lists(case)
    compact = compact_places(topk, case.num_experts)
    slots, _ = expanded_places(topk, case.num_experts, case.expert_alignment)
    shapes = [(len(s),) if expand else (len(c), case.num_topk) for s, c in zip(slots, compact, strict=True)]
    given = [make_weights(case, r, shape) for r, shape in enumerate(shapes)]
    rows = rows_for(case, "single" if expand else "compact")
    options = {"num_experts": case.num_experts, "expert_alignment": case.expert_alignment, "do_expand": expand}
    v2 = reference.v2_combine(rows, [i.topk_idx for i in inputs], topk_weights=given, **options)
    in_rank = [reference.v1_layout(i.topk_idx, case.num_experts, case.num_ranks).is_token_in_rank for i in inputs]
    v1 = None if expand else reference.v1_combine(rows, in_rank, topk_weights=given)
    for s in range(case.num_ranks):
        for t, experts in enumerate(topk[s]):
            for k, e in enumerate(experts):
                r = place_of(e, case)[0] if e >= 0 else None
                at = None if r is None else slots[r].index((s, t, k)) if expand else (compact[r].index((s, t)), k)
                assert float(v2[s][1][t, k]) == (0.0 if r is None else float(given[r][at]))
                if v1 is not None:
                    parts = [
                        float(given[r][compact[r].index((s, t)), k]) for r in range(len(topk)) if (s, t) in compact[r]
                    ]
                    assert float(v1[s][1][t, k]) == add_up(parts, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["v1", "compact", "grouped", "single"])
def test_the_data_shows_a_wrong_order(dtype, kind):
    """Contributions in the reverse order, and another recipe, give other bits on what the order tests are fed."""
    case = Case((14, 15, 16), hidden=33, dtype=dtype, routing="distinct")
    ys, inputs = rows_for(case, kind), make_inputs(case)
    placement = reference.contiguous_placement(case.num_experts, case.num_ranks)
    in_rank = [reference.tokens_in_ranks(i.topk_idx, placement) for i in inputs]
    by_token, owner = reference.compact_rows(in_rank)[0], placement.owner[inputs[0].topk_idx]
    by_slot = reference.expanded_rows([i.topk_idx for i in inputs], placement, 1)[0][0]
    recipes = {
        "v1": reference.contributions(ys, torch.where(by_token >= 0, torch.arange(case.num_ranks), -1), by_token),
        "compact": reference.v2_contributions(ys, owner, by_token),
    }
    if kind in ("grouped", "single"):
        recipes = {
            "grouped": reference.v2_grouped_contributions(ys, owner, by_slot),
            "single": reference.contributions(ys, owner, by_slot),
        }
    right = oracle(case, kind, ys, 0)[0]
    other = {"v1": "compact", "compact": "v1", "grouped": "single", "single": "grouped"}[kind]
    for wrong in (recipes[kind][::-1], recipes[other]):
        out = reference.reduce_rows(wrong, case.num_tokens[0], case.hidden, dtype)
        assert (out != right).sum() > 2
    assert_same_bits(reference.reduce_rows(recipes[kind], case.num_tokens[0], case.hidden, dtype), right, "as given")
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    twice = torch.zeros(right.shape, dtype=accumulator)
    for tokens, source, rows in recipes[kind]:  # rounding after every addition is a wrong accumulator
        twice[tokens] = (twice[tokens] + source[rows].to(accumulator)).to(dtype).to(accumulator)
    if accumulator != dtype:
        assert (twice.to(dtype) != right).any()
