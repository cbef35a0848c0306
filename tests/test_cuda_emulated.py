"""The GPU kernels and their engine on the emulation of tests/simt, with AddressSanitizer: the kernels' own tests, then
the conformance cases under several schedules, then with planted faults. See tests/simt/simt.hpp for what this finds and
what it cannot."""

from __future__ import annotations

import os
import sys

import pytest
from native_build import MISSING, ROOT, NativeBuild, run, succeed

# Fibers have stacks of their own, and Python leaks at its exit.
ASAN_OPTIONS = "detect_leaks=0:halt_on_error=1:detect_stack_use_after_return=0"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}"),
]
#: Scheduler's policy, seed, probability that a launch is late; each runs a third of the cases and modes.
SCHEDULES = ("4:0:0", "1:1:0.1", "2:2:0")
#: File, what stands there, what is put in its place, the cases that are run, a word of the failure.
PLANTS = {
    "missing block barrier": (
        "counted.cuh",
        "  pull_counts(p, records, expand);\n  __syncthreads();\n",
        "  pull_counts(p, records, expand);\n",
        "R4-T31",
        "WorldError",  # wrong counts show in more than one way
    ),
    "wrong index": ("place.cu", "(to.first_token + index) * width", "index * width", "R2-T14+15-H33", "recv_src_meta"),
    "lost signal": (
        "notify.cu",
        "  signal_all(world, &DeviceInbox::record, seq);\n",
        "  if (world.rank != 1) signal_all(world, &DeviceInbox::record, seq);\n",
        "R2-T14+15-H33-K8-E16-distinct-float16-v1",
        "EPTimeoutError",
    ),
}


class Emulated(NativeBuild):
    def __init__(self, folder):
        super().__init__(folder, "-DDEEP_EP_SIMT=ON", "-DDEEP_EP_SANITIZE=address")
        self.make("deep_ep_simt", "deep_ep_simt_tests")

    def python(self, module, *options, **environment):
        # The sanitizer looks for what throws when it is loaded, so that must be there too.
        first = [succeed(["g++", f"-print-file-name={name}"], 20).strip() for name in ("libasan.so", "libstdc++.so.6")]
        path = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return run(
            [sys.executable, "-m", f"simt.{module}", *options],
            500,
            ASAN_OPTIONS=ASAN_OPTIONS,
            DEEP_EP_SIMT_LIBRARY=str(self.folder / "libdeep_ep_simt.so"),
            LD_PRELOAD=" ".join(first),
            PYTHONPATH=os.pathsep.join(path),
            **environment,
        )


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    return Emulated(tmp_path_factory.mktemp("emulated"))


def test_kernels(build):
    command = ["ctest", "--test-dir", build.folder, "--output-on-failure", "-R", "^simt_", "-j", "2"]
    succeed(command, 400, ASAN_OPTIONS=ASAN_OPTIONS)


def test_conformance(build):
    schedules = [f"--schedule={schedule}" for schedule in SCHEDULES]
    ended = build.python("conformance", *schedules, "--every", len(SCHEDULES))
    assert ended.returncode == 0 and "passed: " in ended.stdout, f"{ended.stdout[-1500:]}\n{ended.stderr[-6000:]}"


@pytest.mark.processes
def test_conformance_of_processes(build):
    ended = build.python("conformance", "--processes", "--every", 24, "--schedule=4:5:0")
    assert ended.returncode == 0 and "passed: " in ended.stdout, f"{ended.stdout[-1500:]}\n{ended.stderr[-6000:]}"


def test_faults(build):
    """Refusals, disagreements and absent ranks: the words of shared memory, and what is usable afterwards."""
    ended = build.python("faults")
    assert ended.returncode == 0 and "passed" in ended.stdout, f"{ended.stdout[-1500:]}\n{ended.stderr[-6000:]}"


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_faults_are_caught(build, plant):
    """Last: it writes to the sources, and puts back what stood there."""
    name, before, after, match, word = PLANTS[plant]
    file = build.source / "csrc" / "cuda" / name
    sound = file.read_text()
    assert sound.count(before) == 1, f"{name} has changed: plant another fault"
    file.write_text(sound.replace(before, after))
    try:
        build.make("deep_ep_simt")
        ended = build.python("conformance", "--match", match, "--schedule=1:1:0", DEEP_EP_PY_TIMEOUT_SECONDS="4")
    finally:
        file.write_text(sound)
    assert ended.returncode != 0, f"not caught\n{ended.stdout[-1500:]}"
    assert word in ended.stderr, ended.stderr[-3000:]
