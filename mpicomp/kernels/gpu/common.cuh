// What every kernel uses. T is the work dtype, float or double, as the macro WORK says; elements are counted in i64.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
typedef WORK T;

constexpr u32 ALL = 0xffffffffu;  // lanes of a warp
constexpr int WARP = 32;

// The bits of a float, and the float of bits, in the integer as wide as T.
__device__ __forceinline__ u32 bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ u64 bits_of(double x) { return (u64)__double_as_longlong(x); }
__device__ __forceinline__ float float_of(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ double float_of(u64 bits) { return __longlong_as_double((i64)bits); }
typedef decltype(bits_of(T(0))) Bits;
constexpr Bits SIGN = Bits(1) << (8 * sizeof(T) - 1);
constexpr Bits INFINITE = sizeof(T) == 4 ? Bits(0x7f800000u) : Bits(0x7ff0000000000000ull);
// |x| in the order of integers, in which NaN is above infinity and all numbers below it.
__device__ __forceinline__ Bits magnitude(T x) { return bits_of(x) & (Bits)~SIGN; }

// x + old, where there is an old.
__device__ __forceinline__ T with(const T* old, i64 i, T value) { return old ? value + old[i] : value; }

// This thread's place among all threads of the grid, and how many there are.
__device__ __forceinline__ i64 thread_of_grid() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ i64 threads_of_grid() { return (i64)gridDim.x * blockDim.x; }

// Sixteen bytes at a time; a pointer into a bucket or a message may not allow it.
template <typename A>
__device__ __forceinline__ bool aligned16(const A* pointer) { return ((u64)pointer & 15) == 0; }
