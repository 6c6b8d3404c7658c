"""From what a user writes to the reducer that runs: specs are parsed, and a bare codec gets its reducer."""

from __future__ import annotations

import functools
import sys
from collections.abc import Hashable
from dataclasses import replace
from typing import Any, cast

import numpy as np

from mpicomp import __version__
from mpicomp.arrays import Array, work_dtype
from mpicomp.codecs import CODECS
from mpicomp.codecs.base import Codec
from mpicomp.comm.agreement import digest_of, float_mode
from mpicomp.kernels import kernels_for
from mpicomp.planner.auto import Auto
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.dense import Dense
from mpicomp.reducers.gather import Gather
from mpicomp.reducers.hierarchical import Hierarchical
from mpicomp.reducers.integer import Integer
from mpicomp.reducers.low_rank import LowRank
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.messages import Message, message_nbytes
from mpicomp.reducers.policies import After, ErrorFeedback, Partition, unscaled
from mpicomp.reducers.shared_support import SharedSupport
from mpicomp.reducers.split import Split
from mpicomp.reducers.tree import Tree
from mpicomp.reducers.two_stage import TwoStage
from mpicomp.specs import parse as parse_spec

REDUCERS: dict[str, type[Any]] = {
    "dense": Dense,
    "gather": Gather,
    "two_stage": TwoStage,
    "shared_support": SharedSupport,
    "split": Split,
    "tree": Tree,
    "integer": Integer,
    "low_rank": LowRank,
    "auto": Auto,
    "hierarchical": Hierarchical,
    "error_feedback": ErrorFeedback,
    "after": After,
    "partition": Partition,
}
ALIASES = {"fp16": "cast(dtype=fp16)", "bf16": "cast(dtype=bf16)", "int8": "uniform(bits=8)"}
GATHER_BYTES = 16384  # what takes a rank no more bytes is gathered: its cost is the number of messages, not their size
CODEC_FIELDS = ("codec", "second", "dense")  # where reducers have their codecs

Method = str | Codec | Reducer


def parse(spec: str) -> Codec | Reducer:
    """Read a spec such as "error_feedback(gather(topk(density=0.01)))"; raises SpecError."""
    member: Codec | Reducer = parse_spec(spec, {**CODECS, **REDUCERS}, ALIASES)
    return member


def parsed(method: Any) -> Codec | Reducer:
    """Return the codec or reducer that a user means; raises SpecError, or TypeError for what is neither."""
    if isinstance(method, str):
        return parse(method)
    if isinstance(method, tuple({**CODECS, **REDUCERS}.values())):
        return cast(Codec | Reducer, method)
    raise TypeError(f"method must be a spec, a codec or a reducer, got {type(method).__name__}")


def is_codec(member: Codec | Reducer) -> bool:
    """Whether this is a codec, which needs a reducer."""
    return isinstance(member, tuple(CODECS.values()))


def resolve(method: Method, layout: Layout, dtype: str, ranks: int, memory: bool = True) -> Reducer:
    """Return the reducer that a method means for this layout and number of ranks.

    A reducer is taken literally. A bare codec gets `shared_support` if it is linear, `gather` for two ranks or a
    message to all others of 16 KiB together, else `two_stage`; with `memory` it gets error feedback too, an
    unbiased one in its contracting form, and so does an `auto` that may compress.
    """
    member = parsed(method)
    if isinstance(member, Auto) and member.allow and memory:
        return ErrorFeedback(member)
    if not is_codec(member):
        return cast(Reducer, member)
    codec = unscaled(cast(Codec, member)) if memory else cast(Codec, member)
    reducer: Reducer
    if codec.linear:
        reducer = SharedSupport(codec)
    elif ranks <= 2 or (ranks - 1) * message_nbytes(codec, layout.whole(), work_dtype(dtype)) <= GATHER_BYTES:
        reducer = Gather(codec)
    else:
        reducer = TwoStage(codec)
    return ErrorFeedback(reducer) if memory else reducer


def resolve_partitioned(
    method: Method, layout: Layout, dtype: str, ranks: int, min_size: int = 512, min_ndim: int = 2
) -> Reducer:
    """Return the reducer for the tensors of a model: small ones dense, in rank order, unless the method says otherwise.

    `dense`, and whatever holds a partition of its own, is taken literally.
    """
    member = parsed(method)
    if isinstance(member, Dense) or _has_partition(member):
        return cast(Reducer, member)
    sieve = Partition(Dense("two_shot"), Dense(), min_size, min_ndim)
    large = resolve(member, layout.select(sieve.is_large), dtype, ranks)
    return replace(sieve, large=large)


def _has_partition(member: object) -> bool:
    return isinstance(member, Partition) or (isinstance(member, After) and _has_partition(member.reducer))


def leaves(member: Reducer) -> list[Reducer]:
    """The reducers inside all policies: those that send."""
    if isinstance(member, Partition):
        return leaves(member.small) + leaves(member.large)
    if isinstance(member, (ErrorFeedback, After, Hierarchical)):
        return leaves(member.reducer)
    if isinstance(member, Auto):
        return list(member.candidates())
    return [member]


def arithmetic(member: Any) -> str:
    """A digest of what this machine makes of a golden array: ranks that round differently must not work together.

    Runs the kernels that `member` will need, and no others, once for each floating-point mode: a cold start is long
    enough.
    """
    return _arithmetic(member, float_mode())


@functools.cache
def _arithmetic(member: Any, mode: bytes) -> str:
    n = 600
    x = np.ldexp(np.sin(np.arange(n) * 1.7).astype(np.float32), np.arange(n, dtype=np.int32) % 40 - 20)
    layout = Layout((Unit("golden", (n,), 0),))
    found = [np.full(1, 1e-40, np.float32) * np.float32(1)]  # 0 where denormals are flushed to zero
    for leaf in leaves(member):
        codecs = [getattr(leaf, name, None) for name in CODEC_FIELDS]
        total = np.zeros(n, np.float32)
        for codec in filter(None, codecs):
            state = Gather(codec).init(layout, "float32", feedback=True)
            message = Message(codec, layout.whole(), "float32")
            message.encode(x, state, 0, 0)
            message.decode_add(total, state, 0, 0)
            found += [total.copy(), message.buffer, cast(Array, state.spare)]
        found += leaf.rehearse(x, total)
    kernels_for(x).divide(mean := x.copy(), 3)
    found.append(mean)
    return f"{digest_of(' '.join(part.tobytes().hex() for part in found)):016x}"


def describe(reducer: Reducer, layout: Layout, dtype: str, op: str, seed: int, step: int) -> str:
    """Say what a reduction will do, for `agreement.agree`: all that must be the same on every rank."""
    units = ", ".join(f"{unit.name}{list(unit.shape)}" for unit in layout.units[:8])
    more = f" and {len(layout.units) - 8} more" if len(layout.units) > 8 else ""
    return (
        f"{op} of {dtype} {units}{more} by {reducer}, seed {seed}, step {step}, layout {digest_of(repr(layout)):016x}, "
        f"mpicomp {__version__}, {sys.byteorder} endian, arithmetic {arithmetic(cast(Hashable, reducer))}"
    )
