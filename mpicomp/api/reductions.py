"""allreduce and reduce_scatter: sums of arrays over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np

from mpicomp.api.arguments import (
    DENSE,
    HALF,
    Arrays,
    Form,
    bits,
    checked_arrays,
    member_of,
    number,
    op_of,
    room,
    targets,
)
from mpicomp.api.call import Call, Operation, blocking, nonblocking
from mpicomp.api.carriers import carrier, rows, spread
from mpicomp.api.copies import codec_of, describe_copy, sources
from mpicomp.api.lifecycle import PersistentReduction
from mpicomp.api.memories import Memory, Resolution, resolution
from mpicomp.arrays import Array, empty, work_dtype
from mpicomp.codecs.base import Codec
from mpicomp.comm.agreement import noted
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import allreduce as allreduce_exact
from mpicomp.kernels import kernels_for
from mpicomp.planner.allowance import divided
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.gather import Gather
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.registry import Method


def _allreduce(
    comm: Comm,
    x: Arrays,
    method: Method,
    op: str | Any = "sum",
    memory: Memory | None = None,
    out: Arrays | None = None,
) -> Call[Arrays]:
    """Return the sum or mean of x over the ranks of an mpi4py communicator, compressed by `method`. Collective.

    x: float32, float16, bfloat16 (ml_dtypes), float64, complex64 or complex128, any shape and strides, NumPy's, or
    contiguous and CuPy's for dense, gather, two_stage, shared_support and low_rank; or a number, whose result is an
    array of shape (). x stays as it was. A list of arrays of one dtype travels together, one message to each peer, and
    a list comes back.
    The result is `out`, which may be strided and may be x itself, or a new contiguous array. It has the same bits on
    all ranks, whatever the memory order of their arrays.

    `method` is a spec, a codec or a reducer; `op` is "sum", "mean" or its synonym "avg", or MPI.SUM. Without `memory` a
    bare codec runs without error feedback. `bounded(abs=e)` bounds the result, not each contribution. Real and
    imaginary parts are elements of their own, each within a bound; `low_rank` takes no complex numbers. `dense` sums
    integers too.

    An element that is NaN or infinite on any rank makes every element of the result NaN on all ranks, unless `method`
    is `dense`, which sums element by element as IEEE 754 says; a memory stays as it was.

    Raises ConfigMismatchError on all ranks where they disagree on method, shape, dtype or op, and SpecError, TypeError
    or ValueError for bad arguments; the other ranks then raise ConfigMismatchError.
    """
    member, op, x = member_of(method), op_of(op), number(x)
    xs = checked_arrays(x, exact=member == DENSE and has_integers(x), device=True)
    form = Form.of(x)
    outs = targets(out, form, xs, "as x is", over=True)
    return summing(comm, form, method, member, op, memory).of(xs, outs)


def summing(
    comm: Comm, form: Form, method: Method, member: Codec | Reducer, op: str, memory: Memory | None
) -> Operation:
    """Return the allreduce of arrays of a form; TypeError or ValueError where the method or memory does not fit."""
    if member == DENSE and form.has_integers:
        check_integers(form, op)
        if memory is not None:
            raise ValueError(f"integers are summed exactly and need no memory; got one for dtype {form.dtype}")
        return Operation(lambda _: f"sum of {form} by dense", partial(sum_integers, comm, form))
    found = settled(comm, form, method, member, op, memory)

    def at(number: int) -> tuple[int, int]:
        return (0, number) if memory is None else memory.at()

    def run(xs: list[Array], outs: list[Array] | None) -> Any:
        if memory is None:
            return reduce_arrays(comm, found, xs, outs, found.begun(0, comm.calls))
        return reduce_and_keep(comm, found, memory, xs, outs)

    if memory is None:
        return Operation(lambda number: found.describe(*at(number)), run, lambda number: found.digest(*at(number)))
    return Operation(
        lambda number: memory.agreed + found.describe(*at(number)),
        run,
        lambda number: noted(found.digest(*at(number)), memory.agreed),
    )


def reduce_and_keep(comm: Comm, found: Resolution, memory: Memory, xs: list[Array], outs: list[Array] | None) -> Any:
    """Reduce arrays with what the memory holds, and return the results; then the step counts."""
    reduction = memory.reduction or found.begun(*memory.at())
    result = reduce_arrays(comm, found, xs, outs, reduction)
    memory.keep(comm, found, reduction)
    return result


def reduce_arrays(
    comm: Comm, found: Resolution, xs: list[Array], outs: list[Array] | None, reduction: PersistentReduction
) -> Any:
    """Reduce arrays once, and return the results."""
    return packed(found.form, xs, outs, partial(reduction.reduce, comm, found.op, watched=False), reduction.work)


def _reduce_scatter(
    comm: Comm, x: Arrays, codec: Method, op: str | Any = "sum", out: Arrays | None = None
) -> Call[Arrays]:
    """Return this rank's row, (*shape), of the sum or mean over ranks of x, (ranks, *shape). Collective.

    `codec` is a spec or a codec, or "dense": each row is encoded once, sent to its rank and added up there in rank
    order, so there is one lossy event. A list of arrays of one dtype shares its messages. There is no memory. All else
    is as for `allreduce`.
    """
    op, given = op_of(op), codec_of("reduce_scatter", codec)
    xs, rows_of_all = sources(x, given)
    if not rows_of_all.has_integers:
        checked_arrays(x)
    outs = targets(out, rows_of_all.without_axis(comm.size), xs, "as a row of x is")
    return scattering(comm, rows_of_all, given, op).of(xs, outs)


def scattering(comm: Comm, rows_of_all: Form, given: Codec | None, op: str) -> Operation:
    """Return the reduce_scatter of arrays of a form, (ranks, *shape); ValueError for arrays that cannot be summed."""
    rows_of_all.require_one_dtype()
    if rows_of_all.has_integers:
        check_integers(rows_of_all, op)
    form = rows_of_all.without_axis(comm.size)
    running = None if given is None else cast(Gather, divided(Gather(given), comm.size, op)).codec

    def run(xs: list[Array], outs: list[Array] | None) -> Any:
        mean = op == "mean"
        made = form.rooms(xs, outs)
        flats = [bits(result) for result in made]
        direct = not form.listed and form.dtype not in HALF
        dtype = form.dtype if form.has_integers else work_dtype(form.dtype)
        total = flats[0] if direct else empty(form.layout.size, dtype)
        # bfloat16 has the range of float32, in which a sum may overflow although the mean does not.
        shrink = 0.5 ** (comm.size - 1).bit_length() if mean and form.dtype == "bfloat16" else 1.0
        operation = f"reduce_scatter by {running or 'dense'}"
        carrier(comm, running, form).add(comm, rows(xs, comm.size), total, operation, shrink)
        if mean:
            kernels_for(total).divide(total, comm.size * shrink)
        if not direct:
            spread(total, flats, form.layout, form.dtype)
        return form.returned(made, outs)

    return Operation(lambda _: describe_copy(f"{op} scattered", form, running), run)


allreduce, iallreduce = blocking(_allreduce), nonblocking(_allreduce)
reduce_scatter, ireduce_scatter = blocking(_reduce_scatter), nonblocking(_reduce_scatter)


def settled(
    comm: Comm, form: Form, method: Method, member: Codec | Reducer, op: str, memory: Memory | None
) -> Resolution:
    """Return what a method means here; raises TypeError or ValueError where the memory does not fit."""
    if memory is None:
        spec = method if isinstance(method, str) else str(member)
        if isinstance(member, Reducer) and member.remembers:
            raise ValueError(f"{member} needs a memory: pass memory=mpicomp.memory({str(member)!r}, x)")
        return resolution(member, spec, form, op, comm.size)
    if not isinstance(memory, Memory):
        raise TypeError(f"memory must come from mpicomp.memory, got {type(memory).__name__}")
    memory.check(form, member)
    return memory.prepare(comm, op)


def packed(
    form: Form, xs: list[Array], outs: list[Array] | None, add: Callable[[Array, Array], None], work: Workspace
) -> Any:
    """Reduce arrays as one flat array, that of a single one without a copy, and return the results.

    `add` is given what it reduces and where to, both flat and of one dtype, half types as bits.
    """
    if not form.listed:
        result = np.empty_like(xs[0], order="C") if outs is None else room(outs[0])
        add(bits(xs[0]), bits(result))
        return form.returned([result], outs)
    flats = [bits(x) for x in xs]
    size, dtype = form.layout.size, flats[0].dtype
    x = np.concatenate(flats, out=work.buffer("packed x", size, dtype.name))
    new = outs is None
    total = empty(size, dtype.name, form.device) if new else work.buffer("packed total", size, dtype.name)
    add(x, total)
    parts = [total[unit.where] for unit in form.layout.units]
    if outs is None:
        return [part.view(x.dtype).reshape(x.shape) for part, x in zip(parts, xs, strict=True)]
    for out, part in zip(outs, parts, strict=True):
        out[...] = part.view(out.dtype).reshape(out.shape)
    return outs


def has_integers(x: Any) -> bool:
    """Whether x is an array of integers, or a list that holds one."""
    if isinstance(x, (list, tuple)):
        return any(map(has_integers, x))
    return isinstance(x, np.ndarray) and x.dtype.kind in "iu"


def check_integers(form: Form, op: str) -> None:
    """Raise ValueError where arrays, among which are integers, cannot be summed as asked."""
    form.require_one_dtype()
    if op != "sum":
        raise ValueError(f"integers can be summed only; got op {op!r} for dtype {form.dtype}")


def sum_integers(comm: Comm, form: Form, xs: list[Array], outs: list[Array] | None) -> Any:
    """Sum integers exactly, by MPI's own allreduce, and return the results; they wrap around as NumPy's do."""
    return packed(form, xs, outs, partial(_add_integers, comm), Workspace())


def _add_integers(comm: Comm, x: Array, total: Array) -> None:
    """Sum a flat array into `total`, which may be x."""
    if not x.size:
        return
    if x.itemsize < 4:  # Open MPI 5 saturates sums of 8 and 16 bits
        wide = np.empty(x.size, np.int32)
        allreduce_exact(comm, x.astype(np.int32), wide)
        total[...] = wide.astype(x.dtype)
    else:
        allreduce_exact(comm, x.copy() if np.may_share_memory(x, total) else x, total)
