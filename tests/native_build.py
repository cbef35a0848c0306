"""The C++ sources built for a test, with options of its own and apart from the package."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MISSING = [tool for tool in ("cmake", "ninja", "g++") if shutil.which(tool) is None]
SANITIZERS = {
    "TSAN_OPTIONS": "halt_on_error=1",
    "ASAN_OPTIONS": "detect_leaks=1:halt_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def run(command, seconds, **environment):
    """The process when it has ended. What a sanitizer finds makes it fail."""
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=seconds, check=False,
        env={**os.environ, **SANITIZERS, **environment},
    )  # fmt: skip


def succeed(command, seconds, **environment):
    """What it said."""
    ended = run(command, seconds, **environment)
    assert ended.returncode == 0, f"{command}: {ended.returncode}\n{ended.stdout[-3000:]}\n{ended.stderr[-6000:]}"
    return ended.stdout


class NativeBuild:
    """A copy of the sources, so that faults can be planted, and beside it the folder where CMake builds it: in the same
    place seen from there on each run, so that ccache finds what an earlier run compiled."""

    def __init__(self, folder, *options):
        self.source, self.folder = folder / "source", folder / "build"
        for name in ("csrc", "cmake", "tests/cpp", "tests/simt"):
            shutil.copytree(ROOT / name, self.source / name)
        shutil.copy(ROOT / "CMakeLists.txt", self.source)
        off = ("-DDEEP_EP_PYTHON=OFF", "-DDEEP_EP_CUDA=OFF")
        succeed(["cmake", "-S", self.source, "-B", self.folder, "-G", "Ninja", *off, *options], 120)

    def make(self, *targets):
        succeed(["cmake", "--build", self.folder, "--target", *targets], 500)
