"""Modules on top of the differentiable ops: a complete expert-parallel Mixture-of-Experts layer and its parts."""

from .experts import GroupedExperts, SharedExpert
from .moe import MoELayer, MoEOutput
from .router import Router, RouterConfig, Routing

__all__ = ["GroupedExperts", "MoELayer", "MoEOutput", "Router", "RouterConfig", "Routing", "SharedExpert"]
