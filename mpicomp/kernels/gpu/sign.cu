// One bit per element and the mean magnitude of an array, or two means: see mpicomp/kernels/cpu/sign.py.
//
// A block of 1024 elements is a block of the summation tree and one of bits, for one warp. Byte b of its 128 bytes has
// elements b, b + 128, ..., b + 7 * 128, the first in its lowest bit: a lane that takes all eight of four such columns
// has four bytes for itself, and the three upper folds of the tree.
#include "elements.cuh"
#include "sums.cuh"

constexpr int ROWS = 8, COLUMNS = TREE / ROWS;
constexpr double DOWN = 0x1p-64, UP = 0x1p64, LARGEST = 0x1.fffffffffffffp1023;
// Sums of double may overflow: sums of magnitudes times 2^-64 are formed too, which saves another pass.
constexpr int FACTORS = sizeof(T) == 8 ? 2 : 1;

// Column number c of this lane: adjacent ones for reads of sixteen bytes, otherwise those a warp apart.
template <bool WIDE>
__device__ __forceinline__ int column(int c) {
    const int lane = threadIdx.x % WARP;
    return WIDE ? 4 * lane + c : lane + c * WARP;
}

// v[j][c] = element 128 j + column(c) of x + old, zero from `count` on.
template <bool WIDE>
__device__ __forceinline__ void load_block(const T* x, const T* old, int count, T (&v)[ROWS][4]) {
    auto load = [&](const T* from, int j, T(&row)[4]) {
        const int i = COLUMNS * j + column<WIDE>(0);
        if constexpr (WIDE) {
            Adjacent::load(from + i, row);
        } else {
#pragma unroll
            for (int c = 0; c < 4; c++) row[c] = i + c * WARP < count ? from[i + c * WARP] : 0;
        }
    };
#pragma unroll
    for (int j = 0; j < ROWS; j++) load(x, j, v[j]);
    if (old) {
#pragma unroll
        for (int j = 0; j < ROWS; j += 4) {  // as many at a time as registers allow
            T more[4][4];
#pragma unroll
            for (int k = 0; k < 4; k++) load(old, j + k, more[k]);
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int c = 0; c < 4; c++) v[j + k][c] += more[k][c];
        }
    }
}

// Several terms of one element, one per sum.
template <int M>
struct Terms {
    double of[M];
    __device__ __forceinline__ friend Terms operator+(Terms a, const Terms& b) {
#pragma unroll
        for (int m = 0; m < M; m++) a.of[m] += b.of[m];
        return a;
    }
};

// The sums of term(v) over a block by the tree, number m to sums[m * apart]. All terms of an element are
// formed at once: otherwise the common parts of two sums would stay in registers for all elements.
template <bool WIDE, int M, typename F>
__device__ __forceinline__ void put_sums(const T (&v)[ROWS][4], F term, double* sums, i64 apart) {
    double part[M][4];
#pragma unroll
    for (int c = 0; c < 4; c++) {
        const Terms<M> folded = fold_each<ROWS>([&](int j) { return term(v[j][c]); });
#pragma unroll
        for (int m = 0; m < M; m++) part[m][c] = folded.of[m];
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
        double sum;
        if constexpr (WIDE) sum = fold_warp(part[m]);
        else sum = fold_lanes(fold_own(part[m]));
        if (threadIdx.x % WARP == 0) sums[m * apart] = sum;
    }
}

// Call act(access, number, count, v) for this warp's block.
template <typename Act>
__device__ __forceinline__ void with_block(const T* x, const T* old, i64 size, Act act) {
    const i64 number = thread_of_grid() / WARP, first = number * TREE;
    if (first >= size) return;
    const int count = (int)min(size - first, (i64)TREE);
    T v[ROWS][4];
    if (count == TREE && aligned16(x) && aligned16(old)) {
        load_block<true>(x + first, old ? old + first : old, count, v);
        act(Adjacent(), number, count, v);
    } else {
        load_block<false>(x + first, old ? old + first : old, count, v);
        act(Strided(), number, count, v);
    }
}

// Write the bits of a whole block; return how many of this lane's elements are negative.
template <bool WIDE>
__device__ __forceinline__ int write_bits(const T (&v)[ROWS][4], u8* out) {
    u32 word = 0;
#pragma unroll
    for (int c = 0; c < 4; c++)
#pragma unroll
        for (int j = 0; j < ROWS; j++) word |= v[j][c] < 0 ? 1u << (8 * c + j) : 0;
    if (WIDE && ((u64)out & 3) == 0) {
        *(u32*)(out + column<WIDE>(0)) = word;
    } else {
#pragma unroll
        for (int c = 0; c < 4; c++) out[column<WIDE>(c)] = (u8)(word >> 8 * c);
    }
    return __popc(word);
}

// The same for the last block, if it is shorter: it has as many columns as eight rows need to hold it.
__device__ __forceinline__ int write_last(const T* x, const T* old, int count, u8* out) {
    const int columns = (count + 7) / 8;
    int negative = 0;
    for (int b = threadIdx.x % WARP; b < columns; b += WARP) {
        u32 byte = 0;
        for (int j = 0; j < ROWS; j++) {
            const int i = b + j * columns;
            byte |= i < count && with(old, i, x[i]) < 0 ? 1u << j : 0;
        }
        out[b] = (u8)byte;
        negative += __popc(byte);
    }
    return negative;
}

