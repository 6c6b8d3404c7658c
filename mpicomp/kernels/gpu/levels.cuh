// The upper levels of the summation tree, and its smallest blocks, to the sign of a zero; see tree.cuh.
#include "tree.cuh"

// The smallest power of two that holds `size` <= 1024 numbers; folds start there, and zeros fill it up.
__device__ __forceinline__ int filled(i64 size) {
    return size >= TREE ? TREE : size <= 1 ? 1 : 1 << (32 - __clz((int)size - 1));
}

// Finish the tree over sums[:count], with room behind them for the levels above.
__device__ double total(double* sums, i64 count) {
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

// What stands for a number i that a block filled up to `full` has not: a zero, and beyond that, where a fold adds
// nothing, -0, which changes nothing.
__device__ __forceinline__ double missing(int i, int full) { return i < full ? 0.0 : -0.0; }
