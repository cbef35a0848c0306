"""Everything that needs a GPU, by one command, in under 8 minutes: is it right, and how fast is it?

    python benchmarks/gpu_check.py                             # all of it
    python benchmarks/gpu_check.py --stages threads,graph      # some of it
    python benchmarks/gpu_check.py --show benchmarks/results/gpu_....json

Asks for CUDA (nvcc), PyTorch of 2.8 or later built for CUDA, pybind11, setuptools, cmake and ninja. One GPU is enough:
ranks share it. With more, rank r uses GPU r modulo their number.

Stages, each in processes of its own with a limit of its own; one that fails does not keep the others from running:
    build       compiles in place, for this GPU's architecture
    driverless  imports where no GPU can be seen, and says why it cannot be used
    threads     conformance against the oracle, bit for bit; ranks are threads: R = 1, 2, 4, 8
    processes   the same, ranks are processes
    faces       asynchronous calls, rows in place, gradients, an MoE layer, fp8
    memcheck, racecheck, synccheck    small cases under compute-sanitizer
    graph       dispatch and combine captured in a CUDA graph, replayed with other routing
    timings     the device's copy rate; dispatch and combine against it; a pair of few tokens; how few SMs do
    nccl        all_to_all_single of the same bytes, where NCCL lets ranks share a GPU, or each has its own

The floor of an operation is the bytes that it must read and write, over all ranks that share the GPU, at the rate at
which one large device copy reads and writes. Exit status: 0 passed, 1 something failed, 2 there is no GPU. The build
stage leaves this GPU's kernels alone in the checkout: ``pip install -e .`` brings the other architectures back.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _gpu_report import summary, text
from _gpu_stages import Result, Stage, run_stage

ROOT = Path(__file__).resolve().parents[1]
BUDGET_SECONDS = 470.0
STAGES = (
    Stage("build", 200),
    Stage("driverless", 60, needs_gpu=False),
    Stage("threads", 90),
    Stage("processes", 110),
    Stage("faces", 40),
    Stage("memcheck", 60),
    Stage("racecheck", 45),
    Stage("synccheck", 45),
    Stage("graph", 45),
    Stage("timings", 150),
    Stage("nccl", 60),
)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--stages", help=f"of {','.join(names)} (all; without a GPU none)")
    parser.add_argument("--out", type=Path, help="record (benchmarks/results/gpu_<device>_<date>.json)")
    parser.add_argument("--show", type=Path, metavar="RECORD", help="print a record's tables and do nothing else")
    options = parser.parse_args(argv)
    options.all = options.stages is None
    options.stages = names if options.all else options.stages.split(",")
    if unknown := set(options.stages) - set(names):
        parser.error(f"--stages: no {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return options


RANKS_ARE_THREADS = {"threads", "faces", "graph", "timings"}


def environment(name: str) -> dict[str, str]:
    """Of a stage. The package is the checkout's where it was built in place, else the installed one."""
    built = any((ROOT / "deep_ep_py").glob("_C.*.so"))
    paths = [*([str(ROOT)] if built else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "DEEP_EP_PY_TIMEOUT_SECONDS": "20",
        # Ranks that are threads wait for each other in kernels: none may queue behind another rank's.
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        # A kernel loaded at its first launch may wait for those that run in the same process, which wait for it.
        "CUDA_MODULE_LOADING": "EAGER" if name in RANKS_ARE_THREADS else "LAZY",
        "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    }


def command(name: str, result: Path, device: dict[str, Any]) -> list[str]:
    """What runs a stage and writes ``result``."""
    module = "_gpu_timings.py" if name in {"timings", "nccl"} else "_gpu_checks.py"
    architecture = str(device.get("architecture", ""))
    return [sys.executable, str(ROOT / "benchmarks" / module), name, str(result), architecture]


def file_name(device: str, date: str) -> str:
    """``gpu_nvidia-h100-80gb-hbm3_2026-01-31.json``"""
    return f"gpu_{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}_{date[:10]}.json"


def check(options: argparse.Namespace) -> int:
    began = time.monotonic()
    device = run_stage(Stage("device", 60), lambda result: command("device", result, {}), environment("device"))
    facts = device.data if device.status == "passed" else {}
    if not facts and (options.all or not {"build", "driverless"} & set(options.stages)):
        print(f"no GPU to check: {device.reason}")
        return 2
    results: dict[str, Result] = {}
    for stage in STAGES:
        if stage.name not in options.stages:
            continue
        left = BUDGET_SECONDS - (time.monotonic() - began)
        if not facts and stage.needs_gpu and stage.name != "build":
            results[stage.name] = Result("skipped", f"no GPU: {device.reason}")
        elif left < 5:
            results[stage.name] = Result("skipped", f"no time left of {BUDGET_SECONDS:.0f} s")
        else:
            print(f"== {stage.name}", flush=True)
            limited = Stage(stage.name, min(stage.seconds, left), stage.needs_gpu)
            results[stage.name] = run_stage(
                limited, lambda result, name=stage.name: command(name, result, facts), environment(stage.name)
            )
        print(f"   {results[stage.name].line()}", flush=True)
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    record = {
        "format": 1,
        "date": date,
        "device": facts,
        "seconds": round(time.monotonic() - began, 1),
        "stages": {name: result.record() for name, result in results.items()},
    }
    print(text(record))
    if not facts:
        print(f"no GPU to check: {device.reason}")
        return 1 if any(result.status == "failed" for result in results.values()) else 2
    out = options.out or ROOT / "benchmarks" / "results" / file_name(facts["name"], date)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{out}")
    return summary(record)[0]


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if options.show:
        print(text(json.loads(options.show.read_text())))
        return 0
    return check(options)


if __name__ == "__main__":
    sys.exit(main())
