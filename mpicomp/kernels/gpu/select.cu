// Selection from a whole array: the same elements as mpicomp/kernels/cpu/select.py chooses.
//
// mark    one pass over x and old: sets new = x + old, and lists the elements that reach a bound, the candidates
// digit   radix selection of the k-th largest of the candidates, 11 bits per launch
// emit    writes the chosen candidates in ascending order; clears them in new
//
// No block of `mark`, which moves nearly all bytes, waits for another: a tile reserves room in the list by one atomic
// addition and records the place, so that only `emit`, over some percent of the array, needs the order of the tiles. If
// fewer than k elements reach the bound, or more than the list has room for, `digit` and `emit` see that themselves and
// read the whole array instead; the host does not wait.
#include "select.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int ROWS = 4;  // packs of a thread; a row's counts of a warp fit a byte
constexpr int ROW = WARP * VEC;
constexpr int TILE = THREADS * ROWS * VEC;
constexpr int BITS = 11, BINS = 1 << BITS;
constexpr int AHEAD = 8;  // elements that a thread of `digit` loads at once
constexpr int TILES = 2;  // of a warp in `emit`

// The state that kernels share, words of u64 that start as zeros; select.py knows the first three.
enum { REACHED, LOW, EXACT, TIES, SETTLED, BASE, RANK, ARRIVED };

// Whether all candidates are listed and are at least `k`.
__device__ __forceinline__ bool listed(u64 reached, i64 k, i64 room) {
    return reached >= (u64)k && reached <= (u64)room;
}

// Tiles begin at multiples of sixteen bytes; the first may begin before x.
extern "C" __global__ void __launch_bounds__(256) mark(const T* x, const T* old, T* sum, i64 size, const u64* low, u64 bound, i64 room, T* found, u32* places, u64* segments, u64* state) {
    __shared__ u32 warps[WARPS];
    __shared__ u64 taken;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const Bits least = (Bits)(low ? *low : bound);
    const i64 start = (i64)blockIdx.x * TILE - (i64)(((u64)x & 15) / sizeof(T));
    const bool whole = start >= 0 && start + TILE <= size;
    const i64 first = start + warp * (ROWS * ROW) + lane * VEC;
    T values[ROWS][VEC];
    load_sums<ROWS, ROW>(x, old, first, size, whole, values);
    if (sum) store_packs<ROWS, ROW>(sum, first, size, whole, values);
    u32 hits = 0, counts = 0;  // a bit per element, a byte per row
#pragma unroll
    for (int j = 0; j < ROWS * VEC; j++) hits |= (u32)(magnitude(values[j / VEC][j % VEC]) >= least) << j;
    if (!whole)
        for (int j = 0; j < ROWS * VEC; j++) {
            const i64 i = first + j / VEC * ROW + j % VEC;
            if (i < 0 || i >= size) hits &= ~(1u << j);
        }
#pragma unroll
    for (int r = 0; r < ROWS; r++) counts |= (u32)__popc(hits >> r * VEC & ((1 << VEC) - 1)) << 8 * r;
    const u32 inclusive = warp_inclusive(counts), rows = __shfl_sync(ALL, inclusive, WARP - 1);
    const u32 before = inclusive - counts;
    if (lane == 0) warps[warp] = (rows & 255) + (rows >> 8 & 255) + (rows >> 16 & 255) + (rows >> 24);
    __syncthreads();
    u32 total = 0, at = 0;  // of the tile, of the warps before this one
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        at += w < warp ? warps[w] : 0;
        total += warps[w];
    }
    if (threadIdx.x == 0) {
        taken = total ? atomicAdd(&state[REACHED], (u64)total) : 0;
        if (segments) segments[blockIdx.x] = taken << 16 | total;
    }
    __syncthreads();
    if (hits == 0 || taken + total > (u64)room) return;
    found += taken;
    places += taken;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        u32 to = at + (before >> 8 * r & 255);
#pragma unroll
        for (int e = 0; e < VEC; e++)
            if (hits >> (r * VEC + e) & 1) {
                found[to] = values[r][e];
                places[to++] = (u32)first + r * ROW + e;
            }
        at += rows >> 8 * r & 255;
    }
}

// Settle the threshold without counting, if possible: a sampled one is kept if at most k elements reach it; and if all
// elements that are not zero are listed and fewer than k, the first zeros are chosen too.
__device__ __forceinline__ bool settle(u64 reached, u64 low, i64 k, bool sampled, Threshold& threshold) {
    if (sampled && reached <= (u64)k) {
        threshold = all_from((Bits)low, (u64)k);
        return true;
    }
    threshold = {0, (u64)k - reached};
    return low == 1 && reached < (u64)k;
}

