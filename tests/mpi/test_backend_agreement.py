"""Every collective of a process group is agreed on: what one rank does differently is an error on all, and no harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from process_group import me, size

import mpicomp.torch
from mpicomp.errors import CommunicatorError, ConfigMismatchError
from mpicomp.torch.backend import MPIProcessGroup

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.usefixtures("process_group")]


def odd() -> bool:
    """Whether this is the rank that does something else."""
    return me() == size() - 1


def full(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def parts(n: int) -> list[torch.Tensor]:
    return [full(n) for _ in range(size())]


def other() -> int:
    """4, of one rank 5."""
    return 5 if odd() else 4


MISMATCHES: dict[str, Callable[[], object]] = {
    "all_reduce, size": lambda: dist.all_reduce(full(other())),
    "all_reduce, same number of elements": lambda: dist.all_reduce(full(2, 3) if odd() else full(3, 2)),
    "all_reduce, dtype": lambda: dist.all_reduce(full(4, dtype=torch.int32 if odd() else torch.float32)),
    "all_reduce, half types": lambda: dist.all_reduce(full(4, dtype=torch.float16 if odd() else torch.bfloat16)),
    "all_reduce, op": lambda: dist.all_reduce(full(4), dist.ReduceOp.MAX if odd() else dist.ReduceOp.SUM),
    "all_reduce, empty": lambda: dist.all_reduce(full(0 if odd() else 4)),
    "all_reduce_coalesced, number": lambda: dist.group.WORLD.allreduce_coalesced([full(4)] * (other() - 3)).wait(),
    "reduce, root": lambda: dist.reduce(full(4), 1 if odd() else 0),
    "reduce, size": lambda: dist.reduce(full(other()), 0),
    "broadcast, root": lambda: dist.broadcast(full(4), 1 if odd() else 0),
    "broadcast, size": lambda: dist.broadcast(full(other()), 0),
    "broadcast, dtype": lambda: dist.broadcast(full(4, dtype=torch.int32 if odd() else torch.float32), 0),
    "all_gather, size": lambda: dist.all_gather(parts(other()), full(other())),
    "all_gather_single, size": lambda: dist.all_gather_single(full(size() * other()), full(other())),
    "all_gather_coalesced, number": lambda: dist.group.WORLD.allgather_into_tensor_coalesced(
        [full(4 * size())] * (other() - 3), [full(4)] * (other() - 3)
    ).wait(),
    "reduce_scatter, size": lambda: dist.reduce_scatter(full(other()), parts(other())),
    "reduce_scatter_single, size": lambda: dist.reduce_scatter_single(full(other()), full(size() * other())),
    "reduce_scatter, op": lambda: dist.reduce_scatter(
        full(4), parts(4), dist.ReduceOp.MAX if odd() else dist.ReduceOp.SUM
    ),
    "gather, root": lambda: (lambda root: dist.gather(full(4), parts(4) if me() == root else None, dst=root))(
        size() - 1 if odd() else 0
    ),
    "gather, size": lambda: dist.gather(full(other()), parts(4) if me() == 0 else None, dst=0),
    "gather, dtype": lambda: dist.gather(
        full(4, dtype=torch.int32 if odd() else torch.float32), parts(4) if me() == 0 else None, dst=0
    ),
    "scatter, size": lambda: dist.scatter(full(other()), parts(4) if me() == 0 else None, src=0),
    "all_to_all, size": lambda: dist.all_to_all(parts(other()), parts(other())),
    "operations": lambda: dist.barrier() if odd() else dist.all_reduce(full(4)),
    "copies": lambda: dist.broadcast(full(4), 0) if odd() else dist.all_gather(parts(4), full(4)),
}


def right() -> None:
    """What comes next works."""
    x = torch.tensor([me() + 1.0])
    dist.all_reduce(x)
    assert x.item() == size() * (size() + 1) / 2
    outs = [torch.empty(1) for _ in range(size())]
    dist.all_gather(outs, torch.tensor([float(me())]))
    assert [out.item() for out in outs] == list(range(size()))


@pytest.mark.parametrize("name", MISMATCHES)
def test_what_one_rank_does_differently_is_an_error_on_all(name: str) -> None:
    with pytest.raises(ConfigMismatchError, match="rank"):
        MISMATCHES[name]()
    right()


def test_the_text_says_who_does_what() -> None:
    with pytest.raises(ConfigMismatchError) as caught:
        dist.all_reduce(full(other()))
    text = str(caught.value)
    assert f"rank {size() - 1}: all_reduce(sum) of (5,) float32" in text
    assert "all_reduce(sum) of (4,) float32" in text


@pytest.fixture
def detailed() -> Iterator[Any]:
    """A group made under TORCH_DISTRIBUTED_DEBUG=DETAIL: torch wraps no group that Python defines."""
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    group = dist.new_group()
    yield group
    dist.destroy_process_group(group)
    dist.set_debug_level(level)


def test_under_detail_every_rank_is_described(detailed: Any) -> None:
    assert isinstance(detailed, MPIProcessGroup)
    with pytest.raises(ConfigMismatchError) as caught:
        dist.all_reduce(full(other()), group=detailed)
    assert str(caught.value).splitlines()[1:] == [
        f"  rank {rank}: all_reduce(sum) of ({4 + (rank == size() - 1)},) float32" for rank in range(size())
    ]
    to = [1] * size()
    to[1] += me() == 0
    with pytest.raises(ConfigMismatchError) as caught:
        dist.all_to_all_single(full(size(), 3), full(sum(to), 3), [1] * size(), to, group=detailed)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == size()
    assert "sends [0] 3 float32, [1] 6 float32" in lines[0]
    assert "expects [0] 3 float32, [1] 3 float32" in lines[1]
    x = full(2)
    dist.all_reduce(x, group=detailed)
    assert x[0] == size()


def test_under_detail_ddp_is_compressed_and_reset(detailed: Any) -> None:
    ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(30, 30), process_group=detailed)
    hook = mpicomp.torch.compress(ddp, "topk(density=0.1)")
    for _ in range(2):
        ddp(torch.ones(2, 30)).sum().backward()
    assert hook.step == 2
    mpicomp.torch.reset(detailed)
    assert detailed.comm.detailed
    assert mpicomp.torch.traffic(detailed).bytes > 0
    ddp(torch.ones(2, 30)).sum().backward()
    assert hook.step == 3


def test_rows_that_no_rank_sends() -> None:
    """Rank 0 sends one row more to rank 1 than that expects; each rank's own splits are fine."""
    to = [1] * size()
    to[1] += me() == 0
    with pytest.raises(ConfigMismatchError, match=r"rank 1: all_to_all expects 3 float32 from rank 0, which sends 6"):
        dist.all_to_all_single(full(size(), 3), full(sum(to), 3), [1] * size(), to)
    right()


