"""The tables of codecs and reducers, and the way from a spec to the reducer that runs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np

from mpicomp import __version__, codecs, reducers
from mpicomp.arrays import Array, work_dtype
from mpicomp.codecs.base import Codec
from mpicomp.comm.agreement import digest_of, float_mode
from mpicomp.kernels import kernels_for
from mpicomp.planner.auto import Auto
from mpicomp.reducers.base import Level, Reducer, walk
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.messages import Message, message_nbytes
from mpicomp.specs import parse as parse_spec

CODECS: dict[str, type[Codec]] = {
    cls.spec_name: cls
    for cls in (
        codecs.Rotated,
        codecs.Bounded,
        codecs.Cast,
        codecs.TopK,
        codecs.BlockTopK,
        codecs.SampledTopK,
        codecs.Threshold,
        codecs.RandomK,
        codecs.Atomo,
        codecs.Uniform,
        codecs.QSGD,
        codecs.DoReFa,
        codecs.Sign,
        codecs.Ternary,
        codecs.Natural,
        codecs.MXFP4,
        codecs.MXFP8,
        codecs.FP8,
    )
}
"""Every codec by the name that a spec gives it."""

REDUCERS: dict[str, type[Reducer]] = {
    each.spec_name: each
    for each in (
        reducers.Dense,
        reducers.Gather,
        reducers.TwoStage,
        reducers.SharedSupport,
        reducers.Split,
        reducers.Tree,
        reducers.Integer,
        reducers.LowRank,
        reducers.Spectral,
        reducers.Vote,
        Auto,
        reducers.Hierarchical,
        reducers.Masked,
        reducers.Joined,
        reducers.ErrorFeedback,
        reducers.Decay,
        reducers.MomentumCorrection,
        reducers.Warmup,
        reducers.After,
        reducers.Partition,
        reducers.ByName,
    )
}
"""Every reducer and policy by its name in a spec."""
ALIASES = {"fp16": "cast(dtype=fp16)", "bf16": "cast(dtype=bf16)", "int8": "uniform(bits=8)"}
OTHER_NAMES = {
    other: name
    for name, others in {
        "dense": "none fp32 float32 allreduce",
        "fp16": "float16 half",
        "bf16": "bfloat16",
        "low_rank": "powersgd",
        "topk": "dgc",
        "sampled_topk": "gaussiank",
        "randomk": "random",
        "spectral": "atomospectral spectralatomo",
        "ternary": "terngrad",
        "sign": "1bit onebit 1bitsgd onebitsgd signsgd efsignsgd",
        "rotated(sign, rescale=True)": "eden drive",
        "rotated": "hadamard",
        "rotated(uniform(bits=2), kashin=True)": "kashin",
        "threshold": "strom",
        "bounded": "sz zfp",
        "uniform(bits=4)": "4bit int4",
        "uniform(bits=8)": "8bit",
        "uniform": "quantize",
        "natural": "naturalcompression",
        "split": "oktopk sparcml",
        "tree": "gtopk",
        "decay": "loco sparseloco",
        "vote": "majority majorityvote signum",
    }.items()
    for other in others.split()
}
"""Names of the literature and of other libraries, in lower case without "_" and "-": the hint for an unknown name."""
GATHER_BYTES = 16384  # per rank; for fewer the number of messages costs more than their size, so gather is best

Method = str | Codec | Reducer | Mapping[str, Any]
"""What a user says: a spec, a codec, a reducer, or methods by pattern of names, which are those of `by_name`."""
T = TypeVar("T", bound=Codec | Reducer)


def register(cls: type[T]) -> type[T]:
    """Add a codec, reducer or policy by its `spec_name` to what specs can name; returns the class, as a decorator must.

    Every rank must do so. Raises ValueError for a name that is taken, TypeError for a class of another kind.
    """
    if not issubclass(cls, Codec | Reducer):
        raise TypeError(f"{cls.__name__} is no codec and no reducer: it must inherit from Codec or Reducer")
    name = cls.spec_name
    table: dict[str, Any] = REDUCERS if issubclass(cls, Reducer) else CODECS
    if name in CODECS or name in REDUCERS or name in ALIASES:
        raise ValueError(f"{name!r} is registered already; choose another spec_name for {cls.__name__}")
    table[name] = cls
    return cls


def parse(spec: str) -> Codec | Reducer:
    """Read a spec such as "error_feedback(gather(topk(density=0.01)))"; raises SpecError."""
    member: Codec | Reducer = parse_spec(spec, {**CODECS, **REDUCERS}, ALIASES, OTHER_NAMES)
    return member


def parsed(method: Any) -> Codec | Reducer:
    """Return the codec or reducer that a user means; raises SpecError, or TypeError for a value of another kind."""
    if isinstance(method, str):
        return parse(method)
    if isinstance(method, Mapping):
        method = reducers.ByName({pattern: parsed(each) for pattern, each in method.items()})
    if isinstance(method, Codec | Reducer):
        str(method)  # raises SpecError where it is nested too deep for the recursions over it
        return method
    raise TypeError(
        f"method must be a spec, a codec, a reducer, or a dict of such by pattern, got {type(method).__name__}"
    )


def resolve(method: Method, layout: Layout, dtype: str, ranks: int, memory: bool = True) -> Reducer:
    """Return the reducer that a method means for this layout and number of ranks.

    A reducer is taken literally, and a method in a `by_name` as if it stood alone. A bare codec gets `shared_support`
    if it is linear, `gather` for two ranks or where its messages to all others have at most 16 KiB, else `two_stage`.
    With `memory` it gets error feedback too, an unbiased one in its contracting form, and so does an `auto` that may
    compress. ValueError where the reducer cannot reduce this layout.
    """
    member = parsed(method)
    if isinstance(member, Reducer):
        member = member.settled(layout, lambda each, part: resolve(each, part, dtype, ranks, memory))
        member.check_layout(layout)
        compresses = member.level is Level.CHOICE and not member.exact
        return reducers.ErrorFeedback(member) if memory and compresses else member
    codec = member.contraction() if memory else member
    reducer: Reducer
    if codec.linear:
        reducer = reducers.SharedSupport(codec)
    elif ranks <= 2 or (ranks - 1) * message_nbytes(codec, layout.whole(), work_dtype(dtype)) <= GATHER_BYTES:
        reducer = reducers.Gather(codec)
    else:
        reducer = reducers.TwoStage(codec)
    return reducers.ErrorFeedback(reducer) if memory else reducer


def resolve_partitioned(
    method: Method, layout: Layout, dtype: str, ranks: int, min_size: int = 512, min_ndim: int = 2
) -> Reducer:
    """Return the reducer for the tensors of a model: small ones dense, in rank order, unless the method says otherwise.

    Small ones have the momentum of the large ones, if any. An exact sum by itself, and any method that holds a
    partition, is taken literally; a method in a `by_name` as if it stood alone.
    """
    member = parsed(method)
    if isinstance(member, Reducer):
        alone = member.exact and not member.inner
        if alone or any(each.by_unit for each in walk(member)):

            def one(each: Codec | Reducer, part: Layout) -> Reducer:
                return resolve_partitioned(each, part, dtype, ranks, min_size, min_ndim)

            member = member.settled(layout, one)
            member.check_layout(layout)
            return member
    small, large = _small(member), reducers.Dense()
    sieve = reducers.Partition(small=small, large=large, min_size=min_size, min_ndim=min_ndim)
    return replace(sieve, large=resolve(member, layout.select(sieve.is_large), dtype, ranks))


def _small(member: Codec | Reducer) -> Reducer:
    """Return the reducer of small tensors: dense, with momentum where large ones have it."""
    dense = reducers.Dense("two_shot")
    momentum = (
        [each for each in walk(member) if isinstance(each, reducers.MomentumCorrection)]
        if isinstance(member, Reducer)
        else []
    )
    return momentum[0].around(dense) if momentum else dense


def arithmetic(member: Codec | Reducer) -> str:
    """Return a digest of the results on a golden array: ranks that round differently must not work together.

    Runs the kernels that `member` needs, and no others, once for each floating-point mode: a cold start is long
    enough.
    """
    return _arithmetic(cast(Hashable, member), float_mode())


@functools.cache
def _arithmetic(member: Any, mode: bytes) -> str:
    n = 600
    x = np.ldexp(np.sin(np.arange(n) * 1.7).astype(np.float32), np.arange(n, dtype=np.int32) % 40 - 20)
    layout = Layout((Unit("golden", (n,), 0),))
    found = [np.full(1, 1e-40, np.float32) * np.float32(1)]  # 0 where denormals are flushed to zero
    for reducer in walk(member if isinstance(member, Reducer) else reducers.Gather(member)):
        total = np.zeros(n, np.float32)
        for codec in reducer.codecs:
            state = reducers.Gather(codec).init(layout, "float32", feedback=True)
            message = Message(codec, layout.whole(), "float32")
            message.encode(x, state, 0, 0)
            message.decode_add(total, state, 0, 0)
            found += [total.copy(), message.buffer, cast(Array, state.spare)]
        found += reducer.rehearse(x, total)
    kernels_for(x).divide(mean := x.copy(), 3)
    found.append(mean)
    return f"{digest_of(' '.join(part.tobytes().hex() for part in found)):016x}"


def describe(reducer: Reducer, layout: Layout, dtype: str, op: str, seed: int, step: int) -> str:
    """Describe a reduction for `agreement.agree`: all that must be the same on every rank."""
    units = ", ".join(f"{unit.name}{list(unit.shape)}" for unit in layout.units[:8])
    more = f" and {len(layout.units) - 8} more" if len(layout.units) > 8 else ""
    return (
        f"{op} of {dtype} {units}{more} by {reducer}, seed {seed}, step {step}, layout {digest_of(repr(layout)):016x}, "
        f"mpicomp {__version__}, {sys.byteorder} endian, arithmetic {arithmetic(reducer)}"
    )
