"""Every dtype, complex ones above all, lazy views, objects, and several operations in one, over a process group."""

from __future__ import annotations

import operator
from functools import reduce

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from process_group import me, same_everywhere, size

import mpicomp.torch
from mpicomp.errors import ConfigMismatchError
from mpicomp.torch.tensors import MOVED

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("process_group")]

COMPLEX = [torch.complex64, torch.complex128]
EVERY = sorted(MOVED, key=str)


def of_rank(rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.complex64) -> torch.Tensor:
    """Small integers: sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(7 + rank)
    x = torch.randint(0, 2, shape, generator=generator)
    if dtype.is_complex:
        return torch.complex(x.double(), torch.randint(-2, 3, shape, generator=generator).double()).to(dtype)
    return x.to(torch.float32).to(dtype) if dtype == torch.float8_e8m0fnu else x.to(dtype)


def everyone(shape: tuple[int, ...], dtype: torch.dtype = torch.complex64) -> list[torch.Tensor]:
    return [of_rank(rank, shape, dtype) for rank in range(size())]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bits are the same."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_every_dtype_is_copied_and_summed(dtype: torch.dtype) -> None:
    group, mine = dist.group.WORLD, of_rank(me(), (3, 2), dtype)
    outs = [torch.empty_like(mine) for _ in range(size())]
    group.allgather([outs], [mine]).wait()
    assert all(map(same, outs, everyone((3, 2), dtype)))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    if dtype in (torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.bool):
        return  # torch's own conversion of these is not that of numbers, or truth values are tested elsewhere
    wanted = reduce(operator.add, (x.to(wide) for x in everyone((3, 2), dtype)))
    x = mine.clone()
    group.allreduce([x]).wait()
    assert torch.equal(x.to(wide), wanted)
    x = torch.empty_like(mine)
    group.reduce_scatter([x], [[mine] * size()]).wait()
    assert torch.equal(x.to(wide), wanted)
    if not (dtype.is_complex or dtype.is_floating_point):
        group.reduce_scatter([x], [[mine] * size()], options(dist.ReduceScatterOptions(), dist.ReduceOp.MAX)).wait()
        assert torch.equal(x.to(wide), torch.stack([y.to(wide) for y in everyone((3, 2), dtype)]).amax(0))


def options(made: object, op: object) -> object:
    made.reduceOp = op
    return made


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_dtypes_that_no_process_group_takes() -> None:
    with pytest.raises(ValueError, match=r"no tensors of dtype torch\.bits8; send their bytes"):
        dist.group.WORLD.broadcast([torch.empty(3, dtype=torch.bits8)])
    with pytest.raises(ValueError, match="got a nested one"):
        dist.group.WORLD.recv([torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)])], 0, 0)
    dist.barrier()


# ------------------------------------------------------------------------------------------------- complex


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_complex_reductions(dtype: torch.dtype) -> None:
    total, root = sum(everyone((size(), 3), dtype)), size() - 1
    x = of_rank(me(), (size(), 3), dtype)
    dist.all_reduce(x)
    assert same(x, total)
    x = of_rank(me(), (size(), 3), dtype)
    dist.group.WORLD.allreduce([x], options(dist.AllreduceOptions(), dist.ReduceOp.AVG)).wait()
    torch.testing.assert_close(x, total / size())
    x = of_rank(me(), (size(), 3), dtype)
    dist.reduce(x, root)
    assert me() != root or same(x, total)
    mine = of_rank(me(), (size(), 3), dtype)
    x = torch.empty(3, dtype=dtype)
    dist.reduce_scatter(x, list(mine))
    assert same(x, total[me()])
    x.zero_()
    dist.reduce_scatter_single(x, mine)
    assert same(x, total[me()])
    for op in (dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT, dist.ReduceOp.BAND):
        with pytest.raises(ValueError, match=r"not support|not defined|needs integers"):
            dist.all_reduce(x, op)
        with pytest.raises(ValueError, match=r"not defined|needs integers"):
            dist.group.WORLD.allreduce([x], options(dist.AllreduceOptions(), op))


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_complex_copies(dtype: torch.dtype) -> None:
    mine, every, root = of_rank(me(), (2, 3), dtype), everyone((2, 3), dtype), size() - 1
    x = mine.clone()
    dist.broadcast(x, root)
    assert same(x, every[root])
    outs = [torch.empty_like(mine) for _ in range(size())]
    dist.all_gather(outs, mine)
    assert all(map(same, outs, every))
    whole = torch.empty(2 * size(), 3, dtype=dtype)
    dist.all_gather_single(whole, mine)
    assert same(whole, torch.cat(every))
    outs = [torch.empty_like(mine) for _ in range(size())] if me() == root else None
    dist.gather(mine, outs, dst=root)
    assert outs is None or all(map(same, outs, every))
    x = torch.empty_like(mine)
    dist.scatter(x, every if me() == root else None, src=root)
    assert same(x, mine)
    outs = [torch.empty_like(mine) for _ in range(size())]
    dist.all_to_all(outs, [mine] * size())
    assert all(map(same, outs, every))
    rows = of_rank(me(), (size(), 2), dtype)
    x = torch.empty_like(rows)
    dist.all_to_all_single(x, rows)
    assert same(x, torch.stack([of_rank(rank, (size(), 2), dtype)[me()] for rank in range(size())]))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_complex_messages(dtype: torch.dtype) -> None:
    if me() == 0:
        dist.send(of_rank(0, (3, 4), dtype).t(), 1)
        dist.group.WORLD.send([of_rank(0, (5,), dtype).conj()], 1, 2).wait()  # torch's own function refuses it
    if me() == 1:
        x, y = torch.empty(4, 3, dtype=dtype), torch.empty(5, dtype=dtype)
        dist.recv(x, 0)
        dist.group.WORLD.recv_anysource([y], 2).wait()
        assert same(x, of_rank(0, (3, 4), dtype).t())
        assert same(y, of_rank(0, (5,), dtype).conj().resolve_conj())
    dist.barrier()


def test_lazy_conjugates_and_negatives_are_what_they_show() -> None:
    """As inputs and as outputs: no bit of the memory behind them is sent or written by mistake."""
    group, every = dist.group.WORLD, everyone((4,))
    outs = [torch.empty(4, dtype=torch.complex64).conj() for _ in range(size())]
    group.allgather([outs], [of_rank(me(), (4,)).conj()]).wait()
    assert all(torch.equal(out, x.conj()) for out, x in zip(outs, every, strict=True))
    x = of_rank(me(), (4,)).conj()
    group.allreduce([x]).wait()
    assert torch.equal(x, sum(every).conj())
    imaginary = of_rank(me(), (4,)).conj().imag  # a lazy negative
    assert imaginary.is_neg()
    group.allreduce([imaginary]).wait()
    assert torch.equal(imaginary, -sum(every).imag)
    x = of_rank(me(), (4,)).conj()
    group.broadcast([x]).wait()
    assert torch.equal(x, every[0].conj())


@pytest.mark.mpi(min_size=2)
def test_complex_and_real_are_different_on_all_ranks() -> None:
    x = torch.ones(4, 2) if me() == size() - 1 else torch.ones(4, dtype=torch.complex64)
    with pytest.raises(ConfigMismatchError, match="complex64"):
        dist.group.WORLD.allreduce([x]).wait()


# ------------------------------------------------------------------------------------------------- strides


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64], ids=str)
def test_the_column_of_one_row(dtype: torch.dtype) -> None:
    """One element, whose stride is that of the row that it comes from."""

    def column(value: int = 0) -> torch.Tensor:
        return torch.full((1, 5), value).to(dtype)[:, 0]

    root, every, up = size() - 1, [column(rank) for rank in range(size())], (me() + 1) % size()
    x = column(me())
    dist.broadcast(x, root)
    assert torch.equal(x, every[root])
    outs = [column() for _ in every]
    dist.all_gather(outs, column(me()))
    assert all(map(torch.equal, outs, every))
    x = column(me())
    dist.all_reduce(x)
    assert torch.equal(x, sum(every))
    x = column()
    dist.scatter(x, every if me() == 0 else None)
    assert torch.equal(x, every[me()])
    if size() > 1:
        work, x = dist.isend(column(me()), up), column()
        dist.recv(x, (me() - 1) % size())
        work.wait()
        assert torch.equal(x, every[me() - 1])
    assert torch.equal(mpicomp.torch.allgather(column(me()), "dense"), torch.stack(every))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("call", ["all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all"])
def test_a_result_whose_elements_share_memory_is_refused_before_anything_is_sent(call: str) -> None:
    wide = torch.zeros(1).expand(4) if me() == 0 else torch.zeros(4)
    many, group = [torch.zeros(4)] * size(), dist.group.WORLD
    begin = {
        "all_reduce": lambda: dist.all_reduce(wide),
        "broadcast": lambda: dist.broadcast(wide, size() - 1),
        "all_gather": lambda: dist.all_gather([wide, *many[1:]], torch.zeros(4)),
        "reduce_scatter": lambda: dist.reduce_scatter(wide, many),
        "all_to_all": lambda: group.alltoall([wide, *many[1:]], many).wait(),
    }
    with pytest.raises(ValueError if me() == 0 else ConfigMismatchError, match="elements that share memory"):
        begin[call]()
    dist.barrier()


def test_elements_that_share_memory_may_be_sent() -> None:
    mine, outs = torch.tensor(float(me())).expand(4), [torch.zeros(4) for _ in range(size())]
    dist.all_gather(outs, mine)
    assert all((out == rank).all() for rank, out in enumerate(outs))
    x = torch.zeros(1).expand(4) if me() == 0 else torch.ones(4)
    dist.broadcast(x, 0)
    assert not x.any()
    x = torch.zeros(4) if me() == 0 else torch.ones(1).expand(4)
    dist.reduce(x, 0)
    assert (x == (size() - 1 if me() == 0 else 1)).all()


# ------------------------------------------------------------------------------------------------- objects


def thing(rank: int) -> dict[str, object]:
    return {"rank": rank, "text": "x" * (10 * rank), "tensor": torch.full((rank,), rank), "set": {rank, None}}


def equal(a: dict[str, object], b: dict[str, object]) -> bool:
    return torch.equal(a["tensor"], b["tensor"]) and all(a[key] == b[key] for key in ("rank", "text", "set"))


def test_objects_of_all_ranks_and_of_one() -> None:
    root = size() - 1
    outs: list[object] = [None] * size()
    dist.all_gather_object(outs, thing(me()))
    assert all(equal(out, thing(rank)) for rank, out in enumerate(outs))
    found: list[object] | None = [None] * size() if me() == root else None
    dist.gather_object(thing(me()), found, dst=root)
    assert found is None or all(equal(out, thing(rank)) for rank, out in enumerate(found))
    both: list[object] = [thing(3), "two"] if me() == root else [None, None]
    dist.broadcast_object_list(both, src=root)
    assert equal(both[0], thing(3))
    assert both[1] == "two"
    mine: list[object] = [None]
    dist.scatter_object_list(mine, [thing(rank) for rank in range(size())] if me() == root else None, src=root)
    assert equal(mine[0], thing(me()))


@pytest.mark.mpi(min_size=2)
def test_objects_from_rank_to_rank() -> None:
    if me() == 1:
        dist.send_object_list([thing(1), [1, 2]], 0)
    if me() == 0:
        both: list[object] = [None, None]
        assert dist.recv_object_list(both, 1) == 1
        assert equal(both[0], thing(1))
        assert both[1] == [1, 2]
    dist.barrier()


# ------------------------------------------------------------------------------------------------- several in one


def test_coalesced_reductions_and_gathers() -> None:
    kinds = [((3,), torch.float32), ((2, 2), torch.complex64), ((0,), torch.float32), ((5,), torch.int64)]
    xs = [of_rank(me(), shape, dtype) for shape, dtype in kinds]
    dist.group.WORLD.allreduce_coalesced(xs).wait()
    for x, (shape, dtype) in zip(xs, kinds, strict=True):
        assert same(x, sum(everyone(shape, dtype)))
    mine = [of_rank(me(), shape, dtype) for shape, dtype in kinds]
    lists = [[torch.empty_like(x) for x in mine] for _ in range(size())]
    dist.group.WORLD.allgather_coalesced(lists, mine).wait()
    for rank, found in enumerate(lists):
        assert all(same(x, of_rank(rank, shape, dtype)) for x, (shape, dtype) in zip(found, kinds, strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.distributed.all_(reduce|gather)_coalesced.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*will be deprecated.*")
def test_torchs_own_coalesced_functions() -> None:
    a, b = of_rank(me(), (3,), torch.float32), of_rank(me(), (2, 2), torch.float32)
    dist.all_reduce_coalesced([a, b])
    assert same(a, sum(everyone((3,), torch.float32)))
    assert same(b, sum(everyone((2, 2), torch.float32)))
    mine = [of_rank(me(), (3,), torch.float32), of_rank(me(), (2, 2), torch.float32)]
    lists = [[torch.empty(3), torch.empty(2, 2)] for _ in range(size())]
    dist.all_gather_coalesced(lists, mine)
    for rank, found in enumerate(lists):
        assert same(found[0], of_rank(rank, (3,), torch.float32))
        assert same(found[1], of_rank(rank, (2, 2), torch.float32))


@pytest.mark.parametrize("async_ops", [False, True])
def test_the_coalescing_manager(async_ops: bool) -> None:
    group = dist.group.WORLD
    a, b = of_rank(me(), (3,), torch.float32), of_rank(me(), (5,), torch.float32)
    with dist._coalescing_manager(group, async_ops=async_ops) as manager:
        dist.all_reduce(a)
        dist.all_reduce(b)
    if async_ops:
        manager.wait()
    assert same(a, sum(everyone((3,), torch.float32)))
    assert same(b, sum(everyone((5,), torch.float32)))
    wholes, mine = [torch.empty(3 * size()), torch.empty(2 * size())], [torch.full((n,), float(me())) for n in (3, 2)]
    with dist._coalescing_manager(group, async_ops=async_ops) as manager:
        for whole, part in zip(wholes, mine, strict=True):
            dist.all_gather_single(whole, part)
    if async_ops:
        manager.wait()
    assert all(
        torch.equal(w, torch.arange(float(size())).repeat_interleave(n)) for w, n in zip(wholes, (3, 2), strict=True)
    )
    parts = [torch.empty(3), torch.empty(2)]
    with dist._coalescing_manager(group, async_ops=async_ops) as manager:
        for part, whole in zip(parts, wholes, strict=True):
            dist.reduce_scatter_single(part, whole)
    if async_ops:
        manager.wait()
    assert all((part == me() * size()).all() for part in parts)


@pytest.mark.mpi(min_size=2)
def test_a_batch_of_messages() -> None:
    up, down = (me() + 1) % size(), (me() - 1) % size()
    xs = [of_rank(me(), (4,), dtype) for dtype in (torch.float32, torch.complex64, torch.int16)]
    ys = [torch.empty_like(x) for x in xs]
    ops = [dist.P2POp(dist.isend, x, up) for x in xs] + [dist.P2POp(dist.irecv, y, down) for y in ys]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert all(same(y, of_rank(down, (4,), y.dtype)) for y in ys)
    assert same_everywhere(torch.tensor([len(ops)]))
