"""How ranks end: with a status, by themselves, by a signal, without memory, stopped; and their children."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import LIMIT, ROOT, environ, finish, needs_mpirun, start

SOON = 10  # seconds from what is wrong to the end of the job
BEGIN = """
        mpicomp.allreduce(comm, x, "dense")
        open(f"{sys.argv[0]}.{me}.{os.getpid()}", "w").close()
"""


def begun(job: subprocess.Popen[str], tmp_path: Path, ranks: int) -> list[int]:
    """Wait until all ranks have begun; return their processes."""
    deadline = time.monotonic() + LIMIT
    while len(found := sorted(tmp_path.glob("job.py.*.*"))) < ranks:
        assert job.poll() is None, finish(job)
        assert time.monotonic() < deadline, finish(job)
        time.sleep(0.02)
    return [int(path.suffix[1:]) for path in found]


def end(job: subprocess.Popen[str], tmp_path: Path, ranks: int) -> str:
    """Wait for the end of a job in which something goes wrong when all ranks have begun, and return its output."""
    begun(job, tmp_path, ranks)
    began = time.monotonic()
    output = finish(job)
    assert time.monotonic() - began < SOON + 2
    return output


@needs_mpirun
@pytest.mark.parametrize(
    ("ending", "status", "text"),
    [
        ("sys.exit(3)", 3, "it called sys.exit, status 3, after"),
        ("exit(4)", 4, "it called sys.exit, status 4, after"),
        ("sys.exit('no data')", 1, "it called sys.exit, status 1, after"),
        ("sys.exit()", 1, "it called sys.exit, status 0, after"),
        ("raise SystemExit(3)", 1, "its program ended, after"),
        ("pass", 1, "its program ended, after"),
    ],
)
def test_a_rank_ends_that_others_need(tmp_path: Path, ending: str, status: int, text: str) -> None:
    body = f"""
        {BEGIN}
        for batch in range(3):
            if me == 1 and batch == 2:
                try:
                    sys.exit(77)  # caught: not how it ends
                except SystemExit:
                    pass
                {ending}
                break
            mpicomp.allreduce(comm, x, "dense")
        """
    job = start(tmp_path, 3, body)
    output = end(job, tmp_path, 3)
    assert job.returncode == status, output
    assert re.search(rf"mpicomp: rank 1 of 3 has ended \({re.escape(text)}.*\), but rank [02] needs it in allr", output)


@needs_mpirun
def test_a_bad_status_ends_ranks_that_wait_elsewhere(tmp_path: Path) -> None:
    body = f"""
        {BEGIN}
        if me == 1:
            sys.exit(3)
        comm.Barrier()
        """
    job = start(tmp_path, 2, body)
    output = end(job, tmp_path, 2)
    assert job.returncode == 3, output
    assert "mpicomp: rank 1 of 2 ended with status 3 (after" in output


@needs_mpirun
def test_ranks_end_at_different_times(tmp_path: Path) -> None:
    """Rank 0 has more to do at the end, rank 2 exits in another way: nothing is wrong."""
    body = f"""
        {BEGIN}
        requests = [mpicomp.iallreduce(comm, x, "sign") for _ in range(3)]
        if me == 0:
            time.sleep(2)
        if me == 1:
            time.sleep(1)
            [request.wait() for request in requests]
        if me == 2:
            [request.wait() for request in requests]
            sys.exit()
        print(f"<<rank {{me}} ends>>\\n", end="", flush=True)
        """
    job = start(tmp_path, 3, body)
    output = finish(job)
    assert job.returncode == 0, output
    assert sorted(output.replace("<<", "\n<<").split("\n")[1:]) == ["", "", "<<rank 0 ends>>", "<<rank 1 ends>>"]


@needs_mpirun
@pytest.mark.parametrize("ending", ["sys.exit(3)", "raise SystemExit(3)"])
def test_all_ranks_end_with_a_status(tmp_path: Path, ending: str) -> None:
    job = start(tmp_path, 2, BEGIN + f"        time.sleep(me)\n        {ending}")
    output = end(job, tmp_path, 2)
    assert job.returncode in (3, 3 | 3 << 8), output
    assert "mpicomp:" not in output


@needs_mpirun
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_raises_system_exit_and_the_others_end(tmp_path: Path, rank: int) -> None:
    """Python hides the status until the process ends; then the launcher has it."""
    job = start(tmp_path, 2, BEGIN + f"        if me == {rank}:\n            raise SystemExit(3)")
    output = end(job, tmp_path, 2)
    assert job.returncode == 3, output
    assert "mpicomp:" not in output


@needs_mpirun
def test_an_exception_in_a_thread_of_the_users_is_his(tmp_path: Path) -> None:
    body = f"""
        {BEGIN}
        def work():
            raise ZeroDivisionError("the thread of rank one")
        if me == 1:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        mpicomp.allreduce(comm, x, "dense")
        """
    job = start(tmp_path, 2, body)
    output = finish(job)
    assert job.returncode == 0, output
    assert "ZeroDivisionError: the thread of rank one" in output
    assert "mpicomp:" not in output


@needs_mpirun
@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM", "SIGKILL"])
def test_a_signal_to_one_rank(tmp_path: Path, name: str) -> None:
    job = start(tmp_path, 2, BEGIN + "        time.sleep(1000 * me)\n        mpicomp.allreduce(comm, x, 'dense')")
    os.kill(begun(job, tmp_path, 2)[1], getattr(signal, name))
    began = time.monotonic()
    output = finish(job)
    assert job.returncode != 0, output
    assert time.monotonic() - began < SOON


@needs_mpirun
def test_a_hook_of_the_users_is_called_and_a_limit_of_memory_ends_the_job(tmp_path: Path) -> None:
    body = f"""
        import resource
        sys.excepthook = lambda kind, error, trace: print(f"<<hook of rank {{me}}: {{kind.__name__}}>>", flush=True)
        {BEGIN}
        if me == 1:
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), -1))
            np.ones(1 << 34)
        mpicomp.allreduce(comm, x, "dense")
        """
    job = start(tmp_path, 2, body)
    output = end(job, tmp_path, 2)
    assert job.returncode == 1, output
    assert "<<hook of rank 1: MemoryError>>" in output
    assert "mpicomp: rank 1 of 2 failed and ends the job: MemoryError: Unable to allocate" in output


@needs_mpirun
def test_the_hook_can_be_switched_off(tmp_path: Path) -> None:
    """Then a rank that fails ends by itself, and the job only where others need it."""
    body = f"""
        hook = sys.excepthook
        {BEGIN}
        assert sys.excepthook is hook
        if me == 1:
            raise ZeroDivisionError("rank one")
        time.sleep(2)
        print("<<still here>>", flush=True)
        mpicomp.allreduce(comm, x, "dense")
        """
    job = start(tmp_path, 2, body, MPICOMP_ABORT="0")
    output = finish(job)
    assert job.returncode == 1, output
    assert "<<still here>>" in output
    assert "mpicomp: rank 1 of 2 has ended (it failed: ZeroDivisionError: rank one, after" in output


def test_an_import_changes_nothing() -> None:
    code = """
