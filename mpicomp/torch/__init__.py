"""mpicomp for PyTorch: a backend for torch.distributed, and compression for DistributedDataParallel.

    import mpicomp.torch
    dist.init_process_group("mpicomp")                          # under mpirun or srun
    ddp = DistributedDataParallel(model)                        # exact
    mpicomp.torch.compress(ddp, "topk(density=0.01)")           # compressed

Importing this under a launcher initialises MPI and tells torch of its ranks.
"""

from mpicomp.torch.backend import reset, traffic
from mpicomp.torch.barrier import monitored_barrier
from mpicomp.torch.calls import (
    TensorPlan,
    allgather,
    allreduce,
    broadcast,
    iallgather,
    iallreduce,
    ibroadcast,
    ireduce_scatter,
    memory,
    plan,
    reduce_scatter,
)
from mpicomp.torch.creation import register
from mpicomp.torch.hook import Hook, compress, reduce_bucket
from mpicomp.torch.launch import device, fill_environment
from mpicomp.torch.optim import DGCSGD
from mpicomp.torch.sharded import saved_state
from mpicomp.torch.telemetry import Telemetry, telemetry

__all__ = [
    "compress",
    "telemetry",
    "allreduce",
    "allgather",
    "broadcast",
    "reduce_scatter",
    "iallreduce",
    "iallgather",
    "ibroadcast",
    "ireduce_scatter",
    "plan",
    "memory",
    "monitored_barrier",
    "reset",
    "traffic",
    "device",
    "Hook",
    "reduce_bucket",
    "saved_state",
    "DGCSGD",
    "Telemetry",
    "TensorPlan",
]

fill_environment()
register()
