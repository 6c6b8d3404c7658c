"""The mean of updates of different sub-models, weighted by examples (FedAvg, McMahan et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mpicomp.arrays import Array
from mpicomp.federated.links import Weights
from mpicomp.federated.submodels import Choice

DIVISORS = ("all", "covering")
MOST = 1 << 53  # examples of a client: more are no float64
UNIT = 2.0**-80  # the weight of an example: the sum of any updates of 2^27 clients stays in the range of float64


class Average:
    """A weighted mean in float64, summed in the order of `add`, which decides the bits.

    With the divisor "all" the sum at an element is divided by the examples of all clients that were added: what few
    sub-models have moves slowly. With "covering" it is divided by those whose sub-model has the element. An element
    that no sub-model has stays.
    """

    def __init__(self, weights: Mapping[str, Array], divisor: str) -> None:
        self._weights = weights
        self._totals = {name: np.zeros(each.shape) for name, each in weights.items()}
        self._covered = (
            {name: np.zeros(each.shape) for name, each in weights.items()} if divisor == "covering" else None
        )
        self._examples = 0

    def add(self, choice: Choice, update: Mapping[str, Array], examples: int) -> None:
        """Add a client's update of its sub-model; ValueError, and nothing is added, for one that does not fit."""
        choice.add(update, examples * UNIT, self._totals)
        if self._covered is not None:
            choice.cover(examples * UNIT, self._covered)
        self._examples += examples

    def result(self) -> Weights:
        """Return the weights plus the mean, new arrays in the dtype of the weights."""
        new = {}
        for name, old in self._weights.items():
            total = self._totals[name]
            divisor = np.float64(self._examples * UNIT) if self._covered is None else self._covered[name]
            mean = np.divide(total, divisor, out=np.zeros_like(total), where=divisor > 0)
            new[name] = (old + mean).astype(old.dtype)
        return new
