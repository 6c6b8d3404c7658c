"""Hosts as network namespaces around a switch, with links of a chosen rate: the implementation of `cluster.py`.

A cluster is 1 + N network namespaces: `mcPIDxHEX-sw` holds a bridge, and `mcPIDxHEX-I` holds host I, joined to it by a
veth pair (`eth0` in the host, `portI` at the switch). The machine's own network stays as it is, so several clusters can
use the same addresses, and nothing remains once the namespaces are deleted.

A separate process in its own session cleans up. It waits for the end of its standard input, which comes also when this
process is killed; then it ends the processes in the namespaces (no others) and deletes the namespaces.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MOST_HOSTS = 64
NETWORK = "10.77.0.{}"
SWITCH = NETWORK.format(254)

AGENT = """#!/bin/sh
# Run a command on a host of this cluster, with the arguments of ssh: agent [-OPTION...] ADDRESS COMMAND...
while [ "${{1#-}}" != "$1" ]; do shift; done
export MPICOMP_CLUSTER_HOST=$((${{1##*.}} - 1))
name={tag}-$MPICOMP_CLUSTER_HOST
shift
# A host has its own name, by which MPI libraries distinguish hosts, and its own shared memory.
exec ip netns exec $name unshare --uts sh -c "echo $name >/proc/sys/kernel/hostname
mount --bind {folder}/hosts /etc/hosts; mount -t tmpfs shm /dev/shm
$*"
"""


class Unavailable(Exception):
    """This machine cannot build the cluster; the message says what is missing."""


@dataclass(frozen=True)
class Rate:
    """A rate as `tc` writes it, e.g. 100mbit; `none` is unlimited."""

    text: str

    def __post_init__(self) -> None:
        if self.text != "none" and not 1e6 <= self.bits <= 100e9:
            raise ValueError(f"a rate is e.g. 100mbit, 1gbit, 10gbit (1mbit to 100gbit), or none; got {self.text!r}")

    @property
    def bits(self) -> float:
        """Bits per second; 0 for `none` and for other texts."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", self.text)
        return float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]] if match else 0

    def shaping(self) -> tuple[str, str]:
        """Return the arguments of `tc qdisc add`, and those of `ip link set`.

        A token bucket passes a burst unshaped after every pause, and a small bucket loses bandwidth when timers are
        late. So there are two buckets: one holds 1 ms of data, which makes up for late timers, and a small one at 1.2
        times the rate shapes short messages too, except for the first 9 kB (100mbit), 18 kB (1gbit) or 144 kB (10gbit).
        Segments larger than the small bucket are cut into packets, which is slow, so TCP passes on smaller segments.
        Smaller buckets cost two cores 10 % of the bandwidth of four hosts at 1gbit. The queue holds 50 ms, as a
        switch's.
        """
        if not self.bits:
            return "pfifo limit 10000", ""
        per_ms = self.bits / 8000
        burst, small, limit = max(30_000, per_ms), max(9000, 0.144 * per_ms), max(4_000_000, 50 * per_ms)
        bucket = f"rate {self.text} burst {burst:.0f} limit {limit:.0f}"
        segment = min(max(0.131 * per_ms, 8192), 65536)
        return f"tbf {bucket} peakrate {1.2 * self.bits:.0f}bit mtu {small:.0f}", f"gso_max_size {segment:.0f}"


def missing() -> list[str]:
    """Return texts that name each requirement of a cluster that this machine lacks."""
    lacks = []
    if sys.platform != "linux":
        return ["Linux, for its network namespaces"]
    if os.geteuid() != 0:
        lacks.append("root, to make network namespaces (try sudo)")
    tools = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if tools:
        lacks.append(f"{' and '.join(tools)} in PATH (Debian: apt-get install iproute2)")
    if shutil.which("unshare") is None:
        lacks.append("unshare in PATH (Debian: apt-get install util-linux)")
    return lacks


def call(command: str, stdin: str = "", hint: str = "") -> str:
    """Run a tool to its end and return its output."""
    done = subprocess.run(shlex.split(command), input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"`{command}` failed: {done.stderr.strip()}{hint and f' ({hint})'}")
    return done.stdout


class Cluster:
    """N hosts with links of a rate each way (and a delay one way), within a `with`."""

    def __init__(self, hosts: int, rate: Rate, delay: str | None = None) -> None:
        if lacks := missing():
            raise Unavailable(f"missing: {'; '.join(lacks)}")
        if "MPICOMP_CLUSTER" in os.environ:
            raise Unavailable("already inside a cluster (MPICOMP_CLUSTER is set), which cannot hold another")
        self.hosts, self.rate, self.delay = hosts, rate, delay
        self.tag = f"mc{os.getpid()}x{secrets.token_hex(2)}"  # containers may have the same ids and share /run/netns
        self.names = [f"{self.tag}-{host}" for host in range(hosts)]
        self.switch = f"{self.tag}-sw"
        self.addresses = [NETWORK.format(host + 1) for host in range(hosts)]

    def __enter__(self) -> Cluster:
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.tag}-"))
        self.reaper = subprocess.Popen(
            [sys.executable, "-I", __file__, self.tag, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.reaper.communicate()  # closes its input, and waits for its end

    def _build(self) -> None:
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{address} {name}\n" for address, name in zip(self.addresses, self.names, strict=True))
        )
        self.agent = self.folder / "agent"
        self.agent.write_text(AGENT.format(tag=self.tag, folder=self.folder))
        self.agent.chmod(0o700)
        for name in (self.switch, *self.names):
            call(f"ip netns add {name}", hint="in a container this takes CAP_SYS_ADMIN and CAP_NET_ADMIN")
            call(f"ip -n {name} link set dev lo up")
        queue, segment = self.rate.shaping()
        ports = ["link add name br type bridge", f"addr add {SWITCH}/24 dev br", "link set dev br up"]
        for host, name in enumerate(self.names):
            ports += [
                f"link add name port{host} type veth peer name eth0 netns {name}",
                f"link set dev port{host} master br up {segment}",
            ]
        call(f"ip -n {self.switch} -batch -", "\n".join(ports))
        for name, address in zip(self.names, self.addresses, strict=True):
            call(f"ip -n {name} -batch -", f"addr add {address}/24 dev eth0\nlink set dev eth0 up {segment}\n")
            call(f"tc -n {name} qdisc add dev eth0 root {queue}")
        # The other direction: a real link receives at the rate at which it sends.
        for host in range(self.hosts):
            add = f"tc -n {self.switch} qdisc add dev port{host}"
            if self.delay is None:
                call(f"{add} root {queue}")
            else:
                call(f"{add} root handle 1: netem delay {self.delay} limit 100000", hint="is sch_netem in this kernel?")
                call(f"{add} parent 1:1 handle 10: {queue}")

    def start(
        self, command: list[str], environment: dict[str, str], host: int | None = None, stdout: int | None = None
    ) -> subprocess.Popen[str]:
        """Start a command at the switch, which every host can reach, or on a host."""
        if host is None:
            command = ["ip", "netns", "exec", self.switch, *command]
        else:
            command = [str(self.agent), self.addresses[host], shlex.join(command)]
        ours = {"MPICOMP_CLUSTER": f"{self.hosts},{self.rate.text}", "MPICOMP_CLUSTER_ADDRS": ",".join(self.addresses)}
        return subprocess.Popen(
            command,
            env={**os.environ, **environment, **ours},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            text=True,
            start_new_session=True,
        )

    def sent(self) -> int:
        """Return the bytes that all hosts have sent so far."""
        return sum(sent_bytes(f"-n {name}") for name in self.names)


def sent_bytes(namespace: str = "") -> int:
    """Return the bytes that a host sent: those on a wire except for preamble, checksum and gap.

    `tc` counts the headers of every packet. `/sys/class/net/eth0/statistics/tx_bytes` counts one header per segment of
    TCP, which becomes several packets: 3 to 4 % less.
    """
    queues = json.loads(call(f"tc {namespace} -s -j qdisc show dev eth0"))
    return int(next(queue["bytes"] for queue in queues if queue.get("root")))


def reap(tag: str, folder: str) -> None:
    """Wait for the end of the cluster, then end the processes in its namespaces and delete the namespaces."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    # First mpirun, which ends its ranks in good order, then the remaining processes.
    for name, number, patience in ((f"{tag}-sw", signal.SIGTERM, 2.0), ("", signal.SIGKILL, 10.0)):
        deadline = time.monotonic() + patience
        while pids := processes(name or f"{tag}-"):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05 if number == signal.SIGKILL else 0.5)
    for name in namespaces(f"{tag}-"):
        subprocess.run(["ip", "netns", "delete", name], check=False)
    shutil.rmtree(folder, ignore_errors=True)


def namespaces(prefix: str) -> list[str]:
    """Return the names of the namespaces that begin with `prefix`."""
    lines = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout.splitlines()
    return [line.split()[0] for line in lines if line.startswith(prefix)]


def processes(prefix: str) -> list[int]:
    """Return the processes in the namespaces whose name begins with `prefix`."""
    found = []
    for name in namespaces(prefix):
        done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
        found += [int(pid) for pid in done.stdout.split()]
    return found


if __name__ == "__main__":
    reap(*sys.argv[1:])
