"""The core under the sanitizers: its kernels (stray accesses), its stress test (races between ranks)."""

from __future__ import annotations

import pytest
from native_build import MISSING, NativeBuild, succeed

# Name, what CMake is told, operations per world (of five worlds), targets.
BUILDS = [
    (
        "address+undefined",
        ["-DDEEP_EP_SANITIZE=address", "-DCMAKE_CXX_FLAGS=-fsanitize=undefined -fno-sanitize-recover=undefined"],
        150,
        ["test_stress", "test_kernels"],
    ),
    # The kernels share nothing between threads.
    ("thread", ["-DDEEP_EP_SANITIZE=thread"], 60, ["test_stress"]),
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
@pytest.mark.parametrize(("options", "operations", "targets"), [b[1:] for b in BUILDS], ids=[b[0] for b in BUILDS])
def test_stress(options, operations, targets, tmp_path):
    build = NativeBuild(tmp_path, "-DDEEP_EP_TESTS=ON", *options)
    build.make(*targets)
    succeed([build.folder / "test_stress", operations], 120)
    if "test_kernels" in targets:
        succeed([build.folder / "test_kernels"], 200)
