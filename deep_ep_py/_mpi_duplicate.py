"""What all buffers over one MPI communicator share: a duplicate of it, and the bootstrap messages on that.

Part of :mod:`._mpi`.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Any

from ._rows import abandoned, pauses

MAIL_TAG = 0  # bootstrap messages; channels take the tags above
HEADER = struct.Struct("<16sQIB")  # members' digest or zeros, construction or tag, round, part


class Duplicate:
    """Of one user communicator, whose MPI attribute it is. Mail is filed by its header and its source."""

    def __init__(self, mpi: Any, user: Any) -> None:
        self.mpi = mpi
        self.comm: Any = None  # the duplicate
        self.rank: int = user.Get_rank()
        self.size: int = user.Get_size()
        self.next_tag = MAIL_TAG + 1
        self.last_tag: int = user.Get_attr(mpi.TAG_UB) or 32767
        self._user = user
        self._roll: list[Any] = []  # by rank: the request that completes when that rank has come
        self._idup: tuple[Any, Any] | None = None
        self._lock = threading.Lock()  # over what follows; nothing under it waits
        self._begun: dict[bytes, int] = {}  # members -> constructions
        self._mail: dict[bytes, dict[int, bytes]] = {}  # header -> source -> body
        self._over: set[bytes] = set()  # constructions that failed here
        self._arriving: list[tuple[int, bytearray, Any]] = []
        self._leaving: list[Any] = []

    def connect(self, timeout: float, what: str) -> None:
        """Make the duplicate, or go on with it. Collective over the user's communicator.

        MPI_Comm_idup alone could not say who is missing, and point-to-point messages could meet the user's. So every
        rank first scatters a byte to all, nonblocking: that of rank r completes as soon as r has come.
        """
        if self.comm is not None:
            return
        while len(self._roll) < self.size:
            root, byte = len(self._roll), self.mpi.BYTE
            outgoing = [bytes(self.size), ([1] * self.size, range(self.size)), byte] if root == self.rank else None
            self._roll.append(self._user.Iscatterv(outgoing, [bytearray(1), byte], root))
        for _ in pauses(timeout):
            if self._joined():
                return
        missing = [r for r, request in enumerate(self._roll) if r != self.rank and not request.Test()]
        raise abandoned(what, missing=missing, seconds=timeout)

    def _joined(self) -> bool:
        if self._idup is None:
            if not self.mpi.Request.Testall(self._roll):
                return False
            self._idup = self._user.Idup()
        comm, request = self._idup
        if not request.Test():
            return False
        comm.Set_errhandler(self.mpi.ERRORS_RETURN)
        self.comm, self._user = comm, None
        return True

    def begin(self, members: bytes) -> int:
        with self._lock:
            self._begun[members] = self._begun.get(members, 0) + 1
            return self._begun[members]

    def post(self, members: Sequence[int], key: bytes, body: bytes) -> None:
        """Send to all ``members``, and file it here as the others will."""
        with self._lock:
            for member in members:
                if member == self.rank:
                    self._file(member, key + body)
                else:
                    self._leaving.append(self.comm.Isend([key + body, self.mpi.BYTE], dest=member, tag=MAIL_TAG))

    def poll(self) -> None:
        """Take what has come."""
        with self._lock:
            status = self.mpi.Status()
            while message := self.comm.Improbe(tag=MAIL_TAG, status=status):
                body = bytearray(status.Get_count(self.mpi.BYTE))
                self._arriving.append((status.Get_source(), body, message.Irecv([body, self.mpi.BYTE])))
            arriving, self._arriving = self._arriving, []
            for source, body, request in arriving:
                if request.Test():
                    self._file(source, bytes(body))
                else:
                    self._arriving.append((source, body, request))
            self._leaving = [request for request in self._leaving if not request.Test()]

    def look(self, key: bytes) -> dict[int, bytes]:
        with self._lock:
            return dict(self._mail.get(key, {}))

    def forget(self, key: bytes) -> None:
        with self._lock:
            self._mail.pop(key, None)

    def abandon(self, key: bytes) -> None:
        """Drop all mail of this key's construction, now and later."""
        with self._lock:
            self._over.add(_construction(key))
            self._mail = {k: mail for k, mail in self._mail.items() if _construction(k) not in self._over}

    def _file(self, source: int, message: bytes) -> None:
        key, body = message[: HEADER.size], message[HEADER.size :]
        if _construction(key) not in self._over:
            self._mail.setdefault(key, {})[source] = body


def _construction(key: bytes) -> bytes:
    return key[:24]  # members and number
