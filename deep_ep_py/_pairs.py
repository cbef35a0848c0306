"""Channels between the ranks of a rail: every pair of ranks has a way of its own, so that rows to one peer do not wait
for another, several transfers are under way at once, and who is missing is known exactly.

Part of :mod:`deep_ep_py.communicator`, which opens them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch

from ._board import Board
from ._rows import (
    ExitWatch,
    as_bytes,
    first_line,
    keep_until_complete,
    pauses,
    peer_error,
    prefixed,
    says_timeout,
    timeout_error,
)
from .errors import EPPeerError, EPTimeoutError

Failure = Callable[[], EPPeerError | EPTimeoutError]


class Transfer(Protocol):
    """Rows on their way."""

    def done(self) -> bool:
        """All of them have come and gone, or it failed. Never blocks."""

    def wait(self) -> None:
        """Wait with a deadline; answers Ctrl-C.

        Raises:
            EPTimeoutError, EPPeerError: ``ranks`` are exactly the peers whose part is missing. The channel is broken
                then and raises the same error again.
        """


class PairChannel(Protocol):
    """Moves rows between all ranks. The transfers between two ranks are started in the same order by both.

    Attributes:
        waited: seconds that this rank has waited for each peer's part, by position.
    """

    waited: list[float]

    def start(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Transfer:
        """``inputs[r]`` to rank r, ``outputs[r]`` from it: contiguous CPU tensors of any dtype, whose sizes both sides
        know; the own entries, and peers to and from which nothing goes, are left out. The transfer keeps the tensors
        alive. Several may be under way; they are waited for in the order in which they were started.
        """

    def close(self) -> None:
        """Give the channel back. Idempotent, not collective, never waits for a peer."""


def gather(channel: PairChannel, rank: int, size: int, own: torch.Tensor) -> torch.Tensor:
    """[size, n]: everyone's ``own`` [n]."""
    everyones = torch.empty((size, own.numel()), dtype=own.dtype, device="cpu")
    everyones[rank] = own
    channel.start(list(everyones), [own] * size).wait()
    return everyones


