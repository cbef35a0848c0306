"""Channels between each two ranks: sizes, several transfers under way, peers that close, die or never come."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from pair_cases import SECONDS, begin, check, exchange

from deep_ep_py._pairs import TorchPairs, _TorchTransfer, gather
from deep_ep_py.communicator import communicator_of
from deep_ep_py.errors import EPPeerError, EPTimeoutError
from deep_ep_py.testing import run_processes, run_threads

# The same body on threads and on gloo --------------------------------------------------------------------------------


def one_after_the_other(c, channel):
    for turn in range(10):
        for dtype in (torch.float32, torch.int64, torch.bfloat16):
            under_way, outputs = begin(channel, c.rank, c.size, turn, dtype)
            under_way.wait()
            check(outputs, c.rank, turn, dtype)


def several_under_way(c, channel):
    """Inputs are the channel's until the wait, and no longer."""
    for _ in range(5):
        begun = [begin(channel, c.rank, c.size, turn) for turn in range(7)]
        for turn, (under_way, outputs) in enumerate(begun):
            under_way.wait()
            check(outputs, c.rank, turn)


def done_by_itself(c, channel):
    """``done`` turns true without a wait."""
    under_way, outputs = begin(channel, c.rank, c.size, 1)
    deadline = time.monotonic() + SECONDS
    while not under_way.done():
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    under_way.wait()
    check(outputs, c.rank, 1)


def done_after_the_wait(c, channel):
    for turn in range(3):
        under_way, _ = begin(channel, c.rank, c.size, turn)
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
        assert max(range(c.size), key=waited.__getitem__) == 1, waited


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
