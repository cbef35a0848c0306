"""The order of operations of a backend that is written in Python, and what a failure does to it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch

from ..errors import EPArgumentError, EPError, EPMismatchError, EPPeerError, EPTimeoutError
from ..event import CompletionEvent
from ..profiling import Range
from ._worker import Completion, Worker

T = TypeVar("T")


class Refused(Exception):
    """This rank could not take part, and every peer knows."""

    def __init__(self, reason: Exception) -> None:
        super().__init__()
        self.reason = reason


class Order:
    """Runs the steps of one buffer's operations one after the other, some of them in the background.

    Unless all ranks know how a step failed, the state of the exchange is unknown from then on: the buffer is poisoned,
    ``on_poison`` tells the peers, and every later step raises the same error.

    Attributes:
        at: operation, phase and sequence number, for errors that come from below.
        seq: number of the last operation.
    """

    def __init__(self, name: str, rank: int, on_poison: Callable[[EPError], None]) -> None:
        self.at = ("", "", 0)
        self.seq = 0
        self._rank = rank
        self._on_poison = on_poison
        self._worker = Worker(name)
        self._poison: EPError | None = None
        self._closed = False
        self._pid = os.getpid()

    def begin(self, op: str) -> int:
        """The next operation's number."""
        self.seq += 1
        self.at = (op, "notify", self.seq)
        return self.seq

    def enter(self, phase: str) -> None:
        self.at = (self.at[0], phase, self.at[2])

    def check(self) -> None:
        """Raises EPError: nothing can be begun any more. What has been begun before :meth:`close` still runs."""
        if os.getpid() != self._pid:
            raise EPError(f"this buffer belongs to process {self._pid}, and this is its forked child: build one here")
        if self._poison is not None:
            raise copy.copy(self._poison)
        if self._closed:
            raise EPError("this buffer is closed: build a new one")

    def run(self, op: str, step: Callable[[], T], background: bool) -> T:
        """Run a step after all earlier ones, and wait for it."""
        self.check()
        if not background:
            self._worker.drain()
            return self._guarded(step)
        results: list[T] = []
        ended = Completion()
        self.start(op, lambda: results.append(step()), ended)
        try:
            ended.wait()
        except BaseException as e:
            if not ended.done():  # Ctrl-C: the worker is in the middle of something that nobody will finish
                self.poison_by(e)
            raise
        return results[0]

    @property
    def poisoned(self) -> bool:
        return self._poison is not None

    def start(
        self, op: str, step: Callable[[], object], event: CompletionEvent | None, span: Range | None = None
    ) -> None:
        """Run a step now, or after the background operations before it where there is an event to end; then in
        ``span``."""
        if event is None:
            self.run(op, step, background=False)
            return
        assert isinstance(event, Completion)
        self.check()
        inference = torch.is_inference_mode_enabled()

        def job() -> None:
            try:
                with torch.inference_mode(inference), span or nullcontext():
                    self._guarded(step)
            except BaseException as e:
                event.end(e)
            else:
                event.end()

        self._worker.submit(job)

    def give_up(self, why: str) -> None:
        """An operation was begun and will not be finished."""
        if self._poison is None and not self._closed:
            self.poison_by(EPError(why))

    def close(self, release: Callable[[], None]) -> None:
        """Wait for this rank's own operations in flight, then ``release``; peers are not waited for. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if os.getpid() != self._pid:
            return  # a forked child has neither the worker nor the connections
        if self._worker.is_this_thread():
            # A buffer in a reference cycle is collected wherever Python runs, its own operation's thread included.
            self._worker.submit(release)
            return
        self._worker.join()
        release()

    def poison_by(self, e: BaseException) -> None:
        op, phase, seq = self.at
        if isinstance(e, (EPTimeoutError, EPPeerError)):
            e.op, e.phase, e.seq = op, phase, seq
            e.args = (f"{op} (operation {seq}, {phase}): {e}",)
            self._poison = copy.copy(e)
        else:
            message = f"{op} (operation {seq}, {phase}) ended by {type(e).__name__}: {e}; build a new buffer"
            self._poison = EPError(message, op=op, phase=phase, seq=seq, ranks=(self._rank,))
        self._on_poison(self._poison)

    def _guarded(self, step: Callable[[], T]) -> T:
        if self._poison is not None:
            raise copy.copy(self._poison)
        try:
            with torch.no_grad():
                return step()
        except Refused as e:
            raise e.reason from None
        except (EPArgumentError, EPMismatchError):
            raise
        except BaseException as e:
            self.poison_by(e)
            raise
