"""doctor: what it reports, what it returns, and that it sees a machine that is not well."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deep_ep_py import ElasticBuffer, Settings, doctor
from deep_ep_py.__main__ import main
from deep_ep_py.testing import run_threads, trials

linux = pytest.mark.skipif(sys.platform != "linux", reason="shared memory between processes needs Linux")


def python(*arguments, **variables):
    env = {k: v for k, v in os.environ.items() if not k.startswith("DEEP_EP_PY_")} | variables
    command = [sys.executable, "-m", "deep_ep_py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=env)


def leftovers():
    """This process's children, by process number, without the servers that multiprocessing keeps for later worlds."""
    children = [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    servers = (b"multiprocessing.forkserver", b"multiprocessing.resource_tracker")
    return [int(p) for p in children if not any(s in Path(f"/proc/{p}/cmdline").read_bytes() for s in servers)]


def by_name(report):
    return {f["name"]: f for f in report["findings"]}


@linux
@pytest.mark.processes
@pytest.mark.slow
def test_doctor_finds_this_machine_well():
    before = leftovers()
    done = python("doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)  # alone on standard output, whatever gloo prints
    assert report["works"] is True and report["default_backend"] == "shm"
    found = by_name(report)
    for name in ("auto (default)", "shm", "collective", "threads", "memfd", "/proc/<pid>/fd", "pidfd", "futex"):
        assert found[name]["status"] == "ok", found[name]
    for name in ("torch", "SIMD", "cores", "waits", "available", "huge pages", "file descriptors", "GPUs", "/dev/shm"):
        assert found[name]["text"], name
    for finding in report["findings"]:
        assert finding["remedy"] or finding["status"] in ("ok", "info"), finding
    assert leftovers() == before


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        (
            "DEEP_EP_PY_BACKEND",
            "nonsense",
            "set DEEP_EP_PY_BACKEND to auto, shm, cuda_peer, hybrid or collective, or unset it",
        ),
        ("DEEP_EP_PY_TIMEOUT_SECONDS", "soon", "correct or unset that variable"),
    ],
)
def test_doctor_names_a_bad_variable(name, value, remedy):
    done = python("doctor", **{name: value})
    assert done.returncode == 1, done.stdout + done.stderr
    assert name in done.stdout and value in done.stdout and remedy in done.stdout
    assert "the default backend DOES NOT WORK here" in done.stdout
    assert "ok  collective" in done.stdout  # the others are tried all the same


@pytest.mark.processes
@pytest.mark.slow
def test_doctor_honours_a_backend_by_name():
    done = python("doctor", DEEP_EP_PY_BACKEND="collective")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "collective (default)" in done.stdout and "the default backend works: collective" in done.stdout


