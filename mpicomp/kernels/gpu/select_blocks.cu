// Selection within one block of threads: of a sample, and of every block of an array.
#include "random.cuh"
#include "select.cuh"

// A sample of x + old: one element of each of `sampled` strides, by hash within the stride, so that no period of the
// data matches that of the sample. With a `rank`, the last block sets `low` to its rank-th largest magnitude, at least
// 1: or all zeros of a sum of sparse arrays would be candidates.
constexpr int EACH = 16;  // elements of a thread that selects: samples have 16384 at most
extern "C" __global__ void __launch_bounds__(1024) sample(const T* x, const T* old, i64 size, T* out, i64 sampled, i64 rank, u64* low, u64* arrived) {
    __shared__ u32 bins[BYTES], warps[WARP], shared;
    __shared__ Found found;
    const i64 i = thread_of_grid(), stride = size / sampled;
    if (i < sampled) {
        const i64 place = i * stride + (i64)((draw(0, (u64)i) >> 32) * (u64)stride >> 32);
        out[i] = with(old, place, x[place]);
    }
    if (rank == 0 || !last_block(arrived, &shared)) return;
    T values[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const i64 at = (i64)j * blockDim.x + threadIdx.x;
        values[j] = at < sampled ? __ldcg(out + at) : T(0);
    }
    const auto each = [&](auto look) {
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if ((i64)j * blockDim.x + threadIdx.x < sampled) look(magnitude(values[j]));
    };
    const Bits exact = block_threshold(each, (u32)rank, true, bins, warps, &found).exact;
    if (threadIdx.x == 0) *low = max(exact, Bits(1));
}

// The k largest of every block, one block of threads each. An array's block of at most one pack per thread stays in
// registers; a larger one is read again for every digit, from the cache. `new`, which may be x or old, is written last.
extern "C" __global__ void __launch_bounds__(1024) block_top_k(const T* x, const T* old, T* rest, i64 size, i64 block, i64 k, i64 written, T* values, u32* indices) {
    __shared__ u32 bins[BYTES], warps[WARP];
    __shared__ Found found;
    const i64 first = (i64)blockIdx.x * block, length = min(block, size - first);
    const i64 row = (i64)blockDim.x * VEC;
    T mine[1][VEC];
    const auto load = [&](i64 start) {
        const i64 i = start + (i64)threadIdx.x * VEC;
        load_sums<1, 0>(x + first, old ? old + first : old, i, length, i + VEC <= length, mine);
    };
    const bool kept = length <= row;
    if (kept) load(0);
    const auto each = [&](auto look) {
        for (i64 start = 0; start < length; start += row) {
            if (!kept) load(start);
            const i64 i = start + (i64)threadIdx.x * VEC;
#pragma unroll
            for (int e = 0; e < VEC; e++)
                if (i + e < length) look(magnitude(mine[0][e]));
        }
    };
    i64 at = (i64)blockIdx.x * k;  // where this block writes
    const u32 rank = (u32)(blockIdx.x + 1 < gridDim.x ? k : written - at);
    const Threshold threshold = block_threshold(each, rank, false, bins, warps, &found);
    u32 ties = (u32)threshold.ties;
    for (i64 start = 0; start < length; start += row) {
        if (!kept) load(start);
        const i64 i = start + (i64)threadIdx.x * VEC;
        u32 counts = 0;  // of elements above in the lower half, of ties in the upper
#pragma unroll
        for (int e = 0; e < VEC; e++) {
            const Bits one = magnitude(mine[0][e]);
            if (i + e < length) counts += (one > threshold.exact) + ((u32)(one == threshold.exact) << 16);
        }
        u32 all;
        const u32 before = block_exclusive(counts, warps, all);
        u32 above = before & 0xffff, tied = before >> 16;
#pragma unroll
        for (int e = 0; e < VEC; e++) {
            const Bits one = magnitude(mine[0][e]);
            const bool over = i + e < length && one > threshold.exact;
            const bool tie = i + e < length && one == threshold.exact;
            if (over || (tie && tied < ties)) {
                const i64 to = at + above + min(tied, ties);
                values[to] = mine[0][e];
                indices[to] = (u32)(first + i + e);
                mine[0][e] = 0;
            }
            above += over;
            tied += tie;
        }
        const u32 taken = min(all >> 16, ties);
        at += (all & 0xffff) + taken;
        ties -= taken;
        if (rest) store_packs<1, 0>(rest + first, i, length, i + VEC <= length, mine);
    }
}
