"""The plain calls for tensors, over an mpi4py communicator or a process group: those of `mpicomp`, on tensors' memory.

**Where.** The communicator or process group comes first, as in `mpicomp`, or is given as `group=`; the default process
group needs no word, as in torch.distributed. Ranks and roots are numbered within it.

    total = mpicomp.torch.allreduce(comm, x, "topk(density=0.01)")
    total = mpicomp.torch.allreduce(x, "topk(density=0.01)", group=group)

A call on a process group runs on its communication thread, after all that was begun on it before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from mpicomp.api.arguments import DENSE, member_of, op_of
from mpicomp.api.call import Arguments, Call, Place, Prepare, Result, begin, collective_of, over_mpi
from mpicomp.api.copies import broadcasting, codec_of, gathering
from mpicomp.api.memories import Memory, Resolution, memory_of
from mpicomp.api.plans import Planned, planning
from mpicomp.api.reductions import scattering, summing
from mpicomp.codecs.base import Codec
from mpicomp.comm.agreement import refuse
from mpicomp.comm.background import Request
from mpicomp.comm.communicator import Comm
from mpicomp.reducers import Reducer
from mpicomp.registry import Method
from mpicomp.torch.compiled import uncompiled
from mpicomp.torch.identity import tensor_group
from mpicomp.torch.operands import DTYPES, INTEGERS, Kinds, Operands
from mpicomp.torch.tensors import bits_of, bytes_of
from mpicomp.torch.worker import Worker

Tensors = TypeVar("Tensors", torch.Tensor, list[torch.Tensor])
"""One tensor or a list of tensors: a call returns what it was given."""

OPS = {dist.ReduceOp.SUM: "sum", dist.ReduceOp.AVG: "mean"}
OUTSIDE = dist.GroupMember.NON_GROUP_MEMBER  # what torch gives to ranks that are not in a new group


# ---------------------------------------------------------------------------------------------------- where a call runs


def _placed(*args: Any, group: Any = None, **kwargs: Any) -> tuple[Place, Arguments]:
    """Return where a call runs, and its other arguments; what was given for it is `group` among them."""
    first = []
    if "comm" in kwargs:
        first = [kwargs.pop("comm")]
    elif args and _is_place(args[0]):
        first, args = [args[0]], args[1:]
    given = first[0] if first else group
    place = _place_of(given)
    if first and group is not None:
        error = TypeError("the communicator or process group was given twice, first and as group=; give one")
        comm, line = place
        line.call(partial(refuse, comm, error))
        raise error
    return place, (args, {**kwargs, "group": given})


def _is_place(x: Any) -> bool:
    """Whether a first argument says where a call runs."""
    return x is None or _is_mpi(x) or isinstance(x, (Comm, dist.ProcessGroup)) or _is_outside(x)


def _is_mpi(x: Any) -> bool:
    """Whether this is an mpi4py communicator; the check is a tenth of that for a process group."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and isinstance(x, mpi.Comm)


def _is_outside(x: Any) -> bool:
    return x is OUTSIDE or (type(x) is int and x == OUTSIDE)


def _place_of(given: Any) -> Place:
    """Return the place of a communicator or process group, None for the default one; raises TypeError or ValueError."""
    if _is_mpi(given):
        return over_mpi(given)[0]
    if _is_outside(given):
        raise ValueError("this rank is not in the process group that was given; only its members make this call")
    if given is None or isinstance(given, dist.ProcessGroup):
        group = tensor_group(dist.group.WORLD if given is None else given)
        return group.comm, _GroupLine(group.worker)
    return over_mpi(given)[0]


class _GroupLine(NamedTuple):
    """The communication thread of a process group, as that of a communicator."""

    worker: Worker

    def call(self, call: Callable[[], Result]) -> Result:
        return self.submit(call).wait()

    def submit(self, call: Callable[[], Result]) -> Request[Result]:
        return self.worker.submit(call).request


def _blocking(prepare: Prepare[..., Any]) -> Any:
    """Return the collective of tensors that a function `_name` prepares."""
    return uncompiled(collective_of(prepare, False, _placed))


