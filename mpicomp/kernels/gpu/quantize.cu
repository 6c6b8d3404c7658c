// Blocks of numbers as small integers, packed: mpicomp/kernels/cpu/quantize.py says what is computed.
#include "quantize.cuh"
#include "random.cuh"

enum Grid { SYMMETRIC, SIGNS, ODD, RANGE, PAIR };
enum Rule { LARGEST, NORM, MEAN, GIVEN, SHARED };

// Added to a number it rounds it, ties to even, and leaves the integer in the low bits.
constexpr T MAGIC = sizeof(T) == 4 ? T(0x1.8p23) : T(0x1.8p52);
constexpr T SMALL = sizeof(T) == 4 ? T(0x1p-100) : T(0x1p-900);  // below, levels / top could overflow

struct Encoder {
    int grid, rule, bits;
    T levels, shrink;
    bool stochastic;
    u64 base;
    i64 start;

    // A uniform number in [0, 1) for an element of the unit.
    __device__ __forceinline__ T chance(i64 i) const { return (T)unit24(draw32(base, (u64)i)) * T(0x1p-24); }
};

// What one block is coded with. Codes are made of (x - low) * inverse or, where that is zero, (x - low) / divisor.
struct Scale { T low, top, inverse, divisor, sent, sent_low; };

// top / levels, at least so large that `levels` of it reach a tiny `top`, at most so large that they stay finite.
__device__ __forceinline__ T safe_scale(T top, T levels) {
    const T infinity = float_of(INFINITE), scale = top / levels, product = scale * levels;
    if (product < top && top < 1) return float_of(bits_of(scale) + 1);
    if (scale < infinity && product == infinity) return float_of(bits_of(scale) - 1);
    return scale;
}

// The norm of a block, or the mean of its magnitudes, by the tree of sums; `most` is its largest magnitude.
// `exact`: every thread of the team holds its K columns, and the block is one level of the tree.
template <int K>
__device__ __forceinline__ T average(
    const Team& team, const Block& block, const T (&v)[8][K], bool exact, bool squared, T most) {
    const double top = most, infinity = float_of(INFINITE);
    double factor = 1;
    if (squared && top > 1e150) factor = 0x1p-512;  // squares would overflow
    if (squared && top < 1e-130) factor = 0x1p512;  // or vanish
    for (;;) {
        const Term term{squared, factor};
        const double sum = exact ? sum_columns<K>(team, v, term) : sum_levels(team, block, term);
        if (squared) {
            const T norm = (T)(sqrt(sum) / factor);
            return most > 0 && norm < (T)infinity ? norm : most;
        }
        const double mean = sum / block.size * (factor == 1 ? 1 : UP);
        if (!__any_sync(ALL, mean == infinity && factor == 1)) return (T)mean;
        if (mean == infinity) factor = DOWN;  // numbers near the top of float64; all lanes go along
    }
}

template <int K>
__device__ __forceinline__ Scale scale_of(
    const Encoder& how, const Team& team, const Block& block, T (&v)[8][K], bool exact, const T* given) {
    T low = 0, top;
    if (how.grid == RANGE) {
        const Extremes found = extremes<K, true>(team, block, v);
        low = from_ordered(found.low), top = from_ordered(found.high);
        if (!((top - low) * T(1.02) < float_of(INFINITE))) {  // what codes stand for must be finite
            const T most = float_of(INFINITE - 1) * T(0.49);
            low = -most > low ? -most : low, top = most < top ? most : top;  // a NaN stays
        }
        top = top - low;
    } else {
        top = float_of((Bits)extremes<K, false>(team, block, v).high);
        if (how.rule == NORM || how.rule == MEAN) top = average<K>(team, block, v, exact, how.rule == NORM, top);
        if (how.rule == GIVEN) top = *given * how.levels;
        if (how.rule == SHARED) top = *given;
    }
    T inverse = 1, divisor = top;
    if (how.grid != SIGNS && top > 0) {
        const bool usual = SMALL <= top && top <= 1 / SMALL;
        inverse = usual ? how.levels / top : T(0);
        divisor = usual ? top / how.levels : safe_scale(top, how.levels);
    }
    return {low, top, inverse, divisor, divisor * how.shrink, low * how.shrink};
}

