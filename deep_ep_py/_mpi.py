"""MPI: the ranks of an mpi4py communicator, their bootstrap messages, and a channel that carries rows between them.

Part of :mod:`deep_ep_py.communicator`. mpi4py is never imported here: whoever passes a communicator has done so.

Each user communicator gets one duplicate, so that nothing here meets the user's messages. It is made by the first
construction, kept as an MPI attribute of the user's communicator, shared by all buffers over it, and lives until
``MPI_Finalize``: ``MPI_Comm_free`` is collective, and closing a buffer must not be. Every channel has a tag of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ._mpi_duplicate import HEADER, Duplicate
from ._rows import (
    CPU,
    ExitWatch,
    RowChannel,
    StagedRows,
    abandoned,
    as_bytes,
    first_line,
    pauses,
    peer_error,
    timeout_error,
)
from .errors import EPArgumentError, EPBackendUnavailableError, EPMismatchError, EPPeerError, EPTimeoutError

__all__ = ["MpiCommunicator", "MpiRows", "is_mpi", "mpi_communicator"]

_PAYLOAD, _WORD, _LEFT = range(3)  # parts of a round; and the notice that a rank left a channel
_LOOK_SECONDS = 0.25  # how often a wait looks whether a peer has left
_SPIN_SECONDS = 1e-4  # how long a wait polls before it sleeps
_MAKING = threading.Lock()

Failure = Callable[[], EPPeerError | EPTimeoutError]


def is_mpi(comm: object) -> bool:
    """Whether ``comm`` is an mpi4py communicator."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and isinstance(comm, mpi.Comm)


def mpi_communicator(comm: Any) -> MpiCommunicator:
    """A new session over ``comm``. Local: the duplicate is made by the first ``exchange``.

    Raises:
        EPArgumentError: ``comm`` is no intracommunicator that this rank is a member of.
        EPBackendUnavailableError: MPI is not initialised, or was not initialised with ``MPI.THREAD_MULTIPLE``.
    """
    mpi: Any = sys.modules.get("mpi4py.MPI")
    if not is_mpi(comm) or comm == mpi.COMM_NULL:
        got = "MPI.COMM_NULL" if is_mpi(comm) else f"{type(comm).__name__} ({comm!r})"
        raise EPArgumentError.of("comm", "an mpi4py communicator that this rank is a member of", got)
    if not mpi.Is_initialized() or mpi.Is_finalized():
        raise _unavailable("MPI is not initialised (or finalised already); mpi4py does it when MPI is imported")
    if mpi.Query_thread() < mpi.THREAD_MULTIPLE:
        raise _unavailable(
            "operations in the background call MPI from other threads, and MPI was not initialised with "
            "MPI.THREAD_MULTIPLE; mpi4py asks for it unless mpi4py.rc.thread_level says otherwise"
        )
    if comm.Is_inter():
        raise EPArgumentError.of("comm", "an intracommunicator", "an intercommunicator; merge it with comm.Merge()")
    with _MAKING:
        duplicate = comm.Get_attr(_keyval(mpi))
        if duplicate is None:
            duplicate = Duplicate(mpi, comm)
            comm.Set_attr(_keyval(mpi), duplicate)
    return MpiCommunicator(duplicate, range(duplicate.size))


@functools.cache
def _keyval(mpi: Any) -> int:
    """The key of our attribute: a constant of the process like MPI's own keys, but MPI gives it out at run time."""
    return int(mpi.Comm.Create_keyval())


