// Integers that ranks add up: mpicomp/kernels/cpu/integer.py says what is computed.
#include "quantize.cuh"

extern "C" __global__ void __launch_bounds__(256) block_tops(
    const T* x, const T* old, T* tops, i64 size, i64 block, i64 whole, i64 wide, i64 log_team) {
    const Share share(size, block, whole, log_team);
    const Block numbers = share.of(x, old);
    const auto top = [&](auto width) {
        constexpr int K = decltype(width)::value;
        T v[8][K];
        return extremes<K>(share.team, numbers, false, v).high;
    };
    const Ordered found = wide && !share.last ? top(Width<4>{}) : top(Width<1>{});
    if (share.team.rank == 0 && share.size) tops[share.number] = float_of((Bits)found);
}

extern "C" __global__ void __launch_bounds__(256) decode_sums(
    const T* scales, const u8* packed, T* out, i64 size, i64 block, i64 whole, i64 wide, i64 bits, u32* bad) {
    visit(size, block, whole, wide, [&](auto width, const Place& place) {
        constexpr int K = decltype(width)::value;
        const T scale = scales[place.number];
        const u32 upper = 1u << (bits - 1);
        const u8* at = packed + place.first / 8 * bits + place.column;
        u32 sums[8][K] = {};
        for (int known = 0; known < bits; known += 8) {
            u32 words[8];
            unpack<K>(at, min(8, (int)bits - known), place.columns, words);
#pragma unroll
            for (int t = 0; t < 8; t++)
#pragma unroll
                for (int k = 0; k < K; k++) sums[t][k] |= code_of(words[t], k) << known;
            at += 8 * place.columns;
        }
        bool endless = false;
#pragma unroll
        for (int t = 0; t < 8; t++) {
            if (!place.inside<K>(place.element(t))) continue;
            T values[K];
#pragma unroll
            for (int k = 0; k < K; k++) {
                values[k] = (T)(int)((sums[t][k] ^ upper) - upper) * scale;
                endless |= magnitude(values[k]) >= INFINITE;
            }
            store_row<K>(out + place.first + place.element(t), values);
        }
        if (endless) atomicOr(bad, 1u);
    });
}
