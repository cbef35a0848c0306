"""benchmarks/gpu_check.py without a GPU: its arithmetic, its stages and limits, its ranks rehearsed on the CPU."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deep_ep_py.testing import run_threads

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import _gpu_cases
import _gpu_faces as faces
import _gpu_report as report
import _gpu_stages as stages
import _gpu_timings as timings
import gpu_check
from _gpu_together import NotCaptured, Together

FOLDER = Path(gpu_check.__file__).parent


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_floor_is_of_bytes_read_and_written():
    # Two ranks of 100 tokens, 150 rows received by each, at a copy rate of 1 GB/s that counts both ways.
    moved = report.moved_bytes("dispatch", 200, 300, 1000)
    assert moved == report.moved_bytes("combine", 200, 300, 1000) == 200 * 1000 + 300 * 1000
    assert report.floor_seconds(moved, 1e9) == 5e-4
    with pytest.raises(ValueError, match="operation"):
        report.moved_bytes("barrier", 1, 1, 1)


@pytest.mark.parametrize(
    ("statuses", "code"),
    [(["passed", "skipped"], 0), (["passed", "failed"], 1), (["skipped"], 1), (["passed"], 0)],
)
def test_exit_status(statuses, code):
    record = {"stages": {f"s{i}": {"status": s} for i, s in enumerate(statuses)}}
    assert report.summary(record)[0] == code


# --- stages -----------------------------------------------------------------------------------------------------------


def stage(seconds=20.0):
    return stages.Stage("some", seconds)


def python(code):
    """A stage's command: ``code`` finds ``write``, which writes the result."""
    head = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); from pathlib import Path\n"
    head += "from _gpu_stages import write_result\nwrite = lambda *a, **d: write_result(Path(sys.argv[1]), *a, **d)\n"
    return lambda result: [sys.executable, "-c", head + code, str(result)]


def test_stage_passes():
    result = stages.run_stage(stage(), python("write('passed', found=3)"))
    assert (result.status, result.data) == ("passed", {"found": 3})


def test_stage_that_dies_has_failed():
    result = stages.run_stage(stage(), python("print('so long'); sys.exit(5)"))
    assert result.status == "failed"
    assert "exit status 5: so long" in result.reason


def test_stage_that_dies_after_its_last_word_has_failed():
    result = stages.run_stage(stage(), python("write('passed'); sys.stdout.flush(); import os; os.abort()"))
    assert result.status == "failed"
    assert "at the end" in result.reason


def test_limit_ends_all_that_a_stage_started(tmp_path):
    """And what it had found is kept."""
    alive = tmp_path / "alive"
    child = f"import time; from pathlib import Path\nwhile True: Path({str(alive)!r}).write_text('x'); time.sleep(0.05)"
    code = f"import subprocess, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
    code += f"write('failed', 'not done', found=1)\nwhile not Path({str(alive)!r}).exists(): time.sleep(0.01)\n"
    result = stages.run_stage(stage(5.0), python(code + "time.sleep(600)"))
    assert (result.status, result.reason, result.data) == ("failed", "not done after 5 s", {"found": 1})
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists(), "a process of the stage outlived its limit"


def refuse(result, architecture):
    raise stages.Skipped("nothing here")


def fall(result, architecture):
    stages.write_result(result, "failed", "not done", half=1)
    raise ValueError("fell over")


def test_a_stage_s_process_writes_what_became_of_it(tmp_path):
    table = {"refuse": refuse, "fall": fall, "stand": lambda result, architecture: {"sm": architecture}}
    ended = {}
    for name in table:
        result = tmp_path / name
        ended[name] = (stages.main(table, [name, str(result), "90"]), *json.loads(result.read_text()).values())
    assert ended == {
        "refuse": (0, "skipped", "nothing here", {}),
        "fall": (1, "failed", "ValueError: fell over", {"half": 1}),
        "stand": (0, "passed", "", {"sm": "90"}),
    }


