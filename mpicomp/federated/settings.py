"""What the ranks of a federation agree on, and the checks and digests of its arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpicomp import __version__
from mpicomp.arrays import Array
from mpicomp.federated.averaging import MOST
from mpicomp.federated.links import Link, Weights
from mpicomp.federated.submodels import Keep, Network, check_shapes


@dataclass(frozen=True)
class Settings:
    """What all ranks agree on."""

    examples: tuple[int, ...]
    """Of each client."""
    down: Link
    up: Link
    keep: Keep
    divisor: str
    differences: bool
    server_trains: bool
    seed: int

    def describe(self, network: Network, dtype: str) -> str:
        """Return all of it as text, with the network."""
        units = ", ".join(f"{name} {count}" for name, count in network.counts(self.keep).items())
        return (
            f"{len(self.examples)} clients {digest(repr(self.examples).encode())}, network "
            f"{digest(repr(network.shapes).encode())} {dtype}, units kept {units or 'all'}, down {self.down}, "
            f"up {self.up}, divisor {self.divisor}, differences {self.differences}, server trains "
            f"{self.server_trains}, seed {self.seed}, mpicomp {__version__}"
        )


def digest_of_arrays(arrays: Mapping[str, Array]) -> str:
    """Return a digest of names and contents."""
    return digest(b"".join(name.encode() + hashlib.blake2b(each.tobytes()).digest() for name, each in arrays.items()))


def copied(arrays: Mapping[str, Array]) -> Weights:
    """Return copies of arrays."""
    return {name: np.array(each) for name, each in arrays.items()}


def ordered(arrays: Mapping[str, Array], network: Network) -> Weights:
    """Return copies of the arrays of a network in its order, on which a digest of all depends, contiguous."""
    return {name: np.array(arrays[name], order="C") for name in network.shapes}


def digest(data: bytes) -> str:
    """Return a digest in 16 characters."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def check_arrays(weights: Any, network: Network, dtype: str | None = None) -> None:
    """Raise ValueError or TypeError unless these are the finite arrays of a network, by name, of one dtype.

    That is `dtype`, or without it float32 or float64.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be arrays by name, got {type(weights).__name__}")
    for name, each in weights.items():
        if not isinstance(each, np.ndarray):
            raise TypeError(f"weights must be NumPy arrays, got {type(each).__name__} for {name}")
    check_shapes(weights, network.shapes, "the network")
    dtypes = {str(each.dtype) for each in weights.values()}
    if len(dtypes) != 1 or not dtypes <= ({"float32", "float64"} if dtype is None else {dtype}):
        allowed = "all float32 or all float64" if dtype is None else f"all {dtype}"
        raise TypeError(f"weights must be {allowed}, got {', '.join(sorted(dtypes))}")
    for name, each in weights.items():
        if not np.isfinite(each).all():
            raise ValueError(f"{name} holds numbers that are not finite")


def examples_of(clients: Any) -> tuple[int, ...]:
    """Return the number of examples of every client; ValueError or TypeError for anything else."""
    given = tuple(clients)
    if not given:
        raise ValueError("clients must be the numbers of examples of at least one client")
    for client, each in enumerate(given):
        if not isinstance(each, int | np.integer) or isinstance(each, bool) or not 1 <= each <= MOST:
            raise ValueError(
                f"clients must be numbers of examples, integers in 1..2^53, got {each!r} for client {client}"
            )
    return tuple(map(int, given))
