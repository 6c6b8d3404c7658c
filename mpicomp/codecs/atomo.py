"""Elements drawn at random, the larger the more probably: the entry-wise atoms of ATOMO, and its probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs import indices
from mpicomp.codecs.base import Codec, Key
from mpicomp.codecs.checks import is_number
from mpicomp.codecs.sparse import Drawn, Values
from mpicomp.codecs.varying import Varying
from mpicomp.kernels import host_kernels
from mpicomp.wire import Payload


def probabilities(coefficients: Array, budget: float) -> Array:
    """Return the probabilities, (n,) float64, with which ATOMO sends each of n atoms: they sum to `budget`.

    coefficients: (n,) float32 or float64, finite, of atoms that are orthonormal. Of all probabilities with this sum
    these have the least variance, sum of c^2 / p - c^2 (Wang et al. 2018, algorithm 1): p = min(1, r |c|), where r is
    such that the sum is right. What others lose when they clip s |c| / sum |c| to 1 is given to the smaller atoms.
    Atoms of coefficient zero have probability zero, so that the sum is their number where fewer others than `budget`
    exist. A budget of ||c||_1 / ||c||_inf gives TernGrad's probabilities, ||c||_1 / ||c||_2 those of QSGD with one
    level. ValueError for a budget that is not positive, or above the number of atoms, and for NaN or infinity.
    """
    c = np.ascontiguousarray(coefficients)
    if c.ndim != 1 or c.dtype.name not in ("float32", "float64"):
        raise ValueError(f"coefficients must be (n,) float32 or float64, got {c.shape} {c.dtype}")
    if not is_number(budget) or not 0.0 < budget < math.inf:
        raise ValueError(f"budget must be a positive number of atoms, got {budget!r}")
    if budget > c.size:
        raise ValueError(f"budget must be at most the number of atoms, {c.size}, got {budget!r}")
    if not np.isfinite(c).all():
        raise ValueError("coefficients must be finite")
    top, level, rate = host_kernels(c).water_level(c, budget)
    if not top:
        return np.zeros(c.size)
    y = np.abs(c.astype(np.float64)) / top
    found: Array = np.where(y >= level, 1.0, y * rate)
    return found


@dataclass(frozen=True)
class Atomo(Drawn, Varying):
    """Send element x_i with probability p_i = min(1, r |x_i|), as x_i / p_i (ATOMO, Wang et al. 2018; entries).

    The p_i sum to density * size where so many elements are not zero: see `probabilities`. With y = |x_i| / top in
    float64, `top`, `level` and `rate` from `mpicomp.kernels.cpu.atoms`, p_i is 1 where y >= level and x_i is sent as it
    is; else p_i = y rate, and top / rate with the sign of x_i is sent if draw32(base, start + i) < p_i 2^32. So p_i is
    exact to 2^-32. Elements drawn are independent; where none is, the message says zero.

    Unbiased, with the least variance of all probabilities with this sum, at most (1 / density - 1) ||x||^2, the
    variance of equal ones. `scaled=False` sends x_i itself where it is drawn, which contracts by at least the density.
    Payload: bytes, see `mpicomp.codecs.varying`. `encode` reads x twice, and once more for each lowering of the level
    and for the draw. NumPy arrays only.
    """

    density: float = field()
    scaled: bool = True
    values: Codec | None = field(default=None, kw_only=True)

    spec_name: ClassVar[str] = "atomo"
    on_gpu: ClassVar[bool] = False

    @property
    def omega(self) -> float:
        """The variance is at most omega ||x||^2."""
        return 1 / self.density - 1

    def kept(self, size: int) -> int:
        return size

    def relative_error(self, size: int) -> float:
        """See Codec. With the error r of `values`, at most

        sqrt(1 / density - 1) + r sqrt(1 / density), or unscaled sqrt(1 - density + r^2 density), at least r.
        """
        if not size:
            return 0.0
        lost = Values(self.values).relative_error(size)
        if self.scaled:
            return math.sqrt(self.omega) + lost / math.sqrt(self.density)
        return math.sqrt(max(1 - self.density + lost**2 * self.density, lost**2))

    def _encode(self, x: Array, old: Array | None, payload: Payload, new: Array | None, key: Key) -> int:
        how, kernels = Values(self.values), host_kernels(x)
        total = x if old is None else x + old
        level = kernels.water_level(total, self.density * x.size)
        places = kernels.draw_atoms(total, *level, key.base(), key.start)
        coded, data, used = self.begin(payload, x, places.size)
        indices.encode(places, x.size, data)
        values = how.room(places.size, coded, x)
        values[...] = self.rescaled(total[places], *level)
        how.encode(values, coded, None, None, key)
        if new is not None:
            new[...] = total
            new[places] -= how.decode(coded, places.size, x, key)
        return used

    def rescaled(self, drawn: Array, top: float, level: float, rate: float) -> Array:
        """Return elements that were drawn, divided by their probabilities."""
        if not self.scaled or not rate:
            return drawn
        certain = np.abs(drawn.astype(np.float64)) / top >= level
        with np.errstate(over="ignore"):
            share = drawn.dtype.type(top / rate)
        return np.where(certain, drawn, np.copysign(share, drawn))
