// A random support: the set that Floyd's algorithm draws, all of its steps at once.
//
// Step s of `drawn` draws t(s) in 0 .. j(s), j(s) = first + s, first = n - drawn, and inserts it, or j(s) if t(s) is in
// the set already. After step s, t(s) is in the set in any case. So t(s) was in the set before if an earlier step had
// drawn it, or else if it is j(q) of an earlier step q that inserted j(q). This leads back along a chain of steps,
// which ends at every link with a probability of at least 1 / 2, because t(s) >= first has at most that probability.
// The set is all t(s), and j(s) of the steps that found t(s) in it. Needed of all steps is the first one that drew a
// number: a hash table with open addressing holds it, as s + 1, and t(s) is computed again when it is needed.
#include "random.cuh"
#include "scan.cuh"

struct Steps {
    u64 own, first;

    // An exactly uniform number in 0 .. first + s (Lemire 2019).
    __device__ __forceinline__ u32 drawn(u64 s) const {
        const u64 bound = first + s + 1;
        u64 word = draw(own, s), product = (word >> 32) * bound;
        if ((u32)product < bound) {
            const u64 reject = (1ull << 32) % bound;
            while ((u32)product < reject) {
                word = draw(word, 0);
                product = (word >> 32) * bound;
            }
        }
        return (u32)(product >> 32);
    }
};

__device__ __forceinline__ u64 slot_of(u32 number, u64 slots) { return (u64)(number * 0x9E3779B9u) * slots >> 32; }
__device__ __forceinline__ u64 slot_after(u64 slot, u64 slots) { return slot + 1 == slots ? 0 : slot + 1; }

// For every number that is drawn, the table holds the first step that draws it. A slot's number never changes.
extern "C" __global__ void __launch_bounds__(256) enter_steps(u64 base, u64 start, i64 first, i64 steps, u32* table, i64 slots) {
    const Steps all = {draw(base, start), (u64)first};
    for (i64 s = thread_of_grid(); s < steps; s += threads_of_grid()) {
        const u32 number = all.drawn(s), entry = (u32)s + 1;
        for (u64 slot = slot_of(number, slots);; slot = slot_after(slot, slots)) {
            u32 held = __ldcg(table + slot);
            if (held == 0) held = atomicCAS(table + slot, 0u, entry);
            if (held == 0) break;
            if (all.drawn(held - 1) == number) {
                atomicMin(table + slot, entry);
                break;
            }
        }
    }
}

__device__ __forceinline__ u64 first_step(const Steps& all, u32 number, const u32* table, u64 slots) {
    u64 slot = slot_of(number, slots);
    while (all.drawn(table[slot] - 1) != number) slot = slot_after(slot, slots);
    return table[slot] - 1;
}

// One bit for each number of the set.
extern "C" __global__ void __launch_bounds__(256) mark_steps(u64 base, u64 start, i64 first, i64 steps, const u32* table, i64 slots, u32* bits) {
    const Steps all = {draw(base, start), (u64)first};
    for (i64 s = thread_of_grid(); s < steps; s += threads_of_grid()) {
        u64 step = s;
        u32 number = all.drawn(step);
        atomicOr(bits + (number >> 5), 1u << (number & 31));
        bool inside = first_step(all, number, table, slots) != step;
        while (!inside && number >= all.first && number - all.first != step) {
            step = number - all.first;
            number = all.drawn(step);
            inside = first_step(all, number, table, slots) != step;
        }
        const u32 last = (u32)(first + s);
        if (inside) atomicOr(bits + (last >> 5), 1u << (last & 31));
    }
}

// The numbers below `size` whose bits are set, with `others` those whose bits are not, in ascending order. `scans`: a
// ticket and the states of tiles of 128 bits per thread; the bits fill whole tiles.
extern "C" __global__ void __launch_bounds__(256) list_bits(const uint4* bits, i64 size, i64 others, u64* scans, u32* out) {
    __shared__ u32 warps[WARP];
    __shared__ i64 shared;
    __shared__ u64 before;
    const i64 tile = next_tile(scans, &shared);
    const i64 mine = tile * blockDim.x + threadIdx.x;
    const uint4 four = bits[mine];
    u32 words[4] = {four.x, four.y, four.z, four.w};
    u32 count = 0;
#pragma unroll
    for (int w = 0; w < 4; w++) {
        const i64 left = size - (mine * 4 + w) * 32;  // bits from this word on
        if (others) words[w] = ~words[w] & (left >= 32 ? ALL : left > 0 ? (1u << left) - 1 : 0u);
        count += __popc(words[w]);
    }
    u32 total;
    const u32 here = block_exclusive(count, warps, total);
    if (threadIdx.x < WARP) {
        const u64 sum = look_back(scans + 1, tile, total);
        if (threadIdx.x == 0) before = sum;
    }
    __syncthreads();
    u64 to = before + here;
#pragma unroll
    for (int w = 0; w < 4; w++)
        for (u32 word = words[w]; word; word &= word - 1) out[to++] = (u32)((mine * 4 + w) * 32 + __ffs((int)word) - 1);
}
