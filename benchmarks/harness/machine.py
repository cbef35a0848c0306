"""What the numbers were measured on."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch


def facts(cores: int) -> dict[str, str | int]:
    """For the header and the JSON."""
    import deep_ep_py
    from deep_ep_py import _C

    try:
        version = str(deep_ep_py.__version__)
    except ImportError:  # PackageNotFoundError: run from a source tree
        version = "source tree, not installed"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": platform.node(),
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "caches": _caches(),
        "memory_gib": _memory_gib(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "deep_ep_py": version,
        "simd": str(_C.simd()),
    }


def _first(path: str, key: str) -> str:
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _caches() -> str:
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = (_read(str(index / name)).strip() for name in ("type", "level", "size"))
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    return ", ".join(found)


def _memory_gib() -> int:
    if hasattr(os, "sysconf"):
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    return 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
