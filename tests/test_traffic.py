"""The byte ledger: against what channels were really handed, and against numbers worked out by hand."""

from collections import Counter

import pytest
import torch
from traffic_world import WORLDS, Watch, World, run_ops, run_v1, run_v2

from deep_ep_py import ElasticBuffer
from deep_ep_py.testing import Case, make_inputs, run_threads
from deep_ep_py.traffic import RECORD_BYTES, Link

BF16 = Case((9, 0, 7, 5, 4, 6), hidden=24, num_topk=4, num_experts=13, routing="masked", expert_alignment=4)
FP8 = Case((6, 7, 8, 9, 0, 5), hidden=40, num_topk=3, num_experts=8, dtype=torch.float8_e4m3fn, sf="f32", num_scales=2)
DUPLICATES = Case((5, 6, 7, 8, 4, 3), hidden=16, num_topk=6, num_experts=7, routing="duplicates")
NONE = Case((3, 4, 0, 2, 1, 2), hidden=16, num_topk=2, num_experts=6, routing="none")
CASES = (BF16, FP8, DUPLICATES, NONE)


def ids(value):
    return value.id


def of_world(case, world):
    """The case, for as many ranks as the world has."""
    return Case(**{**vars(case), "num_tokens": case.num_tokens[: world.num_ranks]})


def check_channel(world, ranks):
    """Every byte of a ledger that a channel carries, and no other, was handed to the channel."""
    for op in ("dispatch", "cached", "combine"):
        expected, handed = Counter(), Counter()
        for rank, found in enumerate(ranks):
            ledger, sent = found[op]
            for link in ledger.links:
                if world.backend == "collective" or link.kind == "wire":
                    expected[link.source, link.destination] += link.bytes
            handed.update({(rank, peer): n for peer, n in sent.items() if n})
            if (world.backend, op) != ("collective", "combine"):  # there, holders send what others have asked for
                mine = {link.destination: link.bytes for link in ledger.links if link.source == rank}
                assert all(n == mine[peer] for peer, n in sent.items() if n)
        assert handed == expected, op
        if world.num_ranks > 1 and world.backend != "shm" and len(world.domains) > 1:
            assert sum(handed.values()) > 0


def check_form(world, ranks):
    """Sorted links that are not empty, kinds as the domains say."""
    domain_of = {r: d for d, ranks in enumerate(world.members) for r in ranks}
    for rank, found in enumerate(ranks):
        for op, (ledger, _) in found.items():
            assert (ledger.rank, ledger.backend) == (rank, world.backend)
            assert ledger.op == ("combine" if op == "combine" else "dispatch")
            assert list(ledger.links) == sorted(ledger.links)
            assert len({(link.source, link.destination) for link in ledger.links}) == len(ledger.links)
            for link in ledger.links:
                assert link.bytes > 0
                assert rank in (link.source, link.destination)
                same = domain_of[link.source] == domain_of[link.destination]
                kind = "local" if link.source == link.destination else "domain" if same else "wire"
                assert link.kind == kind
            by_kind = {kind: ledger.total(kind) for kind in ("local", "domain", "wire")}
            assert ledger.total() == sum(by_kind.values()) == sum(link.bytes for link in ledger.links)


@pytest.mark.parametrize("multiple", [True, False], ids=["multiple", "single"])
@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("world", WORLDS, ids=ids)
def test_v2_is_what_the_channel_was_handed(world, case, multiple):
    for ranks in run_v2(world, of_world(case, world), multiple=multiple).values():
        check_form(world, ranks)
        check_channel(world, ranks)


@pytest.mark.parametrize("with_topk", [True, False], ids=["topk", "rows"])
@pytest.mark.parametrize("case", [BF16, FP8], ids=ids)
@pytest.mark.parametrize("world", WORLDS, ids=ids)
def test_v1_is_what_the_channel_was_handed(world, case, with_topk):
    ranks = run_v1(world, of_world(case, world), with_topk)
    check_form(world, ranks)
    check_channel(world, ranks)


