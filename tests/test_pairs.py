"""Channels between each two ranks: sizes, several transfers under way, peers that close, die or never come."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from deep_ep_py._pairs import TorchPairs, _TorchTransfer, gather
from deep_ep_py.communicator import communicator_of
from deep_ep_py.errors import EPPeerError, EPTimeoutError
from deep_ep_py.testing import run_processes, run_threads
from deep_ep_py.testing.worlds import process_context

SECONDS = 20.0


def amount(source, target, turn):
    """Rows from one rank to another in some transfer; often none, sometimes in one direction only."""
    return (0, 3, 0, 1, 700)[(source * 7 + target * 3 + turn) % 5]


def rows(source, target, turn, dtype=torch.float32):
    n = amount(source, target, turn)
    return (torch.arange(n * 5).view(n, 5) + 1000 * source + 100 * target + 10 * turn).to(dtype)


def transfer(channel, rank, size, turn, dtype=torch.float32):
    """A transfer that has been started, and what must come."""
    inputs = [rows(rank, r, turn, dtype) for r in range(size)]
    outputs = [torch.full_like(rows(r, rank, turn, dtype), -1) for r in range(size)]
    return channel.start(outputs, inputs), outputs


def check(outputs, rank, turn, dtype=torch.float32):
    for r, got in enumerate(outputs):
        if r != rank:
            assert torch.equal(got, rows(r, rank, turn, dtype)), (r, rank, turn)


# The same body on threads and on gloo --------------------------------------------------------------------------------


def one_after_the_other(c, channel):
    for turn in range(10):
        for dtype in (torch.float32, torch.int64, torch.bfloat16):
            under_way, outputs = transfer(channel, c.rank, c.size, turn, dtype)
            under_way.wait()
            check(outputs, c.rank, turn, dtype)


def several_under_way(c, channel):
    """Inputs are the channel's until the wait, and no longer."""
    for _ in range(5):
        begun = [transfer(channel, c.rank, c.size, turn) for turn in range(7)]
        for turn, (under_way, outputs) in enumerate(begun):
            under_way.wait()
            check(outputs, c.rank, turn)


def done_by_itself(c, channel):
    """``done`` turns true without a wait."""
    under_way, outputs = transfer(channel, c.rank, c.size, 1)
    deadline = time.monotonic() + SECONDS
    while not under_way.done():
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    under_way.wait()
    check(outputs, c.rank, 1)


def done_after_the_wait(c, channel):
    for turn in range(3):
        under_way, _ = transfer(channel, c.rank, c.size, turn)
        under_way.wait()
        assert under_way.done()


def inputs_are_free_after_the_wait(c, channel):
    for turn in range(20):
        mine = torch.full((500,), float(c.rank * 100 + turn))
        outputs = [torch.empty(500) for _ in range(c.size)]
        channel.start(outputs, [mine] * c.size).wait()
        mine.fill_(-1)
        for r, got in enumerate(outputs):
            if r != c.rank:
                assert got.eq(float(r * 100 + turn)).all()


def nothing_at_all(c, channel):
    empty = [torch.empty(0, 4)] * c.size
    for _ in range(3):
        under_way = channel.start(empty, empty)
        assert under_way.done()
        under_way.wait()
    no_width = [torch.empty(3, 0)] * c.size
    channel.start(no_width, no_width).wait()


def gathered(c, channel):
    everyones = gather(channel, c.rank, c.size, torch.tensor([c.rank, 7 * c.rank]))
    assert everyones.tolist() == [[r, 7 * r] for r in range(c.size)]


def only_some_pairs(c, channel):
    """Ranks 0 and 1 move rows, the others never come: nobody waits for them."""
    if c.rank < 2 <= c.size:
        outputs = [torch.zeros(4 * (r == 1 - c.rank)) for r in range(c.size)]
        channel.start(outputs, [torch.full_like(o, c.rank + 1.0) for o in outputs]).wait()
        assert outputs[1 - c.rank].eq(2.0 - c.rank).all()


def waits_are_counted(c, channel):
    gather(channel, c.rank, c.size, torch.zeros(1))
    before = list(channel.waited)
    if c.rank == 1:
        time.sleep(0.6)
    gather(channel, c.rank, c.size, torch.zeros(1))
    waited = [after - b for after, b in zip(channel.waited, before, strict=True)]
    assert waited[c.rank] == 0
    assert channel.waited[c.rank] == 0
    if c.rank != 1:
        assert waited[1] > 0.4
        assert all(waited[r] < 0.4 for r in range(c.size) if r != 1)