import atexit, builtins, os, signal, sys, threading
def now():
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook, sys.exit, builtins.exit, sys.displayhook
    return hooks, dict(os.environ), [signal.getsignal(n) for n in range(1, 32)], threading.active_count()
before = now()
import mpicomp, mpicomp.comm.exits
mpicomp.allreduce
assert now() == before
"""
    done = subprocess.run([sys.executable, "-c", code], env=environ(PYTHONPATH=ROOT), timeout=LIMIT, check=False)
    assert done.returncode == 0


@needs_mpirun
@pytest.mark.parametrize("stop", ["short", "long"])
def test_a_stopped_rank(tmp_path: Path, stop: str) -> None:
    body = f"""
        {BEGIN}
        for _ in range(200):
            mpicomp.allreduce(comm, x, "dense")
            time.sleep(0.01)
        print("<<done>>", flush=True)
        """
    job = start(tmp_path, 3, body, MPICOMP_TIMEOUT="4" if stop == "short" else "2")
    stopped = begun(job, tmp_path, 3)[1]
    time.sleep(0.3)
    os.kill(stopped, signal.SIGSTOP)
    if stop == "short":
        time.sleep(2)
        os.kill(stopped, signal.SIGCONT)
        output = finish(job)
        assert job.returncode == 0, output
        assert output.count("<<done>>") == 3
        return
    began = time.monotonic()
    output = finish(job)
    assert time.monotonic() - began < SOON
    assert job.returncode != 0
    assert re.search(r"rank [02] of 3 waited [2-4] s in allreduce.* rank 1 does not answer: stopped, busy", output)


@needs_mpirun
@pytest.mark.parametrize("ending", ["pass", "sys.exit(5)", "raise ValueError('in the child')", "os._exit(6)"])
def test_a_forked_child(tmp_path: Path, ending: str) -> None:
    """Its end is its own, and its files are written."""
    status = {"pass": 0, "sys.exit(5)": 5, "os._exit(6)": 6}.get(ending, 1)
    body = f"""
        {BEGIN}
        mpicomp.iallreduce(comm, x, "dense").wait()
        child = os.fork()
        if child == 0:
            for call in (mpicomp.allreduce, mpicomp.iallreduce):
                try:
                    call(comm, x, "dense")
                except RuntimeError as error:
                    assert "is a child of a rank" in str(error), error
                else:
                    os._exit(99)
            file = open(f"{{sys.argv[0]}}-{{me}}", "w")
            file.write("written")
            {ending}
        else:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            mpicomp.allreduce(comm, x, "dense")
            print(f"<<child {{status}}>>", flush=True)
        """
    job = start(tmp_path, 2, body)
    output = finish(job)
    assert job.returncode == 0, output
    assert output.count(f"<<child {status}>>") == 2, output
    if status != 6:
        assert [(tmp_path / f"job.py-{rank}").read_text() for rank in range(2)] == ["written"] * 2


@needs_mpirun
def test_a_program_that_a_rank_starts(tmp_path: Path) -> None:
    """It is no rank, unless a launcher starts it."""
    body = f"""
        {BEGIN}
        import subprocess
        program = "import mpicomp.comm.children as c; print('<<' + str(c.is_child()) + '>>')"
        subprocess.run([sys.executable, "-c", program], check=True)
        subprocess.run(["sh", "-c", 'true; "$0" -c "$1"; true', sys.executable, program], check=True)
        if me == 0:
            kept = {{k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI_COMM", "HYD", "PRTE_J"))}}
            kept = {{k: v for k, v in kept.items() if not k.startswith(("PMIX", "OMPI_UNI", "OMPI_APP", "OMPI_FIR"))}}
            program = program.replace("<<", "((")
            subprocess.run([sys.argv[1], "-n", "2", sys.executable, "-c", program], env=kept, check=True)
        """
    job = start(tmp_path, 2, body)
    output = finish(job)
    assert job.returncode == 0, output
    assert output.count("<<True>>") == 4
    assert output.count("((False") == 2


@needs_mpirun
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("MPICOMP_TIMEOUT", value) for value in ("abc", "-1", "nan", "0")),
        ("MPICOMP_GPU_AWARE", "maybe"),
        ("MPICOMP_ABORT", "no"),
        ("MPICOMP_CACHE_DIR", __file__),
    ],
)
def test_a_bad_setting_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    from mpicomp.environment import SETTINGS, check_settings

    monkeypatch.setenv(name, value)
    expected = f"the environment variable {name} must be {SETTINGS[name].allowed}, got {value!r}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        check_settings()
    monkeypatch.setenv(name, "")
    check_settings()


@needs_mpirun
def test_a_bad_setting_is_refused_on_all_ranks(tmp_path: Path) -> None:
    body = """
        for _ in range(2):
            try:
                mpicomp.allreduce(comm, x, "dense")
            except ValueError as error:
                print(f"<<{me}: {error}>>", flush=True)
        """
    job = start(tmp_path, 2, body, MPICOMP_TIMEOUT="soon")
    output = finish(job)
    assert job.returncode == 0, output
    assert output.count("MPICOMP_TIMEOUT must be a positive number of seconds, got 'soon'>>") == 4