class MpiCommunicator:
    """The ranks of an mpi4py communicator, or some of them: a :class:`.communicator.Communicator`.

    A round of ``exchange`` is everyone's payload to everyone, then a word from everyone: that it has all payloads, or
    that it gave up and for whom it waited. Retries: ranks count their constructions, each counts one on where an
    exchange fails, and what a peer sent for a failed one is thrown away, so ranks that try again meet as soon as all
    have failed equally often; who comes late to a round that others gave up fails at once and catches up.

    The first exchange over a communicator makes the duplicate, by nonblocking collectives on the user's communicator
    that stay pending where a rank does not come. A retry continues them; until it has succeeded on every rank, no rank
    may call another collective over that communicator. MPI offers no way out of a rank that died: depending on the
    library, the job is aborted by the launcher, or all later calls over that communicator raise.
    """

    carries_cuda = False

    def __init__(self, duplicate: Duplicate, members: Sequence[int]) -> None:
        self._duplicate = duplicate
        self._members = tuple(members)  # rank -> rank in the duplicate
        self.rank = self._members.index(duplicate.rank)
        self.size = len(self._members)
        self._digest = hashlib.blake2b(repr(self._members).encode(), digest_size=16).digest()
        self._number = 0
        self._round = 0

    def session(self) -> MpiCommunicator:
        return MpiCommunicator(self._duplicate, self._members)

    def subset(self, ranks: Sequence[int]) -> MpiCommunicator:
        """These ranks only, after an exchange between all. Local; errors name the ranks of the user's communicator."""
        return MpiCommunicator(self._duplicate, [self._members[r] for r in ranks])

    def exchange(self, payload: bytes, *, timeout: float, what: str) -> list[bytes]:
        start = time.monotonic()
        try:
            self._duplicate.connect(timeout, what)
            if not self._number:
                self._number, self._round = self._duplicate.begin(self._digest), 0
            received = self._meet(what.encode() + b"\0" + payload, start, timeout, what)
            self._round += 1
        except BaseException as e:  # Ctrl-C too: this construction is over, the next exchange begins another one
            self._give_up(e, time.monotonic() - start)
            if isinstance(e, self._duplicate.mpi.Exception):
                message = f"construct: MPI failed in {what}: {first_line(e)}"
                raise EPPeerError(message, op="construct", phase=what, how=first_line(e)) from e
            raise
        steps, payloads = zip(*(m.split(b"\0", 1) for m in received), strict=True)
        if len(set(steps)) > 1:
            self._number = 0
            values = {member: s.decode() for member, s in zip(self._members, steps, strict=True)}
            message = f"construct: ranks are at different steps: {values}; build the same buffers in the same order"
            raise EPMismatchError(message, field="step", values=values, op="construct", phase=what)
        return list(payloads)

    def open_rows(self, *, timeout: float, device: torch.device = CPU) -> RowChannel:
        """Rows on a GPU travel by way of CPU memory: not every MPI library can read theirs."""
        rows = self.open_pairs(timeout=timeout)
        return rows if device.type == "cpu" else StagedRows(rows, CPU)

    def open_pairs(self, *, timeout: float) -> MpiRows:
        """Agree on a tag that none of the ranks has used: failed constructions may have drawn unequal numbers."""
        proposed = self.exchange(b"%d" % self._duplicate.next_tag, timeout=timeout, what="rows over MPI")
        tag = max(map(int, proposed))
        if tag > self._duplicate.last_tag:
            raise _unavailable(f"all {self._duplicate.last_tag} tags of this MPI library are used up; restart the job")
        self._duplicate.next_tag = tag + 1
        return MpiRows(self._duplicate, self._members, self.rank, tag, timeout)

    def close(self) -> None:
        """Nothing is held; the duplicate serves the next buffers."""

    def _meet(self, message: bytes, start: float, timeout: float, what: str) -> list[bytes]:
        payload_key, word_key = self._key(_PAYLOAD), self._key(_WORD)
        payloads = self._gather(payload_key, message, word_key, start, timeout, what)
        # A rank that left now might never call MPI again, and what it has yet to send would not travel.
        self._gather(word_key, b"", word_key, start, timeout, what)
        return payloads

    def _gather(
        self, key: bytes, message: bytes, word_key: bytes, start: float, timeout: float, what: str
    ) -> list[bytes]:
        """Send ``message`` to all and wait for theirs; a word with a text in it ends the round."""
        mail = self._duplicate
        mail.post(self._members, key, message)
        for _ in pauses(timeout - (time.monotonic() - start)):
            mail.poll()
            arrived, words = mail.look(key), mail.look(word_key)
            for member in self._members:
                if words.get(member):
                    raise abandoned(what, by=member, **json.loads(words[member]))
            missing = [member for member in self._members if member not in arrived]
            if not missing:
                mail.forget(key)
                return [arrived[member] for member in self._members]
        raise abandoned(what, missing=missing, seconds=time.monotonic() - start)

    def _give_up(self, error: BaseException, seconds: float) -> None:
        """Tell the peers, as far as MPI still carries it, and take no more mail for this construction."""
        if not self._number:
            return
        missing = list(getattr(error, "ranks", ())) or [self._duplicate.rank]
        word = json.dumps({"missing": missing, "seconds": round(seconds, 1)}).encode()
        key, self._number = self._key(_WORD), 0
        self._duplicate.abandon(key)
        with contextlib.suppress(self._duplicate.mpi.Exception):
            self._duplicate.post(self._members, key, word)

    def _key(self, part: int) -> bytes:
        return HEADER.pack(self._digest, self._number, self._round, part)


