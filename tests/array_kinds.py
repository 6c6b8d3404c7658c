"""Arrays of every kind, and one call with them that is checked against NumPy: used on a team and under MPI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

import mpicomp
from mpicomp.errors import ConfigMismatchError

Array = np.ndarray[Any, Any]

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
METHODS = {  # and how far each contribution may be off
    "dense": 0.0,
    "topk(density=1.0)": 0.0,
    "bf16": 0.0,
    "uniform(bits=8)": 0.13,
    "bounded(abs=0.02)": 0.03,
}
SHAPES = [(), (1,), (5,), (3, 4), (2, 3, 2), (0,), (2, 0)]


def placed(x: Array, start: int, step: int = 1) -> Array:
    """Return an array of x's values that begins `start` bytes behind an aligned place, its elements `step` apart."""
    memory = np.zeros(max(1, x.size) * step * x.itemsize + start + 64, np.uint8)
    first = -memory.ctypes.data % 64 + start
    strides = tuple(step * stride for stride in x.copy().strides)
    made = np.ndarray(x.shape, x.dtype, memory, first, strides)
    made[...] = x
    return made


def field(x: Array) -> Array:
    """Return an array of x's values in a structure, each unaligned."""
    records = np.zeros(x.shape, [("tag", "u1"), ("value", x.dtype)])
    records["value"] = x
    found: Array = records["value"]
    return found


def backwards(x: Array) -> Array:
    """Return an array of x's values with negative strides."""
    turn = (*((slice(None, None, -1),) * x.ndim), ...)
    return x[turn].copy()[turn]


def frozen(x: Array) -> Array:
    made = x.copy()
    made.setflags(write=False)
    return made


def mapped(x: Array) -> Array:
    """Return a memmap of x's values; of bytes that no file has."""
    return x.copy().view(np.memmap)


TAKEN: dict[str, Callable[[Array], Array]] = {
    "contiguous": lambda x: x.copy(),
    "fortran": lambda x: np.array(x, order="F"),
    "strided": lambda x: placed(x, 0, 2),
    "unaligned": lambda x: placed(x, 1),
    "field": field,
    "backwards": backwards,
    "memmap": mapped,
}
READ_ONLY: dict[str, Callable[[Array], Array]] = {
    "broadcast": lambda x: np.broadcast_to(x.reshape(-1)[:1].reshape(()) if x.size else x, x.shape),
}


class Subclass(np.ndarray[Any, Any]):
    """What its author means by it nobody knows."""


REFUSED: dict[str, Callable[[Array], Any]] = {
    "matrix": lambda x: x.copy().reshape(1, -1).view(np.matrix),
    "masked": lambda x: np.ma.masked_array(x),
    "subclass": lambda x: x.copy().view(Subclass),
    "byte order": lambda x: x.astype(x.dtype.newbyteorder()) if x.dtype.kind in "fc" else x.astype(">f4"),
    "objects": lambda x: x.astype(object),
    "text": lambda x: str(x),
    "nothing": lambda x: None,
}
BAD_OUTS = ("read-only", "stretched", "shared", "other")
ROOT = 0
IN_PLACE = ("allreduce", "mean", "bcast", "iallreduce", "plan")

