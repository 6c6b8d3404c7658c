"""The contract of reducers at as many ranks as one likes: `mpirun -n 64 python tests/many_ranks.py`.

One of each kind: the law, the same bits on all ranks and in a second run, bytes as predicted. tests/run.sh runs it with
64 ranks; pytest on so many is slow to start and hard to read.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from mpi4py import MPI
from reducers.members import (
    DENSE,
    FEW,
    REPRESENTATIVES,
    History,
    alike,
    as_predicted,
    begun,
    check_law,
    inputs,
    masks_of,
    member,
    steps,
    taking_part,
)

from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.comm.watch import Traffic
from mpicomp.reducers import Reducer

STEPS = 3


def gathered(x: Array) -> Array:
    """Stack every rank's x, by plain MPI: (ranks, *x.shape)."""
    rows = np.empty((MPI.COMM_WORLD.size, *x.shape), x.dtype)
    MPI.COMM_WORLD.Allgather(np.ascontiguousarray(x), rows)
    return rows


def run(comm: Comm, reducer: Reducer, x: Array) -> History:
    entered, totals, residuals, poisoned, units = steps(comm, reducer, x[comm.rank], begun(reducer, FEW, "float32"))
    found = (gathered(each) for each in (entered, totals, residuals, poisoned))
    return History(*found, [units], **taking_part(reducer, FEW))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reducer", action="append", help="a spec; default: one of each kind")
    specs = parser.parse_args().reducer or [*REPRESENTATIVES, *DENSE]
    comm = Comm.of(MPI.COMM_WORLD)
    for spec in specs:
        began = time.perf_counter()
        reducer, x = member(spec), inputs(comm.size, STEPS, FEW.size, "float32")
        comm.traffic = Traffic()
        first = run(comm, reducer, x)
        check_law(first)
        predicted = STEPS * reducer.cost(FEW, "float32", comm.topology, comm.rank).nbytes
        alone = alike(spec) and not masks_of(reducer, FEW)  # a cost is that of all elements
        assert not alone or as_predicted(reducer, comm.traffic.bytes, predicted), (comm.traffic, predicted)
        second = run(comm, reducer, x)
        assert second.totals.tobytes() == first.totals.tobytes(), "another run has other bits"
        assert second.residuals.tobytes() == first.residuals.tobytes(), "another run has other residuals"
        if comm.rank == 0:
            print(f"{spec}: {time.perf_counter() - began:.1f} s", flush=True)
    if comm.rank == 0:
        print(f"{len(specs)} passed, 0 failed, on {comm.size} ranks")


if __name__ == "__main__":
    main()
