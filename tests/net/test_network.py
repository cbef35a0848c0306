"""The test network itself: what it holds back, what it loses, what it counts, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from network import Network, remove_leftovers, unavailable

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(unavailable() != "", reason=unavailable()),
    pytest.mark.timeout(60),
]

RECEIVER = """
import socket, sys
server = socket.create_server(("", 5000))
print("listening", flush=True)
connection, _ = server.accept()
total = int(sys.argv[1])
while total:
    total -= len(connection.recv(min(total, 1 << 20)))
connection.sendall(b"all")
"""
SENDER = """
import json, socket, sys, time
address, total, gap = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
connection = socket.create_connection((address, 5000))
connection.sendall(bytes(1000))
begun = time.monotonic()
if gap:  # the test cuts the link here: nothing may come back but silence
    print("connected", flush=True)
    sys.stdin.readline()
    connection.settimeout(gap)
connection.sendall(bytes(total - 1000))
try:
    answer = connection.recv(3).decode()
except TimeoutError:
    print("silence", flush=True)
    connection.settimeout(30)
    answer = connection.recv(3).decode()
print(json.dumps([answer, time.monotonic() - begun]), flush=True)
"""


def start(network: Network, host: int, code: str, *arguments: object) -> subprocess.Popen[str]:
    command = network.command(host, sys.executable, "-c", code, *map(str, arguments))
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def send(network: Network, source: int, target: int, num_bytes: int, gap: float = 0.0) -> subprocess.Popen[str]:
    receiver = start(network, target, RECEIVER, num_bytes)
    assert receiver.stdout.readline() == "listening\n"
    return start(network, source, SENDER, network.address(target), num_bytes, gap)


@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 0)])
def test_rate_and_counters(source, target):
    """The limited host is host 1, once as the sender and once as the receiver."""
    num_bytes, bits_per_second = 4 << 20, 100e6
    with Network(2) as network:
        network.set_rate(1, "100mbit")
        before = [network.counters(host) for host in network.hosts]
        answer, seconds = json.loads(send(network, source, target, num_bytes).communicate(timeout=30)[0])
        passed = [network.counters(host).since(then) for host, then in zip(network.hosts, before, strict=True)]
        assert answer == "all"
        # No test can say how fast a busy machine is; that nothing goes faster than the link it can.
        assert seconds > 0.95 * num_bytes * 8 / bits_per_second
        # Segments leave the host in lots of up to 64 KiB with one header each, and acknowledgements come back.
        assert num_bytes < passed[source].tx_bytes < 1.05 * num_bytes
        assert num_bytes < passed[target].rx_bytes < 1.05 * num_bytes
        assert passed[source].rx_bytes < 0.05 * num_bytes
        network.set_rate(1, None)
        answer, without = json.loads(send(network, source, target, num_bytes).communicate(timeout=30)[0])
        assert without < seconds


def test_cut_is_silent_and_heals():
    with Network(3) as network:
        sender = send(network, 0, 1, 20_000, gap=1.5)
        assert sender.stdout.readline() == "connected\n"
        network.cut(1)
        sender.stdin.write("go\n")
        sender.stdin.flush()
        assert sender.stdout.readline() == "silence\n"
        beside, _ = json.loads(send(network, 2, 0, 1_000_000).communicate(timeout=30)[0])
        assert beside == "all"  # between the others nothing has changed
        network.heal(1)
        answer, _ = json.loads(sender.communicate(timeout=30)[0])
        assert answer == "all"


def namespaces_of(pid: int) -> list[str]:
    return [p.name for p in Path("/run/netns").iterdir() if p.name.startswith(f"deepep-{pid}-")]


def test_nothing_is_left():
    mine = namespaces_of(os.getpid())
    with pytest.raises(RuntimeError, match="in the middle"), Network(2) as network:
        orphan = subprocess.Popen(network.command(1, "sleep", "300"))
        raise RuntimeError("in the middle")
    assert orphan.wait(timeout=5) == -signal.SIGKILL
    assert namespaces_of(os.getpid()) == mine


def test_leftovers_of_a_killed_process_are_removed():
    code = f"""
import sys, subprocess, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from network import Network
network = Network(2).__enter__()
sleeper = subprocess.Popen(network.command(0, "sleep", "300"), start_new_session=True)
time.sleep(0.2)  # until it is in there
print(sleeper.pid, flush=True)
time.sleep(300)
"""
    with Network(1) as mine:
        owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        sleeper = int(owner.stdout.readline())
        assert len(namespaces_of(owner.pid)) == 3
        remove_leftovers()
        assert len(namespaces_of(owner.pid)) == 3, "it still runs"
        owner.kill()
        owner.wait()
        remove_leftovers()
        assert namespaces_of(owner.pid) == []
        state = Path(f"/proc/{sleeper}/stat")  # a zombie may wait for whoever adopted it
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
        assert mine.counters(0).rx_bytes >= 0  # other networks stand
