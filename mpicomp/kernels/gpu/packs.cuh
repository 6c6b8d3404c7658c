// A thread's share of an array, sixteen bytes at a time where pointers allow it: views into buckets may not.
#include "common.cuh"

constexpr int VEC = 16 / sizeof(T);

// Stores are marked as streaming, evicted first from the L2, which the candidates fit. (A plain store of sixteen bytes
// may also be parted by the compiler, where the branch for misaligned pointers begins with the same four bytes.)
struct __align__(16) Pack {
    T values[VEC];
};
__device__ __forceinline__ void store16(float* to, const float (&from)[4]) {
    __stcs((float4*)to, make_float4(from[0], from[1], from[2], from[3]));
}
__device__ __forceinline__ void store16(double* to, const double (&from)[2]) {
    __stcs((double2*)to, make_double2(from[0], from[1]));
}

// PACKS times VEC elements of `from` from place i on, STEP apart, sixteen bytes at a time where they lie so; where they
// are not `whole`, zeros for those outside 0 .. size.
template <int PACKS, int STEP>
__device__ __forceinline__ void load_packs(const T* from, i64 i, i64 size, bool whole, T (&to)[PACKS][VEC]) {
    if (whole && aligned16(from + i)) {
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            const Pack pack = *(const Pack*)(from + i + p * STEP);
#pragma unroll
            for (int e = 0; e < VEC; e++) to[p][e] = pack.values[e];
        }
    } else {
#pragma unroll
        for (int j = 0; j < PACKS * VEC; j++) {
            const i64 at = i + j / VEC * STEP + j % VEC;
            to[j / VEC][j % VEC] = whole || (at >= 0 && at < size) ? from[at] : T(0);
        }
    }
}

template <int PACKS, int STEP>
__device__ __forceinline__ void store_packs(T* to, i64 i, i64 size, bool whole, const T (&from)[PACKS][VEC]) {
    if (whole && aligned16(to + i)) {
#pragma unroll
        for (int p = 0; p < PACKS; p++) store16(to + i + p * STEP, from[p]);
    } else {
#pragma unroll
        for (int j = 0; j < PACKS * VEC; j++) {
            const i64 at = i + j / VEC * STEP + j % VEC;
            if (whole || (at >= 0 && at < size)) to[at] = from[j / VEC][j % VEC];
        }
    }
}

// The same of x + old, where there is an old.
template <int PACKS, int STEP>
__device__ __forceinline__ void load_sums(const T* x, const T* old, i64 i, i64 size, bool whole, T (&to)[PACKS][VEC]) {
    load_packs<PACKS, STEP>(x, i, size, whole, to);
    if (!old) return;
    T more[PACKS][VEC];
    load_packs<PACKS, STEP>(old, i, size, whole, more);
#pragma unroll
    for (int j = 0; j < PACKS * VEC; j++) to[j / VEC][j % VEC] += more[j / VEC][j % VEC];
}