// A magnitude times each factor.
__device__ __forceinline__ Terms<FACTORS> magnitudes(double x) {
    Terms<FACTORS> terms;
    terms.of[0] = x;
    if constexpr (FACTORS > 1) terms.of[1] = x * DOWN;
    return terms;
}

// Write bits, and the sums of all blocks in rows: of magnitudes and, for two means, of positive numbers, once per
// factor; then the counts of negative elements.
extern "C" __global__ void __launch_bounds__(256, 2) signs(
    const T* x, const T* old, u8* packed, double* sums, i64 size, i64 two_means) {
    with_block(x, old, size, [&](auto access, i64 number, int count, const T(&v)[ROWS][4]) {
        constexpr bool WIDE = decltype(access)::WIDE;
        const i64 first = number * TREE, blocks = (size + TREE - 1) / TREE;
        u8* out = packed + first / 8;
        int negative;
        if (WIDE || count == TREE) negative = write_bits<WIDE>(v, out);
        else negative = write_last(x + first, old ? old + first : old, count, out);
        double* own = sums + number;
        if (!two_means) {
            put_sums<WIDE, FACTORS>(v, [](T x) { return magnitudes(fabs((double)x)); }, own, blocks);
            return;
        }
        auto term = [](T x) {
            const Terms<FACTORS> every = magnitudes(fabs((double)x)), positive = magnitudes(x > 0 ? (double)x : 0.0);
            Terms<2 * FACTORS> all;
#pragma unroll
            for (int m = 0; m < 2 * FACTORS; m++) all.of[m] = m < FACTORS ? every.of[m] : positive.of[m - FACTORS];
            return all;
        };
        put_sums<WIDE, 2 * FACTORS>(v, term, own, blocks);
        const double below = fold_lanes((double)negative);
        if (threadIdx.x % WARP == 0) own[2 * FACTORS * blocks] = below;
    });
}

// Set the scales, from rows of `width` sums; one block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) means(
    const double* sums, T* scales, i64 width, i64 size, i64 two_means) {
    __shared__ double shared[WARP];
    auto total = [&](int row) { return fold_sums(sums + row * width, width, shared); };
    double every = total(0), back = 1.0;
    const bool overflows = FACTORS > 1 && every > LARGEST;
    if (overflows) {
        every = total(1);
        back = UP;
    }
    double below = 0.0;
    if (two_means) {
        const double positive = total(FACTORS + overflows), negative = total(2 * FACTORS);
        below = -((every - positive) / fmax(1.0, negative) * back);
        every = positive;
        size = max(1ll, size - (i64)negative);
    }
    if (threadIdx.x == 0) {
        scales[0] = (T)(every / (double)size * back);
        if (two_means) scales[1] = (T)below;
    }
}

// Subtract from x + old the number that its sign stands for; `rest` may be either.
extern "C" __global__ void __launch_bounds__(256) subtract(
    const T* x, const T* old, T* rest, const T* scales, i64 size, i64 two_means) {
    const T upper = scales[0], lower = two_means ? scales[1] : -upper;
    auto act = [&](auto access, i64 i) {
        T v[access.K];
        access.load_sum(x, old, i, v);
#pragma unroll
        for (int k = 0; k < access.K; k++) v[k] -= v[k] < 0 ? lower : upper;
        access.store(rest + i, v);
    };
    visit_elements(size, head_of(x, old, (const T*)rest), act, true);
}

// The largest magnitude, as bits; `top` starts as zero.
extern "C" __global__ void __launch_bounds__(256) largest(const T* x, const T* old, Bits* top, i64 size) {
    __shared__ Bits tops[8];
    Bits most = 0;
    visit_elements(size, head_of(x, old, (const T*)nullptr), [&](auto access, i64 i) {
        T v[access.K];
        access.load_sum(x, old, i, v);
#pragma unroll
        for (int k = 0; k < access.K; k++) most = max(most, magnitude(v[k]));
    });
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) most = max(most, __shfl_xor_sync(ALL, most, step));
    if (threadIdx.x % WARP == 0) tops[threadIdx.x / WARP] = most;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < 8; warp++) most = max(most, tops[warp]);
        atomicMax(top, most);
    }
}

// The sums of all blocks of c and of c^2, c = factor * min(|x + old|, limit), in two rows.
extern "C" __global__ void __launch_bounds__(256, 2) moments(
    const T* x, const T* old, double limit, double factor, double* sums, i64 size) {
    const T most = (T)limit;
    with_block(x, old, size, [&](auto access, i64 number, int count, const T(&v)[ROWS][4]) {
        constexpr bool WIDE = decltype(access)::WIDE;
        auto term = [&](T x) {
            const double limited = (double)(fabs(x) < most ? fabs(x) : most) * factor;
            return Terms<2>{{fabs(limited), limited * limited}};
        };
        put_sums<WIDE, 2>(v, term, sums + number, (size + TREE - 1) / TREE);
    });
}
