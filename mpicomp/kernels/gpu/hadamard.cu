// Rotations and Kashin representations, a chunk per block: see mpicomp/kernels/cpu/hadamard.py.
#include "elements.cuh"
#include "hadamard.cuh"
#include "sums.cuh"

// One block takes the last whole chunk and, if the array ends with a part of a chunk, the one that overlaps it.
extern "C" __global__ void __launch_bounds__(256, RESIDENT) rotate(const T* x, const T* old, T* y, i64 size, i64 chunk, u64 base, i64 start) {
    __align__(16) __shared__ T shared[ROOM];
    const int length = (int)chunk;
    const bool last = blockIdx.x == gridDim.x - 1;
    i64 first = blockIdx.x * chunk, counter = start + first;
    int rotated = 0;  // numbers at the beginning of the chunk that the previous one has rotated
    for (;;) {
        T v[EACH];
        load_clipped(v, x + first, old ? old + first : nullptr, rotated, length);
        if (rotated) {
#pragma unroll
            for (int k = 0; k < EACH; k++) {
                const int j = threadIdx.x + k * WIDE;
                if (j < rotated) v[k] = y[first + j];
            }
        }
        rotate_chunk(v, shared, length, base, (u64)counter);
        store(v, y + first, length);
        if (!last || first + chunk == size) return;
        rotated = (int)(first + 2 * chunk - size);
        first = size - chunk;
        counter = start + size - width_of(length);
        __syncthreads();  // other threads read the overlap than have written it
    }
}

// Undoes `rotate`: first the chunk that overlaps.
extern "C" __global__ void __launch_bounds__(256, RESIDENT) unrotate(T* y, i64 size, i64 chunk, u64 base, i64 start) {
    __align__(16) __shared__ T shared[ROOM];
    const int length = (int)chunk;
    const i64 own = blockIdx.x * chunk;
    bool overlapping = blockIdx.x == gridDim.x - 1 && own + chunk < size;
    for (;;) {
        const i64 first = overlapping ? size - chunk : own;
        const i64 counter = overlapping ? start + size - width_of(length) : start + own;
        T v[EACH];
        load(v, y + first, length);
        unrotate_chunk(v, shared, length, base, (u64)counter);
        store(v, y + first, length);
        if (!overlapping) return;
        overlapping = false;
        __syncthreads();  // other threads read the overlap than have written it
    }
}

// One chunk of a Kashin representation: `count` numbers of x from `first` on become `length` numbers of a from `at` on.
struct Piece {
    i64 first, at;
    int length, count;
};

__device__ __forceinline__ int room(int length) { return length * 17 / 20; }

// Whole chunks, then smaller ones, one of each size or two, down to 64.
__device__ __forceinline__ Piece piece_of(i64 number, i64 size) {
    const i64 whole = min(number, size / room(CHUNK));
    Piece piece = {whole * room(CHUNK), whole * CHUNK, CHUNK, 0};
    for (i64 i = whole;; i++) {
        while (piece.length > 64 && room(piece.length) > size - piece.first) piece.length /= 2;
        piece.count = (int)min((i64)room(piece.length), size - piece.first);
        if (i == number) return piece;
        piece.first += piece.count;
        piece.at += piece.length;
    }
}

