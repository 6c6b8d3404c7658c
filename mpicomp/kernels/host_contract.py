"""What the kernels take and do that NumPy arrays alone have; the rules of `mpicomp.kernels.contract` hold here, too."""

from __future__ import annotations

from typing import Protocol

from mpicomp.arrays import Array
from mpicomp.kernels.contract import Kernels
from mpicomp.kernels.shared import Bound


class HostKernels(Kernels, Protocol):
    """The kernels for NumPy arrays: those of `Kernels`, and the kernels that only the host calls."""

    # ---- Checks of messages from outside the job

    def codes_valid(self, packed: Array, size: int, bits: int, block: int, smallest: int, largest: int) -> bool:
        """Return whether every code is in smallest .. largest (two's complement below 0) and the padding is zero."""

    def bounded_valid(self, headers: Array, words: Array, size: int, bound: Bound) -> bool:
        """Return whether all headers are known, their blocks fill `words`, and all numbers are finite."""

    def bits_set(self, data: Array, bits: int) -> int:
        """Return how many of the first `bits` bits are set, -1 if a later one is; data: (ceil(bits / 8),) uint8."""

    def ascending(self, indices: Array, size: int) -> bool:
        """Return whether indices, (k,) uint32, ascend strictly and stay below size."""

    def decode_bitmap(self, data: Array, out: Array) -> None:
        """Set out, (k,) uint32, to the k indices of a bitmap; WireFormatError for more or fewer."""

    def decode_elias_fano(self, data: Array, width: int, out: Array) -> None:
        """Set out, (k,) uint32, to the k indices of an Elias-Fano code; WireFormatError for more or fewer."""

    # ---- Symbols of few bits in the file of a model

    def encode_symbols(self, symbols: Array, bits: int, counts: Array, out: Array) -> int:
        """Write symbols, (n,) uint16 below 2^bits, to `out`, uint8; return the bytes used, -1 if `out` is too short.

        counts, (2^(bits + 1),) uint64, is zero before and holds what was counted afterwards.
        """

    def decode_symbols(self, data: Array, bits: int, counts: Array, state: Array, out: Array) -> None:
        """Set `out`, (n,) uint16, to the next symbols of a message, uint8; any bytes give symbols below 2^bits.

        counts, as of `encode_symbols`, and state, (4,) uint64, go from call to call. state is low, high, as many bytes
        of the message, and how many were read; before the first call 0, 2^48 - 1, its first 6 bytes, 6.
        """

    # ---- Sums of sparse vectors: the reducers split and tree

    def add_marked(self, places: Array, values: Array, sums: Array, marks: Array) -> None:
        """Add values, (k,), to sums[places] and set their bits in marks, (ceil(sums.size / 64),) uint64."""

    def count_marks(self, marks: Array) -> int:
        """Return how many bits are set."""

    def mark_first(self, marks: Array, count: int) -> None:
        """Set the `count` lowest bits that are not set; the caller ensures that they lie within the array."""

    def collect(self, marks: Array, sums: Array, values: Array, places: Array) -> None:
        """Move the k marked elements of `sums` to values, (k,), and places, (k,) uint32, ascending; clear both."""

    def merge(self, places: Array, values: Array, others: Array, theirs: Array, merged: Array, sums: Array) -> int:
        """Add two sparse vectors with ascending places, uint32; return how many places the sum has.

        The first is places and values, the second others and theirs. merged and sums have room for both together.
        """

    # ---- Atoms: `mpicomp.kernels.cpu.atoms`

    def water_level(self, x: Array, budget: float) -> tuple[float, float, float]:
        """Return the largest magnitude `top`, and `level` and `rate`: the probabilities of elements sum to the budget.

        With y = |x| / top an element has probability 1 where y >= level, else y * rate. No probability is positive if
        x is zero or holds infinity.
        """

    def draw_atoms(self, x: Array, top: float, level: float, rate: float, base: int, start: int) -> Array:
        """Return the places of elements drawn with these probabilities, (k,) uint32, ascending.

        Element i is drawn if it is certain, or if draw32(base, start + i) is below its probability times 2^32.
        """

    # ---- Momentum before compression: the policy momentum_correction

    def correct(self, x: Array, u: Array, new: Array, ahead: Array | None, momentum: float) -> None:
        """Set new = momentum * u + x; with `ahead` new = momentum * (u + x) and ahead = new + x (Nesterov)."""

    # ---- Sums of integers: the reducer integer

    def block_tops(self, x: Array, old: Array | None, tops: Array, block: int) -> None:
        """Set tops, (blocks,), to the largest magnitude of each block of x + old, NaN for a block with a NaN."""

    def add_codes(self, packed: Array, sums: Array, bits: int, block: int) -> None:
        """Add codes of the grid "symmetric" to sums, (n,) uint32, which hold signed numbers modulo 2^32."""

    def pack_sums(self, sums: Array, packed: Array, width: int, block: int) -> None:
        """Pack sums, (n,) uint32, into `packed`, uint8, `width` bits each."""

    def decode_sums(self, scales: Array, packed: Array, out: Array, width: int, block: int) -> bool:
        """Set `out`, float, to the sums times their blocks' scales; return whether all of it is finite."""

    # ---- Products of the reducer low_rank; arrays are C-contiguous

    def fill_uniform(self, out: Array, base: int) -> None:
        """Fill `out` with multiples of 2^-23 in [-1, 1): element i from draw(base, i)."""

    def orthogonalise(self, p: Array, base: int) -> None:
        """Make the columns of p, (m, r) float, orthonormal in place, to the accuracy of their dtype.

        Columns that depend on earlier ones are replaced by random ones; those beyond the m-th become zero.
        """

    def back_project(self, m: Array, p: Array, q: Array) -> None:
        """Set q = m.T @ p for m (m, n), p (m, r), q (n, r); one pass, for one rank alone."""

    def outer(self, p: Array, q: Array, out: Array) -> None:
        """Set `out` to p @ q.T, summed as `outer_add` does."""

    def outer_add(self, p: Array, q: Array, out: Array, scale: float = 1.0) -> None:
        """Add scale * p @ q.T to `out`, (m, n), for p (m, r) and q (n, r).

        Element (i, j) is out + sum over t, in this order from zero, of (scale * p[i, t]) * q[j, t].
        """

    # ---- Signs, one bit each: `mpicomp.kernels.cpu.binary` defines the words; a row of n has ceil(n / 64) of them

    def pack_signs(self, x: Array, packed: Array) -> None:
        """Write the signs of the rows of x, (rows, n) float, to packed, (rows, words) uint64."""

    def unpack_signs(self, packed: Array, out: Array, value: float) -> None:
        """Set `out`, (n,) float, to `value` where the bit of `packed`, (words,) uint64, is clear, else to -value."""

    def binary_product(self, a: Array, b: Array, size: int, out: Array) -> None:
        """Set `out`, (m, n) int32, to the products of rows of signs, a (m, words) and b (n, words), of `size` elements.

        Bits behind the last element must be clear in both, as `pack_signs` leaves them.
        """

    def pack_thresholds(self, sums: Array, limits: Array, flips: Array, packed: Array) -> None:
        """Set bit j of row i of packed, (rows, words) uint64, to (sums[i, j] < limits[j]) ^ flips[j].

        sums: (rows, n) int32; limits: (n,) int32; flips: (n,) uint8, 0 or 1.
        """

    def add_votes(self, votes: Array, planes: Array) -> None:
        """Count the bits of votes, (words,) uint64, in planes, (levels, words) uint64, which must not overflow."""

    def majority(self, planes: Array, ranks: int, base: int, start: int, packed: Array) -> None:
        """Set the bits of packed, (words,) uint64, that more than half of the ranks have set.

        Where exactly half have, the bit is that of draw(base, word): word counts from start / 64 on, a whole number.
        """
