// Arrays of random numbers: mpicomp/kernels/cpu/random.py says which.
#include "random.cuh"

extern "C" __global__ void fill_uniform(T* out, i64 size, u64 base) {
    for (i64 i = thread_of_grid(); i < size; i += threads_of_grid())
        out[i] = (T)(draw24(base, (u64)i) - (1 << 23)) * T(0x1p-23);
}
