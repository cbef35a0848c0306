"""Ranges in the traces of torch.profiler, and what they say; docs/observability.md lists them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch.autograd import profiler

from .plans import SHARED_ROW, Plan, plan_words

_enter_range: Any = torch._C._autograd._record_function_with_args_enter
_exit_range: Any = torch._C._autograd._record_function_with_args_exit
_NAMESPACE = "deep_ep_py::"
_OFF: AbstractContextManager[Any] = nullcontext()


def recording() -> bool:
    """Whether a profiler runs, in whichever thread."""
    return profiler._is_profiler_enabled


def span(name: str, x: torch.Tensor | None = None) -> AbstractContextManager[Any]:
    """A context that is the range ``deep_ep_py::<name>``; ``x``: [T, H], the rows that the call is given."""
    if not profiler._is_profiler_enabled:
        return _OFF
    return Range(name) if x is None else Range(name, x, tokens=x.shape[0], bytes=x.shape[0] * _row_bytes(x))


def rows_span(name: str, x: torch.Tensor, sf: torch.Tensor | None, plan: Plan) -> Range:
    """The range in which rows move along ``plan``: tokens of this rank; rows that it places (dispatch) or fetches
    (combine), its own included, and their bytes with scale factors. A plan on a GPU would have to be waited for: of it
    only the tokens are told."""
    if not plan.packed.is_cpu:
        return Range(name, x, tokens=plan.num_tokens)
    first = plan_words(0, 0, plan.num_ranks, plan.num_local)
    # By numpy: torch's operators would stand in the trace.
    targets = plan.packed.numpy()[first : first + plan.num_tokens * plan.num_slots]
    rows = int(((targets >= 0) & (targets < SHARED_ROW)).sum())
    row_bytes = _row_bytes(x) + (0 if sf is None else _row_bytes(sf))
    return Range(name, x, tokens=plan.num_tokens, rows=rows, bytes=rows * row_bytes)


class Range:
    """One range of a trace; entered once, in any thread. Args: as :func:`span`; ``figures``: by name."""

    def __init__(self, name: str, x: torch.Tensor | None = None, **figures: int) -> None:
        self._name = _NAMESPACE + name
        self._inputs = [] if x is None else [x]
        self._figures = figures
        self._exit: Callable[[], object] = bool

    def __enter__(self) -> None:
        if torch._C._autograd._profiler_enabled():
            fast = torch._C._profiler._RecordFunctionFast(self._name, self._inputs, self._figures)
            fast.__enter__()
            self._exit = lambda: fast.__exit__(None, None, None)
            return
        # A thread that did not start the profiler: it is recorded where the profiler records all threads, and torch
        # takes no names for figures there.
        token = _enter_range(self._name, *self._inputs, *self._figures.values())
        self._exit = lambda: _exit_range(token)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit()

    def around(self, work: Callable[[], None]) -> None:
        """Do ``work`` in this range."""
        with self:
            work()


def _row_bytes(x: torch.Tensor) -> int:
    return x.shape[1] * x.element_size()
