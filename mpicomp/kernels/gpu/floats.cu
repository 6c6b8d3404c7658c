// Small floats, one by one or with a power of two for 32 of them: see mpicomp/kernels/cpu/floats.py.
#include "floats.cuh"
#include "random.cuh"

template <typename Format>
__device__ __forceinline__ void encode_rows(const T* x, const T* old, T* new_, u8* exponents, u8* packed) {
    const Halves place;
    Row<4, T> v[Halves::ROWS];
    load_rows(place, x, old, v);
    u32 low = 0;
#pragma unroll
    for (int r = 0; r < Halves::ROWS; r++) {
        T inverse = 1, scale = 1;
        if (exponents) {
            Bits top = 0;
#pragma unroll
            for (int k = 0; k < 4; k++) top = max(top, magnitude(v[r][k]));
#pragma unroll
            for (int away = GROUP / 4 / 2; away; away /= 2) top = max(top, __shfl_xor_sync(ALL, top, away));
            const u8 share = Format::share(top);
            if (threadIdx.x % (GROUP / 4) == 0) exponents[place.at(r) / GROUP] = share;
            inverse = power(254u - share), scale = power(share);
        }
        u32 codes = 0;
#pragma unroll
        for (int k = 0; k < 4; k++) codes |= take_code<Format>(v[r][k], inverse, scale) << 8 * k;
        if (Format::BITS == 8) *(u32*)(packed + place.at(r)) = codes;
        else if (r % 2 == 0) low = codes;
        else *(u32*)(packed + place.byte(r - 1)) = low | codes << 4;
    }
    if (!new_) return;
#pragma unroll
    for (int r = 0; r < Halves::ROWS; r++) put_row(new_, place.at(r), v[r]);
}

template <typename Format>
__device__ __forceinline__ void encode_bytes(
    const T* x, const T* old, T* new_, u8* exponents, u8* packed, i64 size, u8* shares) {
    const Bytes<Format::BITS> bytes(size);
    if (exponents) {
#pragma unroll 1
        for (int row = 0; row < EACH; row++) {  // a warp takes a group
            const int i = row * THREADS + (int)threadIdx.x;
            Bits top = i < bytes.elements ? magnitude(with(old, bytes.first + i, x[bytes.first + i])) : Bits(0);
            for (int away = WARP / 2; away; away /= 2) top = max(top, __shfl_xor_sync(ALL, top, away));
            if (i % GROUP == 0 && i < bytes.elements)
                exponents[(bytes.first + i) / GROUP] = shares[i / GROUP] = Format::share(top);
        }
        __syncthreads();
    }
    for (int byte = threadIdx.x; byte < bytes.count(); byte += THREADS) {
        u32 codes = 0;
        for (int which = 0; which < 8 / Format::BITS; which++) {
            const int i = bytes.element(byte, which);
            if (i >= bytes.elements) continue;
            const i64 at = bytes.first + i;
            const u32 share = exponents ? shares[i / GROUP] : 127;
            T value = with(old, at, x[at]);
            codes |= take_code<Format>(value, power(254 - share), power(share)) << 4 * which;
            if (new_) new_[at] = value;
        }
        packed[bytes.at(byte)] = (u8)codes;
    }
}

template <typename Format>
__device__ __forceinline__ void decode_rows(const u8* exponents, const u8* packed, T* out, T factor) {
    const Halves place;
    u32 words[Halves::ROWS];
    T scales[Halves::ROWS];
    Row<4, T> sums[Halves::ROWS];
#pragma unroll
    for (int r = 0; r < Halves::ROWS; r++) {
        if (Format::BITS == 8) words[r] = *(const u32*)(packed + place.at(r));
        else words[r] = r % 2 ? words[r - 1] >> 4 : *(const u32*)(packed + place.byte(r));
        scales[r] = exponents ? power(exponents[place.at(r) / GROUP]) : 1.0f;
    }
    load_rows(place, out, nullptr, sums);
#pragma unroll
    for (int r = 0; r < Halves::ROWS; r++) {
#pragma unroll
        for (int k = 0; k < 4; k++)
            sums[r][k] += factor * ((T)Format::number(words[r] >> 8 * k & (1u << Format::BITS) - 1) * scales[r]);
        put_row(out, place.at(r), sums[r]);
    }
}

