"""Hosts for tests: network namespaces joined by a switch, with links whose rate is set and that can be cut.

A host is a namespace with loopback and one interface. Its peer is a port of a bridge in one more namespace, so that
nothing is added to the machine's own network. Addresses are equal in every network: they are private to it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

INTERFACE = "net0"  # of each host
PREFIX = "deepep"  # of the namespaces' names: PREFIX-<pid>-<its start>-<number of its network>-<host>
COMMAND_SECONDS = 20.0

# A link is held to its rate by a bucket of tokens. The bucket must hold a segment as the kernel hands it over (64 KiB)
# and what accrues until the timer wakes; a large one would let short messages pass above the rate.
BURST_BYTES = 128 * 1024
# How long a byte may wait at a port: long enough that several senders to one host lose nothing at the start.
QUEUE_MILLISECONDS = 100

_networks = itertools.count()


class NetworkError(RuntimeError):
    """A command that builds or changes the network failed."""


class Counters(NamedTuple):
    """What passed a host's interface since it was made, both ways: bytes with Ethernet, IP and TCP headers."""

    rx_bytes: int
    tx_bytes: int
    rx_packets: int
    tx_packets: int

    def since(self, before: Counters) -> Counters:
        return Counters(*(now - then for now, then in zip(self, before, strict=True)))


class Network:
    """``num_hosts`` hosts on one switch, as a context manager.

    Args:
        num_hosts: 1 to 200.
        rate: of each host's link in each direction, as ``tc`` writes it (``"1gbit"``), or None: as fast as it goes.

    At the end every process in it is killed and every namespace removed; networks of processes that died before they
    could do so are removed by the next one.
    """

    def __init__(self, num_hosts: int, rate: str | None = None) -> None:
        self.num_hosts = num_hosts
        self.hosts = range(num_hosts)
        self._rate = rate
        self._base = f"{PREFIX}-{os.getpid()}-{_start_of(os.getpid())}-{next(_networks)}"
        self._switch = f"{self._base}-switch"

    def name(self, host: int) -> str:
        """The host's name: its domain, too."""
        return f"host{host}"

    def namespace(self, host: int) -> str:
        return f"{self._base}-{self.name(host)}"

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def command(self, host: int, *command: str) -> list[str]:
        """``command`` on ``host``: in its network, and under its name, which some launchers ask for."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name(host), *command]
        return ["ip", "netns", "exec", self.namespace(host), *named]

    def __enter__(self) -> Network:
        remove_leftovers()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent; waits until the last process in the network is gone."""
        for name in _namespaces():
            if name.startswith(f"{self._base}-"):
                _remove(name)

    def kill(self) -> None:
        """Kill every process on every host."""
        for host in self.hosts:
            _kill_all(self.namespace(host))

    def set_rate(self, host: int, rate: str | None) -> None:
        """Of the host's link, each direction on its own."""
        for namespace, interface in ((self.namespace(host), INTERFACE), (self._switch, _port(host))):
            if rate is None:
                with contextlib.suppress(NetworkError):  # there is none
                    _run("tc", "-n", namespace, "qdisc", "del", "dev", interface, "root")
                continue
            shape = ["rate", rate, "burst", str(BURST_BYTES), "latency", f"{QUEUE_MILLISECONDS}ms"]
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root", "tbf", *shape)

    def cut(self, host: int) -> None:
        """Pull the host's cable: what is sent is lost in silence, and connections stay open."""
        _run("ip", "-n", self._switch, "link", "set", _port(host), "down")

    def heal(self, host: int) -> None:
        _run("ip", "-n", self._switch, "link", "set", _port(host), "up")

    def counters(self, host: int) -> Counters:
        (link,) = json.loads(_run("ip", "-n", self.namespace(host), "-json", "-s", "link", "show", INTERFACE))
        rx, tx = link["stats64"]["rx"], link["stats64"]["tx"]
        return Counters(rx["bytes"], tx["bytes"], rx["packets"], tx["packets"])

    def _build(self) -> None:
        # Without addresses of IPv6's own the interfaces are silent, and counters show what the ranks sent.
        _run("ip", "netns", "add", self._switch)
        bridge = [
            "link add bridge0 type bridge forward_delay 0 mcast_snooping 0",
            "link set bridge0 addrgenmode none up",
        ]
        _batch(self._switch, bridge)
        for host in self.hosts:
            namespace = self.namespace(host)
            _run("ip", "netns", "add", namespace)
            _batch(
                namespace,
                [
                    "link set lo up",
                    f"link add {INTERFACE} type veth peer name {_port(host)} netns {self._switch}",
                    f"address add {self.address(host)}/24 dev {INTERFACE}",
                    f"link set {INTERFACE} addrgenmode none up",
                ],
            )
            _batch(self._switch, [f"link set {_port(host)} master bridge0 addrgenmode none up"])
            if self._rate is not None:
                self.set_rate(host, self._rate)


@functools.cache
def unavailable() -> str:
    """Why no network can be made here, or empty."""
    for tool in ("ip", "tc", "unshare", "hostname"):
        if shutil.which(tool) is None:
            return f"no `{tool}` on the path"
    try:
        with Network(2, rate="1gbit") as network:
            _run(*network.command(0, "true"))
    except (NetworkError, OSError) as e:
        return f"network namespaces are not permitted: {e}"
    return ""


def remove_leftovers() -> None:
    """Remove the networks of processes that are gone."""
    for name in _namespaces():
        owner = re.fullmatch(rf"{PREFIX}-(\d+)-(\d+)-\d+-\w+", name)
        if owner and _start_of(int(owner[1])) != int(owner[2]):
            _remove(name)


def _port(host: int) -> str:
    return f"port{host}"


def _run(*command: str, feed: str = "") -> str:
    done = subprocess.run(
        command, input=feed, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False, env=_plain()
    )
    if done.returncode:
        raise NetworkError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _plain() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


def _batch(namespace: str, lines: list[str]) -> None:
    _run("ip", "-n", namespace, "-batch", "-", feed="\n".join(lines) + "\n")


def _namespaces() -> list[str]:
    """Names of all networks' namespaces, of other processes too."""
    folder = Path("/run/netns")
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(f"{PREFIX}-")) if folder.is_dir() else []


def _remove(namespace: str) -> None:
    _kill_all(namespace)
    with contextlib.suppress(NetworkError):  # somebody else was quicker
        _run("ip", "netns", "del", namespace)


def _kill_all(namespace: str) -> None:
    deadline = time.monotonic() + COMMAND_SECONDS
    while time.monotonic() < deadline:
        try:
            pids = [int(pid) for pid in _run("ip", "netns", "pids", namespace).split()]
        except NetworkError:  # the namespace is gone
            return
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _start_of(pid: int) -> int:
    """When a process started, in ticks since boot, or 0: numbers of processes come again, these do not."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return 0
