"""How ranks find each other: bootstrap messages, and a channel that carries rows where memory is not shared.

A :class:`Communicator` is one participant of one construction. It is made of a torch process group
(:class:`TorchCommunicator`), of threads of one process (:func:`thread_world`), or of an MPI communicator
(:mod:`._mpi`). The first two keep their bootstrap messages in a small key-value store and not in collectives: a store
can tell *which* rank did not come.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist

from ._groups import group_of, store_of
from ._mpi import is_mpi, mpi_communicator
from ._nccl import NcclRows, has_nccl
from ._pairs import PairChannel, ThreadPairs, TorchPairs
from ._rows import (
    CPU,
    RowChannel,
    StagedRows,
    ThreadMeeting,
    ThreadRows,
    TorchRows,
    first_line,
    name_ranks,
    pauses,
    prefixed,
)
from .errors import EPArgumentError, EPBackendUnavailableError, EPMismatchError, EPPeerError, EPTimeoutError

__all__ = ["Communicator", "RowChannel", "ThreadCommunicator", "TorchCommunicator", "communicator_of", "thread_world"]

_MARK_SECONDS = 5.0  # how long to wait for a verdict whose author has already taken the ticket


@runtime_checkable
class Communicator(Protocol):
    """The ranks of a buffer, as one of them sees them. Used by one thread at a time."""

    rank: int
    size: int
    carries_cuda: bool  # made for tensors on GPUs: where a buffer's tensors lie, unless something else is said

    def session(self) -> Communicator:
        """The same ranks, for another construction: every buffer takes one, in the same order on every rank."""

    def exchange(self, payload: bytes, *, timeout: float, what: str) -> list[bytes]:
        """Everyone's payload, by rank. ``what`` names the step, and must be equal on all ranks; ``timeout`` in seconds.

        Raises:
            EPTimeoutError: ``ranks`` did not come in time, or this rank came after the others had given up. The
                construction is over for every rank, and all of them may try again.
            EPMismatchError: the ranks are at different steps.
            EPPeerError: the store cannot be reached any more.
        """

    def open_rows(self, *, timeout: float, device: torch.device = CPU) -> RowChannel:
        """A channel of its own that never interleaves with the user's collectives. Collective, after an exchange.

        ``timeout`` (seconds) bounds the opening and each of the channel's operations; ``device``: of its tensors.
        """

    def open_pairs(self, *, timeout: float) -> PairChannel:
        """The same, with a way of its own between each two ranks, and several transfers under way."""

    def subset(self, ranks: Sequence[int]) -> Communicator:
        """These ranks of the same construction, after an exchange. Its members call it, in the same order; ``rank`` and
        ``size`` are of the subset, errors name the ranks of the whole."""

    def close(self) -> None:
        """Give back what construction needed. Idempotent, not collective; open channels stay open."""


def communicator_of(group: object, comm: object = None) -> Communicator:
    """The communicator of one construction, from what users pass to a buffer.

    Args:
        group: a torch ``ProcessGroup`` (any backend, any subset of the world), the name of one, a ``DeviceMesh`` of one
            dimension, an mpi4py communicator, or a :class:`Communicator`.
        comm: an mpi4py communicator, where ``group`` is None.

    Raises:
        EPArgumentError: neither was given, or nothing that can be used.
    """
    given, _ = group_of(comm if group is None else group)
    if isinstance(given, Communicator):
        return given.session()
    if is_mpi(given):
        return mpi_communicator(given)
    if dist.is_available() and isinstance(given, dist.ProcessGroup):
        return TorchCommunicator(given)
    remedy = (
        "a torch.distributed process group that this rank is a member of, its name, a DeviceMesh of one dimension, an "
        "mpi4py communicator, or a Communicator"
    )
    raise EPArgumentError.of("comm" if given is comm and comm is not None else "group", remedy, _describe(given))


def _describe(value: object) -> str:
    return "None" if value is None else f"{type(value).__name__} ({value!r})"


class _StoreCommunicator:
    """``exchange`` over a store, of which it needs ``set``, ``get``, ``add``, ``check`` and ``delete_key``.

    Every rank counts its own constructions *in the store*, so that counters survive a failed construction, a rebuilt
    Python object and a rank that came late, and no module needs state. Round r of construction n lives under ``n/r``.
    Whether a round is complete or abandoned is decided once for all ranks, by whoever draws the round's first ticket.
    """

    carries_cuda = False

    def __init__(self, store: Any, rank: int, size: int, names: Sequence[int] = ()) -> None:
        self.rank = rank
        self.size = size
        self.names = tuple(names) or tuple(range(size))  # what errors call the ranks
        self._store = store
        self._number = 0
        self._round = 0
        self._channels = 0

    def exchange(self, payload: bytes, *, timeout: float, what: str) -> list[bytes]:
        try:
            return self._exchange(payload, timeout, what)
        except (EPTimeoutError, EPMismatchError, EPPeerError):
            self._number = 0  # this construction is over; the next exchange begins another one
            raise
        except RuntimeError as e:  # what torch's stores raise when their server is gone
            self._number = 0
            message = f"construct: lost the process group's store in {what}: {first_line(e)}"
            raise EPPeerError(message, op="construct", phase=what, how="the store cannot be reached") from e

    def close(self) -> None:
        """Nothing is held: the few keys that remain are removed by the next construction over the same group."""

    def _exchange(self, payload: bytes, timeout: float, what: str) -> list[bytes]:
        self._begin()
        base = f"{self._number}/{self._round}"
        self._round += 1
        self._store.set(f"{base}/{self.rank}", what.encode() + b"\0" + payload)
        previous = self._swap_last(base)
        keys = [f"{base}/{r}" for r in range(self.size)]
        start = time.monotonic()
        for _ in pauses(timeout):
            if self._store.check(keys) or self._store.check([f"{base}/verdict"]):
                break
        missing = [r for r, key in enumerate(keys) if not self._store.check([key])]
        mine = {"by": self.rank, "missing": missing, "seconds": round(time.monotonic() - start, 1)}
        verdict = self._decide(base, mine)
        if verdict["missing"]:
            raise self._abandoned(verdict, what)
        received = [self._store.get(key) for key in keys]
        if previous:  # all ranks are in this round, so nobody reads the one before any more
            self._store.delete_key(f"{previous}/{self.rank}")
            if verdict["by"] == self.rank:
                self._store.delete_key(f"{previous}/ticket")
                self._store.delete_key(f"{previous}/verdict")
        steps, payloads = zip(*(m.split(b"\0", 1) for m in received), strict=True)
        if len(set(steps)) > 1:
            values = {self.names[r]: s.decode() for r, s in enumerate(steps)}
            message = f"construct: ranks are at different steps: {values}; build the same buffers in the same order"
            raise EPMismatchError(message, field="step", values=values, op="construct", phase=what)
        return list(payloads)

    def _begin(self) -> None:
        if not self._number:
            self._number = self._store.add(f"count/{self.rank}", 1)
            self._round = 0

    def _swap_last(self, base: str) -> str:
        """Note this round as the last one of this rank, and return the one before."""
        key = f"last/{self.rank}"
        previous = self._store.get(key).decode() if self._store.check([key]) else ""
        self._store.set(key, base)
        return previous

    def _decide(self, base: str, mine: dict[str, Any]) -> dict[str, Any]:
        """The one verdict on a round: this rank's, if it is the first to say something."""
        key = f"{base}/verdict"
        if not self._store.check([key]) and self._store.add(f"{base}/ticket", 1) == 1:
            self._store.set(key, json.dumps(mine))
        for _ in pauses(_MARK_SECONDS):
            if self._store.check([key]):
                break
        else:
            raise RuntimeError("a rank ended while it closed a round of construction")
        decided: dict[str, Any] = json.loads(self._store.get(key))
        return decided

    def _abandoned(self, verdict: dict[str, Any], what: str) -> EPTimeoutError:
        missing, seconds = [self.names[r] for r in verdict["missing"]], verdict["seconds"]
        by = self.names[verdict["by"]]
        if verdict["by"] == self.rank:
            message = f"construct: {name_ranks(missing)} did not come to {what} within {seconds:g} s"
        else:
            message = f"construct: rank {by} gave up on {what} after {seconds:g} s: {name_ranks(missing)} did not come"
        message += "; see why, then build the buffer again on every rank"
        return EPTimeoutError(message, op="construct", phase=what, ranks=missing, seconds=seconds)

    def _channel_key(self) -> str:
        """Where the next channel meets: equal on all ranks, since they open the same ones in the same order."""
        self._begin()
        self._channels += 1
        return f"{self._number}/rows/{self._channels}"

    def _part_key(self, ranks: Sequence[int]) -> str:
        return f"{self._channel_key()}/{'+'.join(map(str, ranks))}"


