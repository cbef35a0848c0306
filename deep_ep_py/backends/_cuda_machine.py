"""One GPU as torch sees it: the communication stream, what waits for what, and tensors in memory that peers map.

Order. Everything of a buffer runs on its communication stream, in call order. An operation begins there after the
caller's stream has come to the call (or, with ``on_comm_stream``, after the events that were given), and a caller's
stream goes on after it, at once or where the event is waited for.

Lifetime. Tensors in the heap are ordinary tensors of torch's caching allocator, in a pool whose segments come from the
library (``CUDAPluggableAllocator``), so torch decides when memory is used again. It is offered to peers only by a later
operation, on a stream that has waited for what the memory's own stream had queued by then: whoever read the old tensor
is done. Streams that torch does not know to use a tensor are told to it (``record_stream``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import _C
from ..errors import EPError
from ..event import CompletionEvent, StreamEvent
from . import _cuda_library as library

Empty = Callable[[Sequence[int], torch.dtype], torch.Tensor]


@cache
def _allocator(file: Path) -> Any:
    """Kept for the life of the process: pools hold its address, and may outlive whoever made them."""
    return torch.cuda.memory.CUDAPluggableAllocator(str(file), library.ALLOCATE, library.FREE)


class Machine:
    """See the module. Not shared by buffers.

    Raises:
        EPError: the caller's stream is being captured; a buffer maps its peers' memory, which a graph cannot repeat.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if torch.cuda.is_current_stream_capturing():
            raise EPError(
                "a buffer cannot be constructed while a CUDA graph is captured: it meets the other ranks and maps their"
                " memory, which a replay would not repeat. Construct it, and call each operation once, before the"
                " capture"
            )
        self.library = library.opened(library.path())
        self.index: int = device.index
        with torch.cuda.device(device):
            self.comm_stream = torch.cuda.Stream(device, priority=-1)
            # Of no capture: what is allocated here never lands in a graph's own pool, which peers cannot map.
            self._outside = torch.cuda.Stream(device)
            self._pool = torch.cuda.MemPool(_allocator(library.path()).allocator())
        self._captured: list[torch.Tensor] = []

    @property
    def stream(self) -> int:
        """The communication stream's number."""
        number: int = self.comm_stream.cuda_stream
        return number

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def heap(self, engine: _C.CudaEngine, *, on_comm_stream: bool) -> Iterator[Empty]:
        """A function that makes tensors in the heap; at the end the communication stream waits for whoever used that
        memory before. What is made while capturing lives as long as the buffer, since replays write to it."""
        capturing = self.capturing()
        stream = self._outside if capturing else self.comm_stream if on_comm_stream else None

        def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            tensor = torch.empty(tuple(shape), dtype=dtype, device=self.device)
            if capturing:
                self._captured.append(tensor)
            return tensor

        engine.enter_heap()
        try:
            with torch.cuda.stream(stream), torch.cuda.use_mem_pool(self._pool, self.device):
                yield empty
        finally:
            engine.leave_heap()
        if stream is None:
            self.comm_stream.wait_stream(torch.cuda.current_stream(self.device))

    @contextmanager
    def on_comm_stream(self) -> Iterator[None]:
        """What torch launches inside runs there."""
        with torch.cuda.stream(self.comm_stream):
            yield

    def begin(self, previous: Sequence[CompletionEvent], *, on_comm_stream: bool) -> None:
        """The operation's place in the order: see the module."""
        if not on_comm_stream or not previous:
            self.comm_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.comm_stream):
            for event in previous:
                event.wait()

    def end(self, uses: Sequence[torch.Tensor | None], *, background: bool) -> CompletionEvent | None:
        """The operation is launched; ``uses``: all its tensors. With ``background`` the caller waits for the event."""
        current = torch.cuda.current_stream(self.device)
        if not background:
            current.wait_stream(self.comm_stream)
            return None
        for tensor in uses:
            if tensor is not None:
                tensor.record_stream(self.comm_stream)
                tensor.record_stream(current)
        return StreamEvent(self.comm_stream)

    def close(self) -> None:
        self._captured.clear()
