"""Is it right? Stages of gpu_check.py: python _gpu_checks.py <stage> <result file> <architecture>"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _gpu_stages import Skipped, main, write_result

ROOT = Path(__file__).resolve().parents[1]
WORLDS = (1, 2, 4, 8)


def device(result: Path, architecture: str) -> dict[str, Any]:
    """What the machine has."""
    import torch

    if torch.version.cuda is None:
        raise Skipped(f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise Skipped("torch.cuda.is_available() is false: no GPU, or no driver for it")
    facts = torch.cuda.get_device_properties(0)
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
    return {
        "name": facts.name,
        "count": torch.cuda.device_count(),
        "architecture": f"{facts.major}{facts.minor}",
        "sms": facts.multi_processor_count,
        "memory_gib": facts.total_memory / 2**30,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "torch": str(torch.__version__),
        "nccl": ".".join(map(str, nccl)) or "none",
    }


def driver() -> str:
    """Its version, or "unknown"."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False).stdout.split()
    return said[0] if said else "unknown"


def build(result: Path, architecture: str) -> dict[str, Any]:
    """In place; for one architecture, which takes a third of the time."""
    arguments = [
        os.environ.get("CMAKE_ARGS", ""),
        f"-DDEEP_EP_CUDA_ARCHITECTURES={architecture}" if architecture else "",
    ]
    environment = {**os.environ, "DEEP_EP_CUDA": "on", "CMAKE_ARGS": " ".join(filter(None, arguments))}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)
    library = ROOT / "deep_ep_py" / "lib" / "libdeep_ep_cuda.so"
    return {"library_bytes": library.stat().st_size}


def driverless(result: Path, architecture: str) -> dict[str, Any]:
    """As on a machine without a GPU: it imports, and refuses with words."""
    code = (
        "import ctypes, pathlib, deep_ep_py\n"
        "deep_ep_py.Buffer, deep_ep_py.ElasticBuffer\n"
        "assert 'libdeep_ep_cuda' not in pathlib.Path('/proc/self/maps').read_text(), 'opened at import'\n"
        "library = pathlib.Path(deep_ep_py.__file__).parent / 'lib' / 'libdeep_ep_cuda.so'\n"
        "assert not library.exists() or ctypes.CDLL(str(library))\n"
        "print('built' if library.exists() else 'not built')\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]  # looks into its working directory first: not the checkout
    said = subprocess.run(
        command, cwd=result.parent, env=environment, capture_output=True, text=True, timeout=50, check=False
    )
    if said.returncode != 0:
        raise RuntimeError(said.stderr)
    return {"libdeep_ep_cuda": said.stdout.strip()}


def in_worlds(result: Path, run: Any, few: bool, worlds: tuple[int, ...] = WORLDS) -> dict[str, Any]:
    """Every world, the later ones too where an earlier one fails."""
    from _gpu_cases import round_trips

    done: dict[str, Any] = {}
    wrong = []
    for num_ranks in worlds:
        try:
            done[f"R={num_ranks}"] = run(num_ranks, round_trips, few, timeout_seconds=60)[0]
        except Exception as e:
            done[f"R={num_ranks}"] = f"failed: {e}"
            wrong.append(f"R={num_ranks}: {e}")
        write_result(result, "failed", "not done", **done)
    if wrong:
        raise RuntimeError("\n".join(wrong))
    return done


def threads(result: Path, architecture: str) -> dict[str, Any]:
    from deep_ep_py.testing import run_threads

    return in_worlds(result, run_threads, few=False)


def processes(result: Path, architecture: str) -> dict[str, Any]:
    from deep_ep_py.testing import run_processes

    return in_worlds(result, run_processes, few=True)


def small(result: Path, architecture: str) -> dict[str, Any]:
    """What compute-sanitizer runs, in a world of ``GPU_CHECK_RANKS``; first in a world of one, which loads the kernels
    while nobody waits for anybody."""
    from _gpu_cases import few_round_trips

    from deep_ep_py.testing import run_threads

    for num_ranks in sorted({1, int(os.environ["GPU_CHECK_RANKS"])}):
        run_threads(num_ranks, few_round_trips, timeout_seconds=50)
    return {}


def sanitized(result: Path, tool: str, worlds: tuple[int, ...]) -> dict[str, Any]:
    """``small`` under compute-sanitizer. One rank first: its kernels wait for nobody, in whatever order they run."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        raise Skipped("compute-sanitizer is not installed")
    done: dict[str, Any] = {}
    for num_ranks in worlds:
        inner = result.with_name(f"small-{num_ranks}.json")
        command = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
        environment = {**os.environ, "GPU_CHECK_RANKS": str(num_ranks)}
        said = subprocess.run(
            [*command, sys.executable, __file__, "small", str(inner), ""],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        found = [line for line in said.stdout.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
        words = found[-1].strip("= ") if found else said.stdout[-400:]
        if said.returncode == 0:
            done[f"R={num_ranks}"] = words
        elif said.returncode != 9 and num_ranks > 1 and "EPTimeoutError" in said.stdout + said.stderr:
            done[f"R={num_ranks}"] = "skipped: the tool does not let kernels of two ranks run at once"
        else:
            print(said.stdout[-6000:], said.stderr[-2000:])
            raise RuntimeError(f"R={num_ranks}: exit status {said.returncode}: {words}")
        write_result(result, "failed", "not done", **done)
    return done


def memcheck(result: Path, architecture: str) -> dict[str, Any]:
    return sanitized(result, "memcheck", (1, 2))


def racecheck(result: Path, architecture: str) -> dict[str, Any]:
    return sanitized(result, "racecheck", (1,))


def synccheck(result: Path, architecture: str) -> dict[str, Any]:
    return sanitized(result, "synccheck", (1,))


def graph(result: Path, architecture: str) -> dict[str, Any]:
    from _gpu_cases import replayed
    from _gpu_together import Together

    from deep_ep_py.testing import run_threads

    done: dict[str, Any] = {}
    for num_ranks in (1, 4):
        run_threads(num_ranks, replayed, Together(num_ranks), timeout_seconds=30)
        done[f"R={num_ranks}"] = "compact and expanded, captured once, replayed with three routings"
        write_result(result, "failed", "not done", **done)
    return done


def faces(result: Path, architecture: str) -> dict[str, Any]:
    from _gpu_faces import faces as check

    from deep_ep_py.testing import run_threads

    for num_ranks in (1, 4):
        run_threads(num_ranks, check, timeout_seconds=30)
        write_result(result, "failed", "not done", ranks=num_ranks)
    return {"checked": "asynchronous calls, rows in place, gradients, a layer, fp8; R=1, 4"}


ALL = (device, build, driverless, threads, processes, faces, small, memcheck, racecheck, synccheck, graph)
CHECKS = {f.__name__: f for f in ALL}

if __name__ == "__main__":
    sys.exit(main(CHECKS, sys.argv[1:]))
