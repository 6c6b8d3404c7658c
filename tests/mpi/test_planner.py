"""The planner over real MPI: all ranks end with the same machine, and auto loses nothing while it looks around."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from over_mpi import gathered
from reducers.members import LAYOUT, History, check_law, inputs, residual_of

from mpicomp.comm.communicator import Comm
from mpicomp.comm.share import shared
from mpicomp.planner import cache
from mpicomp.planner.auto import Auto
from mpicomp.planner.measure import measure
from mpicomp.registry import parse

pytestmark = pytest.mark.mpi


def test_all_ranks_measure_the_same_machine(comm: Comm) -> None:
    machine = measure(comm)
    assert repr(machine) == shared(comm, repr(machine))
    assert machine.ranks == comm.size
    assert {"add", "copy", "matmul"} <= set(machine.passes)
    assert machine.seconds > 0
    if comm.size > 1:
        link = machine.between or machine.inside
        assert link is not None
        assert link.latency + link.byte > 0
        assert machine.allreduce[0].size == 64


def test_auto_measures_chooses_and_loses_nothing(comm: Comm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPICOMP_CACHE_DIR", str(tmp_path))
    auto = cast(Auto, parse("auto(allow=(topk(density=0.1), two_stage(uniform(block=32))))"))
    x, steps = inputs(comm.size, 24, LAYOUT.size, "float32"), 24
    state, taken = auto.init(LAYOUT, "float32", feedback=True), []
    totals, residuals = np.empty((steps, LAYOUT.size), np.float32), np.zeros((steps + 1, LAYOUT.size), np.float32)
    for step, row in enumerate(x[comm.rank]):
        reduction, state = auto.reduce(comm, row, state)
        totals[step], residuals[step + 1] = reduction.total, residual_of(cast(Any, auto), state)
        taken.append(str(auto.running(state)))
    check_law(History(x, gathered(totals), gathered(residuals), np.zeros((comm.size, steps), bool), []))
    assert taken == shared(comm, taken)
    assert cache.machine_for(comm).ranks == comm.size
    assert len(list(tmp_path.iterdir())) == (comm.rank == 0)