BODIES = [
    one_after_the_other,
    several_under_way,
    done_by_itself,
    inputs_are_free_after_the_wait,
    nothing_at_all,
    gathered,
    only_some_pairs,
    waits_are_counted,
]


def with_channel(c, body):
    channel = c.session().open_pairs(timeout=SECONDS)
    body(c, channel)
    gather(channel, c.rank, c.size, torch.zeros(1))  # no rank leaves while another still reads
    channel.close()
    channel.close()
    with pytest.raises(EPPeerError):
        channel.start([torch.zeros(1)] * c.size, [torch.zeros(1)] * c.size)


def test_threads_done_after_the_wait():
    run_threads(2, with_channel, done_after_the_wait)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("body", BODIES[:-1], ids=lambda f: f.__name__)
def test_threads(body, num_ranks):
    run_threads(num_ranks, with_channel, body)


def test_threads_count_waits():
    run_threads(3, with_channel, waits_are_counted)


def all_bodies(group):
    for body in (*BODIES, done_after_the_wait):
        with_channel(communicator_of(group), body)
    return True


@pytest.mark.processes
def test_gloo():
    assert run_processes(3, all_bodies) == [True] * 3


# What goes wrong, on threads -----------------------------------------------------------------------------------------


def exchange(c, channel):
    return channel.start([torch.zeros(2) for _ in range(c.size)], [torch.ones(2) for _ in range(c.size)])


@pytest.mark.parametrize("under_way", [1, 3])
def test_a_thread_closes(under_way):
    def body(c):
        channel = c.open_pairs(timeout=SECONDS)
        exchange(c, channel).wait()
        if c.rank == 1:
            time.sleep(0.2)
            channel.close()
            return
        begun = [exchange(c, channel) for _ in range(under_way)]
        for transfer in begun:
            with pytest.raises(EPPeerError) as caught:
                transfer.wait()
            assert caught.value.ranks == (1,)
        with pytest.raises(EPPeerError) as again:
            exchange(c, channel)
        assert str(again.value) == str(caught.value)
        channel.close()

    run_threads(3, body)


def test_a_thread_never_comes():
    """Only it is named: what the others gave is there."""

    def body(c):
        channel = c.open_pairs(timeout=0.5)
        if c.rank == 1:
            time.sleep(1.0)
            return
        with pytest.raises(EPTimeoutError) as caught:
            exchange(c, channel).wait()
        assert caught.value.ranks == (1,)
        assert caught.value.seconds == 0.5
        assert channel.waited[1] > 0.4
        with pytest.raises(EPTimeoutError):
            exchange(c, channel)

    run_threads(3, body)


class Failed:
    """A gloo operation that has ended with an error, as gloo words it."""

    def __init__(self, why):
        self.why = why

    def is_completed(self):
        return True

    def wait(self):
        raise RuntimeError(f"[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:1] {self.why}")


@pytest.mark.parametrize(
    ("why", "error"),
    [
        ("Timed out waiting 1500ms for recv operation to complete", EPTimeoutError),
        ("Application timeout caused pair closure", EPTimeoutError),  # of another operation with the same peer
        ("Connection closed by peer [127.0.0.1]:1", EPPeerError),
        ("Read error [127.0.0.1]:1: Connection reset by peer", EPPeerError),
    ],
)
def test_what_gloo_says(why, error):
    channel = TorchPairs(dist.HashStore(), 0, [7], 1.5)
    with pytest.raises(error) as caught:
        _TorchTransfer(channel, {0: Failed(why)}).wait()
    assert caught.value.ranks == (7,)


def test_who_is_gone_is_not_named_with_who_is_late():
    late, gone = Failed("Application timeout caused pair closure"), Failed("Connection closed by peer [127.0.0.1]:1")
    for works in ({0: late, 1: gone}, {0: gone, 1: late}):
        channel = TorchPairs(dist.HashStore(), 0, [9], 1.5)
        channel._names = [7, 8]
        with pytest.raises(EPPeerError) as caught:
            _TorchTransfer(channel, works).wait()
        assert caught.value.ranks == ((8,) if works[1] is gone else (7,))


# What goes wrong, between processes ----------------------------------------------------------------------------------


