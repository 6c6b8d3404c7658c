// Modified Gram-Schmidt in double by one block of threads, every sum by the tree: mpicomp/kernels/cpu/linalg.py.
#include "sums.cuh"

constexpr int QUARTER = WARP;  // sums of a quarter of a block of the tree, one per lane

// Set v = (v - factor * u) / divisor, or v / divisor without a u; return the sum of v * w by the tree or,
// without a w, max |v|.
//
// A warp takes a quarter of a block of the tree, numbers 32 (4 c + quarter) + lane for c < 8: the folds of widths 512,
// 256 and 128 stay in registers, those of 64 and 32 add quarters, and the rest lanes. Loading eight numbers before
// their use, and forming a sum in the pass that computes its numbers, hides latency. `room`: four times 32 numbers per
// block, and one per block of every level. The same thread always has the same elements.
__device__ __noinline__ double pass(
    double* v, i64 size, const double* u, double factor, double divisor, const double* w, double* room
) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const i64 blocks = (size + TREE - 1) / TREE;
    double* sums = room + blocks * 4 * QUARTER;
    double largest = 0.0;
    __syncthreads();  // all have read the result of the previous pass
    for (i64 quarter = warp; quarter < 4 * blocks; quarter += warps) {
        const i64 begins = quarter / 4 * TREE;
        const int first = (int)(quarter % 4) * WARP + lane;
        const int stop = (int)min(size - begins, (i64)TREE), full = filled(stop);
        double* own = v + begins + first;
        double value[8], term[8];
#pragma unroll
        for (int c = 0; c < 8; c++) value[c] = first + 128 * c < stop ? own[128 * c] : 0.0;
        if (u) {
#pragma unroll
            for (int c = 0; c < 8; c++) term[c] = first + 128 * c < stop ? u[begins + first + 128 * c] : 0.0;
#pragma unroll
            for (int c = 0; c < 8; c++) value[c] -= factor * term[c];
        }
        if (divisor != 1.0) {
#pragma unroll
            for (int c = 0; c < 8; c++) value[c] /= divisor;
        }
        if (u || divisor != 1.0) {
#pragma unroll
            for (int c = 0; c < 8; c++)
                if (first + 128 * c < stop) own[128 * c] = value[c];
        }
        if (!w) {
#pragma unroll
            for (int c = 0; c < 8; c++) largest = fabs(value[c]) > largest ? fabs(value[c]) : largest;
            continue;
        }
        if (w != v) {
#pragma unroll
            for (int c = 0; c < 8; c++) term[c] = first + 128 * c < stop ? w[begins + first + 128 * c] : 0.0;
        }
#pragma unroll
        for (int c = 0; c < 8; c++) {
            const int i = first + 128 * c;
            term[c] = i < stop ? value[c] * (w == v ? value[c] : term[c]) : missing(i, full);
        }
        room[quarter * QUARTER + lane] = fold_own(term);
    }
    if (!w) {
        for (int width = WARP / 2; width; width /= 2) largest = fmax(largest, __shfl_xor_sync(ALL, largest, width));
        if (lane == 0) room[warp] = largest;
        __syncthreads();
        for (int i = 0; i < warps; i++) largest = fmax(largest, room[i]);
        return largest;
    }
    __syncthreads();
    for (i64 block = warp; block < blocks; block += warps) {
        const double* part = room + block * 4 * QUARTER + lane;
        double quarters[4] = {part[0], part[QUARTER], part[2 * QUARTER], part[3 * QUARTER]};
        const double sum = fold_lanes(fold_own(quarters));
        if (lane == 0) sums[block] = sum;
    }
    __syncthreads();
    return finish_tree(sums, blocks);
}

// Make column j a unit vector orthogonal to earlier ones; false if less than `least` of it is left.
__device__ bool separate(double* columns, i64 size, int j, double least, double* room) {
    double* v = columns + j * size;
    double left = 1.0, top = pass(v, size, nullptr, 0.0, 1.0, nullptr, room);
    for (int round = 0;; round++) {
        if (top == 0.0) return false;
        const double norm = sqrt(pass(v, size, nullptr, 0.0, top, v, room)), length = top * norm;
        const bool again = round == 0 || (round < 4 && !(length > 0.5));
        if (round) left *= length;
        if (!(round ? left > least : length > 0.0)) return false;
        // Divide by the norm; the same pass computes the sum that the next one needs.
        if (!again || j == 0) top = pass(v, size, nullptr, 0.0, norm, nullptr, room);
        if (!again) return true;
        if (j == 0) continue;
        double factor = pass(v, size, nullptr, 0.0, norm, columns, room);
        for (int i = 1; i < j; i++) {
            const double* next = columns + i * size;
            factor = pass(v, size, next - size, factor, 1.0, next, room);
        }
        top = pass(v, size, columns + (j - 1) * size, factor, 1.0, nullptr, room);
    }
}
