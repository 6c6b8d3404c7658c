"""Orthonormal columns and outer products in a fixed order, for results that every rank computes for itself.

Own loops instead of BLAS or LAPACK, whose bits depend on the processor and the number of threads; of libm only sqrt,
which IEEE 754 defines.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.bits import clear
from mpicomp.kernels.cpu.compile import Kernel, inline, kernel
from mpicomp.kernels.cpu.random import draw, draw24
from mpicomp.kernels.cpu.sums import TREE, block_product, total

BLOCK = 1024
TRIES = 3  # random columns before a column becomes zero: the earlier ones span the whole space


@inline
def dot(a: Any, b: Any, partial: Any, tree: Any) -> float:
    """Sum a * b, (m,) float64 each, by the tree of `sums`."""
    blocks = (a.size + TREE - 1) // TREE
    for block in range(blocks):
        first = block * TREE
        size = min(TREE, a.size - first)
        partial[block] = block_product(a[first : first + size], b[first : first + size], size, tree)
    return total(partial, blocks, tree)


@inline
def normalise(v: Any, partial: Any, tree: Any) -> Any:
    """Divide v, (m,) float64, by its norm, safely for any scale; return the norm, 0 if v is zero."""
    top = 0.0
    for i in range(v.size):
        size = abs(v[i])
        top = size if size > top else top
    if top == 0.0:
        return 0.0
    for i in range(v.size):
        v[i] /= top
    norm = np.sqrt(dot(v, v, partial, tree))
    for i in range(v.size):
        v[i] /= norm
    return top * norm


@inline
def separate(columns: Any, j: int, least: float, partial: Any, tree: Any) -> bool:
    """Make column j a unit vector orthogonal to earlier ones; False if less than `least` of it is left.

    Another projection whenever half the length was lost removes rounding errors ("twice is enough", Kahan).
    """
    v = columns[j]
    if not normalise(v, partial, tree) > 0.0:
        return False
    left = 1.0
    for _ in range(4):
        for i in range(j):
            u = columns[i]
            factor = dot(u, v, partial, tree)
            for t in range(v.size):
                v[t] -= factor * u[t]
        norm = normalise(v, partial, tree)
        left *= norm
        if not left > least:
            return False
        if norm > 0.5:
            return True
    return True


@kernel("T[][], u8, f8")
def _orthogonalise(p: Any, base: Any, least: float) -> None:
    m, r = p.shape
    columns = np.empty((r, m), np.float64)
    partial, tree = np.empty(m // TREE + 1, np.float64), np.empty(TREE, np.float64)
    for j in range(r):
        v = columns[j]
        for i in range(m):
            v[i] = p[i, j]
        done = separate(columns, j, least, partial, tree)
        for attempt in range(TRIES):
            if not done:
                own = draw(base, np.uint64(j * TRIES + attempt))
                for i in range(m):
                    v[i] = np.float64(draw24(own, np.uint64(i)) - np.int32(1 << 23))
                done = separate(columns, j, least, partial, tree)
        if not done:
            clear(v, 0, m)
        for i in range(m):
            p[i, j] = v[i]


def orthogonalise(p: Array, base: int) -> None:
    if p.size:
        _orthogonalise(p, np.uint64(base), 8.0 * float(np.finfo(p.dtype).eps))


@functools.cache
def _outer(adding: bool) -> Kernel[..., Any]:
    @kernel("const T[][], const T[][], T[][], T")
    def outer(p: Any, q_rows: Any, out: Any, scale: Any) -> None:
        m, r = p.shape
        n = out.shape[1]
        zero = out.dtype.type(0)
        buffer = np.empty(BLOCK, out.dtype)
        whole = r // 4 * 4
        for first in range(0, n, BLOCK):
            stop = min(first + BLOCK, n)
            size = stop - first
            for i in range(m):
                target = out[i, first:stop]
                if r == 4:  # the usual rank goes without the buffer
                    c0, c1, c2, c3 = scale * p[i, 0], scale * p[i, 1], scale * p[i, 2], scale * p[i, 3]
                    q0, q1, q2, q3 = (
                        q_rows[0, first:stop],
                        q_rows[1, first:stop],
                        q_rows[2, first:stop],
                        q_rows[3, first:stop],
                    )
                    for j in range(size):
                        found = (((zero + c0 * q0[j]) + c1 * q1[j]) + c2 * q2[j]) + c3 * q3[j]
                        target[j] = target[j] + found if adding else found
                    continue
                clear(buffer, 0, size)
                for t in range(0, whole, 4):
                    c0, c1 = scale * p[i, t], scale * p[i, t + 1]
                    c2, c3 = scale * p[i, t + 2], scale * p[i, t + 3]
                    q0, q1 = q_rows[t, first:stop], q_rows[t + 1, first:stop]
                    q2, q3 = q_rows[t + 2, first:stop], q_rows[t + 3, first:stop]
                    for j in range(size):
                        buffer[j] = (((buffer[j] + c0 * q0[j]) + c1 * q1[j]) + c2 * q2[j]) + c3 * q3[j]
                for t in range(whole, r):
                    c0 = scale * p[i, t]
                    q0 = q_rows[t, first:stop]
                    for j in range(size):
                        buffer[j] += c0 * q0[j]
                for j in range(size):
                    target[j] = target[j] + buffer[j] if adding else buffer[j]

    return outer


def outer_add(p: Array, q: Array, out: Array, scale: float = 1.0) -> None:
    if out.size and p.shape[1]:
        _outer(True)(p, np.ascontiguousarray(q.T), out, out.dtype.type(scale))


def outer(p: Array, q: Array, out: Array) -> None:
    _outer(False)(p, np.ascontiguousarray(q.T), out, out.dtype.type(1))


@kernel("const T[][], const T[][], T[][]")
def _back_project(m: Any, p: Any, q_rows: Any) -> None:
    rows, n = m.shape
    r = p.shape[1]
    for t in range(r):
        clear(q_rows[t], 0, n)
    for i in range(0, rows // 4 * 4, 4):
        for first in range(0, n, BLOCK):
            stop = min(first + BLOCK, n)
            m0, m1, m2, m3 = m[i, first:stop], m[i + 1, first:stop], m[i + 2, first:stop], m[i + 3, first:stop]
            for t in range(r):
                c0, c1, c2, c3 = p[i, t], p[i + 1, t], p[i + 2, t], p[i + 3, t]
                target = q_rows[t, first:stop]
                for j in range(stop - first):
                    target[j] += (c0 * m0[j] + c1 * m1[j]) + (c2 * m2[j] + c3 * m3[j])
    for i in range(rows // 4 * 4, rows):
        for t in range(r):
            c0 = p[i, t]
            row, target = m[i], q_rows[t]
            for j in range(n):
                target[j] += c0 * row[j]


def back_project(m: Array, p: Array, q: Array) -> None:
    q_rows = np.empty((q.shape[1], q.shape[0]), q.dtype)  # (r, n)
    _back_project(m, p, q_rows)
    q[...] = q_rows.T
