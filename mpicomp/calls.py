"""The plain calls: one array, one collective, agreed on by all ranks every time.

The agreement is a 16-byte Allreduce(MAX) and is never skipped: a cache of agreements is how ranks part ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from mpicomp.agreement import agree
from mpicomp.arrays import Array, check_memory, checked, dtype_name, work_dtype
from mpicomp.codecs.base import Codec, Key
from mpicomp.collectives import Comm, as_bytes
from mpicomp.collectives import allgather as allgather_bytes
from mpicomp.collectives import allreduce as allreduce_exact
from mpicomp.kernels import kernels_for
from mpicomp.reducers.apply import OPS, apply
from mpicomp.reducers.base import Reducer, State, exchange_lengths
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.layout import Layout
from mpicomp.reducers.policies import After, ErrorFeedback, Partition
from mpicomp.reducers.resolve import Method, describe, is_codec, parsed, resolve
from mpicomp.wire import HEADER, POISON, Header, MessageLayout, read_header, write_header

HALF = ("float16", "bfloat16")


@dataclass
class Memory:
    """What a plain call remembers between steps; made by `mpicomp.state`, updated in place by `allreduce`.

    `reducer` is resolved at the first call, when the number of ranks is known.
    """

    method: Codec | Reducer
    shape: tuple[int, ...]
    dtype: str
    seed: int = 0
    reducer: Reducer | None = None
    state: State | None = None

    @property
    def residual(self) -> Array | None:
        """This rank's debt, in the work dtype and the array's shape; None before the first call or without feedback."""
        state = self.state
        while state is not None and state.residual is None and state.inner:
            state = state.inner[-1]
        return None if state is None or state.residual is None else state.residual.reshape(self.shape)

    def __str__(self) -> str:
        return str(self.method if self.reducer is None else self.reducer)


def state(method: Method, x: Array, seed: int = 0) -> Memory:
    """Return the memory with which `allreduce` of arrays like x feeds back what it could not send.

    A bare codec means error feedback over the default reducer. Raises SpecError, TypeError or ValueError for a
    method or an array that `allreduce` would refuse.
    """
    checked(x)
    return Memory(parsed(method), x.shape, dtype_name(x), seed)


def allreduce(
    comm: Any, x: Array, method: Method, op: str = "sum", state: Memory | None = None, out: Array | None = None
) -> Array:
    """Return the sum or mean of x over the ranks of an mpi4py communicator, compressed by `method`. Collective.

    x: contiguous, float32, float16, bfloat16 (ml_dtypes) or float64, any shape; it stays as it was, and the result,
    `out` or a new array like x, has the same bits on all ranks. `method` is a spec, a codec or a reducer; `op` is
    "sum" or "mean". Without `state` the call has no memory: a bare codec runs without error feedback. `dense` takes
    integers too, for "sum".

    Raises ConfigMismatch on all ranks where they disagree on method, shape, dtype or op, and SpecError, TypeError or
    ValueError for bad arguments; the other ranks then raise ConfigMismatch.
    """
    comm = Comm.of(comm)
    try:
        member = parsed(method)
        if op not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
        if state is not None and not isinstance(state, Memory):
            raise TypeError(f"state must come from mpicomp.state, got {type(state).__name__}")
        integers = isinstance(x, np.ndarray) and x.dtype.kind in "iu" and isinstance(member, Dense)
        if integers:
            _check_integers(x, op, state)
        else:
            checked(x)
        result = _result(x, out)
    except (TypeError, ValueError) as error:
        agree(comm, "", refusal=error)
        raise
    if integers:
        _allreduce_integers(comm, x, result)
        return result
    allreduce_bits(comm, _bits(x), dtype_name(x), x.shape, member, op, state, _bits(result))
    return result


def allreduce_bits(
    comm: Comm,
    x: Array,
    dtype: str,
    shape: tuple[int, ...],
    method: Codec | Reducer,
    op: str,
    memory: Memory | None,
    out: Array,
) -> None:
    """Do what `allreduce` does, for arrays whose memory is at hand: x and out are flat, half types as uint16 bits.

    Collective.
    """
    try:
        reducer, state = _prepared(comm, method, Layout.single(shape), dtype, memory)
    except (TypeError, ValueError) as error:
        agree(comm, "", refusal=error)
        raise
    agree(comm, describe(reducer, state.layout, dtype, op, state.seed, state.step))
    after, _ = apply(comm, reducer, x, dtype, op, state, out)
    if memory is not None:
        memory.reducer, memory.state = reducer, after


def _prepared(
    comm: Comm, method: Codec | Reducer, layout: Layout, dtype: str, memory: Memory | None
) -> tuple[Reducer, State]:
    """Return the reducer and the state to begin with."""
    shape = layout.units[0].shape
    if memory is None:
        if remembers(method):
            raise ValueError(f"{method} needs a memory: pass state=mpicomp.state({str(method)!r}, x)")
        reducer = resolve(method, layout, dtype, comm.size, memory=False)
        return reducer, reducer.init(layout, work_dtype(dtype), step=comm.calls)
    if (memory.shape, memory.dtype) != (shape, dtype):
        raise ValueError(f"state was made for {memory.dtype}{list(memory.shape)}, got {dtype}{list(shape)}")
    if memory.method != method:
        raise ValueError(f"state was made for {memory.method}, got method {method}")
    if memory.state is not None and memory.reducer is not None:
        return memory.reducer, memory.state
    reducer = resolve(method, layout, dtype, comm.size)
    return reducer, reducer.init(layout, work_dtype(dtype), seed=memory.seed)


def remembers(method: Codec | Reducer) -> bool:
    """Whether a method names error feedback anywhere."""
    if isinstance(method, After):
        return remembers(method.reducer)
    if isinstance(method, Partition):
        return remembers(method.small) or remembers(method.large)
    return isinstance(method, ErrorFeedback)


def _bits(x: Array) -> Array:
    """View an array flat, half types as their bits."""
    flat = x.reshape(-1)
    return flat.view(np.uint16) if dtype_name(x) in HALF else flat


def _result(x: Array, out: Array | None) -> Array:
    """Return a checked `out`, or a new array."""
    if out is None:
        return np.empty_like(x)
    if not isinstance(out, np.ndarray) or (out.shape, out.dtype) != (x.shape, x.dtype):
        got = f"{out.dtype}{list(out.shape)}" if isinstance(out, np.ndarray) else type(out).__name__
        raise ValueError(f"out must be an array of {x.dtype}{list(x.shape)} as x is, got {got}")
    if not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError("out must be contiguous and writable")
    if out is not x and np.may_share_memory(out, x):
        raise ValueError("out shares memory with x; pass x itself or an array apart from it")
    return out


def _check_integers(x: Array, op: str, state: Memory | None) -> None:
    """Raise ValueError where integers cannot be summed as asked."""
    if op != "sum":
        raise ValueError(f"integers can be summed only; got op {op!r} for dtype {x.dtype}")
    if state is not None:
        raise ValueError(f"integers are summed exactly and need no state; got one for dtype {x.dtype}")
    check_memory(x)


def _allreduce_integers(comm: Comm, x: Array, result: Array) -> None:
    """Sum integers exactly, by MPI's own allreduce; they wrap around as NumPy's do."""
    agree(comm, f"sum of {x.dtype}{list(x.shape)} by dense")
    if not x.size:
        return
    if x.itemsize < 4:  # Open MPI 5 saturates sums of 8 and 16 bits
        total = np.empty(x.shape, np.int32)
        allreduce_exact(comm, x.astype(np.int32), total)
        result[...] = total.astype(x.dtype)
    else:
        allreduce_exact(comm, x.copy() if result is x else x, result)


def allgather(comm: Any, x: Array, codec: Method) -> Array:
    """Return every rank's x as its code says, stacked: (ranks, *x.shape), the same bits on all ranks. Collective.

    x as for `allreduce`; the row of a rank whose x is not finite is NaN, and a rank's own row is decoded like the
    others. `codec` is a spec or a codec, or "dense" for the arrays as they are, of any dtype. Raises as `allreduce`
    does.
    """
    comm = Comm.of(comm)
    try:
        member = parsed(codec)
        if isinstance(member, Dense):
            if not isinstance(x, np.ndarray) or x.dtype.hasobject:
                raise TypeError(f"x must be a NumPy array of numbers, got {getattr(x, 'dtype', type(x).__name__)}")
            check_memory(x)
        elif is_codec(member):
            checked(x)
        else:
            raise TypeError(f"allgather takes a codec or dense, got the reducer {member}")
    except (TypeError, ValueError) as error:
        agree(comm, "", refusal=error)
        raise
    agree(comm, f"allgather of {dtype_name(x)}{list(x.shape)} by {member}")
    step = comm.next_call()
    rows = np.empty((comm.size, x.size), x.dtype)
    if isinstance(member, Dense):
        allgather_bytes(comm, as_bytes(x.copy()), [as_bytes(row) for row in rows], "allgather")
    else:
        _gather_encoded(comm, cast(Codec, member), x, rows, step)
    return rows.reshape(comm.size, *x.shape)


def _gather_encoded(comm: Comm, codec: Codec, x: Array, rows: Array, step: int) -> None:
    """Encode x, gather the messages and decode them into `rows`, (ranks, x.size)."""
    dtype, kernels = dtype_name(x), kernels_for(x)
    wide = np.empty(x.size, work_dtype(dtype))
    if dtype in HALF:
        kernels.widen(_bits(x), wide, dtype)
    else:
        wide[...] = x.reshape(-1)
    layout = MessageLayout([codec.fields(x.size, work_dtype(dtype))])
    messages = np.zeros((comm.size + 1, layout.nbytes), np.uint8)
    *received, mine = messages
    key = Key(step=step)
    poisoned = bool(x.size) and kernels.nonfinite(wide, None)
    used = 0
    if not poisoned:
        used = codec.encode(wide, layout.views(mine)[0], key._replace(rank=comm.rank))
    write_header(mine, Header(step & 0xFFFFFFFF, 0, POISON if poisoned else 0))
    if not codec.fixed:
        mine = mine[: HEADER + used]
        lengths = exchange_lengths(comm, [mine.size] * comm.size, [True] * comm.size, f"allgather by {codec}")
        received = [message[:length] for message, length in zip(received, lengths, strict=True)]
    allgather_bytes(comm, mine, received, f"allgather by {codec}")
    views = layout.views if codec.fixed else layout.cut
    for rank, (row, message) in enumerate(zip(rows, received, strict=True)):
        if read_header(message).flags & POISON:
            wide[...] = np.nan
        else:
            wide[...] = 0
            codec.decode_add(views(message)[0], wide, key._replace(rank=rank))
        if dtype in HALF:
            kernels.narrow(wide, _bits(row), dtype)
        else:
            row[...] = wide
