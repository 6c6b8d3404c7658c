// Encoding and decoding of numbers within an error bound: mpicomp/kernels/cpu/bounded.py defines the results.
#include "bounded.cuh"

// The properties of a block's words: whether all keep the bound, the extremes, the least m - 1.
struct Found {
    bool fits;
    Bits least, most, below;
};

__device__ __forceinline__ Bits largest_size(Bits least, Bits most) {
    return max(least < SIGN ? SIGN - least : Bits(0), most > SIGN ? most - SIGN : Bits(0));
}

__device__ __forceinline__ Found round_block(const Bound& bound, const T (&x)[EACH], Bits (&q)[EACH]) {
    Bits worst = 0, least = ~Bits(0), most = 0, below = ~Bits(0);
    bool lost = false;
#pragma unroll
    for (int r = 0; r < EACH; r++) {
        q[r] = bound.word(x[r]);
        least = min(least, q[r]), most = max(most, q[r]);
        const T d = bound.number(q[r], bits_of(x[r]));
        if (bound.relative) {
            below = min(below, Bound::size(q[r]) - 1);
            lost |= magnitude(x[r]) < NORMAL && magnitude(d) != magnitude(x[r]);
        } else {
            worst = max(worst, magnitude(x[r] - d));
        }
    }
    least = warp_least(least), most = warp_most(most);
    if (!bound.relative) return {warp_most(worst) < bound.limit, least, most, least};
    const bool fits = !__any_sync(ALL, lost) && largest_size(least, most) < INFINITE >> bound.shift;
    return {fits, least, most, warp_least(below)};
}

// The zigzag code of the difference between the word in register r and the previous one; 0 for the first one.
__device__ __forceinline__ Bits difference(const Bits (&q)[EACH], int r, int lane) {
    const Bits before = __shfl_up_sync(ALL, q[r], 1), last = __shfl_sync(ALL, q[r ? r - 1 : 0], r ? WARP - 1 : 0);
    return zigzag(q[r] - (lane ? before : last));
}

// The header and base of a block.
__device__ __forceinline__ int choose(
    const Bound& bound, const Found& found, const Bits (&q)[EACH], int lane, Bits& base) {
    int width = width_of((Bits)(found.most - found.least)), header = PLAIN;
    base = found.least;
    if (width == 0 && found.least == bound.zero()) return ZEROS;
    Bits all = 0;
#pragma unroll
    for (int r = 0; r < EACH; r++) all |= difference(q, r, lane);
    const int delta = width_of(warp_or(all));
    const Bits first = __shfl_sync(ALL, q[0], 0);
    if (delta < width) header = DELTA, base = first, width = delta;
    if (bound.relative && width > 2) {
        const int folded = width_of((Bits)(largest_size(found.least, found.most) - found.below)) + 1;
        if (folded < width) header = FOLDED, base = found.below, width = folded;
    }
    return width < BITS ? header + width : OTHER;
}

__device__ __forceinline__ Bits fold(Bits q, Bits base) {
    return q == SIGN ? Bits(0) : (Bound::size(q) - base) << 1 | (q < SIGN ? 1 : 0);
}

// The place of code i of a block in shared memory: gaps put rows that are packed at the same time in different banks.
__device__ __forceinline__ int spot(int i) { return i + i / 32 * 8; }
constexpr int ROOM = BLOCK + BLOCK / 32 * 8;

// Word number `place` of the codes of a block: a piece of the string of bits of lane place % LANES.
__device__ __forceinline__ Bits packed_word(const Bits* codes, int rows, int width, int place) {
    const int lane = place % LANES, start = place / LANES * BITS;
    int row = start / width, shift = row * width - start;
    Bits word = 0;
    for (; row < rows && shift < BITS; row++, shift += width) {
        const Bits code = codes[spot(row * LANES + lane)];
        word |= shift < 0 ? code >> -shift : code << shift;
    }
    return word;
}

