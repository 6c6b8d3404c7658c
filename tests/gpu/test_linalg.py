"""Orthonormal columns and thin products."""

from __future__ import annotations

import numpy as np
import pytest
from compare import equal_bytes, normal, poisoned, same

from mpicomp.kernels import cpu
from mpicomp.kernels.gpu import linalg

BASE = 0x9E3779B97F4A7C15
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


class Alone:
    """The kernels of the GPU for one matrix that fills its buffer."""

    def __init__(self, device):
        self.device, self.places = device, device.asarray(np.zeros((3, 1), np.int64))

    def orthogonalise(self, p, base):
        bases = self.device.asarray(np.array([base], np.uint64))
        linalg.orthogonalise_all(p, (p.shape[0], 0, p.shape[1]), self.places, bases)

    def outer(self, p, q, out):
        linalg.outer_all(p, q, out, (*out.shape, p.shape[1]), self.places)

    def outer_add(self, p, q, out, scale=1.0):
        linalg.outer_all(p, q, out, (*out.shape, p.shape[1]), self.places, scale, adding=True)

    def back_project(self, m, p, q):
        linalg.back_project_all(m, p, q, (*m.shape, p.shape[1]), self.places)

    def project(self, x, old, m, q, p):
        linalg.project_all(x, old, m, q, p, (*x.shape, q.shape[1]), self.places)


def same_alone(device, name, *arguments, **options):
    return same(device, name, *arguments, on_gpu=getattr(Alone(device), name), **options)


def matrix(rows, columns, dtype="float32", seed=0):
    return normal(rows * columns, dtype, seed).reshape(rows, columns)


@DTYPES
@pytest.mark.parametrize(
    "shape", [(0, 3), (1, 1), (1, 2), (2, 3), (3, 2), (31, 4), (33, 5), (1023, 2), (1025, 4), (5000, 3)]
)
def test_orthogonalise(device, dtype, shape):
    same_alone(device, "orthogonalise", matrix(*shape, dtype), BASE, shift=shape[0] % 2)


@DTYPES
def test_orthogonalise_what_hangs_together(device, turns, dtype):
    """Columns that vanish, repeat, nearly repeat, are tiny or huge; more columns than rows."""
    p = matrix(40, 7, dtype)
    p[:, 1] = 0
    p[:, 3] = p[:, 0]
    p[:, 4] = p[:, 2] * (1 + 1e-5 * normal(40, dtype, 5))
    p[:, 5] *= 1e-30
    p[:, 6] *= 1e30
    same_alone(device, "orthogonalise", p, BASE)
    same_alone(device, "orthogonalise", matrix(3, 5, dtype), BASE)
    same_alone(device, "orthogonalise", np.zeros((1, 1), dtype), BASE)


def test_orthogonalise_columns_that_depend_on_few(device):
    """Rounding makes what a projection leaves mostly another column's again: several rounds, and random columns."""
    p = matrix(70, 20, "float64") @ matrix(20, 40, "float64", 1)
    same_alone(device, "orthogonalise", np.ascontiguousarray(p), BASE)


@DTYPES
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_orthogonalise_ends_for_what_is_not_finite(device, dtype, value):
    p = matrix(50, 3, dtype)
    p[7, 1] = value
    there = device.asarray(p)
    Alone(device).orthogonalise(there, BASE)
    cpu.orthogonalise(p, BASE)
    assert np.array_equal(there.get(), p, equal_nan=True)


def test_orthogonalise_beyond_shared_memory(device, turns):
    """Sums of more blocks of the tree than fit; more quarters than warps."""
    same_alone(device, "orthogonalise", matrix(33 * 1024 + 5, 2), BASE)


def test_orthogonalise_with_two_levels_of_sums(device):
    same_alone(device, "orthogonalise", matrix(1025 * 1024 + 1, 1), BASE)


SHAPES = [(1, 1, 1), (3, 5, 2), (15, 127, 4), (17, 129, 4), (33, 260, 5), (16, 31, 8), (4, 40, 33), (70, 33, 70)]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_outer(device, dtype, shape):
    rows, columns, rank = shape
    p, q, out = matrix(rows, rank, dtype), matrix(columns, rank, dtype, 1), matrix(rows, columns, dtype, 2)
    p[0, 0] = 0
    same_alone(device, "outer", p, q, out, shift=rows % 2)
    same_alone(device, "outer_add", p, q, out, -0.3, shift=columns % 2)
    same_alone(device, "outer_add", p, q, out, shift=1)


def test_outer_of_what_is_not_finite_and_of_nothing(device):
    p, q, out = matrix(5, 3), matrix(6, 3, seed=1), matrix(5, 6, seed=2)
    p[1, 2] = q[3, 0] = np.inf
    same_alone(device, "outer", p, q, out)
    same_alone(device, "outer", p[:, :0].copy(), q[:, :0].copy(), out)
    same_alone(device, "outer", p, q[:0].copy(), out[:, :0].copy())