class TorchCommunicator(_StoreCommunicator):
    """The ranks of any torch process group, sub-groups of the world included.

    Bootstrap uses the group's *store*, rows use a gloo group of their own over the same store. A group without a
    reachable store falls back to ``all_gather_object`` and ``new_group``: then construction cannot name the ranks that
    are missing, and waits as long as that group's own timeout.
    """

    def __init__(self, group: Any, part: tuple[Any, int, Sequence[int]] | None = None) -> None:
        """``part``: of a subset, its store, this rank's position and the names of its ranks."""
        if not dist.is_available():
            raise EPArgumentError.of("group", "a torch build with torch.distributed, or a Communicator", type(group))
        self.group = group
        self.carries_cuda = has_nccl(group, torch.device("cuda"))
        if part is not None:
            store, rank, names = part
            super().__init__(store, rank, len(names), names)
            return
        store = store_of(group)
        super().__init__(store and prefixed("deep_ep_py", store), group.rank(), group.size())

    def session(self) -> TorchCommunicator:
        return TorchCommunicator(self.group)

    def exchange(self, payload: bytes, *, timeout: float, what: str) -> list[bytes]:
        if self._store is not None:
            return super().exchange(payload, timeout=timeout, what=what)
        received: list[Any] = [None] * self.size
        dist.all_gather_object(received, payload, group=self.group)
        return received

    def open_rows(self, *, timeout: float, device: torch.device = CPU) -> RowChannel:
        """Rows in CPU memory over gloo, whatever the group's own backend is. Rows on a GPU over NCCL where the group
        has it for that device, else by way of CPU memory."""
        if device.type != "cpu":
            if self._store is not None and has_nccl(self.group, device):
                store = prefixed(self._channel_key(), self._store)
                return NcclRows.of_store(store, self.rank, self.size, timeout, device)
            return StagedRows(self.open_rows(timeout=timeout), CPU)
        try:
            if self._store is None or not dist.is_gloo_available():
                return TorchRows.of_new_group(self.group, timeout)
            store = prefixed(self._channel_key(), self._store)
            return TorchRows.of_store(store, self.rank, self.size, timeout)
        except RuntimeError as e:
            raise _not_connected(e, timeout, "collective") from e

    def open_pairs(self, *, timeout: float) -> PairChannel:
        """Rows over gloo, one connection for each pair."""
        if self._store is None or not dist.is_gloo_available():
            why = "the group has no store, or this torch has no gloo"
            raise EPBackendUnavailableError(f"hybrid: {why}", reasons={"hybrid": why})
        try:
            return TorchPairs(prefixed(self._channel_key(), self._store), self.rank, self.names, timeout)
        except RuntimeError as e:
            raise _not_connected(e, timeout, "hybrid") from e

    def subset(self, ranks: Sequence[int]) -> TorchCommunicator:
        if self._store is None:
            why = "the group has no store that could be shared out"
            raise EPBackendUnavailableError(f"hybrid: {why}", reasons={"hybrid": why})
        store = prefixed(self._part_key(ranks), self._store)
        return TorchCommunicator(self.group, (store, ranks.index(self.rank), [self.names[r] for r in ranks]))


