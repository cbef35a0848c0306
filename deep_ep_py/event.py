"""Events: when an operation that runs in the background is complete. On a CPU "the stream waits" means: we wait."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from .errors import EPArgumentError


class CompletionEvent(Protocol):
    """When an operation is complete. ``wait`` releases the GIL, answers Ctrl-C, and raises the operation's error."""

    def wait(self) -> None: ...

    def done(self) -> bool: ...


class EventHandle:
    """A point in the order of operations. Without an event it is one that has passed."""

    __slots__ = ("__weakref__", "_completion")

    def __init__(self, completion: CompletionEvent | None = None) -> None:
        self._completion = completion

    def current_stream_wait(self) -> None:
        """Return when the operation is complete.

        Raises:
            EPError: what the operation raised in the background.
        """
        if self._completion is not None:
            self._completion.wait()

    @property
    def completion(self) -> CompletionEvent | None:
        """The backend's event, or None for a point that has passed."""
        return self._completion


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
        """Return when the operation is complete, then run the hook, once.

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


def completions(*previous: EventOverlap | EventHandle | None) -> list[CompletionEvent]:
    """The backend events behind ``previous_event`` arguments that are not complete yet.

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
        else:
            found.append(completion)
    return found
