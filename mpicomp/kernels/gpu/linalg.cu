// Orthonormal columns and thin products: mpicomp/kernels/cpu/linalg.py defines results and orders.
//
// A kernel takes `count` matrices of one shape, m (rows, columns), p (rows, rank) and q (columns, rank), contiguous.
// `places`, (3, count), says where they begin in their buffers.
#include "linalg.cuh"
#include "random.cuh"

constexpr int TRIES = 3;    // random columns before a column becomes zero
constexpr int INSIDE = 32;  // blocks of the tree whose sums fit into shared memory

enum { M, P, Q };  // rows of `places`
__device__ __forceinline__ i64 begin(const i64* places, int kind, i64 count, i64 matrix) {
    return places[kind * count + matrix];
}

// `work`: for each matrix, its columns, and room for sums that do not fit into shared memory.
extern "C" __global__ void __launch_bounds__(512) orthogonalise(T* __restrict__ p, i64 size, i64 rank, const i64* places, const u64* bases, double least, double* __restrict__ work, i64 stride) {
    __shared__ double near[INSIDE * (4 * QUARTER + 1) + 2];
    T* own = p + begin(places, P, gridDim.x, blockIdx.x);
    double* columns = work + blockIdx.x * stride;
    double* room = size <= INSIDE * TREE ? near : columns + rank * size;
    const u64 base = bases[blockIdx.x];
    for (i64 i = threadIdx.x; i < size; i += blockDim.x)
        for (int j = 0; j < rank; j++) columns[j * size + i] = own[i * rank + j];
    for (int j = 0; j < rank; j++) {
        double* v = columns + j * size;
        bool done = separate(columns, size, j, least, room);
        for (int attempt = 0; attempt < TRIES && !done; attempt++) {
            const u64 key = draw(base, (u64)(j * TRIES + attempt));
            for (i64 i = threadIdx.x; i < size; i += blockDim.x) v[i] = draw24(key, (u64)i) - (1 << 23);
            done = separate(columns, size, j, least, room);
        }
        if (!done)
            for (i64 i = threadIdx.x; i < size; i += blockDim.x) v[i] = 0.0;
    }
    __syncthreads();
    for (i64 i = threadIdx.x; i < size; i += blockDim.x)
        for (int j = 0; j < rank; j++) own[i * rank + j] = (T)columns[j * size + i];
}

// ---- Products with a matrix (rows, columns), each element of which is read or written once

// Four numbers of a factor, read at once if `whole`; zeros, which change no sum, in place of missing ones.
struct __align__(16) Four {
    T number[4];
};
__device__ __forceinline__ Four four(const T* at, i64 left, bool whole) {
    if (whole) return *(const Four*)at;
    Four got;
#pragma unroll
    for (int t = 0; t < 4; t++) got.number[t] = t < left ? at[t] : (T)0;
    return got;
}

// out = (scale * p) q^T, or out += that, terms in order from zero: 8 rows by 128 columns per block, a column per
// thread.
constexpr int BAND = 8, STRIP = 128, SLAB = 32;
constexpr int RESIDENT = 32 / sizeof(T);  // blocks of a multiprocessor, at least

