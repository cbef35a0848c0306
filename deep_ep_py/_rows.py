"""Channels that carry rows between ranks: over a torch process group, and between threads of one process.

Part of :mod:`deep_ep_py.communicator`, which opens them.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ._board import Board
from .errors import EPPeerError, EPTimeoutError

CPU = torch.device("cpu")

_EXIT_SECONDS = 5.0  # how long an operation in the background may hold up the interpreter's exit
_SURVIVOR_SECONDS = 1.0  # after a failure: how long a rank may take to say that it is still there
_PARTING_SECONDS = 2.0  # how much later than on this rank an operation may reach its deadline on another


class RowChannel(Protocol):
    """Moves rows between all ranks. Collective: the same calls in the same order on every rank."""

    def all_to_all_single(
        self, output: torch.Tensor, input: torch.Tensor, output_splits: list[int], input_splits: list[int]
    ) -> None:
        """Split ``input`` along dim 0, part r to rank r; ``output`` is what came, by rank.

        Contiguous tensors on the channel's device, of any dtype, equal on all ranks but for dim 0. Returns when the
        rows have come; waits with a deadline, answers Ctrl-C.

        Raises:
            EPTimeoutError, EPPeerError: ``ranks`` did not come or are gone, as far as this can be found out (empty
                where it cannot). The channel is broken then and raises the same error again.
        """

    def close(self) -> None:
        """Give the channel back. Idempotent, not collective, never waits for a peer."""


class ThreadMeeting:
    """Where the ranks of one channel between threads meet."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.members = 0
        self.arrived: dict[int, dict[int, tuple[torch.Tensor, list[int]]]] = {}  # exchange -> rank -> bytes, offsets
        self.copied: dict[int, int] = {}  # exchange -> ranks that have taken their parts
        self.shown: dict[tuple[int, int, int], torch.Tensor] = {}  # pairs: (from, to, transfer) -> until it is copied
        self.closed: set[int] = set()
        self.failure: Callable[[], EPPeerError | EPTimeoutError] | None = None


class ThreadRows:
    """Rows between threads: everyone shows its input, everyone copies its parts, everyone waits for all copies."""

    def __init__(self, meeting: ThreadMeeting, rank: int, size: int, timeout: float) -> None:
        self._meeting = meeting
        self._rank = rank
        self._size = size
        self._timeout = timeout
        self._count = 0

    def all_to_all_single(
        self, output: torch.Tensor, input: torch.Tensor, output_splits: list[int], input_splits: list[int]
    ) -> None:
        m, count = self._meeting, self._count
        self._count += 1
        if self._rank in m.closed:
            raise peer_error([self._rank], "closed its buffer")
        with m.changed:
            arrived = m.arrived.setdefault(count, {})
            arrived[self._rank] = (as_bytes(input), [0, *accumulate(input_splits)])
            m.changed.notify_all()
            self._wait_for(lambda: len(arrived) == self._size, lambda r: r in arrived)
        parts = []
        for source in range(self._size):
            rows, offsets = arrived[source]
            parts.append(rows[offsets[self._rank] : offsets[self._rank + 1]])
        assert [p.shape[0] for p in parts] == output_splits, "ranks disagree about the splits"
        torch.cat(parts, out=as_bytes(output))
        with m.changed:
            m.copied[count] = m.copied.get(count, 0) + 1
            if m.copied[count] == self._size:
                m.arrived.pop(count)
                m.changed.notify_all()
            self._wait_for(lambda: count not in m.arrived, lambda r: r not in m.closed)

    def close(self) -> None:
        with self._meeting.changed:
            self._meeting.closed.add(self._rank)
            self._meeting.changed.notify_all()

    def _wait_for(self, ready: Callable[[], bool], is_here: Callable[[int], bool]) -> None:
        """Wait under the meeting's lock. Whoever notices a failure first says for all ranks what it was."""
        m = self._meeting
        start = time.monotonic()
        exiting = ExitWatch()
        while not ready():
            if m.failure is None:
                missing = [r for r in range(self._size) if not is_here(r)]
                gone = [r for r in missing if r in m.closed]
                left = self._timeout - (time.monotonic() - start)
                if gone:
                    m.failure = partial(peer_error, gone, "closed its buffer")
                elif exiting():
                    m.failure = partial(peer_error, missing, "not there at the interpreter's exit")
                elif left <= 0:
                    m.failure = partial(timeout_error, missing, self._timeout)
            if m.failure is not None:
                m.changed.notify_all()
                raise m.failure()
            m.changed.wait(min(left, 0.1))