// One digit of the k-th largest magnitude, the `level`-th from the top; the last block finds it among all blocks'
// counts.
extern "C" __global__ void __launch_bounds__(256) digit(const T* source, const T* found, i64 size, i64 room, i64 k, i64 level, i64 itself, i64 sampled, const u64* low, u64* state, u64* counts) {
    __shared__ u32 bins[BINS], shared;
    __shared__ u64 warps[WARP];
    __shared__ Found next;
    const u64 reached = state[REACHED];
    u64* arrived = state + ARRIVED + level;
    if (level == 0) {
        Threshold threshold;
        if (settle(reached, low ? *low : 0, k, sampled, threshold)) {
            if (thread_of_grid() == 0) {
                state[EXACT] = threshold.exact;
                state[TIES] = threshold.ties;
                state[SETTLED] = 1;
            }
            return;
        }
    } else if (state[SETTLED]) {
        return;
    }
    Digits digits;
    digits.base = level ? (Bits)state[BASE] : 0;
    digits.high = WIDTH - (int)level * BITS;
    digits.low = max(0, digits.high - BITS);
    const u64 rank = level ? state[RANK] : (u64)k;
    const bool list = listed(reached, k, room);
    const T* from = list ? found : source;
    const i64 length = list ? (i64)reached : size;
    if ((i64)blockIdx.x * THREADS < length) {
        for (int bin = threadIdx.x; bin < BINS; bin += THREADS) bins[bin] = 0;
        __syncthreads();
        for (i64 first = thread_of_grid(); first < length; first += threads_of_grid() * AHEAD) {
            Bits sizes[AHEAD];  // all loads before the first count, so that they overlap
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const i64 i = first + j * threads_of_grid();
                sizes[j] = i < length ? magnitude(from[i]) : ~Bits(0);  // never counted
            }
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
                if (digits.holds(sizes[j])) atomicAdd(&bins[digits.of(sizes[j])], 1u);
        }
        __syncthreads();
        for (int bin = threadIdx.x; bin < BINS; bin += THREADS)
            if (bins[bin]) atomicAdd(&counts[bin], (u64)bins[bin]);
    }
    if (!last_block(arrived, &shared)) return;
    const Found found_digit = find_digit<BINS>([&](int bin) { return __ldcg(counts + bin); }, rank, warps, &next);
    if (threadIdx.x) return;
    const Bits base = digits.base | (Bits)found_digit.digit << digits.low;
    const bool all = !itself && found_digit.count == found_digit.rank, end = digits.low == 0;
    const Threshold threshold = all ? all_from(base, found_digit.rank) : Threshold{base, found_digit.rank};
    state[BASE] = base;
    state[RANK] = found_digit.rank;
    state[EXACT] = threshold.exact;
    state[TIES] = threshold.ties;
    state[SETTLED] = all || end;
}

// Write the chosen elements in ascending order, a warp per tile: of its candidates or, without a list, of its elements.
// `scans`: a ticket, then per group of tiles a state of the scan of elements above, then one of the ties.
extern "C" __global__ void __launch_bounds__(256) emit(const T* source, const T* found, const u32* places, const u64* segments, i64 size, i64 tiles, i64 room, i64 count, u64 bound, const u64* state, u64* scans, T* values, u32* indices, T* rest) {
    __shared__ u32 warps[WARP];
    __shared__ i64 shared;
    __shared__ u64 before[2];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const bool list = listed(state[REACHED], count, room);
    const Threshold threshold = bound ? all_from((Bits)bound, 0) : Threshold{(Bits)state[EXACT], state[TIES]};
    const i64 group = next_tile(scans, &shared);
    const i64 tile = (group * WARPS + warp) * TILES;
    u64 mine = 0;  // of the s-th tile in lane s: where its elements begin, and their number
    if (lane < TILES && tile + lane < tiles) {
        const i64 begin = (tile + lane) * TILE;
        mine = list ? segments[tile + lane] : (u64)begin << 16 | (u64)max(i64(0), min(i64(TILE), size - begin));
    }
    const T* from = list ? found : source;
    u32 above = 0, ties = 0;
    for (int s = 0; s < TILES; s++) {
        const u64 segment = __shfl_sync(ALL, mine, s);
        const int length = (int)(segment & 0xffff);
#pragma unroll 2
        for (int c = lane; c < length; c += WARP) {
            const Bits one = magnitude(from[(segment >> 16) + c]);
            above += one > threshold.exact;
            ties += one == threshold.exact;
        }
    }
    above = warp_sum(above);
    ties = warp_sum(ties);
    u32 above_all, ties_all;
    const u32 above_here = block_exclusive(lane ? 0 : above, warps, above_all);
    const u32 ties_here = block_exclusive(lane ? 0 : ties, warps, ties_all);
    if (warp < 2) {
        const i64 groups = gridDim.x;
        const u64 sum = look_back(scans + 1 + warp * groups, group, warp ? ties_all : above_all);
        if (lane == 0) before[warp] = sum;
    }
    __syncthreads();
    // The count before lane 0 is that before the warp: the sums of the other lanes contain lane 0's.
    u64 over = before[0] + __shfl_sync(ALL, above_here, 0), tied = before[1] + __shfl_sync(ALL, ties_here, 0);
    if (above == 0 && (ties == 0 || tied >= threshold.ties)) return;
    const u32 earlier = (1u << lane) - 1;
    for (int s = 0; s < TILES; s++) {
        const u64 segment = __shfl_sync(ALL, mine, s);
        const int length = (int)(segment & 0xffff);
        for (int c = lane; c - lane < length; c += WARP) {
            const u64 i = (segment >> 16) + c;
            const T value = c < length ? from[i] : T(0);
            const bool greater = c < length && magnitude(value) > threshold.exact;
            const bool equal = c < length && magnitude(value) == threshold.exact;
            const u32 overs = __ballot_sync(ALL, greater), equals = __ballot_sync(ALL, equal);
            const u64 rank = tied + __popc(equals & earlier);
            if (greater || (equal && rank < threshold.ties)) {
                const u64 to = over + __popc(overs & earlier) + min(rank, threshold.ties);
                const u32 place = list ? places[i] : (u32)i;
                values[to] = value;
                indices[to] = place;
                if (rest) rest[place] = 0;
            }
            over += __popc(overs);
            tied += __popc(equals);
        }
    }
}
