// Definitions for every kernel. T is the work dtype, float or double, from the macro WORK; element counts are i64.

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
// |x| as an integer of the same order; NaN is above infinity.
__device__ __forceinline__ Bits magnitude(T x) { return bits_of(x) & (Bits)~SIGN; }

// value + old[i], or value without an old.
__device__ __forceinline__ T with(const T* old, i64 i, T value) { return old ? value + old[i] : value; }

// The index of this thread in the grid, and the number of threads of the grid.
__device__ __forceinline__ i64 thread_of_grid() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ i64 threads_of_grid() { return (i64)gridDim.x * blockDim.x; }

// Whether sixteen bytes can be accessed at once; pointers into buckets or messages may be misaligned.
template <typename A>
__device__ __forceinline__ bool aligned16(const A* pointer) { return ((u64)pointer & 15) == 0; }