def test_without_a_command_help_is_printed(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "doctor" in said and said.startswith("usage: ")


@pytest.mark.parametrize("arguments", [("cure",), ("doctor", "--ranks", "0"), ("doctor", "--timeout", "soon")], ids=str)
def test_usage_errors_leave_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    said = capsys.readouterr()
    assert left.value.code == 2 and "usage: " in said.err and said.out == ""


# --- machines that are not well --------------------------------------------------------------------------------------


def deny_access():
    """Make this process one whose descriptors no other may open, as hidepid and containers do."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, words = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, words) == 0
    words[0] &= ~(1 << 19)  # CAP_SYS_PTRACE, effective
    assert libc.capset(header, words) == 0
    assert libc.prctl(4, 0, 0, 0, 0) == 0  # PR_SET_DUMPABLE


def denied(group, *args):
    deny_access()
    return trials.try_backends(group, *args)


def crashing(group, names, *args):
    if "shm" in names:
        os.kill(os.getpid(), 4)  # SIGILL, as a kernel for another processor
    return trials.try_backends(group, names, *args)


def stuck(group, names, *args):
    if "shm" in names:
        import time

        time.sleep(1000)
    return trials.try_backends(group, names, *args)


def diagnose(monkeypatch, trial, settings=None, seconds=60.0):
    monkeypatch.setattr(doctor, "try_backends", trial)
    monkeypatch.setattr(doctor, "_in_threads", lambda *args: None)
    report = doctor.Report()
    doctor._round_trips(report, settings, 2, seconds)
    return report, {f.name: f for f in report.findings}


@linux
@pytest.mark.processes
@pytest.mark.slow
def test_doctor_sees_that_peers_may_not_open_descriptors(monkeypatch):
    report, found = diagnose(monkeypatch, denied, Settings())
    assert found["/proc/<pid>/fd"].status == "fail" and "hidepid" in found["/proc/<pid>/fd"].remedy
    assert found["memfd"].status == "ok"
    assert found["futex"].status == "info" and "not tried" in found["futex"].text  # nothing was mapped to try it on
    assert found["shm"].status == "fail" and "Permission denied" in found["shm"].text
    # auto goes on without it, and says so.
    assert report.works and report.default_backend == "collective"
    assert found["auto (default)"].status == "warn" and "refused shm" in found["auto (default)"].text
    assert "hidepid" in found["auto (default)"].remedy


@pytest.mark.processes
@pytest.mark.slow
def test_doctor_outlives_a_backend_that_dies(monkeypatch):
    before = leftovers()
    report, found = diagnose(monkeypatch, crashing, Settings(backend="collective"))
    assert found["shm"].status == "fail" and "exit code -4" in found["shm"].text and found["shm"].remedy
    assert found["collective (default)"].status == "ok" and report.works
    assert leftovers() == before


@pytest.mark.processes
@pytest.mark.slow
def test_doctor_outlives_a_backend_that_hangs(monkeypatch):
    before = leftovers()
    report, found = diagnose(monkeypatch, stuck, Settings(backend="shm"), seconds=8.0)
    assert found["shm (default)"].status == "fail" and not report.works
    assert "did not finish" in found["shm (default)"].text and "--timeout" in found["shm (default)"].remedy
    assert leftovers() == before


def test_every_rank_s_failure_is_reported():
    well, sick = {"futex": "", "memfd": ""}, {"futex": "Operation not permitted", "memfd": ""}
    fast, slow = {"name": "shm", "refused": {}, "seconds": 0.1}, {"name": "shm", "refused": {}, "seconds": 0.2}
    merged = trials.worst_of([{trials.SYSTEM_CALLS: well, "shm": fast}, {trials.SYSTEM_CALLS: sick, "shm": slow}])
    assert merged == {trials.SYSTEM_CALLS: sick, "shm": slow}
    left_out = {"futex": trials.NOT_TRIED, "memfd": ""}
    for pair in ([well, left_out], [left_out, well]):
        assert trials.worst_of([{trials.SYSTEM_CALLS: found} for found in pair]) == {trials.SYSTEM_CALLS: left_out}
    assert trials.worst_of([{trials.SYSTEM_CALLS: left_out}, {trials.SYSTEM_CALLS: sick}]) == {
        trials.SYSTEM_CALLS: sick
    }
    assert trials.worst_of([{"shm": fast}, {"shm": {"error": "no"}}]) == {"shm": {"error": "no"}}


@pytest.mark.parametrize("fault", [None, "dispatch", "combine"])
def test_a_round_trip_compares_what_came(monkeypatch, fault):
    real = getattr(ElasticBuffer, fault or "dispatch")

    def off_by_one(self, *args, **kwargs):
        rows, *others = real(self, *args, **kwargs)
        if self.rank_idx == 1:
            rows[-1, -1] += 1
        return rows, *others

    if fault:
        monkeypatch.setattr(ElasticBuffer, fault, off_by_one)
    names = ["shm", "collective"] if sys.platform == "linux" else ["collective"]
    merged = trials.worst_of(run_threads(2, trials.try_backends, names, Settings(), 20.0))
    for name in names:
        if fault:
            assert f"{fault} delivered" in merged[name]["error"]
        else:
            assert merged[name]["name"] == name and merged[name]["seconds"] > 0
