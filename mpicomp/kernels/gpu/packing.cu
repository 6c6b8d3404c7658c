// What is done with codes alone: mpicomp/kernels/cpu/quantize.py and integer.py say what is computed.
#include "packing.cuh"

extern "C" __global__ void __launch_bounds__(256) codes_valid(
    const u8* packed, i64 size, i64 block, i64 whole, i64 wide, i64 bits, i64 smallest, i64 largest, u32* bad) {
    visit(size, block, whole, wide, [&](auto width, const Place& place) {
        constexpr int K = decltype(width)::value;
        const int upper = smallest < 0 ? 1 << (bits - 1) : 0;
        u32 words[8];
        unpack<K>(packed + place.first / 8 * bits + place.column, (int)bits, place.columns, words);
        bool found = false;
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int k = 0; k < K; k++) {
                const int stored = (int)code_of(words[t], k), code = (stored ^ upper) - upper;
                found |= place.inside<K>(place.element(t)) ? code < smallest || code > largest : stored != 0;
            }
        if (found) atomicOr(bad, 1u);
    });
}

// Rows of `sums` at a place.
template <int K>
__device__ __forceinline__ void load_rows(const Place& place, const u32* sums, u32 (&rows)[8][K]) {
#pragma unroll
    for (int t = 0; t < 8; t++)
        if (place.inside<K>(place.element(t))) load_row<K>(sums + place.first + place.element(t), rows[t]);
        else rows[t][0] = 0;
}

extern "C" __global__ void __launch_bounds__(256) add_codes(
    const u8* packed, u32* sums, i64 size, i64 block, i64 whole, i64 wide, i64 bits) {
    visit(size, block, whole, wide, [&](auto width, const Place& place) {
        constexpr int K = decltype(width)::value;
        const u32 upper = 1u << (bits - 1);
        u32 rows[8][K], words[8];
        load_rows<K>(place, sums, rows);
        unpack<K>(packed + place.first / 8 * bits + place.column, (int)bits, place.columns, words);
#pragma unroll
        for (int t = 0; t < 8; t++) {
            if (!place.inside<K>(place.element(t))) continue;
#pragma unroll
            for (int k = 0; k < K; k++) rows[t][k] += (code_of(words[t], k) ^ upper) - upper;
            store_row<K>(sums + place.first + place.element(t), rows[t]);
        }
    });
}

extern "C" __global__ void __launch_bounds__(256) pack_sums(
    const u32* sums, u8* packed, i64 size, i64 block, i64 whole, i64 wide, i64 bits) {
    visit(size, block, whole, wide, [&](auto width, const Place& place) {
        constexpr int K = decltype(width)::value;
        u32 rows[8][K];
        load_rows<K>(place, sums, rows);
        u8* at = packed + place.first / 8 * bits + place.column;
        for (int known = 0; known < bits; known += 8) {
            const int some = min(8, (int)bits - known);
            u32 words[8];
#pragma unroll
            for (int t = 0; t < 8; t++) {
                u32 bytes[K];
#pragma unroll
                for (int k = 0; k < K; k++) bytes[k] = rows[t][k] >> known;
                words[t] = word_of<K>(bytes);
            }
            pack<K>(words, some, at, place.columns);
            at += 8 * place.columns;
        }
    });
}