extern "C" __global__ void __launch_bounds__(128, RESIDENT) outer(const T* p, const T* q, T* out, i64 rows, i64 columns, i64 rank, const i64* places, i64 count, double scale, i64 adding) {
    __shared__ Four factors[BAND][SLAB / 4];
    const u32 strips = (u32)((columns + STRIP - 1) / STRIP), bands = (u32)((rows + BAND - 1) / BAND);
    const u32 matrix = blockIdx.x / strips / bands;
    const i64 column = (i64)(blockIdx.x % strips) * STRIP + threadIdx.x;
    const i64 first = (i64)(blockIdx.x / strips % bands) * BAND;
    const int stop = (int)min(rows - first, (i64)BAND), width = (int)min(columns - (column - threadIdx.x), (i64)STRIP);
    const bool inside = (int)threadIdx.x < width;
    p += begin(places, P, count, matrix) + first * rank;
    q += begin(places, Q, count, matrix) + column * rank;
    out += begin(places, M, count, matrix) + first * columns + column;
    const bool whole = rank % 4 == 0 && aligned16(q);
    T before[BAND], found[BAND];
    const T* at = out;
#pragma unroll
    for (int i = 0; i < BAND; i++, at += columns) {  // loaded ahead
        before[i] = adding && inside && i < stop ? *at : 0;
        found[i] = 0;
    }
    for (i64 slab = 0; slab < rank; slab += SLAB) {
        const int terms = (int)min(rank - slab, (i64)SLAB);
        __syncthreads();
        for (int e = threadIdx.x; e < BAND * SLAB; e += STRIP) {
            const int i = e / SLAB, t = e % SLAB;
            factors[i][t / 4].number[t % 4] = i < stop && t < terms ? (T)scale * p[i * rank + slab + t] : 0;
        }
        __syncthreads();
        for (int t = 0; t < terms; t += 4) {
            const Four row = inside ? four(q + slab + t, terms - t, whole) : Four();
#pragma unroll
            for (int i = 0; i < BAND; i++) {
                const Four c = factors[i][t / 4];
#pragma unroll
                for (int k = 0; k < 4; k++) found[i] += c.number[k] * row.number[k];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < BAND; i++, out += columns)
        if (inside && i < stop) *out = adding ? before[i] + found[i] : found[i];
}

// q = m^T p for a strip of 32 columns of m, one per lane, and TERMS columns of p per warp. Sums over rows are chains as
// long as m is high, so few threads add; to keep memory busy, all of them load the next tile during work on this one.
constexpr int TILE = 512 / sizeof(T);  // rows
constexpr int WARPS = 8;
constexpr int FETCH = TILE / WARPS;    // rows of a tile for each warp

template <int TERMS>
__device__ __forceinline__ void project_back(
    const T* m, const T* p, T* q, i64 rows, i64 columns, i64 rank, const i64* places, i64 count
) {
    __shared__ T tile[TILE][WARP];
    __shared__ Four tile_p[TERMS * WARPS][TILE / 4];  // of each column of p, four rows together
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 strips = (u32)((columns + WARP - 1) / WARP), slabs = (u32)((rank + TERMS * WARPS - 1) / (TERMS * WARPS));
    const u32 matrix = blockIdx.x / strips / slabs;
    const i64 column = (i64)(blockIdx.x % strips) * WARP, slab = (i64)(blockIdx.x / strips % slabs) * TERMS * WARPS;
    const int width = (int)min(columns - column, (i64)WARP), terms = (int)min(rank - slab, (i64)TERMS * WARPS);
    m += begin(places, M, count, matrix) + column;
    p += begin(places, P, count, matrix) + slab;
    q += begin(places, Q, count, matrix) + column * rank + slab;
    constexpr int FACTORS = TERMS * WARPS * TILE / 256;  // for each thread
    T next[FETCH], factors[FACTORS], sums[TERMS];
    for (int e = 0; e < TERMS; e++) sums[e] = 0;
    const T* at = m + warp * columns + lane;
    auto fetch = [&](i64 first) {
#pragma unroll
        for (int k = 0; k < FETCH; k++, at += WARPS * columns)
            next[k] = lane < width && warp + k * WARPS < rows - first ? *at : 0;
#pragma unroll
        for (int k = 0; k < FACTORS; k++) {
            const int e = threadIdx.x + 256 * k, t = e / TILE, row = e % TILE;
            factors[k] = t < terms && row < rows - first ? p[(first + row) * rank + t] : 0;
        }
    };
    fetch(0);
    for (i64 first = 0; first < rows; first += TILE) {
        __syncthreads();
#pragma unroll
        for (int k = 0; k < FETCH; k++) tile[warp + k * WARPS][lane] = next[k];
#pragma unroll
        for (int k = 0; k < FACTORS; k++) {
            const int e = threadIdx.x + 256 * k;
            tile_p[e / TILE][e % TILE / 4].number[e % 4] = factors[k];
        }
        __syncthreads();
        if (first + TILE < rows) fetch(first + TILE);
        if (warp >= terms) continue;
        const int stop = (int)min(rows - first, (i64)TILE);
#pragma unroll(4 / TERMS)
        for (int i = 0; i < stop / 4; i++) {
            const T a = tile[4 * i][lane], b = tile[4 * i + 1][lane];
            const T c = tile[4 * i + 2][lane], d = tile[4 * i + 3][lane];
#pragma unroll
            for (int e = 0; e < TERMS; e++) {
                const Four f = tile_p[warp + e * WARPS][i];
                sums[e] += (f.number[0] * a + f.number[1] * b) + (f.number[2] * c + f.number[3] * d);
            }
        }
        for (int row = stop / 4 * 4; row < stop; row++)
#pragma unroll
            for (int e = 0; e < TERMS; e++)
                sums[e] += tile_p[warp + e * WARPS][row / 4].number[row % 4] * tile[row][lane];
    }
#pragma unroll
    for (int e = 0; e < TERMS; e++)
        if (lane < width && warp + e * WARPS < terms) q[lane * rank + warp + e * WARPS] = sums[e];
}

extern "C" __global__ void __launch_bounds__(256) back_project8(const T* m, const T* p, T* q, i64 rows, i64 columns, i64 rank, const i64* places, i64 count) {
    project_back<1>(m, p, q, rows, columns, rank, places, count);
}

extern "C" __global__ void __launch_bounds__(256, 2) back_project16(const T* m, const T* p, T* q, i64 rows, i64 columns, i64 rank, const i64* places, i64 count) {
    project_back<2>(m, p, q, rows, columns, rank, places, count);
}

// p = m q; m = x + old is written too, or m = x without an old: a few rows per block, a column of them per thread. One
// rank alone uses p, so the order of sums is free: columns 256 apart, then lanes by halving, then warps.
template <int ROWS, int TERMS>
__device__ __forceinline__ void project_rows(
    const T* __restrict__ x, const T* __restrict__ old,
    T* m, const T* __restrict__ q, T* p, i64 rows, i64 columns, i64 rank, const i64* places, i64 count
) {
    constexpr int SUMS = ROWS * TERMS;
    __shared__ T shared[WARPS][SUMS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 bands = (u32)((rows + ROWS - 1) / ROWS), slabs = (u32)((rank + TERMS - 1) / TERMS);
    const u32 matrix = blockIdx.x / bands / slabs;
    const i64 first = (i64)(blockIdx.x % bands) * ROWS, slab = (i64)(blockIdx.x / bands % slabs) * TERMS;
    const int stop = (int)min(rows - first, (i64)ROWS), terms = (int)min(rank - slab, (i64)TERMS);
    const i64 place = begin(places, M, count, matrix) + first * columns;
    q += begin(places, Q, count, matrix) + slab;
    const bool whole = terms == TERMS && rank % 4 == 0 && aligned16(q), writes = old && slab == 0;
    T sums[SUMS];
#pragma unroll
    for (int e = 0; e < SUMS; e++) sums[e] = 0;
    for (i64 column = threadIdx.x; column < columns; column += 256) {
        T value[ROWS], rest[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) value[i] = x[place + min(i, stop - 1) * columns + column];
        if (old) {  // rows beyond the last are copies of it, whose sums are not used
#pragma unroll
            for (int i = 0; i < ROWS; i++) rest[i] = old[place + min(i, stop - 1) * columns + column];
#pragma unroll
            for (int i = 0; i < ROWS; i++) value[i] += rest[i];
        }
        if (writes) {
#pragma unroll
            for (int i = 0; i < ROWS; i++)
                if (i < stop) m[place + i * columns + column] = value[i];
        }
#pragma unroll
        for (int t = 0; t < TERMS; t += 4) {
            const Four factors = four(q + column * rank + t, terms - t, whole);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int k = 0; k < 4; k++) sums[i * TERMS + t + k] += value[i] * factors.number[k];
        }
    }
    // Five times a lane exchanges half of its sums for the other half of another lane's; the sum of number `lane`
    // remains.
#pragma unroll
    for (int group = 0; group < SUMS; group += WARP) {
#pragma unroll
        for (int half = WARP / 2; half; half /= 2)
#pragma unroll
            for (int e = 0; e < WARP / 2; e++)
                if (e < half) {
                    const T low = sums[group + e], high = sums[group + e + half];
                    const T other = __shfl_xor_sync(ALL, lane & half ? low : high, half);
                    sums[group + e] = (lane & half ? high : low) + other;
                }
        shared[warp][group + lane] = sums[group];
    }
    __syncthreads();
    const int e = threadIdx.x, i = e / TERMS, t = e % TERMS;
    if (e < SUMS && i < stop && t < terms) {
        T sum = shared[0][e];
        for (int k = 1; k < WARPS; k++) sum += shared[k][e];
        p[begin(places, P, count, matrix) + (first + i) * rank + slab + t] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(256) project4(const T* __restrict__ x, const T* __restrict__ old, T* m, const T* __restrict__ q, T* p, i64 rows, i64 columns, i64 rank, const i64* places, i64 count) {
    project_rows<8, 4>(x, old, m, q, p, rows, columns, rank, places, count);
}

extern "C" __global__ void __launch_bounds__(256) project8(const T* __restrict__ x, const T* __restrict__ old, T* m, const T* __restrict__ q, T* p, i64 rows, i64 columns, i64 rank, const i64* places, i64 count) {
    project_rows<32 / sizeof(T), 8>(x, old, m, q, p, rows, columns, rank, places, count);
}

// ---- Other steps of the reducer low_rank

// out = factor * (x + old) for every part, or zero without an x: a part begins at `from` in x and old, at `to` in out.
// Each part has `share` blocks; for a short part some of them have no work.
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

// next = q * 2^k with its largest magnitude in [1/2, 1); `last` if all of q is zero. A block per matrix.
//
// One rounding, as in ldexp: a double holds the exact product for a float. For a double, 2^k may overflow, so k > 0 is
// split into two exact factors; for k < 0 one suffices.
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
