// Ascending indices as bitmaps and Elias-Fano codes: mpicomp/kernels/cpu/indices.py defines the bits.
//
// Both have a string of bits in which index number j sets a bit that ascends with j. A block searches for the indices
// of its tile of the string, sets their bits in shared memory, and writes every byte once. A bitmap has the width -1.
#include "scan.cuh"

constexpr int WIDE = 256;            // threads of a block
constexpr int TILE_BITS = 32 * WIDE;  // one word a thread

// Bytes as words of 32 bits. Word 0 begins up to three bytes before the first one, so that words are aligned: bit b of
// the string is bit `skipped + b` of the words. Bits outside the string are read as zero and never written.
struct Words {
    u8* bytes;
    i64 size;
    int skipped;  // bits

    __device__ __forceinline__ Words(const u8* bytes, i64 size)
        : bytes((u8*)bytes), size(size), skipped(8 * (int)((u64)bytes & 3)) {}

    __device__ __forceinline__ i64 count() const { return (size + skipped / 8 + 3) / 4; }
    __device__ __forceinline__ i64 first_byte(i64 word) const { return 4 * word - skipped / 8; }
    __device__ __forceinline__ bool whole(i64 byte) const { return byte >= 0 && byte + 4 <= size; }

    __device__ __forceinline__ u32 load(i64 word) const {
        const i64 byte = first_byte(word);
        if (whole(byte)) return *(const u32*)(bytes + byte);
        u32 value = 0;
        for (int k = 0; k < 4; k++)
            if (byte + k >= 0 && byte + k < size) value |= (u32)bytes[byte + k] << 8 * k;
        return value;
    }
    __device__ __forceinline__ void store(i64 word, u32 value) const {
        const i64 byte = first_byte(word);
        if (whole(byte)) {
            *(u32*)(bytes + byte) = value;
        } else {
            for (int k = 0; k < 4; k++)
                if (byte + k >= 0 && byte + k < size) bytes[byte + k] = (u8)(value >> 8 * k);
        }
    }
    // Bits bit .. bit + width - 1, width < 32.
    __device__ __forceinline__ u32 field(i64 bit, int width) const {
        const i64 at = bit + skipped;
        const int shift = (int)(at & 31);
        u64 value = load(at >> 5);
        if (shift + width > 32) value |= (u64)load((at >> 5) + 1) << 32;
        return (u32)(value >> shift) & ((1u << width) - 1);
    }
};

// Shared memory of a block that visits bits.
struct BitsRoom {
    u16 places[TILE_BITS];
    u32 warps[WARP];
    i64 tile;
    u64 first;
};

// Call act(j, p) for the set bits p of a string in ascending order, j = 0, 1, ...; a tile of 2^13 bits per block,
// adjacent j to adjacent threads. `states`: one word for the ticket and one per tile, all zero.
template <typename Act>
__device__ __forceinline__ void visit_bits(Words words, u64* states, BitsRoom& room, Act act) {
    const i64 tile = next_tile(states, &room.tile), number = tile * WIDE + threadIdx.x;
    u32 word = number < words.count() ? words.load(number) : 0;
    u32 total, at = block_exclusive((u32)__popc(word), room.warps, total);
    if (threadIdx.x < WARP) {
        const u64 before = look_back(states + 1, tile, total);
        if (threadIdx.x == 0) room.first = before;
    }
    for (; word; word &= word - 1) room.places[at++] = (u16)(32 * threadIdx.x + __ffs(word) - 1);
    __syncthreads();
    const i64 first = (i64)room.first, bit = tile * TILE_BITS - words.skipped;
    for (u32 i = threadIdx.x; i < total; i += WIDE) act(first + i, bit + room.places[i]);
}

// The first i in low .. high for which before(i) is false, `high` if there is none; before() is true for all smaller i.
// Called by a whole warp, which probes 32 places at a time.
template <typename F>
__device__ __forceinline__ i64 search(i64 low, i64 high, F before) {
    const int lane = threadIdx.x % WARP;
    while (low < high) {
        const i64 step = (high - low + WARP - 1) / WARP, probe = low + (lane + 1) * step - 1;
        const int yes = __popc(__ballot_sync(ALL, probe < high && before(probe)));
        low += yes * step;
        high = min(high, low + step - 1);
    }
    return low;
}