class TorchPairs:
    """A gloo group of two ranks for each peer."""

    def __init__(self, store: Any, rank: int, names: Sequence[int], timeout: float) -> None:
        """Connect; collective. ``names``: what errors call the ranks."""
        from torch.distributed.distributed_c10d import ProcessGroupGloo

        self._rank = rank
        self._names = names
        self._timeout = timeout
        self._board = Board(store)
        self._groups: dict[int, Any] = {}
        self._under_way: deque[_TorchTransfer] = deque()
        self._failure: Failure | None = None
        self.waited = [0.0] * len(names)
        for peer in range(len(names)):
            if peer != rank:
                low, high = sorted((rank, peer))
                way = prefixed(f"{low}-{high}", store)
                self._groups[peer] = ProcessGroupGloo(way, int(rank > peer), 2, timedelta(seconds=timeout))

    def start(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Transfer:
        if self._failure is not None:
            raise self._failure()
        works = {}
        for peer, group in self._groups.items():
            source, target = as_bytes(inputs[peer]).view(-1), as_bytes(outputs[peer]).view(-1)
            if source.numel() or target.numel():
                mine = int(self._rank > peer)
                give, take = [0, 0], [0, 0]
                give[1 - mine], take[1 - mine] = source.numel(), target.numel()
                works[peer] = group.alltoall_base(target, source, take, give)
        transfer = _TorchTransfer(self, works)
        self._under_way.append(transfer)
        return transfer

    def finish(self, transfer: _TorchTransfer) -> None:
        """Wait for the oldest transfer. In slices: Work.wait() would not answer Ctrl-C."""
        if self._failure is not None:
            raise self._failure()
        exiting, marks = ExitWatch(), {f"left/{n}": n for n in self._names}
        begin = last = time.monotonic()
        for _ in pauses(float("inf"), first=2e-5, longest=1e-3):
            missing = [peer for peer, work in transfer.works.items() if not work.is_completed()]
            now = time.monotonic()
            for peer in missing:
                self.waited[peer] += now - last
            last = now
            if not missing:
                break
            names = [self._names[p] for p in missing]
            gone = [n for mark in self._board.look(list(marks)) if (n := marks[mark]) in names]
            if gone:
                self._fail(partial(peer_error, gone, "left in the middle of an operation"))
            if exiting():
                self._fail(partial(peer_error, names, "not there at the interpreter's exit"))
            if now - begin > self._timeout:
                self._fail(partial(timeout_error, names, self._timeout))
        lost = {peer: why for peer, work in transfer.works.items() if (why := _why_failed(work))}
        if lost:
            dead = {self._names[peer]: why for peer, why in lost.items() if not says_timeout(why)}
            if dead:  # the graver news; whoever is late too may be waiting for them
                self._fail(partial(peer_error, list(dead), first_line(RuntimeError(next(iter(dead.values()))))))
            self._fail(partial(timeout_error, [self._names[peer] for peer in lost], self._timeout))
        if transfer in self._under_way:  # unless another thread has closed the channel
            self._under_way.remove(transfer)

    def close(self) -> None:
        groups, self._groups = self._groups, {}
        if not groups:
            return
        busy: dict[int, list[Any]] = {}
        for transfer in self._under_way:
            for peer, work in transfer.works.items():
                if not work.is_completed():
                    busy.setdefault(peer, []).append(work)
        self._under_way.clear()
        self._failure = self._failure or partial(peer_error, [self._names[self._rank]], "closed its buffer")
        if busy:
            # The connections stay open: the board is where peers learn it.
            self._board.leave(f"left/{self._names[self._rank]}")
        self._board.close()
        for peer, works in busy.items():
            keep_until_complete(groups[peer], works)

    def _fail(self, failure: Failure) -> None:
        self._failure = self._failure or failure
        raise self._failure()


class _TorchTransfer:
    def __init__(self, channel: TorchPairs, works: dict[int, Any]) -> None:
        self.works = works
        self._channel = channel

    def done(self) -> bool:
        return all(work.is_completed() for work in self.works.values())

    def wait(self) -> None:
        self._channel.finish(self)


def _why_failed(work: Any) -> str:
    """What a complete work raises; empty: nothing."""
    try:
        work.wait()
    except RuntimeError as e:
        return str(e) or type(e).__name__
    return ""


class ThreadPairs:
    """Between threads: a rank shows its rows, the peer copies them."""

    def __init__(self, meeting: Any, rank: int, names: Sequence[int], timeout: float) -> None:
        self._meeting = meeting
        self._rank = rank
        self._names = names
        self._timeout = timeout
        self._started = [0] * len(names)  # by peer
        self._failure: Failure | None = None
        self.waited = [0.0] * len(names)

    def start(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Transfer:
        if self._failure is not None:
            raise self._failure()
        m = self._meeting
        # By peer: the number of the transfer between the two, and where its rows go.
        shown: dict[int, tuple[int, torch.Tensor]] = {}
        with m.changed:
            for peer, (target, source) in enumerate(zip(outputs, inputs, strict=True)):
                if peer != self._rank and (target.numel() or source.numel()):
                    shown[peer] = self._started[peer], as_bytes(target).view(-1)
                    m.shown[self._rank, peer, self._started[peer]] = as_bytes(source).view(-1)
                    self._started[peer] += 1
            m.changed.notify_all()
        return _ThreadTransfer(self, shown)

    def missing(self, shown: dict[int, tuple[int, torch.Tensor]]) -> list[int]:
        """Peers that have not come to this transfer."""
        return [peer for peer, (number, _) in shown.items() if (peer, self._rank, number) not in self._meeting.shown]

    def failed(self, shown: dict[int, tuple[int, torch.Tensor]]) -> bool:
        return self._failure is not None or any(peer in self._meeting.closed for peer in self.missing(shown))

    def finish(self, shown: dict[int, tuple[int, torch.Tensor]]) -> None:
        m = self._meeting
        self._wait(lambda: self.missing(shown))
        for peer, (number, target) in shown.items():
            source = m.shown[peer, self._rank, number]
            assert source.numel() == target.numel(), "ranks disagree about sizes"
            target.copy_(source)
        with m.changed:
            for peer, (number, _) in shown.items():
                del m.shown[peer, self._rank, number]
            m.changed.notify_all()
        # What this rank shows is its user's again only when every peer has copied it.
        self._wait(lambda: [peer for peer, (number, _) in shown.items() if (self._rank, peer, number) in m.shown])

    def close(self) -> None:
        if self._failure is None:
            self._failure = partial(peer_error, [self._names[self._rank]], "closed its buffer")
        with self._meeting.changed:
            self._meeting.closed.add(self._rank)
            self._meeting.changed.notify_all()

    def _wait(self, missing: Callable[[], list[int]]) -> None:
        m, exiting = self._meeting, ExitWatch()
        begin = last = time.monotonic()
        with m.changed:
            while late := missing():
                names = [self._names[r] for r in late]
                gone = [self._names[r] for r in late if r in m.closed]
                now = time.monotonic()
                for r in late:
                    self.waited[r] += now - last
                last = now
                if gone:
                    self._failure = partial(peer_error, gone, "closed its buffer")
                elif exiting():
                    self._failure = partial(peer_error, names, "not there at the interpreter's exit")
                elif now - begin > self._timeout:
                    self._failure = partial(timeout_error, names, self._timeout)
                if self._failure is not None:
                    raise self._failure()
                m.changed.wait(0.05)


class _ThreadTransfer:
    def __init__(self, channel: ThreadPairs, shown: dict[int, tuple[int, torch.Tensor]]) -> None:
        self._channel = channel
        self._shown = shown

    def done(self) -> bool:
        return self._channel.failed(self._shown) or not self._channel.missing(self._shown)

    def wait(self) -> None:
        self._channel.finish(self._shown)
        self._shown = {}
