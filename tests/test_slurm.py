"""The scripts in slurm/, submitted to a real slurmctld with four nodes that are all this machine.

munged, slurmctld and four slurmd run in the foreground with a temporary configuration. They end with the tests: by
their process ids, with all their descendants. Debian: apt-get install --no-install-recommends slurmctld slurmd
slurm-client slurm-wlm-basic-plugins munge, and libpmix-dev for Open MPI.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jobs
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.jobs]

ROOT = Path(__file__).parents[1]
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
NODES = 4
PATIENCE = 60  # seconds until the nodes are idle, and until a job has ended after its cancellation

CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=600
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
TmpFS={folder}/tmp-%n
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

DIRTY = """
import os
holes = [bytearray(os.urandom(size)) for size in range(100, 9000, 8) for _ in range(8)]
del holes  # MPICH over UCX publishes some of this memory, and srun's pmi2 then cannot read its lines
"""
PROGRAM = """
import os, sys
import numpy as np
from mpi4py import MPI
import mpicomp
comm = MPI.COMM_WORLD
total = mpicomp.allreduce(comm, np.full(1000, comm.rank + 1, np.float32), "dense")
settings = [os.environ.get(name) for name in ("OMP_NUM_THREADS", "FI_TCP_IFACE", "OMPI_MCA_btl_tcp_if_include")]
if comm.rank == 0:
    print("ranks", comm.size, "sum", total[0], "settings", *settings, "in", os.getcwd(), "restarts", end=" ")
    print(os.environ.get("SLURM_RESTART_COUNT", 0), flush=True)
comm.Barrier()
sys.exit(int(sys.argv[1]))
"""


class Slurm:
    """A SLURM of this machine alone, within a `with`."""

    def __init__(self) -> None:
        # The path of a socket has at most 107 characters, fewer than a folder of pytest may have.
        self.folder = Path(tempfile.mkdtemp(prefix="mpicomp-slurm-", dir="/tmp"))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {**jobs.environ(), "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True, check=False, timeout=30)
        ours = {pid for process in self.processes for pid in descendants(process.pid)}
        for process in reversed(self.processes):  # munged last: the others talk through it
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in ours:
            if jobs.is_running(pid):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder)

    def _start(self) -> None:
        folder, host = self.folder, socket.gethostname().partition(".")[0]
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        ports = free_ports(1 + NODES)
        for node in range(NODES):
            (folder / f"tmp-n{node}").mkdir()  # PMIx makes the same folder on every node
        nodes = "\n".join(
            f"NodeName=n{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN"
            for node, port in enumerate(ports[1:])
        )
        config = folder / "slurm.conf"
        config.write_text(CONFIG.format(host=host, ports=ports, folder=folder, nodes=nodes))
        files = {name: f"--{name}-file={folder}/munge.{name.split('-')[0]}" for name in ("key", "pid", "log", "seed")}
        self._run("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files.values())
        wait_for(lambda: (folder / "munge.socket").exists(), "munged has a socket", self)
        self._run("slurmctld", "-D", "-f", str(config))
        for node in range(NODES):
            self._run("slurmd", "-D", "-f", str(config), "-N", f"n{node}")
        wait_for(lambda: self.call("sinfo", "-h", "-o", "%T %D").split() == ["idle", str(NODES)], "nodes idle", self)

    def _run(self, *command: str) -> None:
        with (self.folder / f"{len(self.processes)}-{command[0]}.log").open("wb") as log:
            self.processes.append(
                subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def call(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        return done.stdout + done.stderr

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        return "\n".join(f"{file.name}: {file.read_text()[-2000:]}" for file in sorted(self.folder.glob("*.log")))

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), **more: str) -> tuple[int, str]:
        """Submit a script of slurm/ from the root of the repository, wait for its end, return its code and output."""
        output = self.folder / f"out-{secrets.token_hex(4)}"
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={output}", *options, str(ROOT / "slurm" / script), *arguments],
            env={**self.environment, "PATH": tools, "PYTHONPATH": paths, "MPI_PLUGIN": plugin(), **more},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        status = self.ended(done.stdout.strip(), output)
        return status, output.read_text() if output.exists() else f"no output; {self.logs()}"

    def ended(self, job: str, output: Path) -> int:
        """Wait for the end of a job; return its exit code, where `sbatch --wait` would take up to 10 s longer."""
        deadline = time.monotonic() + 400
        while True:
            shown = self.call("scontrol", "show", "job", job)
            state, code = (re.search(rf"{name}=(\w+)", shown) for name in ("JobState", "ExitCode"))
            assert state, shown
            assert code, shown
            if state[1] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
                return int(code[1])
            text = output.read_text() if output.exists() else ""
            assert time.monotonic() < deadline, f"a job does not end: {shown}\n{text}\n{self.logs()}"
            time.sleep(0.2)


def plugin() -> str:
    """Return the plugin of srun that starts the ranks of this interpreter's MPI."""
    from mpi4py import MPI

    return "pmix" if "Open MPI" in MPI.Get_library_version() else "pmi2"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def descendants(pid: int) -> list[int]:
    """Return the children of a process, their children, and so on."""
    found = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in tasks.read_text().split()]
        except OSError:
            continue
        found += [each for child in children for each in [child, *descendants(child)]]
    return found


