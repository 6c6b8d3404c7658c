"""Random numbers from a counter, and random supports.

**The generator.** draw(base, i) for 0 <= i < 2^64 is SplitMix64's i-th output from state `base` (Steele, Lea, Flood
2014), all arithmetic modulo 2^64:

    z = base + (i + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    draw = z ^ (z >> 31)

`base` comes from `Key.base()` and i is a position in the unit, so chunks, shards and the device change no bit. A
uniform number in [0, 1) is (draw >> 40) * 2^-24, exact in float32.

Where every element needs a number of its own, 32 bits are enough and vectorise better: draw32(base, i), all arithmetic
modulo 2^32, is Wellons' lowbias32 with two words of key (i = low + 2^32 high, base = first + 2^32 second):

    x = low + first
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ (second + high * 0x9E3779B9)) * 0x846CA68B
    draw32 = x ^ (x >> 16)

For stochastic rounding, (draw32 >> 8) * 2^-24 is the uniform number of element i.

**A support** is a uniformly distributed subset of k out of n positions: Floyd's algorithm (Bentley, Floyd 1987) on a
bitmap, for j = n - k .. n - 1: t uniform in 0..j, insert t, or j if t is already in. Step number s = j - (n - k)
starts from draw(draw(base, start), s), so that `start` selects one of 2^64 independent supports; its high 32 bits h
give t = h * (j + 1) >> 32, and if the low 32 bits of that product are below 2^32 mod (j + 1) the word is redrawn as
draw(word, 0), which makes t exactly uniform (Lemire 2019). For k > n / 2 the complement is drawn.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpicomp.arrays import Array
from mpicomp.kernels.cpu.bits import lowest
from mpicomp.kernels.cpu.compile import inline, kernel

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST = np.uint64(0xBF58476D1CE4E5B9)
SECOND = np.uint64(0x94D049BB133111EB)
ONE, ZERO = np.uint64(1), np.uint64(0)
S27, S30, S31, S32, S40 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32), np.uint64(40)
LOW32 = np.uint64(0xFFFFFFFF)
WORD = np.uint64(64)  # bits
UNIT = 2.0**-24
U = np.uint32
MIX, MIX2, HIGH = U(0x7FEB352D), U(0x846CA68B), U(0x9E3779B9)
S8, S15, S16 = U(8), U(15), U(16)


@inline
def draw(base: Any, counter: Any) -> Any:
    """Return 64 random bits; base and counter are uint64."""
    z = base + (counter + ONE) * GOLDEN
    z = (z ^ (z >> S30)) * FIRST
    z = (z ^ (z >> S27)) * SECOND
    return z ^ (z >> S31)


@inline
def draw24(base: Any, counter: Any) -> Any:
    """Return 24 random bits as int32."""
    return np.int32(draw(base, counter) >> S40)


@inline
def mix(low: Any, first: Any, second: Any) -> Any:
    """Return draw32 of a counter's low word, the key's first word, and `second` plus the counter's high word mixed."""
    x = U(low + first)
    x = U(U(x ^ U(x >> S16)) * MIX)
    x = U(U(U(x ^ U(x >> S15)) ^ second) * MIX2)
    return U(x ^ U(x >> S16))


@inline
def draw32(base: Any, counter: Any) -> Any:
    """Return 32 random bits as uint32; base and counter are uint64."""
    return mix(U(counter), U(base), U(U(base >> S32) + U(U(counter >> S32) * HIGH)))


@inline
def draws32(base: Any, start: int, size: int, out: Any) -> None:
    """Set out[:size], uint32, to draw32 of the counters from `start` on; vectorises."""
    first = np.uint64(start)
    if (first >> S32) == ((first + np.uint64(size)) >> S32):
        low, one, two = U(first), U(base), U(U(base >> S32) + U(U(first >> S32) * HIGH))
        for i in range(size):
            out[i] = mix(U(low + U(i)), one, two)
    else:
        for i in range(size):
            out[i] = draw32(base, first + np.uint64(i))


@inline
def unit24(word: Any) -> Any:
    """Return the upper 24 of 32 random bits as int32; times UNIT a uniform number in [0, 1)."""
    return np.int32(word >> S8)


@kernel("T[], u8")
def _fill_uniform(out: Any, base: Any) -> None:
    one = out.dtype.type(1)
    scale = one / out.dtype.type(1 << 23)
    for i in range(out.size):
        out[i] = out.dtype.type(draw24(base, np.uint64(i)) - np.int32(1 << 23)) * scale


def fill_uniform(out: Array, base: int) -> None:
    _fill_uniform(out, np.uint64(base))


@inline
def below(bound: Any, word: Any) -> Any:
    """Return an exactly uniform number below `bound` <= 2^32 from a random word, which is redrawn if necessary."""
    product = (word >> S32) * bound
    if (product & LOW32) < bound:
        reject = (ONE << S32) % bound
        while (product & LOW32) < reject:
            word = draw(word, ZERO)
            product = (word >> S32) * bound
    return product >> S32


@kernel("i8, u8, u8, u4[]")
def _support(n: int, base: Any, start: Any, out: Any) -> None:
    k = out.size
    own = draw(base, start)
    drawn = min(k, n - k)
    bitmap = np.zeros((n + 63) // 64, np.uint64)
    for step in range(drawn):
        j = np.uint64(n - drawn + step)
        t = below(j + ONE, draw(own, np.uint64(step)))
        if (bitmap[t // WORD] >> (t % WORD)) & ONE:
            t = j
        bitmap[t // WORD] |= ONE << (t % WORD)
    count = 0
    for place in range(bitmap.size):
        word = bitmap[place]
        if drawn < k:
            word = ~word
            if place == bitmap.size - 1 and n % 64:
                word &= (ONE << np.uint64(n % 64)) - ONE
        while word != ZERO:
            out[count] = np.uint32(place * 64 + lowest(word))
            count += 1
            word &= word - ONE


def random_support(size: int, k: int, base: int, start: int = 0) -> Array:
    out = np.empty(k, np.uint32)
    _support(size, np.uint64(base), np.uint64(start), out)
    return out
