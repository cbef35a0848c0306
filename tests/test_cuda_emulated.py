"""The GPU kernels and their engine on the emulation of tests/simt, with AddressSanitizer and UBSan:
the kernels' own tests, then the conformance cases under several schedules. See tests/simt/simt.hpp for what this finds
and what it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MISSING = [tool for tool in ("cmake", "ninja", "g++") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}"),
]
#: Scheduler's policy, seed, probability that a launch is late; each runs a third of the cases and modes.
SCHEDULES = [(4, 0, 0.0), (1, 1, 0.1), (2, 2, 0.0)]


def run(command, seconds, **environment):
    """Its output; whatever a sanitizer says makes it fail."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        **environment,
    }
    ended = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=seconds, check=False,
        env={**os.environ, **options},
    )  # fmt: skip
    assert ended.returncode == 0, f"{command}: {ended.returncode}\n{ended.stdout[-3000:]}\n{ended.stderr[-6000:]}"
    return ended.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    run(
        [
            *("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DDEEP_EP_SIMT=ON", "-DDEEP_EP_PYTHON=OFF"),
            *("-DDEEP_EP_CUDA=OFF", "-DDEEP_EP_SANITIZE=address"),
            "-DCMAKE_CXX_FLAGS=-fsanitize=undefined -fno-sanitize-recover=undefined",
        ],
        120,
    )
    run(["cmake", "--build", folder, "--target", "deep_ep_simt", "deep_ep_simt_tests"], 500)
    return folder


def test_kernels(build):
    run(["ctest", "--test-dir", build, "--output-on-failure", "-R", "^simt_"], 400)


@pytest.mark.parametrize(("policy", "seed", "delays"), SCHEDULES)
def test_conformance(build, policy, seed, delays):
    sanitizer = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    said = run(
        [
            *(sys.executable, "-m", "simt.conformance", "--policy", policy, "--seed", seed),
            *("--delays", delays, "--every", len(SCHEDULES)),
        ],
        500,
        DEEP_EP_SIMT_LIBRARY=str(build / "libdeep_ep_simt.so"),
        LD_PRELOAD=sanitizer.stdout.strip(),
        PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    )
    assert "passed: " in said
