"""The CUDA library of this build: where it lies, and opening it. Nothing here needs a driver or a GPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from .. import _C

ALLOCATE, FREE = "deep_ep_cuda_malloc", "deep_ep_cuda_free"


def path() -> Path:
    """Where the library lies if this build has one."""
    return Path(__file__).resolve().parents[1] / "lib" / "libdeep_ep_cuda.so"


def built() -> bool:
    """Whether this build has CUDA kernels; says nothing of a GPU."""
    return path().exists()


@cache
def opened(file: Path) -> _C.CudaLibrary:
    """The library, opened once.

    Raises:
        EPError: it cannot be opened, or is of another version.
    """
    return _C.CudaLibrary(str(file))


def unavailable_because(device: int) -> str:
    """Why the GPU of that number cannot be used; empty if it can."""
    if not built():
        return "this build has no CUDA kernels (install it where nvcc is found, or set DEEP_EP_CUDA=on to see why not)"
    return opened(path()).unavailable_because(device)