class Silent:
    """A store that answers until it falls silent; then every call blocks, as where its host is cut off."""

    def __init__(self, store):
        self._store = store
        self.silent = threading.Event()

    def __getattr__(self, name):
        method = getattr(self._store, name)

        def call(*args):
            if self.silent.is_set():
                threading.Event().wait()
            return method(*args)

        return call


def open_torch(rank, size, store, timeout):
    """Gloo itself wants a real store; the board is where a store may fall silent."""
    channel = TorchPairs(dist.PrefixStore("pairs", store), rank, [10 * r for r in range(size)], timeout)
    silent = channel._board._store = Silent(store)
    return channel, silent


def peer_goes(rank, folder, how, ended):
    store = dist.FileStore(f"{folder}/store", 3)
    channel, silent = open_torch(rank, 3, store, 1.5 if how in ("stopped", "silent") else 30.0)
    ones, zeros = [torch.ones(2000)] * 3, [torch.zeros(2000) for _ in range(3)]
    channel.start(zeros, ones).wait()
    silent_store = how == "silent"
    if silent_store:
        silent.silent.set()
    if rank == 2:
        time.sleep(0.3)
        if how == "closed in the middle":  # it has begun what it will not finish
            channel.start(zeros, ones)
        if how.startswith("closed"):
            channel.close()
            time.sleep(3)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    errors = []
    start = time.monotonic()
    # Of three that are under way the first may still find what rank 2 had sent.
    begun = [channel.start(zeros, ones) for _ in range(3)]
    for transfer in begun:
        try:
            transfer.wait()
        except (EPPeerError, EPTimeoutError) as e:  # noqa: PERF203
            errors.append((type(e).__name__, e.ranks))
    seconds = time.monotonic() - start
    start = time.monotonic()
    channel.close()
    ended.put((errors, seconds, time.monotonic() - start))
    # Stay: the other one's errors shall be about rank 2 alone. The test ends all of them.
    time.sleep(60)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("killed", "EPPeerError"),
        ("closed", "EPPeerError"),
        ("closed in the middle", "EPPeerError"),
        ("stopped", "EPTimeoutError"),
        ("silent", "EPTimeoutError"),
    ],
)
def test_a_process_goes(how, error, tmp_path):
    context = process_context("forkserver")
    ended = context.Queue()
    ranks = [context.Process(target=peer_goes, args=(r, tmp_path, how, ended), daemon=True) for r in range(3)]
    for process in ranks:
        process.start()
    try:
        for _ in range(2):
            errors, seconds, closing = ended.get(timeout=40)
            assert len(errors) >= 2
            assert set(errors) == {(error, (20,))}, errors
            assert seconds < 10
            assert closing < 2
    finally:
        for process in ranks:
            process.kill()
            process.join()


def over_tcp(rank, port, ended):
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
    channel = TorchPairs(dist.PrefixStore("pairs", store), rank, range(2), SECONDS)
    for turn in range(5):
        begun = [transfer(channel, rank, 2, turn + i) for i in range(3)]
        for i, (under_way, outputs) in enumerate(begun):
            under_way.wait()
            check(outputs, rank, turn + i)
    gather(channel, rank, 2, torch.zeros(1))
    channel.close()
    ended.put(rank)


@pytest.mark.processes
def test_tcp_store():
    context = process_context("forkserver")
    ended = context.Queue()
    server = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    ranks = [context.Process(target=over_tcp, args=(r, server.port, ended), daemon=True) for r in range(2)]
    for process in ranks:
        process.start()
    try:
        assert {ended.get(timeout=40) for _ in ranks} == {0, 1}
        for process in ranks:
            process.join(timeout=10)
            assert process.exitcode == 0
    finally:
        for process in ranks:
            process.kill()
            process.join()


def interrupted(group):
    c = communicator_of(group)
    channel = c.open_pairs(timeout=30)
    exchange(c, channel).wait()
    if c.rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            exchange(c, channel).wait()
        assert time.monotonic() - start < 5
        channel.close()
        return True
    time.sleep(1.5)
    # Rank 0 had begun the first of these, and closed with its rows under way.
    with pytest.raises(EPPeerError) as caught:
        for _ in range(2):
            exchange(c, channel).wait()
    assert caught.value.ranks == (0,)
    channel.close()
    return True


@pytest.mark.processes
def test_ctrl_c():
    assert run_processes(2, interrupted) == [True, True]