def gpu_check_run(*options):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(FOLDER / "gpu_check.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=environment)


def test_without_a_gpu_it_says_so():
    said = gpu_check_run("--stages", "threads,timings")
    assert said.returncode == 2
    assert "no GPU to check: " in said.stdout


def test_driverless_stage_needs_no_gpu():
    said = gpu_check_run("--stages", "driverless,graph")
    assert said.returncode == 2, said.stdout + said.stderr
    assert "passed: driverless; skipped: graph" in said.stdout


def test_unknown_stage_is_refused():
    said = gpu_check_run("--stages", "threads,no_such")
    assert said.returncode == 2
    assert "no no_such; there are build, " in said.stderr


# --- a rehearsal of what ranks do, on the CPU -------------------------------------------------------------------------


class OnHost(Together):
    """Ranks that meet without a GPU: a graph is a function, time is the host's."""

    def __init__(self, num_ranks):
        super().__init__(num_ranks)
        self._capturing = contextlib.nullcontext()  # here a step runs when it is captured, and meets its peers

    def _captured(self, step, steps):
        held = [step() for _ in range(steps)][-1]

        class Graph:
            def replay(self):
                copy_into(held, [step() for _ in range(steps)][-1])

        return Graph(), held

    def synchronize(self):
        pass

    def _time(self, step, steps):
        began = time.perf_counter()
        for _ in range(steps):
            step()
        return 1e3 * (time.perf_counter() - began)


def copy_into(held, new):
    if isinstance(held, torch.Tensor):
        held.copy_(new)
    elif isinstance(held, tuple):
        for a, b in zip(held, new, strict=True):
            copy_into(a, b)


@pytest.fixture
def rehearsal(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the ranks run on the GPU here")
    for module in (_gpu_cases, faces, timings):
        monkeypatch.setattr(module, "BACKEND", "shm")
        monkeypatch.setattr(module, "DEVICE", "cpu")
    for name, value in {"RANKS": 2, "TOKENS": 16, "HIDDEN": 64, "EXPERTS": 16, "SWEEP": (1, 4)}.items():
        monkeypatch.setattr(timings, name, value)


@pytest.mark.parametrize("few", [False, True])
def test_rehearsal_of_round_trips(rehearsal, few):
    assert set(run_threads(2, _gpu_cases.round_trips, few)) == {9 if few else 29}
    run_threads(2, _gpu_cases.few_round_trips)


def test_rehearsal_of_faces(rehearsal):
    run_threads(2, faces.faces)


def test_rehearsal_of_replays(rehearsal):
    run_threads(2, _gpu_cases.replayed, OnHost(2))


def test_rehearsal_of_replays_sees_a_graph_that_does_nothing(rehearsal):
    class Idle(OnHost):
        def _captured(self, step, steps):
            graph, held = super()._captured(step, steps)
            graph.replay = lambda: None
            return graph, held

    with pytest.raises(Exception, match="replayed, seed 1"):
        run_threads(2, _gpu_cases.replayed, Idle(2))


def empty_data():
    return {"copy_gb_per_s": 10.0, "operations": [], "sweeps": {}, "pairs": [], "rows": {}}


def test_rehearsal_of_timings(rehearsal):
    data, kept = empty_data(), []
    run_threads(2, timings.time_operations, OnHost(2), data, lambda: kept.append(1))
    assert [(o["name"], o["how"]) for o in data["operations"]] == [
        (f"{kind}: {name}", how)
        for kind in ("compact", "expanded")
        for name, how in (
            ("dispatch", "handle, graph"),
            ("combine", "handle, graph"),
            ("dispatch", "counts on the host, eager"),
        )
    ]
    assert {name: set(sweep) for name, sweep in data["sweeps"].items()} == {
        "dispatch": {"1", "4"},
        "combine": {"1", "4"},
    }
    compact, expanded = (next(o for o in data["operations"] if kind in o["name"]) for kind in ("compact", "expanded"))
    assert expanded["floor_ms"] == pytest.approx(report.floor_seconds((32 + 256) * 128, 1e10) * 1e3)
    assert compact["floor_ms"] < expanded["floor_ms"]
    assert kept


def test_rehearsal_of_pairs(rehearsal):
    data = empty_data()
    run_threads(2, timings.time_pair, OnHost(2), data, lambda: None, 8)
    assert [(p["ranks"], p["tokens"], p["how"]) for p in data["pairs"]] == [(2, 8, "as called"), (2, 8, "graph")]


def test_timings_refuse_wrong_sums(rehearsal):
    problem = timings.Problem(0, 2, 4)
    problem.check((problem.x.float() * timings.TOPK).bfloat16(), expand=True)
    with pytest.raises(AssertionError, match="not timed"):
        problem.check(problem.x, expand=True)


def test_what_cannot_be_captured_is_known_to_all(rehearsal):
    class Refusing(OnHost):
        def _captured(self, step, steps):
            raise RuntimeError("not in a graph")

    data = empty_data()
    run_threads(2, timings.time_operations, Refusing(2), data, lambda: None)
    assert {o["how"] for o in data["operations"]} == {
        "handle, eager, for it could not be captured",
        "counts on the host, eager",
    }
    with pytest.raises(NotCaptured, match="not in a graph"):
        Refusing(1).capture(lambda: None)
