// What selections share: radix selection of the k-th largest magnitude.
#include "packs.cuh"
#include "scan.cuh"

constexpr int WIDTH = 8 * sizeof(T) - 1;  // bits of a magnitude

// Where an element's rank is looked for: its magnitude's bits from `high` up are `base`'s, and those from `low` up to
// `high` are the digit that is counted next.
struct Digits {
    Bits base;
    int high, low;

    __device__ __forceinline__ bool holds(Bits size) const { return size >> high == base >> high; }
    __device__ __forceinline__ int of(Bits size) const { return (int)(size >> low & ((Bits(1) << (high - low)) - 1)); }
};

struct Found {
    u64 digit, rank, count;
};

// The digit of the `rank`-th largest, 1 <= rank, given by `counts(digit)` how often each occurs: what its rank is among
// those of that digit, and how many these are. By all threads of a block, after a barrier; `found` is shared memory.
template <int BINS, typename A, typename Counts>
__device__ __forceinline__ Found find_digit(Counts counts, A rank, A* warps, Found* found) {
    const int each = (BINS + blockDim.x - 1) / blockDim.x;
    const int top = BINS - 1 - (int)threadIdx.x * each;  // a thread's bins: from here down
    A mine = 0, total;
    for (int bin = top; bin > top - each && bin >= 0; bin--) mine += counts(bin);
    A above = block_exclusive(mine, warps, total);
    if (above < rank && rank <= above + mine) {  // one thread's
        int bin = top;
        for (; rank > above + counts(bin); bin--) above += counts(bin);
        *found = {(u64)bin, (u64)(rank - above), (u64)counts(bin)};
    }
    __syncthreads();
    return *found;
}

// What is chosen: all above `exact`, and of those at it the first `ties`.
struct Threshold {
    Bits exact;
    u64 ties;
};

// All that are at least `base` are chosen; `count` of them would be at 0.
__device__ __forceinline__ Threshold all_from(Bits base, u64 count) {
    return base ? Threshold{Bits(base - 1), 0} : Threshold{0, count};
}

// The threshold of the `rank` largest of the elements that a block's threads look at: `each(f)` calls f(magnitude) for
// this thread's, once for each digit. Digits of a byte from the top down; where all elements that share the digits so
// far are chosen the others do not matter, unless the rank-th magnitude itself is wanted. `bins`: BYTES words, `warps`:
// 32.
constexpr int BYTES = 256;
template <typename Each>
__device__ __forceinline__ Threshold block_threshold(
    Each each, u32 rank, bool itself, u32* bins, u32* warps, Found* found) {
    Digits digits = {0, WIDTH, WIDTH - 8};
    for (;;) {
        for (int i = threadIdx.x; i < BYTES; i += blockDim.x) bins[i] = 0;
        __syncthreads();
        each([&](Bits size) {
            if (digits.holds(size)) atomicAdd(&bins[digits.of(size)], 1u);
        });
        __syncthreads();
        const Found next = find_digit<BYTES>([&](int bin) { return bins[bin]; }, rank, warps, found);
        digits.base |= (Bits)next.digit << digits.low;
        rank = (u32)next.rank;
        if (!itself && next.count == rank) return all_from(digits.base, rank);
        if (digits.low == 0) return {digits.base, rank};
        digits.high = digits.low;
        digits.low = max(0, digits.high - 8);
    }
}
