// Sums over the threads and the blocks before this one. All lanes and all threads must call these functions.
#include "common.cuh"

template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) value += __shfl_xor_sync(ALL, value, step);
    return value;
}

// The sum of this lane's value and those of the lanes before it.
template <typename A>
__device__ __forceinline__ A warp_inclusive(A value) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const A other = __shfl_up_sync(ALL, value, step);
        if (lane >= step) value += other;
    }
    return value;
}

// The sum of the values of the threads before this one; `total` is that of all. `warps`: 32 words of shared memory,
// free again on return. Every warp scans the sums of all warps itself, which saves a barrier.
template <typename A>
__device__ __forceinline__ A block_exclusive(A value, A* warps, A& total) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const A inclusive = warp_inclusive(value);
    if (lane == WARP - 1) warps[warp] = inclusive;
    __syncthreads();
    const A sums = warp_inclusive(lane < blockDim.x / WARP ? warps[lane] : A(0));
    __syncthreads();
    total = __shfl_sync(ALL, sums, WARP - 1);
    const A before = __shfl_sync(ALL, sums, warp ? warp - 1 : 0);
    return inclusive - value + (warp ? before : A(0));
}

// **Between blocks**: single-pass scan with decoupled look-back (Merrill, Garland 2016). Blocks take tiles by ticket,
// so earlier tiles are finished or in work, whatever the order in which blocks start. A tile's state is one word, read
// and written at once, which needs no fence: a flag and a count below 2^62. States and ticket start as zeros.
constexpr u64 OWN = 1ull << 62;    // the count is that of the tile
constexpr u64 UP_TO = 1ull << 63;  // the count is that of all tiles up to this one
constexpr u64 COUNT = OWN - 1;

// The next tile; `shared`: one word of shared memory, free again on return.
__device__ __forceinline__ i64 next_tile(u64* ticket, i64* shared) {
    if (threadIdx.x == 0) *shared = (i64)atomicAdd(ticket, 1ull);
    __syncthreads();
    const i64 tile = *shared;
    __syncthreads();
    return tile;
}

// The sum of the counts of all tiles before this one, whose count is `count`. Called by one warp of the block.
__device__ __forceinline__ u64 look_back(volatile u64* states, i64 tile, u64 count) {
    const int lane = threadIdx.x % WARP;
    if (lane == 0) states[tile] = (tile ? OWN : UP_TO) | count;
    u64 before = 0;
    for (i64 nearest = tile - 1; nearest >= 0; nearest -= WARP) {
        u64 state = UP_TO;  // nothing precedes the first tile
        if (nearest >= lane)
            while ((state = states[nearest - lane]) < OWN) __nanosleep(20);
        const u32 ends = __ballot_sync(ALL, state >= UP_TO);
        const int last = ends ? __ffs(ends) - 1 : WARP - 1;
        before += warp_sum(lane <= last ? state & COUNT : 0ull);
        if (ends) break;
    }
    if (lane == 0 && tile) states[tile] = UP_TO | (before + count);
    return before;
}

// True in one block only, the last one to call this: it sees all earlier writes of the others by loads that bypass its
// L1 (__ldcg). `arrived` starts as zero; `shared`: one word of shared memory.
__device__ __forceinline__ bool last_block(u64* arrived, u32* shared) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *shared = atomicAdd(arrived, 1ull) == gridDim.x - 1;
    __syncthreads();
    __threadfence();
    return *shared;
}