Call = Callable[..., Any]
CALLS: dict[str, tuple[Call, bool, Callable[[list[Array], int], Any]]] = {
    # what is called, whether x has an axis of ranks, and the result on a rank by the arrays of all
    "allreduce": (mpicomp.allreduce, False, lambda xs, me: np.sum(xs, 0)),
    "iallreduce": (lambda *a, **o: mpicomp.iallreduce(*a, **o).wait(), False, lambda xs, me: np.sum(xs, 0)),
    "mean": (
        lambda comm, x, method, **o: mpicomp.allreduce(comm, x, method, "avg", **o),
        False,
        lambda xs, me: np.sum(xs, 0) / len(xs),
    ),
    "plan": (
        lambda comm, x, method, **o: mpicomp.plan(comm, x, method)(x, **o),
        False,
        lambda xs, me: np.sum(xs, 0),
    ),
    "reduce_scatter": (mpicomp.reduce_scatter, True, lambda xs, me: np.sum([x[me] for x in xs], 0)),
    "allgather": (mpicomp.allgather, False, lambda xs, me: np.stack(xs)),
    "bcast": (lambda comm, x, m, **o: mpicomp.bcast(comm, x, m, np.int64(ROOT), **o), False, lambda xs, me: xs[ROOT]),
    "gather": (
        lambda comm, x, method, **o: mpicomp.gather(comm, x, method, ROOT, **o),
        False,
        lambda xs, me: np.stack(xs) if me == ROOT else None,
    ),
    "scatter": (
        lambda comm, x, method, **o: mpicomp.scatter(
            comm, x if comm.rank == ROOT else None, method, ROOT, like=None if comm.rank == ROOT else rows_of(x), **o
        ),
        True,
        lambda xs, me: xs[ROOT][me],
    ),
    "alltoall": (mpicomp.alltoall, True, lambda xs, me: np.stack([x[me] for x in xs])),
}


def rows_of(x: Any) -> Any:
    """Return the first row of an array, or of each in a list, as an array; what has none as it is."""
    if isinstance(x, list):
        return [rows_of(each) for each in x]
    return x[0, ...] if isinstance(x, np.ndarray) and x.ndim else x


@dataclass(frozen=True)
class Case:
    """One call: what is passed by each rank, and where each wants the result."""

    call: str
    method: str
    dtype: str
    shape: tuple[int, ...]
    kinds: tuple[str, ...]
    outs: tuple[str, ...]
    listed: bool
    seed: int

    def values(self, rank: int, ranks: int) -> list[Array]:
        """The arrays that a rank passes, contiguous; small integers, so that sums are exact."""
        shape = (ranks, *self.shape) if CALLS[self.call][1] else self.shape
        made = []
        for part in range(2 if self.listed else 1):
            draw = np.random.default_rng([self.seed, rank, part])
            x = draw.integers(-8, 9, shape).astype(np.complex128)
            if self.dtype.startswith("complex"):
                x += 1j * draw.integers(-8, 9, shape)
            made.append((x if self.dtype.startswith("complex") else x.real).astype(DTYPES[self.dtype]))
        return made

    def given(self, rank: int, ranks: int) -> list[Any]:
        """What a rank passes; read-only where it is no output too, for a team spoils what was sent."""
        make = {**TAKEN, **READ_ONLY, **REFUSED}[self.kinds[rank]]
        made = [make(x) for x in self.values(rank, ranks)]
        for x in made:
            if self.outs[rank] != "itself" and isinstance(x, np.ndarray):
                x.setflags(write=False)
        return made

    def refused(self, rank: int) -> bool:
        """Whether a rank's arguments must be refused."""
        bad_out = self.outs[rank] in BAD_OUTS
        if self.call == "scatter" and rank != ROOT and self.kinds[rank] == "nothing" and not self.listed:
            return bad_out or self.outs[rank] == "none"  # which tells the form as `like` does
        return bad_out or self.kinds[rank] in REFUSED

    def outputs(self, me: int, ranks: int, given: list[Any]) -> list[Any] | None:
        """The outputs that a rank passes."""
        name, expect = self.outs[me], CALLS[self.call][2]
        if name == "none":
            return None
        if name == "itself":
            return given
        values = [self.values(rank, ranks) for rank in range(ranks)]
        likes = [np.zeros_like(expect([x[part] for x in values], me), DTYPES[self.dtype]) for part in range(len(given))]
        like = likes[0]
        if name == "shared" and self.listed and like.size:
            return [like, like]
        if name == "stretched" and like.size > 1:
            return [np.lib.stride_tricks.as_strided(each, each.shape, (0,) * each.ndim) for each in likes]
        if name == "read-only":
            return [frozen(each) for each in likes]
        return [TAKEN[name](each) if name in TAKEN else np.zeros((*each.shape, 3), each.dtype) for each in likes]


