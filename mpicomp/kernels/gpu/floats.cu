// Small floats, one by one or with a power of two for 32 of them: mpicomp/kernels/cpu/floats.py says what is computed.
#include "floats.cuh"

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

// Four blocks on a multiprocessor: left to itself, the compiler keeps more of them and spills.
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
