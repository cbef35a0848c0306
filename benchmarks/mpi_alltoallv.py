"""MPI_Alltoallv with the byte counts of a dispatch and a combine: one rank of ``mpirun``, led by the benchmark.

Run by bench_dispatch_combine.py as ``mpirun -n R python mpi_alltoallv.py <socket>``. Each rank connects to the Unix
socket, says ``{"rank": r}``, and then answers one JSON line per command, asleep in between:

- ``{"do": "setup", "matrices": {name: [[bytes from s to d]]}}``: allocate and touch buffers -> ``{}``
- ``{"do": "run", "name": name, "iterations": n}`` -> ``{"seconds": [n]}``, each call started after a barrier
- ``{"do": "end"}``: leave
"""

from __future__ import annotations

import json
import socket
import sys
import time
from itertools import accumulate
from typing import Any


def main(address: str) -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    rank = comm.Get_rank()
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(address)
        lines = link.makefile("rw")

        def answer(value: dict[str, Any]) -> None:
            lines.write(json.dumps(value) + "\n")
            lines.flush()

        answer({"rank": rank, "library": MPI.Get_library_version().split(",")[0].strip()})
        plans: dict[str, tuple[Any, Any]] = {}
        for line in lines:
            command = json.loads(line)
            if command["do"] == "end":
                break
            if command["do"] == "setup":
                plans = _plans(MPI, rank, command["matrices"])
                for send, recv in plans.values():
                    comm.Alltoallv(send, recv)
                answer({})
                continue
            send, recv = plans[command["name"]]
            seconds = []
            for _ in range(command["iterations"]):
                comm.Barrier()
                start = time.perf_counter()
                comm.Alltoallv(send, recv)
                seconds.append(time.perf_counter() - start)
            answer({"seconds": seconds})


def _plans(mpi: Any, rank: int, matrices: dict[str, list[list[int]]]) -> dict[str, tuple[Any, Any]]:
    """Arguments of Alltoallv by name. All share two buffers, as large as the largest exchange."""
    totals = [(sum(matrix[rank]), sum(row[rank] for row in matrix)) for matrix in matrices.values()]
    send_buffer = bytearray(max(sent for sent, _ in totals) or 1)
    recv_buffer = bytearray(max(received for _, received in totals) or 1)
    plans = {}
    for name, matrix in matrices.items():
        parts = []
        for buffer, counts in ((send_buffer, matrix[rank]), (recv_buffer, [row[rank] for row in matrix])):
            parts.append([buffer, (counts, [0, *accumulate(counts[:-1])]), mpi.BYTE])
        plans[name] = (parts[0], parts[1])
    return plans


if __name__ == "__main__":
    main(sys.argv[1])
