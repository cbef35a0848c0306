"""Buffers across hosts of a test network: right results at every shape, a host that is cut off, bytes on the wire."""

from __future__ import annotations

import importlib.util

import launch
import pytest
import scenes
from network import Network, unavailable

from deep_ep_py.testing import conformance_v1

BACKENDS = ("collective", "hybrid")  # that cross hosts; a backend joins here

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(unavailable() != "", reason=unavailable()),
    pytest.mark.processes,
    pytest.mark.timeout(120),
]

START_SECONDS = 60.0  # until every rank is under way: imports of torch on a busy machine
TIMEOUT_SECONDS = 3.0  # of the buffers that meet a cut
GRACE_SECONDS = 6.0  # a rank that has not raised so long after its deadline hangs


@pytest.fixture(scope="module")
def network():
    """Four hosts for every test; a test that takes one with other links makes its own."""
    with Network(4) as network:
        yield network


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def check_conformance(world):
    with world:
        values = world.values(START_SECONDS)
    assert {v["checks"] for v in values} == {5}
    for host, ranks in enumerate(world.ranks_of):
        assert {values[r]["domain"] for r in ranks} == {values[r]["hostname"] for r in ranks} == {f"host{host}"}


@pytest.mark.parametrize("ranks_by_host", [(2, 2), (4, 4), (2, 2, 2), (1, 1, 1, 1)], ids=str)
def test_conformance(network, ranks_by_host, backend):
    check_conformance(launch.forked(network, ranks_by_host, "conform", backend=backend))


@pytest.mark.slow
def test_conformance_under_torchrun_on_uneven_hosts(network):
    """Rails do not match: rows go straight to their ranks, and the buffer says why."""
    with launch.torchrun(network, (3, 1), "conform", backend="auto") as world:
        values = world.values(START_SECONDS)
    for value in values:
        assert (value["checks"], value["backend"], value["domains"]) == (5, "collective", [[0, 1, 2], [3]])
        assert "different sizes" in value["refused"]["hybrid"]


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.skipif(launch.mpirun_program() is None, reason="no mpirun")
@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="no mpi4py")
def test_conformance_under_mpirun(network, backend):
    before = [network.counters(host) for host in network.hosts]
    check_conformance(launch.mpirun(network, (2, 2), "conform", backend=backend))
    sent = [network.counters(host).since(then).tx_bytes for host, then in zip(network.hosts, before, strict=True)]
    # MPI may take ranks of "other" hosts for neighbours, and carry their rows through memory.
    assert min(sent[:2]) > 20 * max(1, *sent[2:])
    assert min(sent[:2]) > 100_000


def cut_off(ranks_by_host, host, backend, awaited=None):
    """Cut a host off in the middle of dispatches; the world's ranks by host, and what each (awaited) rank raised."""
    arguments = {"backend": backend, "timeout_seconds": TIMEOUT_SECONDS}
    with (
        Network(len(ranks_by_host), rate="250mbit") as network,  # most of a dispatch is on the wire then
        launch.forked(network, ranks_by_host, "dispatch_until_error", **arguments) as world,
    ):
        world.wait_for("looping", START_SECONDS)
        network.cut(host)
        results = world.results(TIMEOUT_SECONDS + GRACE_SECONDS, awaited)
        assert all("value" in r for r in results.values()), results
        return world.ranks_of, {rank: r["value"] for rank, r in results.items()}


def check_raised(errors, ranks, lost, waited_for=None):
    """Each of ``ranks`` raised, and named some of ``lost`` (empty: it cannot know), or only others that it
    ``waited_for`` and whose own errors lead to them: it may have all that the lost ranks sent for its oldest transfer,
    and wait for a rank that does not."""
    for rank in ranks:
        assert rank in errors, f"rank {rank} hangs"
        assert errors[rank]["type"] in ("EPTimeoutError", "EPPeerError"), errors[rank]
        named = set(errors[rank]["ranks"])
        assert named <= set(waited_for or lost), errors[rank]
        assert not lost or leads_to(errors, rank, set(lost)), errors
        assert errors[rank]["op"] == "dispatch", errors[rank]


