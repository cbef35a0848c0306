"""What every buffer is: one rank's end of a connection between the ranks of a group, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ._groups import group_of
from .choice import BackendInfo
from .communicator import Communicator, communicator_of
from .engine import Engine, Statistics
from .errors import EPArgumentError, EPError
from .traced import untraced
from .traffic import Traffic
from .validate import describe, is_tracing, plain

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Self


@untraced
class Face:
    """Base of :class:`.Buffer` and :class:`.ElasticBuffer`; a context manager that destroys the buffer at its end.

    Attributes:
        group: the process group (where a DeviceMesh or a name was given, the one that it stands for), MPI communicator
            or deep_ep_py communicator of the buffer; None after :meth:`destroy`.
        mesh: the DeviceMesh that the buffer was made of; None where it was made of something else, and after
            :meth:`destroy`.
        device: where every tensor of a call must be, and where results are.
    """

    group: Any
    mesh: DeviceMesh | None
    device: torch.device
    _engine: Engine

    def _communicator(self, group: Any, comm: Any = None) -> Communicator:
        """The communicator of this construction, from the constructor's arguments."""
        self.group, self.mesh = group_of(group)
        return communicator_of(self.group, comm)

    def _mesh(self) -> DeviceMesh | None:
        """The mesh that the buffer was made of, or one of its process group, made once; None without either."""
        if self.mesh is not None or not dist.is_available() or not isinstance(self.group, dist.ProcessGroup):
            return self.mesh
        made: DeviceMesh | None = self.__dict__.get("_mesh_of_group")
        if made is None:
            from torch.distributed.device_mesh import DeviceMesh

            # DTensor's caches outlive a process group and take meshes of equal ranks and names for the same, whose
            # groups they find by name. So the name of the group is part of the mesh's.
            name = f"ep_{self.group.group_name}"
            made = DeviceMesh.from_group(self.group, self.device.type, mesh_dim_names=(name,))
            self.__dict__["_mesh_of_group"] = made
        return made

    def _check(self, name: str, value: Any) -> None:
        """For what hands ``value`` to torch before it comes to a dispatch: refuse on every rank what a dispatch would
        refuse, which torch may refuse on this rank alone. Nothing is checked where compilers trace."""
        if not (torch.compiler.is_compiling() or is_tracing()):
            with self._engine.refusing("dispatch"):
                tensor = plain(name, value)
                if not isinstance(tensor, torch.Tensor) or tensor.device != self.device:
                    raise EPArgumentError.of(name, f"a tensor on {self.device}", describe(value))

    def get_comm_stream(self) -> Any:
        """The communication stream: torch.cuda.Stream; on a CPU, torch's stand-in for one."""
        return self._engine.comm_stream()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor in this rank's heap: an expert that writes its output here spares combine a copy.

        Args:
            shape: any shape. dtype: any dtype.
        """
        return self._engine.empty(shape, dtype)

    def backend_info(self) -> BackendInfo:
        """Which backend carries the rows, and why others were refused."""
        return self._engine.info

    def last_traffic(self) -> Traffic | None:
        """What this rank moved in its last dispatch or combine, by link, in bytes: :class:`.traffic.Traffic`."""
        return self._engine.last_traffic()

    def statistics(self) -> Statistics:
        """Counters of this buffer: :class:`.backends.base.Statistics`."""
        return self._engine.statistics()

    def destroy(self) -> None:
        """Give memory, threads, connections and the group back. Idempotent, not collective; what was returned stays
        valid, and the process group may be destroyed."""
        self._engine.close()
        self.group = self.mesh = None
        made = self.__dict__.pop("_mesh_of_group", None)
        if made is not None:
            # A mesh keeps its group, and DTensor's caches keep meshes: torch would not let go of the group's store.
            getattr(made, "_pg_registry", {}).clear()

    def __repr__(self) -> str:
        engine = getattr(self, "_engine", None)
        if engine is None:
            return f"<{type(self).__name__}: not constructed>"
        heap = f"heap of {engine.statistics().heap_bytes} bytes" if engine.close.alive else "destroyed"
        where = f"rank {engine.rank} of {engine.num_ranks}, backend {engine.info.name}, device {engine.device}"
        return f"<{type(self).__name__}: {where}, {heap}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: a buffer is this rank's end of a connection, which the copy of a module shares."""
        return self

    def __reduce__(self) -> Any:
        name = type(self).__name__
        raise EPError(
            f"{'an' if name[0] in 'AEIOU' else 'a'} {name} cannot be pickled: it belongs to its process; save a "
            "module's state_dict() instead"
        )