template <typename Format>
__device__ __forceinline__ void decode_bytes(const u8* exponents, const u8* packed, T* out, T factor, i64 size) {
    const Bytes<Format::BITS> bytes(size);
    for (int byte = threadIdx.x; byte < bytes.count(); byte += THREADS) {
        const u32 codes = packed[bytes.at(byte)];
        for (int which = 0; which < 8 / Format::BITS; which++) {
            const int i = bytes.element(byte, which);
            if (i >= bytes.elements) continue;
            const i64 at = bytes.first + i;
            const T scale = exponents ? power(exponents[at / GROUP]) : 1.0f;
            out[at] += factor * ((T)Format::number(codes >> 4 * which & (1u << Format::BITS) - 1) * scale);
        }
    }
}

// Four blocks on a multiprocessor: without that bound the compiler plans more of them and spills.
extern "C" __global__ void __launch_bounds__(256, 4) encode_floats(
    const T* x, const T* old, T* new_, u8* exponents, u8* packed, i64 format, i64 size) {
    __shared__ u8 shares[TILE / GROUP];
    const bool rows = whole_tile(size) && fits_rows(x) && fits_rows(old) && fits_rows(new_) && fits_rows(packed);
    const auto encode = [&](auto kind) {
        if (rows) encode_rows<decltype(kind)>(x, old, new_, exponents, packed);
        else encode_bytes<decltype(kind)>(x, old, new_, exponents, packed, size, shares);
    };
    if (format == 0) encode(E4M3());
    else if (format == 1) encode(E5M2());
    else encode(E2M1());
}

extern "C" __global__ void __launch_bounds__(256) decode_floats(
    const u8* exponents, const u8* packed, T* out, double factor, i64 format, i64 size) {
    const bool rows = whole_tile(size) && fits_rows(out) && fits_rows(packed);
    const auto decode = [&](auto kind) {
        if (rows) decode_rows<decltype(kind)>(exponents, packed, out, (T)factor);
        else decode_bytes<decltype(kind)>(exponents, packed, out, (T)factor, size);
    };
    if (format == 0) decode(E4M3());
    else if (format == 1) decode(E5M2());
    else decode(E2M1());
}

// ---- Signed powers of two times a scale per block

constexpr int AT_A_TIME = 8;  // elements of a thread; a team, a power of two of threads, has a block
constexpr Bits LEAST = INFINITE & (~INFINITE + 1);  // the smallest normal number
constexpr Bits MOST = INFINITE - 1 - LEAST;         // half the largest number: twice the scale must be finite

// Eight elements of a block for each thread of a team, in rows of K, from element `start` of the block on.
template <int K>
struct Part {
    int size, rank, team, start;
    __device__ __forceinline__ int at(int row) const { return start + (row * team + rank) * K; }
    __device__ __forceinline__ bool has(int row) const { return at(row) < size; }
};

// The largest of the values of a team, for all its threads. Called by all threads of the CUDA block.
__device__ __forceinline__ Bits largest_of(Bits value, int team, Bits* of_warps) {
    for (int away = min(team, WARP) / 2; away; away /= 2) value = max(value, __shfl_xor_sync(ALL, value, away));
    if (team <= WARP) return value;
    const int warp = threadIdx.x / WARP, warps = team / WARP;
    if (threadIdx.x % WARP == 0) of_warps[warp] = value;
    __syncthreads();
    for (int other = warp / warps * warps, i = 0; i < warps; i++) value = max(value, of_warps[other + i]);
    return value;
}

// The float32 of a code without sign.
__device__ __forceinline__ float power_of(u32 code) { return float_of(code + (code > 0) << 23); }

