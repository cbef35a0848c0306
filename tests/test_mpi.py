"""MPI as a communicator: the contract of the others, rows, both faces, and what happens where ranks do not answer.

Two worlds of ``mpirun`` run all scenes of mpi_world.py; the tests read what each rank saw.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NUM_RANKS = 4
SECONDS = 90
HEALTHY = ("one_duplicate", "contract", "many_transfers", "subsets", "oracle")
FAULTS = ("never_came", "interrupted", "deadline_of_rows", "stopped")


def find_mpirun():
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def unavailable():
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed"
    return "" if find_mpirun() else "no mpirun"


pytestmark = [pytest.mark.mpi, pytest.mark.skipif(bool(unavailable()), reason=unavailable())]


def environment():
    ours = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "TORCHELASTIC_", "OMPI_", "PMI", "PMIX_", "PRTE_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    env["OMP_NUM_THREADS"] = "1"
    if os.geteuid() == 0:
        env["OMPI_ALLOW_RUN_AS_ROOT"] = env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    return env


def mpirun(num_ranks, *arguments):
    """The command line: OpenMPI wants to be allowed more ranks than cores, MPICH does not ask."""
    about = subprocess.run([find_mpirun(), "--version"], capture_output=True, text=True, env=environment(), check=False)
    options = ["--oversubscribe", "--bind-to", "none"] if "Open MPI" in about.stdout else []
    return [find_mpirun(), "-n", str(num_ranks), *options, sys.executable, *arguments]


def play(folder, scenes, meanwhile=lambda: None):
    """Run the scenes to their end; returns mpirun's exit status and what it said. No process stays behind."""
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            mpirun(NUM_RANKS, str(HERE / "mpi_world.py"), str(folder), *scenes),
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            until = time.monotonic() + SECONDS
            while process.poll() is None and time.monotonic() < until:
                meanwhile()
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                process.terminate()  # it kills its ranks, stopped ones too
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        log.seek(0)
        return process.returncode, log.read()[-3000:]


def seen_by_all(folder, scene, said):
    answers = []
    for rank in range(NUM_RANKS):
        path = folder / f"{scene}.{rank}.json"
        answers.append(json.loads(path.read_text()) if path.exists() else {"error": "did not get there"})
    errors = {rank: answer["error"] for rank, answer in enumerate(answers) if "error" in answer}
    assert not errors, "\n".join([scene, *(f"rank {rank}: {error}" for rank, error in errors.items()), said])
    return [answer["seen"] for answer in answers]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healthy")
    return folder, *play(folder, HEALTHY)


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    last = NUM_RANKS - 1

    def wake_the_last():
        told = [(folder / f"stopped.{rank}.json").exists() for rank in range(NUM_RANKS)]
        if all(told[:last]) and not told[last]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int((folder / f"pid.{last}").read_text()), signal.SIGCONT)

    return folder, *play(folder, FAULTS, wake_the_last)


@pytest.mark.parametrize("scene", HEALTHY)
def test_healthy(healthy, scene):
    folder, _, said = healthy
    seen = seen_by_all(folder, scene, said)
    if scene == "many_transfers":
        assert all(seen), "no row moved"


def test_no_message_of_ours_meets_the_user_s(healthy):
    folder, status, said = healthy
    assert not list(folder.glob("a message*")), said
    assert status == 0, said


def test_rank_that_does_not_come_is_named(faults):
    folder, _, said = faults
    for ranks, op, phase, message in seen_by_all(folder, "never_came", said)[:-1]:
        assert (ranks, op, phase) == ([NUM_RANKS - 1], "construct", "Buffer")
        assert f"rank {NUM_RANKS - 1} did not come to Buffer within 1 s" in message


def test_interrupt_is_answered_and_told(faults):
    folder, _, said = faults
    first, *others, last = seen_by_all(folder, "interrupted", said)
    assert (first, last) == ([None, None], [])
    assert others == [[["EPTimeoutError", [0]], ["EPPeerError", [0]]]] * (NUM_RANKS - 2)


def test_deadline_names_receives_and_sends(faults):
    folder, _, said = faults
    seen = seen_by_all(folder, "deadline_of_rows", said)
    missing = [[2], 1.0]
    assert seen[0] == seen[3] == [missing, None, missing, None]
    assert seen[1] == [missing] * 4
    assert seen[2] == []


def test_rank_that_stops_is_named_and_the_job_goes_on(faults):
    folder, status, said = faults
    *survivors, woken = seen_by_all(folder, "stopped", said)
    assert survivors == [["EPTimeoutError", [NUM_RANKS - 1], "dispatch", 2]] * (NUM_RANKS - 1)
    assert woken is not None
    assert woken[0] in ("EPTimeoutError", "EPPeerError")
    assert status == 0, said


PROBE = """
import sys
from deep_ep_py._mpi import is_mpi, mpi_communicator
from deep_ep_py.errors import EPBackendUnavailableError
assert not is_mpi(object()) and "mpi4py" not in sys.modules
import mpi4py
mpi4py.rc.thread_level = "serialized"
from mpi4py import MPI
assert is_mpi(MPI.COMM_WORLD)
try:
    mpi_communicator(MPI.COMM_WORLD)
except EPBackendUnavailableError as e:
    assert "THREAD_MULTIPLE" in str(e) and "thread_level" in str(e) and "mpi" in e.reasons
    print("refused")
"""


def test_one_thread_is_not_enough():
    command = mpirun(1, "-c", PROBE)
    run = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, "refused"), run.stderr
