"""The one place that reads the environment: a frozen :class:`Settings`, built when a buffer is constructed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import EPArgumentError

_PREFIX = "DEEP_EP_PY_"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user may tune. Each field can be set by the environment variable ``DEEP_EP_PY_<FIELD>``.

    Attributes:
        backend: ``"auto"`` (fastest that works), or a backend's exact name (``"shm"``, ``"cuda_peer"``, ``"hybrid"``,
            ``"collective"``).
        device: where the tensors of a buffer lie: ``"cpu"``, ``"cuda"`` (the current GPU), or ``"auto"``: the current
            GPU where the group has a backend for CUDA tensors or the process has begun to use CUDA, else the CPU.
        timeout_seconds: deadline of every wait, in seconds (over several domains, waits inside one last a quarter
            longer, 5 s at most). ElasticBuffer's ``num_cpu_timeout_secs`` overrides it.
        connect_timeout_seconds: how long construction waits for every rank, in seconds.
        max_heap_bytes: how many bytes of returned tensors one rank's heap may hold before results move to
            ordinary memory; 0: half of the available memory (and of the cgroup's limit), divided by the ranks here.
        heap_bytes: bytes of heap that are ready (present in every rank's mapping) at construction; 0: what the sizes
            ask for that an ElasticBuffer is told. A constructor's hint in bytes reserves and touches nothing.
        num_threads: copy threads per rank; 0: cores divided by the ranks of this host.
        spin_microseconds: how long a wait spins before it sleeps; -1: 200 where every rank has a core, else 0.
        link_gbps: rate of a host's link to the others, in Gbit/s, by which the size of chunks is chosen that cross
            domains; 0: measured.
        domain: ranks with the same non-empty word share memory; empty: found out (same boot id, mappable memory).
    """

    backend: str = "auto"
    device: str = "auto"
    timeout_seconds: float = 300.0
    connect_timeout_seconds: float = 300.0
    max_heap_bytes: int = 0
    heap_bytes: int = 0
    num_threads: int = 0
    spin_microseconds: int = -1
    link_gbps: float = 0.0
    domain: str = ""

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise EPArgumentError.of("Settings.device", "'auto', 'cpu' or 'cuda'", repr(self.device))
        if (self.backend, self.device) == ("cuda_peer", "cpu"):
            raise EPArgumentError.of("Settings.device", "'auto' or 'cuda' with backend 'cuda_peer'", "'cpu'")
        deadlines = {
            "timeout_seconds": "for the other ranks in each operation",
            "connect_timeout_seconds": "for every rank to construct its buffer",
        }
        for name, waits in deadlines.items():
            if not getattr(self, name) > 0:
                expected = f"a positive number of seconds to wait {waits}"
                raise EPArgumentError.of(f"Settings.{name}", expected, getattr(self, name))
        if not 0 <= self.link_gbps < math.inf:
            raise EPArgumentError.of("Settings.link_gbps", "a rate in Gbit/s, 0 to measure it", self.link_gbps)
        for name in ("max_heap_bytes", "heap_bytes", "num_threads"):
            if getattr(self, name) < 0:
                raise EPArgumentError.of(f"Settings.{name}", "a whole number, 0 for the default", getattr(self, name))

    @classmethod
    def of(cls, settings: Settings | None, *, backend: str | None) -> Settings:
        """What a buffer uses: the settings it was given or the environment's, with its own choice of backend."""
        chosen = settings if settings is not None else cls.from_env()
        return chosen if backend is None else replace(chosen, backend=backend)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read ``DEEP_EP_PY_*``. Unknown names are refused, so that a typing error does not pass in silence.

        Raises:
            EPArgumentError: an unknown variable, or a value that does not parse.
        """
        environ = os.environ if environ is None else environ
        kinds: dict[str, Callable[[str], Any]] = {f.name: type(f.default) for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, text in environ.items():
            if not key.startswith(_PREFIX):
                continue
            name = key[len(_PREFIX) :].lower()
            if name not in kinds:
                raise EPArgumentError.of(key, f"one of {sorted(_PREFIX + n.upper() for n in kinds)}", repr(text))
            try:
                values[name] = kinds[name](text)
            except ValueError as e:
                raise EPArgumentError.of(
                    key, f"a value of type {type(getattr(cls(), name)).__name__}", repr(text)
                ) from e
        return cls(**values)


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory this process may still use: the smallest of the machine's, its cgroup's and those of the groups
    around it (version 2, and the memory controller of version 1). ``root``: where ``proc`` and ``sys`` are mounted."""
    meminfo = (line.split() for line in _read(root / "proc/meminfo").splitlines())
    limits = [int(words[1]) * 1024 for words in meminfo if words[0] == "MemAvailable:"]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # A container may see its own group as the mounted one, whatever its path says.
        group = PurePosixPath(path.lstrip("/"))
        for folder in (mount / group, *(mount / parent for parent in group.parents)):
            most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
            if most.isdigit():  # "max": none
                limits.append(max(int(most) - (int(used) if used.isdigit() else 0), 0))
    if limits:
        return min(limits)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
