"""Events: when an operation that runs in the background is complete. On a CPU "the stream waits" means: we wait; on a
GPU the stream that is current waits, and the host goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Protocol

import torch

from .errors import EPArgumentError
from .profiling import span
from .traced import untraced


class CompletionEvent(Protocol):
    """When an operation is complete. ``wait`` releases the GIL, answers Ctrl-C, and raises the operation's error."""

    def wait(self) -> None: ...

    def done(self) -> bool: ...


class StreamEvent:
    """The point that a CUDA stream has reached, as a :class:`CompletionEvent`.

    Args:
        stream: torch.cuda.Stream; None: the current one.
        keep: tensors that live as long as this event.
    """

    __slots__ = ("__weakref__", "_event", "_keep")

    def __init__(self, stream: Any = None, keep: Sequence[torch.Tensor] = ()) -> None:
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream() if stream is None else stream)
        self._keep = keep

    def wait(self) -> None:
        """What is queued on the current stream from now on runs behind it; the host goes on."""
        torch.cuda.current_stream(self._event.device).wait_event(self._event)

    def wait_on_host(self) -> None:
        """Return when the stream has come there."""
        self._event.synchronize()

    def done(self) -> bool:
        """Whether the stream has come there. Never while a CUDA graph is captured: an event may not be asked then."""
        return not torch.cuda.is_current_stream_capturing() and bool(self._event.query())


@untraced
class EventHandle:
    """A point in the order of operations. Without an event it is the present one: of the current CUDA stream in a
    program that uses CUDA; elsewhere it has passed. ``report``: called with what a wait raises."""

    __slots__ = ("__weakref__", "_completion", "_report")

    def __init__(
        self, completion: CompletionEvent | None = None, report: Callable[[BaseException], None] | None = None
    ) -> None:
        self._report = report
        if completion is None and torch.cuda.is_initialized():
            completion = StreamEvent()
        self._completion = completion

    def current_stream_wait(self) -> None:
        """Return when the operation is complete; on a GPU at once, and the current stream waits.

        Raises:
            EPError: what the operation raised in the background.
        """
        if self._completion is None:
            return
        try:
            with span("wait"):
                self._completion.wait()
        except BaseException as e:
            if self._report is not None:
                self._report(e)
            raise

    @property
    def completion(self) -> CompletionEvent | None:
        """The backend's event, or None for a point that has passed."""
        return self._completion

    def __repr__(self) -> str:
        done = self._completion is None or self._completion.done()
        return f"<EventHandle: {'done' if done else 'not done'}>"


@untraced
class EventOverlap:
    """An event with what must live until it, and a context that waits at its end.

    Args:
        event: the event, or None for a synchronous call, which is complete.
        extra_tensors: kept alive as long as this object.
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[Any, ...] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self._release_at_exit = False
        self._hook: Callable[[], Any] | None = None

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Return when the operation is complete (on a GPU: the current stream waits), then run the hook, once.

        Args:
            release_handle: drop the event and the extra tensors afterwards.
        """
        assert self.event is not None, "current_stream_wait() of a synchronous call: it has no event"
        self.event.current_stream_wait()
        if release_handle:
            self.event = None
            self.extra_tensors = None
        hook, self._hook = self._hook, None
        if hook is not None:
            hook()

    def register_hook_after_wait(self, hook: Callable[[], Any]) -> None:
        """Run ``hook()`` once, after the next wait. One hook at a time."""
        assert self._hook is None, "a hook is registered already; wait first"
        self._hook = hook

    def __repr__(self) -> str:
        return f"<EventOverlap: {self.event or 'no event'}>"

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        self._release_at_exit = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.event is not None:
            self.current_stream_wait(self._release_at_exit)


def completions(*previous: EventOverlap | EventHandle | None, streams: bool = False) -> list[CompletionEvent]:
    """The backend events behind ``previous_event`` arguments that are not complete yet.

    Args:
        streams: the operation is one of a stream. An operation of the host waits for streams' events here.

    Raises:
        EPArgumentError: not an event.
        EPError: what an operation raised that is complete.
    """
    found = []
    for event in previous:
        handle = event.event if isinstance(event, EventOverlap) else event
        if handle is None:
            continue
        if not isinstance(handle, EventHandle):
            raise EPArgumentError.of("previous_event", "an EventOverlap, an EventHandle or None", repr(event))
        completion = handle.completion
        if completion is None:
            continue
        if completion.done():
            completion.wait()
        elif not streams and isinstance(completion, StreamEvent):
            completion.wait_on_host()
        else:
            found.append(completion)
    return found


def behind(
    event: EventOverlap, stream: Any, work: Callable[[], Sequence[torch.Tensor]], uses: Sequence[torch.Tensor] = ()
) -> Sequence[torch.Tensor]:
    """``work()``, which reads what an operation delivers, done in order behind it.

    A synchronous call's results are in order with the current stream. Those of a background call are not there yet:
    the work then joins the stream on which rows move, and ``event`` covers it too.

    Args:
        stream: torch.cuda.Stream of the operation. uses: tensors that the work reads or writes.

    Returns:
        The tensors that the work made.
    """
    if event.event is None or not isinstance(event.event.completion, StreamEvent):
        return work()
    current = torch.cuda.current_stream(stream.device)
    with torch.cuda.stream(stream):
        made = work()
    # Each lives on two streams now, and torch must not give its memory away before both are done with it.
    for tensor in uses:
        tensor.record_stream(stream)
    for tensor in made:
        tensor.record_stream(current)
    event.event = EventHandle(StreamEvent(stream))
    return made


# A node of an autograd graph whose gradient is on the CPU is run in the thread that called backward, on whatever stream
# is current there; that of a CUDA tensor gets its forward pass's stream. What the former makes on a GPU is read by the
# latter, so it has to be made on that stream too.


def stream_of(tensor: torch.Tensor) -> Any:
    """The current stream of the tensor's GPU; None on a CPU."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def on_stream(stream: Any) -> AbstractContextManager[Any]:
    """Inside, ``stream`` is the current one; nothing changes for None."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)
