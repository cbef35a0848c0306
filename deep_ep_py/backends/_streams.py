"""The one place where a backend that is written in Python knows of CUDA streams: when its work may begin, and when it
is complete. On a CPU there is nothing to order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Turn:
    """The turn of one operation; made in the thread that calls. On a CPU: no streams."""

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """What runs inside runs behind what the caller had enqueued; in any thread."""
        yield

    def lend(self, tensors: Iterable[torch.Tensor | None]) -> None:
        """These were made in :meth:`on_stream` and go to the caller."""

    def finish(self) -> None:
        """The host waits until what was done on the stream is complete."""


class Streams:
    """Of one backend. On a CPU: none.

    Attributes:
        comm_stream: the torch.cuda.Stream on which rows move, or None.
    """

    comm_stream: Any = None

    def turn(self) -> Turn:
        """Behind what the calling thread has enqueued."""
        return Turn()

    def refusal(self) -> str:
        """Why the calling thread's stream can take no operation now; empty where it can."""
        return ""


class CudaStreams(Streams):
    """A communication stream beside the caller's."""

    def __init__(self, device: torch.device) -> None:
        self.comm_stream = torch.cuda.Stream(device)

    def turn(self) -> Turn:
        return _CudaTurn(self.comm_stream)

    def refusal(self) -> str:
        if not torch.cuda.is_current_stream_capturing():
            return ""
        return (
            "a CUDA graph is being captured, and this backend's operations are the host's: call it outside of a capture"
        )


class _CudaTurn(Turn):
    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._caller = torch.cuda.current_stream(stream.device)
        self._ready = self._caller.record_event()

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._ready)
            yield

    def lend(self, tensors: Iterable[torch.Tensor | None]) -> None:
        # They come from the memory of the communication stream, and are freed by whoever uses them on another.
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(self._caller)

    def finish(self) -> None:
        # Nothing of an operation outlives it on the device, so its inputs may be freed, and events need no stream.
        self._stream.synchronize()


def streams_of(device: torch.device) -> Streams:
    return Streams() if device.type == "cpu" else CudaStreams(device)
