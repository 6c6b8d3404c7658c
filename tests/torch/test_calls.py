"""The plain calls for tensors over a team: any strides, lazy conjugates, lists, outputs, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from team import Team

import mpicomp.torch
from mpicomp.errors import ConfigMismatchError

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]


def values(rank: int, dtype: Any, shape: tuple[int, ...] = (3, 4)) -> Any:
    """Small integers, so that sums are exact."""
    draw = torch.Generator().manual_seed(rank)
    real = torch.randint(-8, 9, shape, generator=draw).to(torch.float64)
    if dtype.is_complex:
        real = torch.complex(real, torch.randint(-8, 9, shape, generator=draw).to(torch.float64))
    return real.to(dtype)


def unaligned(x: Any) -> Any:
    memory = bytearray(x.numel() * x.element_size() + 1)
    made = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=1).view(x.shape)
    made.copy_(x)
    return made


def negative(x: Any) -> Any:
    """A tensor that torch will negate when it is read: the imaginary part of a conjugate."""
    made = torch.complex(torch.zeros(x.shape, dtype=x.dtype), -x).conj().imag
    assert made.is_neg()
    return made


KINDS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "unaligned": unaligned,
    "parameter": lambda x: torch.nn.Parameter(x.clone(), requires_grad=False),
    "conjugate": lambda x: x.conj().resolve_conj().conj() if x.is_complex() else x.clone(),
    "negative": lambda x: negative(x) if x.dtype in (torch.float32, torch.float64) else x.clone(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dense", "topk(density=1.0)"])
def test_kinds_of_tensors(method: str, kind: str, dtype: Any) -> None:
    expected = (values(0, dtype) + values(1, dtype)).resolve_conj()

    def f(comm: Any) -> None:
        x = KINDS[kind](values(comm.rank, dtype)) if comm.rank == 0 else values(comm.rank, dtype)
        total = mpicomp.torch.allreduce(comm, x.clone() if kind == "contiguous" else x, method)
        assert torch.equal(total, expected)
        assert total.is_contiguous()
        assert not total.requires_grad
        out = KINDS[kind](torch.zeros((3, 4), dtype=dtype))
        x = KINDS[kind](values(comm.rank, dtype))
        assert mpicomp.torch.allreduce(comm, x, method, "avg", out=out) is out
        assert torch.equal(out.resolve_conj().resolve_neg(), expected / 2)
        x = KINDS[kind](values(comm.rank, dtype))
        assert mpicomp.torch.allreduce(comm, x, method, out=x) is x
        assert torch.equal(x.resolve_conj().resolve_neg(), expected)

    Team(2).run(f)


def test_a_memory_for_complex_tensors() -> None:
    def f(comm: Any) -> Any:
        x = values(comm.rank, torch.complex64)
        memory = mpicomp.torch.memory("topk(density=0.25)", x)
        total = mpicomp.torch.allreduce(comm, x.t().contiguous().t(), "topk(density=0.25)", memory=memory)
        return total, torch.from_numpy(memory.residual)

    results = Team(2).run(f)
    total = results[0][0] + sum(debt for _, debt in results)
    torch.testing.assert_close(total, values(0, torch.complex64) + values(1, torch.complex64))


class Subclass(torch.Tensor):
    pass


REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "history": (ValueError, r"pass [\w\[\]]+\.detach\(\)", lambda: torch.ones(4, requires_grad=True)),
    "parameter": (ValueError, r"pass [\w\[\]]+\.detach\(\)", lambda: torch.nn.Parameter(torch.ones(4))),
    "truth": (TypeError, "dtype torch.bool; only float32.*use torch.distributed", lambda: torch.ones(4) > 0),
    "quantized": (
        TypeError,
        "quint8",
        lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8),
    ),
    "meta": (ValueError, "meta", lambda: torch.ones(4, device="meta")),
    "sparse": (ValueError, r"to_dense\(\)", lambda: torch.ones(4).to_sparse()),
    "nested": (
        (TypeError, ValueError),  # type: ignore[dict-item]
        "nested|Nested",
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ),
    "subclass": (TypeError, "Subclass, which may be more", lambda: torch.ones(4).as_subclass(Subclass)),
    "number": (TypeError, "must be a torch tensor, got float", lambda: 3.0),
}


Call = Callable[..., Any]
CALLS: dict[str, tuple[Call, bool, Callable[[list[Any], int], Any]]] = {
    # what is called, whether x has an axis of ranks, and the result on a rank by the tensors of all
    "allreduce": (mpicomp.torch.allreduce, False, lambda xs, me: sum(xs)),
    "iallreduce": (lambda *a, **o: mpicomp.torch.iallreduce(*a, **o).wait(), False, lambda xs, me: sum(xs)),
    "plan": (lambda comm, x, m, **o: mpicomp.torch.plan(comm, x, m)(x, **o), False, lambda xs, me: sum(xs)),
    "allgather": (mpicomp.torch.allgather, False, lambda xs, me: torch.stack(xs)),
    "iallgather": (lambda *a, **o: mpicomp.torch.iallgather(*a, **o).wait(), False, lambda xs, me: torch.stack(xs)),
    "broadcast": (lambda comm, x, m, **o: mpicomp.torch.broadcast(comm, x, m, 1, **o), False, lambda xs, me: xs[1]),
    "reduce_scatter": (mpicomp.torch.reduce_scatter, True, lambda xs, me: sum(x[me] for x in xs)),
}


@pytest.mark.filterwarnings("ignore")  # of prototypes, and of what torch will drop
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sent_is_refused_by_all(name: str, call: str) -> None:
    kind, words, make = REFUSED[name]
    function, has_axis, _ = CALLS[call]
    if name == "truth" and call in ("allgather", "iallgather", "broadcast"):
        return  # `dense` copies elements of any dtype
    good = torch.ones((2, 4) if has_axis else 4)

    def f(comm: Any) -> None:
        wrong = comm.rank == 0
        expected = kind if wrong else ConfigMismatchError
        with pytest.raises(expected, match=words):
            function(comm, make() if wrong else good, "dense")
        with pytest.raises(expected, match=words):
            function(comm, [good, make()] if wrong else [good, good], "dense")
        if call != "plan":
            with pytest.raises((TypeError, ValueError) if wrong else expected, match=rf"{words}|out must be"):
                function(comm, good, "dense", out=make() if wrong else None)
        assert torch.equal(mpicomp.torch.allreduce(comm, torch.ones(4), "dense"), torch.full((4,), 2.0))

    Team(2).run(f)


@pytest.mark.parametrize("listed", [False, True], ids=["one", "list"])
@pytest.mark.parametrize("method", ["dense", "topk(density=1.0)"])
@pytest.mark.parametrize("call", CALLS)
def test_every_call_takes_tensors_of_every_kind(call: str, method: str, listed: bool) -> None:
    """On each rank another kind, and another kind of output; shapes without dimensions and without elements too."""
    function, has_axis, expect = CALLS[call]
    cases = [
        (dtype, shape, kind)
        for dtype in DTYPES
        for shape, kind in [((3, 4), "transposed"), ((3, 4), "strided"), ((2, 2), "conjugate"), ((), ""), ((0, 3), "")]
    ]

    def f(comm: Any) -> list[bytes]:
        found = []
        for dtype, shape, kind in cases:
            whole = (2, *shape) if has_axis else shape
            xs = [values(rank, dtype, whole) for rank in range(2)]
            mine = xs[comm.rank].clone()
            if kind and comm.rank == 0:
                mine = KINDS[kind](mine.reshape(-1, whole[-1])).reshape(whole)
            expected = expect(xs, comm.rank).to(dtype)
            out = None
            if comm.rank == 1:
                out = torch.zeros((*expected.shape, 2), dtype=dtype)[..., 0]
                out = [out, out.clone()] if listed else out
            got = function(comm, [mine, xs[comm.rank].clone()] if listed else mine, method, out=out)
            assert out is None or got is out or all(a is b for a, b in zip(got, out, strict=True))
            assert isinstance(got, list) == listed
            for tensor in got if listed else [got]:
                assert torch.equal(tensor, expected), (dtype, shape, kind)
                assert out is not None or tensor.is_contiguous()
                found.append(tensor.resolve_conj().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return found

    results = Team(2).run(f)
    assert call == "reduce_scatter" or results[0] == results[1]


def test_integers_are_summed_exactly_and_wrap_around() -> None:
    def f(comm: Any) -> None:
        for dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
            most = torch.iinfo(dtype).max
            x = torch.tensor([[most, comm.rank], [1, 2]], dtype=dtype)
            wanted = torch.tensor([[most, 0], [1, 2]], dtype=dtype) + torch.tensor([[most, 1], [1, 2]], dtype=dtype)
            assert torch.equal(mpicomp.torch.allreduce(comm, x.t(), "dense"), wanted.t())
            plan = mpicomp.torch.plan(comm, [x, x], "dense")
            assert all(torch.equal(each, wanted) for each in plan([x, x]))
            assert torch.equal(mpicomp.torch.reduce_scatter(comm, [x, x], "dense")[1], wanted[comm.rank])
        for bad, error in ((dict(op="mean"), "can be summed only"), (dict(method="topk(density=0.1)"), "int32; only")):
            with pytest.raises((TypeError, ValueError), match=error):
                mpicomp.torch.allreduce(comm, torch.ones(3, dtype=torch.int32), **{"method": "dense", **bad})
        with pytest.raises(ValueError, match="one dtype, got float32, int64"):
            mpicomp.torch.allreduce(comm, [torch.ones(3), torch.ones(3, dtype=torch.int64)], "dense")
        with pytest.raises(ValueError, match=r"SUM or AVG, got .*MAX; others are those"):
            mpicomp.torch.allreduce(comm, torch.ones(3), "dense", torch.distributed.ReduceOp.MAX)
        total = mpicomp.torch.allreduce(comm, torch.ones(3), "dense", torch.distributed.ReduceOp.AVG)
        assert total.tolist() == [1.0] * 3

    Team(2).run(f)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_copies_of_any_dtype_are_exact() -> None:
    def f(comm: Any) -> None:
        bits = [torch.arange(16, dtype=torch.uint8) % 2 ^ rank for rank in range(2)]
        kinds = (torch.bool, torch.float8_e4m3fn, torch.complex32, torch.int64, torch.uint16)
        xs = [bits[comm.rank].view(dtype) for dtype in kinds]
        rows = mpicomp.torch.allgather(comm, xs, "dense")
        last = mpicomp.torch.broadcast(comm, [x.clone() for x in xs], "dense", root=1)
        for x, row, copy in zip(xs, rows, last, strict=True):
            assert row.dtype == copy.dtype == x.dtype
            assert row.shape == (2, *x.shape)
            for rank, got in ((0, row[0]), (1, row[1]), (1, copy)):
                assert torch.equal(got.contiguous().view(torch.uint8), bits[rank])
        with pytest.raises(ValueError, match="one dtype"):
            mpicomp.torch.allgather(comm, [torch.ones(2), torch.ones(2).half()], "bf16")

    Team(2).run(f)


@pytest.mark.parametrize("method", ["topk(density=0.2)", "error_feedback(low_rank(rank=2))"])
def test_a_memory_of_a_list_keeps_what_was_not_sent(method: str) -> None:
    """The law: what all ranks got, and what they remember, is what they gave; in a plan as in a call."""

    def f(comm: Any) -> Any:
        xs = [values(comm.rank, torch.float32, (6, 5)), values(comm.rank + 7, torch.float32, (30,))]
        memory = mpicomp.torch.memory(method, xs)
        plan = mpicomp.torch.plan(comm, xs, method, feedback=True)
        given, got = [0.0, 0.0], [0.0, 0.0]
        for step in range(3):
            now = [x * (step + 1) for x in xs]
            totals = mpicomp.torch.allreduce(comm, now, method, memory=memory)
            assert all(map(torch.equal, totals, plan(now)))
            given = [a + b for a, b in zip(given, now, strict=True)]
            got = [a + b for a, b in zip(got, totals, strict=True)]
        assert (memory.at()[1], str(plan), plan.traffic) == (3, str(memory), comm.traffic)
        assert "rounds" in plan.explain()
        owed = [torch.from_numpy(each) for each in memory.residual]
        assert all(map(torch.equal, owed, map(torch.from_numpy, plan.residual)))
        return given, got, owed

    results = Team(2).run(f)
    for part in range(2):
        given = sum(given[part] for given, _, _ in results)
        received = results[0][1][part] + sum(owed[part] for _, _, owed in results)
        torch.testing.assert_close(received, given, rtol=1e-4, atol=1e-4)


def test_a_plan_goes_on_after_an_error() -> None:
    def f(comm: Any) -> None:
        x = torch.full((2, 3), comm.rank + 1.0)
        plan = mpicomp.torch.plan(comm, x, "topk(density=0.5)", "mean", feedback=True)
        first = plan(x.t().contiguous().t(), out=(out := torch.empty(2, 3)))
        assert first is out
        for bad, words in (
            (torch.ones(3, 2), r"made for float32\[2, 3\], got x of float32\[3, 2\]"),
            (torch.ones(2, 3).double(), r"got x of float64\[2, 3\]"),
            ([x], r"got x of \[float32\[2, 3\]\]"),
            (3.0, "must be a torch tensor, got float"),
        ):
            with pytest.raises((TypeError, ValueError) if comm.rank else ConfigMismatchError, match=words):
                plan(bad if comm.rank else x)
        second = plan.start(x)
        assert torch.equal(first + second.wait() + sum_of(comm, plan.residual) / 2, torch.full((2, 3), 3.0))
        assert plan.memory.at()[1] == 2

    Team(2).run(f)


def sum_of(comm: Any, residual: Any) -> Any:
    return mpicomp.torch.allreduce(comm, torch.from_numpy(residual), "dense")


def test_where_a_call_runs_is_said_once() -> None:
    def f(comm: Any) -> None:
        x, total = torch.ones(3), torch.full((3,), 2.0)
        assert torch.equal(mpicomp.torch.allreduce(x, "dense", group=comm), total)
        assert torch.equal(mpicomp.torch.allreduce(comm=comm, x=x, method="dense"), total)
        assert torch.equal(mpicomp.torch.plan([x], "dense", group=comm)([x])[0], total)
        with pytest.raises(TypeError, match="given twice") if comm.rank else pytest.raises(ConfigMismatchError):
            mpicomp.torch.allreduce(comm, x, "dense", group=comm if comm.rank else None)
        with pytest.raises(ValueError, match="not in the process group"):
            mpicomp.torch.allreduce(x, "dense", group=torch.distributed.GroupMember.NON_GROUP_MEMBER)
        with pytest.raises(ValueError, match="not in the process group"):
            mpicomp.torch.broadcast(torch.distributed.GroupMember.NON_GROUP_MEMBER, x, "dense")
        with pytest.raises(TypeError, match=r'backend "mpicomp".*init_process_group'):
            mpicomp.torch.allreduce(x, "dense")

    Team(2).run(f)


def test_tensors_of_inference_mode() -> None:
    def f(comm: Any) -> None:
        with torch.inference_mode():
            x, out = torch.ones(2, 3), torch.zeros(3, 2).t()
            assert mpicomp.torch.iallreduce(comm, x, "dense", out=out).wait().tolist() == [[2.0] * 3] * 2
        assert mpicomp.torch.allreduce(comm, x, "dense").tolist() == [[2.0] * 3] * 2
        with pytest.raises(ValueError, match="was made in torch"):
            mpicomp.torch.allreduce(comm, x, "dense", out=out)

    Team(2).run(f)


def test_the_signature_is_that_of_the_call() -> None:
    for name in ("allreduce", "iallreduce", "allgather", "broadcast", "reduce_scatter", "plan"):
        function = getattr(mpicomp.torch, name)
        names = list(inspect.signature(function).parameters)
        assert (names[0], names[-1], function.__name__) == ("comm", "group", name)


def test_outputs_that_share_memory_are_refused() -> None:
    comm, x = Team(1).comms[0], torch.ones(8)
    for out, words in (
        (torch.zeros(1).expand(4), "strides"),
        (x[1:5], "out shares memory with x"),
        (x[:8:2], "shares memory"),
        (x[4:], None),
        (x[:4], None),
    ):
        if words is None:
            assert mpicomp.torch.allreduce(comm, x[:4], "dense", out=out) is out
        else:
            with pytest.raises(ValueError, match=words):
                mpicomp.torch.allreduce(comm, x[:4], "dense", out=out)


def test_outputs_of_a_list_are_apart_from_all_others() -> None:
    comm, x = Team(1).comms[0], torch.zeros(3, 8)
    for outs, words in (
        ([x[1], x[0]], "out shares memory with x"),
        ([x[2], x[2]], r"out\[0\] and out\[1\] share memory"),
        ([x[0]], "out must be .*, got a list of 1"),
        (x[0], "got one Tensor"),
        ([x[0], x[1][:4]], r"out\[1\] must be torch.float32 \[8\]"),
    ):
        with pytest.raises(ValueError, match=words):
            mpicomp.torch.allreduce(comm, [x[0], x[1]], "dense", out=outs)
    assert mpicomp.torch.allreduce(comm, [x[0], x[1]], "dense", out=[x[0], x[2]])[0].data_ptr() == x.data_ptr()
    with pytest.raises(ValueError, match="sent while out is written"):
        mpicomp.torch.allgather(comm, x[0], "dense", out=x[:1])
    with pytest.raises(ValueError, match="empty list"):
        mpicomp.torch.allreduce(comm, [], "dense")
    with pytest.raises(ValueError, match="first axis of x must count the 1 ranks"):
        mpicomp.torch.reduce_scatter(comm, x, "dense")


def test_low_rank_takes_no_complex_tensors() -> None:
    with pytest.raises(TypeError, match="real matrices only"):
        mpicomp.torch.memory("low_rank(rank=2)", torch.ones(4, 4, dtype=torch.complex64))
