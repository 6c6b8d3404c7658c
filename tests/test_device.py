"""Which GPU is whose, and whether MPI takes its memory."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from mpicomp import device
from mpicomp.comm import info


@pytest.mark.parametrize(
    ("environ", "rank"),
    [
        ({}, 0),
        ({"SLURM_LOCALID": "3"}, 3),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "2", "SLURM_LOCALID": "0"}, 2),
        ({"MPI_LOCALRANKID": "1", "SLURM_LOCALID": "0"}, 1),
        ({"LOCAL_RANK": "5", "MPI_LOCALRANKID": "1"}, 5),
        ({"LOCAL_RANK": "", "MPI_LOCALRANKID": "1"}, 1),
    ],
)
def test_a_rank_on_its_node(environ: dict[str, str], rank: int) -> None:
    assert device.local_rank(environ) == rank


def test_ranks_share_gpus_round_robin() -> None:
    assert [device.device_number({"SLURM_LOCALID": str(rank)}, 3) for rank in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    with pytest.raises(ValueError, match="where there is one, got 0"):
        device.device_number({}, 0)


@pytest.mark.parametrize(("stated", "aware"), [("1", True), ("0", False)])
def test_the_user_has_the_last_word(monkeypatch: pytest.MonkeyPatch, stated: str, aware: bool) -> None:
    monkeypatch.setenv(info.GPU_AWARE, stated)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing is to be probed"))
    assert info.gpu_aware() is aware


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(info.GPU_AWARE, "yes")
    with pytest.raises(ValueError, match="MPICOMP_GPU_AWARE must be 0 or 1, got 'yes'"):
        info.gpu_aware()


@pytest.mark.parametrize("end", ["import os; os.kill(os.getpid(), 11)", "raise SystemExit(1)", "pass"])
def test_a_child_is_asked_and_may_crash(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    seen: dict[str, Any] = {}
    real = subprocess.run

    def run(*args: Any, **options: Any) -> Any:
        seen.update(options)
        return real(*args, **options)

    monkeypatch.delenv(info.GPU_AWARE, raising=False)
    monkeypatch.setenv("PMI_RANK", "3")
    monkeypatch.setenv("OMPI_MCA_btl", "self")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(info, "PROBE", end)
    info._probed.cache_clear()
    assert info.gpu_aware() is (end == "pass")
    info._probed.cache_clear()
    assert "PMI_RANK" not in seen["env"]  # the child is alone
    assert seen["env"]["OMPI_MCA_btl"] == "self"


def test_awareness_is_described_without_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing is to be probed"))
    monkeypatch.setattr(info, "_loaded_mpi", lambda: None)
    assert info.gpu_awareness({}).startswith("unknown (this MPI has no query")
    assert info.gpu_awareness({"MPICH_GPU_SUPPORT_ENABLED": "1"}) == "yes (MPICH_GPU_SUPPORT_ENABLED=1)"
    assert info.gpu_awareness({"MPICH_GPU_SUPPORT_ENABLED": "0"}) == "no (MPICH_GPU_SUPPORT_ENABLED=0)"
