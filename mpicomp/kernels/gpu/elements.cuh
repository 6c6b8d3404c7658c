// Passes over elements with accesses of sixteen bytes, for arrays that begin anywhere in a bucket.
#include "common.cuh"

// The K numbers that a thread takes at a time, `APART` from each other, in accesses of sixteen bytes if WIDE.
template <int COUNT, int APART, bool SIXTEEN_BYTES>
struct Access {
    static constexpr int K = COUNT;
    static constexpr bool WIDE = SIXTEEN_BYTES;

    template <typename A>
    static __device__ __forceinline__ void load(const A* at, A (&v)[K]) {
        if constexpr (WIDE) {
            struct alignas(16) Sixteen { A part[16 / sizeof(A)]; };
#pragma unroll
            for (int k = 0; k < K; k += 16 / sizeof(A)) {
                const Sixteen read = *(const Sixteen*)(at + k);
#pragma unroll
                for (int e = 0; e < 16 / sizeof(A); e++) v[k + e] = read.part[e];
            }
        } else {
#pragma unroll
            for (int k = 0; k < K; k++) v[k] = at[k * APART];
        }
    }

    // v = at + old, or at without an old.
    template <typename A>
    static __device__ __forceinline__ void load_sum(const A* at, const A* old, i64 i, A (&v)[K]) {
        load(at + i, v);
        if (old) {
            A more[K];
            load(old + i, more);
#pragma unroll
            for (int k = 0; k < K; k++) v[k] += more[k];
        }
    }

    template <typename A>
    static __device__ __forceinline__ void store(A* at, const A (&v)[K]) {
        if constexpr (WIDE) {
            struct alignas(16) Sixteen { A part[16 / sizeof(A)]; };
#pragma unroll
            for (int k = 0; k < K; k += 16 / sizeof(A)) {
                Sixteen written;
#pragma unroll
                for (int e = 0; e < 16 / sizeof(A); e++) written.part[e] = v[k + e];
                *(Sixteen*)(at + k) = written;
            }
        } else {
#pragma unroll
            for (int k = 0; k < K; k++) at[k * APART] = v[k];
        }
    }
};
using Adjacent = Access<4, 1, true>;
using Strided = Access<4, WARP, false>;  // a warp still reads 128 bytes or more at once
using Single = Access<1, 1, false>;

// The number of elements before the first multiple of sixteen bytes, -1 if arrays differ; null pointers are ignored.
template <typename A>
__device__ __forceinline__ int head_of(const A* x, const A* y, const A* z) {
    const u64 offset = (u64)x & 15;
    if ((y && ((u64)y & 15) != offset) || (z && ((u64)z & 15) != offset)) return -1;
    return (int)((16 - offset) % 16 / sizeof(A));
}

// Call act(n) for this thread's share of n < count, two at a time, so that a pass that only reads has two loads ahead.
template <typename Act>
__device__ __forceinline__ void stride(i64 count, Act act) {
    const i64 threads = threads_of_grid();
    i64 n = thread_of_grid();
    for (; n + threads < count; n += 2 * threads) {
        act(n);
        act(n + threads);
    }
    if (n < count) act(n);
}

// Call act(access, i) so that every element is part of one call; a thread may have any number of calls. A second pass
// goes backwards: the L2 may still have what the first one read last.
template <typename Act>
__device__ __forceinline__ void visit_elements(i64 size, int head, Act act, bool backwards = false) {
    const i64 before = head < 0 ? 0 : min((i64)head, size);
    const i64 whole = (size - before) / (4 * WARP) * WARP;  // calls that take four elements
    auto turned = [&](i64 n) { return backwards ? whole - 1 - n : n; };
    if (head >= 0) stride(whole, [&](i64 n) { act(Adjacent(), before + 4 * turned(n)); });
    else stride(whole, [&](i64 n) { act(Strided(), 4 * turned(n) - 3 * (turned(n) % WARP)); });
    const i64 after = before + 4 * whole;
    for (i64 n = thread_of_grid(); n < before + size - after; n += threads_of_grid())
        act(Single(), n < before ? n : after + n - before);
}