class TorchRows:
    """Rows over ``alltoall_base`` of a process group that nobody else uses. Of gloo's, whose own deadline ends a wait,
    and whose sockets tell of a peer that is gone; :class:`._nccl.NcclRows` has neither.
    """

    _patience = float("inf")  # seconds after which a wait gives up by itself
    _parting_seconds = 0.0  # how long an operation may still complete that a peer has left

    def __init__(self, group: Any, rank: int, size: int, timeout: float, *, store: Any = None) -> None:
        self._group = group
        self._rank = rank
        self._size = size
        self._timeout = timeout
        self._board = None if store is None else Board(store)
        self._work: Any = None  # under way
        self._failure: Callable[[], EPPeerError | EPTimeoutError] | None = None

    @classmethod
    def of_store(cls, store: Any, rank: int, size: int, timeout: float) -> TorchRows:
        """A gloo group that is not in torch's registry.

        ``new_group`` would do, but it names groups by how many this process has made, and ranks outside a sub-group
        may have made another number of them; and its store keys would stay behind a failed construction.
        """
        from torch.distributed.distributed_c10d import ProcessGroupGloo

        group = ProcessGroupGloo(prefixed("gloo", store), rank, size, timedelta(seconds=timeout))
        return cls(group, rank, size, timeout, store=store)

    @classmethod
    def of_new_group(cls, group: Any, timeout: float) -> RowChannel:
        """A duplicate of ``group`` by torch's own means; rows pass through the device that its backend wants."""
        own: Any = dist.new_group(
            ranks=dist.get_process_group_ranks(group),
            timeout=timedelta(seconds=timeout),
            backend=dist.get_backend(group),
            use_local_synchronization=True,
        )
        devices = {d.type for d in own._device_types}
        rows = cls(own, group.rank(), group.size(), timeout)
        return rows if "cpu" in devices or not devices else StagedRows(rows, torch.device(devices.pop()))

    def all_to_all_single(
        self, output: torch.Tensor, input: torch.Tensor, output_splits: list[int], input_splits: list[int]
    ) -> None:
        if self._failure is not None:
            raise self._failure()
        try:
            self._work = self._group.alltoall_base(as_bytes(output), as_bytes(input), output_splits, input_splits)
            self._wait_for(self._work)
            self._work = None
        except RuntimeError as e:
            self._failure = self._failure or self._explain(first_line(e))
            raise self._failure() from e

    def close(self) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        work, self._work = self._work, None
        under_way = work is not None and not work.is_completed()
        if under_way and self._failure is None:
            self._leave()
        self._failure = self._failure or partial(peer_error, [self._rank], "closed its buffer")
        if self._board is not None:
            self._board.close()
        if under_way:
            keep_until_complete(group, [work])
        elif dist.is_initialized() and group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)

    def _wait_for(self, work: Any) -> None:
        """Wait in slices: Work.wait() would not answer Ctrl-C."""
        exiting = ExitWatch()
        marks = [f"left/{r}" for r in range(self._size)]
        parted = 0.0
        for _ in pauses(self._patience, first=2e-5, longest=1e-3):
            if work.is_completed():
                break
            if exiting():
                raise RuntimeError("the interpreter exits while a peer is waited for")
            if self._board is not None and (found := self._board.look(marks)):
                parted = parted or time.monotonic()
                if time.monotonic() - parted >= self._parting_seconds:
                    left = [r for r, mark in enumerate(marks) if mark in found]
                    self._failure = partial(peer_error, left, "left in the middle of an operation")
                    raise RuntimeError("a peer left")
        else:
            raise RuntimeError("timed out")
        self._conclude(work)

    def _conclude(self, work: Any) -> None:
        """Raises RuntimeError: what a complete work failed of."""
        work.wait()

    def _leave(self) -> None:
        """Tell the peers that this rank will not finish the operation under way: the connections stay open."""
        if self._board is not None:
            self._board.leave(f"left/{self._rank}")

    def _explain(self, reason: str) -> Callable[[], EPPeerError | EPTimeoutError]:
        """Who is missing: survivors leave a mark in the store, and look for the marks of the others."""
        missing: list[int] = []
        if self._board is not None:
            marks = [f"survivor/{r}" for r in range(self._size)]
            self._board.leave(marks[self._rank])
            found = self._board.ask(marks, _SURVIVOR_SECONDS)
            if found is None:
                reason += "; the store that could name the ranks does not answer: its host is gone or cut off"
            else:
                missing = [r for r, mark in enumerate(marks) if mark not in found]
        if says_timeout(reason):
            return partial(timeout_error, missing, self._timeout, reason)
        return partial(peer_error, missing, reason)


