// Randomised Hadamard rotations of a chunk, up to 4096 numbers, by a block of 256 threads with sixteen numbers each.
//
// Between calls, thread t holds numbers t + 256 k, k = 0..15: so accesses to global memory are dense at any alignment,
// and all sixteen signs come from one random word. Widths follow in the order 1, 2, 4, ... as on the CPU, because each
// adds numbers that the previous one has rounded: four at a time in registers, with an exchange through shared memory
// before each four; the middle exchange stays inside a warp. A chunk shorter than 4096 skips the widths that it does
// not have, and the results of threads beyond it are not used.
#include "common.cuh"
#include "random.cuh"

constexpr int CHUNK = 4096;
constexpr int WIDE = 256;  // threads of a block
constexpr int EACH = CHUNK / WIDE;
constexpr int SIXTEEN = 16 / sizeof(T);  // numbers in sixteen bytes
constexpr int ROW = 128 / sizeof(T);     // numbers in all banks

// The place of number e in shared memory. A gap of sixteen bytes after each row of banks avoids conflicts of threads
// that read sixteen bytes each, sixteen numbers apart; a gap of sixteen numbers after each 256 those of the two halves
// of a warp in `across`.
__device__ constexpr int place(int e) { return e + e / ROW * SIXTEEN + e / 256 * 16; }
constexpr int ROOM = place(CHUNK);
constexpr int RESIDENT = sizeof(T) == 4 ? 4 : 3;  // blocks of a multiprocessor, at least

struct __align__(16) Vector {
    T number[SIXTEEN];
};

// The four widths from `first` on that the chunk has; v[i + 1] is `first` numbers after v[i].
__device__ __forceinline__ void butterflies(T (&v)[EACH], int first, int length) {
#pragma unroll
    for (int apart = 1; apart < EACH; apart *= 2)
        if (first * apart < length) {
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (!(i & apart)) {
                    const T a = v[i], b = v[i + apart];
                    v[i] = a + b;
                    v[i + apart] = a - b;
                }
        }
}

// Multiply by 1 / sqrt(length) and by the Walsh-Hadamard matrix; `shared` has ROOM numbers, used here only.
__device__ __forceinline__ void transform(T (&v)[EACH], T* shared, int length) {
    const int thread = threadIdx.x, lane = thread % WARP;
    const T factor = (T)(length == CHUNK ? 1.0 / 64 : 1.0 / sqrt((double)length));
    T* strided = shared + place(thread);
#pragma unroll
    for (int k = 0; k < EACH; k++) strided[k * place(WIDE)] = v[k];
    __syncthreads();

    Vector* own = (Vector*)(shared + place(EACH * thread));
#pragma unroll
    for (int k = 0; k < EACH / SIXTEEN; k++) {
        const Vector four = own[k];
#pragma unroll
        for (int i = 0; i < SIXTEEN; i++) v[k * SIXTEEN + i] = four.number[i] * factor;
    }
    butterflies(v, 1, length);
#pragma unroll
    for (int k = 0; k < EACH / SIXTEEN; k++) {
        Vector four;
#pragma unroll
        for (int i = 0; i < SIXTEEN; i++) four.number[i] = v[k * SIXTEEN + i];
        own[k] = four;
    }
    __syncwarp();

    T* across = shared + place(thread / WARP * WARP * EACH + lane / 16 * 256) + lane % 16;
#pragma unroll
    for (int k = 0; k < EACH; k++) v[k] = across[place(16 * k)];
    butterflies(v, 16, length);
#pragma unroll
    for (int k = 0; k < EACH; k++) across[place(16 * k)] = v[k];
    __syncthreads();

#pragma unroll
    for (int k = 0; k < EACH; k++) v[k] = strided[k * place(WIDE)];
    butterflies(v, 256, length);
}

// The number of random words: number j has bit j / width of word j % width.
__device__ __forceinline__ int width_of(int length) { return length < WARP ? 1 : length / WARP; }

// Give random signs, counted from `counter`.
__device__ __forceinline__ void sign(T (&v)[EACH], int length, u64 base, u64 counter) {
    const int thread = threadIdx.x, width = width_of(length), shift = __ffs(width) - 1;
    u32 word = draw32(base, counter + (thread & (width - 1))) >> min(thread >> shift, 31);
    const int step = min(WIDE >> shift, 31);
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        v[k] = float_of(bits_of(v[k]) ^ (Bits)(word & 1) << (8 * sizeof(T) - 1));
        word >>= step;
    }
}

// Rotate, and undo it.
__device__ __forceinline__ void rotate_chunk(T (&v)[EACH], T* shared, int length, u64 base, u64 counter) {
    sign(v, length, base, counter);
    transform(v, shared, length);
}
__device__ __forceinline__ void unrotate_chunk(T (&v)[EACH], T* shared, int length, u64 base, u64 counter) {
    transform(v, shared, length);
    sign(v, length, base, counter);
}

// Below 2^-16 of the largest finite number, so that no sum overflows; NaN becomes the limit, as on the CPU.
__device__ __forceinline__ T clipped(T value) {
    const T limit = float_of(sizeof(T) == 4 ? (Bits)0x777fffffu : (Bits)0x7eefffffffffffffull);
    value = value < limit ? value : limit;
    return value > -limit ? value : -limit;
}

// Set v to x + old, clipped, for numbers from `from` up to `stop`, and to zero elsewhere. All loads are
// issued before the first use.
__device__ __forceinline__ void load_clipped(T (&v)[EACH], const T* x, const T* old, int from, int stop) {
    T more[EACH];
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const int j = threadIdx.x + k * WIDE;
        v[k] = from <= j && j < stop ? x[j] : 0;
    }
    if (old) {
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const int j = threadIdx.x + k * WIDE;
            more[k] = from <= j && j < stop ? old[j] : 0;
        }
#pragma unroll
        for (int k = 0; k < EACH; k++) v[k] += more[k];
    }
#pragma unroll
    for (int k = 0; k < EACH; k++) v[k] = clipped(v[k]);
}

// Load numbers of an array, zeros from `stop` on, and store those before `stop`.
__device__ __forceinline__ void load(T (&v)[EACH], const T* from, int stop) {
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const int j = threadIdx.x + k * WIDE;
        v[k] = j < stop ? from[j] : 0;
    }
}
__device__ __forceinline__ void store(const T (&v)[EACH], T* to, int stop) {
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const int j = threadIdx.x + k * WIDE;
        if (j < stop) to[j] = v[k];
    }
}
