// Folds of the summation tree that mpicomp/kernels/cpu/sums.py defines: 1024 numbers per block, as double, halved ten
// times, so that bit 9 of a number's place is folded first and bit 0 last. A number may be kept anywhere, as long as
// bits are folded in that order; zeros beyond the last number change nothing. All lanes must call these functions.
#include "common.cuh"

constexpr int TREE = 1024;

// The sum of value(k), k < N, of one thread, those with the highest bit of k folded first. Depth first, so that a
// handful of numbers is in registers instead of N.
template <int N, int APART = 1, typename F>
__device__ __forceinline__ auto fold_each(F value, int k = 0) {
    if constexpr (APART == N) return value(k);
    else return fold_each<N, 2 * APART>(value, k) + fold_each<N, 2 * APART>(value, k + APART);
}

template <int N>
__device__ __forceinline__ double fold_own(const double (&v)[N]) {
    return fold_each<N>([&](int k) { return v[k]; });
}

// The sum over a warp of 32 V numbers, number V lane + c in v[c], to all lanes; overwrites v. While a lane has several,
// it exchanges half of them for the same half of another lane's: V + 4 shuffles instead of 5 V.
template <int V>
__device__ __forceinline__ double fold_warp(double (&v)[V]) {
    int step = WARP / 2;
#pragma unroll
    for (int half = V / 2; half; half /= 2, step /= 2) {
        const bool upper = threadIdx.x & step;
#pragma unroll
        for (int c = 0; c < half; c++) {
            const double given = upper ? v[c] : v[c + half];
            v[c] = (upper ? v[c + half] : v[c]) + __shfl_xor_sync(ALL, given, step);
        }
    }
#pragma unroll
    for (; step; step /= 2) v[0] += __shfl_xor_sync(ALL, v[0], step);
#pragma unroll
    for (int half = V / 2, apart = WARP / 2; half; half /= 2, apart /= 2) v[0] += __shfl_xor_sync(ALL, v[0], apart);
    return v[0];
}

// The sum over a warp of one number per lane, to all lanes.
__device__ __forceinline__ double fold_lanes(double value) {
    double v[1] = {value};
    return fold_warp(v);
}

// The sum over a block of 32 W threads of one number per thread, to all threads. `shared`: 32 W numbers, free again on
// return. With 256 threads, thread t brings ((t) + (t + 512)) + ((t + 256) + (t + 768)): `fold_own` of t + 256 k.
template <int W>
__device__ __forceinline__ double fold_block(double value, double* shared) {
    shared[threadIdx.x] = value;
    __syncthreads();
    double v[W];
#pragma unroll
    for (int k = 0; k < W; k++) v[k] = shared[threadIdx.x % WARP + k * WARP];
    const double sum = fold_lanes(fold_own(v));
    __syncthreads();
    return sum;
}

// The sum over a warp of value(i), i < size <= 1024, to all lanes.
template <typename F>
__device__ __forceinline__ double fold_tree(int size, F value) {
    const int lane = threadIdx.x % WARP;
    return fold_lanes(fold_each<TREE / WARP>([&](int k) {
        const int i = lane + k * WARP;
        return i < size ? value(i) : 0.0;
    }));
}

// The total of `size` <= 2^15 sums of blocks, none of them -0, by a block of 1024 threads and to all of them. `shared`:
// 32 numbers, free again on return.
__device__ __forceinline__ double fold_sums(const double* sums, i64 size, double* shared) {
    const int warp = threadIdx.x / WARP, first = warp * TREE;
    const double sum = fold_tree((int)min(size - first, (i64)TREE), [&](int i) { return sums[first + i]; });
    if (threadIdx.x % WARP == 0) shared[warp] = sum;
    __syncthreads();
    const double total = fold_lanes(shared[threadIdx.x % WARP]);
    __syncthreads();
    return total;
}

// The smallest power of two that holds `size` <= 1024 numbers; folds start there, and zeros fill it up.
__device__ __forceinline__ int filled(i64 size) {
    return size >= TREE ? TREE : size <= 1 ? 1 : 1 << (32 - __clz((int)size - 1));
}

// Finish the tree over sums[:count], with room behind them for the levels above.
__device__ double finish_tree(double* sums, i64 count) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    while (count > 1) {
        const i64 blocks = (count + TREE - 1) / TREE;
        for (i64 block = warp; block < blocks; block += warps) {
            double* own = sums + block * TREE;
            const int size = (int)min(count - block * TREE, (i64)TREE);
            for (int width = filled(size) / 2; width; width /= 2) {
                for (int i = lane; i < width; i += WARP) own[i] += i + width < size ? own[i + width] : 0.0;
                __syncwarp();
            }
            if (lane == 0) sums[count + block] = own[0];
        }
        __syncthreads();
        sums += count;
        count = blocks;
    }
    return *sums;
}

// The value of a missing number i of a block: a zero up to `full`, and beyond, where the tree folds nothing, -0, which
// changes no sum.
__device__ __forceinline__ double missing(int i, int full) { return i < full ? 0.0 : -0.0; }
