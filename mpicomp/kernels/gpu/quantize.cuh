// Teams of threads that share a block, and their reductions over its numbers.
#include "pack.cuh"
#include "sums.cuh"

__device__ __forceinline__ int signed_of(u32 bits) { return (int)bits; }
__device__ __forceinline__ i64 signed_of(u64 bits) { return (i64)bits; }
typedef decltype(signed_of(Bits(0))) Ordered;

// A signed integer with the order of floats, NaN beyond the infinities; on bits it is its own inverse.
__device__ __forceinline__ Ordered ordered(T x) {
    const Ordered bits = signed_of(bits_of(x));
    return bits ^ (bits >> (8 * sizeof(T) - 1) & (Ordered)~SIGN);
}
__device__ __forceinline__ T from_ordered(Ordered x) {
    return float_of((Bits)(x ^ (x >> (8 * sizeof(T) - 1) & (Ordered)~SIGN)));
}

constexpr int WARPS = 32;  // of a CUDA block, at most
constexpr double DOWN = 0x1p-64, UP = 0x1p64;

// A power of two of neighbouring lanes, or all warps of the CUDA block.
struct Team {
    int rank, size;

    __device__ __forceinline__ bool one_warp() const { return size <= WARP; }
    __device__ __forceinline__ void wait() const {
        if (one_warp()) __syncwarp();
        else __syncthreads();
    }
};

// One block of numbers, x + old.
struct Block {
    const T *x, *old;
    u32 size, columns;

    __device__ __forceinline__ T operator[](u32 i) const { return with(old, i, x[i]); }

    // Load K columns; zeros for the padding.
    template <int K>
    __device__ __forceinline__ void load(u32 column, T (&v)[8][K]) const {
#pragma unroll
        for (int row = 0; row < 8; row++) {
            const u32 i = row * columns + column;
            if (K > 1 || i < size) load_row<K>(x + i, v[row]);
            else v[row][0] = 0;
        }
        if (!old) return;
        T other[8][K];  // all sixteen loads are issued before the first sum
#pragma unroll
        for (int row = 0; row < 8; row++) {
            const u32 i = row * columns + column;
            if (K > 1 || i < size) load_row<K>(old + i, other[row]);
            else other[row][0] = 0;
        }
#pragma unroll
        for (int row = 0; row < 8; row++)
#pragma unroll
            for (int k = 0; k < K; k++) v[row][k] += other[row][k];
    }
};

// The largest of the values of a team, for all its threads. Called by all threads of the CUDA block.
__device__ __forceinline__ Ordered largest_of(const Team& team, Ordered value) {
    for (int away = min(team.size, WARP) / 2; away; away /= 2) {
        const Ordered other = __shfl_xor_sync(ALL, value, away);
        value = other > value ? other : value;
    }
    if (team.one_warp()) return value;
    __shared__ Ordered of_warps[WARPS];
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = value;
    __syncthreads();
#pragma unroll 1
    for (int warp = 0; warp < team.size / WARP; warp++) value = of_warps[warp] > value ? of_warps[warp] : value;
    __syncthreads();  // before the next call writes there
    return value;
}

// A term of a sum: the magnitude, or the square, of a number times a factor.
struct Term {
    bool squared;
    double factor;

    __device__ __forceinline__ double operator()(T x) const {
        const double value = (double)x * factor;
        return squared ? value * value : fabs(value);
    }
};

