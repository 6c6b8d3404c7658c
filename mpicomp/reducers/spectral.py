"""spectral: ATOMO (Wang et al. 2018) in singular vectors: every rank sends a few of its own, drawn at random, to all.

For the matrix A of a unit (a tensor's first dimension by the rest), on every rank:

    A = sum of u_i w_i^T    u_i the eigenvectors of A A^T (of A^T A where that is smaller), w_i = A^T u_i
    p = probabilities(|w_i|, rank), see `mpicomp.codecs.atomo`: they sum to `rank`
    total = sum over ranks and over the atoms i drawn of u_i (w_i / p_i)^T

The u_i are orthonormal, so the atoms are orthogonal and sum to A, however near u_i is to an eigenvector: the sum is
unbiased, and the variance of a rank is the sum of |w_i|^2 (1 / p_i - 1), which depends on nothing but the p_i. So the
draw may be systematic: with one uniform number L, atom i is drawn where floor(L + sum of p_j over j <= i) steps up.
Each is drawn with probability p_i, `rank` of them in all, or every one where no more exist, and messages have a fixed
size. The paper draws each by itself, which has the same mean and variance, and messages that vary.

The singular vectors of a rank are its own, so messages are gathered, not summed, and BLAS and LAPACK may make them.
What every rank computes from the messages runs in our own kernels, in the order of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpicomp.arrays import Array
from mpicomp.codecs.atomo import probabilities
from mpicomp.codecs.base import Key
from mpicomp.codecs.checks import check_integer, little
from mpicomp.comm.communicator import Comm
from mpicomp.comm.primitives import peers
from mpicomp.comm.topology import Topology
from mpicomp.cost import Cost, Work
from mpicomp.kernels import host_kernels
from mpicomp.reducers.base import Reducer
from mpicomp.reducers.parts.clock import encoding
from mpicomp.reducers.parts.factors import magnitude, matrix_shape
from mpicomp.reducers.parts.layout import Layout, Unit
from mpicomp.reducers.parts.messages import Envelope
from mpicomp.reducers.parts.pipeline import MessageExchange
from mpicomp.reducers.parts.state import Reduction, State, nonfinite, poisoned_total
from mpicomp.reducers.parts.workspace import Workspace
from mpicomp.wire import Field, MessageLayout


@dataclass(frozen=True)
class Spectral(Reducer):
    """An unbiased sum of matrices, of which every rank sends `rank` singular triples drawn at random (ATOMO).

    A unit of fewer than two dimensions, or no larger than its triples, travels as it is. ValueError for a call or model
    with matrices of which none has as many atoms as `rank`; one with a single row or column counts as a vector. A step
    takes a product of each matrix with its transpose and an eigendecomposition of its shorter side. Costs grow with the
    number of ranks: `low_rank` sends less to many. Unbiased, so no contraction: error feedback refuses it.
    """

    spec_name: ClassVar[str] = "spectral"
    takes_complex: ClassVar[bool] = False
    contractive: ClassVar[bool] = False
    rank: int = 3

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1)

    def contraction(self) -> Reducer:
        raise ValueError(
            f"error feedback needs a contraction, and {self} is unbiased instead; write {self} without error feedback, "
            f"or error_feedback(low_rank(rank={self.rank}))"
        )

    def check_layout(self, layout: Layout) -> None:
        """See Reducer: some matrix must have as many atoms as the budget; others then travel as they are."""
        sides = {min(unit.shape[0], unit.size // unit.shape[0]): unit for unit in layout.units if is_matrix(unit)}
        if sides and max(sides) < self.rank:
            unit = sides[max(sides)]
            raise ValueError(
                f"rank must be at most the number of atoms, {max(sides)} for {unit.name!r} of shape "
                f"{list(unit.shape)}, got {self.rank}"
            )

    def fields(self, unit: Unit, dtype: str) -> tuple[Field, ...]:
        """Return what a message has of a unit: (rows, rank) u and (columns, rank) w / p, or the unit as it is."""
        shape = matrix_shape(unit, self.rank)
        shapes = [(unit.size,)] if shape is None else [(side, self.rank) for side in shape]
        return tuple(Field(each, little(dtype)) for each in shapes)

    def cost(self, layout: Layout, dtype: str, topology: Topology, me: int, feedback: bool = False) -> Cost:
        others, pieces = topology.size - 1, layout.whole()
        if not pieces:
            return Cost()
        nbytes = MessageLayout([self.fields(piece.unit, dtype) for piece in pieces]).nbytes
        shapes = [shape for unit in layout.units if (shape := matrix_shape(unit, self.rank))]
        products = sum(2 * rows * columns * min(rows, columns) // 4 for rows, columns in shapes)  # four columns at once
        outers = sum(rows * columns for rows, columns in shapes) * topology.size
        work = (Work("matmul", products + outers), Work("add", layout.size))
        return Cost(nbytes * others, rounds=1, messages=others, lossy=1, work=work)

    def _reduce(self, comm: Comm, x: Array, state: State, out: Array, work: Workspace) -> tuple[Reduction, State]:
        sequence = comm.next_call()
        messages = work.made("messages", lambda: self._messages(state, comm.size, work))
        mine = messages[comm.rank]
        poisoned = nonfinite(x, state.residual, state.layout)
        if not poisoned:
            self._write(mine, x, state, comm.rank)
        everyone = [[message] for message in messages]
        exchange = MessageExchange(comm, [[mine]] * comm.size, everyone, sequence, state, str(self))
        with exchange:
            mine.seal(sequence, state, poisoned)
            exchange.send_written(0, *peers(comm.rank, comm.size))
            state.layout.fill(out, 0)
            for rank, message in enumerate(messages):
                poisoned |= exchange.poisoned(rank, 0)
                if not poisoned:
                    _add(message, out, work.factor)
        if poisoned:
            return poisoned_total(out, state.layout), state
        return Reduction(out, divided=work.exact), state.advanced()

    def _messages(self, state: State, ranks: int, work: Workspace) -> list[Envelope]:
        pieces = state.layout.whole()
        fields = [self.fields(piece.unit, state.dtype) for piece in pieces]
        return [Envelope(pieces, fields, work=work) for _ in range(ranks)]

    @encoding
    def _write(self, message: Envelope, x: Array, state: State, rank: int) -> None:
        """Write this rank's atoms, and what travels as it is."""
        for piece, payload in zip(message.pieces, message.payloads, strict=True):
            part = x[piece.where]
            if len(payload) == 1:
                payload[0][...] = part
            else:
                p, q = payload
                key = state.key(piece, 0, rank)
                p[...], q[...] = draw(part.reshape(len(p), len(q)), self.rank, key)

    def rehearse(self, x: Array, total: Array) -> list[Array]:
        p, q, whole = x[:120].reshape(30, 4), x[120:200].reshape(20, 4), total[:600].reshape(30, 20)
        whole[...] = 0
        host_kernels(x).outer_add(p, q, whole, 0.5)
        host_kernels(x).axpy(x[:600], total[:600], 0.5)
        return [total]


