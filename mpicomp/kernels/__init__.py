"""The loops over elements, one implementation a kind of array; nothing here knows of ranks or MPI.

Implementations are imported when they are first asked for: `import mpicomp` loads no compiler.
"""

from __future__ import annotations

import functools
from typing import Protocol

import numpy as np

from mpicomp.arrays import Array, on_device


class Selection(Protocol):
    """Which elements were chosen: `count` of them; see `mpicomp.kernels.cpu.select`."""

    @property
    def count(self) -> int: ...  # noqa: D102

    def write(self, values: Array, indices: Array, zero: bool = False) -> None: ...  # noqa: D102


class Kernels(Protocol):
    """What an implementation provides; `mpicomp.kernels.cpu` says what each does. Results are equal bit by bit."""

    def nonfinite(self, x: Array, old: Array | None = None) -> bool: ...  # noqa: D102

    def sum_tree(self, x: Array) -> float: ...  # noqa: D102

    def divide(self, x: Array, divisor: float) -> bool: ...  # noqa: D102

    def add(self, x: Array, old: Array, out: Array) -> None: ...  # noqa: D102

    def axpy(self, x: Array, out: Array, scale: float = 1.0) -> None: ...  # noqa: D102

    def narrow(self, x: Array, out: Array, dtype: str, saturate: bool = True) -> None: ...  # noqa: D102

    def narrow_residual(self, x: Array, old: Array | None, new: Array, out: Array, dtype: str) -> None: ...  # noqa: D102

    def widen(self, bits: Array, out: Array, dtype: str) -> None: ...  # noqa: D102

    def widen_add(self, bits: Array, out: Array, scale: float, dtype: str) -> None: ...  # noqa: D102

    def select_top(  # noqa: D102
        self, x: Array, old: Array | None, new: Array | None, k: int, share: float = 0.0
    ) -> Selection: ...

    def select_above(self, x: Array, old: Array | None, new: Array | None, value: float) -> Selection: ...  # noqa: D102

    def block_top_k(  # noqa: D102
        self, x: Array, old: Array | None, new: Array | None, block: int, k: int, values: Array, indices: Array
    ) -> None: ...

    def encode_bitmap(self, indices: Array, out: Array) -> None: ...  # noqa: D102

    def decode_bitmap(self, data: Array, out: Array) -> None: ...  # noqa: D102

    def add_bitmap(self, data: Array, values: Array, out: Array, scale: float = 1.0) -> None: ...  # noqa: D102

    def encode_elias_fano(self, indices: Array, width: int, out: Array) -> None: ...  # noqa: D102

    def decode_elias_fano(self, data: Array, width: int, out: Array) -> None: ...  # noqa: D102

    def add_elias_fano(  # noqa: D102
        self, data: Array, width: int, values: Array, out: Array, scale: float = 1.0
    ) -> None: ...

    def bits_set(self, data: Array, bits: int) -> int: ...  # noqa: D102

    def ascending(self, indices: Array, size: int) -> bool: ...  # noqa: D102

    def gather(self, x: Array, indices: Array, values: Array, factor: float = 1.0) -> None: ...  # noqa: D102

    def gather_residual(  # noqa: D102
        self, x: Array, old: Array | None, new: Array, indices: Array, values: Array, factor: float = 1.0
    ) -> None: ...

    def scatter_add(self, indices: Array, values: Array, out: Array, scale: float = 1.0) -> None: ...  # noqa: D102

    def put_at(self, indices: Array, values: Array, out: Array) -> None: ...  # noqa: D102

    def add_marked(self, places: Array, values: Array, sums: Array, marks: Array) -> None: ...  # noqa: D102

    def count_marks(self, marks: Array) -> int: ...  # noqa: D102

    def mark_first(self, marks: Array, count: int) -> None: ...  # noqa: D102

    def collect(self, marks: Array, sums: Array, values: Array, places: Array) -> None: ...  # noqa: D102

    def merge(  # noqa: D102
        self, places: Array, values: Array, others: Array, theirs: Array, merged: Array, sums: Array
    ) -> int: ...

    def random_support(self, size: int, k: int, base: int, start: int = 0) -> Array: ...  # noqa: D102

    def fill_uniform(self, out: Array, base: int) -> None: ...  # noqa: D102

    def encode_blocks(  # noqa: D102
        self,
        x: Array,
        old: Array | None,
        new: Array | None,
        scales: Array,
        lows: Array | None,
        packed: Array,
        grid: str,
        rule: str,
        bits: int,
        block: int,
        levels: int,
        stochastic: bool = False,
        shrink: float = 1.0,
        base: int = 0,
        start: int = 0,
    ) -> None: ...

    def decode_blocks(  # noqa: D102
        self,
        scales: Array,
        lows: Array | None,
        packed: Array,
        out: Array,
        grid: str,
        bits: int,
        block: int,
        factor: float = 1.0,
        fresh: bool = False,
    ) -> None: ...

    def block_tops(self, x: Array, old: Array | None, tops: Array, block: int) -> None: ...  # noqa: D102

    def add_codes(self, packed: Array, sums: Array, bits: int, block: int) -> None: ...  # noqa: D102

    def pack_sums(self, sums: Array, packed: Array, width: int, block: int) -> None: ...  # noqa: D102

    def decode_sums(self, scales: Array, packed: Array, out: Array, width: int, block: int) -> bool: ...  # noqa: D102

    def encode_sign(  # noqa: D102
        self, x: Array, old: Array | None, new: Array | None, scales: Array, packed: Array
    ) -> None: ...

    def largest(self, x: Array, old: Array | None) -> float: ...  # noqa: D102

    def moments(self, x: Array, old: Array | None, limit: float, factor: float) -> tuple[float, float]: ...  # noqa: D102

    def encode_floats(  # noqa: D102
        self, x: Array, old: Array | None, new: Array | None, exponents: Array | None, packed: Array, name: str
    ) -> None: ...

    def decode_floats(  # noqa: D102
        self, exponents: Array | None, packed: Array, out: Array, name: str, factor: float = 1.0
    ) -> None: ...

    def encode_powers(  # noqa: D102
        self,
        x: Array,
        old: Array | None,
        new: Array | None,
        scales: Array,
        codes: Array,
        block: int,
        shrink: float,
        base: int,
        start: int,
    ) -> None: ...

    def decode_powers(  # noqa: D102
        self, scales: Array, codes: Array, out: Array, block: int, factor: float = 1.0
    ) -> None: ...

    def codes_valid(  # noqa: D102
        self, packed: Array, size: int, bits: int, block: int, smallest: int, largest: int
    ) -> bool: ...

    def encode_bounded(  # noqa: D102
        self,
        x: Array,
        old: Array | None,
        new: Array | None,
        headers: Array,
        words: Array,
        relative: bool,
        step: float,
        inverse: float,
        limit: int,
        shift: int,
    ) -> int: ...

    def decode_bounded(  # noqa: D102
        self, headers: Array, words: Array, out: Array, relative: bool, step: float, shift: int, factor: float = 1.0
    ) -> None: ...

    def bounded_valid(  # noqa: D102
        self, headers: Array, words: Array, size: int, relative: bool, step: float, shift: int
    ) -> bool: ...

    def rotate(self, x: Array, old: Array | None, y: Array, base: int, start: int) -> None: ...  # noqa: D102

    def spread(self, x: Array, old: Array | None, a: Array, base: int, start: int) -> None: ...  # noqa: D102

    def unspread(self, a: Array, out: Array, base: int, start: int) -> None: ...  # noqa: D102

    def left_out(self, x: Array, old: Array | None, z: Array, scale: float, new: Array) -> None: ...  # noqa: D102

    def products(self, y: Array, z: Array) -> tuple[float, float]: ...  # noqa: D102

    def unrotate(self, y: Array, base: int, start: int) -> None: ...  # noqa: D102

    def orthogonalise(self, p: Array, base: int) -> None: ...  # noqa: D102

    def back_project(self, m: Array, p: Array, q: Array) -> None: ...  # noqa: D102

    def outer(self, p: Array, q: Array, out: Array) -> None: ...  # noqa: D102

    def outer_add(self, p: Array, q: Array, out: Array, scale: float = 1.0) -> None: ...  # noqa: D102


@functools.cache  # an import statement that finds its module loaded still takes a microsecond
def _cpu() -> Kernels:
    from mpicomp.kernels import cpu

    return cpu


@functools.cache
def _gpu() -> Kernels:
    from mpicomp.kernels import gpu

    return gpu


def kernels_for(x: Array) -> Kernels:
    """Return the kernels for arrays like x; TypeError for what is an array neither of NumPy nor of CuPy."""
    if isinstance(x, np.ndarray):
        return _cpu()
    if on_device(x):
        return _gpu()
    raise TypeError(f"there are kernels for NumPy and CuPy arrays only, got {type(x).__module__}.{type(x).__name__}")
