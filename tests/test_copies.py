"""The plain calls that copy, and reduce_scatter, over a team: values, dtypes, lists, out, and errors of all ranks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from team import Team

import mpicomp
from mpicomp.arrays import Array
from mpicomp.comm.communicator import Comm
from mpicomp.errors import ConfigMismatchError

CODECS = ["dense", "bf16", "topk(density=0.5)", "uniform(bits=8)", "randomk(density=1.0)", "bounded(abs=0.02)"]
DTYPES: list[Any] = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
CLOSE = {"bf16": 0.03, "uniform(bits=8)": 0.03, "bounded(abs=0.02)": 0.021}
ROOT = 1


def array_of(rank: int, shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> Array:
    """Make the read-only array of a rank."""
    x: Array = np.asarray(np.random.default_rng([rank, seed, 5]).standard_normal(shape)).astype(dtype)
    x.setflags(write=False)
    return x


def scatter(comm: Comm, x: Any, codec: str, **options: Any) -> Any:
    """Scatter as all other copies are called: every rank has an x."""
    row = [np.asarray(each[0]) for each in x] if isinstance(x, list) else np.asarray(x[0])
    return mpicomp.scatter(comm, x if comm.rank == ROOT else None, codec, ROOT, row, **options)


Call = Callable[..., Any]
CALLS: dict[str, tuple[Call, bool, Callable[[list[Array], int], Array | None]]] = {
    # what is called, whether x has an axis of ranks, and the result on a rank by the arrays of all
    "allgather": (mpicomp.allgather, False, lambda xs, me: np.stack(xs)),
    "bcast": (lambda comm, x, codec, **o: mpicomp.bcast(comm, x, codec, ROOT, **o), False, lambda xs, me: xs[ROOT]),
    "gather": (
        lambda comm, x, codec, **o: mpicomp.gather(comm, x, codec, ROOT, **o),
        False,
        lambda xs, me: np.stack(xs) if me == ROOT else None,
    ),
    "scatter": (scatter, True, lambda xs, me: xs[ROOT][me]),
    "alltoall": (mpicomp.alltoall, True, lambda xs, me: np.stack([x[me] for x in xs])),
    "reduce_scatter": (
        lambda comm, x, codec, **o: mpicomp.reduce_scatter(comm, x, codec, **o),
        True,
        lambda xs, me: np.sum([x[me].astype(np.float64) for x in xs], axis=0),
    ),
}


def check(codec: str, call: str, got: Any, expected: Any, dtype: Any, ranks: int) -> None:
    """Compare a result with the exact one, as closely as the codec says."""
    if expected is None:
        assert got is None
        return
    assert (got.shape, got.dtype) == (expected.shape, dtype)
    assert got.flags.c_contiguous
    assert got.flags.writeable
    if call != "reduce_scatter" and codec in ("dense", "randomk(density=1.0)"):
        assert got.tobytes() == np.ascontiguousarray(expected).tobytes()
    elif codec in CLOSE or codec == "dense":
        close = CLOSE.get(codec, 1e-6) * (ranks if call == "reduce_scatter" and not codec.startswith("bounded") else 1)
        close += ranks * 4 * float(ml_dtypes.finfo(dtype).eps)
        np.testing.assert_allclose(got.astype(float), expected.astype(float), rtol=0.01, atol=close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("call", CALLS)
def test_every_codec_and_dtype(call: str, codec: str, dtype: Any) -> None:
    function, cut, expect = CALLS[call]
    ranks = 3
    for shape in ((7, 9), (), (0, 4)):
        full = (ranks, *shape) if cut else shape
        xs = [array_of(rank, full, dtype) for rank in range(ranks)]
        before = [x.tobytes() for x in xs]
        team = Team(ranks)
        results = team.run(lambda comm, xs=xs: function(comm, xs[comm.rank], codec))
        assert [x.tobytes() for x in xs] == before
        for rank, result in enumerate(results):
            check(codec, call, result, expect(xs, rank), dtype, ranks)
        for comm, rank in zip(team.comms, team.ranks, strict=True):
            assert (comm.traffic.counted, comm.traffic.modelled) == (rank.sent_bytes, rank.modelled_bytes)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("call", CALLS)
def test_lists_share_their_messages(call: str, codec: str) -> None:
    """And give the same as one call for each, where no random numbers are drawn."""
    function, cut, expect = CALLS[call]
    ranks = 3
    shapes = [(4, 5), (), (0,), (300,)]
    xs = [
        [array_of(rank, (ranks, *s) if cut else s, seed=seed) for seed, s in enumerate(shapes)] for rank in range(ranks)
    ]

    def f(comm: Comm) -> tuple[Any, int]:
        before = comm.traffic.messages
        results = function(comm, xs[comm.rank], codec)
        return results, comm.traffic.messages - before

    lengths = 2 if codec.startswith("bounded") else 1
    for me, (results, messages) in enumerate(Team(ranks).run(f)):
        assert messages <= (ranks - 1) * lengths
        if call == "gather" and me != ROOT:
            assert results is None
            continue
        assert isinstance(results, list)
        for place, result in enumerate(results):
            check(codec, call, result, expect([x[place] for x in xs], me), np.float32, ranks)


@pytest.mark.parametrize("call", [name for name in CALLS if name != "reduce_scatter"])
def test_dense_copies_any_dtype_several_in_a_list(call: str) -> None:
    function, cut, expect = CALLS[call]
    dtypes = [np.int8, np.complex128, bool, np.float16]
    lead = (2,) if cut else ()
    xs = [[(10 * array_of(rank, (*lead, 3), seed=i)).astype(d) for i, d in enumerate(dtypes)] for rank in range(2)]
    for x in (x for each in xs for x in each):
        x.setflags(write=False)
    for me, results in enumerate(Team(2).run(lambda comm: function(comm, xs[comm.rank], "dense"))):
        for place, dtype in enumerate(dtypes):
            expected = expect([x[place] for x in xs], me)
            assert (results is None) == (expected is None)
            if expected is not None:
                assert results[place].dtype == dtype
                np.testing.assert_array_equal(results[place], expected)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint64])
def test_reduce_scatter_of_integers_wraps_around(dtype: Any) -> None:
    xs = [(100 * (np.arange(12).reshape(3, 4) + rank)).astype(dtype) for rank in range(3)]
    for x in xs:
        x.setflags(write=False)
    for me, part in enumerate(Team(3).run(lambda comm: mpicomp.reduce_scatter(comm, xs[comm.rank], "dense"))):
        np.testing.assert_array_equal(part, np.sum([x[me] for x in xs], axis=0, dtype=dtype))


@pytest.mark.parametrize("codec", ["dense", "topk(density=1.0)"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_scatter_means(dtype: Any, codec: str) -> None:
    xs = [array_of(rank, (4, 6), dtype) for rank in range(4)]
    for me, part in enumerate(Team(4).run(lambda comm: mpicomp.reduce_scatter(comm, xs[comm.rank], codec, "mean"))):
        expected = np.mean([x[me].astype(float) for x in xs], axis=0)
        np.testing.assert_allclose(part.astype(float), expected, atol=4 * float(ml_dtypes.finfo(dtype).eps))


@pytest.mark.parametrize("codec", ["dense", "uniform(bits=8)", "bounded(rel=0.01)"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("listed", [False, True])
def test_out_is_filled_and_returned(call: str, codec: str, listed: bool) -> None:
    function, cut, _ = CALLS[call]

    def f(comm: Comm) -> None:
        shape = (2, 5) if cut else (5,)
        x: Any = [array_of(comm.rank, shape, seed=s) for s in (1, 2)] if listed else array_of(comm.rank, shape)
        expected = function(comm, x, codec)
        if expected is None:
            assert function(comm, x, codec) is None
            return
        out = [np.full_like(each, 3) for each in expected] if listed else np.full_like(expected, 3)
        result = function(comm, x, codec, out=out)
        for one, other, given in zip(*((r if listed else [r]) for r in (result, expected, out)), strict=True):
            assert one is given
            assert one.tobytes() == other.tobytes()

    Team(2).run(f)


def test_bcast_into_x_itself() -> None:
    def f(comm: Comm) -> bytes:
        x = array_of(comm.rank, (9,)).copy()
        assert mpicomp.bcast(comm, x, "bf16", 2, out=x) is x
        return x.tobytes()

    assert len(set(Team(3).run(f))) == 1


def test_scatter_takes_the_form_from_out() -> None:
    def f(comm: Comm) -> list[float]:
        out = np.empty(3, np.float32)
        x = np.arange(6, dtype=np.float32).reshape(2, 3) if comm.rank == 0 else None
        return mpicomp.scatter(comm, x, "dense", out=out).tolist()

    assert Team(2).run(f) == [[0, 1, 2], [3, 4, 5]]


KINDS: list[Any] = [bool, "S3", "U2", "M8[s]", "i4,f4", [("a", "u1"), ("b", "c16", (2,))], np.clongdouble]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("call", [call for call in CALLS if call != "reduce_scatter"])
def test_dense_moves_elements_of_any_kind(call: str, kind: Any) -> None:
    function, cut, expect = CALLS[call]
    dtype = np.dtype(kind)

    def given(rank: int) -> Array:
        raw = np.random.default_rng(rank).integers(0, 2, (2 if cut else 3, 2, dtype.itemsize), np.uint8)
        x: Array = raw.view(dtype)[..., 0].T if not cut else raw.view(dtype)[..., 0]
        x.setflags(write=False)
        return x

    xs = [given(rank) for rank in range(2)]
    for me, result in enumerate(Team(2).run(lambda comm: function(comm, xs[comm.rank], "dense"))):
        expected = expect(xs, me)
        assert (result is None) == (expected is None)
        if expected is not None:
            assert result.dtype == dtype
            assert result.tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize("codec", ["topk(density=1.0)", "bounded(abs=0.1)"])
@pytest.mark.parametrize("call", CALLS)
def test_what_is_not_finite_arrives_as_nan(call: str, codec: str) -> None:
    function, cut, expect = CALLS[call]
    xs = [array_of(rank, (3, 5) if cut else (5,)).copy() for rank in range(3)]
    (xs[ROOT][0] if cut else xs[ROOT])[2] = np.inf
    for x in xs:
        x.setflags(write=False)
    for me, result in enumerate(Team(3).run(lambda comm: function(comm, xs[comm.rank], codec))):
        expected = expect(xs, me)
        if expected is None:
            continue
        bad = ~np.isfinite(expected).all(-1)
        np.testing.assert_array_equal(np.isnan(result).all(-1), bad)
        assert np.isfinite(result).all(-1).tolist() == (~bad).tolist()


F32 = np.ones((3, 4), np.float32)
F32.setflags(write=False)


def in_place(comm: Comm) -> Any:
    x = F32.copy()
    return mpicomp.alltoall(comm, x, "dense", out=x)


MISTAKES: dict[str, tuple[type[Exception], str, Callable[[Comm], Any]]] = {
    "reducer": (TypeError, "bcast takes a codec or dense", lambda comm: mpicomp.bcast(comm, F32, "gather(sign)")),
    "root": (ValueError, "from 0 to 2, got 3", lambda comm: mpicomp.gather(comm, F32, "dense", 3)),
    "root type": (ValueError, "root", lambda comm: mpicomp.bcast(comm, F32, "dense", True)),
    "no axis": (ValueError, r"3 ranks, got shape \(4,\)", lambda comm: mpicomp.alltoall(comm, F32[0], "sign")),
    "axis": (ValueError, "3 ranks", lambda comm: mpicomp.reduce_scatter(comm, F32[:2], "sign")),
    "scalar": (ValueError, "3 ranks", lambda comm: mpicomp.reduce_scatter(comm, F32[0, :1].reshape(()), "sign")),
    "mean of integers": (
        ValueError,
        "summed only",
        lambda comm: mpicomp.reduce_scatter(comm, np.ones((3, 2), int), "dense", "mean"),
    ),
    "sum of truths": (TypeError, "bool", lambda comm: mpicomp.reduce_scatter(comm, np.ones((3, 2), bool), "dense")),
    "mixed sum": (
        ValueError,
        "one dtype",
        lambda comm: mpicomp.reduce_scatter(comm, [np.ones((3, 2)), np.ones((3, 2), "f4")], "dense"),
    ),
    "number": (TypeError, "got float", lambda comm: mpicomp.bcast(comm, 3.0, "dense")),  # type: ignore[type-var]
    "root as float": (ValueError, "root", lambda comm: mpicomp.bcast(comm, F32, "dense", 1.0)),  # type: ignore[arg-type]
    "root as truth": (ValueError, "root", lambda comm: mpicomp.bcast(comm, F32, "dense", np.True_)),  # type: ignore[arg-type]
    "negative root": (ValueError, "got .*-1", lambda comm: mpicomp.bcast(comm, F32, "dense", np.int8(-1))),  # type: ignore[arg-type]
    "empty list": (ValueError, "empty list", lambda comm: mpicomp.allgather(comm, [], "dense")),
    "dtypes": (ValueError, "one dtype", lambda comm: mpicomp.allgather(comm, [F32, np.ones(2)], "sign")),
    "dtypes of a sum": (ValueError, "one dtype", lambda comm: mpicomp.allreduce(comm, [F32, np.ones(2)], "dense")),
    "no x": (ValueError, "pass like or out", lambda comm: mpicomp.scatter(comm, None, "dense", (comm.rank + 1) % 3)),
    "no x at the root": (ValueError, "pass x", lambda comm: mpicomp.scatter(comm, None, "dense", comm.rank)),
    "x beside the root": (
        ValueError,
        "passes None",
        lambda comm: mpicomp.scatter(comm, F32, "dense", (comm.rank + 1) % 3),
    ),
    "out beside the root": (
        ValueError,
        "gets nothing",
        lambda comm: mpicomp.gather(comm, F32, "dense", (comm.rank + 1) % 3, out=F32.copy()),
    ),
    "out over x": (ValueError, "shares memory", in_place),
    "out structure": (ValueError, "got a list of 1", lambda comm: mpicomp.bcast(comm, F32, "dense", out=[F32.copy()])),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_one_rank_is_its_own_error_and_a_mismatch_elsewhere(mistake: str) -> None:
    kind, words, wrong = MISTAKES[mistake]
    errors = Team(3).attempt(lambda comm: wrong(comm) if comm.rank == 2 else mpicomp.allgather(comm, F32, "dense"))
    assert isinstance(errors[2], kind)
    assert re.search(words, str(errors[2]))
    for error in errors[:2]:
        assert isinstance(error, ConfigMismatchError)
        assert "rank 2: refused its arguments: " in str(error)


DISAGREEMENTS: dict[str, Callable[[Comm, bool], Any]] = {
    "root": lambda comm, odd: mpicomp.bcast(comm, F32, "dense", int(odd)),
    "codec": lambda comm, odd: mpicomp.gather(comm, F32, "sign" if odd else "bf16"),
    "op": lambda comm, odd: mpicomp.reduce_scatter(comm, F32, "sign", "mean" if odd else "sum"),
    "shape": lambda comm, odd: mpicomp.alltoall(comm, F32[:, : 2 if odd else 4].copy(), "dense"),
    "list": lambda comm, odd: mpicomp.bcast(comm, [F32] if odd else F32, "dense"),
    "call": lambda comm, odd: mpicomp.alltoall(comm, F32, "sign") if odd else mpicomp.reduce_scatter(comm, F32, "sign"),
}


@pytest.mark.parametrize("call", DISAGREEMENTS.values(), ids=DISAGREEMENTS)
def test_all_ranks_raise_when_one_differs(call: Callable[[Comm, bool], Any]) -> None:
    for error in Team(3).attempt(lambda comm: call(comm, comm.rank == 1)):
        assert isinstance(error, ConfigMismatchError)
        assert "rank 1: " in str(error)


# ------------------------------------------------------------------------------------------- lists that are reduced


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["dense", "uniform(bits=8)", "topk(density=0.3)", "low_rank(rank=2)"])
def test_allreduce_of_a_list(method: str, dtype: Any) -> None:
    shapes = [(8, 9), (), (0, 2), (300,)]

    def f(comm: Comm) -> list[Array]:
        xs = [array_of(comm.rank, shape, dtype, seed) for seed, shape in enumerate(shapes)]
        results = mpicomp.allreduce(comm, xs, method)
        given = [np.empty_like(x) for x in xs]
        again = mpicomp.plan(comm, xs, method)(xs, out=given)
        for one, other, out, x in zip(results, again, given, xs, strict=True):
            assert other is out
            assert (one.shape, one.dtype) == (x.shape, x.dtype)
        memory = mpicomp.memory(method, xs)
        for _ in range(2):
            mpicomp.allreduce(comm, xs, method, memory=memory)
        debts = memory.residual
        assert (debts is None) == (method in ("dense", "low_rank(rank=2)"))
        assert debts is None or [debt.shape for debt in debts] == shapes
        return results

    found = Team(3).run(f)
    for results in found:
        assert [r.tobytes() for r in results] == [r.tobytes() for r in found[0]]
    if method == "dense":
        for seed, shape in enumerate(shapes):
            expected = np.sum([array_of(rank, shape, dtype, seed).astype(float) for rank in range(3)], axis=0)
            close = 8 * float(ml_dtypes.finfo(dtype).eps)
            np.testing.assert_allclose(found[0][seed].astype(float), expected, rtol=close, atol=close)


def test_a_list_of_integers() -> None:
    xs = [np.arange(3, dtype=np.int16), np.arange(4, dtype=np.int16).reshape(2, 2)]
    for total in Team(2).run(lambda comm: mpicomp.allreduce(comm, [x.copy() for x in xs], "dense")):
        for one, x in zip(total, xs, strict=True):
            np.testing.assert_array_equal(one, 2 * x)


def test_a_partition_looks_at_the_shapes_in_a_list() -> None:
    def f(comm: Comm) -> Any:
        xs = [array_of(comm.rank, (5,)), array_of(comm.rank, (40, 30))]
        memory = mpicomp.memory("partition(small=dense, large=error_feedback(gather(topk(density=0.1))))", xs)
        mpicomp.allreduce(comm, xs, memory.method, memory=memory)
        assert isinstance(memory.residual, list)
        return [bool(debt.any()) for debt in memory.residual]

    assert Team(2).run(f) == [[False, True]] * 2


NAN_AT, INF_AT, MINUS_INF_AT = 3, 7, 300
SIZE = 601  # the codes of the last elements are filled up to whole words


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("codec", ["dense", "fp16", "bf16", "fp8", "fp8(format=e5m2)", "uniform", "topk(density=0.5)"])
def test_copies_carry_nan_and_infinity_element_by_element(codec: str, dtype: Any, listed: bool) -> None:
    """fp16, bf16 and fp8 have codes for them, and all other elements are as without them; other codecs make all NaN."""

    def f(comm: Comm) -> None:
        finite = np.linspace(-9, 9, SIZE).astype(dtype)
        x = finite.copy()
        x[NAN_AT], x[INF_AT], x[MINUS_INF_AT] = np.nan, np.inf, -np.inf
        finite.setflags(write=False)
        x.setflags(write=False)
        given = [x, finite] if listed else x
        for call in (mpicomp.bcast, mpicomp.allgather, mpicomp.gather):
            found: Any = call(comm, given, codec)
            if found is None:
                continue
            first = (found[0] if listed else found).reshape(-1)[-SIZE:]
            if codec.startswith(("uniform", "topk")):
                assert np.isnan(first).all()
                assert not listed or np.isnan(found[1]).all()
                continue
            expected: Any = mpicomp.bcast(comm, finite, codec) if call is mpicomp.bcast else None
            assert np.isnan(first[NAN_AT])
            infinite = np.isnan if codec == "fp8" else np.isinf  # e4m3 has no infinity
            assert infinite(first[[INF_AT, MINUS_INF_AT]]).all()
            assert codec == "fp8" or first[INF_AT] > 0 > first[MINUS_INF_AT]
            rest = np.delete(np.arange(SIZE), [NAN_AT, INF_AT, MINUS_INF_AT])
            assert np.isfinite(first[rest]).all()
            if expected is not None:
                np.testing.assert_array_equal(first[rest], expected[rest])
            assert not listed or np.isfinite(found[1]).all()

    Team(3).run(f)


@pytest.mark.parametrize("codec", ["fp16", "bf16", "fp8", "uniform"])
def test_one_nan_makes_all_of_a_sum_nan(codec: str) -> None:
    def f(comm: Comm) -> None:
        x = np.ones((3, 40), np.float32)
        x[1, 5] = np.nan if comm.rank == 1 else 1
        x.setflags(write=False)
        assert np.isnan(mpicomp.allreduce(comm, x, codec)).all()
        row = mpicomp.reduce_scatter(comm, x, codec)
        assert np.isnan(row).all() == (comm.rank == 1)
        exact = mpicomp.allreduce(comm, x, "dense")
        assert np.isnan(exact).sum() == 1

    Team(3).run(f)
