"""Expert-parallel communication for Mixture-of-Experts models: dispatch and combine, with DeepEP's interface."""

from __future__ import annotations

from typing import Any

try:
    from . import _C  # noqa: F401
except ImportError as e:
    raise ImportError(
        "deep_ep_py: its compiled core, deep_ep_py._C, is not here or cannot be loaded. In a source tree that is not "
        f"installed in place: `pip install -e .`, or run from another folder. ({e})"
    ) from e

from . import nn, utils
from .autograd import (
    PendingCombine,
    PendingDispatch,
    PendingPlanAndDispatch,
    PlanHandle,
    combine,
    dispatch,
    plan,
    plan_and_dispatch,
)
from .buffer import Buffer
from .choice import BackendInfo
from .config import Config
from .elastic import ElasticBuffer
from .engine import Statistics, domain_sizes
from .errors import (
    EPArgumentError,
    EPBackendUnavailableError,
    EPError,
    EPMismatchError,
    EPPeerError,
    EPTimeoutError,
)
from .event import EventHandle, EventOverlap
from .fp8 import cast_rows
from .handle import EPHandle
from .settings import Settings
from .traffic import Traffic
from .types import topk_idx_t

__all__ = [
    "BackendInfo",
    "Buffer",
    "Config",
    "EPArgumentError",
    "EPBackendUnavailableError",
    "EPError",
    "EPHandle",
    "EPMismatchError",
    "EPPeerError",
    "EPTimeoutError",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "PendingCombine",
    "PendingDispatch",
    "PendingPlanAndDispatch",
    "PlanHandle",
    "Settings",
    "Statistics",
    "Traffic",
    "cast_rows",
    "combine",
    "dispatch",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "nn",
    "plan",
    "plan_and_dispatch",
    "topk_idx_t",
    "utils",
]


def get_physical_domain_size(group: Any) -> tuple[int, int]:
    """(scale-out ranks, scale-up ranks) of a group, by host or ``Settings.domain``; collective. Domains of different
    sizes count as one."""
    return domain_sizes(group)


def get_logical_domain_size(group: Any, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """(scale-out ranks, scale-up ranks) as dispatch and combine use them; collective. One hop is one domain."""
    scaleout, scaleup = domain_sizes(group)
    return (scaleout, scaleup) if allow_hybrid_mode else (1, scaleout * scaleup)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("deep_ep_py")
        except PackageNotFoundError:  # run from the source tree
            return "0+source"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
