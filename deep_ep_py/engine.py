"""Opens a backend for a face, runs the halves of its operations in call order, and makes failures everybody's."""

from __future__ import annotations

import json
import os
import platform
import secrets
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .backends._ranges import RangedBackend
from .backends._routing import on_host
from .backends.base import Backend, Mover, Statistics
from .choice import BACKENDS, Construction, device_of, domains_of, open_backend, sizes
from .communicator import Communicator, communicator_of
from .errors import EPArgumentError, EPError, EPMismatchError
from .event import CompletionEvent, EventHandle, EventOverlap
from .notices import Failures, backend_chosen
from .plans import Plan
from .profiling import recording, span
from .settings import Settings
from .traffic import Traffic, combine_sizes, combine_traffic, dispatch_sizes, dispatch_traffic
from .types import Combined, CombineSpec, Dispatched, DispatchSpec
from .validate import is_tracing

__all__ = ["Engine", "Refusal", "Statistics", "domain_sizes", "host_facts", "num_cores"]


class Engine:
    """One buffer's engine. Construction is collective; every rank gets the same backend or the same error."""

    def __init__(
        self,
        communicator: Communicator,
        settings: Settings,
        *,
        face: str,
        agree: Mapping[str, Any],
        heap_bytes: int,
        prefault_bytes: int = 0,
        timeout_seconds: float,
        allow_hybrid_mode: bool = True,
        refused: Exception | None = None,
    ) -> None:
        """Meet the other ranks and open the backend.

        Args:
            face: the class that is constructed; must be equal on all ranks.
            agree: constructor arguments that must be equal on all ranks, JSON-able.
            heap_bytes: heap to reserve: address space, whose pages cost nothing until they are used.
            prefault_bytes: of the heap, what is made present now. ``Settings.heap_bytes`` stands for both.
            timeout_seconds: deadline of every wait; see ``Settings``.
            allow_hybrid_mode: two hops where ranks are in several domains; else one.
            refused: this rank's arguments were refused: peers are told, then it is raised.

        Raises:
            EPArgumentError: on every rank, where one rank's arguments were refused.
            EPMismatchError: on every rank, where ranks disagree; names the field and each rank's value.
            EPTimeoutError: ranks did not come; names them.
            EPBackendUnavailableError: the backend asked for does not work here; says why.
        """
        device = torch.device("cpu")
        try:
            device = device_of(settings, communicator)
        except Exception as e:  # a driver that does not work: the peers must hear of it
            refused = refused or e
        mine = {
            "refused": "" if refused is None else str(refused),
            "agree": {"class": face, "backend": settings.backend, "device": device.type, **agree},
            "host": {**host_facts(), "domain": settings.domain},
            "nonce": secrets.randbits(63),
        }
        answers = communicator.exchange(
            json.dumps(mine).encode(), timeout=settings.connect_timeout_seconds, what="constructor arguments"
        )
        ranks = [json.loads(a) for a in answers]
        # First: ranks that construct different buffers have different arguments.
        _raise_mismatch(face, [{"class": r["agree"]["class"]} for r in ranks])
        if refused is not None:
            raise refused
        _raise_refused(face, ranks)
        _raise_mismatch(face, [r["agree"] for r in ranks])
        if settings.backend not in BACKENDS:
            raise EPArgumentError.of("backend", f"one of {BACKENDS}", repr(settings.backend))
        self.settings = replace(settings, timeout_seconds=timeout_seconds)
        construction = Construction(
            communicator=communicator,
            settings=self.settings,
            hosts=[r["host"] for r in ranks],
            device=device,
            # Equal on all ranks and new for each construction: the identity of every segment.
            epoch=sum(r["nonce"] for r in ranks) & (2**64 - 1),
            heap_bytes=settings.heap_bytes or heap_bytes,
            prefault_bytes=settings.heap_bytes or prefault_bytes,
            num_cores=num_cores(),
            allow_hybrid_mode=allow_hybrid_mode,
        )
        self.backend: Backend
        self.backend, self.info = open_backend(construction)
        communicator.close()
        self.rank, self.num_ranks = communicator.rank, communicator.size
        #: Where every tensor of a call lies, and every result.
        self.device: torch.device = self.backend.device
        # Operations of one buffer run in call order, whichever thread calls.
        self._lock = threading.RLock()
        self._failures = Failures(self.backend)
        if communicator.rank == 0:  # all ranks have the same backend
            by_auto, num_domains = settings.backend == "auto", len(self.info.domains)
            backend_chosen(self.info.name, self.info.refused, by_auto=by_auto, num_domains=num_domains)
        ops, note = ("dispatch", "combine"), self._failures.note
        self._refusals = {op: Refusal(self.backend, self._lock, op, note) for op in ops}
        self._last: tuple[Callable[..., Traffic], Any, Plan] | None = None
        # Closes when the buffer is dropped and before the interpreter ends; never collective.
        self.close = weakref.finalize(self, self.backend.close)

    def refusing(self, op: str) -> Refusal:
        """A context: an exception in it is told to the peers, who wait in this operation, before it is raised."""
        return self._refusals[op]

    def dispatch(
        self,
        spec: DispatchSpec,
        *,
        background: bool,
        previous: Sequence[CompletionEvent],
        on_comm_stream: bool = False,
    ) -> tuple[Dispatched, EventOverlap]:
        """``on_comm_stream``: results are memory of that stream, where there is one."""
        spec.on_comm_stream = on_comm_stream
        if recording():
            with span("dispatch" if spec.x.shape[1] else "plan", spec.x):  # a plan is a dispatch of no bytes
                return self._dispatch(RangedBackend(self.backend), spec, background, previous)
        return self._dispatch(self.backend, spec, background, previous)

    def _dispatch(
        self, backend: Mover, spec: DispatchSpec, background: bool, previous: Sequence[CompletionEvent]
    ) -> tuple[Dispatched, EventOverlap]:
        try:
            with self._lock:
                flight = backend.prepare(spec, background=background, previous=previous)
                try:
                    backend.dispatch_send(flight)
                    result = backend.dispatch_recv(flight)
                except BaseException:
                    backend.abort(flight)
                    raise
        except BaseException as e:
            self._failures.note(e)
            raise
        self._last = dispatch_traffic, dispatch_sizes(spec), result.plan
        return result, self._event_of(flight.event, background)

    def combine(
        self,
        spec: CombineSpec,
        *,
        background: bool,
        previous: Sequence[CompletionEvent],
        on_comm_stream: bool = False,
    ) -> tuple[Combined, EventOverlap]:
        """``on_comm_stream``: as for dispatch."""
        spec.on_comm_stream = on_comm_stream
        if recording():
            with span("combine", spec.y):
                return self._combine(RangedBackend(self.backend), spec, background, previous)
        return self._combine(self.backend, spec, background, previous)

    def _combine(
        self, backend: Mover, spec: CombineSpec, background: bool, previous: Sequence[CompletionEvent]
    ) -> tuple[Combined, EventOverlap]:
        try:
            with self._lock:
                flight = backend.prepare_combine(spec, background=background, previous=previous)
                backend.combine_send(flight)
                result = backend.combine_recv(flight)
        except BaseException as e:
            self._failures.note(e)
            raise
        self._last = combine_traffic, combine_sizes(spec), spec.plan
        return result, self._event_of(flight.event, background)

    def barrier(self, *, host: bool = True) -> None:
        """``host``: the host waits too, where the operation is one of a stream."""
        try:
            with self._lock, span("barrier"):
                self.backend.barrier(host=host)
        except BaseException as e:
            self._failures.note(e)
            raise

    def comm_stream(self) -> Any:
        """The stream on which rows move: torch.cuda.Stream, or torch's stand-in for one on a CPU."""
        stream = self.backend.comm_stream
        return torch.cpu.Stream() if stream is None else stream

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self.backend.empty(shape, dtype)

    def last_traffic(self) -> Traffic | None:
        """What this rank moved in the last dispatch or combine that was begun; None before the first. Computed when
        asked for: plan and sizes determine every byte. A plan on a GPU is copied to the host for that."""
        if self._last is None:
            return None
        count, sizes, plan = self._last
        return count(self.backend.name, sizes, on_host(plan), self.info.domains)

    def statistics(self) -> Statistics:
        return self.backend.statistics()

    def _event_of(self, event: CompletionEvent | None, background: bool) -> EventOverlap:
        """A synchronous call is complete: no event. A background call always has one, which clients wait for."""
        return EventOverlap(EventHandle(event, self._failures.note) if background else None)


