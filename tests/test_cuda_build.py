"""The engine for NVIDIA GPUs as it is built: what kernels take, what the library exports, who opens it."""

import ctypes.util
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deep_ep_py

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
LIBRARY = Path(deep_ep_py.__file__).parent / "lib" / "libdeep_ep_cuda.so"
built = pytest.mark.skipif(not LIBRARY.exists(), reason="built without nvcc: no libdeep_ep_cuda.so")


@pytest.fixture(scope="module")
def resources():
    spec = importlib.util.spec_from_file_location("kernel_resources", ROOT / "scripts" / "kernel_resources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def taken(registers=8, spill=0):
    return {"sm_90": {"registers": registers, "shared_bytes": 0, "stack_bytes": 0, "spill_bytes": spill}}


@pytest.mark.parametrize(
    ("version", "kernels", "words"),
    [
        ("13.0", {"a.cu: f": taken(), "a.cu: g": taken()}, ""),
        ("13.0", {"a.cu: f": taken()}, "a.cu: g: is in the file only"),
        ("13.0", {"a.cu: f": taken(), "a.cu: g": taken(), "b.cu: h": taken()}, "b.cu: h: a new kernel"),
        ("13.0", {"a.cu: f": taken(), "a.cu: g": taken(9)}, "a.cu: g: on sm_90 .* in the file"),
        ("12.8", {"a.cu: f": taken(), "a.cu: g": taken(9)}, ""),
        ("12.8", {"a.cu: f": taken(), "a.cu: g": taken(9, spill=4)}, "a.cu: g: spills 4 bytes on sm_90"),
    ],
)
def test_differences_are_found(resources, version, kernels, words):
    report = {"nvcc": "13.0", "kernels": {"a.cu: f": taken(), "a.cu: g": taken()}}
    found = list(resources.differences(version, kernels, report))
    assert len(found) == bool(words)
    assert re.search(words, "\n".join(found))


def test_every_kernel_says_its_block():
    """Else ptxas may give it more registers than a block of the size that is launched can have."""
    texts = {path.name: path.read_text() for path in SOURCES.glob("*.cu*")}
    assert sum(text.count("__global__") for text in texts.values()) > 5
    bare = re.compile(r"__global__(?!\s+void\s+__launch_bounds__\().*")
    assert [(name, found) for name, text in texts.items() for found in bare.findall(text)] == []


IMPORTS = """
import importlib, pathlib, pkgutil
import deep_ep_py
for module in pkgutil.walk_packages(deep_ep_py.__path__, "deep_ep_py."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
deep_ep_py.Buffer, deep_ep_py.ElasticBuffer
maps = pathlib.Path("/proc/self/maps").read_text()
assert "/deep_ep_py/_C." in maps
print([line.split()[-1] for line in maps.splitlines() if "libdeep_ep" in line or "libcuda.so" in line])
"""


def test_import_opens_nothing_of_cuda():
    said = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=100, check=False)
    assert said.returncode == 0, said.stderr
    assert said.stdout == "[]\n"


@pytest.mark.nvcc
@built
def test_library_opens_without_a_driver():
    """And says why it cannot be used, where it cannot."""
    code = f"""
import ctypes.util
library = ctypes.CDLL({str(LIBRARY)!r})
library.deep_ep_cuda_get_api.restype = ctypes.c_void_p
api = library.deep_ep_cuda_get_api()
version = ctypes.cast(api, ctypes.POINTER(ctypes.c_uint32))[0]
# abi.h: the first function behind the version
reason = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)(
    ctypes.cast(api, ctypes.POINTER(ctypes.c_void_p))[1])
text = ctypes.create_string_buffer(500)
reason(0, text, 500)
print(version, text.value.decode())
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert said.returncode == 0, said.stderr
    version, _, reason = said.stdout.rstrip("\n").partition(" ")
    declared = re.search(r"#define DEEP_EP_CUDA_ABI_VERSION (\d+)", (SOURCES / "abi.h").read_text())
    assert version == declared[1]
    if ctypes.util.find_library("cuda") is None:
        assert "driver" in reason


@pytest.mark.nvcc
@built
def test_library_exports_its_interface_alone():
    said = subprocess.run(["nm", "-D", "--defined-only", str(LIBRARY)], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in said.stdout.splitlines()}
    assert names == {"deep_ep_cuda_get_api", "deep_ep_cuda_malloc", "deep_ep_cuda_free"}
    needed = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed, "the driver and the runtime are found at run time, or linked statically"
