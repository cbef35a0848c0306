"""Which backend carries a buffer's rows: the fastest that works here, and why not another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ._pairs import PairChannel
from .backends import _cuda_library
from .backends._domains import Domains, group_by_domain
from .backends.base import Backend
from .backends.collective import CollectiveBackend
from .backends.hybrid import HybridBackend
from .backends.shm import ShmBackend, unavailable_because
from .backends.shm_domain import ShmDomain
from .communicator import Communicator
from .errors import EPBackendUnavailableError
from .settings import Settings

BACKENDS = ("auto", "shm", "cuda_peer", "hybrid", "collective")


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """Which backend carries the rows, and why not another.

    Attributes:
        name: of the backend. refused: why others that are faster were not taken, by name.
        domains: ranks of each scale-up domain, as found out or told.
        num_hops: 2 where rows cross domains once and are spread inside; 1 where they go straight to their rank.
        scaleup_ranks: ranks that the last hop of a row can reach: this rank's domain, or with one hop all of them.
    """

    name: str
    refused: dict[str, str]
    num_ranks: int
    domains: tuple[tuple[int, ...], ...]
    num_hops: int
    scaleup_ranks: tuple[int, ...]

    @property
    def logical_domains(self) -> tuple[tuple[int, ...], ...]:
        """Domains as dispatch and combine use them: with one hop a single one."""
        return self.domains if self.num_hops == 2 else (tuple(range(self.num_ranks)),)


@dataclass(slots=True)
class Construction:
    """What ranks have learnt of each other when they choose; ``hosts``: :func:`.engine.host_facts` by rank."""

    communicator: Communicator
    settings: Settings
    hosts: list[dict[str, str]]
    device: torch.device
    epoch: int
    heap_bytes: int
    num_cores: int
    allow_hybrid_mode: bool
    prefault_bytes: int = 0


def open_backend(c: Construction) -> tuple[Backend, BackendInfo]:
    """Open the backend that ``settings.backend`` names, or the first that works. Every rank gets the same one.

    Raises:
        EPBackendUnavailableError: on every rank: the one asked for does not work here; says why.
    """
    wanted = c.settings.backend
    openers = {"shm": _open_shm, "hybrid": _open_hybrid, "collective": _open_collective}
    if c.device.type == "cuda":
        openers = {"cuda_peer": _open_cuda_peer, "hybrid": _open_hybrid, "collective": _open_collective}
        if wanted == "shm":
            raise _refuse("shm", f"tensors lie on {c.device}; set Settings.device = 'cpu' for tensors on the CPU")
    refused: dict[str, str] = {}
    for name, opener in openers.items():
        if wanted not in ("auto", name):
            continue
        try:
            backend = opener(c)
        except EPBackendUnavailableError as e:
            if wanted == name:
                raise
            refused[name] = e.reasons.get(name, str(e))
            continue
        domains = tuple(map(tuple, domains_of(c.hosts)))
        num_hops, reach = 1, tuple(range(c.communicator.size))
        if isinstance(backend, HybridBackend):
            num_hops, reach = 2, backend.domains.here
        return backend, BackendInfo(name, refused, c.communicator.size, domains, num_hops, reach)
    raise EPBackendUnavailableError(f"no backend works here: {refused}", reasons=refused)


def device_of(settings: Settings, communicator: Communicator) -> torch.device:
    """Where a buffer's tensors lie; see ``Settings.device``. CUDA is not touched by a program that does not use it."""
    wanted = "cuda" if settings.backend == "cuda_peer" else settings.device
    if wanted == "auto":
        meant = communicator.carries_cuda and torch.cuda.is_available()
        wanted = "cuda" if meant or torch.cuda.is_initialized() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if settings.backend != "cuda_peer":  # which says itself what is missing
        raise EPBackendUnavailableError(
            f"Settings.device = {settings.device!r}, but torch {torch.__version__} sees no GPU: install a torch built"
            " for CUDA, and a driver, or set Settings.device (DEEP_EP_PY_DEVICE) to 'cpu'",
            reasons={"cuda": "torch sees no GPU"},
        )
    return torch.device("cuda", 0)


def domains_of(hosts: list[dict[str, str]]) -> list[list[int]]:
    """Ranks by scale-up domain: what the user says (``Settings.domain``), else the machine they run on."""
    return group_by_domain([h["domain"] or h["boot_id"] for h in hosts])


