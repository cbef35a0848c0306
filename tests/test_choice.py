"""Which backend a buffer gets where something does not work for some ranks: the same one on all of them."""

from __future__ import annotations

import threading

import pytest
import torch
from collective_cases import SETTINGS, Routing, all_ranks, combine, dispatch, v2_spec

import deep_ep_py
from deep_ep_py.choice import Construction, open_backend
from deep_ep_py.communicator import ThreadCommunicator
from deep_ep_py.errors import EPArgumentError, EPBackendUnavailableError
from deep_ep_py.settings import Settings
from deep_ep_py.testing.worlds import run_threads
from deep_ep_py.types import CombineSpec


def construction(communicator, hosts, **settings):
    return Construction(
        communicator=communicator,
        settings=Settings(timeout_seconds=10, connect_timeout_seconds=10, **settings),
        hosts=hosts,
        device=torch.device("cpu"),
        epoch=7,
        heap_bytes=0,
        num_cores=1,
        allow_hybrid_mode=True,
    )


def opened(communicator, hosts):
    backend, info = open_backend(construction(communicator, hosts))
    backend.barrier()
    backend.close()
    return info


def test_a_rail_that_cannot_connect(monkeypatch):
    """A firewall between two ranks: the other rail works, and is not used either."""
    connect = ThreadCommunicator.open_pairs

    def open_pairs(self, *, timeout):
        if 0 in self.names:
            raise EPBackendUnavailableError("no route", reasons={"hybrid": "no route"})
        return connect(self, timeout=timeout)

    monkeypatch.setattr(ThreadCommunicator, "open_pairs", open_pairs)
    hosts = [{"domain": word, "boot_id": "one"} for word in "aabb"]
    infos = run_threads(4, opened, hosts)
    assert {info.name for info in infos} == {"collective"}
    assert all("0: 'no route', 2: 'no route'" in info.refused["hybrid"] for info in infos)

    def by_name(communicator):
        with pytest.raises(EPBackendUnavailableError, match="no route"):
            open_backend(construction(communicator, hosts, backend="hybrid"))
        return True

    assert all(run_threads(4, by_name))


def test_a_domain_that_shares_no_memory():
    """One domain is said to be two machines; the other one would work."""
    hosts = [{"domain": word, "boot_id": boot} for word, boot in zip("aabb", ["one", "two", "one", "one"], strict=True)]
    infos = run_threads(4, opened, hosts)
    assert {info.name for info in infos} == {"collective"}
    assert all("two" in info.refused["hybrid"] for info in infos)


@pytest.mark.parametrize("gbps", [float("inf"), float("nan"), -1.0])
def test_rates_that_are_none(gbps):
    with pytest.raises(EPArgumentError, match="link_gbps"):
        Settings(link_gbps=gbps)


class Closes:
    """An event that closes the backend, in the thread that waits for it."""

    def __init__(self, backend):
        self.backend = backend
        self.all_sent = threading.Event()

    def wait(self):
        assert self.all_sent.wait(20)
        self.backend.close()

    def done(self):
        return False


@pytest.mark.parametrize("domains", [None, ((0,), (1,))], ids=["collective", "hybrid"])
def test_closed_by_its_own_worker(domains):
    """As where a buffer in a reference cycle is collected in the middle of its own operation: what was begun ends."""
    routing = Routing(2)

    def body(rank, backend):
        usual = dispatch(backend, v2_spec(routing, rank, expand=False))
        expected = combine(backend, CombineSpec(usual.recv_x, usual.plan)).combined_x.clone()
        flights, closes = [], Closes(backend)
        for previous in ([closes], []):
            spec = CombineSpec(usual.recv_x, usual.plan)
            flights.append(backend.prepare_combine(spec, background=True, previous=previous))
        for flight in flights:
            backend.combine_send(flight)
        closes.all_sent.set()
        for flight in flights:
            flight.event.wait()
            assert (backend.combine_recv(flight).combined_x == expected).all()
        with pytest.raises(deep_ep_py.EPError, match="closed"):
            backend.barrier()

    all_ranks(routing, body, SETTINGS, domains=domains)
