"""What kernels take and do: the documentation of `mpicomp.kernels.cpu` and `mpicomp.kernels.gpu`.

`Kernels` are the kernels of both implementations, whose results are equal bit by bit; `HostKernels` adds the kernels
for NumPy arrays only. The modules of `mpicomp.kernels.cpu` define every bit and byte.

Unless a kernel says otherwise:

- arrays are C-contiguous and (n,); *float* is float32 or float64, the same for all float arrays of a call;
- `old` is a residual that is added to x, None for zero;
- `new` is set to the part of x + old that the code leaves out; it may be x or old, and None asks for no residual;
- `base` and `start` select random numbers: `Key.base()`, and the place of the array's first element in its unit;
- decoding adds `factor` or `scale` times the decoded numbers to `out`.
"""

from __future__ import annotations

from typing import Protocol

from mpicomp.arrays import Array
from mpicomp.kernels.shared import Bound, Code


class Selection(Protocol):
    """Chosen elements of an array: of `new` of the call that chose them, or of x without a `new`."""

    @property
    def count(self) -> int:
        """How many elements are chosen."""

    def write(self, values: Array, indices: Array, zero: bool = False) -> None:
        """Write the chosen elements, (count,), and their ascending indices, uint32; with `zero` clear them in `new`.

        On the CPU a selection is valid until the same thread selects again.
        """


