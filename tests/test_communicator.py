"""Communicators: bootstrap that names who is missing, retries that stay in step, rows of any dtype."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from deep_ep_py.communicator import Communicator, TorchCommunicator, communicator_of, thread_world
from deep_ep_py.errors import EPArgumentError, EPMismatchError, EPPeerError, EPTimeoutError
from deep_ep_py.testing import run_processes, run_threads

DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64, torch.float64)


# The same body on threads, on a gloo world, and on a subgroup ---------------------------------------------------------


def several_rounds(c):
    for i in range(3):
        wanted = [b"%d\0of rank %d" % (i, r) for r in range(c.size)]
        assert c.exchange(wanted[c.rank], timeout=20, what=f"round {i}") == wanted


def rows_of_any_dtype(c):
    channel = c.open_rows(timeout=20)
    for dtype in DTYPES:
        sent = [(c.rank * 3 + r) % 3 for r in range(c.size)]
        received = [(r * 3 + c.rank) % 3 for r in range(c.size)]
        shape = (2, 5) if dtype is not torch.bool else ()
        rows = torch.full((sum(sent), *shape), float(c.rank + 1)).to(dtype)
        out = torch.zeros((sum(received), *shape)).to(dtype)
        channel.all_to_all_single(out, rows, received, sent)
        wanted = torch.cat([torch.full((n, *shape), float(r + 1)) for r, n in enumerate(received)])
        assert torch.equal(out.float(), wanted.to(dtype).float()), dtype
    nothing, zeros = torch.empty(0, 4), [0] * c.size
    channel.all_to_all_single(nothing, nothing, zeros, zeros)
    no_width = torch.empty(c.size, 0)
    channel.all_to_all_single(no_width, no_width, [1] * c.size, [1] * c.size)
    channel.close()
    channel.close()
    with pytest.raises(EPPeerError):
        channel.all_to_all_single(nothing, nothing, zeros, zeros)


def two_buffers_at_once(c):
    first, second = communicator_of(c), communicator_of(c)
    assert first.exchange(b"1", timeout=20, what="first") == [b"1"] * c.size
    assert second.exchange(b"2", timeout=20, what="second") == [b"2"] * c.size
    channels = [first.open_rows(timeout=20), second.open_rows(timeout=20)]
    ones = [1] * c.size
    for channel, value in ((channels[0], 1.0), (channels[1], 2.0), (channels[0], 3.0)):
        out = torch.zeros(c.size)
        channel.all_to_all_single(out, torch.full((c.size,), value), ones, ones)
        assert out.tolist() == [value] * c.size
    for channel in channels:
        channel.close()
    first.close()
    second.close()


def latecomer_then_retry(c):
    """The last rank comes too late: everyone hears who it was, the late one at once, and a retry works."""
    late = c.size - 1
    for timeout in (0.5, 0.3):  # twice: counters stay in step
        if c.rank == late:
            time.sleep(timeout + 0.7)
        start = time.monotonic()
        with pytest.raises(EPTimeoutError) as caught:
            c.session().exchange(b"x", timeout=timeout if c.rank != late else 30, what="hello")
        assert caught.value.ranks == (late,)
        assert (caught.value.op, caught.value.phase) == ("construct", "hello")
        assert caught.value.seconds >= timeout - 0.1
        assert f"rank {late}" in str(caught.value)
        if c.rank == late:
            assert time.monotonic() - start < 15, "at its own deadline only"
            assert "gave up" in str(caught.value)
    several_rounds(c.session())


def one_rank_starts_over(c):
    """The last rank fails between two rounds and begins again, while the others still wait in the second round."""
    last = c.size - 1
    mine = c.session()
    mine.exchange(b"", timeout=20, what="one")
    if c.rank == last:
        mine = c.session()
    else:
        with pytest.raises(EPTimeoutError) as caught:
            mine.exchange(b"", timeout=0.3, what="two")
        assert caught.value.ranks == (last,)
    for what in ("one", "two"):
        assert mine.exchange(b"%d" % c.rank, timeout=20, what=what) == [b"%d" % r for r in range(c.size)]


def different_steps(c):
    with pytest.raises(EPMismatchError) as caught:
        c.session().exchange(b"", timeout=20, what="Buffer" if c.rank else "ElasticBuffer")
    assert caught.value.values[0] == "ElasticBuffer"
    several_rounds(c.session())


BODIES = [
    several_rounds,
    rows_of_any_dtype,
    two_buffers_at_once,
    latecomer_then_retry,
    one_rank_starts_over,
    different_steps,
]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("body", BODIES, ids=lambda f: f.__name__)
def test_threads(body, num_ranks):
    run_threads(num_ranks, body)


@pytest.mark.parametrize("body", [several_rounds, rows_of_any_dtype, two_buffers_at_once])
def test_one_rank(body):
    run_threads(1, body)


def all_bodies(group):
    for body in BODIES:
        body(communicator_of(group))
    if dist.get_rank() == 0:
        return True
    # Only some ranks know this group, so they have made more groups than the others.
    sub = dist.new_group([1, 2], use_local_synchronization=True)
    for body in BODIES:
        body(TorchCommunicator(sub))
    rows_of_any_dtype(communicator_of(sub))
    return True


@pytest.mark.processes
def test_gloo_world_and_subgroup():
    assert run_processes(3, all_bodies) == [True] * 3


def without_store(group):
    c = TorchCommunicator(group)
    c._store = None
    assert c.exchange(b"%d" % c.rank, timeout=20, what="x") == [b"0", b"1"]
    rows_of_any_dtype(c)
    return True


@pytest.mark.processes
def test_group_without_a_store():
    assert run_processes(2, without_store) == [True] * 2


# Other stores, and what a construction leaves in them -----------------------------------------------------------------


class FakeGroup:
    """What a communicator asks of a group whose rows are not needed."""

    def __init__(self, store, rank, size):
        self._store, self._rank, self._size = store, rank, size

    def get_group_store(self):
        return self._store

    def rank(self):
        return self._rank

    def size(self):
        return self._size


@pytest.mark.parametrize("kind", ["hash", "file", "tcp"])
def test_stores(kind, tmp_path):
    if kind == "hash":
        stores = [dist.HashStore()] * 3
    elif kind == "file":
        stores = [dist.FileStore(str(tmp_path / "store"), 3) for _ in range(3)]
    else:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        stores = [server] + [dist.TCPStore("127.0.0.1", server.port) for _ in range(2)]

    def body(thread_communicator):
        rank = thread_communicator.rank
        c = TorchCommunicator(FakeGroup(stores[rank], rank, 3))
        several_rounds(c)
        several_rounds(c.session())
        latecomer_then_retry(c)

    run_threads(3, body)


def test_constructions_leave_few_keys_behind():
    store = dist.HashStore()

    def body(thread_communicator):
        rank = thread_communicator.rank
        c = TorchCommunicator(FakeGroup(store, rank, 3))
        for _ in range(10):
            several_rounds(c.session())

    run_threads(3, body)
    # per rank a counter, its last round's name and payload; that round's ticket and verdict
    assert store.num_keys() <= 3 * 3 + 2


def test_store_that_goes_away(monkeypatch):
    def gone(keys):
        raise RuntimeError("[somewhere.cpp:1] Connection reset by peer. Some advice")

    c = thread_world(2)[0]
    monkeypatch.setattr(c._store, "check", gone)
    with pytest.raises(EPPeerError, match="Connection reset by peer") as caught:
        c.exchange(b"", timeout=5, what="x")
    assert "advice" not in str(caught.value)
    assert caught.value.op == "construct"


# Choice ---------------------------------------------------------------------------------------------------------------


def test_choice_of_a_communicator():
    c = thread_world(2)[1]
    assert isinstance(c, Communicator)
    chosen = communicator_of(c)
    assert (chosen.rank, chosen.size) == (1, 2)
    for group, comm, words in (
        (None, None, "process group"),
        (None, object(), "comm: expected"),
        (-100, None, "member"),
    ):
        with pytest.raises(EPArgumentError, match=words):
            communicator_of(group, comm)
    with pytest.raises(EPArgumentError):
        thread_world(0)


def test_one_verdict_for_everybody_at_the_deadline():
    """A rank that comes just as the others give up: either all succeed or all fail, never some."""
    outcomes = set()
    for delay in (0.0, 0.04, 0.045, 0.05, 0.055, 0.06, 0.2):

        def body(c, delay=delay):
            if c.rank == 0:
                time.sleep(delay)
            try:
                c.exchange(b"", timeout=0.05, what="x")
            except EPTimeoutError:
                return "failed"
            return "came"

        results = set(run_threads(2, body))
        assert len(results) == 1, delay
        outcomes |= results
    assert "failed" in outcomes


def test_row_channel_between_threads_waits_for_copies():
    """The input may be overwritten as soon as the call returns."""

    def body(c):
        c.exchange(b"", timeout=20, what="x")
        channel, ones = c.open_rows(timeout=20), [1] * c.size
        rows = torch.empty(c.size, 1000, dtype=torch.int64)
        out = torch.empty_like(rows)
        for i in range(50):
            rows.fill_(i)
            channel.all_to_all_single(out, rows, ones, ones)
            rows.fill_(-1)
            assert (out == i).all()

    run_threads(3, body)


def test_rank_that_closes_its_channel_is_named():
    def body(c):
        c.exchange(b"", timeout=20, what="x")
        channel, ones = c.open_rows(timeout=20), [1] * c.size
        if c.rank == 1:
            threading.Event().wait(0.1)
            channel.close()
            return
        start = time.monotonic()
        for _ in range(2):
            with pytest.raises(EPPeerError) as caught:
                channel.all_to_all_single(torch.empty(3), torch.empty(3), ones, ones)
            assert caught.value.ranks == (1,)
        assert time.monotonic() - start < 10, "at the deadline only"

    run_threads(3, body)
