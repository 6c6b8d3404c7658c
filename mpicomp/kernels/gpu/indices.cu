// Ascending indices as bitmaps and Elias-Fano codes: mpicomp/kernels/cpu/indices.py says where every bit lies.
//
// Both have a string of bits in which index number j sets a bit that ascends with j. To write it, a block makes a tile
// of it in shared memory, of the indices between two places that it searches for; so every byte is written once. A
// bitmap has the width -1 here.
#include "bits.cuh"

constexpr int MOST = 4;  // words a thread in a tile that is written

__device__ __forceinline__ i64 lower_bytes(i64 k, i64 width) { return width > 0 ? (k * width + 7) / 8 : 0; }
__device__ __forceinline__ i64 bit_of(u32 index, i64 j, i64 width) { return width < 0 ? index : (index >> width) + j; }

// Write tile `number` of `each` words a thread; `tile` and `ends`, the numbers of its indices, are shared memory.
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
    u64 value = 0;  // the word is its bits 31 to 62: the first index may have begun before
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

// Call act(j, index) for all k indices; what a changed message has beyond these is left out.
template <typename Act>
__device__ __forceinline__ void visit_indices(
    const u8* data, i64 nbytes, i64 k, i64 width, u64* states, BitsRoom& room, Act act) {
    const i64 lower = lower_bytes(k, width);
    const Words lowest(data, lower);
    visit_bits(Words(data + lower, nbytes - lower), false, states, room, [&](i64 j, i64 bit) {
        if (j >= k) return;
        if (width > 0) bit = (bit - j) << width | lowest.field(j * width, (int)width);
        else if (width == 0) bit -= j;
        act(j, bit);
    });
}

extern "C" __global__ void __launch_bounds__(256) decode(
    const u8* data, i64 nbytes, i64 k, i64 width, u32* out, u64* states) {
    __shared__ BitsRoom room;
    visit_indices(data, nbytes, k, width, states, room, [&](i64 j, i64 index) { out[j] = (u32)index; });
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

// Count set bits; the count's highest bit says that one is at `bits` or above.
extern "C" __global__ void __launch_bounds__(256) count(const u8* data, i64 nbytes, i64 bits, u64* found) {
    __shared__ u64 warps[WARP];
    const Words words(data, nbytes);
    u64 own = 0, all;
    for (i64 i = thread_of_grid(); i < words.count(); i += threads_of_grid()) {
        const u32 word = words.load(i);
        const i64 left = bits - (32 * i - words.skipped);  // only the last byte may have bits beyond
        if (left < 32 && word >> max(left, 0ll)) atomicOr(found, 1ull << 63);
        own += __popc(word);
    }
    block_exclusive(own, warps, all);
    if (threadIdx.x == 0) atomicAdd(found, all);
}

extern "C" __global__ void __launch_bounds__(256) descends(const u32* indices, i64 k, i64 size, int* found) {
    bool wrong = false;
    for (i64 i = thread_of_grid(); i < k; i += threads_of_grid())
        wrong |= i ? indices[i] <= indices[i - 1] : (i64)indices[k - 1] >= size;
    if (wrong) *found = 1;
}