class Kernels(Protocol):
    """The kernels of every implementation."""

    # ---- Sums and passes that only read or add

    def nonfinite(self, x: Array, old: Array | None = None) -> bool:
        """Return whether any element of x + old is NaN or infinite; one pass."""

    def divide(self, x: Array, divisor: float) -> bool:
        """Divide x in place; return whether all quotients are finite. One pass."""

    def axpy(self, x: Array, out: Array, scale: float = 1.0) -> None:
        """Add scale * x to `out`."""

    def largest(self, x: Array, old: Array | None) -> float:
        """Return the largest magnitude of x + old; one pass."""

    def moments(self, x: Array, old: Array | None, limit: float, factor: float) -> tuple[float, float]:
        """Return the sums of c and of c^2, c = factor * min(|x + old|, limit), by the tree of `sums`; one pass."""

    # ---- Half precision

    def narrow(
        self, x: Array, old: Array | None, new: Array | None, out: Array, dtype: str, saturate: bool = True
    ) -> None:
        """Set `out`, uint16, to the bits of x + old in `dtype`: "float16" or "bfloat16"; one pass."""

    def narrow_at_random(
        self, x: Array, old: Array | None, new: Array | None, out: Array, base: int, start: int
    ) -> None:
        """Set `out`, uint16, to the bits of x + old in bfloat16, rounded up or down at random; one pass."""

    def widen(self, bits: Array, out: Array, dtype: str, scale: float | None = None) -> None:
        """Set `out`, float, to the numbers with these bits in `dtype`, uint16; with a `scale` add scale times them."""

    # ---- Selection

    def select_top(self, x: Array, old: Array | None, new: Array | None, k: int, share: float = 0.0) -> Selection:
        """Choose the k largest magnitudes of x + old, 0 < k <= n <= 2^32; `new` is set to x + old.

        Exact; of equal magnitudes those with the lowest indices. With a `share` a threshold is taken from a sample of
        size = min(n, max(4096, ceil(share * n))) elements, the ceil(k * size / n)-th largest of it: if fewer than k
        elements reach it, exactly these are chosen. Element i of the sample is at i s + ((draw(0, i) >> 32) * s >> 32)
        of x + old, s = n // size.
        """

    def select_above(self, x: Array, old: Array | None, new: Array | None, value: float) -> Selection:
        """Choose the elements of x + old with a magnitude of at least `value` > 0; `new` is set to x + old."""

    def block_top_k(
        self, x: Array, old: Array | None, new: Array | None, block: int, k: int, values: Array, indices: Array
    ) -> None:
        """Select the k largest magnitudes of x + old in every block of `block` elements.

        values, (m,), and indices, (m,) uint32, ascend by index; the last block gives m less those of the others.
        Exact; of equal magnitudes the lowest indices.
        """

    # ---- Sparse vectors: `mpicomp.kernels.cpu.indices` defines the bytes of indices

    def encode_bitmap(self, indices: Array, out: Array) -> None:
        """Write ascending indices, (k,) uint32, as a bitmap, (ceil(size / 8),) uint8."""

    def add_bitmap(self, data: Array, values: Array, out: Array, scale: float = 1.0) -> None:
        """Add scale * values, (k,), to `out` at the k places of a bitmap.

        If there are not k places below out.size, the CPU raises WireFormatError; the GPU ignores the others.
        """

    def encode_elias_fano(self, indices: Array, width: int, out: Array) -> None:
        """Write ascending indices, (k,) uint32, k > 0, as an Elias-Fano code of that width, uint8."""

    def add_elias_fano(self, data: Array, width: int, values: Array, out: Array, scale: float = 1.0) -> None:
        """Add scale * values, (k,), to `out` at the k places of an Elias-Fano code; errors as in `add_bitmap`."""

    def gather(
        self, x: Array, old: Array | None, new: Array | None, indices: Array, values: Array, factor: float = 1.0
    ) -> None:
        """Set values = factor * (x + old)[indices], and `new` to x + old less these values at their places.

        indices: (k,) uint32, distinct. Without `new` there is no `old`, and only the elements chosen are read.
        """

    def scatter_add(self, indices: Array, values: Array, out: Array, scale: float = 1.0) -> None:
        """Add scale * values to out[indices]; indices: (k,) uint32, distinct.

        The CPU does not check that indices are below out.size; the GPU ignores the others.
        """

    def put_at(self, indices: Array, values: Array, out: Array) -> None:
        """Set out[indices] = values; indices: (k,) uint32."""

    def random_support(self, size: int, k: int, base: int, start: int = 0) -> Array:
        """Return k distinct positions below `size` <= 2^32, ascending, uint32; every subset is equally likely."""

    # ---- Blocks of small integers: `mpicomp.kernels.cpu.quantize` defines grids, rules and bytes

    def encode_blocks(
        self, x: Array, old: Array | None, new: Array | None, scales: Array, lows: Array | None, codes: Array, how: Code
    ) -> None:
        """Quantise x + old, block by block, into `scales` and `lows`, float, one per block, and packed `codes`, uint8.

        `lows` is for the grid "range". The rule "shared" exists for NumPy arrays only.
        """

    def decode_blocks(
        self, scales: Array, lows: Array | None, codes: Array, out: Array, how: Code, factor: float, fresh: bool
    ) -> None:
        """Add factor times the numbers of the codes to `out` or, if it is `fresh`, to zeros.

        There is one scale per block, or a single one for all.
        """

    def encode_sign(self, x: Array, old: Array | None, new: Array | None, scales: Array, packed: Array) -> None:
        """Write the signs of x + old to `packed`, and to `scales` its mean magnitude, (1,), or two means, (2,).

        The two means are those of x + old >= 0 and of x + old < 0. x and old are read once, `new` is written and then
        updated in a second pass. See `mpicomp.kernels.cpu.sign`.
        """

    # ---- Small floats and powers of two: `mpicomp.kernels.cpu.floats`

    def encode_floats(
        self, x: Array, old: Array | None, new: Array | None, exponents: Array | None, packed: Array, name: str
    ) -> None:
        """Write x + old as codes of the format `name`, "e4m3", "e5m2" or "e2m1", to packed, uint8; one pass.

        With `exponents`, (groups,) uint8, every 32 elements are first divided by 2^(exponent - 127), which gives the
        largest of them the format's largest exponent; an exponent beyond 0 .. 254 becomes the nearest.
        """

    def decode_floats(self, exponents: Array | None, packed: Array, out: Array, name: str, factor: float = 1.0) -> None:
        """Add factor times the numbers of the codes to `out`."""

    def encode_powers(
        self, x: Array, old: Array | None, new: Array | None, scales: Array, codes: Array, how: Code
    ) -> None:
        """Write x + old as signed powers of two, codes (n,) uint8, times a scale per block; one pass.

        Grid, bits, rule, levels and rounding of `how` do not count.
        """

    def decode_powers(self, scales: Array, codes: Array, out: Array, block: int, factor: float = 1.0) -> None:
        """Add factor times the numbers of the codes to `out`."""

    # ---- Error bounds: `mpicomp.kernels.cpu.bounded`

    def encode_bounded(
        self, x: Array, old: Array | None, new: Array | None, headers: Array, words: Array, bound: Bound
    ) -> int:
        """Encode x + old within an error bound; return how many words were written. One pass.

        headers: (blocks,) uint8; words: (n,) or more, uint32 for float32, uint64 for float64.
        """

    def decode_bounded(self, headers: Array, words: Array, out: Array, bound: Bound, factor: float = 1.0) -> None:
        """Add factor times the numbers of the codes to `out`; one pass.

        For an unknown block, or one outside `words`, the CPU raises WireFormatError; the GPU ignores it.
        """

    # ---- Rotations: `mpicomp.kernels.cpu.hadamard`

    def rotate(self, x: Array, old: Array | None, y: Array, base: int, start: int) -> None:
        """Set y to the rotation of x + old; one pass."""

    def unrotate(self, y: Array, base: int, start: int) -> None:
        """Undo `rotate` in place."""

    def spread(self, x: Array, old: Array | None, a: Array, base: int, start: int) -> None:
        """Set `a` to the Kashin representation of x + old; one pass."""

    def unspread(self, a: Array, out: Array, base: int, start: int) -> None:
        """Set `out` to the numbers that `a` represents; `a` is spent: the CPU overwrites it."""

    def left_out(self, x: Array, old: Array | None, z: Array, scale: float, new: Array) -> None:
        """Set new = x + old - scale * z."""

    def products(self, y: Array, z: Array) -> tuple[float, float]:
        """Return the sums of y * y and of y * z, by the tree of `sums`."""


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
