"""allreduce and reduce_scatter: sums of arrays over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np

from mpicomp.api.accept import check_apart
from mpicomp.api.arguments import (
    HALF,
    Arrays,
    Form,
    as_list,
    bits,
    checked_arrays,
    checked_out,
    member_of,
    number,
    op_of,
    room,
)
from mpicomp.api.carriers import spread
from mpicomp.api.copies import carrier, rows, said, sources, targets
from mpicomp.api.memories import Memory, remembers
from mpicomp.api.operation import Operation, call, start
from mpicomp.arrays import Array, bound, empty, work_dtype
from mpicomp.codecs.base import Codec
from mpicomp.comm.background import Request
from mpicomp.comm.collectives import allreduce as allreduce_exact
from mpicomp.comm.communicator import Comm
from mpicomp.kernels import kernels_for
from mpicomp.planner.allowance import divided
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.gather import Gather
from mpicomp.registry import Method, describe


def allreduce(
    comm: Any, x: Arrays, method: Method, op: str = "sum", memory: Memory | None = None, out: Arrays | None = None
) -> Arrays:
    """Return the sum or mean of x over the ranks of an mpi4py communicator, compressed by `method`. Collective.

    x: float32, float16, bfloat16 (ml_dtypes), float64, complex64 or complex128, any shape and strides, NumPy's, or
    contiguous and CuPy's for dense, gather, two_stage and low_rank; or a number, whose result is an array of shape ().
    It stays as it was, and the result, `out` or a new contiguous array, has the same bits on all ranks, wherever and in
    whatever order each has its arrays. `out` may be strided, and x itself. A list of arrays of one dtype travels
    together, one message to each peer, and a list comes back. `method` is a spec, a codec or a reducer; `op` is "sum" or
    "mean". Without `memory` the call has no memory: a bare codec runs without error feedback. `bounded(abs=e)` bounds
    the result, and not each contribution. Real and imaginary parts are elements of their own, each within a bound;
    `low_rank` takes no complex numbers. `dense` takes integers too, for "sum".

    Raises ConfigMismatchError on all ranks where they disagree on method, shape, dtype or op, and SpecError, TypeError or
    ValueError for bad arguments; the other ranks then raise ConfigMismatchError.
    """
    result: Arrays = call(comm, _allreduce, x, method, op, memory, out)
    return result


def iallreduce(
    comm: Any, x: Arrays, method: Method, op: str = "sum", memory: Memory | None = None, out: Arrays | None = None
) -> Request[Arrays]:
    """Begin `allreduce`; x and `out` must stay untouched until the request is complete. Collective."""
    return start(comm, _allreduce, x, method, op, memory, out)


def _allreduce(comm: Comm, x: Any, method: Method, op: str, memory: Memory | None, out: Any) -> Operation:
    member, op, x = member_of(method), op_of(op), number(x)
    integers = isinstance(member, Dense) and has_integers(x)
    xs = checked_arrays(x, exact=integers, device=True)
    form = Form.of(x)
    outs = results(xs, form, out)
    if integers:
        check_integers(form, op)
        if memory is not None:
            raise ValueError(f"integers are summed exactly and need no memory; got one for dtype {form.dtype}")
        return Operation(
            lambda: f"sum of {form} by dense", lambda: packed(form, xs, outs, partial(sum_integers, comm), fresh)
        )

    def run(memory: Memory) -> Any:
        return packed(form, xs, outs, partial(memory.reduce, comm, op), memory.work.buffer)

    operation = prepared(comm, form, member, op, memory, run)
    return operation._replace(run=bound(operation.run, xs[0]))


def reduce_scatter(comm: Any, x: Arrays, codec: Method, op: str = "sum", out: Arrays | None = None) -> Arrays:
    """Return this rank's row, (*shape), of the sum or mean over ranks of x, (ranks, *shape). Collective.

    `codec` is a codec, or "dense": each row is encoded once, sent to its rank and added up there in rank order, so
    there is one lossy event. A list of arrays of one dtype shares its messages. There is no memory. All else is as for
    `allreduce`.
    """
    result: Arrays = call(comm, _reduce_scatter, x, codec, op, out)
    return result


def ireduce_scatter(comm: Any, x: Arrays, codec: Method, op: str = "sum", out: Arrays | None = None) -> Request[Arrays]:
    """Begin `reduce_scatter`; x and `out` must stay untouched until the request is complete. Collective."""
    return start(comm, _reduce_scatter, x, codec, op, out)


def _reduce_scatter(comm: Comm, x: Any, codec: Method, op: str, out: Any) -> Operation:
    op = op_of(op)
    given, xs, whole = sources("reduce_scatter", x, codec)
    integers = has_integers(x)
    if integers:
        check_integers(whole, op)
    else:
        checked_arrays(x)
    _ = whole.dtype  # one for all
    form = whole.without_axis(comm.size)
    outs = targets(out, form, xs, "as a row of x is")
    member = given if isinstance(given, Dense) else cast(Gather, divided(Gather(given), comm.size, op)).codec

    def run() -> Any:
        results = form.rooms(xs, outs)
        flats = [bits(result) for result in results]
        dtype = form.dtype if integers else work_dtype(form.dtype)
        direct = not form.listed and form.dtype not in HALF
        total = flats[0] if direct else empty(form.layout.size, dtype)
        # bfloat16 has the range of float32, in which a sum may overflow although the mean does not.
        shrink = 0.5 ** (comm.size - 1).bit_length() if op == "mean" and form.dtype == "bfloat16" else 1.0
        carrier(comm, member, form).add(comm, rows(xs, comm.size), total, f"reduce_scatter by {member}", shrink)
        if op == "mean":
            kernels_for(total).divide(total, comm.size * shrink)
        if not direct:
            spread(total, flats, form.layout, form.dtype)
        return form.returned(results, outs)

    return Operation(lambda: said(f"{op} scattered", form, member), run)


def prepared(
    comm: Comm,
    form: Form,
    method: Codec | Reducer,
    op: str,
    memory: Memory | None,
    run: Callable[[Memory], Any],
) -> Operation:
    """Prepare an allreduce; what `run` is given does a step."""
    if memory is not None and not isinstance(memory, Memory):
        raise TypeError(f"memory must come from mpicomp.memory, got {type(memory).__name__}")
    if memory is None:
        if remembers(method):
            raise ValueError(f"{method} needs a memory: pass memory=mpicomp.memory({str(method)!r}, x)")
        mine = Memory(method, form, feedback=False)
    else:
        memory.check(form, method)
        mine = memory
    found, fresh = mine.prepare(comm, op), memory is None

    def said() -> str:
        seed, step = mine.at(comm.calls if fresh else 0)
        return describe(found.divided, form.layout, form.coded, op, seed, step)

    def go() -> Any:
        mine.begin(comm, found, comm.calls if fresh else 0)
        return run(mine)

    return Operation(said, go)


def results(xs: list[Array], form: Form, out: Any) -> list[Array] | None:
    """Return the arrays to be written to, None for new ones; raises ValueError for what does not fit x."""
    if out is None:
        return None
    outs = checked_out(out, form)
    check_apart(outs, xs, over=True)
    return outs


def packed(
    form: Form,
    xs: list[Array],
    outs: list[Array] | None,
    reduce: Callable[[Array, Array], None],
    buffer: Callable[[str, int, str], Array],
) -> Array | list[Array]:
    """Reduce arrays as one flat array, that of a single one without a copy, and return the results.

    `reduce` is given what it reduces and where to, both flat and of one dtype, half types as bits.
    """
    if not form.listed:
        result = np.empty_like(xs[0], order="C") if outs is None else room(outs[0])
        reduce(bits(xs[0]), bits(result))
        return form.returned([result], outs)
    flats = [bits(x) for x in xs]
    layout, dtype = form.layout, flats[0].dtype
    x = np.concatenate(flats, out=buffer("packed x", layout.size, dtype.name))
    new = outs is None
    total = empty(layout.size, dtype.name, form.device) if new else buffer("packed total", layout.size, dtype.name)
    reduce(x, total)
    parts = [total[unit.where] for unit in layout.units]
    if outs is None:
        return [part.view(x.dtype).reshape(x.shape) for part, x in zip(parts, xs, strict=True)]
    for out, part in zip(outs, parts, strict=True):
        out[...] = part.view(out.dtype).reshape(out.shape)
    return outs


def fresh(name: str, size: int, dtype: str) -> Array:
    """A workspace that nobody keeps."""
    return empty(size, dtype)


def has_integers(x: Any) -> bool:
    """Whether x is an array of integers, or a list that holds one."""
    return any(isinstance(each, np.ndarray) and each.dtype.kind in "iu" for each in as_list(x))


def check_integers(form: Form, op: str) -> None:
    """Raise ValueError where integers cannot be summed as asked."""
    if op != "sum":
        raise ValueError(f"integers can be summed only; got op {op!r} for dtype {form.dtype}")


def sum_integers(comm: Comm, x: Array, total: Array) -> None:
    """Sum integers exactly, by MPI's own allreduce, into `total`, which may be x; they wrap around as NumPy's do."""
    if not x.size:
        return
    if x.itemsize < 4:  # Open MPI 5 saturates sums of 8 and 16 bits
        wide = np.empty(x.size, np.int32)
        allreduce_exact(comm, x.astype(np.int32), wide)
        total[...] = wide.astype(x.dtype)
    else:
        allreduce_exact(comm, x.copy() if np.may_share_memory(x, total) else x, total)