class ThreadCommunicator(_StoreCommunicator):
    """One of several ranks that are threads of this process; made by :func:`thread_world`."""

    def __init__(self, world: _ThreadStore, rank: int, names: Sequence[int]) -> None:
        super().__init__(world, rank, len(names), names)
        self._world = world

    def session(self) -> ThreadCommunicator:
        return ThreadCommunicator(self._world, self.rank, self.names)

    def open_rows(self, *, timeout: float, device: torch.device = CPU) -> RowChannel:
        meeting = self._world.meeting(self._channel_key(), self.size)
        rows = ThreadRows(meeting, self.rank, self.size, timeout)
        return rows if device.type == "cpu" else StagedRows(rows, CPU)

    def open_pairs(self, *, timeout: float) -> PairChannel:
        meeting = self._world.meeting(self._channel_key(), self.size)
        return ThreadPairs(meeting, self.rank, self.names, timeout)

    def subset(self, ranks: Sequence[int]) -> ThreadCommunicator:
        names = [self.names[r] for r in ranks]
        return ThreadCommunicator(_ThreadPart(self._world, self._part_key(ranks)), ranks.index(self.rank), names)


def thread_world(num_ranks: int) -> list[ThreadCommunicator]:
    """``num_ranks`` communicators of one world, one for each thread that plays a rank."""
    if num_ranks < 1:
        raise EPArgumentError.of("num_ranks", "at least 1", num_ranks)
    world = _ThreadWorld()
    return [ThreadCommunicator(world, rank, range(num_ranks)) for rank in range(num_ranks)]


