"""The benchmark across hosts runs, counts what its routings say, ends where a result is wrong. No times asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / "benchmarks" / "bench_nodes.py"
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
NETWORK_MISSING = "import sys; sys.path.insert(0, sys.argv[1]); from network import unavailable; print(unavailable())"

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.network]


def run(*command):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True, text=True, timeout=110, check=False, env=ENV,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def network():
    if why := run("-c", NETWORK_MISSING, ROOT / "tests" / "net").stdout.strip():
        pytest.skip(why)


def bytes_of(cell, name, operation):
    """(those counted, those of the rows) by host."""
    row = next(r for r in cell["rows"] if (r["contender"], r["operation"]) == (name, operation))
    return row["sent_bytes_per_host"], row["row_bytes_per_host"]


def test_record(tmp_path):
    sizes = ("--tokens", "24", "--hidden", "4096", "--experts", "48")
    done = run(BENCHMARK, "--smoke", "--worlds", "3x2", *sizes, "--rounds", "1", "--json", tmp_path / "record.json")
    assert done.returncode == 0, done.stdout + done.stderr
    (world,) = json.loads((tmp_path / "record.json").read_text())["worlds"]
    cells = world["cells"]
    assert [(c["routing"], c["rate"]) for c in cells] == [(r, n) for r in ("even", "groups") for n in ("none", "1gbit")]
    for cell in cells:
        assert {(r["contender"], r["operation"]) for r in cell["rows"]} == {
            (name, op) for name in ("hierarchical", "flat", "plain") for op in ("dispatch", "combine", "pair")
        }
        for name in ("hierarchical", "flat", "plain"):
            for operation in ("dispatch", "combine"):
                # Above the rows come the routing, a rendezvous of everybody (4 KiB a rank and pair), and frames.
                for counted, rows in zip(*bytes_of(cell, name, operation), strict=True):
                    assert rows < counted < 1.02 * rows + 120_000, (name, operation)
                ledger = cell["ledger"].get(name, {}).get(operation)
                for told, counted in zip(ledger or (), bytes_of(cell, name, operation)[0], strict=bool(ledger)):
                    assert told < counted < 1.03 * told + 20_000, (name, operation)  # frames, acknowledgements
                limited = cell["wire"][name][operation]["limited"]
                assert all((n > 0) == (cell["rate"] != "none") for n in limited)
        for here, (two_hops, one_hop) in enumerate(
            zip(cell["wire_rows"]["hierarchical"], cell["wire_rows"]["flat"], strict=True)
        ):
            assert two_hops[here] == one_hop[here] == 0
            assert all(
                0 < n <= 2 * 24 and n < m for d, (n, m) in enumerate(zip(two_hops, one_hop, strict=True)) if d != here
            )
    again = run(BENCHMARK, "--markdown", tmp_path / "record.json")
    assert again.returncode == 0 and "| dispatch: flat |" in again.stdout, again.stdout + again.stderr


# On one rank each, in what its combine returns and in what its dispatch delivers.
PLANTS = """
    if place.rank == 1: ours.combine = spoil(ours.combine, lambda got: got[0][3].add_(1))
    if place.rank == 2: ours.dispatch = spoil(ours.dispatch, lambda got: got[2][0].add_(1))
"""
PROGRAM = """
import os, runpy, sys
sys.path.insert(0, os.path.dirname("BENCHMARK"))
sys.path.insert(0, os.path.join(os.path.dirname("BENCHMARK"), "..", "tests", "net"))
from nodes import rank, steer
import scenes

def spoil(right, change):
    def wrong(*arguments):
        got = right(*arguments)
        change(got)
        return got
    return wrong

def planted(place, **arguments):
    ours = rank.Mode
PLANTS
    return rank.measure_nodes(place, **arguments)

scenes.SCENES["measure_nodes"] = planted
if __name__ == "__main__":
    sys.argv = ["BENCHMARK", "--smoke", "--rates", "none", "--routings", "even", "--json", "FILE"]
    runpy.run_path("BENCHMARK", run_name="bench_nodes")["main"]()
"""


def test_ends_where_a_result_is_wrong(tmp_path):
    program = PROGRAM.replace("BENCHMARK", str(BENCHMARK)).replace("FILE", str(tmp_path / "record.json"))
    (tmp_path / "planted.py").write_text(program.replace("PLANTS", PLANTS))
    done = run(tmp_path / "planted.py")
    assert done.returncode != 0
    wrong = {line for line in done.stderr.splitlines() if line.startswith("wrong results, nothing was timed: ")}
    assert len(wrong) == 1, done.stdout + done.stderr  # every rank says the same
    assert wrong.pop().partition(": ")[2] == (
        "rank 1: hierarchical: wrong combine, y in place, combine, y copied; "
        "flat: wrong combine, y in place, combine, y copied; "
        "rank 2: hierarchical: wrong topk_weights; flat: wrong topk_weights"
    )
    assert not (tmp_path / "record.json").exists()
