"""The contract of reducers at as many ranks as one likes: `mpirun -n 64 python tests/many_ranks.py`.

One of each kind: the law, the same bits on all ranks and in a second run, bytes as predicted. tests/run.sh runs it with
64 ranks; pytest on so many is slow to start and hard to read.
"""

from __future__ import annotations

import argparse
import time

from mpi4py import MPI
from over_mpi import run_over_mpi
from reducers.members import (
    DENSE,
    FEW,
    REPRESENTATIVES,
    alike,
    as_predicted,
    check_law,
    inputs,
    masks_of,
    member,
)

from mpicomp.comm.communicator import Comm
from mpicomp.comm.watch import Traffic

STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reducer", action="append", help="a spec; default: one of each kind")
    specs = parser.parse_args().reducer or [*REPRESENTATIVES, *DENSE]
    comm = Comm.of(MPI.COMM_WORLD)
    for spec in specs:
        began = time.perf_counter()
        reducer, x = member(spec), inputs(comm.size, STEPS, FEW.size, "float32")
        comm.traffic = Traffic()
        first = run_over_mpi(comm, reducer, FEW, x)
        check_law(first)
        predicted = STEPS * reducer.cost(FEW, "float32", comm.topology, comm.rank).nbytes
        alone = alike(spec) and not masks_of(reducer, FEW)  # a cost is that of all elements
        assert not alone or as_predicted(reducer, comm.traffic.bytes, predicted), (comm.traffic, predicted)
        second = run_over_mpi(comm, reducer, FEW, x)
        assert second.totals.tobytes() == first.totals.tobytes(), "another run has other bits"
        assert second.residuals.tobytes() == first.residuals.tobytes(), "another run has other residuals"
        if comm.rank == 0:
            print(f"{spec}: {time.perf_counter() - began:.1f} s", flush=True)
    if comm.rank == 0:
        print(f"{len(specs)} passed, 0 failed, on {comm.size} ranks")


if __name__ == "__main__":
    main()
