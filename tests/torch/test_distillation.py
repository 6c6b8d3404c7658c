"""Codistillation: the cut of a training set, and targets that are the mean of the other ranks' predictions."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from team import Team

from mpicomp.errors import ConfigMismatchError, SpecError
from mpicomp.models.distillation import Codistillation, shard

every_team = pytest.mark.parametrize("ranks", [1, 2, 3, 5])


def logits_of(rank: int, shape: tuple[int, int] = (7, 4)) -> Any:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(rank))


@every_team
@pytest.mark.parametrize("size", [11, 100, 1397])
def test_parts_are_disjoint_and_cover_all(ranks: int, size: int) -> None:
    parts = [shard(size, ranks, rank, seed=3) for rank in range(ranks)]
    assert all(torch.equal(part.shared, parts[0].shared) for part in parts)
    together = torch.cat([parts[0].shared, *(part.own for part in parts)])
    assert torch.equal(together.sort().values, torch.arange(size))
    assert len(parts[0].shared) == -(-size // 4)
    lengths = [len(part.own) for part in parts]
    assert max(lengths) - min(lengths) <= 1
    assert not torch.equal(parts[0].shared, shard(size, ranks, 0, seed=4).shared)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"size": 5, "ranks": 4, "rank": 0}, "5 examples are too few: 2 are shared, and 4 ranks need one each"),
        ({"size": 50, "ranks": 4, "rank": 4}, r"rank must be an integer in 0..3, got 4"),
        ({"size": 50, "ranks": 4, "rank": 0, "shared": 1.0}, r"shared must be in \(0, 1\), got 1.0"),
        ({"size": 50, "ranks": 4, "rank": 0, "shared": 0}, r"shared must be in \(0, 1\), got 0"),
    ],
)
def test_bad_cuts_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        shard(**arguments)


@every_team
@pytest.mark.parametrize(("codec", "error"), [("dense", 1e-6), ("fp8", 0.07), ("uniform(bits=4)", 0.2)])
def test_targets_are_the_mean_of_the_others(ranks: int, codec: str, error: float) -> None:
    def f(comm: Any) -> Any:
        logits = logits_of(comm.rank).requires_grad_()
        return Codistillation(comm, codec, temperature=2.0).targets(logits)

    found = Team(ranks).run(f)
    sure = torch.stack([torch.softmax(logits_of(rank) / 2, 1) for rank in range(ranks)])
    for rank, targets in enumerate(found):
        others = sure[[other for other in range(ranks) if other != rank or ranks == 1]]
        assert not targets.requires_grad
        torch.testing.assert_close(targets.sum(1), torch.ones(7))
        torch.testing.assert_close(targets, others.mean(0), rtol=0, atol=error)


def test_bytes_are_those_of_the_codec() -> None:
    def f(comm: Any) -> int:
        peers = Codistillation(comm, "fp8")
        peers.targets(logits_of(comm.rank, (100, 10)))
        return int(peers.traffic.counted)

    assert Team(3).run(f) == [2 * (1000 + 16)] * 3


@pytest.mark.parametrize("codec", ["uniform(bits=8)", "fp8"])
def test_nan_reaches_the_others_only(codec: str) -> None:
    def f(comm: Any) -> Any:
        logits = logits_of(comm.rank)
        if comm.rank == 1:
            logits[3, 2] = torch.nan
        return Codistillation(comm, codec).targets(logits)

    found = Team(3).run(f)
    assert [bool(targets.isnan().any()) for targets in found] == [True, False, True]


def test_rows_too_small_for_the_code_are_even() -> None:
    def f(comm: Any) -> Any:
        return Codistillation(comm, "threshold(at=0.9)").targets(torch.zeros(3, 4))

    assert all(torch.equal(targets, torch.full((3, 4), 0.25)) for targets in Team(2).run(f))


@pytest.mark.parametrize("shape", [(0, 10), (3, 1)])
def test_few_examples_and_classes(shape: tuple[int, int]) -> None:
    found = Team(2).run(lambda comm: Codistillation(comm).targets(torch.zeros(shape)))
    assert all(targets.shape == shape for targets in found)


def test_dtype_is_kept_and_history_is_not() -> None:
    found = Team(2).run(lambda comm: Codistillation(comm).targets(logits_of(0).double()))
    assert all(targets.dtype == torch.float64 for targets in found)


def test_loss_is_least_at_the_targets_and_as_steep_at_all_temperatures() -> None:
    targets = torch.softmax(logits_of(1), 1)
    peers = Codistillation(Team(1).comms[0])
    logits = targets.log().requires_grad_()
    peers.loss(logits, targets).backward()
    torch.testing.assert_close(logits.grad, torch.zeros(7, 4), rtol=0, atol=1e-6)
    steep = []
    for temperature in (8.0, 16.0):
        peers = Codistillation(Team(1).comms[0], temperature=temperature)
        logits = torch.zeros(1, 4, requires_grad=True)
        softened = torch.softmax(torch.tensor([[1.0, 0, 0, 0]]) / temperature, 1)
        peers.loss(logits, softened).backward()
        steep.append(logits.grad.norm())
    torch.testing.assert_close(steep[0], steep[1], rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda comm: Codistillation(comm, "fp9"), SpecError, "fp9"),
        (lambda comm: Codistillation(comm, 3), TypeError, "method must be"),
        (lambda comm: Codistillation(comm, "two_stage(sign)").targets(torch.zeros(2, 2)), TypeError, "takes a codec"),
        (lambda comm: Codistillation(comm, temperature=0), ValueError, "temperature must be positive, got 0"),
        (
            lambda comm: Codistillation(comm).targets([1.0]),
            TypeError,
            "logits must be a floating-point tensor, got list",
        ),
        (lambda comm: Codistillation(comm).targets(torch.zeros(2, 2).long()), TypeError, "got torch.int64"),
        (lambda comm: Codistillation(comm).targets(torch.zeros(2)), ValueError, r"\(examples, classes\), got \[2\]"),
    ],
)
def test_bad_arguments_are_refused(make: Any, kind: Any, text: str) -> None:
    with pytest.raises(kind, match=text):
        make(Team(1).comms[0])


def test_ranks_that_differ_are_refused_on_all_and_the_next_exchange_works() -> None:
    def f(comm: Any) -> bool:
        peers = Codistillation(comm)
        with pytest.raises(ConfigMismatchError):
            peers.targets(torch.zeros(5 + comm.rank, 4))
        with pytest.raises(ConfigMismatchError):
            Codistillation(comm, temperature=1.0 + comm.rank).targets(torch.zeros(5, 4))
        with pytest.raises(ConfigMismatchError if comm.rank else TypeError):
            peers.targets(torch.zeros(5, 4) if comm.rank else None)  # type: ignore[arg-type]
        return bool(peers.targets(torch.zeros(5, 4)).isfinite().all())

    assert all(Team(2).run(f))
