"""Copies."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from mpicomp.agreement import agree
from mpicomp.arrays import Array, check_memory, checked, dtype_name, work_dtype
from mpicomp.calls.arguments import HALF
from mpicomp.calls.arguments import bits as _bits
from mpicomp.codecs.base import Codec, Key
from mpicomp.collectives import Comm, as_bytes
from mpicomp.collectives import allgather as allgather_bytes
from mpicomp.kernels import kernels_for
from mpicomp.reducers.base import exchange_lengths
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.resolve import Method, is_codec, parsed
from mpicomp.wire import HEADER, POISON, Header, MessageLayout, read_header, write_header


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
