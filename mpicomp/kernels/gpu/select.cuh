// Packs of sixteen bytes, and radix selection of the k-th largest magnitude.
#include "scan.cuh"

constexpr int VEC = 16 / sizeof(T);

// Stores are marked as streaming: the L2 evicts them first and keeps the candidates. (The compiler may also split a
// plain store of sixteen bytes, because the branch for misaligned pointers begins with the same four bytes.)
struct __align__(16) Pack {
    T values[VEC];
};
__device__ __forceinline__ void store16(float* to, const float (&from)[4]) {
    __stcs((float4*)to, make_float4(from[0], from[1], from[2], from[3]));
}
__device__ __forceinline__ void store16(double* to, const double (&from)[2]) {
    __stcs((double2*)to, make_double2(from[0], from[1]));
}

// PACKS times VEC elements of `from` from place i on, STEP apart, sixteen bytes at a time if aligned; unless they are
// `whole`, zeros for places outside 0 .. size.
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

// The same of x + old, or of x without an old.
template <int PACKS, int STEP>
__device__ __forceinline__ void load_sums(const T* x, const T* old, i64 i, i64 size, bool whole, T (&to)[PACKS][VEC]) {
    load_packs<PACKS, STEP>(x, i, size, whole, to);
    if (!old) return;
    T more[PACKS][VEC];
    load_packs<PACKS, STEP>(old, i, size, whole, more);
#pragma unroll
    for (int j = 0; j < PACKS * VEC; j++) to[j / VEC][j % VEC] += more[j / VEC][j % VEC];
}

constexpr int WIDTH = 8 * sizeof(T) - 1;  // bits of a magnitude

// The elements whose digits are counted: those with the bits of `base` from `high` up; the digit is the bits from `low`
// up to `high`.
struct Digits {
    Bits base;
    int high, low;

    __device__ __forceinline__ bool holds(Bits size) const { return size >> high == base >> high; }
    __device__ __forceinline__ int of(Bits size) const { return (int)(size >> low & ((Bits(1) << (high - low)) - 1)); }
};

struct Found {
    u64 digit, rank, count;
};

// The digit of the `rank`-th largest, 1 <= rank, where counts(digit) is how often each occurs; its rank among the
// elements with that digit, and their number. Called by all threads of a block, after a barrier; `found` is shared
// memory.
template <int BINS, typename A, typename Counts>
__device__ __forceinline__ Found find_digit(Counts counts, A rank, A* warps, Found* found) {
    const int each = (BINS + blockDim.x - 1) / blockDim.x;
    const int top = BINS - 1 - (int)threadIdx.x * each;  // a thread's bins: from here down
    A mine = 0, total;
    for (int bin = top; bin > top - each && bin >= 0; bin--) mine += counts(bin);
    A above = block_exclusive(mine, warps, total);
    if (above < rank && rank <= above + mine) {  // true in one thread
        int bin = top;
        for (; rank > above + counts(bin); bin--) above += counts(bin);
        *found = {(u64)bin, (u64)(rank - above), (u64)counts(bin)};
    }
    __syncthreads();
    return *found;
}

// The chosen elements: all above `exact`, and the first `ties` of those equal to it.
struct Threshold {
    Bits exact;
    u64 ties;
};

// All elements of at least `base` are chosen; for base = 0, `count` of the zeros.
__device__ __forceinline__ Threshold all_from(Bits base, u64 count) {
    return base ? Threshold{Bits(base - 1), 0} : Threshold{0, count};
}

// The threshold of the `rank` largest elements of a block of threads: `each(f)` calls f(magnitude) for those of this
// thread, once per digit. Digits are bytes, from the top down; if all elements that share the digits so far are chosen,
// lower digits do not matter, unless `itself`: the rank-th magnitude itself is asked for. `bins`: BYTES words, `warps`:
// 32.
constexpr int BYTES = 256;
template <typename Each>
__device__ __forceinline__ Threshold block_threshold(
    Each each, u32 rank, bool itself, u32* bins, u32* warps, Found* found) {
    Digits digits = {0, WIDTH, WIDTH - 8};
    for (;;) {
        for (int i = threadIdx.x; i < BYTES; i += blockDim.x) bins[i] = 0;
        __syncthreads();
        each([&](Bits size) {
            if (digits.holds(size)) atomicAdd(&bins[digits.of(size)], 1u);
        });
        __syncthreads();
        const Found next = find_digit<BYTES>([&](int bin) { return bins[bin]; }, rank, warps, found);
        digits.base |= (Bits)next.digit << digits.low;
        rank = (u32)next.rank;
        if (!itself && next.count == rank) return all_from(digits.base, rank);
        if (digits.low == 0) return {digits.base, rank};
        digits.high = digits.low;
        digits.low = max(0, digits.high - 8);
    }
}
