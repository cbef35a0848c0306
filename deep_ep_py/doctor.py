"""What this machine can run, what not and why, with the remedy: ``python -m deep_ep_py doctor``.

Facts are read, claims are tried: the system calls of shared memory between two processes that do not descend from one
another, and every backend in a round trip whose result is compared with the expected one. Every step has a deadline.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import _C
from .backends import _cuda_library
from .engine import num_cores
from .errors import EPError
from .settings import Settings, available_memory_bytes
from .testing.trials import EXPERTS, HIDDEN, NOT_TRIED, SYSTEM_CALLS, TOKENS, TOPK, Outcome, try_backends, worst_of
from .testing.worlds import WorldError, run_processes, run_threads

BACKENDS = ("shm", "collective")
MARKS = {"ok": "ok", "info": "--", "warn": "!!", "fail": "XX"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``status``: ``ok``, ``info``, ``warn`` (works, not at its best) or ``fail``."""

    section: str
    name: str
    status: str
    text: str
    remedy: str = ""


@dataclass(slots=True)
class Report:
    """The whole diagnosis. ``works``: whether the default backend made its round trip."""

    works: bool = False
    default_backend: str = ""
    findings: list[Finding] = field(default_factory=list)

    def add(self, section: str, name: str, status: str, text: str, remedy: str = "") -> None:
        self.findings.append(Finding(section, name, status, text, remedy))

    def as_text(self) -> str:
        lines, section = [], ""
        for f in self.findings:
            if f.section != section:
                section = f.section
                lines += ["", section]
            lines.append(f"  {MARKS[f.status]}  {f.name:<20} {f.text}")
            if f.remedy:
                lines.append(f"      {'':<20} -> {f.remedy}")
        verdict = f"works: {self.default_backend}" if self.works else "DOES NOT WORK here"
        return "\n".join(["deep_ep_py doctor", *lines, "", f"the default backend {verdict}"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the report")
    parser.add_argument("--ranks", type=_positive, default=2, help="processes (and threads) of a round trip (2)")
    parser.add_argument("--timeout", type=_positive, default=60, help="seconds that a round trip may take (60)")


def run(options: argparse.Namespace) -> int:
    """Diagnose and print; 0 if the default backend works, else 1."""
    with _stdout_kept() as stdout:
        report = diagnose(options.ranks, float(options.timeout))
        print(json.dumps(asdict(report), indent=2) if options.json else report.as_text(), file=stdout)
    return 0 if report.works else 1


def diagnose(num_ranks: int = 2, timeout_seconds: float = 60.0) -> Report:
    """Look at the machine, then try every backend over ``num_ranks`` processes and threads. Raises nothing of ours."""
    report = Report()
    _software(report)
    _cores(report, num_ranks)
    _memory(report)
    settings = _settings(report)
    gpus = not _gpus(report)
    _round_trips(report, settings, num_ranks, timeout_seconds, gpus)
    return report


# --- facts --------------------------------------------------------------------------------------------------------


def _software(report: Report) -> None:
    try:
        ours = version("deep_ep_py")
        report.add("software", "deep_ep_py", "ok", ours)
    except PackageNotFoundError:
        report.add("software", "deep_ep_py", "info", f"not installed, imported from {Path(__file__).parent}")
    report.add("software", "Python", "ok", f"{platform.python_version()} ({sys.executable})")
    report.add("software", "torch", "ok", torch.__version__)
    if not dist.is_available():
        report.add("software", "torch.distributed", "fail", "not in this torch", "install a torch that has it")
    elif not dist.is_gloo_available():
        text = "there, without gloo: groups of CPU processes need it"
        report.add("software", "torch.distributed", "fail", text, "install a torch that has gloo")
    else:
        report.add("software", "torch.distributed", "ok", "there, with gloo")
    report.add("software", "system", "info", f"{platform.system()} {platform.release()} {platform.machine()}")


def _cores(report: Report, num_ranks: int) -> None:
    model = next((x.split(":", 1)[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), "")
    report.add("processor", "model", "info", model or platform.processor() or platform.machine())
    simd = _C.simd()
    remedy = "" if simd != "plain" or platform.machine() != "x86_64" else "a processor with AVX2 moves rows faster"
    report.add("processor", "SIMD", "warn" if remedy else "ok", f"kernels: {simd}", remedy)
    cores, quota = num_cores(), _cpu_quota()
    report.add("processor", "cores", "ok", f"{cores} usable of {os.cpu_count()}")
    if quota and quota < cores:
        text = f"the control group grants {quota:g} cores of {cores}: ranks that spin use it up, and are then stopped"
        report.add("processor", "CPU quota", "warn", text, "raise the quota, or set DEEP_EP_PY_SPIN_MICROSECONDS=0")
    if num_ranks <= cores:
        text = f"up to {cores} ranks have a core each and spin before they sleep; more ranks sleep at once"
        report.add("processor", "waits", "ok", text)
    else:
        text = f"{num_ranks} ranks on {cores} cores: waits sleep at once, each costs tens of microseconds more"
        report.add("processor", "waits", "warn", text, "as many ranks as cores, or fewer; see taskset and cpuset")


def _memory(report: Report) -> None:
    available = available_memory_bytes()
    status, remedy = ("ok", "") if available > 1 << 30 else ("warn", "free some, or set DEEP_EP_PY_MAX_HEAP_BYTES")
    report.add("memory", "available", status, f"{_size(available)}; ranks of a host share half of it as heap", remedy)
    limit = _cgroup_limit()
    report.add("memory", "control group", "info", f"limit {_size(limit)}" if limit else "no limit found")
    report.add("memory", "/dev/shm", "info", "not used, whatever its size: segments are memfds and leave no files")
    setting = " ".join(_lines("/sys/kernel/mm/transparent_hugepage/shmem_enabled"))
    chosen = setting.partition("[")[2].partition("]")[0]
    if chosen in ("advise", "always", "within_size", "force"):
        report.add("memory", "huge pages", "ok", f"shmem_enabled is {chosen}: segments of 2 MiB and more ask for them")
    else:
        text = f"shmem_enabled is {chosen or 'unknown'}: heaps have small pages, so they take longer to prepare and map"
        remedy = "as root: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"
        report.add("memory", "huge pages", "warn", text, remedy if chosen else "a kernel with huge pages for shmem")
    try:
        import resource
    except ImportError:  # not a Unix
        return
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = 0 <= files < 256
    text = f"{'unlimited' if files < 0 else files}; a rank holds one per peer and one per heap segment"
    report.add("memory", "file descriptors", "warn" if few else "ok", text, "ulimit -n 4096" if few else "")


def _settings(report: Report) -> Settings | None:
    """The environment's settings, as every buffer reads them; None if it would refuse them."""
    try:
        settings = Settings.from_env()
    except EPError as e:
        report.add("settings", "environment", "fail", str(e), "correct or unset that variable")
        return None
    changed = {k: v for k, v in asdict(settings).items() if v != getattr(Settings(), k)}
    listed = ", ".join(f"DEEP_EP_PY_{name.upper()}={value}" for name, value in changed.items())
    report.add("settings", "environment", "ok", listed or "defaults")
    return settings


def _gpus(report: Report) -> str:
    """Why GPUs cannot be used, empty if they can."""
    devices = sorted(p.name for p in Path("/dev").glob("nvidia[0-9]*"))
    count = max(torch.cuda.device_count(), len(devices))
    report.add("GPUs", "GPUs", "info", f"{count} present" if count else "none found")
    built = _cuda_library.built()
    report.add("GPUs", "kernels", "info", f"built: {_cuda_library.path()}" if built else "not in this build")
    why = _cuda_library.unavailable_because(0)
    if count:
        remedy = "" if not why else "install with nvcc on PATH (DEEP_EP_CUDA=on says what is missing), and a driver"
        report.add(
            "GPUs", "cuda_peer", "warn" if why else "ok", why or "can be tried; it has not yet run on a GPU", remedy
        )
    return why


# --- trials -------------------------------------------------------------------------------------------------------


def _round_trips(report: Report, settings: Settings | None, num_ranks: int, seconds: float, gpus: bool = False) -> None:
    default = (settings or Settings()).backend
    names = list(dict.fromkeys((default, *BACKENDS, *(["cuda_peer"] if gpus else []))))
    section = (
        f"round trips ({num_ranks} ranks, {TOKENS} x {HIDDEN} bf16 tokens each, top-{TOPK} of {EXPERTS}; median time)"
    )
    if not (dist.is_available() and dist.is_gloo_available()):
        outcomes: dict[str, Outcome] = {n: {"error": "torch has no gloo"} for n in names}
    else:
        outcomes = _in_processes(names, settings or Settings(), num_ranks, seconds)
        _report_system_calls(report, outcomes.pop(SYSTEM_CALLS, {}))
    for name in names:
        tried, named = outcomes[name], f"{name} (default)" if name == default else name
        if "error" in tried:
            report.add(section, named, "fail", f"refused: {tried['error']}", _remedy(name, tried["error"], default))
            continue
        text = f"ok: {tried['seconds'] * 1e3:.2f} ms dispatch and combine"
        if tried["name"] != name:
            text += f"; chose {tried['name']}"
        for refused, why in tried["refused"].items():
            text += f"; refused {refused}: {why}"
        slow = name == "auto" and bool(tried["refused"])
        report.add(section, named, "warn" if slow else "ok", text, _remedy("shm", text, default) if slow else "")
    crashed = next((o["error"] for o in outcomes.values() if "died" in o.get("error", "")), "")
    if crashed:
        report.add(section, "threads", "warn", "not tried here, because a process died of it")
    else:
        _in_threads(report, section, settings or Settings(), num_ranks, seconds)
    report.works = settings is not None and "error" not in outcomes[default]
    report.default_backend = outcomes[default].get("name", default)


def _in_processes(names: list[str], settings: Settings, num_ranks: int, seconds: float) -> dict[str, Outcome]:
    """Outcome of each backend; a world for all, and where that one fails, a world for each."""
    try:
        return worst_of(run_processes(num_ranks, try_backends, names, settings, seconds, timeout_seconds=seconds))
    except WorldError as e:
        if len(names) == 1:
            return {names[0]: {"error": _last_line(str(e))}}
    outcomes: dict[str, Outcome] = {}
    for name in names:
        outcomes.update(_in_processes([name], settings, num_ranks, seconds))
    return outcomes


def _in_threads(report: Report, section: str, settings: Settings, num_ranks: int, seconds: float) -> None:
    try:
        names = [settings.backend]
        found = run_threads(num_ranks, try_backends, names, settings, seconds, timeout_seconds=seconds)
        outcome = worst_of(found)[settings.backend]
    except WorldError as e:
        outcome = {"error": _last_line(str(e))}
    if "error" in outcome:
        report.add(section, "threads", "warn", f"ranks as threads of one process: {outcome['error']}")
    else:
        text = f"ok: {outcome['seconds'] * 1e3:.2f} ms with {outcome['name']}, ranks as threads of one process"
        report.add(section, "threads", "ok", text)


# --- words --------------------------------------------------------------------------------------------------------


def _report_system_calls(report: Report, failures: dict[str, str]) -> None:
    section = "shared memory between processes"
    built = _C.has_shm
    report.add(section, "this build", "ok" if built else "fail", "has the engine" if built else "has no engine for it")
    if not failures:
        report.add(section, "system calls", "warn", "not tried: the ranks did not come to it")
    for name, why in failures.items():
        if why.startswith(NOT_TRIED):
            report.add(section, name, "info", f"{why} (the round trip below tells)")
        else:
            report.add(
                section, name, "fail" if why else "ok", why or "works", _remedy("", f"{name}: {why}" if why else "")
            )


CONTAINER = "run the ranks as one user, in one container and pid namespace, with /proc mounted without hidepid"
#: By a word of the failure; the first that occurs in it counts.
REMEDIES = {
    "no shared memory engine": "build on Linux with memfd, futex and pidfd; until then backend collective",
    "memfd": "a kernel or sandbox that allows memfd_create and sealing; until then backend collective",
    "pidfd": "Linux 5.3 or later and a sandbox (seccomp) that allows pidfd_open; " + CONTAINER,
    "/proc/": CONTAINER,
    "futex": "a sandbox that allows futex on memory shared between processes; until then backend collective",
    "heap": "more memory for the container, or a smaller DEEP_EP_PY_HEAP_BYTES and DEEP_EP_PY_MAX_HEAP_BYTES",
    "no gloo": "install a torch that has gloo",
    "did not finish": "try again on a less busy machine, or with a longer --timeout",
    "exit code -4": "an illegal instruction: build the package on this machine",
    "exit code -7": "memory ran out under a mapping: more memory for the container",
    "exit code -9": "killed, most often for want of memory: see dmesg and the container's limit",
    "died": "look in dmesg, and run again with PYTHONFAULTHANDLER=1",
    "resolve": "give the host's name an address, or set GLOO_SOCKET_IFNAME=lo",
    "onnect": "if gloo cannot reach its own host, set GLOO_SOCKET_IFNAME=lo",
}


def _remedy(name: str, error: str, default: str = "auto") -> str:
    if name == default and name not in ("auto", *BACKENDS):
        return "set DEEP_EP_PY_BACKEND to auto, shm, cuda_peer, hybrid or collective, or unset it"
    return next((remedy for word, remedy in REMEDIES.items() if word in error), "")


def _cgroup_limit() -> int:
    """The smallest memory limit of this process's control groups (v2, and v1), in bytes; 0 for none."""
    found = [text for folder in _cgroups() for text in _lines(f"{folder}/memory.max")]
    found += _lines("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    return min((int(t) for t in found if t.isdigit() and int(t) < 1 << 60), default=0)


def _cpu_quota() -> float:
    """Cores that the control groups grant; 0 for no limit."""
    found = [text.split() for folder in _cgroups() for text in _lines(f"{folder}/cpu.max")]
    return min((int(q[0]) / int(q[1]) for q in found if len(q) == 2 and q[0].isdigit()), default=0.0)


def _cgroups() -> list[str]:
    own = [line.split("::", 1)[1] for line in _lines("/proc/self/cgroup") if "::" in line]
    return [f"/sys/fs/cgroup{path}" for path in dict.fromkeys(("", *(p.rstrip("/") for p in own)))]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _size(number: int) -> str:
    return f"{number / (1 << 30):.1f} GiB" if number >= 1 << 30 else f"{number / (1 << 20):.0f} MiB"


def _last_line(text: str) -> str:
    """The line of a traceback that names the error."""
    return text.strip().splitlines()[-1].strip()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("a positive whole number is needed")
    return number


@contextlib.contextmanager
def _stdout_kept() -> Iterator[Any]:
    """A file on the real standard output, which belongs to the report alone: gloo writes there too, in every rank."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as kept:
        os.dup2(2, 1)
        try:
            yield kept
        finally:
            kept.flush()
            sys.stdout.flush()
            os.dup2(kept.fileno(), 1)