class StagedRows:
    """Rows that lie on one device and travel over a channel of another: of a GPU over gloo, MPI or threads by way of
    the host's memory; of a CPU over a group that knows GPUs only. Each copy waits for the device."""

    def __init__(self, channel: RowChannel, device: torch.device) -> None:
        """``device``: where ``channel`` wants its tensors."""
        self._channel = channel
        self._device = device

    def all_to_all_single(
        self, output: torch.Tensor, input: torch.Tensor, output_splits: list[int], input_splits: list[int]
    ) -> None:
        # As bytes: of them every device has copies.
        target = torch.empty(as_bytes(output).shape, dtype=torch.uint8, device=self._device)
        self._channel.all_to_all_single(target, as_bytes(input).to(self._device), output_splits, input_splits)
        as_bytes(output).copy_(target)

    def close(self) -> None:
        self._channel.close()


def keep_until_complete(group: Any, works: Sequence[Any]) -> None:
    """Hold a gloo group whose operations are under way: its destructor waits for them, with the GIL, and their peers
    may come late or not at all. A thread lets go of it when they have ended, by their deadline at the latest, and peers
    that began a little later have come to their own deadline: a connection that closes before looks to them like the
    death of this rank, and hides which rank both have waited for."""

    def wait(group: Any) -> None:  # noqa: ARG001
        for _ in pauses(float("inf"), longest=0.1):
            if all(work.is_completed() for work in works):
                break
        time.sleep(_PARTING_SECONDS)

    threading.Thread(target=wait, args=(group,), name="deep_ep_py-parting", daemon=True).start()


def prefixed(prefix: str, store: Any) -> Any:
    """A view of a torch store under a prefix."""
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    """[n, bytes of a row] uint8: the same memory. Transports know few dtypes, and all of them know bytes."""
    row_bytes = t.element_size()
    for n in t.shape[1:]:
        row_bytes *= n
    if t.numel() == 0:
        return torch.empty((t.shape[0], row_bytes), dtype=torch.uint8, device=t.device)
    assert t.is_contiguous()
    return t.view(t.shape[0], -1).view(torch.uint8)


def pauses(timeout: float, first: float = 2e-4, longest: float = 1e-2) -> Iterator[None]:
    """Yield until ``timeout`` seconds have passed, sleeping in between: short first, then longer. Ctrl-C works."""
    deadline = time.monotonic() + timeout
    pause = first
    while True:
        yield
        left = deadline - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, longest)


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 1, 2``: how errors name them."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def first_line(e: BaseException) -> str:
    """What a transport's error says, without its source position and advice."""
    line = (str(e).splitlines() or [type(e).__name__])[0]
    return re.sub(r"^\[[^\]]*\] ", "", line).split(". ")[0]


def says_timeout(reason: str) -> bool:
    """Whether a transport gave up at its deadline. Gloo says ``Timed out waiting``; of another operation that was under
    way with the same peer it says ``Application timeout caused pair closure``.
    """
    return "timed out" in reason.lower() or "timeout" in reason.lower()


class ExitWatch:
    """Says when a wait in a background thread has held up the interpreter's exit for too long."""

    def __init__(self) -> None:
        self._since = 0.0

    def __call__(self) -> bool:
        if threading.main_thread().is_alive():
            return False
        self._since = self._since or time.monotonic()
        return time.monotonic() - self._since > _EXIT_SECONDS


def peer_error(ranks: Sequence[int], how: str) -> EPPeerError:
    """``ranks`` are lost; ``how``."""
    who = name_ranks(ranks) if ranks else "a peer"
    return EPPeerError(f"lost {who}: {how}; build a new buffer over the survivors", ranks=ranks, how=how)


def timeout_error(ranks: Sequence[int], seconds: float, reason: str = "") -> EPTimeoutError:
    """``ranks`` did not come within ``seconds``."""
    who = name_ranks(ranks) if ranks else "a peer"
    message = (
        f"{who} did not come within {seconds:g} s{reason and f' ({reason})'}. A rank whose first call runs under "
        "torch.compile may compile for minutes: then raise the deadline (num_cpu_timeout_secs, "
        "Settings.timeout_seconds or DEEP_EP_PY_TIMEOUT_SECONDS). In a backward pass, a rank whose loss does not "
        "depend on the rows that it received (it may have received none) does not come: keep them in the graph of the "
        "loss on every rank. Build a new buffer to go on"
    )
    return EPTimeoutError(message, ranks=ranks, seconds=seconds)


def abandoned(what: str, *, missing: Sequence[int], seconds: float, by: int = -1) -> EPTimeoutError:
    """A round of construction is over: this rank gave up on it, or rank ``by`` did."""
    seconds = round(seconds, 1)
    who = name_ranks(missing) if missing else "a rank that cannot be named"
    if by < 0:
        message = f"construct: {who} did not come to {what} within {seconds:g} s"
    else:
        message = f"construct: rank {by} gave up on {what} after {seconds:g} s: {who} did not come"
    message += (
        "; a construction waits connect_timeout_seconds (of Settings) for every rank of the group to construct the "
        "same buffer: see why they did not, then build it again on every rank"
    )
    return EPTimeoutError(message, op="construct", phase=what, ranks=missing, seconds=seconds)