// The iteration of Lyubarskii and Vershynin: a is the sum of the clipped rotations of the rests, the last unclipped.
extern "C" __global__ void __launch_bounds__(256) spread(const T* x, const T* old, T* a, i64 size, u64 base, i64 start) {
    __align__(16) __shared__ T shared[ROOM];
    __shared__ double tree[WIDE];
    const Piece piece = piece_of(blockIdx.x, size);
    const int length = piece.length;
    const u64 counter = (u64)(start + piece.at);
    T rest[EACH], sum[EACH];
    load_clipped(rest, x + piece.first, old ? old + piece.first : nullptr, 0, piece.count);
#pragma unroll
    for (int k = 0; k < EACH; k++) sum[k] = (T)-0.0;  // the zero that changes nothing
    const double down = sizeof(T) == 4 ? 1.0 : 0x1p-500;  // no square of a double overflows
    double sums[CHUNK / TREE];
#pragma unroll
    for (int block = 0; block < EACH / 4; block++) {
        double square[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const double value = rest[4 * block + k] * down;
            square[k] = value * value;
        }
        sums[block] = fold_block<WIDE / WARP>(fold_own(square), tree);
    }
    const double squares = fold_own(sums);
    T level = sizeof(T) == 4 ? (T)sqrt(squares / length) : (T)(sqrt(squares) * 0x1p500 / sqrt((double)length));
#pragma unroll 1
    for (int iteration = 0;; iteration++) {
        T part[EACH];
#pragma unroll
        for (int k = 0; k < EACH; k++) part[k] = rest[k];
        rotate_chunk(part, shared, length, base, counter);
        const bool last = iteration == 2;
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            if (!last) {
                part[k] = part[k] < level ? part[k] : level;
                part[k] = part[k] > -level ? part[k] : -level;
            }
            sum[k] += part[k];
        }
        if (last) break;
        unrotate_chunk(part, shared, length, base, counter);
#pragma unroll
        for (int k = 0; k < EACH; k++)
            if ((int)threadIdx.x + k * WIDE < piece.count) rest[k] -= part[k];
        level *= (T)0.9;
    }
    store(sum, a + piece.at, length);
}

extern "C" __global__ void __launch_bounds__(256, RESIDENT) unspread(const T* a, T* out, i64 size, u64 base, i64 start) {
    __align__(16) __shared__ T shared[ROOM];
    const Piece piece = piece_of(blockIdx.x, size);
    T v[EACH];
    load(v, a + piece.at, piece.length);
    unrotate_chunk(v, shared, piece.length, base, (u64)(start + piece.at));
    store(v, out + piece.first, piece.count);
}

// The sums of y * y and of y * z over each block of the tree, `room` apart; a warp per block.
extern "C" __global__ void __launch_bounds__(256) products(const T* y, const T* z, i64 size, double* sums, i64 room) {
    const i64 blocks = (size + TREE - 1) / TREE;
    for (i64 block = thread_of_grid() / WARP; block < blocks; block += threads_of_grid() / WARP) {
        const int stop = (int)min(size - block * TREE, (i64)TREE), full = filled(stop), lane = threadIdx.x % WARP;
        double same = 0.0, mixed = 0.0;
#pragma unroll 1
        for (int half = 0; half < 2; half++) {  // numbers 64 apart: all folds except those of 32 and of lanes
            const T *left = y + block * TREE + half * WARP + lane, *right = z + block * TREE + half * WARP + lane;
            T a[16], b[16];
            double square[16], product[16];
#pragma unroll
            for (int k = 0; k < 16; k++) {
                const bool there = half * WARP + lane + 64 * k < stop;
                a[k] = there ? left[64 * k] : 0;
                b[k] = there ? right[64 * k] : 0;
            }
#pragma unroll
            for (int k = 0; k < 16; k++) {
                const int i = half * WARP + lane + 64 * k;
                square[k] = i < stop ? (double)a[k] * (double)a[k] : missing(i, full);
                product[k] = i < stop ? (double)a[k] * (double)b[k] : missing(i, full);
            }
            same = half ? same + fold_own(square) : fold_own(square);
            mixed = half ? mixed + fold_own(product) : fold_own(product);
        }
        same = fold_lanes(same);
        mixed = fold_lanes(mixed);
        if (lane == 0) {
            sums[block] = same;
            sums[room + block] = mixed;
        }
    }
}

// The totals of arrays of sums, `room` apart; a block per array.
extern "C" __global__ void __launch_bounds__(1024) totals(double* sums, i64 count, i64 room, double* results) {
    const double sum = finish_tree(sums + blockIdx.x * room, count);
    if (threadIdx.x == 0) results[blockIdx.x] = sum;
}

// `left` may be x or old, element by element.
extern "C" __global__ void __launch_bounds__(256) left_out(const T* x, const T* old, const T* z, double scale, T* left, i64 size) {
    const T factor = (T)scale;
    const int head = head_of(x, old, (const T*)left);
    visit_elements(size, head == head_of(z, z, z) ? head : -1, [&](auto access, i64 i) {
        T value[access.K], decoded[access.K];
        access.load_sum(x, old, i, value);
        access.load(z + i, decoded);
#pragma unroll
        for (int k = 0; k < access.K; k++) value[k] -= factor * decoded[k];
        access.store(left + i, value);
    });
}