// A division in one place: written out for every number of a thread it would be most of the machine code.
__device__ __noinline__ T quotient(T x, T y) { return x / y; }

// Rows of K numbers, from element `at` of the unit on, as codes, and what those stand for.
template <int K>
__device__ __forceinline__ u32 code_nothing(const Encoder&, const Scale& scale, i64, const T (&)[K], T (&stands)[K]) {
#pragma unroll
    for (int k = 0; k < K; k++) stands[k] = scale.sent_low;
    return 0;
}

template <int K>
__device__ __forceinline__ u32 code_signs(
    const Encoder& how, const Scale& scale, i64 at, const T (&v)[K], T (&stands)[K]) {
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

template <int K>
__device__ __forceinline__ u32 code_integers(
    const Encoder& how, const Scale& scale, i64 at, const T (&v)[K], T (&stands)[K]) {
    u32 codes[K], kept = ((1u << how.bits) - 1) * EVERY;
    T y[K];
#pragma unroll
    for (int k = 0; k < K; k++) y[k] = v[k];
    if (how.grid == RANGE) {
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
        for (int k = 0; k < K; k++) {
            y[k] = quotient(y[k], scale.divisor);
            // Infinity over infinity: the low bits of NaN are zeros on a CPU, ones here.
            if (!how.stochastic && y[k] != y[k]) kept &= ~(255u << 8 * k);
        }
    }
    if (how.grid == ODD) {
#pragma unroll
        for (int k = 0; k < K; k++) y[k] = (y[k] + how.levels) * T(0.5);
    }
    if (how.stochastic) {
        const T least = how.grid == SYMMETRIC ? -how.levels : T(0);
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
        stands[k] = (how.grid == ODD ? near + near - how.levels : near) * scale.sent;
        if (how.grid == RANGE) stands[k] = scale.sent_low + stands[k];
    }
    return word_of<K>(codes) & kept;
}

template <int K>
__device__ __forceinline__ void encode(
    const Encoder& how, const Share& share, const Block& block, T* rest, T* scales, T* lows, u8* packed) {
    const Team& team = share.team;
    const bool exact = team.one_warp() && !share.last && team.size * K == share.whole / 8;
    T v[8][K] = {};
    const Scale scale = scale_of<K>(how, team, block, v, exact, how.rule == SHARED && share.size ? scales + share.number : scales);
    team.wait();  // SHARED: all have read the scale
    if (team.rank == 0 && share.size) {
        if (how.rule != GIVEN) scales[share.number] = scale.sent;
        if (how.grid == RANGE) lows[share.number] = scale.sent_low;
    }
    for (int column = team.rank * K; column < block.columns;) {
        u32 words[8] = {};
        const auto rows = [&](auto code) {
#pragma unroll
            for (int row = 0; row < 8; row++) {
                const int i = row * block.columns + column;
                T stands[K];
                if (K == 1 && i >= block.size) continue;
                words[row] = code(how, scale, how.start + share.first + i, v[row], stands);
                if (!rest) continue;
#pragma unroll
                for (int k = 0; k < K; k++) stands[k] = v[row][k] - stands[k];
                store_row<K>(rest + i, stands);
            }
        };
        if (!(scale.top > 0)) rows(code_nothing<K>);
        else if (how.grid == SIGNS) rows(code_signs<K>);
        else rows(code_integers<K>);
        pack<K>(words, how.bits, packed + column, block.columns);
        column += team.size * K;
        if (column < block.columns) block.load(column, v);
    }
}

extern "C" __global__ void __launch_bounds__(256) encode_blocks(
    const T* x, const T* old, T* rest, T* scales, T* lows, u8* packed, i64 size, i64 block, i64 grid, i64 rule,
    i64 bits, double levels, double shrink, i64 stochastic, u64 base, i64 start, i64 wide, i64 team) {
    const Encoder how{(int)grid, (int)rule, (int)bits, (T)levels, (T)shrink, stochastic != 0, base, start};
    const Share share(size, block, team);
    const Block numbers = share.of(x, old);
    if (rest) rest += share.first;
    packed += share.first / 8 * bits;
    if (wide && !share.last) encode<4>(how, share, numbers, rest, scales, lows, packed);
    else encode<1>(how, share, numbers, rest, scales, lows, packed);
}

// Add factor times what codes stand for to rows of `out`, which have been loaded: the codes were on their way as well.
template <int K, typename Value>
__device__ __forceinline__ void add_values(
    const Place& place, const u32 (&words)[8], T (&rows)[8][K], T* out, T factor, Value value) {
#pragma unroll
    for (int t = 0; t < 8; t++) {
        if (!place.inside<K>(place.element(t))) continue;
#pragma unroll
        for (int k = 0; k < K; k++) rows[t][k] += factor * value(code_of(words[t], k));
        store_row<K>(out + place.element(t), rows[t]);
    }
}

// A code, below 256, as a float: the conversion of integers is slower than this sum.
__device__ __forceinline__ T plain(u32 code) { return float_of(bits_of(MAGIC) | code) - MAGIC; }

extern "C" __global__ void __launch_bounds__(256) decode_blocks(
    const T* scales, const T* lows, const u8* packed, T* out, i64 size, i64 block, i64 grid, i64 bits, double factor,
    i64 single, i64 wide) {
    visit(size, block, wide, [&](auto width, const Place& place) {
        constexpr int K = decltype(width)::value;
        const T by = (T)factor, scale = scales[single ? 0 : place.number];
        T* const target = out + place.first;
        T rows[8][K];
#pragma unroll
        for (int t = 0; t < 8; t++)
            if (place.inside<K>(place.element(t))) load_row<K>(target + place.element(t), rows[t]);
        u32 words[8];
        unpack<K>(packed + place.first / 8 * bits + place.column, (int)bits, place.columns, words);
        if (grid == PAIR) {
            const T upper = scales[0], lower = scales[1];
            add_values<K>(place, words, rows, target, by, [&](u32 code) { return code ? lower : upper; });
        } else if (grid == RANGE) {
            const T low = lows[place.number];
            add_values<K>(place, words, rows, target, by, [&](u32 code) { return low + plain(code) * scale; });
        } else {  // slope * code + origin, exact: code - upper, 1 - 2 code, 2 code - levels
            const u32 upper = grid == SYMMETRIC ? 1u << (bits - 1) : 0;
            const T slope = grid == SYMMETRIC ? T(1) : grid == SIGNS ? T(-2) : T(2);
            const T origin = grid == SYMMETRIC ? -(T)upper : grid == SIGNS ? T(1) : -(T)((1 << bits) - 1);
            add_values<K>(place, words, rows, target, by, [&](u32 code) {
                return (slope * plain(code ^ upper) + origin) * scale;
            });
        }
    });
}

extern "C" __global__ void __launch_bounds__(256) codes_valid(
    const u8* packed, i64 size, i64 block, i64 bits, i64 smallest, i64 largest, i64 wide, u32* bad) {
    visit(size, block, wide, [&](auto width, const Place& place) {
        constexpr int K = decltype(width)::value;
        const int upper = smallest < 0 ? 1 << (bits - 1) : 0;
        u32 words[8];
        unpack<K>(packed + place.first / 8 * bits + place.column, (int)bits, place.columns, words);
        bool found = false;
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int k = 0; k < K; k++) {
                const int code = ((int)code_of(words[t], k) ^ upper) - upper;
                found |= place.inside<K>(place.element(t)) ? code < smallest || code > largest : code_of(words[t], k) != 0;
            }
        if (found) atomicOr(bad, 1u);
    });
}