class _ThreadWorld:
    """What the threads of one world share: an in-process store, and the meeting places of open channels."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, bytes] = {}
        self._meetings: dict[str, ThreadMeeting] = {}

    def set(self, key: str, value: str | bytes) -> None:
        with self._lock:
            self._values[key] = value.encode() if isinstance(value, str) else value

    def get(self, key: str) -> bytes:
        with self._lock:
            return self._values[key]

    def add(self, key: str, amount: int) -> int:
        with self._lock:
            total = int(self._values.get(key, b"0")) + amount
            self._values[key] = str(total).encode()
            return total

    def check(self, keys: list[str]) -> bool:
        with self._lock:
            return all(key in self._values for key in keys)

    def delete_key(self, key: str) -> bool:
        with self._lock:
            return self._values.pop(key, None) is not None

    def meeting(self, key: str, members: int) -> ThreadMeeting:
        """The one meeting of a channel; forgotten here as soon as every member has it."""
        with self._lock:
            meeting = self._meetings.setdefault(key, ThreadMeeting())
            meeting.members += 1
            if meeting.members == members:
                del self._meetings[key]
            return meeting


class _ThreadPart:
    """A view of a world under a prefix."""

    def __init__(self, world: _ThreadStore, prefix: str) -> None:
        self._world = world
        self._prefix = prefix

    def set(self, key: str, value: str | bytes) -> None:
        self._world.set(f"{self._prefix}/{key}", value)

    def get(self, key: str) -> bytes:
        return self._world.get(f"{self._prefix}/{key}")

    def add(self, key: str, amount: int) -> int:
        return self._world.add(f"{self._prefix}/{key}", amount)

    def check(self, keys: list[str]) -> bool:
        return self._world.check([f"{self._prefix}/{key}" for key in keys])

    def delete_key(self, key: str) -> bool:
        return self._world.delete_key(f"{self._prefix}/{key}")

    def meeting(self, key: str, members: int) -> ThreadMeeting:
        return self._world.meeting(f"{self._prefix}/{key}", members)


_ThreadStore = _ThreadWorld | _ThreadPart


def _not_connected(e: RuntimeError, timeout: float, backend: str) -> EPBackendUnavailableError:
    reason = first_line(e)
    message = f"{backend}: torch could not connect the ranks within {timeout:g} s: {reason}"
    return EPBackendUnavailableError(message, reasons={backend: reason})