def run_case(comm: Any, case: Case) -> tuple[bytes, ...] | None:
    """Make a call and assert that it is right, or refused on all ranks, and that the next one is right.

    Returns the bits of the result, None for a refusal or no result.
    """
    me, ranks = comm.rank, comm.size
    function, _, expect = CALLS[case.call]
    mine = case.given(me, ranks)
    before = [x.tobytes() for x in mine if isinstance(x, np.ndarray)]
    refusing = [rank for rank in range(ranks) if case.refused(rank)]
    outs = case.outputs(me, ranks, mine)
    options = {} if outs is None else {"out": outs if case.listed else outs[0]}
    got, error = None, None
    try:
        got = function(comm, mine if case.listed else mine[0], case.method, **options)
    except (TypeError, ValueError, ConfigMismatchError) as refusal:
        error = refusal
    assert (error is None) == (not refusing), f"ranks {refusing} must refuse; got {got!r}, {error!r}"
    assert error is None or isinstance(error, ConfigMismatchError) == (me not in refusing), repr(error)
    if case.outs[me] != "itself":
        assert [x.tobytes() for x in mine if isinstance(x, np.ndarray)] == before, "the input was changed"
    results = [] if got is None else got if case.listed else [got]
    if not refusing:
        originals = [[wide(np.array(x)) for x in case.given(rank, ranks)] for rank in range(ranks)]
        for part in range(len(mine)):
            expected = expect([x[part] for x in originals], me)
            assert (expected is None) == (got is None)
            if expected is not None:
                check(case, results[part], np.asarray(expected), ranks)
    for part, array in enumerate(results):
        if outs is None:
            assert type(array) is np.ndarray
            assert array.flags.carray
        else:
            assert array is outs[part]
    again = mpicomp.allreduce(comm, np.full(3, me + 1.0, np.float32), "dense")
    assert again.tolist() == [ranks * (ranks + 1) / 2] * 3, "the next call is wrong"
    return None if got is None else tuple(array.copy().tobytes() for array in results)


def wide(x: Array) -> Array:
    """Return an array in double precision."""
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def check(case: Case, got: Array, expected: Array, ranks: int) -> None:
    """Assert that a result is as close to the exact one as its method says."""
    assert (got.shape, got.dtype) == (expected.shape, DTYPES[case.dtype])
    events = ranks if case.call in ("allreduce", "iallreduce", "mean", "plan", "reduce_scatter") else 1
    near = METHODS[case.method] * events * (2 if events > 1 else 1)
    if METHODS[case.method] or case.call == "mean":  # rounded to the dtype
        eps = float(ml_dtypes.finfo(np.array(got).real.dtype).eps)
        near += 2 * eps * np.abs(expected).max(initial=1) + 1e-6
    difference = wide(np.array(got)) - expected
    for part in (difference.real, difference.imag):
        assert np.abs(part).max(initial=0) <= near, (got, expected)


@st.composite
def cases(draw: Any, ranks: int, bad: bool) -> Case:
    """A case for so many ranks; with `bad` some rank passes what must be refused."""
    call = draw(st.sampled_from([name for name in CALLS if name != "plan" or not bad]))
    listed = draw(st.booleans())
    good = st.sampled_from([*TAKEN, *READ_ONLY])
    kinds = [draw(good) for _ in range(ranks)]
    outs = [draw(st.sampled_from(["none", *TAKEN])) for _ in range(ranks)]
    if call in IN_PLACE:
        for rank in range(ranks):
            if kinds[rank] in TAKEN and draw(st.integers(0, 3)) == 0:
                outs[rank] = "itself"
    if bad:
        rank = draw(st.integers(0, ranks - 1))
        wrong_out = draw(st.booleans()) and not (call == "gather" and rank != ROOT)
        if wrong_out:
            outs[rank] = draw(st.sampled_from(BAD_OUTS))
        else:
            kinds[rank] = draw(st.sampled_from([*REFUSED]))
    if call == "gather":
        outs[1:] = ["none"] * (ranks - 1)
    return Case(
        call,
        draw(st.sampled_from([*METHODS])),
        draw(st.sampled_from([*DTYPES])),
        draw(st.sampled_from(SHAPES)),
        tuple(kinds),
        tuple(outs),
        listed,
        draw(st.integers(0, 99)),
    )