class Refusal:
    """See :meth:`Engine.refusing`."""

    __slots__ = ("_backend", "_lock", "_note", "_op")

    def __init__(self, backend: Backend, lock: threading.RLock, op: str, note: Callable[[BaseException], None]) -> None:
        self._note = note
        self._backend = backend
        self._lock = lock
        self._op = op

    def __enter__(self) -> None:
        if _transforms_active() or (_num_modes() and is_tracing(torch._C._TorchDispatchModeKey.FAKE)):
            error = EPArgumentError(
                f"{self._op}: a buffer's methods do not run under FakeTensorMode or inside a transform of torch.func, "
                "where tensors have no memory of their own; call them outside, or under FakeTensorMode use "
                "deep_ep_py.dispatch and deep_ep_py.combine",
                op=self._op,
            )
            self.__exit__(type(error), error, None)
            raise error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            text = str(error) if isinstance(error, EPError) else f"{type(error).__name__}: {error}"
            try:
                with self._lock, _disable_current_modes(), torch._C._DisableFuncTorch():
                    self._backend.fail(self._op, text)
            except BaseException as e:
                self._note(e)
                raise


_num_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active


def host_facts() -> dict[str, str]:
    """What tells one machine from another, as far as shared memory is concerned."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        boot_id = f"{platform.node()}-{platform.system()}"
    return {"boot_id": boot_id}


def domain_sizes(group: Any) -> tuple[int, int]:
    """(scale-out ranks, scale-up ranks) of a group; collective."""
    communicator, settings = communicator_of(group), Settings.from_env()
    mine = json.dumps({**host_facts(), "domain": settings.domain}).encode()
    answers = communicator.exchange(mine, timeout=settings.connect_timeout_seconds, what="domain size")
    communicator.close()
    return sizes(domains_of([json.loads(a) for a in answers]))


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _raise_refused(face: str, ranks: list[dict[str, Any]]) -> None:
    failed = [r for r, answer in enumerate(ranks) if answer["refused"]]
    if failed:
        text = f"{face} was refused on rank {failed[0]}: {ranks[failed[0]]['refused']}"
        raise EPArgumentError(text, op="construct", phase="constructor arguments", ranks=failed)


def _raise_mismatch(face: str, arguments: list[dict[str, Any]]) -> None:
    for field in sorted(set().union(*arguments)):
        values = {r: a.get(field) for r, a in enumerate(arguments)}
        if any(v != values[0] for v in values.values()):
            listed = ", ".join(f"rank {r}: {v!r}" for r, v in values.items())
            raise EPMismatchError(
                f"{face}: ranks disagree about {field}: {listed}. Construct every rank's buffer with equal arguments.",
                field=field,
                values=values,
                op="construct",
                phase="constructor arguments",
                ranks=tuple(values),
            )
