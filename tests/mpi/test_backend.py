"""torch.distributed over MPI: every operation against what it must yield, and DDP with torch's own hooks."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from process_group import me, same_everywhere, size
from regression import flat
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("process_group")]


def of_rank(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What a rank contributes: anybody can make it."""
    generator = torch.Generator().manual_seed(100 + rank)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.randint(0, 60, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def all_ranks(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [of_rank(rank, shape, dtype) for rank in range(size())]


FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", ["SUM", "AVG", "MIN", "MAX", "PRODUCT"])
def test_allreduce_of_floats(dtype: torch.dtype, op: str) -> None:
    x = of_rank(me(), (37,), dtype)
    dist.all_reduce(x, getattr(dist.ReduceOp, op))
    exact = torch.stack(all_ranks((37,), dtype)).double()
    wanted = {
        "SUM": lambda: exact.sum(0),
        "AVG": lambda: exact.mean(0),
        "MIN": lambda: exact.amin(0),
        "MAX": lambda: exact.amax(0),
        "PRODUCT": lambda: exact.prod(0),
    }[op]()
    # A sum is rounded at every addition in float32 and once to the dtype.
    torch.testing.assert_close(x.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert same_everywhere(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    x = torch.full((5,), 1.0 if me() == 0 else torch.finfo(dtype).eps / 4, dtype=dtype)
    dist.all_reduce(x)
    wanted = torch.tensor(1.0 + (size() - 1) * torch.finfo(dtype).eps / 4).to(dtype)
    assert (x == wanted).all()


@pytest.mark.parametrize("dtype", INTS, ids=str)
@pytest.mark.parametrize("op", ["SUM", "MIN", "MAX", "PRODUCT", "BAND", "BOR", "BXOR"])
def test_allreduce_of_integers_is_exact(dtype: torch.dtype, op: str) -> None:
    x = of_rank(me(), (3, 7), dtype)
    dist.all_reduce(x, getattr(dist.ReduceOp, op))
    wanted, *others = all_ranks((3, 7), dtype)
    for other in others:
        wanted = {
            "SUM": torch.add,
            "MIN": torch.minimum,
            "MAX": torch.maximum,
            "PRODUCT": torch.mul,
            "BAND": torch.bitwise_and,
            "BOR": torch.bitwise_or,
            "BXOR": torch.bitwise_xor,
        }[op](wanted, other)
    assert torch.equal(x, wanted)


def test_large_integers_are_not_rounded() -> None:
    x = torch.tensor([2**53 + 1 + me()])
    dist.all_reduce(x)
    assert x.item() == sum(2**53 + 1 + rank for rank in range(size()))


@pytest.mark.parametrize("op", ["SUM", "MIN", "MAX", "PRODUCT", "BAND", "BOR", "BXOR"])
def test_allreduce_of_truth_values(op: str) -> None:
    x = of_rank(me(), (40,), torch.bool)
    dist.all_reduce(x, getattr(dist.ReduceOp, op))
    all_of = torch.stack(all_ranks((40,), torch.bool))
    wanted = all_of.any(0) if op in ("SUM", "MAX", "BOR") else all_of.all(0)
    if op == "BXOR":
        wanted = all_of.sum(0) % 2 == 1
    assert torch.equal(x, wanted)


@pytest.mark.parametrize(
    ("dtype", "op", "words"),
    [
        (torch.float32, "BAND", "BAND needs integers"),
        (torch.int64, "AVG", "AVG needs floating-point"),
        (torch.complex64, "MAX", "does not support"),
    ],
)
def test_reductions_without_a_meaning(dtype: torch.dtype, op: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dist.all_reduce(torch.ones(3, dtype=dtype), getattr(dist.ReduceOp, op))


def test_any_contiguity() -> None:
    base = of_rank(me(), (6, 4), torch.float32)
    x, total = base.clone().t(), sum(all_ranks((6, 4), torch.float32))
    dist.all_reduce(x)
    torch.testing.assert_close(x, total.t())
    y = base.clone()[:, ::2]
    dist.broadcast(y, 0)
    assert torch.equal(y, of_rank(0, (6, 4), torch.float32)[:, ::2])
    outs = [torch.empty(4, 6).t() for _ in range(size())]
    dist.all_gather(outs, base.t().contiguous().t())
    assert all(torch.equal(a, b) for a, b in zip(outs, all_ranks((6, 4), torch.float32), strict=True))
    z = torch.view_as_complex(of_rank(me(), (5, 2), torch.float32)).clone()
    dist.all_reduce(z)
    torch.testing.assert_close(z, torch.view_as_complex(sum(all_ranks((5, 2), torch.float32))))


def test_nothing_and_scalars() -> None:
    x = torch.empty(0)
    dist.all_reduce(x)
    dist.broadcast(x, 0)
    y = torch.tensor(1.0)
    dist.all_reduce(y)
    assert y.item() == size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64], ids=str)
def test_copies(dtype: torch.dtype) -> None:
    mine, everyone = of_rank(me(), (2, 3), dtype), all_ranks((2, 3), dtype)
    root = size() - 1

    x = mine.clone()
    dist.broadcast(x, root)
    assert torch.equal(x, everyone[root])

    outs = [torch.empty_like(mine) for _ in range(size())]
    dist.all_gather(outs, mine)
    assert all(map(torch.equal, outs, everyone))

    whole = torch.empty(2 * size(), 3, dtype=dtype)
    dist.group.WORLD._allgather_base(whole, mine).wait()
    assert torch.equal(whole, torch.cat(everyone))
    whole.zero_()
    dist.all_gather_single(whole, mine)
    assert torch.equal(whole, torch.cat(everyone))

    outs = [torch.empty_like(mine) for _ in range(size())] if me() == root else None
    dist.gather(mine, outs, dst=root)
    assert outs is None or all(map(torch.equal, outs, everyone))

    x = torch.empty_like(mine)
    dist.scatter(x, everyone if me() == root else None, src=root)
    assert torch.equal(x, mine)

    outs = [torch.empty_like(mine) for _ in range(size())]
    dist.all_to_all(outs, [mine] * size())
    assert all(map(torch.equal, outs, everyone))


def test_uneven_shares() -> None:
    mine = torch.full((me() + 1,), me())
    outs = [torch.empty(rank + 1, dtype=mine.dtype) for rank in range(size())]
    dist.all_gather(outs, mine)
    assert [out.tolist() for out in outs] == [[rank] * (rank + 1) for rank in range(size())]
    # rank s sends r + 1 rows to rank r
    rows = torch.cat([torch.full((r + 1, 2), 10 * me() + r) for r in range(size())])
    out = torch.empty(size() * (me() + 1), 2, dtype=rows.dtype)
    dist.all_to_all_single(out, rows, [me() + 1] * size(), [r + 1 for r in range(size())])
    assert out[:, 0].tolist() == [10 * s + me() for s in range(size()) for _ in range(me() + 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64], ids=str)
def test_reduce_and_reduce_scatter(dtype: torch.dtype) -> None:
    root = size() - 1
    x = of_rank(me(), (8,), dtype)
    before, total = x.clone(), torch.stack([t.double() for t in all_ranks((8,), dtype)]).sum(0)
    dist.reduce(x, root)
    tolerance = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(x.double(), total if me() == root else before.double(), **tolerance)

    rows = of_rank(me(), (size(), 5), dtype)
    wanted = torch.stack([t.double() for t in all_ranks((size(), 5), dtype)]).sum(0)[me()]
    out = torch.empty(5, dtype=dtype)
    dist.reduce_scatter(out, list(rows))
    torch.testing.assert_close(out.double(), wanted, **tolerance)
    out.zero_()
    dist.group.WORLD._reduce_scatter_base(out, rows).wait()
    torch.testing.assert_close(out.double(), wanted, **tolerance)
    out.zero_()
    dist.reduce_scatter_single(out, rows)
    torch.testing.assert_close(out.double(), wanted, **tolerance)


def test_coalesced() -> None:
    a, b = torch.full((3,), float(me())), torch.full((5,), 1.0)
    with dist._coalescing_manager():
        dist.all_reduce(a)
        dist.all_reduce(b)
    assert a[0] == sum(range(size()))
    assert b[0] == size()
    wholes = [torch.empty(3 * size()), torch.empty(5 * size())]
    dist.group.WORLD.allgather_into_tensor_coalesced(wholes, [a, b]).wait()
    assert wholes[0].tolist() == [a[0]] * (3 * size())
    lists = [[torch.empty(3), torch.empty(5)] for _ in range(size())]
    dist.group.WORLD.allgather_coalesced(lists, [a, b]).wait()
    assert all(torch.equal(parts[1], b) for parts in lists)
    parts = [torch.empty(3), torch.empty(5)]
    dist.group.WORLD.reduce_scatter_tensor_coalesced(parts, wholes).wait()
    assert parts[0].tolist() == [a[0] * size()] * 3


@pytest.mark.mpi(min_size=2)
def test_messages_between_ranks_do_not_wait_for_each_other() -> None:
    """All send first and receive then, more than MPI buffers: in the order of one thread this would hang."""
    n = 300_000
    received = torch.empty(n, 2).t()
    sent = dist.isend(torch.full((2, n), float(me())), (me() + 1) % size())
    dist.recv(received, (me() - 1) % size())
    sent.wait()
    assert (received == (me() - 1) % size()).all()
    a, b = torch.empty(3), torch.empty(3)
    ops = [
        dist.P2POp(dist.isend, torch.full((3,), 1.0), (me() + 1) % size(), tag=1),
        dist.P2POp(dist.isend, torch.full((3,), 2.0), (me() + 1) % size(), tag=2),
        dist.P2POp(dist.irecv, b, (me() - 1) % size(), tag=2),
        dist.P2POp(dist.irecv, a, (me() - 1) % size(), tag=1),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert (a[0], b[0]) == (1, 2)
    dist.barrier()


def test_objects() -> None:
    outs = [None] * size()
    dist.all_gather_object(outs, {"rank": me(), "text": "x" * (me() + 1)})
    assert [out["rank"] for out in outs] == list(range(size()))
    box = [("from", 0)] if me() == 0 else [None]
    dist.broadcast_object_list(box, 0)
    assert box == [("from", 0)]


@pytest.mark.mpi(min_size=3)
def test_groups_of_some_ranks() -> None:
    """Only members take part, and their numbers within the group count."""
    outer = [0, size() - 1]
    group = dist.new_group(outer)
    other = dist.new_group([1])
    x = torch.tensor([me() + 1])
    if me() in outer:
        dist.all_reduce(x, group=group)
        assert x.item() == 1 + size()
        y = torch.tensor([me()])
        dist.broadcast(y, size() - 1, group=group)
        assert y.item() == size() - 1
        dist.destroy_process_group(group)
    if me() == 1:
        dist.all_reduce(x, group=other)
        assert x.item() == 2
    dist.barrier()


def test_functional_collectives() -> None:
    import torch.distributed._functional_collectives as funcol

    total = funcol.all_reduce(torch.ones(3), "sum", dist.group.WORLD)
    assert (total + 0)[0] == size()


def test_wrong_arguments_raise_at_the_call_and_harm_nothing() -> None:
    with pytest.raises(ValueError, match="one tensor for each"):
        dist.group.WORLD.allgather([[torch.empty(1)] * (size() + 1)], [torch.empty(1)])
    with pytest.raises(ValueError, match="same size and dtype"):
        dist.group.WORLD.allgather([[torch.empty(2)] * size()], [torch.empty(1)])
    with pytest.raises(ValueError, match="dense tensors only"):
        dist.broadcast(torch.eye(2).to_sparse(), 0)
    with pytest.raises(ValueError, match="on meta"):
        dist.group.WORLD.allreduce([torch.empty(2, device="meta")])
    with pytest.raises(ValueError, match="on meta"):
        dist.recv(torch.empty(1, device="meta"))
    with pytest.raises(ValueError, match="one tensor is sent or received at a time, got 2"):
        dist.group.WORLD.recv([torch.empty(1)] * 2, me(), 0)
    x = torch.ones(1)
    dist.all_reduce(x)
    assert x.item() == size()


def test_callback_may_communicate_and_wait() -> None:
    """As torch's PowerSGD hook does; queued, the inner collective would wait for itself."""
    order = []

    def then(future):
        inner = torch.full((1,), float(me()))
        dist.all_reduce(inner)
        order.append(inner.item())
        return future.value()[0] + inner

    futures = [dist.all_reduce(torch.ones(4), async_op=True).get_future().then(then) for _ in range(20)]
    ranks = sum(range(size()))
    for future in futures:
        assert future.wait()[0].item() == size() + ranks
    assert order == [ranks] * 20


# ------------------------------------------------------------------------------------------------------------- DDP


class Unused(nn.Module):
    """Which layer is used depends on the rank and the step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layers[0](self.layers[1 + (me() + self.calls) % 2](x))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 6))


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1000 * step + rank))


def train(module: nn.Module, steps: int = 4, hook=None, **options) -> torch.Tensor:
    ddp = DDP(module, **options)
    if hook is not None:
        ddp.register_comm_hook(*hook)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        (ddp(batch(step, me())) - batch(step, 77)).square().mean().backward()
        optimizer.step()
    return flat(module)


def reference(steps: int = 4) -> torch.Tensor:
    """The same training by one process: the mean over what every rank would compute."""
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(size()):
            ((module(batch(step, rank)) - batch(step, 77)).square().mean() / size()).backward()
        optimizer.step()
    return flat(module)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bucket_cap_mb": 0.001},
        {"bucket_cap_mb": 0.001, "gradient_as_bucket_view": True},
        {"static_graph": True},
        {"find_unused_parameters": True},
    ],
    ids=str,
)
def test_ddp_equals_one_process(options: dict) -> None:
    """To float32 rounding: gradients are added in another order."""
    trained = train(model(), **options)
    torch.testing.assert_close(trained, reference(), rtol=1e-5, atol=1e-6)
    assert same_everywhere(trained)


def test_ddp_with_parameters_that_some_ranks_do_not_use() -> None:
    torch.manual_seed(0)
    assert same_everywhere(train(Unused(), find_unused_parameters=True))


def test_ddp_with_buffers() -> None:
    torch.manual_seed(me())
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 6))
    assert same_everywhere(train(module))
    module.eval()
    DDP(module)  # a new wrapper sends rank 0's buffers
    assert same_everywhere(module[1].running_mean)


def test_ddp_no_sync_accumulates() -> None:
    module = model()
    ddp = DDP(module)
    with ddp.no_sync():
        ddp(batch(0, me())).square().mean().backward()
    ddp(batch(1, me())).square().mean().backward()
    serial = model()
    for step, rank in itertools.product(range(2), range(size())):
        (serial(batch(step, rank)).square().mean() / size()).backward()
    for ours, theirs in zip(module.parameters(), serial.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_join_with_uneven_inputs() -> None:
    module = model()
    ddp = DDP(module, bucket_cap_mb=0.001)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    with Join([ddp]):
        for step in range(2 + me()):
            optimizer.zero_grad()
            ddp(batch(step, me())).square().mean().backward()
            optimizer.step()
    assert same_everywhere(flat(module))


def test_fp16_hook() -> None:
    trained = train(model(), hook=(None, default_hooks.fp16_compress_hook))
    torch.testing.assert_close(trained, reference(), rtol=1e-2, atol=1e-3)
    assert same_everywhere(trained)


def test_powersgd_hook_in_many_buckets() -> None:
    """Over gloo this crashes or hangs: its callbacks wait for collectives of their own."""
    torch.manual_seed(0)
    module = nn.Sequential(*[nn.Linear(32, 32) for _ in range(8)])
    ddp = DDP(module, bucket_cap_mb=0.004)
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
    buckets = set()

    def hook(state, bucket):
        buckets.add(bucket.index())
        return powerSGD_hook.powerSGD_hook(state, bucket)

    ddp.register_comm_hook(state, hook)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.01)
    for step in range(50):
        torch.manual_seed(100 * step + me())
        optimizer.zero_grad()
        ddp(torch.randn(6, 32)).square().mean().backward()
        optimizer.step()
    assert len(buckets) == 8
    assert same_everywhere(flat(module))
