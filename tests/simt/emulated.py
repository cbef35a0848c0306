"""The emulated CUDA library (simt.hpp) under the real backend: what stands for a GPU in tests.

Device memory is memory that processes share, a stream is the calling thread, and a launch has run when it returns.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import weakref
from pathlib import Path

import torch

from deep_ep_py import choice
from deep_ep_py.backends import _cuda_library as library
from deep_ep_py.backends.cuda_peer import CudaPeerBackend

#: Where tests look for the emulated library; see CMakeLists.txt, DEEP_EP_SIMT.
VARIABLE = "DEEP_EP_SIMT_LIBRARY"


class Complete:
    """The event of an operation that is over."""

    def wait(self):
        pass

    def done(self):
        return True


class Machine:
    """See ``deep_ep_py.backends._cuda_machine.Machine``."""

    device, index, stream, comm_stream = torch.device("cpu"), 0, 0, None

    def __init__(self, device):
        self.library = library.opened(path())
        self._functions = functions()

    def capturing(self):
        return False

    @contextlib.contextmanager
    def heap(self, engine, *, on_comm_stream):
        engine.enter_heap()
        try:
            yield self._empty
        finally:
            engine.leave_heap()

    def _empty(self, shape, dtype):
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        address = self._functions.deep_ep_cuda_malloc(num_bytes, 0, None)
        if not address:
            raise MemoryError(f"{num_bytes} bytes")
        memory = (ctypes.c_char * num_bytes).from_address(address)
        weakref.finalize(memory, self._functions.deep_ep_cuda_free, address, num_bytes, 0, None)
        return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(tuple(shape))

    def on_comm_stream(self):
        return contextlib.nullcontext()

    def begin(self, previous):
        for event in previous:
            event.wait()

    def joined(self):
        return contextlib.nullcontext()

    def end(self, uses, *, background, on_comm_stream):
        return Complete() if background else None

    def drain(self, seconds):
        pass

    def close(self):
        pass


def path():
    return Path(os.environ[VARIABLE])


def functions():
    found = ctypes.CDLL(str(path()))
    found.deep_ep_cuda_malloc.restype = ctypes.c_void_p
    found.deep_ep_cuda_malloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
    found.deep_ep_cuda_free.restype = None
    found.deep_ep_cuda_free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
    found.deep_ep_simt_configure.argtypes = [ctypes.c_uint64, ctypes.c_int]
    found.deep_ep_simt_delays.argtypes = [ctypes.c_double]
    return found


def install():
    """``backend="cuda_peer"`` in this process means the emulation from now on."""

    def open_emulated(c):
        return CudaPeerBackend(
            c.communicator, c.settings, device=c.device, epoch=c.epoch, heap_bytes=c.heap_bytes, machine=Machine
        )

    choice._open_cuda_peer = open_emulated
