// Rows of numbers in one access, and float16 and bfloat16 by integer arithmetic: mpicomp/kernels/cpu/convert.py.
#include "common.cuh"

constexpr int THREADS = 256;
// Elements of one thread: it loads 64 bytes of every array ahead, which saturates memory.
constexpr int EACH = 64 / sizeof(T);
constexpr int TILE = THREADS * EACH;

// K numbers that are read or written at once, by accesses of up to 16 bytes.
template <int K, typename A>
struct alignas(K * sizeof(A) < 16 ? K * sizeof(A) : 16) Row {
    A part[K];
    __device__ __forceinline__ A& operator[](int k) { return part[k]; }
    __device__ __forceinline__ const A& operator[](int k) const { return part[k]; }
};
template <int K, typename A>
__device__ __forceinline__ Row<K, A> row_at(const A* x, i64 i) { return *(const Row<K, A>*)(x + i); }
template <int K, typename A>
__device__ __forceinline__ void put_row(A* out, i64 i, const Row<K, A>& row) { *(Row<K, A>*)(out + i) = row; }

// Whether rows of four can be accessed from here on; a null pointer passes.
template <typename A>
__device__ __forceinline__ bool fits_rows(const A* pointer) { return (u64)pointer % alignof(Row<4, A>) == 0; }

// The rows of K elements that a thread takes of a tile; an incomplete tile has K = 1.
template <int K>
struct Tile {
    static constexpr int ROWS = EACH / K;
    i64 size;
    __device__ __forceinline__ i64 at(int row) const {
        return (i64)blockIdx.x * TILE + (row * THREADS + (int)threadIdx.x) * K;
    }
    __device__ __forceinline__ bool has(int row) const { return K > 1 || at(row) < size; }
};

// Whether this block's tile is whole.
__device__ __forceinline__ bool whole_tile(i64 size) { return ((i64)blockIdx.x + 1) * TILE <= size; }

// The rows of x + old; all loads are issued before the first sum.
template <int K, int ROWS, typename Place>
__device__ __forceinline__ void load_rows(const Place& place, const T* x, const T* old, Row<K, T> (&v)[ROWS]) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) v[r] = place.has(r) ? row_at<K>(x, place.at(r)) : Row<K, T>{};
    if (!old) return;
    Row<K, T> other[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) other[r] = place.has(r) ? row_at<K>(old, place.at(r)) : Row<K, T>{};
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int k = 0; k < K; k++) v[r][k] += other[r][k];
}

constexpr u32 SIGN32 = 0x80000000u, INFINITE32 = 0x7f800000u;

// The bits of a float, or of a double rounded to odd, so that rounding again is rounding once.
__device__ __forceinline__ u32 single(float value) { return bits_of(value); }
__device__ __forceinline__ u32 single(double value) {
    const u64 word = bits_of(value);
    // The device's conversion returns one NaN for all; that of a CPU keeps sign and payload.
    if (value != value) return (u32)(word >> 32) & SIGN32 | 0x7fc00000u | (u32)(word >> 29) & 0x7fffffu;
    const float near = (float)value;
    const double back = near;
    u32 bits = bits_of(near);
    if (fabs(back) > fabs(value)) bits -= 1;
    return back != value ? bits | 1u : bits;
}

// With half as many instructions again, integer units would limit the speed instead of memory.
// Subnormals are rounded by adding 0.5, whose last place is theirs (Giesen, "Float to half").
struct Half {
    static constexpr u32 OVER = 0x477ff000u;  // 65520, the smallest magnitude that would round to infinity
    static constexpr u32 INFINITE = 0x7c00u;
    static __device__ __forceinline__ u32 from(u32 bits) {
        const u32 size = bits & ~SIGN32, finite = min(size, 0x477fefffu);  // 65520 would round to infinity
        const u32 normal = finite + 0xc8000fffu + (finite >> 13 & 1) >> 13;
        const u32 small = bits_of(float_of(size) + 0.5f) - 0x3f000000u;
        u32 half = size < 0x38800000u ? small : normal;  // 2^-14
        if (size == INFINITE32) half = 0x7c00;
        if (size > INFINITE32) half = 0x7e00;
        return half | (bits & SIGN32) >> 16;
    }
    static __device__ __forceinline__ float number(u32 half) {
        const u32 size = (half & 0x7fff) << 13, normal = size + (112u << 23);
        const u32 small = bits_of(float_of(normal + (1u << 23)) - 0x1p-14f);
        u32 bits = size < 1u << 23 ? small : normal;
        if (normal >= 0x47800000u) bits = normal + (112u << 23);  // infinity and NaN
        return float_of(bits | (half & 0x8000) << 16);
    }
};

struct Bfloat {
    static constexpr u32 OVER = 0x7f7f8000u;
    static constexpr u32 INFINITE = 0x7f80u;
    static __device__ __forceinline__ u32 from(u32 bits) {
        const u32 size = bits & ~SIGN32;
        u32 near = bits + 0x7fff + (bits >> 16 & 1);  // infinity stays; only for NaN can a carry reach the sign
        if (size - 0x7f7f8000u < INFINITE32 - 0x7f7f8000u) near = bits;  // it would become infinite
        if (size > INFINITE32) near = bits | 0x400000;
        return near >> 16;
    }
    static __device__ __forceinline__ float number(u32 bits) { return float_of(bits << 16); }
};