constexpr int MOST = 4;  // words per thread of a tile

__device__ __forceinline__ i64 lower_bytes(i64 k, i64 width) { return width > 0 ? (k * width + 7) / 8 : 0; }
__device__ __forceinline__ i64 bit_of(u32 index, i64 j, i64 width) { return width < 0 ? index : (index >> width) + j; }

// Write tile `number` of `each` words per thread; `tile` and `ends`, the range of its indices, are shared memory.
__device__ __forceinline__ void write_upper(
    const u32* indices, i64 k, i64 width, Words out, i64 number, int each, u32* tile, i64* ends) {
    const i64 word = number * each * WIDE, bit = 32 * word - out.skipped;
    const int thread = threadIdx.x, warp = threadIdx.x / WARP;
    for (int i = thread; i < each * WIDE; i += WIDE) tile[i] = 0;
    if (warp < 2) {
        const i64 limit = bit + warp * 32ll * each * WIDE;
        const i64 j = search(0, k, [&](i64 j) { return bit_of(indices[j], j, width) < limit; });
        if (thread % WARP == 0) ends[warp] = j;
    }
    __syncthreads();
    const i64 stop = ends[1];
    for (i64 first = ends[0] + thread; first < stop; first += 4 * WIDE) {
        u32 index[4];
#pragma unroll
        for (int n = 0; n < 4; n++) index[n] = first + n * WIDE < stop ? indices[first + n * WIDE] : 0;
#pragma unroll
        for (int n = 0; n < 4; n++)
            if (first + n * WIDE < stop) {
                const int at = (int)(bit_of(index[n], first + n * WIDE, width) - bit);
                atomicOr(&tile[at / 32], 1u << (at % 32));
            }
    }
    __syncthreads();
    for (int i = thread; i < each * WIDE; i += WIDE)
        if (word + i < out.count()) out.store(word + i, tile[i]);
}

// Write one word of the lower parts of all indices.
__device__ __forceinline__ void write_lower(const u32* indices, i64 k, int width, Words out, i64 word) {
    const i64 bit = 32 * word - out.skipped, stop = min((bit + 31) / width + 1, k);
    const u32 mask = (1u << width) - 1;
    u64 value = 0;  // bits 31 to 62 are the word: the first index may begin before it
    for (i64 j = max(bit, 0ll) / width; j < stop; j++)
        value |= (u64)(indices[j] & mask) << (int)(j * width - bit + 31);
    out.store(word, (u32)(value >> 31));
}

// Blocks from `tiles` on write the lower parts.
extern "C" __global__ void __launch_bounds__(256) encode(
    const u32* indices, i64 k, i64 width, u8* out, i64 nbytes, i64 tiles, i64 each) {
    __shared__ u32 tile[MOST * WIDE];
    __shared__ i64 ends[2];
    const i64 lower = lower_bytes(k, width);
    if (blockIdx.x < tiles) {
        write_upper(indices, k, width, Words(out + lower, nbytes - lower), blockIdx.x, (int)each, tile, ends);
    } else {
        const Words words(out, lower);
        const i64 word = (blockIdx.x - tiles) * WIDE + threadIdx.x;
        if (word < words.count()) write_lower(indices, k, (int)width, words, word);
    }
}

// Call act(j, index) for all k indices; further ones of a damaged message are ignored.
template <typename Act>
__device__ __forceinline__ void visit_indices(
    const u8* data, i64 nbytes, i64 k, i64 width, u64* states, BitsRoom& room, Act act) {
    const i64 lower = lower_bytes(k, width);
    const Words lowest(data, lower);
    visit_bits(Words(data + lower, nbytes - lower), states, room, [&](i64 j, i64 bit) {
        if (j >= k) return;
        if (width > 0) bit = (bit - j) << width | lowest.field(j * width, (int)width);
        else if (width == 0) bit -= j;
        act(j, bit);
    });
}

extern "C" __global__ void __launch_bounds__(256) decode_add(
    const u8* data, i64 nbytes, i64 k, i64 width, const T* values, T* out, i64 size, double scale,
    u64* states) {
    __shared__ BitsRoom room;
    const T factor = (T)scale;
    visit_indices(data, nbytes, k, width, states, room, [&](i64 j, i64 index) {
        if (index < size) out[index] += factor * values[j];
    });
}
