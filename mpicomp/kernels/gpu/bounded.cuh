// Numbers as integers of a few bits, within an error bound: mpicomp/kernels/cpu/bounded.py, modes.py and lanes.py
// define every bit.
//
// A warp has a block of 256 numbers, element 32 r + l in register r of lane l; a tile is a block for each warp of a
// CUDA block. Look-back finds where the words of a block begin, so that numbers are read once.
#include "scan.cuh"

constexpr int THREADS = 2048 / sizeof(T), WARPS = THREADS / WARP;  // more doubles than that are too many registers
constexpr int BLOCK = 256, EACH = BLOCK / WARP;
constexpr int BITS = 8 * sizeof(T), LANES = BLOCK / BITS;  // of a word; of packed codes
enum Header { ZEROS = 0, OTHER = 1, PLAIN = 64, DELTA = 128, FOLDED = 192 };

constexpr T MAGIC = sizeof(T) == 4 ? T(0x1.8p23) : T(0x1.8p52);  // added, it rounds to an integer in the low bits
constexpr Bits NORMAL = INFINITE & (~INFINITE + 1);            // the smallest normal number

__device__ __forceinline__ int width_of(u32 value) { return 32 - __clz((int)value); }
__device__ __forceinline__ int width_of(u64 value) { return 64 - __clzll((i64)value); }

__device__ __forceinline__ Bits zigzag(Bits difference) {
    return difference << 1 ^ (difference & SIGN ? ~Bits(0) : Bits(0));
}

__device__ __forceinline__ i64 words_of(int header, int size) {
    if (header < PLAIN) return header == OTHER ? size : 0;
    const int rows = (size + LANES - 1) / LANES;
    return 1 + LANES * ((rows * (header % 64) + BITS - 1) / BITS);
}

// Reduce over a warp, for all its lanes.
template <typename Join>
__device__ __forceinline__ Bits warp_all(Bits value, Join join) {
#pragma unroll
    for (int away = WARP / 2; away; away /= 2) value = join(value, __shfl_xor_sync(ALL, value, away));
    return value;
}
__device__ __forceinline__ Bits warp_least(Bits x) { return warp_all(x, [](Bits a, Bits b) { return min(a, b); }); }
__device__ __forceinline__ Bits warp_most(Bits x) { return warp_all(x, [](Bits a, Bits b) { return max(a, b); }); }
__device__ __forceinline__ Bits warp_or(Bits x) { return warp_all(x, [](Bits a, Bits b) { return a | b; }); }

// A bound, and the conversion of numbers to words and back: see mpicomp/kernels/cpu/bounded.py.
struct Bound {
    bool relative;
    T step, inverse;
    Bits limit;
    int shift;

    __device__ __forceinline__ Bits zero() const { return relative ? SIGN : bits_of(MAGIC); }
    __device__ __forceinline__ Bits word(T x) const {
        if (!relative) return bits_of(x * inverse + MAGIC);
        const Bits m = (magnitude(x) + ((Bits(1) << shift) >> 1)) >> shift;
        return bits_of(x) & SIGN ? SIGN - m : SIGN + m;
    }
    // The number of a word; under a relative bound a zero has the sign of `like`.
    __device__ __forceinline__ T number(Bits q, Bits like) const {
        return relative ? float_of(size(q) << shift | like & SIGN) : (float_of(q) - MAGIC) * step;
    }
    // m of a word, under a relative bound.
    static __device__ __forceinline__ Bits size(Bits q) { return q < SIGN ? SIGN - q : q - SIGN; }
};

// The block of this warp, and the order of tiles: `progress` is the next ticket, a result, the tiles' states.
struct Place {
    i64 tile, number, first;
    int size, warp, lane;  // zero behind the last block

    __device__ __forceinline__ Place(u64* progress, i64* shared, i64 total)
        : tile(next_tile(progress, shared)), warp(threadIdx.x / WARP), lane(threadIdx.x % WARP) {
        number = tile * WARPS + warp, first = number * BLOCK;
        size = (int)max(min(total - first, (i64)BLOCK), (i64)0);
    }
    // Where the words of this block begin, given its `count`, and where the tile's end. Called by all threads.
    __device__ __forceinline__ i64 words_at(u64* progress, i64 count, i64* shared, i64& end) const {
        if (lane == 0) shared[warp] = count;
        __syncthreads();
        const i64 counts = lane < WARPS ? shared[lane] : 0, sum = warp_sum(counts);
        if (warp == 0) {
            const u64 before = look_back(progress + 2, tile, (u64)sum);
            if (lane == 0) shared[WARPS] = (i64)before;
        }
        __syncthreads();
        const i64 before = shared[WARPS];
        end = before + sum;
        return before + warp_sum(lane < warp ? counts : 0);
    }
};