@pytest.mark.parametrize("world", WORLDS, ids=ids)
def test_ops_are_what_the_channel_was_handed(world):
    ranks = run_ops(world, of_world(BF16, world))
    check_form(world, ranks)
    check_channel(world, ranks)
    assert all(link.rows == 0 for found in ranks for link in found["dispatch"][0].links)


def test_v1_inside_one_domain_is_its_closed_form():
    world = World((3,), "shm")
    case = of_world(FP8, world)
    ranks = run_v1(world, case, with_topk=True)
    row, ids_and_index, weights = 40 + 2 * 4, 4 + 8 * 3, 4 * 3
    combined_row = 2 * 40
    owner = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, -1])  # of 8 experts, and of none
    for source, mine in enumerate(make_inputs(case)):
        to = [int((owner[mine.topk_idx] == r).any(1).sum()) for r in range(3)]
        kinds = ["local" if r == source else "domain" for r in range(3)]
        expected = {
            "dispatch": [
                Link(source, r, kinds[r], n * row, n * (ids_and_index + weights), 0) for r, n in enumerate(to)
            ],
            "cached": [Link(source, r, kinds[r], n * row, 0, 0) for r, n in enumerate(to)],
            "combine": [Link(r, source, kinds[r], n * combined_row, n * weights, 0) for r, n in enumerate(to)],
        }
        assert sum(to) > 0
        for op, links in expected.items():
            assert list(ranks[source][op][0].links) == [link for link in links if link.bytes], op


def worked_out(comm, world, multiple):
    """One expert a rank, top-2, rows of 40 bytes, weights; rank 0 has two tokens, rank 2 none."""
    routing = ([[0, 2], [2, 3]], [[1, 0]], [], [[0, -1]])
    topk_idx = torch.tensor(routing[comm.rank], dtype=torch.int64).view(-1, 2)
    x, weights = torch.zeros((len(topk_idx), 10)), torch.ones(topk_idx.shape)
    buffer = ElasticBuffer(comm, allow_multiple_reduction=multiple, settings=world.settings(comm.rank))
    watch = Watch(buffer)
    assert buffer.last_traffic() is None
    try:
        recv_x, _, recv_weights, handle, _ = buffer.dispatch(x, topk_idx, weights, num_experts=4)
        dispatched = watch.last()[0].links
        buffer.combine(recv_x, handle, topk_weights=recv_weights)
        return dispatched, watch.last()[0].links
    finally:
        buffer.destroy()


@pytest.mark.parametrize("multiple", [True, False], ids=["multiple", "single"])
def test_two_hops_worked_out_by_hand(multiple):
    # A header is token, 2 ids, 2 weights of 4 bytes; beside a row lie its token (4), 2 ids of 8 and 2 weights of 4.
    told = RECORD_BYTES + 8 * (4 + 2 + 4)
    dispatches = (
        (Link(0, 0, "local", 40, 28, 0), Link(0, 2, "wire", 80, 40, told)),
        (Link(1, 0, "domain", 80, 56, 0), Link(1, 1, "local", 40, 28, 0), Link(1, 3, "wire", 0, 0, told)),
        (Link(2, 0, "wire", 0, 0, told), Link(2, 2, "local", 80, 56, 0), Link(2, 3, "domain", 40, 28, 0)),
        (Link(3, 1, "wire", 40, 20, told),),
    )
    # Rank 2 returns two sums of tokens to rank 0, or else their three rows.
    returned = 80 if multiple else 120
    combines = (
        (Link(0, 0, "local", 40, 4, 0), Link(0, 2, "wire", 0, 0, RECORD_BYTES)),
        (Link(0, 1, "domain", 80, 8, 0), Link(1, 1, "local", 40, 4, 0), Link(1, 3, "wire", 40, 8, RECORD_BYTES)),
        (
            Link(2, 0, "wire", returned, 16, RECORD_BYTES),
            Link(2, 2, "local", 80, 8, 0),
            Link(3, 2, "domain", 40, 4, 0),
        ),
        (Link(3, 1, "wire", 0, 0, RECORD_BYTES),),
    )
    found = run_threads(4, worked_out, World((2, 2), "hybrid"), multiple)
    assert [links for links, _ in found] == list(dispatches)
    assert [links for _, links in found] == list(combines)
