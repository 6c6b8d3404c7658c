"""The plain call for tensors over a team: any strides, lazy conjugates, complex numbers, and what is refused."""

from __future__ import annotations

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
    "history": (ValueError, r"pass \w+\.detach\(\)", lambda: torch.ones(4, requires_grad=True)),
    "parameter": (ValueError, r"pass \w+\.detach\(\)", lambda: torch.nn.Parameter(torch.ones(4))),
    "integers": (TypeError, "int64", lambda: torch.ones(4, dtype=torch.int64)),
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


@pytest.mark.filterwarnings("ignore")  # of prototypes, and of what torch will drop
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_reduced_is_refused_by_all(name: str) -> None:
    kind, words, make = REFUSED[name]

    def f(comm: Any) -> None:
        x = make() if comm.rank == 0 else torch.ones(4)
        with pytest.raises(kind if comm.rank == 0 else ConfigMismatchError, match=words):
            mpicomp.torch.allreduce(comm, x, "dense")
        with pytest.raises(kind if comm.rank == 0 else ConfigMismatchError, match=words):
            mpicomp.torch.allreduce(comm, torch.ones(4), "dense", out=make() if comm.rank == 0 else None)
        assert torch.equal(mpicomp.torch.allreduce(comm, torch.ones(4), "dense"), torch.full((4,), 2.0))

    Team(2).run(f)


def test_outputs_that_share_memory_are_refused() -> None:
    comm, x = Team(1).comms[0], torch.ones(8)
    for out, words in (
        (torch.zeros(1).expand(4), "strides"),
        (x[1:5], "shares memory"),
        (x[:8:2], "shares memory"),
        (x[4:], None),
        (x[:4], None),
    ):
        if words is None:
            assert mpicomp.torch.allreduce(comm, x[:4], "dense", out=out) is out
        else:
            with pytest.raises(ValueError, match=words):
                mpicomp.torch.allreduce(comm, x[:4], "dense", out=out)


def test_low_rank_takes_no_complex_tensors() -> None:
    with pytest.raises(TypeError, match="real matrices only"):
        mpicomp.torch.memory("low_rank(rank=2)", torch.ones(4, 4, dtype=torch.complex64))