def _nonblocking(prepare: Prepare[..., Any]) -> Any:
    """Return the one that begins in the background."""
    return uncompiled(collective_of(prepare, True, _placed))


# ------------------------------------------------------------------------------------------------------------ the calls


def memory(method: Method, x: Tensors, seed: int = 0) -> Memory:
    """Return the memory with which `allreduce` of tensors like these feeds back what it could not send.

    As `mpicomp.memory`; its `residual` is NumPy's. Not collective. Raises SpecError, TypeError or ValueError for a
    method or tensors that `allreduce` would refuse.
    """
    return memory_of(method, Operands(x, DTYPES).form, seed)


def _allreduce(
    comm: Comm,
    x: Tensors,
    method: Method,
    op: str | Any = "sum",
    memory: Memory | None = None,
    out: Tensors | None = None,
    *,
    group: Any = None,
) -> Call[Tensors]:
    """Return the sum or mean of x over the ranks of a communicator or group, compressed by `method`. Collective.

    As `mpicomp.allreduce`. `comm` is an mpi4py communicator or a process group of backend "mpicomp"; without it `group`
    is, or the default process group.

    x: float32, float16, bfloat16, float64, complex64 or complex128 without history, any shape and strides, which may
    differ between ranks, on the CPU or, for reducers that support it, on a CUDA device; lazy conjugates and negatives
    are computed. `dense` sums integers too. A list of tensors of one dtype travels together, and a list comes back.
    The result is `out`, which may be strided and may be x itself, or a new contiguous tensor.

    `op` is "sum", "mean" or "avg", dist.ReduceOp.SUM or AVG, or MPI.SUM; `memory` comes from `mpicomp.torch.memory`.

    Raises ConfigMismatchError on all ranks where they disagree, and SpecError, TypeError or ValueError for bad
    arguments; the other ranks then raise ConfigMismatchError. ValueError on a rank that is not in the group.
    """
    member, op = member_of(method), _op_of(op)
    tensors = Operands(x, _summed(member))
    tensors.towards(out, tensors.form, "as x is", over=True)
    return tensors.call(summing(comm, tensors.form, method, member, op, memory))


def _allgather(
    comm: Comm, x: Tensors, codec: Method, out: Tensors | None = None, *, group: Any = None
) -> Call[Tensors]:
    """Return every rank's x, stacked: (ranks, *x.shape), the same bits on all ranks. Collective.

    As `mpicomp.allgather`: `codec` is a spec or a codec, or "dense" for tensors as they are, of any dtype, several in
    a list. `out` shares no memory with x. CUDA tensors pass through the host's memory. All else is as for `allreduce`.
    """
    member = codec_of("allgather", codec)
    tensors = _copied(x, member)
    tensors.towards(out, tensors.form.with_axis(comm.size), f"for {comm.size} ranks")
    return tensors.call(gathering(comm, tensors.form, member), bytes_of if member is None else bits_of, host=True)


def _broadcast(
    comm: Comm, x: Tensors, codec: Method, root: int = 0, out: Tensors | None = None, *, group: Any = None
) -> Call[Tensors]:
    """Return the root's x as its code says, the same bits on all ranks, the root included. Collective.

    As `mpicomp.bcast`: x on other ranks has the same shape and dtype, and stays as it was unless it is `out` too.
    `root` is a rank of the communicator or group. All else is as for `allgather`.
    """
    member = codec_of("broadcast", codec)
    tensors = _copied(x, member)
    tensors.towards(out, tensors.form, "as x is", over=True)
    move = broadcasting(comm, tensors.form, member, root)
    return tensors.call(move, bytes_of if member is None else bits_of, host=True)


