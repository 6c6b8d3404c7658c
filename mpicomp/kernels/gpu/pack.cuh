// Codes of 1 to 8 bits in planes: mpicomp/kernels/cpu/pack.py defines the bytes.
//
// A block of L elements, filled up to a multiple of 8, has C = L / 8 columns. Column c is the elements c, c + C, ..., c
// + 7 C. In every plane the codes of a column have bytes c, c + C, ... for themselves, so a thread packs or unpacks
// columns on its own. It takes K = 4 or 1 adjacent ones: row t of them, elements c + t C .. + K, is one access to
// memory, of at least 16 bytes for K = 4, and one word whose bytes are codes.
#include "common.cuh"

// The columns of one thread: `column` .. + K of `columns` of block `number`, which has `size` elements from `first` on.
struct Place {
    i64 number, first;
    u32 size, columns, column;

    // The element, counted from `first`, at the beginning of a row.
    __device__ __forceinline__ u32 element(int row) const { return row * columns + column; }
    // Whether element i is one of the block; only the last block has padding, and its columns are taken one by one.
    template <int K>
    __device__ __forceinline__ bool inside(u32 i) const { return K > 1 || i < size; }
};

// How many columns one thread takes, as a type.
template <int K>
struct Width { static constexpr int value = K; };

// Call act(Width, Place) for the columns of this thread, in a grid made by `_visits` of quantize.py: those of whole
// blocks, four per thread if `wide`, then those of an incomplete last block.
template <typename Act>
__device__ __forceinline__ void visit(i64 size, i64 block, i64 whole, i64 wide, Act act) {
    const u32 columns = (u32)block / 8, each = wide ? columns / 4 : columns;  // threads of a block
    const int log = 31 - __clz(blockDim.x);
    const i64 threads = whole * each, grids = (threads + blockDim.x - 1) >> log, thread = thread_of_grid();
    Place place;
    if (blockIdx.x < grids) {
        if (thread >= threads) return;
        const u32 number = (u32)thread / each, part = (u32)thread % each;  // below 2^32 threads: arrays are below 32 GB, or 128
        place = {number, number * block, (u32)block, columns, wide ? 4 * part : part};
    } else {
        wide = 0;
        const u32 rest = (u32)(size - whole * block);
        place = {whole, whole * block, rest, (rest + 7) / 8, (u32)(thread - (grids << log))};
        if (place.column >= place.columns) return;
    }
    if (wide) act(Width<4>{}, place);
    else act(Width<1>{}, place);
}

// Accesses to one or four numbers at a time.
template <typename A>
struct alignas(16) Sixteen { A part[16 / sizeof(A)]; };

template <int K, typename A>
__device__ __forceinline__ void load_row(const A* at, A (&row)[K]) {
    constexpr int EACH = 16 / sizeof(A);
    if constexpr (K == 1) {
        row[0] = *at;
    } else {
#pragma unroll
        for (int k = 0; k < K; k += EACH) {
            const Sixteen<A> loaded = *(const Sixteen<A>*)(at + k);
#pragma unroll
            for (int e = 0; e < EACH; e++) row[k + e] = loaded.part[e];
        }
    }
}

template <int K, typename A>
__device__ __forceinline__ void store_row(A* at, const A (&row)[K]) {
    constexpr int EACH = 16 / sizeof(A);
    if constexpr (K == 1) {
        *at = row[0];
    } else {
#pragma unroll
        for (int k = 0; k < K; k += EACH) {
            Sixteen<A> stored;
#pragma unroll
            for (int e = 0; e < EACH; e++) stored.part[e] = row[k + e];
            *(Sixteen<A>*)(at + k) = stored;
        }
    }
}

// The codes of a row in the bytes of a word, and a code of a word.
template <int K>
__device__ __forceinline__ u32 word_of(const u32 (&codes)[K]) {
    if constexpr (K == 1) return codes[0] & 255;
    else return __byte_perm(__byte_perm(codes[0], codes[1], 0x0040), __byte_perm(codes[2], codes[3], 0x0040), 0x5410);
}
__device__ __forceinline__ u32 code_of(u32 word, int k) { return word >> 8 * k & 255; }

// Bit 0 of every byte; times a mask it is that mask in every byte.
constexpr u32 EVERY = 0x01010101u;

template <int BITS, int K>
__device__ __forceinline__ void pack_plane(const u32 (&words)[8], int known, u8* plane, u32 columns) {
    constexpr u32 MASK = ((1u << BITS) - 1) * EVERY;
#pragma unroll
    for (int row = 0; row < BITS; row++) {
        u32 packed = 0;
#pragma unroll
        for (int t = 0; t < 8 / BITS; t++) packed |= (words[row + t * BITS] >> known & MASK) << t * BITS;
        if constexpr (K == 1) plane[row * columns] = (u8)packed;
        else *(u32*)(plane + row * columns) = packed;
    }
}

template <int BITS, int K>
__device__ __forceinline__ void unpack_plane(const u8* plane, u32 columns, int known, u32 (&words)[8]) {
    constexpr u32 MASK = ((1u << BITS) - 1) * EVERY;
#pragma unroll
    for (int row = 0; row < BITS; row++) {
        u32 packed;
        if constexpr (K == 1) packed = plane[row * columns];
        else packed = *(const u32*)(plane + row * columns);
#pragma unroll
        for (int t = 0; t < 8 / BITS; t++) words[row + t * BITS] |= (packed >> t * BITS & MASK) << known;
    }
}

// Pack K columns; `at` points to byte `column` of the block's codes.
template <int K>
__device__ __forceinline__ void pack(const u32 (&words)[8], int bits, u8* at, u32 columns) {
    if (bits == 8) return pack_plane<8, K>(words, 0, at, columns);
    if (bits & 4) pack_plane<4, K>(words, 0, at, columns);
    if (bits & 2) pack_plane<2, K>(words, bits & 4, at + (bits & 4) * columns, columns);
    if (bits & 1) pack_plane<1, K>(words, bits & 6, at + (bits & 6) * columns, columns);
}

template <int K>
__device__ __forceinline__ void unpack(const u8* at, int bits, u32 columns, u32 (&words)[8]) {
#pragma unroll
    for (int row = 0; row < 8; row++) words[row] = 0;
    if (bits == 8) return unpack_plane<8, K>(at, columns, 0, words);
    if (bits & 4) unpack_plane<4, K>(at, columns, 0, words);
    if (bits & 2) unpack_plane<2, K>(at + (bits & 4) * columns, columns, bits & 4, words);
    if (bits & 1) unpack_plane<1, K>(at + (bits & 6) * columns, columns, bits & 6, words);
}
