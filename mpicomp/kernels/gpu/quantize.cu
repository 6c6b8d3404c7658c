// Blocks of numbers as small integers, packed: see mpicomp/kernels/cpu/quantize.py.
#include "quantize.cuh"
#include "random.cuh"

enum Grid { SYMMETRIC, SIGNS, ODD, RANGE, PAIR };
enum Rule { LARGEST, NORM, MEAN, GIVEN };

// Added to a number, it rounds to an integer, ties to even, in the low bits of the sum.
constexpr T MAGIC = (T)(sizeof(T) == 4 ? 0x1.8p23 : 0x1.8p52);
constexpr T SMALL = (T)(sizeof(T) == 4 ? 0x1p-100 : 0x1p-900);  // for smaller tops, levels / top could overflow

// SUMS: the scale is a norm or a mean; it needs so many registers that the other rules have a kernel of their own.
template <bool SUMS>
struct Encoder {
    int which, rule, bits;
    T levels, shrink;
    bool stochastic;
    u64 base;
    i64 start;

    // With a norm or a mean only two grids exist, so the compiler drops the others.
    __device__ __forceinline__ bool is(Grid grid) const {
        return (!SUMS || grid == SYMMETRIC || grid == SIGNS) && which == grid;
    }
    // A uniform number in [0, 1) for an element of the unit.
    __device__ __forceinline__ T chance(i64 i) const { return (T)unit24(draw32(base, (u64)i)) * T(0x1p-24); }
};

// The numbers that encode a block: codes come from (x - low) * inverse or, if that is zero, (x - low) / divisor.
struct Scale { T low, top, inverse, divisor, sent, sent_low; };

// top / levels, rounded so that `levels` times it reaches a tiny `top` and stays finite for a huge one.
__device__ __forceinline__ T safe_scale(T top, T levels) {
    const T infinity = float_of(INFINITE), scale = top / levels, product = scale * levels;
    if (product < top && top < 1) return float_of(bits_of(scale) + 1);
    if (scale < infinity && product == infinity) return float_of(bits_of(scale) - 1);
    return scale;
}

// The norm of a block, or the mean of its magnitudes, by the tree of sums; `most` is its largest magnitude.
// `exact`: every thread of the team holds its K columns, and the block is one level of the tree; true for K = 4.
template <int K>
__device__ __forceinline__ T average(
    const Team& team, const Block& block, const T (&v)[8][K], bool exact, bool squared, T most) {
    const double top = most, infinity = float_of(INFINITE);
    double factor = 1;
    if (squared && top > 1e150) factor = 0x1p-512;  // squares would overflow
    if (squared && top < 1e-130) factor = 0x1p512;  // or vanish
    for (;;) {
        const Term term{squared, factor};
        double sum;
        if (K > 1 || exact) sum = sum_columns<K>(team, v, term);
        else sum = sum_levels(team, block, term);
        if (squared) {
            const T norm = (T)(sqrt(sum) / factor);
            return most > 0 && norm < (T)infinity ? norm : most;
        }
        const double mean = sum / block.size * (factor == 1 ? 1 : UP);
        if (!__any_sync(ALL, mean == infinity && factor == 1)) return (T)mean;
        if (mean == infinity) factor = DOWN;  // numbers near the top of float64; all lanes repeat the sum
    }
}

template <int K, bool SUMS>
__device__ __forceinline__ Scale scale_of(
    const Encoder<SUMS>& how, const Team& team, const Block& block, T (&v)[8][K], bool exact, const T* given) {
    const Extremes found = extremes<K>(team, block, how.is(RANGE), v);
    T low = 0, top;
    if (how.is(RANGE)) {
        low = from_ordered(found.low), top = from_ordered(found.high);
        if (!((top - low) * T(1.02) < float_of(INFINITE))) {  // decoded numbers must be finite
            const T most = float_of(INFINITE - 1) * T(0.49);
            low = -most > low ? -most : low, top = most < top ? most : top;  // a NaN stays
        }
        top = top - low;
    } else {
        top = float_of((Bits)found.high);
        if constexpr (SUMS) top = average<K>(team, block, v, exact, how.rule == NORM, top);
        if (how.rule == GIVEN) top = *given * how.levels;
    }
    T inverse = 1, divisor = top;
    if (!how.is(SIGNS) && top > 0) {
        const bool usual = SMALL <= top && top <= 1 / SMALL;
        inverse = usual ? how.levels / top : T(0);
        divisor = usual ? top / how.levels : safe_scale(top, how.levels);
    }
    return {low, top, inverse, divisor, divisor * how.shrink, low * how.shrink};
}

// Not inlined: a division for every number of a thread would be most of the machine code.
__device__ __noinline__ T quotient(T x, T y) { return x / y; }

