// Gathering and scattering by index. No index occurs twice, so that no order of the threads matters.
#include "common.cuh"

constexpr int AHEAD = 4;  // places that a thread loads at once

// write(i, place, read(i, place)) for the i-th index; a thread reads a few elements before it writes them.
template <typename Read, typename Write>
__device__ __forceinline__ void at_places(const u32* indices, i64 count, Read read, Write write) {
    const i64 step = threads_of_grid();
    for (i64 first = thread_of_grid(); first < count; first += AHEAD * step) {
        u32 places[AHEAD];
        T seen[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) places[j] = first + j * step < count ? indices[first + j * step] : 0;
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (first + j * step < count) seen[j] = read(first + j * step, places[j]);
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (first + j * step < count) write(first + j * step, places[j], seen[j]);
    }
}

extern "C" __global__ void __launch_bounds__(256) gather(const T* x, const u32* indices, T* values, double factor, i64 count) {
    at_places(
        indices, count, [&](i64, u32 place) { return (T)factor * x[place]; },
        [&](i64 i, u32, T value) { values[i] = value; });
}

// The same, and subtract the gathered values from x.
extern "C" __global__ void __launch_bounds__(256) take(T* x, const u32* indices, T* values, double factor, i64 count) {
    at_places(
        indices, count, [&](i64, u32 place) { return x[place]; },
        [&](i64 i, u32 place, T value) {
            const T taken = (T)factor * value;
            values[i] = taken;
            x[place] = value - taken;
        });
}

extern "C" __global__ void __launch_bounds__(256) scatter_add(
    const u32* indices, const T* values, T* out, i64 size, double scale, i64 count) {
    at_places(  // only in a damaged message is an index not below size
        indices, count, [&](i64 i, u32 place) { return place < size ? out[place] + (T)scale * values[i] : T(0); },
        [&](i64, u32 place, T sum) {
            if (place < size) out[place] = sum;
        });
}

extern "C" __global__ void __launch_bounds__(256) put_at(const u32* indices, const T* values, T* out, i64 count) {
    at_places(
        indices, count, [&](i64 i, u32) { return values[i]; },
        [&](i64, u32 place, T value) { out[place] = value; });
}
