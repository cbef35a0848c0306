"""Rows that stay in a GPU's memory: a channel over an NCCL group of its own.

Part of :mod:`deep_ep_py.communicator`, which opens it.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from ._rows import TorchRows, first_line, peer_error, prefixed
from .errors import EPBackendUnavailableError, EPPeerError, EPTimeoutError

_WATCHDOG_SECONDS = 60.0


def has_nccl(group: Any, device: torch.device) -> bool:
    """Whether ``group`` carries tensors of ``device`` over NCCL."""
    try:
        return str(group._get_backend(device).name()) == "nccl"
    except (AttributeError, RuntimeError):  # not one of torch's groups, or without a backend for such a device
        return False


class NcclRows(TorchRows):
    """See :class:`._rows.RowChannel`, for tensors in a GPU's memory.

    NCCL tells neither who is missing nor, on one host, that a peer has died: an exchange of theirs simply does not end.
    So a wait has a deadline of its own, and watches for the marks of peers that leave. Torch's watchdog would end the
    *process* at the group's deadline, which is therefore a later one. Where NCCL itself reports an error (a connection
    to another host broke), the watchdog acts as ``TORCH_NCCL_ASYNC_ERROR_HANDLING`` says.

    An exchange runs behind the current stream and is complete, for the host too, when the call returns: then nobody's
    memory is read any more, whatever becomes of it.
    """

    _parting_seconds = 2.0

    def __init__(self, group: Any, rank: int, size: int, timeout: float, *, store: Any = None) -> None:
        super().__init__(group, rank, size, timeout, store=store)
        self._patience = timeout

    @classmethod
    def of_store(  # type: ignore[override]
        cls, store: Any, rank: int, size: int, timeout: float, device: torch.device
    ) -> NcclRows:
        """A group that is not in torch's registry, for the reasons of :meth:`._rows.TorchRows.of_store`. Connects.

        Raises:
            EPBackendUnavailableError: NCCL cannot connect the ranks. Two ranks on one GPU are among the reasons, unless
                the user has set ``NCCL_MULTI_RANK_GPU_ENABLE=1`` and NCCL is 2.30 or later.
        """
        from torch.distributed.distributed_c10d import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=2 * timeout + _WATCHDOG_SECONDS)
        rows = None
        try:
            with torch.cuda.device(device):
                rows = cls(
                    ProcessGroupNCCL(prefixed("nccl", store), rank, size, options), rank, size, timeout, store=store
                )
                rows.connect(device)
        except (RuntimeError, EPPeerError, EPTimeoutError) as e:
            if rows is not None:
                rows.close()
            reason = f"NCCL could not connect the ranks: {first_line(e)}"
            raise EPBackendUnavailableError(f"collective: {reason}", reasons={"collective": reason}) from e
        return rows

    def connect(self, device: torch.device) -> None:
        """NCCL connects at the first exchange: not in the user's first operation, whose deadline is another."""
        ones = [1] * self._size
        byte = torch.zeros(self._size, dtype=torch.uint8, device=device)
        self.all_to_all_single(torch.empty_like(byte), byte, ones, ones)

    def close(self) -> None:
        """Never waits for a peer. One may still be in the last exchange of an operation that is complete here: it has
        this rank's part of it, and sees that end (``_parting_seconds``) before it believes the mark."""
        group, self._group = self._group, None
        if group is None:
            return
        failed = self._failure is not None or (self._work is not None and not self._work.is_completed())
        self._failure = self._failure or partial(peer_error, [self._rank], "closed its buffer")
        with suppress(RuntimeError):  # there is nothing more to be done about it
            self._leave()
            if self._board is not None:
                self._board.close()
            if failed:
                group.abort()  # else its kernel would occupy the GPU until the peers come
            else:
                group.shutdown()

    def _conclude(self, work: Any) -> None:
        # Without a timeout it would only make the stream wait, and say nothing of an error.
        work.wait(timedelta(seconds=self._timeout))