def is_matrix(unit: Unit) -> bool:
    """Tell whether a unit has at least two rows and columns."""
    return len(unit.shape) > 1 and unit.size > max(unit.shape[0], unit.size // max(1, unit.shape[0]))


def draw(matrix: Array, rank: int, key: Key) -> tuple[Array, Array]:
    """Return u, (rows, rank), and w / p, (columns, rank), of the atoms drawn of a finite matrix; zeros for others."""
    top = magnitude(matrix)
    exponent = math.frexp(top)[1]
    a = np.ldexp(matrix.astype(np.float64), -exponent)
    wide = a.shape[0] <= a.shape[1]
    u, w = atoms(a if wide else a.T)
    p = probabilities(np.sqrt(np.square(w).sum(1)), rank)
    chosen = drawn(p, luck(key))[:rank]
    left, right = np.zeros((len(u), rank)), np.zeros((w.shape[1], rank))
    left[:, : chosen.size] = u[:, chosen]
    right[:, : chosen.size] = np.ldexp(w[chosen].T / p[chosen], exponent)
    with np.errstate(over="ignore"):  # an infinite sum is seen where the total is completed
        factors = left.astype(matrix.dtype), right.astype(matrix.dtype)
    return factors if wide else factors[::-1]


def atoms(a: Array) -> tuple[Array, Array]:
    """Return u, (m, m) with orthonormal columns, and w = u.T @ a, (m, n), for a matrix a, (m, n).

    Float64, in the order of descending norms of w. m should be the smaller side.
    """
    try:
        u = np.linalg.eigh(a @ a.T)[1][:, ::-1]
    except np.linalg.LinAlgError:  # rows are atoms too
        u = np.eye(len(a))
    return u, u.T @ a


def luck(key: Key) -> float:
    """Return a uniform number in [0, 1) of 48 bits."""
    words = np.empty(2)
    host_kernels(words).fill_uniform(words, key.base())
    high, low = ((words + 1) / 2).tolist()
    return float(high + low * 2.0**-24)


def drawn(p: Array, uniform: float) -> Array:
    """Return the atoms of a systematic draw, ascending: those with p == 1, and others where the steps of sums fall."""
    certain = p >= 1
    steps = np.floor(np.cumsum(np.where(certain, 0.0, p)) + uniform)
    found: Array = np.flatnonzero(certain | (np.diff(steps, prepend=0.0) > 0))
    return found


def _add(message: Envelope, out: Array, factor: float) -> None:
    """Add factor times what a message has to `out`."""
    for piece, payload in zip(message.pieces, message.received(), strict=True):
        part = out[piece.where]
        if len(payload) == 1:
            host_kernels(out).axpy(payload[0], part, factor)
        else:
            p, q = payload
            host_kernels(out).outer_add(p, q, part.reshape(len(p), len(q)), factor)