def test_uneven_shares_that_fit() -> None:
    outs = [full(rank + 1) for rank in range(size())] if me() == 0 else None
    dist.gather(torch.full((me() + 1,), float(me())), outs, dst=0)
    assert outs is None or [out.tolist() for out in outs] == [[float(rank)] * (rank + 1) for rank in range(size())]
    x = torch.zeros(me() + 1)
    dist.scatter(x, [torch.full((rank + 1,), float(rank)) for rank in range(size())] if me() == 0 else None, src=0)
    assert x.tolist() == [float(me())] * (me() + 1)
    y = torch.zeros(me() + 1)
    dist.reduce_scatter(y, [full(rank + 1) for rank in range(size())])
    assert y.tolist() == [float(size())] * (me() + 1)


REFUSED: dict[str, tuple[str, Callable[[], object], Callable[[], object]]] = {
    "sparse": (
        "dense tensors only",
        lambda: dist.broadcast(full(2, 2).to_sparse(), 0),
        lambda: dist.broadcast(full(4), 0),
    ),
    "meta": (
        "on meta",
        lambda: dist.group.WORLD.allreduce([torch.empty(2, device="meta")]).wait(),
        lambda: dist.all_reduce(full(2)),
    ),
    "op": (
        "BAND needs integers",
        lambda: dist.all_reduce(full(4), dist.ReduceOp.BAND),
        lambda: dist.all_reduce(full(4)),
    ),
    "parts": (
        "one tensor for each",
        lambda: dist.group.WORLD.allgather([[full(1)] * (size() + 1)], [full(1)]).wait(),
        lambda: dist.all_gather(parts(1), full(1)),
    ),
    "splits": (
        "are not",
        lambda: dist.group.WORLD.all_to_all_single(full(size()), full(size()), [], [size() + 1]).wait(),
        lambda: dist.all_to_all_single(full(size()), full(size())),
    ),
    "whole": (
        "large tensor must hold",
        lambda: dist.group.WORLD.reduce_scatter_single(full(3), full(1)).wait(),
        lambda: dist.reduce_scatter_single(full(1), full(size())),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_rank_refuses_the_others_hear_of(name: str) -> None:
    words, bad, good = REFUSED[name]
    if odd():
        with pytest.raises(ValueError, match=words):
            bad()
    else:
        with pytest.raises(ConfigMismatchError, match=rf"rank {size() - 1}: refused its arguments: .*{words}"):
            good()
    right()


def test_a_wait_raises_a_disagreement() -> None:
    """Also where the next collective was begun before anybody waited."""
    first = dist.all_reduce(full(other()), async_op=True)
    x = full(3)
    second = dist.all_reduce(x, async_op=True)
    second.wait()
    assert x[0] == size()
    with pytest.raises(ConfigMismatchError):
        first.wait()
    third = dist.all_reduce(full(other()), async_op=True).get_future()
    with pytest.raises(RuntimeError, match="ranks disagree"):
        third.wait()
    right()


def test_objects_and_groups_need_no_more_than_they_say() -> None:
    """What torch does inside itself with other sizes on every rank is in agreement all the same."""
    outs = [None] * size()
    dist.all_gather_object(outs, "x" * (10 * me()))
    assert [len(out) for out in outs] == [10 * rank for rank in range(size())]
    found = [None] * size() if me() == 0 else None
    dist.gather_object("y" * me(), found, dst=0)
    assert found is None or [len(out) for out in found] == list(range(size()))
    mine = [None]
    dist.scatter_object_list(mine, ["z" * rank for rank in range(size())] if me() == 0 else None, src=0)
    assert len(mine[0]) == me()


def test_an_error_within_a_collective_is_one_on_all_until_the_group_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank fails where the others wait for what it was to send."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("no luck")

    with monkeypatch.context() as patch:
        if odd():
            patch.setattr("mpicomp.torch.exact.exchange", fail)
        with pytest.raises(ZeroDivisionError if odd() else CommunicatorError, match="no luck"):
            dist.all_gather(parts(4), full(4))
    for _ in range(2):
        with pytest.raises(
            CommunicatorError, match=rf"rank {size() - 1} of {size()} failed: all_gather.*no luck.*reset"
        ):
            dist.all_reduce(full(4))
    mpicomp.torch.reset()
    right()
