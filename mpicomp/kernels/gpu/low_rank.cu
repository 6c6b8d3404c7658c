// What the reducer low_rank does beside its products, for all units in one launch: mpicomp/reducers/low_rank.py.
#include "common.cuh"

// out = factor * (x + old) for every part, without an x zero: a part begins at `from` in x and old, at `to` in out.
// Each has `share` blocks: some of a short one have nothing to do.
extern "C" __global__ void __launch_bounds__(256) copy_parts(const T* x, const T* old, T* out, const i64* from, const i64* to, const i64* sizes, i64 share, double factor) {
    const u32 part = blockIdx.x / (u32)share;
    const i64 size = sizes[part], step = share * blockDim.x;
    const i64 source = from[part];
    out += to[part];
    const T scale = (T)factor;
    for (i64 i = (i64)(blockIdx.x % (u32)share) * blockDim.x + threadIdx.x; i < size; i += step)
        out[i] = x ? scale * with(old, source + i, x[source + i]) : (T)0;
}

// The exponent that frexp gives for 0 < x < inf: x is 2^exponent times a number in [1/2, 1).
__device__ int exponent_of(double x) {
    const int shift = x < 0x1p-1022 ? 54 : 0;  // subnormal
    return (int)(bits_of(shift ? x * 0x1p54 : x) >> 52) - 1022 - shift;
}

// 2^exponent, subnormal ones too.
__device__ double power(int exponent) {
    return float_of(exponent < -1022 ? (u64)1 << (exponent + 1074) : (u64)(exponent + 1023) << 52);
}

// next = q * 2^k with its largest magnitude in [1/2, 1); `last` where all of q is zero. A block a matrix.
//
// One rounding, as ldexp has: double holds what a float becomes. Of a double, 2^k may be too large, hence two factors,
// which are exact; where k < 0 there is but one.
constexpr int THREADS = 512;

extern "C" __global__ void __launch_bounds__(512) normalise(const T* q, const T* last, T* next, i64 size, const i64* places) {
    __shared__ Bits tops[THREADS / WARP];
    const i64 place = places[blockIdx.x];
    q += place;
    last += place;
    next += place;
    Bits top = 0;
#pragma unroll 4
    for (i64 i = threadIdx.x; i < size; i += THREADS) top = max(top, magnitude(q[i]));
    for (int width = WARP / 2; width; width /= 2) top = max(top, __shfl_xor_sync(ALL, top, width));
    if (threadIdx.x % WARP == 0) tops[threadIdx.x / WARP] = top;
    __syncthreads();
    for (int warp = 0; warp < THREADS / WARP; warp++) top = max(top, tops[warp]);
    const int k = top ? -exponent_of((double)float_of(top)) : 0;
    const double first = power(k > 0 ? k / 2 : k), second = power(k > 0 ? k - k / 2 : 0);
#pragma unroll 4
    for (i64 i = threadIdx.x; i < size; i += THREADS) next[i] = top ? (T)((double)q[i] * first * second) : last[i];
}
