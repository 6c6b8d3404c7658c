"""The plain calls for tensors over real MPI: on process groups, in order with their other collectives, and in some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from process_group import me, same_everywhere, size

import mpicomp
import mpicomp.torch
from mpicomp.errors import ConfigMismatchError

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("process_group")]
TOPK = "topk(density=0.25)"


def value(rank: int, shape: tuple[int, ...] = (4, 5), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small integers, so that sums are exact."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def values(*args: Any) -> list[torch.Tensor]:
    return [value(rank, *args) for rank in range(size())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("where", ["communicator", "process group", "default group"])
def test_every_call_on_every_place(where: str, dtype: torch.dtype, world: Any) -> None:
    places: dict[str, tuple[Any, ...]] = {"communicator": (world,), "process group": (dist.group.WORLD,)}
    place = places.get(where, ())
    calls, xs = mpicomp.torch, values((size(), 4), dtype)
    x, total = xs[me()], sum(xs)
    for method in ("dense", "topk(density=1.0)"):
        assert torch.equal(calls.allreduce(*place, x.t().contiguous().t(), method), total)
        first, second = calls.allreduce(*place, [x, x[:, :1]], method, dist.ReduceOp.AVG)
        torch.testing.assert_close(first, (total / size()).to(dtype))
        assert torch.equal(second, first[:, :1])
        assert same_everywhere(torch.view_as_real(first) if dtype.is_complex else first)
        assert torch.equal(calls.allgather(*place, x, method), torch.stack(xs))
        assert torch.equal(calls.broadcast(*place, x.clone(), method, size() - 1), xs[-1])
        assert torch.equal(calls.reduce_scatter(*place, x, method), total[me()])
        requests = [calls.iallreduce(*place, x, method), calls.iallgather(*place, x, method)]
        requests += [calls.ibroadcast(*place, x, method, 0), calls.ireduce_scatter(*place, x, method)]
        found = [request.wait() for request in requests]
        assert all(map(torch.equal, found, (total, torch.stack(xs), xs[0], total[me()])))
        assert torch.equal(calls.plan(*place, x, method)(x), total)


def test_a_call_sees_what_was_begun_before_on_its_group() -> None:
    """Collectives of torch and of this library, none of which is waited for, in between."""
    x = torch.full((50_000,), float(me() + 1))
    works = [dist.broadcast(x, size() - 1, async_op=True)]
    request = mpicomp.torch.iallreduce(x, "dense", out=x)
    works.append(dist.all_reduce(x, async_op=True))
    total = mpicomp.torch.allreduce([x.t(), x[:3]], "dense")
    assert total[0][0] == total[1][0] == float(size()) ** 4
    assert request.wait() is x
    for work in works:
        work.wait()
    assert x[0] == float(size()) ** 3


def test_work_goes_on_while_a_call_runs() -> None:
    plan = mpicomp.torch.plan([torch.zeros(2000), torch.zeros(7)], TOPK, "mean", feedback=True)
    given: Any = [0.0, 0.0]
    got: Any = [0.0, 0.0]
    for step in range(4):
        xs = [value(10 * step + me(), (2000,)), value(me(), (7,))]
        request = plan.start(xs)
        given = [a + b for a, b in zip(given, [x.clone() for x in xs], strict=True)]
        got = [a + b for a, b in zip(got, request.wait(), strict=True)]
    owed = [torch.from_numpy(each) for each in plan.residual]
    for a, b, c in zip(given, got, owed, strict=True):
        dist.all_reduce(a)
        dist.all_reduce(c)
        torch.testing.assert_close(size() * b + c, a, rtol=1e-4, atol=1e-3)


def test_a_call_in_a_callback_of_another() -> None:
    x = torch.ones(3)
    future = dist.all_reduce(x, async_op=True).get_future()
    nested = future.then(lambda done: mpicomp.torch.allreduce(done.value()[0], "dense")).wait()
    assert nested.tolist() == [float(size()) ** 2] * 3


@pytest.mark.mpi(min_size=2)
def test_some_ranks_and_those_that_are_not_among_them(world: Any) -> None:
    from mpi4py import MPI

    group = dist.new_group(list(range(1, size())))
    part = world.Split(MPI.UNDEFINED if me() == 0 else 0, me())
    x = value(me())
    if me() == 0:
        for call in (
            lambda: mpicomp.torch.allreduce(group, x, "dense"),
            lambda: mpicomp.torch.iallgather(x, "dense", group=group),
            lambda: mpicomp.torch.plan(group, x, "dense"),
            lambda: mpicomp.torch.allreduce(part, x, "dense"),
        ):
            with pytest.raises(ValueError, match=r"this rank is not in the process group|COMM_NULL on this rank"):
                call()
    else:
        total = sum(values()[1:])
        assert torch.equal(mpicomp.torch.allreduce(group, x, "topk(density=1.0)"), total)
        assert torch.equal(mpicomp.torch.allreduce(part, x, "dense"), total)
        assert torch.equal(mpicomp.torch.broadcast(x, "dense", root=0, group=group), values()[1])  # its first rank
        dist.destroy_process_group(group)
        with pytest.raises(RuntimeError, match="this process group was destroyed"):
            mpicomp.torch.allreduce(group, x, "dense")
        part.Free()
    dist.barrier()


def complete(x: Any) -> Any:
    return x.wait() if isinstance(x, mpicomp.Request) else x


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("call", ["allreduce", "iallreduce", "allgather", "broadcast", "reduce_scatter", "plan"])
def test_what_one_rank_is_refused_is_an_error_on_all(call: str) -> None:
    last = me() == size() - 1
    good = torch.ones(size(), 4)
    wrong: list[Callable[[], Any]] = [
        lambda: good.clone().requires_grad_(),
        lambda: torch.ones(size(), 4, device="meta"),
        lambda: torch.ones(size(), 4).to_sparse(),
        lambda: [good, 3.0],
        lambda: torch.ones(size(), 5),
    ]
    for make in wrong:
        with pytest.raises((TypeError, ValueError, ConfigMismatchError)) as caught:
            complete(getattr(mpicomp.torch, call)(make() if last else good, "bf16"))
        assert last or isinstance(caught.value, ConfigMismatchError)
    assert torch.equal(mpicomp.torch.allreduce(good, "dense"), size() * good)


@pytest.mark.mpi(min_size=2)
def test_a_plan_goes_on_after_an_error_and_after_a_reset() -> None:
    group, x = dist.new_group(), value(me())
    plan = mpicomp.torch.plan(group, x, TOPK, feedback=True)
    first = plan(x)
    with pytest.raises((ValueError, ConfigMismatchError), match=r"made for float32\[4, 5\], got x of float32\[3\]"):
        plan(torch.ones(3) if me() == 0 else x)
    second = plan(x)
    mpicomp.torch.reset(group)
    third = plan(x)
    owed = torch.from_numpy(plan.residual)
    dist.all_reduce(owed)
    torch.testing.assert_close(first + second + third + owed, 3.0 * sum(values()))
    assert plan.traffic is mpicomp.torch.traffic(group)
    dist.destroy_process_group(group)


def test_where_a_group_is_of_another_backend() -> None:
    group = dist.new_group(backend="gloo")
    with pytest.raises(TypeError, match='must be of backend "mpicomp", got gloo'):
        mpicomp.torch.allreduce(torch.ones(3), "dense", group=group)
    dist.destroy_process_group(group)
