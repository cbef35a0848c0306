"""One GPU as torch sees it: the communication stream, what waits for what, and tensors in memory that peers map.

Order. Everything of a buffer runs on its communication stream, in call order. An operation begins there after all that
the caller's stream had queued, and after the events that it was given; a caller's stream goes on after it, at once or
where the event is waited for. What an operation allocates on the caller's stream is allocated before that wait, so
whatever torch queues for it there (deterministic mode fills new memory) comes first, too.

Lifetime. Tensors in the heap are ordinary tensors of torch's caching allocator, in a pool whose segments come from the
library (``CUDAPluggableAllocator``), so torch decides when memory is used again. It is offered to peers only by a later
operation, on a stream that has waited for what the memory's own stream had queued by then: whoever read the old tensor
is done. Streams that torch does not know to use a tensor are told to it (``record_stream``).
"""

from __future__ import annotations

import threading
import time
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


#: Ranks that are threads construct at once, and must get one allocator.
_once = threading.Lock()


class Machine:
    """See the module. Not shared by buffers.

    Raises:
        EPError: the caller's stream is being captured (a buffer maps its peers' memory, which a graph cannot repeat);
            or this torch cannot keep one thread's allocations in a pool.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if not hasattr(torch._C, "_cuda_beginAllocateCurrentThreadToPool"):
            raise EPError(f"torch {torch.__version__} has no memory pools of one thread; 2.8 or later has them")
        if torch.cuda.is_current_stream_capturing():
            raise EPError(
                "a buffer cannot be constructed while a CUDA graph is captured: it meets the other ranks and maps their"
                " memory, which a replay would not repeat. Construct it, and call each operation once, before the"
                " capture"
            )
        self.library = library.opened(library.path())
        self.index: int = device.index
        with torch.cuda.device(device), _once:
            self.comm_stream = torch.cuda.Stream(device, priority=-1)
            # Of no capture: what is allocated here never lands in a graph's own pool, which peers cannot map.
            self._outside = torch.cuda.Stream(device)
            allocator = _allocator(library.path()).allocator()
            self._pool: Any = torch.cuda.MemPool(allocator)
            # What replays write to. Captures alone reuse it, in their order, as graphs that share a pool of torch's do.
            self._captured: Any = torch.cuda.MemPool(allocator)

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
        memory before.

        Raises (the function):
            torch.OutOfMemoryError: also after torch gave its cached memory back. EPError: torch took another pool.
        """
        capturing = self.capturing()
        stream = self._outside if capturing else self.comm_stream if on_comm_stream else None
        pool = self._captured if capturing else self._pool

        def allocate(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            engine.enter_heap()
            try:
                with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool, self.device):
                    return torch.empty(tuple(shape), dtype=dtype, device=self.device)
            finally:
                engine.leave_heap()

        def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            try:
                tensor = allocate(shape, dtype)
            except torch.OutOfMemoryError:
                if capturing:
                    raise
                # Inside a pool torch does not look at what it has cached outside.
                torch.cuda.empty_cache()
                tensor = allocate(shape, dtype)
            if tensor.numel() > 0 and not engine.in_heap(data=tensor.data_ptr(), bytes=tensor.nbytes):
                raise EPError(
                    "torch allocated outside of this buffer's heap: another memory pool is in use around this call"
                    " (torch.cuda.use_mem_pool, CUDA graph trees), or its caching allocator is replaced or off"
                )
            return tensor

        yield empty
        if stream is None:
            self.comm_stream.wait_stream(torch.cuda.current_stream(self.device))

    @contextmanager
    def on_comm_stream(self) -> Iterator[None]:
        """What torch launches, or allocates, inside is of that stream."""
        with torch.cuda.stream(self.comm_stream):
            yield

    def begin(self, previous: Sequence[CompletionEvent]) -> None:
        """The operation's place in the order: see the module."""
        self.comm_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.comm_stream):
            for event in previous:
                event.wait()

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Between `begin` and `end`. Where it fails the caller's stream waits for what was launched, so that memory is
        not used again under it, and a capture can end."""
        try:
            yield
        except BaseException:
            torch.cuda.current_stream(self.device).wait_stream(self.comm_stream)
            raise

    def end(
        self, uses: Sequence[torch.Tensor | None], *, background: bool, on_comm_stream: bool
    ) -> CompletionEvent | None:
        """The operation is launched; ``uses``: all its tensors. With ``background`` the caller waits for the event."""
        current = torch.cuda.current_stream(self.device)
        if background or on_comm_stream:
            for tensor in uses:
                if tensor is not None:
                    tensor.record_stream(self.comm_stream)
                    tensor.record_stream(current)
        if background:
            return StreamEvent(self.comm_stream)
        current.wait_stream(self.comm_stream)
        return None

    def drain(self, seconds: float) -> None:
        """Wait on the host until all that was launched is done, or so long."""
        if self.capturing():
            return
        event, end = self.comm_stream.record_event(), time.monotonic() + seconds
        while not event.query() and time.monotonic() < end:
            time.sleep(1e-4)

    def close(self) -> None:
        """Tensors keep their memory."""
        self._pool = self._captured = None
