"""The benchmark of the layer runs, and ends where a result is wrong. No times are asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / "benchmarks" / "bench_moe_layer.py"
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def run(*command):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True, text=True, timeout=110, check=False, env=ENV,
    )  # fmt: skip


def test_layer_benchmark_compares_results(tmp_path):
    done = run(*LAUNCHER, BENCHMARK, "--quick", "--rounds", "2", "--json", tmp_path / "record.json")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    peers = {"all_to_all", "tuned_all_to_all"}
    compared = {
        "output",
        "gradient of x",
        *(f"gradient of {p}" for p in ("router.weight", "experts.gate_up", "experts.down")),
    }
    for dtype in ("float32", "bfloat16"):
        for name in peers:
            found = record["differences"][dtype][name]
            assert found.keys() == compared
            assert max(found.values()) <= record["tolerance"][dtype]
    again = run(BENCHMARK, "--markdown", tmp_path / "record.json")
    assert again.returncode == 0 and "| deep_ep_py.nn.MoELayer |" in again.stdout, again.stdout + again.stderr


# Each of them on one rank alone, in what arrives there (rows, weights, gradients of both); written into a program of
# its own, so that the benchmark has no switch for it.
PLANTS = {
    "weight": "rows[-1] *= 1.001 if rows.dim() == 1 else 1",
    "gradient": "rows[5] *= 0 if torch._C._current_autograd_node() is not None else 1",
}
PROGRAM = """
import os, runpy, sys
import torch
sys.path.insert(0, os.path.dirname("BENCHMARK"))
from harness import moe_exchange

right = moe_exchange._all_to_all
def wrong(*arguments):
    rows = right(*arguments)
    if os.environ["RANK"] == "1":
        CHANGE
    return rows
moe_exchange._all_to_all = wrong
sys.argv = ["BENCHMARK", "--quick", "--json", "FILE"]
runpy.run_path("BENCHMARK", run_name="__main__")
"""


@pytest.mark.parametrize("plant", PLANTS)
def test_layer_benchmark_ends_where_a_result_is_wrong(plant, tmp_path):
    program = PROGRAM.replace("BENCHMARK", str(BENCHMARK)).replace("FILE", str(tmp_path / "record.json"))
    (tmp_path / "planted.py").write_text(program.replace("CHANGE", PLANTS[plant]))
    done = run(*LAUNCHER, tmp_path / "planted.py")
    assert done.returncode != 0
    assert "wrong results, nothing was timed: " in done.stderr, done.stdout + done.stderr
    assert "all_to_all, torch.float32: " in done.stderr
    assert not (tmp_path / "record.json").exists() and "round 1" not in done.stderr
