"""A model reaches all ranks of a team: exactly as a file, as a codec says, or not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from team import Team
from torch import nn

import mpicomp
from mpicomp.comm.communicator import Comm
from mpicomp.errors import ConfigMismatchError
from mpicomp.models import Codebooks, Masks, bcast, compress_model, dorefa_layers
from mpicomp.models.state import words_of

LENGTH = 8  # bytes that go before a file


def net(seed: int) -> Any:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 6).bfloat16())
    made.register_buffer("count", torch.tensor(seed))
    return made


def small(seed: int) -> Any:
    made = net(seed)
    Masks.magnitude(made, 0.8).apply(made)
    Codebooks.fit(made, 3).apply(made)
    return made


def content(model: Any) -> dict[str, bytes]:
    state = model if isinstance(model, dict) else model.state_dict()
    return {name: words_of(tensor).tobytes() for name, tensor in state.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("make", [net, small])
def test_every_rank_has_the_roots_model(make: Callable[[int], Any], ranks: int) -> None:
    models = [make(rank) for rank in range(ranks)]
    root = ranks - 1
    before, file = content(models[root]), compress_model(models[root])
    pointers = [[each.data_ptr() for each in model.parameters()] for model in models]

    def f(comm: Comm) -> int:
        bcast(comm, models[comm.rank], root=root)
        return comm.traffic.modelled

    sent = Team(ranks).run(f)
    assert all(content(model) == before for model in models)
    assert [[each.data_ptr() for each in model.parameters()] for model in models] == pointers
    parts = [-(-size * (ranks - 1) // ranks) for size in (len(file), LENGTH)]
    agreement = -(-2 * 16 * (ranks - 1) // ranks) if ranks > 1 else 0
    assert sent == [sum(parts) + agreement] * ranks


@pytest.mark.parametrize(
    "codec", ["bf16", "uniform(bits=8)", "topk(density=0.3)", "bounded(rel=0.01)", "rotated(sign)"]
)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_codec_changes_weights_and_nothing_else(codec: str, ranks: int) -> None:
    models = [net(rank) for rank in range(ranks)]
    exact = {name: tensor for name, tensor in copy.deepcopy(models[0].state_dict()).items() if tensor.ndim < 2}

    def f(comm: Comm) -> tuple[dict[str, bytes], int]:
        bcast(comm, models[comm.rank], codec)
        return content(models[comm.rank]), comm.traffic.modelled

    (first, sent), *others = Team(ranks).run(f)
    assert all(other == (first, sent) for other in others)
    assert {name: first[name] for name in exact} == content(exact)
    x = net(0)[0].weight.detach().numpy()
    (expected,) = Team(1).run(lambda comm: mpicomp.bcast(comm, x, codec))
    error = np.linalg.norm(models[0][0].weight.detach().numpy() - x) / np.linalg.norm(x)
    assert error <= 1.5 * np.linalg.norm(expected - x) / np.linalg.norm(x) + 1e-6
    if codec != "bf16":
        assert first["0.weight"] != content({"0.weight": net(0)[0].weight})["0.weight"]


def test_tied_weights_with_a_codec() -> None:
    def tied(seed: int) -> Any:
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
        made[1].weight = made[0].weight
        return made

    models = [tied(rank) for rank in range(2)]
    Team(2).run(lambda comm: bcast(comm, models[comm.rank], "uniform(bits=8)"))
    assert content(models[0]) == content(models[1])
    assert models[1][1].weight is models[1][0].weight


def transposed(seed: int) -> Any:
    """An encoder and a decoder that is the same memory."""
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(9, 7, bias=False), nn.Linear(7, 9, bias=False))
    made[1].weight = nn.Parameter(made[0].weight.t())
    return made


@pytest.mark.parametrize("codec", [None, "uniform(bits=4)"])
def test_weights_that_overlap_stay_one_on_all_ranks(codec: str | None) -> None:
    models = [transposed(rank) for rank in range(3)]
    before = content(models[0])
    Team(3).run(lambda comm: bcast(comm, models[comm.rank], codec))
    assert all(content(model) == before for model in models)
    models[1][1].weight = nn.Parameter(models[1][1].weight.clone())

    def f(comm: Comm) -> None:
        with pytest.raises(ConfigMismatchError, match="in one place"):
            bcast(comm, models[comm.rank], codec)

    Team(3).run(f)


def test_infinity_in_one_tensor_leaves_the_others_as_the_codec_says() -> None:
    """A mask of attention is a matrix of a float dtype in the state, too."""

    def masked(seed: int) -> Any:
        made = net(seed)
        made.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1) + seed)
        made.register_buffer("hole", torch.full((4, 4), torch.nan) if seed == 0 else torch.rand(4, 4))
        return made

    models = [masked(rank) for rank in range(3)]
    exact = copy.deepcopy(models[0])
    Team(3).run(lambda comm: bcast(comm, models[comm.rank], "uniform(bits=8)"))
    assert all(content(model) == content(models[0]) for model in models)
    for name in ("mask", "hole"):
        assert content(models[2])[name] == content(exact)[name]
    assert torch.allclose(models[2][0].weight, exact[0].weight, atol=0.01)


@pytest.mark.parametrize("codec", [None, "bf16"])
def test_what_a_module_makes_of_its_state_arrives(codec: str | None) -> None:
    models = [dorefa_layers(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))) for _ in range(3)]
    models[1](torch.randn(2, 4)).sum().backward()
    Team(3).run(lambda comm: bcast(comm, models[comm.rank], codec, root=1))
    assert [model[1].noise.passes for model in models] == [1, 1, 1]  # type: ignore[index]
    assert content(models[0]) == content(models[1])


@pytest.mark.parametrize("codec", [None, "uniform(bits=8)"])
def test_the_order_of_names_does_not_matter(codec: str | None) -> None:
    states = [dict(reversed(net(rank).state_dict().items()) if rank % 2 else net(rank).state_dict()) for rank in (0, 1)]
    Team(2).run(lambda comm: bcast(comm, states[comm.rank], codec))
    assert {name: content(states[1])[name] for name in states[0]} == content(states[0])


def test_a_state_dict_and_a_model_of_the_same_tensors() -> None:
    models = [net(rank) for rank in range(3)]
    before = content(models[0])

    def f(comm: Comm) -> None:
        model = models[comm.rank]
        bcast(comm, model if comm.rank % 2 else model.state_dict())

    Team(3).run(f)
    assert all(content(model) == before for model in models)


def odd(rank: int) -> dict[str, Any]:
    """What one rank has that the others have not."""
    return {
        "shape": nn.Linear(30, 41) if rank == 1 else nn.Linear(30, 40),
        "dtype": nn.Linear(30, 40).double() if rank == 1 else nn.Linear(30, 40),
        "names": {"a" if rank == 1 else "b": torch.ones(3)},
        "tensors": nn.Linear(30, 40, bias=rank != 1),
    }


@pytest.mark.parametrize("codec", [None, "uniform(bits=4)"])
@pytest.mark.parametrize("kind", ["shape", "dtype", "names", "tensors"])
def test_a_model_that_does_not_fit_is_refused_on_all_ranks(kind: str, codec: str | None) -> None:
    models = [odd(rank)[kind] for rank in range(3)]
    before = [content(model) for model in models]
    good = [net(rank) for rank in range(3)]

    def f(comm: Comm) -> None:
        with pytest.raises(ConfigMismatchError, match=r"models\.bcast from rank 0"):
            bcast(comm, models[comm.rank], codec)
        bcast(comm, good[comm.rank])  # nothing is left under way

    Team(3).run(f)
    assert [content(model) for model in models] == before
    assert content(good[2]) == content(good[0])


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "codec": ({"codec": "tpok"}, ValueError, "tpok"),
    "reducer": ({"codec": "two_stage(sign)"}, TypeError, "takes a codec"),
    "root": ({"root": 3}, ValueError, "root must be a rank from 0 to 1"),
    "model": ({"model": [1]}, TypeError, "expected a torch.nn.Module"),
    "view": ({"model": {"x": torch.zeros(1).expand(2)}}, ValueError, "x is an expanded"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_one_rank_refuses_ends_on_all(kind: str) -> None:
    changes, error, message = REFUSED[kind]
    models = [net(rank) for rank in range(2)]
    before = [content(model) for model in models]

    def f(comm: Comm) -> None:
        if comm.rank == 1:
            with pytest.raises(error, match=message):
                bcast(comm, **{"model": models[1], **changes})
        else:
            with pytest.raises(ConfigMismatchError, match="refused its arguments"):
                bcast(comm, models[0])
        bcast(comm, {"x": torch.ones(2)})

    Team(2).run(f)
    assert [content(model) for model in models] == before


@pytest.mark.parametrize("changes", [{"codec": "bf16"}, {"root": 1}])
def test_ranks_that_differ_in_the_call(changes: dict[str, Any]) -> None:
    def f(comm: Comm) -> None:
        with pytest.raises(ConfigMismatchError):
            bcast(comm, net(0), **(changes if comm.rank else {}))

    Team(2).run(f)