// The tree of sums for a block that is one level of it, each thread holding K columns: L = 8 K times the team's size, a
// power of two up to 1024. Halves of the block are rows 0-3 and 4-7, and so on down to lanes, then columns.
template <int K>
__device__ __forceinline__ double sum_columns(const Team& team, const T (&v)[8][K], const Term& term) {
    double sums[K];
#pragma unroll
    for (int k = 0; k < K; k++) {
        const double even = (term(v[0][k]) + term(v[4][k])) + (term(v[2][k]) + term(v[6][k]));
        const double odd = (term(v[1][k]) + term(v[5][k])) + (term(v[3][k]) + term(v[7][k]));
        sums[k] = even + odd;
    }
    for (int away = team.size / 2; away; away /= 2)
#pragma unroll
        for (int k = 0; k < K; k++) sums[k] += __shfl_xor_sync(ALL, sums[k], away);
    if constexpr (K == 1) return sums[0];
    else return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// The sum of a lane's elements i + 32 m, m = 0, STEP, 2 STEP, ... below 32, folded as the tree does.
template <int STEP>
__device__ __forceinline__ double sum_lane(const Block& block, u32 i, const Term& term) {
    if constexpr (STEP == WARP) return i < block.size ? term(block[i]) : 0.0;
    else return sum_lane<2 * STEP>(block, i, term) + sum_lane<2 * STEP>(block, i + STEP * WARP, term);
}

// The tree for any block: a warp takes 1024 elements at a time, in a second read. A team has at least one warp.
__device__ __forceinline__ double sum_levels(Team team, Block block, Term term) {
    __shared__ double partial[2 * WARP];  // blocks have at most 65536 elements
    const u32 warp = team.rank / WARP, warps = (team.size + WARP - 1) / WARP, lane = threadIdx.x % WARP;
    if (!team.one_warp() && team.rank < 2 * WARP) partial[team.rank] = 0;  // zeros that fill up a level change no sum
    team.wait();
    double sum = 0;
    for (u32 level = warp; level * TREE < block.size; level += warps) {
        sum = 0;
#pragma unroll 1
        for (int one = 0; one < 2; one++) {  // bits 0 and 1 of m, the last to be folded, in loops: less machine code
            double pair = 0;
#pragma unroll 1
            for (int two = 0; two < 4; two += 2)
                pair += sum_lane<4>(block, level * TREE + lane + (one + two) * WARP, term);
            sum += pair;
        }
        sum = fold_lanes(sum);
        if (!team.one_warp() && lane == 0) partial[level] = sum;
    }
    if (team.one_warp()) return sum;
    __syncthreads();
    sum = fold_lanes(partial[lane] + partial[lane + WARP]);
    __syncthreads();
    return sum;
}

// The smallest and the largest number of a block or, unless `ranged`, the largest magnitude; NaN are the extremes.
struct Extremes { Ordered low, high; };

// `v` gets each thread's first columns, in a large enough team its only ones. Called by all threads of the CUDA block.
template <int K>
__device__ __forceinline__ Extremes extremes(const Team& team, const Block& block, bool ranged, T (&v)[8][K]) {
    Extremes found{signed_of(Bits(~SIGN)), signed_of(SIGN)};
    const u32 own = team.rank * K, step = team.size * K;
    for (u32 turn = (block.columns + step - 1 - own) >> (31 - __clz(step)); turn-- > 0;) {
        const u32 column = own + turn * step;
        block.load(column, v);
        const auto take = [&](auto key) {
#pragma unroll
            for (int row = 0; row < 8; row++) {
                if (K == 1 && row * block.columns + column >= block.size) continue;
#pragma unroll
                for (int k = 0; k < K; k++) key(v[row][k]);
            }
        };
        if (ranged) {
            take([&](T x) {
                found.high = max(found.high, ordered(x));
                found.low = min(found.low, ordered(x));
            });
        } else {
            take([&](T x) { found.high = max(found.high, signed_of(magnitude(x))); });
        }
    }
    found.high = largest_of(team, found.high);
    if (ranged) found.low = ~largest_of(team, ~found.low);
    return found;
}

// The team of this thread, and its block. A CUDA block has `teams` of 2^log_team threads for as many whole blocks; an
// incomplete last block has a CUDA block for itself. `_teams` of quantize.py makes the grid.
struct Share {
    Team team;
    u32 number, block, size;  // elements of any block, and of this one: zero for a team without a block
    bool last;

    __device__ __forceinline__ Share(i64 all, i64 every, i64 whole, i64 log_team) {
        const int log = (int)log_team, thread = threadIdx.x;
        const u32 teams = blockDim.x >> log, blocks = (u32)whole;  // below 2^32 blocks: 128 GB
        last = (u64)blockIdx.x * teams >= blocks;
        team = last ? Team{thread, (int)blockDim.x} : Team{thread & ((1 << log) - 1), 1 << log};
        number = last ? blocks : blockIdx.x * teams + (thread >> log);
        block = (u32)every;
        size = last ? (u32)(all - first()) : number < blocks ? block : 0;
    }
    __device__ __forceinline__ i64 first() const { return (i64)number * block; }
    __device__ __forceinline__ Block of(const T* x, const T* old) const {
        return {x + first(), old ? old + first() : old, size, (size + 7) / 8};
    }
};