def sizes(domains: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(scale-out ranks, scale-up ranks); domains of different sizes count as one."""
    if len({len(ranks) for ranks in domains}) > 1:
        return 1, sum(map(len, domains))
    return len(domains), len(domains[0])


def _refuse(name: str, why: str) -> EPBackendUnavailableError:
    return EPBackendUnavailableError(f"backend {name!r} does not work here: {why}", reasons={name: why})


def _open_shm(c: Construction) -> Backend:
    why = unavailable_because(c.hosts)
    if why:
        raise _refuse("shm", why)
    return ShmBackend(
        c.communicator,
        c.settings,
        epoch=c.epoch,
        heap_bytes=c.heap_bytes,
        num_cores=c.num_cores,
        prefault_bytes=c.prefault_bytes,
    )


def _open_cuda_peer(c: Construction) -> Backend:
    from .backends.cuda_peer import CudaPeerBackend  # programs on CPUs need not load it

    why = _cuda_library.unavailable_because(c.device.index or 0)
    if len(domains_of(c.hosts)) > 1:
        why = f"ranks are on several machines, whose GPUs do not map each other's memory: {domains_of(c.hosts)}"
    return CudaPeerBackend(
        c.communicator, c.settings, device=c.device, epoch=c.epoch, heap_bytes=c.heap_bytes, unavailable=why
    )


def _open_collective(c: Construction) -> Backend:
    return CollectiveBackend(c.communicator, c.settings, device=c.device)


def _open_hybrid(c: Construction) -> Backend:
    members = domains_of(c.hosts)
    if c.device.type != "cpu" and c.settings.backend == "auto" and c.communicator.carries_cuda:
        raise _refuse("hybrid", f"two hops pass host memory, and NCCL carries rows on {c.device} straight")
    if not c.allow_hybrid_mode:
        raise _refuse("hybrid", "allow_hybrid_mode is off")
    if len({len(ranks) for ranks in members}) > 1:
        raise _refuse("hybrid", f"domains are of different sizes, so that rails do not match: {members}")
    if len(members) == 1 and c.settings.backend == "auto":
        raise _refuse("hybrid", "all ranks are in one domain")
    communicator = c.communicator
    domains = Domains.of_members(members, communicator.rank)
    # Subsets are counted: every rank makes the same ones, whatever fails.
    inside, across = communicator.subset(domains.here), communicator.subset(domains.rail)
    domain: ShmDomain | None = None
    rail: PairChannel | None = None

    def agree(what: str, refusal: str) -> None:
        """What does not work for one rank is everybody's affair: the others must not go on without it."""
        answers = communicator.exchange(refusal.encode(), timeout=c.settings.connect_timeout_seconds, what=what)
        failed = {r: a.decode() for r, a in enumerate(answers) if a}
        if failed:
            for part in (domain, rail):
                if part is not None:
                    part.close()
            raise _refuse("hybrid", f"{what}: {failed}")

    why = unavailable_because([c.hosts[r] for r in domains.here])
    if not why:
        try:
            domain = ShmDomain(
                inside,
                _patient(c.settings),
                epoch=c.epoch,
                heap_bytes=c.heap_bytes,
                num_cores=c.num_cores,
                names=domains.here,
                prefault_bytes=c.prefault_bytes,
            )
            domain.join_world(domains.here, domains.num_ranks)
        except EPBackendUnavailableError as e:
            why = e.reasons.get("shm", str(e))
    agree("shared memory inside a domain", why)
    why = ""
    try:
        rail = across.open_pairs(timeout=c.settings.timeout_seconds)
    except EPBackendUnavailableError as e:
        why = e.reasons.get("hybrid", str(e))
    agree("connections across domains", why)
    assert domain is not None
    assert rail is not None
    if c.device.type == "cpu":
        return HybridBackend(domains, rail, domain, c.settings)
    from .backends._staged import StagedHybridBackend

    return StagedHybridBackend(domains, rail, domain, c.settings, c.device)


def _patient(settings: Settings) -> Settings:
    """For waits inside a domain. The neighbour that is waited for may itself wait for a rank across: its deadline comes
    first, and so all the domain is told who is really missing."""
    seconds = settings.timeout_seconds
    return replace(settings, timeout_seconds=seconds + min(seconds / 4, 5.0))
