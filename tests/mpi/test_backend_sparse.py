"""Sums of sparse tensors: what gloo gives, or a dense sum; errors on all ranks; DDP with a sparse table."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from process_group import me, same_everywhere, size
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from mpicomp.errors import ConfigMismatchError

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("process_group")]

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
]


def entries(
    rank: int, count: int, shape: tuple[int, ...], dense: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """What a rank contributes: `count` entries, some of them twice."""
    generator = torch.Generator().manual_seed(40 + rank)
    indices = torch.stack([torch.randint(0, max(1, length), (count,), generator=generator) for length in shape])
    values = torch.randint(-3, 4, (count, *dense), generator=generator).to(dtype)  # sums are exact in every dtype
    return torch.sparse_coo_tensor(indices, values, (*shape, *dense), check_invariants=True)


def check(made: Callable[[int], torch.Tensor]) -> None:
    """The sum of what `made` makes of every rank, coalesced, the same bits on all of them."""
    x = made(me())
    dist.group.WORLD.allreduce([x]).wait()
    assert x.is_coalesced()
    wanted = made(0).to_dense()
    for rank in range(1, size()):
        wanted = wanted.logical_or(made(rank).to_dense()) if x.dtype == torch.bool else wanted + made(rank).to_dense()
    assert torch.equal(x.to_dense(), wanted)
    assert x.dtype == wanted.dtype
    assert same_everywhere(x.indices())
    assert same_everywhere(x.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    check(lambda rank: entries(rank, 5 + 3 * rank, (6, 4), dtype=dtype))


@pytest.mark.parametrize(
    ("shape", "dense"), [((9,), ()), ((5,), (3,)), ((4, 3), (2, 2)), ((4, 0), ()), ((5,), (0,)), ((1,), (1,))], ids=str
)
@pytest.mark.parametrize("counts", [(4, 4, 4, 4), (7, 0, 3, 1), (0, 0, 0, 0)], ids=str)
def test_every_shape(shape: tuple[int, ...], dense: tuple[int, ...], counts: tuple[int, ...]) -> None:
    check(lambda rank: entries(rank, 0 if 0 in shape else counts[rank % 4], shape, dense))


def test_no_sparse_dimension_and_strided_values() -> None:
    none = torch.empty(0, 2, dtype=torch.int64)
    check(lambda rank: torch.sparse_coo_tensor(none, torch.full((2, 3), 1.0 + rank), (3,), check_invariants=True))
    places = torch.tensor([[2, 0, 2]])
    check(lambda rank: torch.sparse_coo_tensor(places, torch.ones(2, 3).t() + rank, (4, 2), check_invariants=True))


def test_the_sum_is_formed_in_rank_order() -> None:
    """In float32: large numbers that cancel leave what the order leaves."""
    number = [1e8, 1.0, -1e8, 3.0][me() % 4]
    x = torch.sparse_coo_tensor([[1]], torch.tensor([number]), (3,), check_invariants=True)
    dist.all_reduce(x)
    wanted = torch.tensor(0.0)
    for rank in range(size()):
        wanted += [1e8, 1.0, -1e8, 3.0][rank % 4]
    assert x.values().tolist() == [wanted.item()]


def test_half_types_are_rounded_once() -> None:
    eps = torch.finfo(torch.bfloat16).eps / 4
    x = torch.tensor([1.0 if me() == 0 else eps], dtype=torch.bfloat16).to_sparse()
    dist.all_reduce(x)
    assert (x.to_dense() == torch.tensor([1.0 + (size() - 1) * eps]).to(torch.bfloat16)).all()


def test_means() -> None:
    """Of entries that some ranks have not, and of sums that exceed the range of the dtype."""
    for dtype in (torch.float16, torch.bfloat16):
        most = torch.finfo(dtype).max
        x = torch.tensor([most, 6.0 if me() == 0 else 0.0], dtype=dtype).to_sparse()
        dist.all_reduce(x, dist.ReduceOp.AVG)
        torch.testing.assert_close(x.to_dense(), torch.tensor([most, 6.0 / size()], dtype=dtype))


def test_several_at_once_and_a_leaf() -> None:
    x, y = entries(me(), 3, (6,)).requires_grad_(), entries(me() + 9, 4, (3,), (2,))
    dist.group.WORLD.allreduce_coalesced([x, y]).get_future().wait()
    assert torch.equal(x.detach().to_dense(), sum(entries(rank, 3, (6,)).to_dense() for rank in range(size())))
    assert torch.equal(y.to_dense(), sum(entries(rank + 9, 4, (3,), (2,)).to_dense() for rank in range(size())))
    assert x.requires_grad


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (
            lambda: dist.all_reduce(entries(0, 3, (4,)), dist.ReduceOp.MAX),
            "SUM and AVG only, got MAX",
        ),
        (lambda: dist.all_reduce(torch.eye(3).to_sparse_csr()), r"sparse_csr; use \.to_sparse_coo\(\)"),
        (
            lambda: dist.group.WORLD.allreduce_coalesced([torch.ones(3), entries(0, 3, (4,))]),
            "got both in one list; use .to_sparse",
        ),
        (lambda: dist.broadcast(entries(0, 3, (4,)), 0), "dense tensors only"),
        (lambda: dist.reduce(entries(0, 3, (4,)), 0), "dense tensors only"),
    ],
    ids=["op", "layout", "mixed", "broadcast", "reduce"],
)
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_what_is_not_defined_is_an_error_on_all(bad: Callable[[], object], words: str, alone: bool) -> None:
    if alone and me() != size() - 1:
        with pytest.raises(ConfigMismatchError, match=rf"rank {size() - 1}: refused its arguments: .*{words}"):
            dist.all_reduce(entries(0, 3, (4,)))
    else:
        with pytest.raises(ValueError, match=words):
            bad()
    check(lambda rank: entries(rank, 4, (5,)))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    "odd",
    [
        lambda: torch.ones(4, 3),
        lambda: entries(0, 2, (4, 3)),
        lambda: entries(0, 2, (5,), (3,)),
        lambda: entries(0, 2, (4,), (3,), torch.float64),
    ],
    ids=["dense", "dimensions", "shape", "dtype"],
)
def test_sparse_tensors_that_differ_are_an_error_on_all(odd: Callable[[], torch.Tensor]) -> None:
    with pytest.raises(ConfigMismatchError, match=r"\(4, 3\) float32 sparse in 1 dimensions"):
        dist.all_reduce(odd() if me() == size() - 1 else entries(0, 2, (4,), (3,)))
    check(lambda rank: entries(rank, 4, (5,)))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.line = nn.Embedding(40, 6, sparse=True), nn.Linear(6, 3)
        self.bag = nn.EmbeddingBag(20, 6, mode="sum", sparse=True)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.line(self.table(words) + self.bag(words % 20, torch.arange(len(words)))).square().mean()


@pytest.mark.parametrize("options", [{}, {"bucket_cap_mb": 0.0001}, {"find_unused_parameters": True}], ids=str)
def test_ddp_with_sparse_tables_equals_one_process(options: dict) -> None:
    def words(step: int, rank: int) -> torch.Tensor:
        return torch.randint(0, 40, (7,), generator=torch.Generator().manual_seed(10 * step + rank))

    model, alone = Words(), Words()
    ddp = DDP(model, **options)
    ours, theirs = (torch.optim.SGD(each.parameters(), 0.3) for each in (model, alone))
    for step in range(3):
        ours.zero_grad()
        ddp(words(step, me())).backward()
        ours.step()
        theirs.zero_grad()
        for rank in range(size()):
            (alone(words(step, rank)) / size()).backward()
        theirs.step()
    assert model.table.weight.grad.is_sparse
    for found, wanted in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert same_everywhere(found.detach())
