// Sums in one fixed order, and passes that only add: see mpicomp/kernels/cpu/sums.py.
#include "elements.cuh"
#include "sums.cuh"

// Whether a number is NaN or infinite.
__device__ __forceinline__ bool endless(T x) { return magnitude(x) >= INFINITE; }

extern "C" __global__ void __launch_bounds__(256) axpy(const T* x, T* out, double scale, i64 size) {
    const T factor = (T)scale;
    visit_elements(size, head_of(x, (const T*)out, (const T*)nullptr), [&](auto access, i64 i) {
        T v[access.K], sum[access.K];
        access.load(x + i, v);
        access.load(out + i, sum);
#pragma unroll
        for (int k = 0; k < access.K; k++) sum[k] += factor * v[k];
        access.store(out + i, sum);
    });
}

extern "C" __global__ void __launch_bounds__(256) add(const T* x, const T* old, T* out, i64 size) {
    visit_elements(size, head_of(x, old, (const T*)out), [&](auto access, i64 i) {
        T v[access.K];
        access.load_sum(x, old, i, v);
        access.store(out + i, v);
    });
}

// `found` becomes 1 if a quotient is not finite; all threads that write it write the same.
extern "C" __global__ void __launch_bounds__(256) divide(T* x, double divisor, i64 size, int* found) {
    const T by = (T)divisor;
    bool bad = false;
    visit_elements(size, head_of((const T*)x, (const T*)nullptr, (const T*)nullptr), [&](auto access, i64 i) {
        T v[access.K];
        access.load(x + i, v);
#pragma unroll
        for (int k = 0; k < access.K; k++) bad |= endless(v[k] /= by);
        access.store(x + i, v);
    });
    if (bad) *found = 1;
}

extern "C" __global__ void __launch_bounds__(256) nonfinite(const T* x, const T* old, i64 size, int* found) {
    bool bad = false;
    visit_elements(size, head_of(x, old, (const T*)nullptr), [&](auto access, i64 i) {
        T v[access.K];
        access.load_sum(x, old, i, v);
#pragma unroll
        for (int k = 0; k < access.K; k++) bad |= endless(v[k]);
    });
    if (bad) *found = 1;
}

// A level above: of `rows` rows of `size` sums, every 1024 become one, a warp each.
extern "C" __global__ void __launch_bounds__(256) fold_rows(const double* sums, double* next, i64 size, i64 rows) {
    const i64 warp = thread_of_grid() / WARP, blocks = (size + TREE - 1) / TREE;
    if (warp >= rows * blocks) return;
    const i64 row = warp / blocks, first = warp % blocks * TREE;
    const double* own = sums + row * size + first;
    const double sum = fold_tree((int)min(size - first, (i64)TREE), [&](int i) { return own[i]; });
    if (threadIdx.x % WARP == 0) next[warp] = sum;
}

// The rest of the tree, a block of 1024 threads per row.
extern "C" __global__ void __launch_bounds__(1024) total(const double* sums, double* totals, i64 size) {
    __shared__ double shared[WARP];
    const double sum = fold_sums(sums + blockIdx.x * size, size, shared);
    if (threadIdx.x == 0) totals[blockIdx.x] = sum;
}