template <int K>
__device__ __forceinline__ void encode_team(
    const T* x, const T* old, T* new_, T* sent, u8* codes, int block, T shrink, u64 base, u64 start, Part<K> part,
    Bits* of_warps) {
    const int step = AT_A_TIME * part.team;
    Row<K, T> v[AT_A_TIME / K];
    Bits top = 0;
    for (part.start = 0; part.start < block; part.start += step) {
        load_rows(part, x, old, v);
#pragma unroll
        for (int r = 0; r < AT_A_TIME / K; r++)
#pragma unroll
            for (int k = 0; k < K; k++) top = max(top, magnitude(v[r][k]));
    }
    top = largest_of(top, part.team, of_warps);
    const bool codable = top > 0 && top <= INFINITE;
    T scale = float_of(codable ? max(min(top, MOST) & INFINITE, LEAST) : top);  // zero and NaN stay
    const T inverse = codable ? 1 / scale : T(0);
    scale *= shrink;
    if (part.rank == 0 && part.size > 0) *sent = scale;
    for (part.start = 0; part.start < block; part.start += step) {
        if (block > step) load_rows(part, x, old, v);
#pragma unroll
        for (int r = 0; r < AT_A_TIME / K; r++) {
            if (!part.has(r)) continue;
            Row<K, u8> row;
#pragma unroll
            for (int k = 0; k < K; k++) {
                const u32 size = bits_of((float)(v[r][k] * inverse)) & ~SIGN32;
                const u32 sum = size + (draw32(base, start + (u32)(part.at(r) + k)) >> 9) >> 23;
                const u32 code = min(sum ? sum - 1 : 0, 127u), sign = (u32)(bits_of(v[r][k]) >> (8 * sizeof(T) - 1));
                const T value = (T)power_of(code) * scale;
                row[k] = (u8)(code | sign << 7);
                v[r][k] -= sign ? -value : value;
            }
            put_row(codes, part.at(r), row);
            if (new_) put_row(new_, part.at(r), v[r]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) encode_powers(
    const T* x, const T* old, T* new_, T* scales, u8* codes, i64 block, double shrink, u64 base, i64 start, i64 team,
    i64 size) {
    __shared__ Bits of_warps[THREADS / WARP];
    const int threads = (int)team, teams = THREADS / threads;
    const i64 number = (i64)blockIdx.x * teams + (int)threadIdx.x / threads, first = number * block;
    const int own = (int)max(min(size - first, block), (i64)0), rank = (int)threadIdx.x % threads;
    const bool whole = ((i64)blockIdx.x + 1) * teams * block <= size;
    const bool rows = whole && fits_rows(x) && fits_rows(old) && fits_rows(new_) && fits_rows(codes);
    x += first, codes += first, scales += number;
    if (old) old += first;
    if (new_) new_ += first;
    const auto encode = [&](auto part) {
        encode_team(x, old, new_, scales, codes, (int)block, (T)shrink, base, (u64)(start + first), part, of_warps);
    };
    if (rows) encode(Part<4>{own, rank, threads, 0});
    else encode(Part<1>{own, rank, threads, 0});
}

template <int K>
__device__ __forceinline__ void decode_tile(const T* scales, const u8* codes, T* out, i64 block, T factor, i64 size) {
    const Tile<K> tile{size};
    // Blocks are counted from the one in which the tile begins, so only one division has 64 bits
    const i64 first = (i64)blockIdx.x * TILE / block * block;
    const T* own = scales + first / block;
    Row<K, u8> rows[Tile<K>::ROWS];
    Row<K, T> sums[Tile<K>::ROWS];
    T scale[Tile<K>::ROWS];
#pragma unroll
    for (int r = 0; r < Tile<K>::ROWS; r++) {
        if (!tile.has(r)) continue;
        rows[r] = row_at<K>(codes, tile.at(r));
        scale[r] = own[(u32)(tile.at(r) - first) / (u32)block];
    }
    load_rows(tile, out, nullptr, sums);
#pragma unroll
    for (int r = 0; r < Tile<K>::ROWS; r++) {
        if (!tile.has(r)) continue;
#pragma unroll
        for (int k = 0; k < K; k++) {
            const T value = (T)power_of(rows[r][k] & 127) * scale[r];
            sums[r][k] += factor * (rows[r][k] & 128 ? -value : value);
        }
        put_row(out, tile.at(r), sums[r]);
    }
}

extern "C" __global__ void __launch_bounds__(256, 4) decode_powers(
    const T* scales, const u8* codes, T* out, i64 block, double factor, i64 size) {
    if (whole_tile(size) && fits_rows(codes) && fits_rows(out))
        decode_tile<4>(scales, codes, out, block, (T)factor, size);
    else
        decode_tile<1>(scales, codes, out, block, (T)factor, size);
}
