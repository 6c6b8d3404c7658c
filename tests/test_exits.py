"""How jobs end: by failure, disagreement, silence or Ctrl-C, always soon, on all ranks and with a word why.

These tests start `mpirun` themselves, so they run without a launcher.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from jobs import LIMIT, ROOT, environ, finish, is_running, needs_mpirun, start


@needs_mpirun
@pytest.mark.parametrize("ranks", [2, 3])
def test_exception_between_collectives(tmp_path: Path, ranks: int) -> None:
    job = start(
        tmp_path,
        ranks,
        """
        mpicomp.allreduce(comm, x, "dense")
        if me == 1:
            raise ZeroDivisionError("rank one cannot go on")
        mpicomp.allreduce(comm, x, "dense")
        """,
    )
    output = finish(job)
    assert job.returncode != 0
    assert f"rank 1 of {ranks} failed" in output
    assert 'raise ZeroDivisionError("rank one cannot go on")' in output


@needs_mpirun
def test_exception_before_the_first_collective(tmp_path: Path) -> None:
    """That rank has not begun, so nothing of its end is changed: the others give it up."""
    job = start(
        tmp_path,
        3,
        """
        if me == 1:
            raise ZeroDivisionError("rank one never began")
        mpicomp.allreduce(comm, x, "dense")
        """,
        MPICOMP_TIMEOUT="2",
    )
    output = finish(job)
    assert job.returncode != 0
    assert "ZeroDivisionError: rank one never began" in output
    assert re.search(r"rank [02] of 3 waited [2-4] s in the first call.* rank 1 do(es)? not answer", output)


@needs_mpirun
def test_silent_rank_is_given_up(tmp_path: Path) -> None:
    job = start(
        tmp_path,
        2,
        """
        mpicomp.allreduce(comm, x, "dense")
        if me == 1:
            time.sleep(1000)
        mpicomp.allreduce(comm, x, "dense")
        """,
        MPICOMP_TIMEOUT="3",
    )
    output = finish(job)
    assert job.returncode != 0
    assert re.search(r"rank 0 of 2 waited [34] s in allreduce", output)


@needs_mpirun
def test_requests_without_a_wait_are_finished(tmp_path: Path) -> None:
    job = start(
        tmp_path,
        2,
        """
        requests = [mpicomp.iallreduce(comm, x, "topk(density=0.1)") for _ in range(3)]
        print(f"rank {me} ends\\n", end="", flush=True)
        """,
    )
    output = finish(job)
    assert job.returncode == 0, output
    assert sorted(re.findall(r"rank \d ends", output)) == ["rank 0 ends", "rank 1 ends"]


@needs_mpirun
def test_a_request_that_fails_without_a_wait(tmp_path: Path) -> None:
    job = start(
        tmp_path,
        2,
        """
        request = mpicomp.iallreduce(comm, x[: 10 + me], "dense")
        """,
    )
    output = finish(job)
    assert job.returncode != 0
    assert "ConfigMismatchError: the ranks disagree" in output
    assert re.search(r"rank \d of 2 failed and ends the job", output)


@needs_mpirun
@pytest.mark.parametrize("call", ["mpicomp.allreduce(comm, x, 'dense')", "mpicomp.iallreduce(comm, x, 'dense').wait()"])
def test_interrupt_ends_all_ranks(tmp_path: Path, call: str) -> None:
    job = start(
        tmp_path,
        3,
        f"""
        mpicomp.allreduce(comm, x, "dense")
        open(sys.argv[0] + f".{{os.getpid()}}", "w").close()
        if me == 1:
            time.sleep(1000)
        {call}
        """,
    )
    deadline = time.monotonic() + LIMIT
    while len(pids := [int(path.suffix[1:]) for path in tmp_path.glob("job.py.*")]) < 3:
        assert time.monotonic() < deadline and job.poll() is None, finish(job)  # noqa: PT018
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(job.pid, signal.SIGINT)  # what Ctrl-C does to the launcher
    began = time.monotonic()
    finish(job)
    assert job.returncode != 0
    assert time.monotonic() - began < 20
    time.sleep(0.5)
    assert [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and is_running(pid)] == []


@needs_mpirun
def test_ranks_that_disagree_on_the_spec(tmp_path: Path) -> None:
    job = start(
        tmp_path,
        3,
        """
        try:
            mpicomp.allreduce(comm, x, "gather(topk(density=0.5))" if me == 2 else "gather(topk(density=0.25))")
        except RuntimeError as error:
            text = f"<<{me} {type(error).__name__}: {error}>>"
        print(text, flush=True)
        comm.Barrier()
        """,
    )
    output = finish(job)
    assert job.returncode == 0, output
    for me in range(3):
        assert f"<<{me} ConfigMismatchError: " in output
    assert len(re.findall(r"ranks 0, 1: .*density=0\.25", output)) == 3
    assert len(re.findall(r"rank 2: .*density=0\.5", output)) == 3


@needs_mpirun
def test_a_rank_that_refuses_its_arguments(tmp_path: Path) -> None:
    job = start(
        tmp_path,
        3,
        """
        try:
            mpicomp.allreduce(comm, x, "topk(density=1.5)" if me == 1 else "topk(density=0.5)")
        except (RuntimeError, ValueError) as error:
            text = f"<<{me} {type(error).__name__}>>"
        print(text, flush=True)
        comm.Barrier()
        """,
    )
    output = finish(job)
    assert job.returncode == 0, output
    assert sorted(re.findall("<<.*?>>", output)) == [
        "<<0 ConfigMismatchError>>",
        "<<1 SpecError>>",
        "<<2 ConfigMismatchError>>",
    ]


def test_import_without_mpi() -> None:
    code = """
        import sys
        class NoMPI:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "mpi4py":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, NoMPI())
        import mpicomp
        import mpicomp.codecs, mpicomp.registry, mpicomp.environment
        print(mpicomp.__version__, mpicomp.allreduce.__name__, mpicomp.registry.parse("topk(density=0.5)"))
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environ(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "allreduce"