def wait_for(true: Callable[[], bool], what: str, slurm: Slurm) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"not after {PATIENCE} s: {what}\n{slurm.logs()}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if os.geteuid() != 0:
        pytest.skip("slurmctld is started as root")
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        pytest.skip(
            f"slurmctld and its tools are needed; missing: {', '.join(missing)} (Debian: slurmctld slurmd munge)"
        )
    with Slurm() as running:
        started = running.call("srun", f"--mpi={plugin()}", "true")
        if started:
            pytest.skip(f"this slurmctld does not start ranks with --mpi={plugin()}: {started}")
        yield running


def test_training(slurm: Slurm, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    words = ["--steps", "3", "--reducer", "dense", "--reducer", "topk(density=0.01)", "--json", str(file)]
    code, output = slurm.submit("train.sbatch", *words)
    assert code == 0, output
    dense, topk = json.loads(file.read_text())
    assert [(row["ranks"], row["replicas_identical"]) for row in (dense, topk)] == [(4, True), (4, True)]
    assert topk["wire_bytes_per_rank"] < dense["wire_bytes_per_rank"] / 10


def test_a_benchmark_with_a_rank_per_node(slurm: Slurm, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    words = ["--system", "mpicomp", "--reducer", "dense", "--size", "4096", "--rounds", "5", "--warm-up", "1"]
    code, output = slurm.submit("bench.sbatch", *words, "--json", str(file), BENCH="collectives")
    assert code == 0, output
    (row,) = json.loads(file.read_text())
    assert (row["system"], row["ranks"], row["identical"]) == ("mpicomp", 4, True)


@pytest.mark.parametrize("code", [0, 3])
def test_the_template_for_a_script_of_ones_own(slurm: Slurm, tmp_path: Path, code: int) -> None:
    (tmp_path / "own.py").write_text(DIRTY + PROGRAM)
    environment = {"VENV": sys.prefix, "CODE": str(tmp_path), "SCRIPT": "own.py", "INTERFACE": "lo"}
    environment |= {"MODULES": "python/3.11", "BASH_FUNC_module%%": "() { echo loaded $2; }"}  # as sites define it
    found, output = slurm.submit("template.sbatch", str(code), **environment)
    assert found == code, output
    assert "loaded python/3.11" in output
    assert f"ranks 2 sum 3.0 settings 1 lo lo in {tmp_path} restarts 0" in output


def test_mpi_starts_whatever_the_memory_holds(slurm: Slurm, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"{DIRTY}import mpicomp.torch\nfrom mpi4py import MPI\nprint('ranks', MPI.COMM_WORLD.size)\n")
    output = slurm.call("srun", f"--mpi={plugin()}", "--nodes=4", "--ntasks=4", sys.executable, str(program))
    assert output.count("ranks 4") == 4, output


def test_a_requeued_job_starts_again_and_appends(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import os, sys, time\n"
        "again = int(os.environ.get('SLURM_RESTART_COUNT', 0))\n"
        "print('start', again, 'rank', os.environ['SLURM_PROCID'], flush=True)\n"
        "open(f'started-{again}', 'w').close()\n"
        "time.sleep(0 if again else 600)\n"
    )
    output = tmp_path / "out"
    environment = {**slurm.environment, "VENV": sys.prefix, "CODE": str(tmp_path), "SCRIPT": "own.py"}
    words = ["sbatch", "--parsable", "--nodes=1", f"--output={output}", str(ROOT / "slurm" / "template.sbatch")]
    done = subprocess.run(
        words, env={**environment, "MPI_PLUGIN": "none"}, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    job = done.stdout.strip()
    wait_for(lambda: (tmp_path / "started-0").exists(), "the job has started", slurm)
    assert slurm.call("scontrol", "requeue", job) == ""
    # A requeued job waits for two minutes (BeginTime); an update starts it now.
    wait_for(lambda: "JobState=PENDING" in slurm.call("scontrol", "show", "job", job), "the job is queued", slurm)
    slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(lambda: "JobState=COMPLETED" in slurm.call("scontrol", "show", "job", job), "the job has ended", slurm)
    assert re.findall(r"start (\d) rank 0", output.read_text()) == ["0", "1"]
