// CUDA's words on the CPU, for tests only: a block's threads are coroutines of one OS thread, run in turn.
//
// A thread runs until it waits (__syncthreads, a shuffle or a ballot) or ends; blocks run one after the other. The
// order in which threads get their turn is chosen by the caller: a kernel that relies on one order, for want of a
// barrier, gives other bytes in another. Where nobody can go on (a barrier that some have left, a shuffle without all of
// its lanes) the process is aborted with a word about it. Shared memory is poisoned before every block.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__
#define __constant__ static
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// In a section of its own, whose ends the linker knows: that is how it is poisoned.
#define __shared__ static __attribute__((section("cuda_shared")))
extern char __start_cuda_shared[] __attribute__((weak));
extern char __stop_cuda_shared[] __attribute__((weak));

struct dim3 { unsigned x = 1, y = 1, z = 1; };
static dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
struct alignas(4) uchar4 { unsigned char x, y, z, w; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline double2 make_double2(double x, double y) { return {x, y}; }
static inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

namespace cuda_on_cpu {
constexpr int MOST = 1024;           // threads of a block
constexpr size_t STACK = 128 << 10;  // bytes of a thread's stack

struct Warp {
    uint64_t slots[32], result[32];
    unsigned arrived, turn;  // lanes that came to this exchange; exchanges that are over
};
struct Thread {
    ucontext_t context;
    jmp_buf where;
    bool begun, done;
    const unsigned* waits;  // may go on when *waits differs from `seen`
    unsigned seen;
};
static Thread threads[MOST];
static Warp warps[MOST / 32];
static ucontext_t home;
static jmp_buf scheduler;
static int current;
static unsigned barrier_turn, barrier_arrived, barrier_sum[2];
static const std::function<void()>* body;

static void fail(const char* what) {
    fprintf(stderr, "CUDA on the CPU: block %u, thread %d: %s\n", blockIdx.x, current, what);
    abort();
}

static __attribute__((noinline)) void switch_away() {
    if (!_setjmp(threads[current].where)) _longjmp(scheduler, 1);
}

static void wait_for(const unsigned* turn, unsigned seen) {
    threads[current].waits = turn;
    threads[current].seen = seen;
    switch_away();
    threads[current].waits = nullptr;
}

static void run_thread() {
    for (;;) {  // a coroutine serves every block
        (*body)();
        threads[current].done = true;
        switch_away();
    }
}

static __attribute__((noinline)) void resume(int index) {
    Thread& thread = threads[index];
    current = index;
    threadIdx.x = index;
    if (_setjmp(scheduler)) return;
    if (thread.begun) _longjmp(thread.where, 1);
    thread.begun = true;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    thread.context.uc_stack.ss_size = STACK;
    if (thread.context.uc_stack.ss_sp == MAP_FAILED) fail("no memory for stacks");
    makecontext(&thread.context, run_thread, 0);
    setcontext(&thread.context);
}

// `order`: 0 ascending, 1 descending, else the seed of another permutation in every block.
static void run(int blocks, int width, unsigned order, const std::function<void()>& kernel) {
    if (width < 1 || width > MOST || width % 32) fail("a block must have a multiple of 32 threads, at most 1024");
    body = &kernel;
    blockDim.x = width;
    gridDim.x = blocks;
    std::vector<int> turns(width);
    for (int i = 0; i < blocks; i++) {
        blockIdx.x = order == 1 ? blocks - 1 - i : i;
        if (__start_cuda_shared) memset(__start_cuda_shared, 0xa5, __stop_cuda_shared - __start_cuda_shared);
        memset(warps, 0, sizeof warps);
        barrier_turn = barrier_arrived = 0;
        for (int t = 0; t < width; t++) {
            threads[t].done = false;
            threads[t].waits = nullptr;
            turns[t] = order == 1 ? width - 1 - t : t;
        }
        if (order > 1)
            for (int t = width - 1; t > 0; t--) {
                order = order * 1664525u + 1013904223u;
                std::swap(turns[t], turns[(order >> 8) % (t + 1)]);
            }
        for (int left = width; left;) {
            bool moved = false;
            for (int t : turns) {
                Thread& thread = threads[t];
                if (thread.done || (thread.waits && *thread.waits == thread.seen)) continue;
                resume(t);
                moved = true;
                left -= thread.done;
            }
            if (!moved) fail("nobody can go on: a barrier or a shuffle that some threads never reach");
        }
    }
}

static const uint64_t* exchange(unsigned mask, uint64_t value) {
    const int lane = current % 32;
    Warp& warp = warps[current / 32];
    if (!(mask >> lane & 1)) fail("a lane outside its own mask");
    if (warp.arrived >> lane & 1) fail("a lane came twice");
    warp.slots[lane] = value;
    warp.arrived |= 1u << lane;
    if ((warp.arrived & mask) == mask) {
        if (warp.arrived != mask) fail("lanes of one warp wait with different masks");
        memcpy(warp.result, warp.slots, sizeof warp.slots);
        warp.arrived = 0;
        warp.turn++;
    } else {
        wait_for(&warp.turn, warp.turn);
    }
    return warp.result;
}

template <typename A>
uint64_t word(A value) {
    static_assert(sizeof(A) <= 8, "shuffles move at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}
template <typename A>
A shuffle(unsigned mask, A value, int from) {
    const uint64_t* all = exchange(mask, word(value));
    if (!(mask >> (from & 31) & 1)) fail("a shuffle from a lane outside the mask");
    A got;
    memcpy(&got, &all[from & 31], sizeof got);
    return got;
}

static unsigned barrier(unsigned value) {
    const unsigned turn = barrier_turn;
    if (barrier_arrived++ == 0) barrier_sum[turn & 1] = 0;
    barrier_sum[turn & 1] += value;
    if (barrier_arrived == blockDim.x) {
        barrier_arrived = 0;
        barrier_turn++;
    } else {
        wait_for(&barrier_turn, turn);
    }
    return barrier_sum[turn & 1];
}
}  // namespace cuda_on_cpu

static inline void __syncthreads() { cuda_on_cpu::barrier(0); }
static inline int __syncthreads_count(int p) { return (int)cuda_on_cpu::barrier(p != 0); }
static inline int __syncthreads_or(int p) { return cuda_on_cpu::barrier(p != 0) != 0; }
static inline int __syncthreads_and(int p) { return cuda_on_cpu::barrier(p != 0) == blockDim.x; }
static inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::exchange(mask, 0); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __nanosleep(unsigned) { cuda_on_cpu::fail("waits for a block that has not run: take tickets"); }

template <typename A>
A __shfl_sync(unsigned mask, A value, int from, int width = 32) {
    const int lane = cuda_on_cpu::current % 32;
    return cuda_on_cpu::shuffle(mask, value, (lane & ~(width - 1)) | (from & (width - 1)));
}
template <typename A>
A __shfl_up_sync(unsigned mask, A value, unsigned delta, int width = 32) {
    const int lane = cuda_on_cpu::current % 32, inside = lane & (width - 1);
    return cuda_on_cpu::shuffle(mask, value, inside < (int)delta ? lane : lane - (int)delta);
}
template <typename A>
A __shfl_down_sync(unsigned mask, A value, unsigned delta, int width = 32) {
    const int lane = cuda_on_cpu::current % 32, inside = lane & (width - 1);
    return cuda_on_cpu::shuffle(mask, value, inside + (int)delta >= width ? lane : lane + (int)delta);
}
template <typename A>
A __shfl_xor_sync(unsigned mask, A value, int other, int width = 32) {
    const int lane = cuda_on_cpu::current % 32;
    const int from = lane ^ other;
    return cuda_on_cpu::shuffle(mask, value, (from & ~(width - 1)) > (lane & ~(width - 1)) ? lane : from);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const uint64_t* all = cuda_on_cpu::exchange(mask, predicate != 0);
    unsigned ballot = 0;
    for (int i = 0; i < 32; i++) ballot |= (mask >> i & 1 && all[i]) ? 1u << i : 0;
    return ballot;
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <typename A, typename B>
A atomicAdd(A* at, B value) { A old = *at; *at = old + (A)value; return old; }
template <typename A, typename B>
A atomicSub(A* at, B value) { A old = *at; *at = old - (A)value; return old; }
template <typename A, typename B>
A atomicMax(A* at, B value) { A old = *at; if ((A)value > old) *at = (A)value; return old; }
template <typename A, typename B>
A atomicMin(A* at, B value) { A old = *at; if ((A)value < old) *at = (A)value; return old; }
template <typename A, typename B>
A atomicOr(A* at, B value) { A old = *at; *at = old | (A)value; return old; }
template <typename A, typename B>
A atomicAnd(A* at, B value) { A old = *at; *at = old & (A)value; return old; }
template <typename A, typename B>
A atomicXor(A* at, B value) { A old = *at; *at = old ^ (A)value; return old; }
template <typename A, typename B>
A atomicExch(A* at, B value) { A old = *at; *at = (A)value; return old; }
template <typename A, typename B, typename C>
A atomicCAS(A* at, B compare, C value) { A old = *at; if (old == (A)compare) *at = (A)value; return old; }

template <typename To, typename From>
To bit_copy(From from) { static_assert(sizeof(To) == sizeof(From), ""); To to; memcpy(&to, &from, sizeof to); return to; }
static inline unsigned __float_as_uint(float x) { return bit_copy<unsigned>(x); }
static inline int __float_as_int(float x) { return bit_copy<int>(x); }
static inline float __uint_as_float(unsigned x) { return bit_copy<float>(x); }
static inline float __int_as_float(int x) { return bit_copy<float>(x); }
static inline long long __double_as_longlong(double x) { return bit_copy<long long>(x); }
static inline double __longlong_as_double(long long x) { return bit_copy<double>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
    const unsigned long long both = (unsigned long long)y << 32 | x;
    unsigned got = 0;
    for (int i = 0; i < 4; i++) got |= (unsigned)(both >> 8 * (s >> 4 * i & 7) & 255) << 8 * i;
    return got;
}
static inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned long long)x * y >> 32; }
static inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned long long)((unsigned __int128)x * y >> 64);
}
template <typename A>
A __ldg(const A* at) { return *at; }
template <typename A>
A __ldcs(const A* at) { return *at; }
template <typename A>
A __ldcg(const A* at) { return *at; }
template <typename A>
void __stcs(A* at, A value) { *at = value; }
template <typename A>
void __stcg(A* at, A value) { *at = value; }
static inline float __fdiv_rn(float x, float y) { return x / y; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline double __dmul_rn(double x, double y) { return x * y; }
static inline double __dadd_rn(double x, double y) { return x + y; }
template <typename A, typename B>
auto min(A a, B b) -> decltype(a + b) { return b < a ? b : a; }
template <typename A, typename B>
auto max(A a, B b) -> decltype(a + b) { return a < b ? b : a; }
