// Small floats and where their codes lie: mpicomp/kernels/cpu/floats.py and pack.py.
#include "convert.cuh"

constexpr int BLOCK = 512;  // elements whose codes lie together
constexpr int GROUP = 32;   // elements with one exponent

// A sign, an exponent, MANTISSA bits; TOP: the largest finite code without sign; LARGEST: the exponent of it.
template <int BITS_, int MANTISSA, int BIAS, u32 TOP, int LARGEST>
struct Small {
    static constexpr int BITS = BITS_;
    static constexpr u32 DROP = 23 - MANTISSA;

    // The code, without sign, of float32 bits; the bits become those of the code's number.
    static __device__ __forceinline__ u32 code(u32& bits) {
        const u32 size = bits & ~SIGN32;
        const u32 near = size + ((1u << (DROP - 1)) - 1) + (size >> DROP & 1) & 0xffffffffu << DROP;
        // A subnormal is rounded by adding a number whose last place is its own (Giesen, "Float to half").
        const float magic = float_of((u32)(127 + 23 + 1 - BIAS - MANTISSA) << 23), sum = float_of(size) + magic;
        const bool subnormal = size < (u32)(128 - BIAS) << 23;
        const u32 found = subnormal ? bits_of(sum) - bits_of(magic) : near - ((u32)(127 - BIAS) << 23) >> DROP;
        const u32 value = subnormal ? bits_of(sum - magic) : near;
        bits = bits & SIGN32 | min(value, (TOP << DROP) + ((u32)(127 - BIAS) << 23));
        return min(found, TOP);
    }

    // The float32 of a code with its sign.
    static __device__ __forceinline__ float number(u32 code) {
        const u32 size = (code & ((1u << (BITS - 1)) - 1)) << DROP, normal = size + ((u32)(127 - BIAS) << 23);
        const float subnormal = float_of(normal + (1u << 23)) - float_of((u32)(128 - BIAS) << 23);
        const float value = size < 1u << 23 ? subnormal : float_of(normal);
        return code >> (BITS - 1) ? -value : value;
    }

    // The exponent, biased by 127, with which `top`, a magnitude, has the largest exponent or is below.
    static __device__ __forceinline__ u8 share(Bits top) {
        return (u8)max(0, min((int)(single(float_of(top)) >> 23) - LARGEST, 254 - LARGEST));
    }
};
typedef Small<8, 3, 7, 0x7e, 8> E4M3;
typedef Small<8, 2, 15, 0x7b, 15> E5M2;
typedef Small<4, 1, 1, 0x7, 2> E2M1;

// 2^(exponent - 127); the exponent of a checked payload is at most 254.
__device__ __forceinline__ float power(u32 exponent) { return float_of(exponent ? exponent << 23 : 1u << 22); }

// The code of a number with its sign; the number becomes the residual. A NaN keeps its sign in a product on a CPU, but
// not here.
template <typename Format>
__device__ __forceinline__ u32 take_code(T& x, T inverse, T scale) {
    const u32 sign = (u32)(bits_of(x) >> (8 * sizeof(T) - 1));
    u32 bits = single(x * inverse) & ~SIGN32 | sign << 31;
    const u32 code = Format::code(bits) | sign << (Format::BITS - 1);
    x -= (T)float_of(bits) * scale;
    return code;
}

// Rows of four elements of whole blocks: two neighbouring rows are at the same place of both halves of a block, because
// their codes of four bits share bytes. Eight neighbouring lanes have a group.
struct Halves {
    static constexpr int ROWS = EACH / 4, LANES = BLOCK / 2 / 4;

    __device__ __forceinline__ i64 at(int row) const {
        const int block = row / 2 * (THREADS / LANES) + (int)threadIdx.x / LANES;
        return (i64)blockIdx.x * TILE + block * BLOCK + row % 2 * (BLOCK / 2) + (int)threadIdx.x % LANES * 4;
    }
    __device__ __forceinline__ bool has(int) const { return true; }
    // The first of four bytes with the codes of rows `row` and `row` + 1, of four bits.
    __device__ __forceinline__ i64 byte(int row) const { return (at(row) + (int)threadIdx.x % LANES * 4) / 2; }
};

// The bytes of a tile, one by one, and the elements whose codes are in them.
template <int BITS>
struct Bytes {
    i64 first;
    int elements;  // of the tile

    __device__ __forceinline__ Bytes(i64 size)
        : first((i64)blockIdx.x * TILE), elements((int)min(size - first, (i64)TILE)) {}
    __device__ __forceinline__ int count() const { return (elements + 7) / 8 * BITS; }
    __device__ __forceinline__ i64 at(int byte) const { return first * BITS / 8 + byte; }
    // Element 0 or 1 of a byte, counted from `first`; the padding of the last block has none.
    __device__ __forceinline__ int element(int byte, int which) const {
        if (BITS == 8) return byte;
        const int start = byte / (BLOCK / 2) * BLOCK, length = min((elements - start + 7) / 8 * 8, BLOCK);
        return start + byte % (BLOCK / 2) + which * length / 2;
    }
};