def _reduce_scatter(
    comm: Comm, x: Tensors, codec: Method, op: str | Any = "sum", out: Tensors | None = None, *, group: Any = None
) -> Call[Tensors]:
    """Return this rank's row, (*shape), of the sum or mean over ranks of x, (ranks, *shape). Collective.

    As `mpicomp.reduce_scatter`: there is one lossy event and no memory. CUDA tensors pass through the host's memory.
    All else is as for `allreduce`.
    """
    member, op = codec_of("reduce_scatter", codec), _op_of(op)
    tensors = Operands(x, _summed(member or DENSE))
    tensors.towards(out, tensors.form.without_axis(comm.size), "as a row of x is")
    return tensors.call(scattering(comm, tensors.form, member, op), host=True)


allreduce, iallreduce = _blocking(_allreduce), _nonblocking(_allreduce)
allgather, iallgather = _blocking(_allgather), _nonblocking(_allgather)
broadcast, ibroadcast = _blocking(_broadcast), _nonblocking(_broadcast)
reduce_scatter, ireduce_scatter = _blocking(_reduce_scatter), _nonblocking(_reduce_scatter)


# ---------------------------------------------------------------------------------------------------------------- plans


class TensorPlan(Planned, Generic[Tensors]):
    """An allreduce of tensors of one form, by one method; made by `mpicomp.torch.plan`. See `mpicomp.Plan`."""

    def __init__(self, group: Any, comm: Comm, memory: Memory, found: Resolution, description: str) -> None:
        super().__init__(comm, memory, found, description)
        self._group = group

    def __call__(self, x: Tensors, out: Tensors | None = None) -> Tensors:
        """Return the sum or mean over ranks of tensors like those planned for: `out`, or new tensors. Collective.

        Raises as a `mpicomp.Plan` does.
        """
        result: Tensors = begin(_place_of(self._group), False, self._prepare, x, out)
        return result

    def start(self, x: Tensors, out: Tensors | None = None) -> Request[Tensors]:
        """Begin what a call does, in the background; x and `out` must stay untouched until the request is complete."""
        request: Request[Tensors] = begin(_place_of(self._group), True, self._prepare, x, out)
        return request

    def _prepare(self, comm: Comm, x: Any, out: Any) -> Call[Any]:
        tensors = Operands(x, None)
        if tensors.form != self.form:
            raise ValueError(f"the plan was made for {self.form.in_full}, got x of {tensors.form.in_full}")
        tensors.towards(out, self.form, "as the plan was made for", over=True)
        return tensors.call(self.operation(comm))

    @property
    def _comm(self) -> Comm:
        return _place_of(self._group)[0]


def _plan(
    comm: Comm,
    like: Tensors,
    method: Method,
    op: str | Any = "sum",
    *,
    feedback: bool = False,
    seed: int = 0,
    group: Any = None,
) -> Call[TensorPlan[Tensors]]:
    """Return a plan to reduce tensors like these, of which only shapes, dtypes and device matter. Collective.

    As `mpicomp.plan`: `plan(x, out=None)` is then what `allreduce(comm, x, method, op)` is, and `plan.start(x)` begins
    it in the background. All else is as for `allreduce`.
    """
    member, op = member_of(method), _op_of(op)
    memory = Memory(member, Operands(like, _summed(member), "like").form, seed, feedback)
    return planning(comm, memory, op, lambda *planned: TensorPlan(group, *planned))


plan = _blocking(_plan)


# ------------------------------------------------------------------------------------------------------ what they share


def _op_of(op: Any) -> str:
    """Return "sum" or "mean" for torch's reductions, too."""
    if isinstance(op, dist.ReduceOp.RedOpType):
        if op not in OPS:
            raise ValueError(f"op must be dist.ReduceOp.SUM or AVG, got {op}; others are those of torch.distributed")
        return OPS[op]
    return op_of(op)


def _summed(member: Codec | Reducer) -> Kinds:
    """Return the dtypes that a method sums."""
    return (*DTYPES, *INTEGERS) if member == DENSE else DTYPES


def _copied(x: Any, codec: Codec | None) -> Operands:
    """Return the tensors that a codec copies, or without one as they are."""
    tensors = Operands(x, None if codec is None else DTYPES)
    if codec is not None:
        tensors.form.require_one_dtype()
    return tensors