def leads_to(errors, rank, lost):
    """Whether ``rank`` named one of ``lost``, or a rank that did, and so on."""
    seen, ahead = set(), {rank}
    while ahead:
        seen |= ahead
        named = {other for r in ahead if r in errors for other in errors[r]["ranks"]}
        if named & lost:
            return True
        ahead = named - seen
    return False


def test_survivors_name_the_ranks_of_a_host_that_is_cut_off(backend):
    ranks_of, errors = cut_off((2, 2), 1, backend, awaited=(0, 1))
    check_raised(errors, ranks_of[0], ranks_of[1])


@pytest.mark.parametrize("host", [0, 1])
def test_every_rank_raises_when_a_host_is_cut_off(host, backend):
    """Host 0 keeps torch's store. Two hops know of each peer what is missing (of the others too, where these are stuck
    behind the host that is gone); the flat exchange has to ask the store."""
    ranks_of, errors = cut_off((2, 2, 2) if backend == "hybrid" else (1, 1, 1), host, backend)
    inside = ranks_of[host]
    outside = [rank for ranks in ranks_of for rank in ranks if rank not in inside]
    everyone = inside + outside
    flat = backend == "collective"
    check_raised(errors, outside, [] if flat and host == 0 else inside, everyone)
    check_raised(errors, inside, [] if flat else outside, everyone)


def test_interfaces_count_what_was_sent(network, backend):
    ranks_by_host = (2, 2, 2) if backend == "hybrid" else (2, 1, 2)
    with launch.forked(network, ranks_by_host, "dispatch_at_gates", backend=backend) as world:
        world.wait_for("before", START_SECONDS)
        before = [network.counters(host) for host in network.hosts]
        world.open("before")
        world.wait_for("after", START_SECONDS)
        passed = [network.counters(host).since(then) for host, then in zip(network.hosts, before, strict=True)]
        world.open("after")
        ledgers = world.values(START_SECONDS)
    host_of = {rank: host for host, ranks in enumerate(world.ranks_of) for rank in ranks}
    wire = [link for ledger in ledgers for link in ledger if link[2] == "wire"]
    assert all(host_of[source] != host_of[destination] for source, destination, *_ in wire)
    case = scenes.traffic_case(world.num_ranks)
    row_bytes = case.hidden * case.dtype.itemsize
    for host, rows in enumerate(rows_that_leave(backend, case, world.ranks_of)):
        assert sum(link[3] for link in wire if host_of[link[0]] == host) == rows * row_bytes
        sent = sum(link[4] for link in wire if host_of[link[0]] == host)
        received = sum(link[4] for link in wire if host_of[link[1]] == host)
        # Frames add 0.1 % (interfaces count segments of up to 64 KiB), acknowledgements of the other direction too.
        assert sent <= passed[host].tx_bytes <= 1.02 * sent + 64 * 1024
        assert received <= passed[host].rx_bytes <= 1.02 * received + 64 * 1024
    assert passed[3].tx_bytes == 0


def rows_that_leave(backend, case, ranks_of):
    """The closed form, by host. Flat: a row for every rank elsewhere that wants the token; two hops: for every host."""
    layouts = conformance_v1.layouts(case)
    leaving = []
    for here in ranks_of:
        elsewhere = [ranks for ranks in ranks_of if ranks != here]
        wanted = [layouts[s].is_token_in_rank[:, list(ranks)] for s in here for ranks in elsewhere]
        leaving.append(sum(int(w.any(1).sum() if backend == "hybrid" else w.sum()) for w in wanted))
    return leaving


def test_a_slow_host_is_named_by_the_wait_statistics():
    with Network(3) as network:
        network.set_rate(2, "100mbit")
        with launch.forked(network, (1, 1, 1), "dispatch_some", backend="hybrid", times=4) as world:
            waited = [{int(rank): s for rank, s in w.items()} for w in world.values(START_SECONDS)]
    for rank in (0, 1):
        other = 1 - rank
        assert waited[rank][2] > 2 * waited[rank][other], waited
