// Strings of bits in bytes that begin anywhere: their words, the places of what is set, and searches in what ascends.
#include "common.cuh"
#include "scan.cuh"

constexpr int WIDE = 256;            // threads of a block
constexpr int TILE_BITS = 32 * WIDE;  // one word a thread

// Bytes as words of 32 bits. Word 0 begins up to three bytes before the first one, so that words are aligned: bit b of
// the string is bit `skipped + b` of the words. What lies outside the string is read as zero, and never written.
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

// Call act(j, p) for the set bits p of a string in ascending order, j = 0, 1, ...; a tile of 2^13 bits a block,
// adjacent j to adjacent threads. `states` is one word for the ticket and one a tile, all zero; with `clear` the string
// is zero afterwards.
template <typename Act>
__device__ __forceinline__ void visit_bits(Words words, bool clear, u64* states, BitsRoom& room, Act act) {
    const i64 tile = next_tile(states, &room.tile), number = tile * WIDE + threadIdx.x;
    u32 word = number < words.count() ? words.load(number) : 0;
    if (clear && word) words.store(number, 0);
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

// The first i in low .. high for which before(i) is false, `high` if there is none; before() is true up to there. By
// one whole warp: 32 probes at a time.
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
