"""What users name a group of ranks by in torch: a process group, its name, or a device mesh of one dimension.

Part of :mod:`deep_ep_py.communicator`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from .errors import EPArgumentError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def group_of(given: Any) -> tuple[Any, DeviceMesh | None]:
    """The group that was meant, and the mesh if one was given.

    Args:
        given: a DeviceMesh of one dimension, a process group's name, or anything else, which comes back as it is.

    Raises:
        EPArgumentError: a mesh of several dimensions, one without this rank, a name that torch does not know, or a
            group of torch's backend "fake".
    """
    if not dist.is_available():
        return given, None
    mesh = given if isinstance(given, dist.device_mesh.DeviceMesh) else None
    group = _group_of_name(given) if isinstance(given, str) else given if mesh is None else _group_of_mesh(mesh)
    if isinstance(group, dist.ProcessGroup) and _is_fake(group):
        raise EPArgumentError.of(
            "group",
            "a process group whose ranks exchange data (gloo, nccl or mpi)",
            'a group of the backend "fake", which moves nothing: one process stands for all its ranks',
        )
    return group, mesh


def store_of(group: Any) -> Any:
    """The group's store, or None: groups that torch's registry does not know may still carry one."""
    try:
        return dist.distributed_c10d._get_process_group_store(group)
    except (AttributeError, KeyError):
        pass
    try:
        return group.get_group_store()
    except (AttributeError, RuntimeError):
        return None


def _is_fake(group: Any) -> bool:
    """Whether it is one of torch.testing._internal.distributed.fake_pg."""
    try:
        return dist.get_backend(group) == "fake"
    except (RuntimeError, ValueError):  # not in torch's registry
        return False


def _group_of_mesh(mesh: DeviceMesh) -> Any:
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        name = names[-1] if names else "ep"
        remedy = f"mesh[{name!r}]" if names else "init_device_mesh(..., mesh_dim_names=(..., 'ep')), and mesh['ep']"
        got = f"{mesh.ndim} dimensions of sizes {tuple(mesh.shape)}" + (f" named {names}" if names else "")
        raise EPArgumentError.of("group", f"a DeviceMesh of one dimension; pass one of them by name: {remedy}", got)
    if mesh.get_coordinate() is None:
        raise EPArgumentError.of("group", "a DeviceMesh that this rank is a member of", repr(mesh))
    return mesh.get_group()


def _group_of_name(name: Any) -> Any:
    try:
        return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined]
    except (RuntimeError, ValueError) as e:
        known = sorted(dist.distributed_c10d._world.pg_names.values())
        remedy = f"the name of a process group of this process, as its group_name says: one of {known}"
        raise EPArgumentError.of("group", remedy, repr(name)) from e