// Encode a row of K numbers, from element `at` of the unit on; `stands` gets the decoded numbers.
template <int K, bool SUMS>
__device__ __forceinline__ u32 code_nothing(
    const Encoder<SUMS>&, const Scale& scale, i64, const T (&)[K], T (&stands)[K]) {
#pragma unroll
    for (int k = 0; k < K; k++) stands[k] = scale.sent_low;
    return 0;
}

template <int K, bool SUMS>
__device__ __forceinline__ u32 code_signs(
    const Encoder<SUMS>& how, const Scale& scale, i64 at, const T (&v)[K], T (&stands)[K]) {
    u32 codes[K];
#pragma unroll
    for (int k = 0; k < K; k++) {
        bool below = v[k] < 0;
        if (how.stochastic) below = how.chance(at + k) < (T(1) - quotient(v[k], scale.top)) * T(0.5);
        codes[k] = below;
        stands[k] = below ? -scale.sent : scale.sent;
    }
    return word_of<K>(codes);
}

template <int K, bool SUMS>
__device__ __forceinline__ u32 code_integers(
    const Encoder<SUMS>& how, const Scale& scale, i64 at, const T (&v)[K], T (&stands)[K]) {
    u32 codes[K], kept = ((1u << how.bits) - 1) * EVERY;
    T y[K];
#pragma unroll
    for (int k = 0; k < K; k++) y[k] = v[k];
    if (how.is(RANGE)) {
#pragma unroll
        for (int k = 0; k < K; k++) {
            y[k] = v[k] - scale.low;
            y[k] = y[k] > 0 ? y[k] : T(0);
            y[k] = y[k] < scale.top ? y[k] : scale.top;
        }
    }
    if (scale.inverse != 0) {
#pragma unroll
        for (int k = 0; k < K; k++) y[k] *= scale.inverse;
    } else {
#pragma unroll
        for (int k = 0; k < K; k++) y[k] = quotient(y[k], scale.divisor);
    }
    // Infinity over infinity, or a NaN under a given scale: the low bits of a NaN are zeros on a CPU, ones here.
    if (!how.stochastic && (scale.inverse == 0 || how.rule == GIVEN)) {
#pragma unroll
        for (int k = 0; k < K; k++)
            if (y[k] != y[k]) kept &= ~(255u << 8 * k);
    }
    if (how.is(ODD)) {
#pragma unroll
        for (int k = 0; k < K; k++) y[k] = (y[k] + how.levels) * T(0.5);
    }
    if (how.stochastic) {
        const T least = how.is(SYMMETRIC) ? -how.levels : T(0);
#pragma unroll
        for (int k = 0; k < K; k++) {
            const T value = y[k] < how.levels ? y[k] : how.levels, bound = value > least ? value : least;
            const T near = (bound + MAGIC) - MAGIC, rest = bound - near, chance = how.chance(at + k);
            y[k] = near + ((chance < rest ? T(1) : T(0)) - (chance < -rest ? T(1) : T(0)));
        }
    }
#pragma unroll
    for (int k = 0; k < K; k++) {
        const T total = y[k] + MAGIC, near = total - MAGIC;
        codes[k] = (u32)bits_of(total);
        stands[k] = (how.is(ODD) ? near + near - how.levels : near) * scale.sent;
        if (how.is(RANGE)) stands[k] = scale.sent_low + stands[k];
    }
    return word_of<K>(codes) & kept;
}

template <int K, bool SUMS>
__device__ __forceinline__ void encode(
    const Encoder<SUMS>& how, const Share& share, const Block& block, T* rest, T* scales, T* lows, u8* packed) {
    const Team& team = share.team;
    const bool exact = team.one_warp() && !share.last && team.size * K == (int)(share.block / 8);
    T v[8][K];
    if constexpr (SUMS) {
#pragma unroll
        for (int i = 0; i < 8 * K; i++) v[i / K][i % K] = 0;  // for teams without a block, which take part in sums
    }
    const Scale scale = scale_of<K>(how, team, block, v, exact, scales);
    if (team.rank == 0 && share.size) {
        if (how.rule != GIVEN) scales[share.number] = scale.sent;
        if (how.is(RANGE)) lows[share.number] = scale.sent_low;
    }
    for (u32 column = team.rank * K; column < block.columns; column += team.size * K) {
        if (K > 1 && column != team.rank * K) block.load(column, v);
        u32 words[8];
        u64 bytes = 0;
        const auto rows = [&](auto code) {
#pragma unroll(K == 1 ? 1 : 8)  // single columns are few: less machine code, at the price of a second read
            for (int row = 0; row < 8; row++) {
                const u32 i = row * block.columns + column;
                T own[K], stands[K];
                if constexpr (K == 1) {
                    if (i >= block.size) break;
                    own[0] = block[i];
                    bytes |= (u64)code(how, scale, how.start + share.first() + i, own, stands) << 8 * row;
                } else {
#pragma unroll
                    for (int k = 0; k < K; k++) own[k] = v[row][k];
                    words[row] = code(how, scale, how.start + share.first() + i, own, stands);
                }
                if (!rest) continue;
#pragma unroll
                for (int k = 0; k < K; k++) stands[k] = own[k] - stands[k];
                store_row<K>(rest + i, stands);
            }
        };
        if (!(scale.top > 0)) rows(code_nothing<K, SUMS>);
        else if (how.is(SIGNS)) rows(code_signs<K, SUMS>);
        else rows(code_integers<K, SUMS>);
        if constexpr (K == 1) {
#pragma unroll
            for (int row = 0; row < 8; row++) words[row] = bytes >> 8 * row & 255;
        }
        pack<K>(words, how.bits, packed + column, block.columns);
    }
}