class MpiRows:
    """Rows by ``MPI_Isend`` and ``MPI_Irecv``: a :class:`.communicator.RowChannel` and a :class:`._pairs.PairChannel`.

    Messages carry the channel's tag and keep their order between two ranks, so transfers need no number.
    """

    piece_bytes = 1 << 30  # of one message: MPI counts are C ints

    def __init__(self, duplicate: Duplicate, members: Sequence[int], rank: int, tag: int, timeout: float) -> None:
        self.timeout = timeout
        self.waited = [0.0] * len(members)
        self.failure: Failure | None = None
        self._duplicate = duplicate
        self._members = members
        self._rank = rank
        self._tag = tag
        self._under_way: list[MpiTransfer] = []

    def start(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> MpiTransfer:
        if self.failure is not None:
            raise self.failure()
        comm, mpi, size = self._duplicate.comm, self._duplicate.mpi, len(self._members)
        # Listed before its first message, so that whatever interrupts this, memory that MPI knows stays alive.
        transfer = MpiTransfer(self, mpi, (list(outputs), list(inputs)))
        self._under_way.append(transfer)
        try:
            for offset in range(1, size):  # receives first; every rank begins with another peer
                peer = (self._rank - offset) % size
                for piece in self._pieces(outputs[peer]):
                    request = comm.Irecv([piece, mpi.BYTE], source=self._members[peer], tag=self._tag)
                    transfer.pending.append((peer, request, True))
            for offset in range(1, size):
                peer = (self._rank + offset) % size
                for piece in self._pieces(inputs[peer]):
                    request = comm.Isend([piece, mpi.BYTE], dest=self._members[peer], tag=self._tag)
                    transfer.pending.append((peer, request, False))
        except mpi.Exception as e:
            raise self.fail(partial(peer_error, [self._members[peer]], first_line(e))) from e
        return transfer

    def all_to_all_single(
        self, output: torch.Tensor, input: torch.Tensor, output_splits: list[int], input_splits: list[int]
    ) -> None:
        targets, sources = as_bytes(output).split(output_splits), as_bytes(input).split(input_splits)
        transfer = self.start(targets, sources)
        targets[self._rank].copy_(sources[self._rank])
        transfer.wait()

    def close(self) -> None:
        mpi = self._duplicate.mpi
        if not mpi.Is_finalized():
            for transfer in list(self._under_way):
                transfer.done()  # it may have, unnoticed
        if self._under_way and self.failure is None and not mpi.Is_finalized():
            with contextlib.suppress(mpi.Exception):
                self._duplicate.post(self._members, self._left_key(), b"")
        self.fail(partial(peer_error, [self._members[self._rank]], "closed its buffer"))
        while self._under_way:
            self._under_way.pop().abandon()

    def fail(self, failure: Failure) -> EPPeerError | EPTimeoutError:
        """The channel is broken, by this unless it was already."""
        self.failure = self.failure or failure
        return self.failure()

    def finished(self, transfer: MpiTransfer) -> None:
        if transfer in self._under_way:
            self._under_way.remove(transfer)

    def name(self, peers: Iterable[int]) -> list[int]:
        """What errors call them: by their ranks in the user's communicator."""
        return [self._members[peer] for peer in sorted(set(peers))]

    def who_left(self) -> list[int]:
        """The ranks that closed their end with a transfer under way, as errors call them."""
        self._duplicate.poll()
        return sorted(self._duplicate.look(self._left_key()))

    def _left_key(self) -> bytes:
        return HEADER.pack(b"", self._tag, 0, _LEFT)

    def _pieces(self, rows: torch.Tensor) -> Iterator[Any]:
        flat = as_bytes(rows.detach()).reshape(-1)
        for first in range(0, flat.numel(), self.piece_bytes):
            yield flat[first : first + self.piece_bytes].numpy()


class MpiTransfer:
    """Rows on their way through one channel: a :class:`._pairs.Transfer`."""

    def __init__(self, channel: MpiRows, mpi: Any, tensors: tuple[list[torch.Tensor], list[torch.Tensor]]) -> None:
        self.pending: list[tuple[int, Any, bool]] = []  # peer, request, whether it receives
        self._channel = channel
        self._mpi = mpi
        self._tensors = tensors

    def done(self) -> bool:
        if self._channel.failure is None:
            self._test()
        return not self.pending or self._channel.failure is not None

    def wait(self) -> None:
        channel, exiting = self._channel, ExitWatch()
        begin = last = time.monotonic()
        look = begin + _LOOK_SECONDS
        for _ in _polls(channel.timeout):
            if self.done():
                break
            missing = {peer for peer, _, _ in self.pending}
            now = time.monotonic()
            for peer in missing:
                channel.waited[peer] += now - last
            last = now
            if exiting():
                channel.fail(partial(peer_error, channel.name(missing), "not there at the interpreter's exit"))
            elif now > look:
                look = now + _LOOK_SECONDS
                if gone := [name for name in channel.who_left() if name in channel.name(missing)]:
                    channel.fail(partial(peer_error, gone, "left in the middle of an operation"))
        if self.pending:
            missing = {peer for peer, _, _ in self.pending}
            raise channel.fail(partial(timeout_error, channel.name(missing), channel.timeout))

    def abandon(self) -> None:
        """Break off what can be broken off without a peer. The memory of the rest stays: MPI may still use it."""
        if not self._mpi.Is_finalized():
            for _, request, receives in self.pending:
                with contextlib.suppress(self._mpi.Exception):
                    if receives and not request.Test():
                        request.Cancel()  # local, by the standard; a send may need its peer for that
            with contextlib.suppress(self._mpi.Exception):
                if self._mpi.Request.Testall([request for _, request, _ in self.pending]):
                    return
        ctypes.pythonapi.Py_IncRef(ctypes.py_object((self.pending, self._tensors)))

    def _test(self) -> None:
        """One by one, so that a request that failed tells whose it was; completed ones are null and test true."""
        still = []
        for peer, request, receives in self.pending:
            try:
                if request.Test():
                    continue
            except self._mpi.Exception as e:
                self._channel.fail(partial(peer_error, self._channel.name([peer]), first_line(e)))
            still.append((peer, request, receives))
        self.pending = still
        if not still:
            self._channel.finished(self)


def _polls(timeout: float) -> Iterator[None]:
    spun = time.monotonic() + min(_SPIN_SECONDS, timeout)
    while time.monotonic() < spun:
        yield
        time.sleep(0)
    yield from pauses(timeout, first=2e-5, longest=1e-3)


def _unavailable(reason: str) -> EPBackendUnavailableError:
    return EPBackendUnavailableError(f"MPI: {reason}", reasons={"mpi": reason})
