// What a Metal kernel's body names, in CUDA: so the same body compiles for NVIDIA.
// Compiled with -default-device, so nothing here says __device__.
//
// Left out, until a kernel wants it: atomics, matrices, images, vectors' arithmetic.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __nv_bfloat16 bfloat;
typedef __nv_bfloat16 bfloat16_t;
typedef __half float16_t;

#undef INFINITY
#undef NAN
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fc00000)

template <typename To, typename From>
To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// --- barriers ---

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

void threadgroup_barrier(mem_flags) { __syncthreads(); }
void simdgroup_barrier(mem_flags) { __syncwarp(); }

// --- what the 32 lanes of a SIMD-group, all of them, do together ---

#define MM1_ALL_LANES 0xffffffffu
#define MM1_REDUCTION(name, expression)                       \
  template <typename T>                                       \
  T name(T mine) {                                            \
    for (int step = 16; step > 0; step /= 2) {                \
      T other = __shfl_xor_sync(MM1_ALL_LANES, mine, step);   \
      mine = expression;                                      \
    }                                                         \
    return mine;                                              \
  }
MM1_REDUCTION(simd_sum, mine + other)
MM1_REDUCTION(simd_product, mine * other)
MM1_REDUCTION(simd_max, mine < other ? other : mine)
MM1_REDUCTION(simd_min, other < mine ? other : mine)
MM1_REDUCTION(simd_and, mine & other)
MM1_REDUCTION(simd_or, mine | other)
MM1_REDUCTION(simd_xor, mine ^ other)

bool simd_all(bool mine) { return __all_sync(MM1_ALL_LANES, mine); }
bool simd_any(bool mine) { return __any_sync(MM1_ALL_LANES, mine); }

template <typename T>
T simd_shuffle(T mine, ushort lane) {
  return __shfl_sync(MM1_ALL_LANES, mine, lane);
}
template <typename T>
T simd_broadcast(T mine, ushort lane) {
  return __shfl_sync(MM1_ALL_LANES, mine, lane);
}
template <typename T>
T simd_broadcast_first(T mine) {
  return __shfl_sync(MM1_ALL_LANES, mine, 0);
}
template <typename T>
T simd_shuffle_xor(T mine, ushort mask) {
  return __shfl_xor_sync(MM1_ALL_LANES, mine, mask);
}
template <typename T>
T simd_shuffle_down(T mine, ushort step) {
  return __shfl_down_sync(MM1_ALL_LANES, mine, step);
}
template <typename T>
T simd_shuffle_up(T mine, ushort step) {
  return __shfl_up_sync(MM1_ALL_LANES, mine, step);
}

uint mm1_lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}
template <typename T>
T simd_prefix_inclusive_sum(T mine) {
  for (uint step = 1; step < 32; step *= 2) {
    T other = __shfl_up_sync(MM1_ALL_LANES, mine, step);
    if (mm1_lane() >= step) mine = mine + other;
  }
  return mine;
}
template <typename T>
T simd_prefix_exclusive_sum(T mine) {
  T before = __shfl_up_sync(MM1_ALL_LANES, simd_prefix_inclusive_sum(mine), 1);
  return mm1_lane() == 0 ? T(0) : before;
}

// --- mathematics ---

namespace metal {

template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T clamp(T x, T low, T high) {
  return x < low ? low : (high < x ? high : x);
}
template <typename T>
T select(T no, T yes, bool which) {
  return which ? yes : no;
}
int abs(int x) { return x < 0 ? -x : x; }
int popcount(uint x) { return __popc(x); }
int clz(uint x) { return __clz(x); }
bool isnan(float x) { return x != x; }
bool isinf(float x) { return fabsf(x) == INFINITY; }
bool isfinite(float x) { return fabsf(x) < INFINITY; }
float fma(float a, float b, float c) { return fmaf(a, b, c); }
float fmax(float a, float b) { return fmaxf(a, b); }
float fmin(float a, float b) { return fminf(a, b); }
float max(float a, float b) { return fmaxf(a, b); }  // the number beside a NaN
float min(float a, float b) { return fminf(a, b); }
float pow(float a, float b) { return powf(a, b); }

#define MM1_FUNCTIONS                                  \
  float abs(float x) { return fabsf(x); }              \
  float fabs(float x) { return fabsf(x); }             \
  float exp(float x) { return expf(x); }               \
  float exp2(float x) { return exp2f(x); }             \
  float log(float x) { return logf(x); }               \
  float log2(float x) { return log2f(x); }             \
  float sqrt(float x) { return sqrtf(x); }             \
  float rsqrt(float x) { return 1.0f / sqrtf(x); }     \
  float sin(float x) { return sinf(x); }               \
  float cos(float x) { return cosf(x); }               \
  float tanh(float x) { return tanhf(x); }             \
  float floor(float x) { return floorf(x); }           \
  float ceil(float x) { return ceilf(x); }             \
  float rint(float x) { return rintf(x); }             \
  float round(float x) { return roundf(x); }           \
  float trunc(float x) { return truncf(x); }
MM1_FUNCTIONS

namespace precise {
MM1_FUNCTIONS
}
namespace fast {
MM1_FUNCTIONS
}

}  // namespace metal

// MLX's header says `using namespace metal`. Here that would make CUDA's own max, exp
// and so on ambiguous, which do as well.
using metal::clamp;
using metal::popcount;
using metal::select;
namespace precise = metal::precise;
namespace fast = metal::fast;

// --- a thread's place: the kernel's first line ---

// CUDA rounds the grid up to whole blocks, Metal does not: threads beyond it leave.
#define MM1_PLACE(grid)                                                              \
  const uint3 threads_per_grid = {uint(grid[0]), uint(grid[1]), uint(grid[2])};      \
  const uint3 threadgroup_position_in_grid = {blockIdx.x, blockIdx.y, blockIdx.z};   \
  const uint3 thread_position_in_threadgroup = {                                     \
      threadIdx.x, threadIdx.y, threadIdx.z};                                        \
  const uint3 threads_per_threadgroup = {blockDim.x, blockDim.y, blockDim.z};        \
  const uint3 threadgroups_per_grid = {gridDim.x, gridDim.y, gridDim.z};             \
  const uint3 thread_position_in_grid = {                                            \
      blockIdx.x * blockDim.x + threadIdx.x,                                         \
      blockIdx.y * blockDim.y + threadIdx.y,                                         \
      blockIdx.z * blockDim.z + threadIdx.z};                                        \
  const uint thread_index_in_threadgroup =                                           \
      threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);           \
  const uint thread_index_in_simdgroup = thread_index_in_threadgroup % 32;           \
  const uint simdgroup_index_in_threadgroup = thread_index_in_threadgroup / 32;      \
  const uint simdgroups_per_threadgroup =                                            \
      (blockDim.x * blockDim.y * blockDim.z + 31) / 32;                              \
  const uint threads_per_simdgroup = 32;                                             \
  if (thread_position_in_grid.x >= threads_per_grid.x ||                             \
      thread_position_in_grid.y >= threads_per_grid.y ||                             \
      thread_position_in_grid.z >= threads_per_grid.z) {                             \
    return;                                                                          \
  }
