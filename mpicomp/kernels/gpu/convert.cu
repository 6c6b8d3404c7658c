// float16 and bfloat16, as their bits, to and from floats: mpicomp/kernels/cpu/convert.py defines the results.
//
// A block takes a tile, a thread as many rows of four as it can load ahead. For a misaligned pointer, and for the last
// tile, rows are single elements; neighbouring threads then take neighbouring ones.
#include "convert.cuh"
#include "random.cuh"

template <typename Kind, int K>
__device__ __forceinline__ void narrow_tile(const T* x, const T* old, T* new_, u16* out, bool saturate, i64 size) {
    const Tile<K> tile{size};
    Row<K, T> v[Tile<K>::ROWS];
    load_rows(tile, x, old, v);
#pragma unroll
    for (int r = 0; r < Tile<K>::ROWS; r++) {
        Row<K, u16> codes;
#pragma unroll
        for (int k = 0; k < K; k++) {
            const u32 bits = single(v[r][k]);
            codes[k] = (u16)Kind::from(bits);
            if (!saturate && (bits & ~SIGN32) - Kind::OVER < INFINITE32 - Kind::OVER)
                codes[k] = (u16)(Kind::INFINITE | (bits & SIGN32) >> 16);
            v[r][k] -= (T)Kind::number(codes[k]);
        }
        if (!tile.has(r)) continue;
        put_row(out, tile.at(r), codes);
        if (new_) put_row(new_, tile.at(r), v[r]);
    }
}

// bfloat16 rounded by 32 random bits: see mpicomp/kernels/cpu/convert.py.
__device__ __forceinline__ u32 bfloat_at_random(T value, u32 word) {
    const u32 bits = single(value), size = bits & ~SIGN32;
    if (size >= INFINITE32) return Bfloat::from(bits);
    u64 code = (size + (word >> 16)) >> 16;
    if (sizeof(T) == 8 && size >= 0x00800000u) {
        const u64 wide = (u64)bits_of(value) & 0x7fffffffffffffffull;
        code = ((wide + ((u64)word << 13)) >> 45) - ((1023ull - 127) << 7);
    }
    return (u32)min(code, (u64)0x7f7f) | (bits & SIGN32) >> 16;
}

template <int K>
__device__ __forceinline__ void narrow_tile_at_random(
    const T* x, const T* old, T* new_, u16* out, u64 base, i64 start, i64 size) {
    const Tile<K> tile{size};
    Row<K, T> v[Tile<K>::ROWS];
    load_rows(tile, x, old, v);
#pragma unroll
    for (int r = 0; r < Tile<K>::ROWS; r++) {
        if (!tile.has(r)) continue;
        Row<K, u16> codes;
#pragma unroll
        for (int k = 0; k < K; k++) {
            codes[k] = (u16)bfloat_at_random(v[r][k], draw32(base, (u64)(start + tile.at(r) + k)));
            v[r][k] -= (T)Bfloat::number(codes[k]);
        }
        put_row(out, tile.at(r), codes);
        if (new_) put_row(new_, tile.at(r), v[r]);
    }
}

template <typename Kind, int K>
__device__ __forceinline__ void widen_tile(const u16* bits, T* out, bool fresh, T scale, i64 size) {
    const Tile<K> tile{size};
    Row<K, u16> codes[Tile<K>::ROWS];
    Row<K, T> sums[Tile<K>::ROWS];
#pragma unroll
    for (int r = 0; r < Tile<K>::ROWS; r++)
        if (tile.has(r)) codes[r] = row_at<K>(bits, tile.at(r));
    if (!fresh) load_rows(tile, out, nullptr, sums);
#pragma unroll
    for (int r = 0; r < Tile<K>::ROWS; r++) {
        if (!tile.has(r)) continue;
#pragma unroll
        for (int k = 0; k < K; k++) {
            const T value = (T)Kind::number(codes[r][k]);
            sums[r][k] = fresh ? value : sums[r][k] + scale * value;
        }
        put_row(out, tile.at(r), sums[r]);
    }
}

extern "C" __global__ void __launch_bounds__(256) narrow(
    const T* x, const T* old, T* new_, u16* out, i64 half, i64 saturate, i64 size) {
    if (whole_tile(size) && fits_rows(x) && fits_rows(old) && fits_rows(new_) && fits_rows(out)) {
        if (half) narrow_tile<Half, 4>(x, old, new_, out, saturate, size);
        else narrow_tile<Bfloat, 4>(x, old, new_, out, saturate, size);
    } else {
        if (half) narrow_tile<Half, 1>(x, old, new_, out, saturate, size);
        else narrow_tile<Bfloat, 1>(x, old, new_, out, saturate, size);
    }
}

extern "C" __global__ void __launch_bounds__(256) narrow_at_random(
    const T* x, const T* old, T* new_, u16* out, u64 base, i64 start, i64 size) {
    if (whole_tile(size) && fits_rows(x) && fits_rows(old) && fits_rows(new_) && fits_rows(out))
        narrow_tile_at_random<4>(x, old, new_, out, base, start, size);
    else narrow_tile_at_random<1>(x, old, new_, out, base, start, size);
}

extern "C" __global__ void __launch_bounds__(256) widen(
    const u16* bits, T* out, i64 fresh, double scale, i64 half, i64 size) {
    if (whole_tile(size) && fits_rows(bits) && fits_rows(out)) {
        if (half) widen_tile<Half, 4>(bits, out, fresh, (T)scale, size);
        else widen_tile<Bfloat, 4>(bits, out, fresh, (T)scale, size);
    } else {
        if (half) widen_tile<Half, 1>(bits, out, fresh, (T)scale, size);
        else widen_tile<Bfloat, 1>(bits, out, fresh, (T)scale, size);
    }
}