@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 4, 63, 64, 67, 127, 128, 130, 261])
@pytest.mark.parametrize("columns", [1, 31, 33])
def test_back_project(device, dtype, rows, columns):
    rank = 1 + (rows + columns) % 9
    m, p = matrix(rows, columns, dtype), matrix(rows, rank, dtype, 1)
    same_alone(device, "back_project", m, p, poisoned(columns * rank, dtype).reshape(columns, rank), shift=rows % 2)


@DTYPES
@pytest.mark.parametrize("rank", [4, 8, 9, 16, 17, 32, 33, 70])
def test_back_project_by_rank(device, turns, dtype, rank):
    m, p = matrix(135, 40, dtype), matrix(135, rank, dtype, 1)
    same_alone(device, "back_project", m, p, poisoned(40 * rank, dtype).reshape(40, rank))


@DTYPES
@pytest.mark.parametrize("rank", [1, 4, 5, 8, 9, 16, 17, 32, 33])
@pytest.mark.parametrize("shape", [(1, 1), (9, 255), (16, 257), (3, 600)])
def test_project(device, dtype, rank, shape):
    """p = (x + old) q, as exactly as its terms allow."""
    rows, columns = shape
    x, old, q = matrix(*shape, dtype), matrix(*shape, dtype, 1), matrix(columns, rank, dtype, 2)
    for rest, m in ((None, x), (old, x + old)):
        there = [device.empty(size, dtype) for size in (x.size, rows * rank)]
        summed, p = there[0].reshape(shape), there[1].reshape(rows, rank)
        Alone(device).project(
            device.asarray(x), rest if rest is None else device.asarray(rest), summed, device.asarray(q), p
        )
        if rest is not None:
            equal_bytes("x + old", summed.get(), m)
        terms = np.abs(m).astype(float) @ np.abs(q).astype(float)
        error = np.abs(p.get() - m.astype(float) @ q.astype(float))
        assert (error <= (columns + 1) * np.finfo(dtype).eps * terms).all()


def test_project_depends_on_no_order(device, monkeypatch):
    """The same bits whatever the order in which threads take turns."""
    x, q = matrix(11, 700), matrix(700, 5, seed=1)
    found = set()
    for turns in (0, 1, 7):
        monkeypatch.setattr(device, "order", turns)
        p = device.empty((11, 5), "float32")
        Alone(device).project(device.asarray(x), None, None, device.asarray(q), p)
        found.add(p.get().tobytes())
    assert len(found) == 1


@DTYPES
def test_all_matrices_of_a_shape_in_one_launch(device, dtype):
    """Each as if it were alone, wherever it lies in its buffer."""
    count, rows, columns, rank = 3, 20, 150, 5
    wide = {"m": columns, "p": rank, "q": rank}
    high = {"m": rows, "p": rows, "q": columns}
    table = np.array([[wide[name] * high[name] * i + 7 * i + 1 for i in (2, 0, 1)] for name in "mpq"])
    x, old, p, q = (normal(10_000, dtype, seed) for seed in range(4))
    there_x, there_old, m, p, q, out = (device.asarray(buffer) for buffer in (x, old, x, p, q, x))
    places, shape, bases = device.asarray(table), (rows, columns, rank), np.array([5, 2**63, 7], np.uint64)

    def of(buffer, name, number):
        """The matrix in a host's copy of the buffer."""
        start = table["mpq".index(name), number]
        return buffer.get()[start : start + high[name] * wide[name]].reshape(high[name], wide[name])

    def check(what, buffer, name, expected):
        for number in range(count):
            equal_bytes(what, of(buffer, name, number), expected[number])

    first_q = [of(q, "q", i) for i in range(count)]
    linalg.project_all(there_x, there_old, m, q, p, shape, places)
    sums = [of(there_x, "m", i) + of(there_old, "m", i) for i in range(count)]
    check("project_all, m", m, "m", sums)
    columns_of_p = []
    for i in range(count):
        alone = device.empty((rows, rank), dtype)
        Alone(device).project(device.asarray(sums[i]), None, None, device.asarray(first_q[i]), alone)
        columns_of_p.append(alone.get())
    check("project_all, p", p, "p", columns_of_p)

    for i in range(count):
        cpu.orthogonalise(columns_of_p[i], int(bases[i]))
    linalg.orthogonalise_all(p, shape, places, device.asarray(bases))
    check("orthogonalise_all", p, "p", columns_of_p)

    back = [poisoned(columns * rank, dtype).reshape(columns, rank) for _ in range(count)]
    for i in range(count):
        cpu.back_project(sums[i], columns_of_p[i], back[i])
    linalg.back_project_all(m, p, q, shape, places)
    check("back_project_all", q, "q", back)

    outs = [of(out, "m", i).copy() for i in range(count)]
    for i in range(count):
        cpu.outer_add(columns_of_p[i], back[i], outs[i], -1.0)
    linalg.outer_all(p, q, out, shape, places, -1.0, adding=True)
    check("outer_all", out, "m", outs)
