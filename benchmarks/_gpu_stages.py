"""A stage of gpu_check.py: a command with a limit, and what became of it. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STATUSES = ("passed", "failed", "skipped")
TAIL_LINES = 25


@dataclass(frozen=True)
class Stage:
    """``seconds``: what it may take, whatever it started included."""

    name: str
    seconds: float
    needs_gpu: bool = True


@dataclass
class Result:
    """What became of a stage: "passed", "failed" or "skipped", and why; ``data``: what it measured."""

    status: str
    reason: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    tail: str = ""

    def line(self) -> str:
        first = self.reason.strip().splitlines()[-1:] or [""]
        return f"{self.status} in {self.seconds:.0f} s" + (f": {first[0][:300]}" if first[0] else "")

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = {"status": self.status, "seconds": round(self.seconds, 1)}
        for name in ("reason", "data", "tail"):
            if getattr(self, name):
                found[name] = getattr(self, name)
        return found


def write_result(path: Path, status: str, reason: str = "", **data: Any) -> None:
    """What a stage's process leaves behind. Written again as it goes on, so that a limit loses only the rest."""
    assert status in STATUSES
    staged = path.with_suffix(".new")
    staged.write_text(json.dumps({"status": status, "reason": reason, "data": data}))
    staged.replace(path)


class Skipped(Exception):
    """A stage cannot run here; its text says why."""


def main(stages: dict[str, Callable[[Path, str], dict[str, Any]]], argv: list[str]) -> int:
    """A stage's process: ``<stage> <result file> <architecture>``. What it had written before it failed stays."""
    name, result, architecture = argv[0], Path(argv[1]), argv[2]
    try:
        data = stages[name](result, architecture)
    except Skipped as e:
        write_result(result, "skipped", str(e))
        return 0
    except Exception as e:
        traceback.print_exc()
        before = json.loads(result.read_text())["data"] if result.exists() else {}
        write_result(result, "failed", f"{type(e).__name__}: {e}", **before)
        return 1
    write_result(result, "passed", **data)
    return 0


def run_stage(
    stage: Stage, command: Callable[[Path], list[str]], environment: Mapping[str, str] | None = None
) -> Result:
    """Runs ``command(result file)`` and everything that it starts until it ends or ``stage.seconds`` are over."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command(result),
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True,
            )  # fmt: skip
            try:
                ended: int | None = process.wait(timeout=stage.seconds)
            except subprocess.TimeoutExpired:
                ended = None
            finally:
                kill_session(process)
        said = log.read_text(errors="replace").splitlines()
        tail = "\n".join(said[-TAIL_LINES:])
        found = json.loads(result.read_text()) if result.exists() else None
    seconds = time.monotonic() - began
    if ended is None:
        data = found["data"] if found else {}
        return Result("failed", f"not done after {stage.seconds:.0f} s", data, seconds, tail)
    if found is None:
        return Result("failed", f"exit status {ended}" + (f": {said[-1]}" if said else ""), {}, seconds, tail)
    if ended != 0 and found["status"] == "passed":  # died after its last word: while it cleaned up
        return Result("failed", f"exit status {ended} at the end", found["data"], seconds, tail)
    return Result(found["status"], found["reason"], found["data"], seconds, tail if found["status"] == "failed" else "")


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """The process and all of its session: what it started may have made process groups of its own, as ninja does."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(int(folder.name)) == process.pid:
                os.kill(int(folder.name), signal.SIGKILL)
    process.wait()
