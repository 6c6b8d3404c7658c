// Random numbers from a counter: see mpicomp/kernels/cpu/random.py.
#include "common.cuh"

// 64 random bits: SplitMix64.
__device__ __forceinline__ u64 draw(u64 base, u64 counter) {
    u64 z = base + (counter + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// 32 random bits: lowbias32 with two words of key.
__device__ __forceinline__ u32 draw32(u64 base, u64 counter) {
    const u32 second = (u32)(base >> 32) + (u32)(counter >> 32) * 0x9E3779B9u;
    u32 x = (u32)counter + (u32)base;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15) ^ second) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

// The upper 24 bits of either, as a signed integer that every float holds: times 2^-24 uniform in [0, 1).
__device__ __forceinline__ int draw24(u64 base, u64 counter) { return (int)(draw(base, counter) >> 40); }
__device__ __forceinline__ int unit24(u32 word) { return (int)(word >> 8); }
