"""The core under the sanitizers: its kernels (stray accesses), its stress test (races between ranks)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MISSING = [tool for tool in ("cmake", "ninja", "g++") if shutil.which(tool) is None]

# Name, what CMake is told, operations per world (of five worlds).
BUILDS = [
    (
        "address+undefined",
        ["-DDEEP_EP_SANITIZE=address", "-DCMAKE_CXX_FLAGS=-fsanitize=undefined -fno-sanitize-recover=undefined"],
        150,
    ),
    ("thread", ["-DDEEP_EP_SANITIZE=thread"], 60),
]


def run(command: list[str], seconds: float) -> None:
    environment = {
        **os.environ,
        "TSAN_OPTIONS": "halt_on_error=1",
        "ASAN_OPTIONS": "detect_leaks=1:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=environment)
    assert ended.returncode == 0, f"{command}: {ended.returncode}\n{ended.stdout[-2000:]}\n{ended.stderr[-6000:]}"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
@pytest.mark.parametrize(("options", "operations"), [b[1:] for b in BUILDS], ids=[b[0] for b in BUILDS])
def test_stress(options, operations, tmp_path):
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", "-DDEEP_EP_PYTHON=OFF", *options]
    run([*configure, "-DDEEP_EP_TESTS=ON"], 120)
    kernels = "thread" not in str(options)  # they share nothing between threads
    targets = ["test_stress", *(["test_kernels"] if kernels else [])]
    run(["cmake", "--build", str(tmp_path), "--target", *targets], 400)
    run([str(tmp_path / "test_stress"), str(operations)], 120)
    if kernels:
        run([str(tmp_path / "test_kernels")], 200)