template <bool SUMS>
__device__ __forceinline__ void encode_share(
    const Encoder<SUMS>& how, const Share& share, const T* x, const T* old, T* rest, T* scales, T* lows, u8* packed,
    bool wide) {
    const Block block = share.of(x, old);
    if (rest) rest += share.first();
    packed += (u64)share.number * (share.block / 8) * how.bits;
    if (wide && !share.last) encode<4>(how, share, block, rest, scales, lows, packed);
    else encode<1>(how, share, block, rest, scales, lows, packed);
}

// CUDA blocks on a multiprocessor, at least; together they load 64 KB ahead, 128 KB with a residual.
constexpr int RESIDENT = sizeof(T) == 4 ? 4 : 2;

extern "C" __global__ void __launch_bounds__(128, RESIDENT) encode_blocks(
    const T* x, const T* old, T* rest, T* scales, T* lows, u8* packed, i64 size, i64 block, i64 whole, i64 wide,
    i64 log_team, i64 grid, i64 rule, i64 bits, i64 levels, double shrink, i64 stochastic, u64 base, i64 start) {
    const Encoder<false> how{(int)grid, (int)rule, (int)bits, (T)(int)levels, (T)shrink, stochastic != 0, base, start};
    encode_share(how, Share(size, block, whole, log_team), x, old, rest, scales, lows, packed, wide);
}

extern "C" __global__ void __launch_bounds__(128, RESIDENT) encode_blocks_by_sums(
    const T* x, const T* old, T* rest, T* scales, T* lows, u8* packed, i64 size, i64 block, i64 whole, i64 wide,
    i64 log_team, i64 grid, i64 rule, i64 bits, i64 levels, double shrink, i64 stochastic, u64 base, i64 start) {
    const Encoder<true> how{(int)grid, (int)rule, (int)bits, (T)(int)levels, (T)shrink, stochastic != 0, base, start};
    encode_share(how, Share(size, block, whole, log_team), x, old, rest, scales, lows, packed, wide);
}

// A code, below 256, as a float: the conversion of integers is slower than this sum.
__device__ __forceinline__ T plain(u32 code) { return float_of(bits_of(MAGIC) | code) - MAGIC; }

extern "C" __global__ void __launch_bounds__(256) decode_blocks(
    const T* scales, const T* lows, const u8* packed, T* out, i64 size, i64 block, i64 whole, i64 wide, i64 grid,
    i64 bits, double factor, i64 single, i64 fresh) {
    visit(size, block, whole, wide, [&](auto width, const Place& place) {
        constexpr int K = decltype(width)::value;
        const T by = (T)factor, scale = scales[single ? 0 : place.number];
        T* const target = out + place.first;
        T rows[8][K];
#pragma unroll
        for (int t = 0; t < 8; t++)
            if (!fresh && place.inside<K>(place.element(t))) load_row<K>(target + place.element(t), rows[t]);
        u32 words[8];
        unpack<K>(packed + place.first / 8 * bits + place.column, (int)bits, place.columns, words);
        // (slope code + origin) scale, the first product and sum exact: code - upper, 1 - 2 code, 2 code - levels
        const u32 upper = grid == SYMMETRIC ? 1u << (bits - 1) : 0;
        T slope = 1, origin = 0;
        if (grid == SYMMETRIC) origin = -(T)upper;
        if (grid == SIGNS) slope = -2, origin = 1;
        if (grid == ODD) slope = 2, origin = -(T)((1 << bits) - 1);
        const T low = grid == RANGE ? lows[place.number] : T(0), other = grid == PAIR ? scales[1] : T(0);
#pragma unroll
        for (int t = 0; t < 8; t++) {
            if (!place.inside<K>(place.element(t))) continue;
#pragma unroll
            for (int k = 0; k < K; k++) {
                const u32 code = code_of(words[t], k);
                T value = (slope * plain(code ^ upper) + origin) * scale;
                if (grid == RANGE) value = low + value;
                if (grid == PAIR) value = code ? other : scale;
                rows[t][k] = (fresh ? T(0) : rows[t][k]) + by * value;
            }
            store_row<K>(target + place.element(t), rows[t]);
        }
    });
}
