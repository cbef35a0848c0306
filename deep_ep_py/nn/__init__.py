"""Modules on top of the differentiable ops: a complete expert-parallel Mixture-of-Experts layer and its parts."""

from .data_parallel import prepare_ddp
from .experts import GroupedExperts, SharedExpert
from .gradients import GradScaler, clip_grad_norm_
from .moe import MoELayer, MoEOutput
from .router import Router, RouterConfig, Routing
from .sharded import parameters_by_mesh

__all__ = [
    "GradScaler",
    "GroupedExperts",
    "MoELayer",
    "MoEOutput",
    "Router",
    "RouterConfig",
    "Routing",
    "SharedExpert",
    "clip_grad_norm_",
    "parameters_by_mesh",
    "prepare_ddp",
]
