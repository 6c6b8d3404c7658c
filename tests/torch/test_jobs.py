"""Whole programs, as users start them: alone, inherited environments, and ranks that fail under mpirun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

pytestmark = pytest.mark.jobs

ROOT = Path(__file__).parents[2]

TRAIN = """
import torch, torch.distributed as dist, mpicomp.torch
from torch import nn
dist.init_process_group("mpicomp")
me, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
module = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 30))
ddp = nn.parallel.DistributedDataParallel(module, bucket_cap_mb=0.001)
mpicomp.torch.compress(ddp, "topk(density=0.1)")
optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
for step in range(3):
    optimizer.zero_grad()
    loss = ddp(torch.ones(2, 30)).square().mean()
    {spoil}
    loss.backward()
    optimizer.step()
print(f"rank {me} of {ranks} done\\n", end="", flush=True)  # one write: mpirun mixes those of several ranks
if ranks == 1:  # else the program just ends, and must not hang
    dist.destroy_process_group()
    import threading
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mpicomp")]
"""
IN_BACKWARD = """
    if me == 1 and step == 2:
        def fail(grad): raise ArithmeticError("spoiled on purpose")
        module[0].weight.register_hook(fail)
"""
IN_THREAD = """
    if me == 1 and step == 2:
        from mpicomp.api import lifecycle as module_under_test
        def fail(*_, **__): raise ArithmeticError("spoiled on purpose")
        module_under_test.apply = fail
"""
UNWATCHED = """
    if me == 1 and step == 2:
        from mpicomp.torch import exact
        def fail(*_): raise ArithmeticError("spoiled on purpose")
        exact.broadcast = fail
    if step == 2:
        dist.broadcast(torch.ones(1), 0, async_op=True)
        import time
        time.sleep(60 if me == 1 else 0)
"""
BEFORE = """
    if me == 1 and step == 2: raise ArithmeticError("spoiled on purpose")
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}


def run(command: list[str], environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environ or environment(), capture_output=True, text=True, timeout=120)


def mpirun(ranks: int, program: Path) -> list[str]:
    found = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip("there is no mpirun")
    is_open_mpi = "Open" in run([found, "--version"]).stdout
    options = ["--oversubscribe", "--allow-run-as-root"] if is_open_mpi else []
    return [found, *options, "-n", str(ranks), sys.executable, str(program)]


def program(folder: Path, spoil: str = "") -> Path:
    path = folder / "train.py"
    path.write_text(TRAIN.replace("    {spoil}", spoil))
    return path


def test_alone_without_a_launcher(tmp_path: Path) -> None:
    done = run([sys.executable, "-W", "error", str(program(tmp_path))])
    assert (done.returncode, done.stdout, done.stderr) == (0, "rank 0 of 1 done\n", "")


def test_child_does_not_believe_what_its_parent_filled_in(tmp_path: Path) -> None:
    """A program that imports mpicomp.torch and then starts mpirun passes its own RANK on."""
    script = "import mpicomp.torch, subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    done = run([sys.executable, "-c", script, *mpirun(2, program(tmp_path))])
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2 done", "rank 1 of 2 done"]


def test_other_launchers_are_named(tmp_path: Path) -> None:
    """As torchrun does it: the processes know of each other, MPI does not."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    script = "import torch.distributed as dist, mpicomp.torch\nfrom mpicomp.torch.launch import group_comm\n"
    done = run([sys.executable, "-c", script + "group_comm([], 1, 4)"], environment() | variables)
    assert done.returncode != 0
    assert "torch says that this is rank 1 of 4, MPI that it is rank 0 of 1" in done.stderr


@pytest.mark.parametrize(
    "spoil", [BEFORE, IN_BACKWARD, IN_THREAD, UNWATCHED], ids=["before", "backward", "thread", "unwatched"]
)
def test_a_rank_that_fails_ends_the_job(tmp_path: Path, spoil: str) -> None:
    command = mpirun(3, program(tmp_path, spoil))
    began = time.monotonic()
    done = run(command)
    assert done.returncode != 0
    assert "mpicomp: rank 1 of 3 failed and ends the job" in done.stderr
    assert "ArithmeticError: spoiled on purpose" in done.stderr
    assert "in fail" in done.stderr or spoil is BEFORE
    assert time.monotonic() - began < 45  # the watchdog's time is longer


CHILDREN = """
import subprocess, sys, torch, mpicomp.torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

class Squares(Dataset):
    def __len__(self): return 8
    def __getitem__(self, number):
        import mpi4py
        assert "mpi4py.MPI" not in sys.modules or dist.is_initialized(), "a worker has started MPI"
        return torch.tensor([float(number)])

if __name__ == "__main__":
    dist.init_process_group("mpicomp")
    for how in ("fork", "spawn"):
        loader = DataLoader(Squares(), batch_size=4, num_workers=1, multiprocessing_context=how)
        assert sum(len(batch) for batch in loader) == 8, how
    program = "import sys, mpicomp.torch, torch.distributed as dist\\ntry: dist.init_process_group('mpicomp')\\n"
    program += "except RuntimeError as error: assert 'is a child of a rank' in str(error), error\\nelse: sys.exit(9)"
    subprocess.run([sys.executable, "-c", program], check=True)
    dist.barrier()
    print("done\\n", end="", flush=True)
    dist.destroy_process_group()
"""


def test_children_of_a_rank_start_no_mpi(tmp_path: Path) -> None:
    path = tmp_path / "children.py"
    path.write_text(CHILDREN)
    done = run(mpirun(2, path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["done", "done"]
    assert "mpicomp:" not in done.stderr
