// Scalar types and constants.
#pragma once

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef long intptr_t;
typedef unsigned long uintptr_t;

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;

#define __METAL_VERSION__ 310

// Functions of the shim are always inlined, so that what the runtime reports is a line
// of the kernel.
#define MSL_FN inline __attribute__((always_inline))
#define METAL_FUNC inline __attribute__((always_inline))

// Default arguments that give the place of the call. Return addresses would not do: the
// compiler may duplicate a call.
#define MSL_HERE int line_ = __builtin_LINE(), int column_ = __builtin_COLUMN()

#ifdef MSL_LINT
typedef __bf16 bfloat;
#else
// A class, because MSL converts bfloat to float by itself but not back.
struct bfloat {
  uint16_t bits;

  bfloat() = default;
  template <class T, class = decltype(float(T()))>
  explicit constexpr bfloat(T value) : bits(rounded(static_cast<float>(value))) {}
  constexpr operator float() const {
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  }
  constexpr bfloat operator-() const { return bfloat(-static_cast<float>(*this)); }

 private:
  static constexpr uint16_t rounded(float value) {  // to nearest, ties to even
    const uint32_t all = __builtin_bit_cast(uint32_t, value);
    if ((all & 0x7fffffff) > 0x7f800000) {
      return static_cast<uint16_t>((all >> 16) | 0x40);  // a NaN stays one
    }
    return static_cast<uint16_t>((all + 0x7fff + ((all >> 16) & 1)) >> 16);
  }
};

#define MSL_BFLOAT_OPERATOR(OP)                                                        \
  constexpr bfloat operator OP(bfloat a, bfloat b) {                                   \
    return bfloat(static_cast<float>(a) OP static_cast<float>(b));                     \
  }                                                                                    \
  template <class T, class = decltype(float(T()))>                                     \
  constexpr bfloat& operator OP##=(bfloat & a, T b) {                                  \
    a = bfloat(static_cast<float>(a) OP static_cast<float>(b));                        \
    return a;                                                                          \
  }
MSL_BFLOAT_OPERATOR(+)
MSL_BFLOAT_OPERATOR(-)
MSL_BFLOAT_OPERATOR(*)
MSL_BFLOAT_OPERATOR(/)
#endif

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define HUGE_VALF (__builtin_inff())
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.1920929e-7f
#define HALF_MAX half(65504.0f)
#define CHAR_MAX 127
#define UCHAR_MAX 255
#define SHRT_MAX 32767
#define USHRT_MAX 65535
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define LONG_MAX 9223372036854775807l
#define ULONG_MAX 18446744073709551615ul
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.78539816339744830962f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_PI_F 0.63661977236758134308f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