extern "C" __global__ void __launch_bounds__(THREADS) encode_bounded(
    const T* x, const T* old, T* new_, u8* headers, Bits* words, i64 relative, double step, double inverse, u64 limit,
    i64 shift, i64 total, u64* progress) {
    __shared__ i64 shared[WARPS + 1];
    __shared__ Bits room[WARPS * ROOM];
    const Place place(progress, shared, total);
    const Bound bound{relative != 0, (T)step, (T)inverse, (Bits)limit, (int)shift};
    const int size = place.size, lane = place.lane;
    Bits* own = room + place.warp * ROOM;
    int header = ZEROS;
    i64 count = 0;
    Bits base = 0;
    if (size) {
        T v[EACH];
        Bits q[EACH];
        const T *from = x + place.first, *also = old ? old + place.first : nullptr;
#pragma unroll
        for (int r = 0; r < EACH; r++) v[r] = from[min(WARP * r + lane, size - 1)];  // the last number is repeated
        if (also)
#pragma unroll
            for (int r = 0; r < EACH; r++) v[r] += also[min(WARP * r + lane, size - 1)];
        const Found found = round_block(bound, v, q);
        header = choose(bound, found, q, lane, base);
        count = words_of(header, size);
        if (!found.fits || count >= size) header = OTHER, count = size;
        const bool delta = header >= DELTA && header < FOLDED;
#pragma unroll
        for (int r = 0; r < EACH; r++) {
            const int i = WARP * r + lane;
            Bits code = header == OTHER ? bits_of(v[r]) : header >= FOLDED ? fold(q[r], base) : q[r] - base;
            if (delta) code = difference(q, r, lane);
            own[spot(i)] = i < size ? code : Bits(0);
            if (new_ && i < size)
                new_[place.first + i] = header == OTHER ? T(0) : v[r] - bound.number(q[r], bits_of(v[r]));
        }
        if (lane == 0) headers[place.number] = (u8)header;
    }
    i64 end;
    const i64 at = place.words_at(progress, count, shared, end);
    if (threadIdx.x == 0 && (place.tile + 1) * (WARPS * BLOCK) >= total) progress[1] = (u64)end;
    Bits* to = words + at;
    if (header == OTHER) {
        for (int i = lane; i < size; i += WARP) to[i] = own[spot(i)];
    } else if (header != ZEROS) {
        if (lane == 0) to[0] = base;
        const int rows = (size + LANES - 1) / LANES, width = header % 64;
        for (int i = lane; i < count - 1; i += WARP) to[1 + i] = packed_word(own, rows, width, i);
    }
}

__device__ __forceinline__ bool known(int header) {
    return header <= OTHER || (header >= PLAIN && header % 64 < BITS);
}

// Decode the words of a block that is not zeros; zeros follow the last number. Called by whole warps.
__device__ __forceinline__ void decode_block(
    const Bound& bound, int header, const Bits* words, int size, int lane, T (&d)[EACH]) {
    const int width = header % 64;
    const Bits base = header == OTHER ? Bits(0) : words[0], mask = (Bits(1) << width) - 1;
    Bits q[EACH];
#pragma unroll
    for (int r = 0; r < EACH; r++) {
        const int i = WARP * r + lane, bit = i / LANES * width;
        q[r] = 0;
        if (i >= size) continue;
        if (header == OTHER) {
            q[r] = words[i];
        } else if (width) {
            const Bits* at = words + 1 + bit / BITS * LANES + i % LANES;
            const int skip = bit % BITS;
            q[r] = at[0] >> skip;
            if (skip + width > BITS) q[r] |= at[LANES] << (BITS - skip);
            q[r] &= mask;
        }
    }
    if (header >= DELTA && header < FOLDED) {
        Bits before = base;
#pragma unroll
        for (int r = 0; r < EACH; r++) {
            const Bits sum = before + warp_inclusive(q[r] >> 1 ^ (Bits(0) - (q[r] & 1)));
            before = __shfl_sync(ALL, sum, WARP - 1);
            q[r] = sum;
        }
    }
#pragma unroll
    for (int r = 0; r < EACH; r++) {
        if (header == OTHER) {
            d[r] = float_of(q[r]);
        } else if (header >= FOLDED) {
            const Bits m = q[r] ? (q[r] >> 1) + base : Bits(0);
            d[r] = float_of(m << bound.shift | q[r] << (BITS - 1));
        } else {
            if (header < DELTA) q[r] += base;
            d[r] = bound.number(q[r], q[r] < SIGN ? SIGN : Bits(0));
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) decode_bounded(
    const u8* headers, const Bits* words, i64 room, T* out, i64 relative, double step, i64 shift, double factor, i64 total,
    u64* progress) {
    __shared__ i64 shared[WARPS + 1];
    const Place place(progress, shared, total);
    const Bound bound{relative != 0, (T)step, T(0), Bits(0), (int)shift};
    const int header = place.size ? headers[place.number] : ZEROS;
    T sums[EACH], d[EACH];
#pragma unroll
    for (int r = 0; r < EACH; r++) {  // loaded while other tiles are waited for
        const int i = WARP * r + place.lane;
        sums[r] = header != ZEROS && i < place.size ? out[place.first + i] : T(0);
    }
    i64 end;
    const i64 count = words_of(header, place.size), at = place.words_at(progress, count, shared, end);
    if (header == ZEROS || !known(header) || at + count > room) return;  // the last two only in a damaged message
    decode_block(bound, header, words + at, place.size, place.lane, d);
#pragma unroll
    for (int r = 0; r < EACH; r++) {
        const int i = WARP * r + place.lane;
        if (i < place.size) out[place.first + i] = sums[r] + (T)factor * d[r];
    }
}
